"""Writes a vector for each line of a file, or says how well a model's vectors tell which sentences mean the same.

python -m infer.embed MODEL --texts FILE --out vectors.npy
python -m infer.embed MODEL --sts sts-dev.csv
"""

import pathlib
import time
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import scipy.stats
import tyro

import jaxlm
from infer import session


def read_lines(file: pathlib.Path) -> list[str]:
    """The lines of a UTF-8 file, which end with a line feed or both of "\\r\\n"; other separators are part of a text."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [line.removesuffix("\n").removesuffix("\r") for line in lines]


def read_sts(file: pathlib.Path) -> tuple[list[float], list[str], list[str]]:
    """Scores and pairs of sentences: the fifth, sixth and seventh column of the STS benchmark's files.

    Raises:
      ValueError: for a line without them; names it.
    """
    scores, first, second = [], [], []
    for number, line in enumerate(read_lines(file), 1):
        columns = line.split("\t")
        try:
            scores.append(float(columns[4]))
            first.append(columns[5].strip())
            second.append(columns[6].strip())
        except (ValueError, IndexError) as error:
            raise ValueError(f"{file}, line {number}: a score and two sentences must stand in the fifth to seventh of its "
                             "columns, separated by tabs") from error
    return scores, first, second


def spearman(first: np.ndarray, second: np.ndarray, scores: list[float]) -> float:
    """The rank correlation of cosines [n] with the scores that people gave."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(scipy.stats.spearmanr((first * second).sum(axis=1) / lengths, scores).statistic)


def main(model: tyro.conf.Positional[str], texts: pathlib.Path | None = None, out: pathlib.Path | None = None,
         sts: pathlib.Path | None = None,
         pooling: Literal["mean", "first", "last", "max", "weighted_mean"] | None = None, normalize: bool | None = None,
         truncate: int | None = None, batch: int = 32, dtype: Literal["float32", "bfloat16", "float16"] | None = None,
         as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Vectors of texts.

    Args:
      model: a Hugging Face directory, a GGUF file, or the id of a model on the hub.
      texts: a UTF-8 file, one text per line.
      out: where their vectors go, as a NumPy array of as many rows.
      sts: a file of the STS benchmark; prints Spearman's correlation of the vectors' cosines with its scores.
      pooling: how a text's tokens become one vector; needed for models that do not say.
      normalize: whether vectors are of length 1; default as the model has it, or else yes.
      truncate: read so many tokens of a text at most; default what a sentence encoder says, or all, and a text longer than the
        model's context is an error.
      batch: texts at a time.
      dtype: of weights and computation; default float32 on a CPU, bfloat16 on accelerators.
      as_json: print one JSON object on the last line of standard output.
    """
    session.cache_compilations()
    console = session.console(as_json)
    if (texts is None) != (out is None) or (texts is None) == (sts is None):
        raise ValueError("give --texts and --out together, or --sts alone")
    if sts is None:
        read = read_lines(texts)
    else:
        scores, first, second = read_sts(sts)
        read = first + second
    if not read:
        raise ValueError(f"{texts or sts} is empty")
    with console.status(f"loading {model}"):
        loaded = jaxlm.load(model, dtype=None if dtype is None else jnp.dtype(dtype))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, so it cannot take text")
    began = time.perf_counter()
    vectors = jaxlm.embed(loaded, read, pooling=pooling, normalize=normalize, truncate=truncate, batch=batch)
    seconds = time.perf_counter() - began
    result = {"texts": len(read), "width": vectors.shape[1], "seconds": seconds, "texts_per_s": len(read) / seconds}
    console.print(f"{len(read)} texts, vectors of {vectors.shape[1]} numbers, {result['texts_per_s']:.1f} texts/s")
    if sts is None:
        with out.open("wb") as file:  # numpy.save would add .npy to a path
            np.save(file, vectors)
    else:
        half = len(first)
        result["spearman"] = spearman(vectors[:half], vectors[half:], scores)
        console.print(f"Spearman {result['spearman']:.4f} over {half} pairs")
    session.finish(result, as_json)


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main, description=__doc__)

"""Trains a byte-level BPE tokenizer, and writes it as Hugging Face directories have it.

python -m train.tokenizer --files "texts/*.txt" --vocabulary 8192 --out tokenizer
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tyro

from infer import session
from jaxlm.data.code import Code
from jaxlm.data.source import Files, JsonLines, Parquet, Source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import END, save, train


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a byte-level BPE tokenizer."""

    out: pathlib.Path
    """The folder that it is written to."""
    vocabulary: int = 8192
    """Tokens at most, the 256 bytes and the special ones among them."""
    files: tuple[str, ...] = ()
    """Patterns of files: .jsonl and .json have a document per line, .parquet per row, any other file is one. Default: the
    source code of Python's standard library."""
    field: str = "text"
    """Of JSON lines and Parquet files."""
    special: tuple[str, ...] = (END,)
    """Tokens that no text has; the first ends documents."""
    documents: int = 2000
    """How many are read, drawn at random."""
    seed: int = 0
    """Of the draw."""
    json: bool = False
    """Print the results as one line of JSON."""


def sources(arguments: Arguments) -> list[Source]:
    """What is read, by the files' endings."""
    if not arguments.files:
        return [Code()]
    kinds: dict[str, list[str]] = {}
    for pattern in arguments.files:
        kinds.setdefault(pathlib.Path(pattern).suffix, []).append(pattern)
    found: list[Source] = []
    for ending, patterns in kinds.items():
        given = tuple(patterns)
        if ending in (".jsonl", ".json"):
            found.append(JsonLines(given, arguments.field))
        else:
            found.append(Parquet(given, arguments.field) if ending == ".parquet" else Files(given))
    return found


def main(arguments: Arguments) -> dict[str, Any]:
    """Reads, trains, writes, and says how many bytes a token has."""
    texts = [source.open() for source in sources(arguments)]
    places = [(texts[which], place) for which in range(len(texts)) for place in range(len(texts[which]))]
    drawn = np.random.default_rng(arguments.seed).permutation(len(places))[:arguments.documents]
    documents = [places[one][0][places[one][1]] for one in drawn]
    save(train(documents, arguments.vocabulary, arguments.special), arguments.out, arguments.special[0])
    tokenizer = Tokenizer.from_directory(arguments.out)
    sample = documents[:100]
    tokens = sum(len(tokenizer.encode(text, parse_special=False)) for text in sample)
    result = {"out": str(arguments.out), "vocabulary": tokenizer.size, "documents": len(documents),
              "bytes_per_token": sum(len(text.encode()) for text in sample) / max(tokens, 1)}
    session.console(arguments.json).print(f"{tokenizer.size} tokens of {len(documents)} documents in {arguments.out}: "
                                          f"{result['bytes_per_token']:.2f} bytes per token")
    session.finish(result, arguments.json)
    return result


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

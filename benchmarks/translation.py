"""Translates a file with an encoder-decoder by beam search and compares the result with a reference: BLEU and speed.

    .venv/bin/python benchmarks/translation.py --model checkpoints/opus-mt-en-fr --source dev.en --reference dev.fr

One sentence a line in both files. Texts are translated in batches of similar length, and each may take twice its source's
tokens and a few. BLEU is that of sacrebleu with its defaults, which must be installed: pip install sacrebleu.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import tyro

from infer import session

EXTRA = 16  # tokens that a translation may have beside twice its source's


@dataclasses.dataclass(frozen=True)
class Arguments:
    """BLEU and speed of an encoder-decoder's translations."""

    model: str
    """A Hugging Face directory, or a repository's name."""
    source: pathlib.Path
    """What to translate, a sentence a line."""
    reference: pathlib.Path
    """The same sentences in the other language."""
    beams: int = 4
    """Of the search; 1 is greedy."""
    length_penalty: float = 1.0
    """Scores are divided by the length to its power."""
    early_stopping: bool = False
    """Ends a sentence with so many finished translations as there are beams."""
    batch: int = 16
    """Sentences translated together."""
    limit: int | None = None
    """Only so many sentences, evenly from the whole file; default all."""
    banned: tuple[int, ...] | None = None
    """Tokens never to emit; default padding."""
    start: tuple[int, ...] | None = None
    """Tokens that translations begin with, a language's say; default the model's."""
    output: pathlib.Path | None = None
    """Also write the translations to this file."""
    renormalise: bool = False
    """Scores are probabilities among the tokens that may come, not among all."""
    json: bool = False
    """Print one JSON object on the last line of standard output."""


def batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in groups of `size` of similar length, longest first; the last group is filled up with the shortest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = [order[i:i + size] for i in range(0, len(order), size)]
    groups[-1] += [order[-1]] * (size - len(groups[-1]))
    return groups


def main(arguments: Arguments) -> dict[str, Any]:
    """Translates, prints the score, and returns what was measured.

    Raises:
      ValueError: when the files do not hold the same number of lines, a number is not positive, or sacrebleu is not installed.
    """
    for name, value in (("batch", arguments.batch), ("limit", arguments.limit)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")
    try:
        import sacrebleu
    except ImportError as error:
        raise ValueError("BLEU is computed by sacrebleu: pip install sacrebleu") from error
    import jaxlm
    from infer.embed import read_lines
    from jaxlm.decoding.beam import beam_search
    session.cache_compilations()
    console = session.console(arguments.json)
    source, reference = read_lines(arguments.source), read_lines(arguments.reference)
    if len(source) != len(reference) or not source:
        raise ValueError(f"{arguments.source} has {len(source)} lines and {arguments.reference} {len(reference)}")
    count = min(len(source) if arguments.limit is None else arguments.limit, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    model = jaxlm.load(arguments.model)
    banned = arguments.banned
    if banned is None:
        banned = () if model.tokenizer.pad_id is None else (model.tokenizer.pad_id,)
    rows = [model.tokenizer.encode(source[i]) for i in chosen]
    texts, tokens, cut, began = [""] * count, 0, 0, time.perf_counter()
    groups = batches([len(row) for row in rows], min(arguments.batch, count))
    for done, group in enumerate(groups, 1):
        longest = model.decoder.length - 1
        limit = min(2 * max(len(rows[i]) for i in group) + EXTRA, longest)
        found = beam_search(model, [rows[i] for i in group], limit, beams=arguments.beams, banned_tokens=banned,
                            length_penalty=arguments.length_penalty, early_stopping=arguments.early_stopping,
                            renormalise=arguments.renormalise, start=arguments.start)
        for i in range(len(set(group))):
            texts[group[i]] = found.text[i]
            tokens += len(found.tokens[i])
            cut += int(found.tokens[i][-1]) not in model.tokenizer.eos_ids
        console.print(f"{done} of {len(groups)} batches, {time.perf_counter() - began:.0f} s", end="\r")
    seconds = time.perf_counter() - began
    if arguments.output is not None:
        arguments.output.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    metric = sacrebleu.metrics.BLEU()
    score = metric.corpus_score(texts, [[reference[i] for i in chosen]])
    console.print(f"{model!r}\n{count} sentences, {arguments.beams} beams, length penalty {arguments.length_penalty}, early "
                  f"stopping {arguments.early_stopping}, batch {arguments.batch}, never {banned}"
                  f"{', renormalised' if arguments.renormalise else ''}\n"
                  f"BLEU {score.score:.2f} ({metric.get_signature()}); {cut} translations cut at their limit\n"
                  f"{tokens} tokens in {seconds:.1f} s with compilation: {tokens / seconds:.1f} tokens/s")
    return {"bleu": score.score, "signature": str(metric.get_signature()), "sentences": count, "beams": arguments.beams,
            "length_penalty": arguments.length_penalty, "early_stopping": arguments.early_stopping, "batch": arguments.batch,
            "banned": banned, "renormalise": arguments.renormalise, "cut": cut, "tokens": tokens, "seconds": seconds,
            "tokens_per_s": tokens / seconds}


if __name__ == "__main__":
    with session.errors():
        given = tyro.cli(Arguments, description=__doc__)
        result = main(given)
        if given.json:
            print(json.dumps(result))

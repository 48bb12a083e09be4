"""A small model drafts for a larger one: tokens per call of every rule, with a chain and with trees, and speeds beside plain.

    .venv/bin/python benchmarks/draft_model.py --target TARGET --draft DRAFT --questions HumanEval.jsonl.gz

Prompts are answered in batches. At temperature 0 every lossless rule accepts the same, so one stands for all. Rules that give
plain decoding's tokens are checked against them: rows that differ are counted, with the least gap, at temperature 0, between
the largest logit and the lower one of the two tokens at which one parted.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jaxlm
from infer import bench, session
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import draft_model
from jaxlm.decoding.speculative.drafters.grow import Dynamic, Static, StochasticBeam

# What the static tree takes for the acceptance of a child of each rank; assumed, not measured.
ACCURACIES = ((0.75, 0.1, 0.04, 0.02),)


def kinds(nodes: int, length: int) -> list[tuple[str, str, Any, float]]:
    """(shape's name, rule, shape, temperature) of everything that is measured."""
    chain, best = trees.chain(length), trees.best(ACCURACIES, nodes)
    beam = StochasticBeam((nodes - 1) // length, length)
    found = [(name, "match", shape, 0.0) for name, shape in (
        (f"chain of {length}", Static(chain)), (f"best {nodes} nodes", Static(best)), (f"dynamic {nodes}", Dynamic(nodes)))]
    found += [(name, rule, shape, 0.8) for name, rule, shape in (
        (f"chain of {length}", "match", Static(chain)), (f"chain of {length}", "chain", Static(chain, "independent")),
        (f"chain of {length}", "block", Static(chain, "independent")),
        (f"best {nodes} nodes", "match", Static(best)), (f"dynamic {nodes}", "match", Dynamic(nodes)),
        (f"best {nodes} nodes", "point_mass", Static(best)),
        (f"best {nodes} nodes", "multi_round", Static(best, "independent")),
        (f"best {nodes} nodes", "k_seq", Static(best, "independent")),
        (f"best {nodes} nodes", "without_replacement", Static(best, "distinct")),
        (f"beam of {beam.width} x {length}", "without_replacement", beam))]
    return found


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A small model drafts for a larger one."""

    target: str
    """A GGUF file or Hugging Face directory."""
    draft: str
    """A smaller model with the same vocabulary."""
    questions: pathlib.Path
    """JSON lines as those of HumanEval or Spec-Bench."""
    prompts: int = 40
    """How many of them."""
    batch: int = 8
    """Rows answered together."""
    new_tokens: int = 128
    """The most tokens of an answer."""
    nodes: int = 16
    """Of the trees, the root among them."""
    length: int = 5
    """Tokens of the chain."""
    json: pathlib.Path | None = None
    """Write the rows of the table to this file, after each."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row of the table."""

    shape: str
    rule: str
    temperature: float
    tokens_per_call: float
    tokens_per_s: float
    ratio: float
    differing: int | None
    least_margin: float | None


def answers(model: jaxlm.Model, prompts: list[list[int]], arguments: Arguments, temperature: float,
            **options: Any) -> tuple[list[np.ndarray], float, float]:
    """Every prompt's tokens, tokens after each row's first per call of the model, and per second of decoding."""
    tokens, emitted, calls, seconds = [], 0, 0, 0.0
    for start in range(0, len(prompts), arguments.batch):
        part = prompts[start:start + arguments.batch]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(start, start + len(part)))
        result = jaxlm.generate(model, part, arguments.new_tokens, temperature=temperature, key=keys, **options)
        later = [len(row) - 1 for row in result.tokens]
        tokens += result.tokens
        emitted += sum(later)
        calls += sum(later) if result.speculation is None else int(result.speculation.calls.sum())
        seconds += result.seconds.decode
    return tokens, emitted / calls, emitted / seconds


def parted(model: jaxlm.Model, prompts: list[list[int]], plain: list[np.ndarray],
           other: list[np.ndarray]) -> tuple[int, float | None]:
    """How many rows differ, and the least margin at which one does."""
    margins = []
    for prompt, ours, theirs in zip(prompts, plain, other, strict=True):
        found = bench.first_difference(ours.tolist(), theirs.tolist())
        if found is not None:
            place, *both = found
            margins.append(bench.margin(model, [*prompt, *ours[:place].tolist()], [one for one in both if one is not None]))
    return len(margins), min(margins, default=None)


def main(arguments: Arguments) -> None:
    """Measures all kinds and prints them as they come."""
    session.cache_compilations()
    console, began = Console(width=140), time.perf_counter()
    target, draft = jaxlm.load(arguments.target), jaxlm.load(arguments.draft)
    questions = bench.read_questions(arguments.questions)[:arguments.prompts]
    prompts = [bench.encode(target, question, raw=False) for question in questions]
    prompts.sort(key=len)  # rows of a batch wait for the longest
    rows: list[Measured] = []

    def add(row: Measured) -> None:
        rows.append(row)
        console.print(row, f"{time.perf_counter() - began:.0f} s")
        if arguments.json is not None:
            text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
            arguments.json.write_text(text + "\n", encoding="utf-8")

    plain = {}
    for temperature in (0.0, 0.8):
        plain[temperature] = answers(target, prompts, arguments, temperature)
        add(Measured("nothing", "", temperature, 1.0, plain[temperature][2], 1.0, None, None))
        add(measure(target, prompts, arguments, plain, "lookup", "match", temperature, drafter="lookup"))
    for name, rule, shape, temperature in kinds(arguments.nodes, arguments.length):
        drafter = draft_model(draft, shape)
        add(measure(target, prompts, arguments, plain, name, rule, temperature, drafter=drafter, rule=rule))
    table = Table("drafted", "rule", "temperature", "tokens per call", "tokens/s", "of plain", "rows that differ",
                  "least margin")
    for row in rows:
        table.add_row(row.shape, row.rule, str(row.temperature), f"{row.tokens_per_call:.2f}", f"{row.tokens_per_s:.1f}",
                      f"{row.ratio:.2f}x", "" if row.differing is None else str(row.differing),
                      "" if row.least_margin is None else f"{row.least_margin:.1e}")
    console.print(table)


def measure(target: jaxlm.Model, prompts: list[list[int]], arguments: Arguments, plain: dict[float, Any], name: str,
            rule: str, temperature: float, **options: Any) -> Measured:
    """One row of the table."""
    tokens, per_call, per_s = answers(target, prompts, arguments, temperature, **options)
    reference, _, plain_per_s = plain[temperature]
    same = parted(target, prompts, reference, tokens) if rule == "match" else (None, None)
    if temperature:  # the noise decides there, and a gap of logits says nothing
        same = (same[0], None)
    return Measured(name, rule, temperature, per_call, per_s, per_s / plain_per_s, *same)


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

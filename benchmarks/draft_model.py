"""A small model drafts for a larger one: tokens per call of every rule, with a chain and with trees, and speeds beside plain.

    .venv/bin/python benchmarks/draft_model.py --target TARGET --draft DRAFT --questions HumanEval.jsonl.gz

Prompts are answered in batches, each by all in turn, so a noisy machine is as hard on one as on another; interrupted, it shows
what there is. At temperature 0 every lossless rule accepts the same, so one stands for all. The static tree's shape comes from
how often the draft's r-th choice is the target's token on prompts that are not measured. Rules that give plain decoding's
tokens are checked against them: rows that differ are counted, with the least gap, at temperature 0, between the largest logit
and the lower one of the two tokens at which one parted.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jaxlm
from infer import bench, machine, session
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import draft_model
from jaxlm.decoding.speculative.drafters.grow import Dynamic, Static, StochasticBeam

RANKS = 8  # of the draft's choices that the static tree may take


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is measured: a shape's name, a rule and a temperature; `options` are `jaxlm.generate`'s."""

    shape: str
    rule: str
    temperature: float
    options: dict[str, Any]


def kinds(draft: jaxlm.Model, accuracies: Sequence[Sequence[float]], nodes: int, length: int) -> list[Kind]:
    """Plain decoding, prompt lookup and all shapes and rules at temperatures 0 and 0.8; plain first at each."""
    chain, best = trees.chain(length), trees.best(accuracies, nodes)
    beam = StochasticBeam((nodes - 1) // length, length)
    shapes = [(f"chain of {length}", "match", Static(chain), 0.0), (f"best {nodes} nodes", "match", Static(best), 0.0),
              (f"dynamic {nodes}", "match", Dynamic(nodes), 0.0)]
    shapes += [(name, rule, shape, 0.8) for name, rule, shape in (
        (f"chain of {length}", "match", Static(chain)), (f"chain of {length}", "chain", Static(chain, "independent")),
        (f"chain of {length}", "block", Static(chain, "independent")),
        (f"best {nodes} nodes", "match", Static(best)), (f"dynamic {nodes}", "match", Dynamic(nodes)),
        (f"best {nodes} nodes", "point_mass", Static(best)),
        (f"best {nodes} nodes", "multi_round", Static(best, "independent")),
        (f"best {nodes} nodes", "k_seq", Static(best, "independent")),
        (f"best {nodes} nodes", "without_replacement", Static(best, "distinct")),
        (f"beam of {beam.width} x {length}", "without_replacement", beam))]
    found = []
    for temperature in (0.0, 0.8):
        found.append(Kind("nothing", "", temperature, {}))
        found.append(Kind("lookup", "match", temperature, {"drafter": "lookup"}))
        found += [Kind(name, rule, hot, {"drafter": draft_model(draft, shape), "rule": rule})
                  for name, rule, shape, hot in shapes if hot == temperature]
    return found


def agreement(target: jaxlm.Model, draft: jaxlm.Model, prompts: list[list[int]], new_tokens: int) -> tuple[float, ...]:
    """How often the draft's first, second, ... choice is the target's greedy token, on the target's own answers."""
    hits, tokens = np.zeros(RANKS), 0
    for prompt, answer in zip(prompts, jaxlm.generate(target, prompts, new_tokens).tokens, strict=True):
        text = jnp.asarray([[*prompt, *answer.tolist()]], jnp.int32)
        at = jnp.arange(len(prompt) - 1, text.shape[1] - 1)[None]
        logits = jaxlm.forward(draft.params, draft.config, text, at=at).logits[0]
        hits += np.asarray(jax.lax.top_k(logits, RANKS)[1] == answer[:, None]).sum(axis=0)
        tokens += len(answer)
    return tuple(np.sort(hits / tokens)[::-1].tolist())  # few are seen of the last ranks, so sorted


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
    """Write the rows of the table to this file."""


@dataclasses.dataclass
class Tally:
    """What one kind did so far: tokens after each row's first, calls of the target and seconds for them."""

    kind: Kind
    prompts: int = 0
    emitted: int = 0
    calls: int = 0
    seconds: float = 0.0
    margins: list[float] = dataclasses.field(default_factory=list)

    def row(self, plain: "Tally") -> dict[str, Any]:
        """As it is shown; `plain` is plain decoding's at the same temperature."""
        speed = self.emitted / self.seconds
        return {"drafted": self.kind.shape, "rule": self.kind.rule, "temperature": self.kind.temperature,
                "prompts": self.prompts, "tokens_per_call": self.emitted / self.calls, "tokens_per_s": speed,
                "ratio_to_plain": speed * plain.seconds / plain.emitted,
                "differing": len(self.margins) if self.kind.rule == "match" else None,
                # The noise decides at other temperatures, and a gap of logits says nothing.
                "least_margin": min(self.margins, default=None) if self.kind.temperature == 0 else None}


def answer(model: jaxlm.Model, prompts: list[list[int]], places: list[int], new_tokens: int, tally: Tally) -> list[np.ndarray]:
    """The answers to a batch of prompts, counted in the tally; `places` give every prompt its key."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.asarray(places))
    result = jaxlm.generate(model, prompts, new_tokens, temperature=tally.kind.temperature, key=keys, **tally.kind.options)
    later = sum(len(row) - 1 for row in result.tokens)
    tally.prompts += len(prompts)
    tally.emitted += later
    tally.calls += later if result.speculation is None else int(result.speculation.calls.sum())
    tally.seconds += result.seconds.decode
    return result.tokens


def parted(model: jaxlm.Model, prompts: list[list[int]], plain: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """For every row that differs, the margin at which it does."""
    margins = []
    for prompt, ours, theirs in zip(prompts, plain, other, strict=True):
        found = bench.first_difference(ours.tolist(), theirs.tolist())
        if found is not None:
            place, *both = found
            margins.append(bench.margin(model, [*prompt, *ours[:place].tolist()], [one for one in both if one is not None]))
    return margins


def measure(target: jaxlm.Model, prompts: list[list[int]], arguments: Arguments, tallies: list[Tally],
            console: Console) -> None:
    """Has all tallies of one temperature answer every batch, plain decoding (the first) before the others."""
    batches = -(-len(prompts) // arguments.batch)
    for index in range(batches):
        # Batches of alike longest prompts, which are compiled once.
        places = list(range(index, len(prompts), batches))
        part = [prompts[place] for place in places]
        plain: list[np.ndarray] = []
        for tally in tallies:
            tokens = answer(target, part, places, arguments.new_tokens, tally)
            plain = plain or tokens
            if tally.kind.rule == "match":
                tally.margins += parted(target, part, plain, tokens)
            console.print(tally.row(tallies[0]))


def main(arguments: Arguments) -> None:
    """Measures all kinds and prints them as they come."""
    session.cache_compilations()
    console = Console(width=140)
    target, draft = jaxlm.load(arguments.target), jaxlm.load(arguments.draft)
    questions = bench.read_questions(arguments.questions)
    prompts = [bench.encode(target, question, raw=False) for question in questions[:arguments.prompts + arguments.batch]]
    prompts, others = sorted(prompts[:arguments.prompts], key=len), prompts[arguments.prompts:]
    if not others:
        raise ValueError(f"{arguments.questions} has {len(questions)} questions: the tree's shape needs some beside the "
                         f"{arguments.prompts} that are measured")
    accuracies = agreement(target, draft, others, arguments.new_tokens)
    console.print(f"the draft's choices are the target's token: {', '.join(f'{share:.3f}' for share in accuracies)}")
    tallies = [Tally(kind) for kind in kinds(draft, (accuracies,), arguments.nodes, arguments.length)]
    groups = [[tally for tally in tallies if tally.kind.temperature == temperature] for temperature in (0.0, 0.8)]
    try:
        for group in groups:
            measure(target, prompts, arguments, group, console)
    finally:
        rows = [tally.row(group[0]) for group in groups for tally in group if tally.prompts]
        show(rows, console)
        if arguments.json is not None:
            found = {"machine": machine.describe(), "accuracies": accuracies, "rows": rows}
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the table."""
    table = Table("drafted", "rule", "temperature", "prompts", "tokens per call", "tokens/s", "of plain", "rows that differ",
                  "least margin")
    for row in rows:
        table.add_row(row["drafted"], row["rule"], str(row["temperature"]), str(row["prompts"]),
                      f"{row['tokens_per_call']:.2f}", f"{row['tokens_per_s']:.1f}", f"{row['ratio_to_plain']:.2f}x",
                      "" if row["differing"] is None else str(row["differing"]),
                      "" if row["least_margin"] is None else f"{row['least_margin']:.1e}")
    console.print(table)


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

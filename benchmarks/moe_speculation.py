"""What a tree costs a mixture of experts, and what `drafter="auto"` makes of it.

    .venv/bin/python benchmarks/moe_speculation.py

A dense model and a mixture of 64 experts, top 4, with as many active weights; random weights, float32, batch 1, random text
(temperature 1), in which no draft is accepted, and greedy text. Plain decoding and "auto" take turns. Printed: the sizes of
tree that "auto" has and what a call with each costs beside a call on one token, the share of weights that it is reckoned to
read, nodes, tokens and experts per call, and the ratio of the best times.
"""

import dataclasses

import jax
import tyro
from rich.console import Console
from rich.table import Table

import jaxlm
from jaxlm import model, params
from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, Moe, PreNorm, RmsNorm, TopK, stack_of
from jaxlm.decoding.speculative import cost

WIDTH, LAYERS, VOCABULARY = 512, 8, 2048
LAYER = {"dense": Dense(2048), "64 experts, top 4": Moe(64, Dense(512), TopK(4, normalize=True))}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a tree costs a mixture of experts."""

    new_tokens: int = 96
    """Of every answer."""
    rounds: int = 3
    """Answers of which the fastest counts."""


def random(layer: Dense | Moe) -> jaxlm.Model:
    """A decoder with random weights."""
    block = Block(Attention(8, 8, 64), layer, PreNorm(RmsNorm()))
    cfg = Decoder(WIDTH, Embedding(VOCABULARY), stack_of([block] * LAYERS), RmsNorm(), Head(True), 2048)
    return jaxlm.Model(cfg, params.init(model.spec(cfg), jax.random.key(0)))


def main(arguments: Arguments) -> None:
    """Measures both models and prints a table."""
    table = Table(title="plain decoding against auto")
    for heading in ("model", "sizes", "cost", "reads", "text", "plain, ms/token", "auto", "nodes", "tokens", "experts"):
        table.add_column(heading, justify="left" if heading in ("model", "text") else "right")
    for name, layer in LAYER.items():
        lm = random(layer)
        for text, temperature in (("greedy", 0.0), ("random", 1.0)):
            best: dict[str, float] = {}
            for turn in range(arguments.rounds + 1):  # the first compiles
                for drafter in ("none", "auto"):
                    out = jaxlm.generate(lm, [list(range(1, 17))], arguments.new_tokens, eos=(), drafter=drafter,
                                         temperature=temperature)
                    if turn:
                        best[drafter] = min(best.get(drafter, out.seconds.decode), out.seconds.decode)
            did = out.speculation
            costs = cost.measure(lm, 1, tuple(did.sizes))
            nodes = sum(size * int(calls[0]) for size, calls in did.sizes.items()) / int(did.calls[0])
            table.add_row(name, " ".join(map(str, did.sizes)), " ".join(f"{one / costs[0]:.1f}" for one in costs),
                          " ".join(f"{cost.reads(lm, size) / cost.reads(lm, 1):.1f}" for size in did.sizes), text,
                          f"{best['none'] / (arguments.new_tokens - 1) * 1e3:.2f}", f"{best['none'] / best['auto']:.2f}x",
                          f"{nodes:.2f}", f"{did.tokens_per_call[0]:.2f}", "-" if did.experts is None else f"{did.experts:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

"""Mixtures of experts: decoding by jaxlm beside transformers, and beside a dense model of as many active weights.

    .venv/bin/python benchmarks/moe.py

Three small shapes with random weights: Mixtral's (8 experts, top 2), OLMoE's (64, top 8), and 64 experts with top 4 beside a
dense layer four times as wide as one of them. Every engine runs in a process of its own that sleeps while another is measured;
they take turns job by job. Answers are greedy, float32, of a fixed number of new tokens. Printed: medians of seconds to the
first token and of tokens per second (all rows together), ratios, and whether the texts are the same. Needs the extra `parity`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
import tyro
from decode import serve_jaxlm
from rich.console import Console
from rich.table import Table

from infer import machine, reference

WIDTH, HEADS, LAYERS, VOCABULARY = 512, 8, 8, 8192


def shapes() -> dict[str, tuple[str | None, Any]]:
    """Of each model the family that it is saved as (None: transformers does not run it) and its config."""
    from jaxlm.config import (
        Attention,
        Block,
        Decoder,
        Dense,
        Embedding,
        Head,
        Moe,
        PreNorm,
        QkNorm,
        RmsNorm,
        Rope,
        TopK,
        stack_of,
    )

    def decoder(feedforward: Any, eps: float, **attention: Any) -> Any:
        block = Block(Attention(HEADS, attention.pop("kv_heads", HEADS), WIDTH // HEADS, Rope(), **attention), feedforward,
                      PreNorm(RmsNorm(eps)))
        return Decoder(WIDTH, Embedding(VOCABULARY), stack_of([block] * LAYERS), RmsNorm(eps), Head(tied=False), 4096)

    whole = QkNorm(RmsNorm(1e-5), per_head=False)
    return {
        "mixtral, 8 experts, top 2": ("mixtral", decoder(Moe(8, Dense(1024), TopK(2, normalize=True)), 1e-5, kv_heads=2)),
        "olmoe, 64 experts, top 8": ("olmoe", decoder(Moe(64, Dense(256), TopK(8)), 1e-5, qk_norm=whole)),
        "64 experts, top 4": (None, decoder(Moe(64, Dense(512), TopK(4, normalize=True)), 1e-5)),
        "dense, as active": (None, decoder(Dense(2048), 1e-5)),
    }


BESIDE = {"64 experts, top 4": "dense, as active"}  # what a model is measured beside, where transformers does not run it


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Mixtures of experts: jaxlm beside transformers, and beside a dense model."""

    batches: tuple[int, ...] = (1, 8)
    """Rows decoded together."""
    prompts: tuple[int, ...] = (30, 200)
    """Prompt lengths in tokens."""
    new_tokens: int = 64
    """Tokens generated per row."""
    rounds: int = 5
    """Measurements of each, in turns; medians are printed."""
    json: pathlib.Path | None = None
    """Also write the rows to this file."""


def serve_random(pipe: Any, name: str) -> None:
    """`decode.serve_jaxlm` of a model with random weights."""
    import jax

    import jaxlm
    from jaxlm import model, params

    cfg = shapes()[name][1]
    made = model.Model(cfg, params.init(model.spec(cfg), jax.random.key(0)))
    jaxlm.load = lambda _: made
    serve_jaxlm(pipe, name)


def save(name: str, folder: str) -> None:
    """Random weights, as transformers reads them."""
    import jax

    import jaxlm
    from jaxlm import model, params

    family, cfg = shapes()[name]
    jaxlm.save(model.Model(cfg, params.init(model.spec(cfg), jax.random.key(0))), folder, family=family)


def measure(name: str, arguments: Arguments) -> list[dict[str, Any]]:
    """The rows of one model, beside transformers or another model."""
    family, rows = shapes()[name][0], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as processes:
        if family is None:
            started = {one: reference.process(serve_random, one) for one in (BESIDE[name], name)}
        else:
            save(name, folder)
            started = {"transformers": reference.process(reference.serve, folder),
                       name: reference.process(serve_jaxlm, folder)}
        engines = {one: processes.enter_context(process) for one, process in started.items()}
        sizes = {one: pipe.recv() for one, pipe in engines.items()}
        random = np.random.default_rng(0)
        for batch in arguments.batches:
            for length in arguments.prompts:
                job = reference.Job(random.integers(0, VOCABULARY, (batch, length)).tolist(), arguments.new_tokens)
                seen: dict[str, list[reference.Reply]] = {one: [] for one in engines}
                for turn in range(arguments.rounds + 1):
                    for one, pipe in engines.items():
                        pipe.send(job)
                        answer = pipe.recv()
                        if turn:  # the first compiles and warms up
                            seen[one].append(answer)
                other, _ = engines
                speeds = {one: batch * (arguments.new_tokens - 1) / statistics.median(a.decode for a in answers)
                          for one, answers in seen.items()}
                firsts = {one: statistics.median(a.prefill for a in answers) for one, answers in seen.items()}
                rows.append({"model": name, "beside": other, "batch": batch, "prompt": length, "tokens_per_s": speeds,
                             "first_s": firsts, "ratio": speeds[name] / speeds[other],
                             "first_ratio": firsts[other] / firsts[name],
                             "weight_bytes": sizes,
                             "equal": None if family is None else seen[name][0].tokens == seen[other][0].tokens})
                print(f"measured {name}, batch {batch}, prompt {length}", file=sys.stderr, flush=True)
    return rows


def main(arguments: Arguments) -> None:
    """Measures every model, prints the table."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    rows = [row for name in shapes() if name not in BESIDE.values() for row in measure(name, arguments)]
    table = Table(title=f"{machine.threads()} threads, float32, {LAYERS} layers of width {WIDTH}")
    for heading in ("model", "batch", "prompt", "first token s", "tokens/s", "beside", "first token", "tokens/s", "same text"):
        table.add_column(heading, justify="left" if heading in ("model", "beside") else "right")
    for row in rows:
        name, same = row["model"], {None: "", True: "yes", False: "no"}[row["equal"]]
        table.add_row(name, str(row["batch"]), str(row["prompt"]), f"{row['first_s'][name]:.3f}",
                      f"{row['tokens_per_s'][name]:.1f}", row["beside"], f"{row['first_ratio']:.2f}x", f"{row['ratio']:.2f}x",
                      same)
    Console(width=140).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

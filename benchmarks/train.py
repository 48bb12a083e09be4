"""Training speed of jaxlm beside PyTorch and JAX by hand: same model, same weights, same batches, in turns in one run.

    .venv/bin/python benchmarks/train.py

Two decoders of Llama's shape (8 layers, width 256 and 512, a tied vocabulary of 8,192), float32, AdamW with clipping, 16 rows
of 256 tokens to a step. Each engine runs in a process of its own that sleeps while the others are measured. Printed: tokens
per second (the median of some steps each), jaxlm's beside the others', peak memory, and how far the losses of all steps are
from jaxlm's. Needs the extra `parity`.
"""

import contextlib
import dataclasses
import json
import multiprocessing.connection
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from infer import machine, reference

VOCABULARY, LAYERS, RATE, DECAY, CLIP = 8192, 8, 1e-3, 0.1, 1.0
SHAPES = {"10M": (256, 1024), "31M": (512, 1536)}  # width, feed-forward width


def recipe(shape: str, rows: int, length: int) -> Any:
    """The configuration of one shape."""
    from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, Rope, stack_of
    from jaxlm.data.source import Files
    from jaxlm.data.stream import Phase
    from jaxlm.objectives import CausalLM
    from jaxlm.recipe import Recipe
    from jaxlm.training.optimizer import AdamW, Optimizer
    from jaxlm.training.schedule import Constant

    width, feedforward = SHAPES[shape]
    heads = width // 64
    block = Block(Attention(heads, heads, 64, position=Rope(10000.0)), Dense(feedforward), PreNorm(RmsNorm(1e-6)))
    model = Decoder(width, Embedding(VOCABULARY), stack_of([block] * LAYERS), RmsNorm(1e-6), Head(tied=True), length)
    optimizer = Optimizer(AdamW(weight_decay=DECAY), Constant(RATE), clip=CLIP, decayed=("*",))
    return Recipe(model, "none", (Phase(((Files("none"), 1.0),)),), CausalLM(), optimizer, rows, length, 1000,
                  mesh=(("data", 1),), dtype="float32")


ENGINES = ("jaxlm", "PyTorch", "plain JAX")


@dataclasses.dataclass(frozen=True)
class Reply:
    """The losses of some steps, the seconds of each, and the most memory so far."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int


def serve_jaxlm(pipe: multiprocessing.connection.Connection, folder: str, shape: str, rows: int, length: int) -> None:
    """Trains from the weights in a folder on each array of tokens [steps, rows, length + 1] that comes."""
    import jax
    import jax.numpy as jnp

    import jaxlm
    from jaxlm.recipe import Program
    from jaxlm.training.step import begin

    program = Program(recipe(shape, rows, length))
    weights = jax.tree.map(jnp.asarray, jaxlm.load(folder).params)
    state = jax.device_put(begin(weights, program.transform, jax.random.key(0)), program.shardings)
    step = program.step()
    pipe.send(True)
    while (job := pipe.recv()) is not None:
        losses, seconds = [], []
        for tokens in job:
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, length), np.float32),
                     "segments": np.ones((rows, length), np.int32)}
            began = time.perf_counter()
            state, metrics = step(state, jax.device_put(batch))
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - began)
        pipe.send(Reply(losses, seconds, reference.peak_bytes()))


def serve_torch(pipe: multiprocessing.connection.Connection, folder: str) -> None:
    """The same by transformers and PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(machine.threads())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, fused=True)
    pipe.send(True)
    while (job := pipe.recv()) is not None:
        losses, seconds = [], []
        for tokens in job:
            given = torch.tensor(tokens, dtype=torch.long)
            began = time.perf_counter()
            logits = model(given[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
        pipe.send(Reply(losses, seconds, reference.peak_bytes()))


def serve_plain(pipe: multiprocessing.connection.Connection, folder: str) -> None:
    """The same by JAX as one would write it by hand."""
    import jax.numpy as jnp
    from plain_jax import trainer

    state, step = trainer(folder, RATE, DECAY, CLIP)
    pipe.send(True)
    while (job := pipe.recv()) is not None:
        losses, seconds = [], []
        for tokens in job:
            began = time.perf_counter()
            state, loss = step(state, jnp.asarray(tokens))
            losses.append(float(loss))
            seconds.append(time.perf_counter() - began)
        pipe.send(Reply(losses, seconds, reference.peak_bytes()))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Training speed of jaxlm beside PyTorch and JAX written by hand."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Of the models."""
    rows: int = 16
    """Sequences of a step."""
    length: int = 256
    """Tokens of a sequence."""
    rounds: int = 4
    """Turns of each engine."""
    steps: int = 3
    """Steps in a turn."""
    json: pathlib.Path | None = None
    """Also write the rows to this file."""


def measure(shape: str, arguments: Arguments) -> dict[str, Any]:
    """One shape: all engines in turns, after a turn that compiles and warms up."""
    import jax

    import jaxlm
    from jaxlm import params
    from jaxlm.recipe import Program

    program = Program(recipe(shape, arguments.rows, arguments.length))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as processes:
        jaxlm.save(jaxlm.Model(program.recipe.model, params.init(program.spec, jax.random.key(0))), folder)
        starts = {"jaxlm": (serve_jaxlm, folder, shape, arguments.rows, arguments.length), "PyTorch": (serve_torch, folder),
                  "plain JAX": (serve_plain, folder)}
        engines = {name: processes.enter_context(reference.process(*starts[name])) for name in ENGINES}
        for pipe in engines.values():
            pipe.recv()
        seen: dict[str, list[Reply]] = {name: [] for name in engines}
        for _ in range(arguments.rounds + 1):
            # Numbers that count up from a random one: there is something to learn.
            starts = random.integers(0, VOCABULARY, (arguments.steps, arguments.rows, 1))
            job = ((starts + np.arange(arguments.length + 1)) % VOCABULARY).astype(np.int32)
            for name, pipe in engines.items():
                pipe.send(job)
                seen[name].append(pipe.recv())
    row: dict[str, Any] = {"shape": shape, "weights": params.count(program.spec)}
    tokens = arguments.rows * arguments.length
    for name, replies in seen.items():
        second = statistics.median(second for reply in replies[1:] for second in reply.seconds)
        row[name] = {"tokens_per_s": tokens / second, "flops": tokens / second * program.flops_per_token,
                     "peak_bytes": replies[-1].peak_bytes}
    losses = {name: np.array([loss for reply in replies for loss in reply.losses]) for name, replies in seen.items()}
    row["losses"] = losses["jaxlm"][[0, -1]].tolist()
    for name in ENGINES[1:]:
        row[name] |= {"ratio": row["jaxlm"]["tokens_per_s"] / row[name]["tokens_per_s"],
                      "apart": float(np.max(np.abs(losses[name] / losses["jaxlm"] - 1)))}
    return row


def main(arguments: Arguments) -> None:
    """Measures all shapes and prints the table."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    table = Table(title=f"{machine.threads()} threads, float32, {arguments.rows} x {arguments.length} tokens a step")
    for heading in ("weights", "engine", "tokens/s", "GFLOP/s", "peak MB", "jaxlm is", "losses apart"):
        table.add_column(heading, justify="right")
    rows = [measure(shape, arguments) for shape in arguments.shapes]
    for row in rows:
        for name in ENGINES:
            mine = row[name]
            table.add_row(f"{row['weights'] / 1e6:.1f}M", name, f"{mine['tokens_per_s']:.0f}", f"{mine['flops'] / 1e9:.0f}",
                          f"{mine['peak_bytes'] / 1e6:.0f}", f"{mine['ratio']:.2f}x" if "ratio" in mine else "",
                          f"{mine['apart']:.1e}" if "apart" in mine else "")
    Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

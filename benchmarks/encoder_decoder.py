"""Encoder-decoders: jaxlm beside transformers, generation and a step of training, same weights and shapes, in turns in one run.

    .venv/bin/python benchmarks/encoder_decoder.py
    .venv/bin/python benchmarks/encoder_decoder.py --model checkpoints/opus-mt-en-fr --no-train

By default a model of T5 1.1 small's shape (77M weights) with random ones generates, and one of 11M trains; a directory with a
checkpoint takes the first one's place. Each engine runs in a process of its own that sleeps while the other is measured.
Generation: greedy, float32, sources and answers of fixed lengths; prefill is encoder and first token. Training: float32, AdamW
with clipping, every token of target asked, none of either side padded. Printed: medians, ratios, and whether tokens and losses
are the same. Needs the extra `parity`.
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
from decode import serve_jaxlm
from rich.console import Console
from rich.table import Table

from infer import machine, reference

RATE, DECAY, CLIP = 1e-3, 0.1, 1.0
APART = 1e-4  # relative difference of losses beyond which the engines do not compute the same


def shape(width: int, heads: int, feedforward: int, layers: int, vocabulary: int) -> Any:
    """The config of a T5 1.1 with as many layers on either side and heads of 64."""
    from jaxlm.config import (
        Activation,
        Attention,
        Block,
        Decoder,
        Dense,
        Embedding,
        Encoder,
        EncoderDecoder,
        Head,
        PreNorm,
        RelativeBias,
        RmsNorm,
        stack_of,
    )

    norm, embedding = RmsNorm(1e-6), Embedding(vocabulary)

    def stack(reads: bool) -> Any:
        attention = Attention(heads, heads, 64, RelativeBias(32, 128, reads), causal=not reads, scale=1.0)
        cross = None if reads else Attention(heads, heads, 64, None, causal=False, scale=1.0, source=width)
        return stack_of([Block(attention, Dense(feedforward, Activation.GELU_TANH), PreNorm(norm), cross=cross)] * layers)

    encoder = Encoder(width, embedding, stack(True), norm, None, 1 << 15)
    decoder = Decoder(width, embedding, stack(False), norm, Head(tied=False), 1 << 15)
    return EncoderDecoder(encoder, decoder, (0,))


SMALL = {"width": 512, "heads": 6, "feedforward": 1024, "layers": 8, "vocabulary": 32128}
TRAINED = {"width": 256, "heads": 4, "feedforward": 512, "layers": 4, "vocabulary": 8192}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Encoder-decoders: jaxlm beside transformers."""

    model: pathlib.Path | None = None
    """A Hugging Face directory that both read; default random weights of T5 1.1 small's shape."""
    batches: tuple[int, ...] = (1, 8)
    """Rows generated together."""
    sources: tuple[int, ...] = (30, 200, 500)
    """Lengths of sources in tokens."""
    new_tokens: int = 64
    """Tokens generated per row."""
    rounds: int = 5
    """Measurements of each, in turns; medians are printed."""
    generate: bool = True
    """Measure generation."""
    train: bool = True
    """Measure training."""
    rows: int = 16
    """Pairs of a step of training."""
    inputs: int = 256
    """Tokens of a pair's source."""
    targets: int = 64
    """Tokens of a pair's target."""
    steps: int = 3
    """Steps in a turn."""
    json: pathlib.Path | None = None
    """Also write the rows to this file."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The losses of some steps, the seconds of each, and the most memory so far."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int


def train_jaxlm(pipe: multiprocessing.connection.Connection, folder: str, arguments: Arguments) -> None:
    """Trains from the weights in a folder on the steps of (inputs, targets) that come."""
    import jax
    import jax.numpy as jnp

    import jaxlm
    from jaxlm.data.source import Files
    from jaxlm.data.stream import Phase
    from jaxlm.objectives import SpanCorruption
    from jaxlm.recipe import Program, Recipe
    from jaxlm.training.optimizer import AdamW, Optimizer
    from jaxlm.training.schedule import Constant
    from jaxlm.training.step import begin

    optimizer = Optimizer(AdamW(weight_decay=DECAY), Constant(RATE), clip=CLIP, decayed=("*",))
    phase = Phase(((Files("none"), 1.0),))
    program = Program(Recipe(shape(**TRAINED), "none", (phase,), SpanCorruption((8191, 8190)), optimizer,
                             arguments.rows, arguments.targets, 1000, inputs=arguments.inputs, mesh=(("data", 1),),
                             dtype="float32"))
    weights = jax.tree.map(jnp.asarray, jaxlm.load(folder).params)
    state = jax.device_put(begin(weights, program.transform, jax.random.key(0)), program.shardings)
    step = program.step()
    pipe.send(True)
    while (job := pipe.recv()) is not None:
        losses, seconds = [], []
        for inputs, targets in job:
            batch = {"inputs": inputs, "input_segments": np.ones_like(inputs), "targets": targets,
                     "weights": np.ones(targets.shape, np.float32), "segments": np.ones_like(targets)}
            began = time.perf_counter()
            state, metrics = step(state, jax.device_put(batch))
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - began)
        pipe.send(Reply(losses, seconds, reference.peak_bytes()))


def train_torch(pipe: multiprocessing.connection.Connection, folder: str, arguments: Arguments) -> None:
    """The same by transformers and PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(machine.threads())
    # jaxlm has no dropout; attention's is a number and no module.
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, dropout_rate=0.0)
    model.config.pad_token_id = model.config.decoder_start_token_id = 0
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, fused=True)
    pipe.send(True)
    while (job := pipe.recv()) is not None:
        losses, seconds = [], []
        for inputs, targets in job:
            given = {"input_ids": torch.tensor(inputs, dtype=torch.long), "labels": torch.tensor(targets, dtype=torch.long)}
            began = time.perf_counter()
            loss = model(**given, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
        pipe.send(Reply(losses, seconds, reference.peak_bytes()))


@contextlib.contextmanager
def saved(given: pathlib.Path | None, sizes: dict[str, int]) -> Any:
    """A directory that both engines read: the one given, or random weights."""
    if given is not None:
        yield str(given)
        return
    import jax

    import jaxlm
    from jaxlm import model, params

    cfg = shape(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        jaxlm.save(jaxlm.Model(cfg, params.init(model.spec(cfg), jax.random.key(0))), folder)
        yield folder


def generation(arguments: Arguments) -> list[dict[str, Any]]:
    """Both engines in turns, after a turn that compiles and warms up."""
    from jaxlm.io import families
    from jaxlm.io.huggingface import HuggingFaceSource

    rows, random = [], np.random.default_rng(0)
    with saved(arguments.model, SMALL) as folder, contextlib.ExitStack() as processes:
        begins = families.read(HuggingFaceSource(pathlib.Path(folder)).config).start
        engines = {"transformers": processes.enter_context(reference.process(reference.serve, folder, begins)),
                   "jaxlm": processes.enter_context(reference.process(serve_jaxlm, folder))}
        sizes = {name: pipe.recv() for name, pipe in engines.items()}
        for batch in arguments.batches:
            for length in arguments.sources:
                job = reference.Job(random.integers(3, 8000, (batch, length)).tolist(), arguments.new_tokens)
                seen: dict[str, list[reference.Reply]] = {name: [] for name in engines}
                for turn in range(arguments.rounds + 1):
                    for name, pipe in engines.items():
                        pipe.send(job)
                        answer = pipe.recv()
                        if turn:
                            seen[name].append(answer)
                row: dict[str, Any] = {"batch": batch, "source": length, "weight_bytes": sizes["jaxlm"],
                                       "equal": seen["jaxlm"][0].tokens == seen["transformers"][0].tokens}
                for name, answers in seen.items():
                    decode = statistics.median(answer.decode for answer in answers)
                    row[name] = {"prefill_s": statistics.median(answer.prefill for answer in answers),
                                 "tokens_per_s": batch * (answers[0].calls - 1) / decode if name == "transformers" else
                                 sum(len(one) - 1 for one in answers[0].tokens) / decode,
                                 "peak_bytes": answers[-1].peak_bytes}
                row["decode_ratio"] = row["jaxlm"]["tokens_per_s"] / row["transformers"]["tokens_per_s"]
                row["prefill_ratio"] = row["transformers"]["prefill_s"] / row["jaxlm"]["prefill_s"]
                rows.append(row)
    return rows


def training(arguments: Arguments) -> dict[str, Any]:
    """Both engines in turns, after a turn that compiles and warms up."""
    random = np.random.default_rng(0)
    with saved(None, TRAINED) as folder, contextlib.ExitStack() as processes:
        engines = {"PyTorch": processes.enter_context(reference.process(train_torch, folder, arguments)),
                   "jaxlm": processes.enter_context(reference.process(train_jaxlm, folder, arguments))}
        for pipe in engines.values():
            pipe.recv()
        seen: dict[str, list[Reply]] = {name: [] for name in engines}
        for _ in range(arguments.rounds + 1):
            job = []
            for _ in range(arguments.steps):  # numbers that count up: the target goes on where the source ends
                starts = random.integers(1, 4000, (arguments.rows, 1))
                whole = 1 + (starts + np.arange(arguments.inputs + arguments.targets)) % 8000
                job.append((whole[:, :arguments.inputs].astype(np.int32), whole[:, arguments.inputs:].astype(np.int32)))
            for name, pipe in engines.items():
                pipe.send(job)
                seen[name].append(pipe.recv())
    row: dict[str, Any] = {}
    for name, replies in seen.items():
        second = statistics.median(second for reply in replies[1:] for second in reply.seconds)
        row[name] = {"tokens_per_s": arguments.rows * (arguments.inputs + arguments.targets) / second,
                     "peak_bytes": replies[-1].peak_bytes}
    losses = {name: np.array([loss for reply in replies for loss in reply.losses]) for name, replies in seen.items()}
    return row | {"ratio": row["jaxlm"]["tokens_per_s"] / row["PyTorch"]["tokens_per_s"],
                  "losses": losses["jaxlm"][[0, -1]].tolist(),
                  "apart": float(np.max(np.abs(losses["PyTorch"] / losses["jaxlm"] - 1)))}


def main(arguments: Arguments) -> None:
    """Measures, and prints the tables.

    Raises:
      SystemExit: when the two engines' losses are further apart than `APART`.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    console, result = Console(width=120), {"machine": machine.describe()}
    if arguments.generate:
        result["generate"] = generation(arguments)
        weights = result["generate"][0]["weight_bytes"] / 4e6
        table = Table(title=f"generation, {machine.threads()} threads, float32, {weights:.0f}M weights, "
                            f"{arguments.new_tokens} new tokens")
        for heading in ("batch", "source", "engine", "encoder and first s", "tokens/s", "peak MB", "decode", "prefill", "same"):
            table.add_column(heading, justify="right")
        for row in result["generate"]:
            for name in ("transformers", "jaxlm"):
                mine, ours = row[name], name == "jaxlm"
                table.add_row(str(row["batch"]), str(row["source"]), name, f"{mine['prefill_s']:.3f}",
                              f"{mine['tokens_per_s']:.1f}", f"{mine['peak_bytes'] / 1e6:.0f}",
                              f"{row['decode_ratio']:.2f}x" if ours else "", f"{row['prefill_ratio']:.2f}x" if ours else "",
                              ("yes" if row["equal"] else "no") if ours else "")
        console.print(table)
    if arguments.train:
        row = result["train"] = training(arguments)
        table = Table(title=f"training, {arguments.rows} pairs of {arguments.inputs} and {arguments.targets} tokens a step")
        for heading in ("engine", "tokens/s", "peak MB", "jaxlm is", "losses apart"):
            table.add_column(heading, justify="right")
        for name in ("PyTorch", "jaxlm"):
            ours = name == "jaxlm"
            table.add_row(name, f"{row[name]['tokens_per_s']:.0f}", f"{row[name]['peak_bytes'] / 1e6:.0f}",
                          f"{row['ratio']:.2f}x" if ours else "", f"{row['apart']:.1e}" if ours else "")
        console.print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.train and not result["train"]["apart"] <= APART:  # a NaN is no agreement
        raise SystemExit(f"the engines' losses are {result['train']['apart']:.1e} apart, more than {APART}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

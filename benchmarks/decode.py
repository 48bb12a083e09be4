"""Decoding speed of jaxlm beside transformers: the same weights, the same prompts, measured in turns in one run.

    .venv/bin/python benchmarks/decode.py

Each engine runs in a process of its own that sleeps while the other is measured, and answers are greedy, float32, of a
fixed number of new tokens. Printed per batch and prompt: prefill seconds, decoded tokens per second (all rows together), the
ratio, the share of the bound set by reading every weight once per step, and the process's peak memory. Needs the
extra `parity`.
"""

import contextlib
import dataclasses
import json
import multiprocessing.connection
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from infer import assets, machine, reference


def serve_jaxlm(pipe: multiprocessing.connection.Connection, path: str) -> None:
    """What `infer.reference.serve` does, by jaxlm."""
    import jax

    import jaxlm
    model = jaxlm.load(path)
    pipe.send(sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
    while (job := pipe.recv()) is not None:
        began = time.perf_counter()
        result = jaxlm.generate(model, job.prompts, job.new_tokens, eos=job.eos)
        wall = time.perf_counter() - began  # the host's part counts as prefill, as it does for transformers
        tokens, decode = [row.tolist() for row in result.tokens], result.seconds.decode
        pipe.send(reference.Reply(tokens, wall - decode, decode, max(map(len, tokens)), 1, reference.peak_bytes()))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Decoding speed of jaxlm beside transformers."""

    model: str | None = None
    """A GGUF file or Hugging Face directory; default SmolLM2-135M-Instruct, fetched."""
    batches: tuple[int, ...] = (1, 8)
    """Rows decoded together."""
    prompts: tuple[int, ...] = (30, 200, 800)
    """Prompt lengths in tokens."""
    new_tokens: int = 128
    """Tokens generated per row."""
    rounds: int = 5
    """Measurements of each, in turns; medians are printed."""
    text: pathlib.Path = pathlib.Path(__file__)
    """A file whose tokens make the prompts."""
    json: pathlib.Path | None = None
    """Also write the rows to this file."""


def main(arguments: Arguments) -> None:
    """Starts both engines, measures in turns, prints the table."""
    source = arguments.model or str(assets.smollm2())
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as processes:
        import jaxlm
        model = jaxlm.load(source)
        jaxlm.save(model, folder)  # what transformers reads: the same weights, dequantised
        tokens = model.tokenizer.encode(arguments.text.read_text())
        del model
        engines = {"transformers": processes.enter_context(reference.process(reference.serve, folder)),
                   "jaxlm": processes.enter_context(reference.process(serve_jaxlm, source))}
        sizes = {name: pipe.recv() for name, pipe in engines.items()}
        rows, speed = [], 0.0
        for batch in arguments.batches:
            for length in arguments.prompts:
                prompts = [[tokens[(17 * row + i) % len(tokens)] for i in range(length)] for row in range(batch)]
                job = reference.Job(prompts, arguments.new_tokens)
                seen: dict[str, list[reference.Reply]] = {name: [] for name in engines}
                for turn in range(arguments.rounds + 1):
                    for name, pipe in engines.items():
                        pipe.send(job)
                        answer = pipe.recv()
                        if turn:  # the first compiles and warms up
                            seen[name].append(answer)
                row: dict[str, Any] = {"batch": batch, "prompt": length,
                                       "equal": seen["jaxlm"][0].tokens == seen["transformers"][0].tokens}
                for name, answers in seen.items():
                    decode = statistics.median(a.decode for a in answers)
                    row[name] = {
                        "prefill_s": statistics.median(a.prefill for a in answers),
                        "tokens_per_s": batch * (arguments.new_tokens - 1) / decode,
                        "decode_s": decode,
                        "peak_bytes": answers[-1].peak_bytes,
                    }
                row["decode_ratio"] = row["jaxlm"]["tokens_per_s"] / row["transformers"]["tokens_per_s"]
                row["prefill_ratio"] = row["transformers"]["prefill_s"] / row["jaxlm"]["prefill_s"]
                rows.append(row)
                speed = max(speed, machine.bandwidth())  # of all looks, so that a busy moment does not lower the bound
                print(f"measured batch {batch}, prompt {length}", file=sys.stderr, flush=True)
    table = Table(title=f"{machine.threads()} threads, float32, {sizes['jaxlm'] / 1e6:.0f} MB of weights, memory read at "
                        f"{speed / 1e9:.0f} GB/s: at most {speed / sizes['jaxlm']:.0f} steps/s")
    for heading in ("batch", "prompt", "engine", "prefill s", "tokens/s", "of bound", "peak MB", "decode", "prefill",
                    "same text"):
        table.add_column(heading, justify="right")
    for row in rows:
        for name in engines:
            mine, ours = row[name], name == "jaxlm"
            bound = (arguments.new_tokens - 1) * sizes["jaxlm"] / speed
            table.add_row(str(row["batch"]), str(row["prompt"]), name, f"{mine['prefill_s']:.3f}",
                          f"{mine['tokens_per_s']:.1f}", f"{bound / mine['decode_s']:.0%}", f"{mine['peak_bytes'] / 1e6:.0f}",
                          f"{row['decode_ratio']:.2f}x" if ours else "", f"{row['prefill_ratio']:.2f}x" if ours else "",
                          ("yes" if row["equal"] else "no") if ours else "")
    Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"bandwidth": speed, "weight_bytes": sizes["jaxlm"], "rows": rows}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

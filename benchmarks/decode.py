"""Decoding speed of jaxlm beside transformers: the same weights, the same prompts, measured in turns in one run.

    .venv/bin/python benchmarks/decode.py

Each engine runs in a process of its own that sleeps while the other is measured, and answers are greedy, float32, of a
fixed number of new tokens. Printed per batch and prompt: prefill seconds, decoded tokens per second (all rows together), the
ratio, the share of the bound set by reading every weight once per step, and the process's peak memory. Needs the
extra `parity`.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

THREADS = len(os.sched_getaffinity(0))


def peak_bytes() -> int:
    """The most memory that this process has held."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def bandwidth() -> float:
    """Bytes per second at which all cores together read memory: the best of 10 dot products over 1 GiB."""
    array = np.ones(1 << 28, np.float32)
    parts = np.array_split(array, THREADS)
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in range(10):
            began = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            best = max(best, array.nbytes / (time.perf_counter() - began))
    return best


def serve_jaxlm(pipe: multiprocessing.connection.Connection, path: str) -> None:
    """Answers (prompts, new tokens) with (tokens, prefill seconds, decode seconds, peak bytes)."""
    import jaxlm
    model = jaxlm.load(path)
    pipe.send(sum(leaf.nbytes for leaf in _leaves(model.params)))
    while (job := pipe.recv()) is not None:
        began = time.perf_counter()
        result = jaxlm.generate(model, job[0], job[1], eos=())
        wall = time.perf_counter() - began  # the host's part counts as prefill, as it does for transformers
        tokens = [row.tolist() for row in result.tokens]
        pipe.send((tokens, wall - result.seconds.decode, result.seconds.decode, peak_bytes()))


def _leaves(tree: Any) -> list[Any]:
    import jax
    return jax.tree.leaves(tree)


def serve_transformers(pipe: multiprocessing.connection.Connection, path: str) -> None:
    """The same, by transformers' own prefill and a greedy loop over its key-value cache."""
    import torch
    import transformers
    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    pipe.send(sum(p.numel() * p.element_size() for p in model.parameters()))
    while (job := pipe.recv()) is not None:
        prompts, count = torch.tensor(job[0]), job[1]
        times = []

        class Clock(transformers.LogitsProcessor):
            def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                times.append(time.perf_counter())  # noqa: B023  (used before the next job)
                return scores

        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False,
                                 logits_processor=transformers.LogitsProcessorList([Clock()]))
        # The first call of the processor is when the first logits are there; the last token follows the last call at once.
        pipe.send((out[:, prompts.shape[1]:].tolist(), times[0] - began, times[-1] - times[0], peak_bytes()))


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
    from infer import assets
    source = arguments.model or str(assets.smollm2())
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        import jaxlm
        model = jaxlm.load(source)
        jaxlm.save(model, folder)  # what transformers reads: the same weights, dequantised
        tokens = model.tokenizer.encode(arguments.text.read_text())
        del model
        engines, sizes = {}, {}
        for name, serve in (("transformers", serve_transformers), ("jaxlm", serve_jaxlm)):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, folder if name == "transformers" else source), daemon=True)
            process.start()
            sizes[name] = ours.recv()
            engines[name] = ours
        rows, speed = [], 0.0
        for batch in arguments.batches:
            for length in arguments.prompts:
                prompts = [[tokens[(17 * row + i) % len(tokens)] for i in range(length)] for row in range(batch)]
                seen: dict[str, list[Any]] = {name: [] for name in engines}
                for turn in range(arguments.rounds + 1):
                    for name, pipe in engines.items():
                        pipe.send((prompts, arguments.new_tokens))
                        answer = pipe.recv()
                        if turn:  # the first compiles and warms up
                            seen[name].append(answer)
                row: dict[str, Any] = {"batch": batch, "prompt": length,
                                       "equal": seen["jaxlm"][0][0] == seen["transformers"][0][0]}
                for name, answers in seen.items():
                    decode = statistics.median(a[2] for a in answers)
                    row[name] = {
                        "prefill_s": statistics.median(a[1] for a in answers),
                        "tokens_per_s": batch * (arguments.new_tokens - 1) / decode,
                        "decode_s": decode,
                        "peak_bytes": answers[-1][3],
                    }
                row["decode_ratio"] = row["jaxlm"]["tokens_per_s"] / row["transformers"]["tokens_per_s"]
                row["prefill_ratio"] = row["transformers"]["prefill_s"] / row["jaxlm"]["prefill_s"]
                rows.append(row)
                speed = max(speed, bandwidth())  # of all looks, so that a busy moment does not lower the bound
                print(f"measured batch {batch}, prompt {length}", file=sys.stderr, flush=True)
        for pipe in engines.values():
            pipe.send(None)
    table = Table(title=f"{THREADS} threads, float32, {sizes['jaxlm'] / 1e6:.0f} MB of weights, memory read at "
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

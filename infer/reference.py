"""transformers as an engine to compare with, in a process of its own that sleeps while others are measured.

Needs the extra `parity`. It runs on the CPU in float32.
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from infer import machine


@dataclasses.dataclass(frozen=True)
class Job:
    """A request: prompts of equal length, greedy; `lookup` is transformers' own prompt lookup of so many tokens (one row). What
    a text begins with counts as new but for its first token, as in `jaxlm.generate`: `new_tokens` are at least as many as
    it has tokens."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    eos: tuple[int, ...] = ()
    lookup: int | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of a job.

    Attributes:
      tokens: new ones of each row.
      prefill: seconds to the first token; with lookup to the first call's last token.
      decode: seconds of the rest.
      calls: of the model.
      first: tokens that the first call gave.
      peak_bytes: the most memory that the process has held.
    """

    tokens: list[list[int]]
    prefill: float
    decode: float
    calls: int
    first: int
    peak_bytes: int


def peak_bytes() -> int:
    """The most memory that this process has held.

    Raises:
      OSError: on systems other than Linux.
    """
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def serve(pipe: multiprocessing.connection.Connection, path: str, begins: Sequence[int] = ()) -> None:
    """Sends the size of the weights in bytes, then a Reply for every Job, until it gets None.

    Args:
      begins: what an encoder-decoder's text begins with; empty for a decoder.
    """
    import torch
    import transformers

    torch.set_num_threads(machine.threads())
    kind = transformers.AutoModelForSeq2SeqLM if begins else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32)
    # What a model asks for by itself (forced and banned tokens, a least length) jaxlm does not do unasked.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0,
                                                            decoder_start_token_id=begins[0] if begins else None)
    pipe.send(sum(p.numel() * p.element_size() for p in model.parameters()))
    while (job := pipe.recv()) is not None:
        prompts, times, lengths = torch.tensor(job.prompts), [], []

        class Clock(transformers.StoppingCriteria):
            """Is asked once after each call of the model."""

            def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                times.append(time.perf_counter())  # noqa: B023  (used before the next job)
                lengths.append(ids.shape[1])  # noqa: B023
                return torch.zeros(len(ids), dtype=torch.bool)

        model.generation_config.eos_token_id = list(job.eos) or None
        options = {} if job.lookup is None else {"prompt_lookup_num_tokens": job.lookup}
        if begins:
            options["decoder_input_ids"] = torch.tensor([begins] * len(prompts))
        start = len(begins) or prompts.shape[1]  # what the answer begins behind
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                                 max_new_tokens=job.new_tokens - len(begins[1:]),
                                 stopping_criteria=transformers.StoppingCriteriaList([Clock()]), **options)
        pipe.send(Reply(out[:, start:].tolist(), times[0] - began, times[-1] - times[0], len(times), lengths[0] - start,
                        peak_bytes()))


@contextlib.contextmanager
def process(serve: Any, *arguments: Any) -> Iterator[multiprocessing.connection.Connection]:
    """Runs `serve(pipe, *arguments)` in a new process and gives the other end of its pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()  # so that reading fails, and does not wait, when the child has died
    try:
        yield ours
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        child.join(timeout=5)
        child.kill()


@contextlib.contextmanager
def serving(model: Any) -> Iterator[multiprocessing.connection.Connection]:
    """A process in which transformers serves this model (a `jaxlm.Model`), for as long as the context lasts.

    Raises:
      ValueError: where transformers or torch is not installed.
    """
    import jaxlm

    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is not installed: the comparison with transformers needs the extra parity")
    # Threads that wait in a loop would slow the other engine down.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        jaxlm.save(model, folder)
        with process(serve, folder, getattr(model.config, "start", ())) as pipe:
            pipe.recv()
            yield pipe

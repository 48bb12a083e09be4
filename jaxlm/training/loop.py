"""The loop: batches in, steps on the device, records out, checkpoints on the way; nothing is lost when it is told to stop.

The host runs ahead of the device by a few steps and never waits for the step at hand: what a step tells is read when later ones
are under way. So a loss that is not finite is noticed a few steps late, but before any checkpoint is written.
"""

import collections
import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.report import Report
from jaxlm.training.step import Metrics, State

AHEAD = 2  # steps that may be under way when another one's numbers are read
WINDOW = 20  # steps over which tokens per second are averaged


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient is not a finite number; says at which step, of what, and where to go on from."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and what in between.

    Attributes:
      steps: updates of the whole training, those of earlier runs included.
      checkpoint_every: steps; None only at the end and when told to stop.
      evaluate_every: steps; None only at the end.
      skip: up to how many steps in a row may be left out because their loss is not finite; 0 stops at the first.
      profile: where a trace of `profiled` is written; None for none.
      profiled: first step (from 0, of this run) and number of steps of the trace.
    """

    steps: int
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    skip: int = 0
    profile: pathlib.Path | None = None
    profiled: tuple[int, int] = (5, 3)

    def __post_init__(self) -> None:
        if self.steps < 1 or min(self.checkpoint_every or 1, self.evaluate_every or 1) < 1 or self.skip < 0:
            raise ValueError(f"steps and what comes every so many are at least 1, skip at least 0, got {self}")


@dataclasses.dataclass
class Time:
    """Seconds of a run, and what they went for beside steps."""

    whole: float = 0.0
    compile: float = 0.0
    input: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0

    @property
    def goodput(self) -> float:
        """Share of the time that was spent on steps."""
        lost = self.compile + self.input + self.checkpoint + self.evaluation
        return max(1 - lost / self.whole, 0.0) if self.whole else 0.0


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a run came to.

    Attributes:
      state: the last.
      step: updates made, those of earlier runs included.
      stopped: the signal that ended it early, or None.
      evaluation: the last one's results, or None.
    """

    state: State
    step: int
    stopped: str | None
    evaluation: Mapping[str, float] | None
    time: Time


class _Signals:
    """SIGTERM and Ctrl-C ask for an end after the step at hand; a second Ctrl-C does not wait for it.

    With several processes it is jax that hears SIGTERM (`jax.distributed` listens), and all stop before the same step.
    """

    def __init__(self) -> None:
        self.asked: str | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        def ask(number: int, _: Any) -> None:
            if number == signal.SIGINT and self.asked:
                raise KeyboardInterrupt
            self.asked = signal.Signals(number).name

        try:
            alone = jax.process_count() == 1
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT) if alone}
        except ValueError:  # not the main thread: somebody else hears them
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, step: int) -> bool:
        """Whether to stop before this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.asked = "SIGTERM"
        return self.asked is not None


@dataclasses.dataclass
class _Flight:
    """A step under way."""

    step: int
    metrics: Metrics
    documents: str
    padding: float


def fit(advance: Callable[[State, PyTree], tuple[State, Metrics]], state: State, batches: Iterator[Mapping[str, np.ndarray]], *,
        place: Callable[[Mapping[str, np.ndarray]], PyTree], settings: Settings, report: Report,
        checkpoints: Checkpoints | None = None, evaluate: Callable[[PyTree], Mapping[str, float]] | None = None,
        rate: Callable[[int], Any] | None = None, flops_per_token: float | None = None, peak: float | None = None,
        start: int = 0) -> Fitted:
    """Trains until all steps are done or somebody asks for an end.

    Args:
      advance: compiled by `jax.jit`: the step, which may consume the state.
      batches: of this process's rows, see `jaxlm.data.stream.Batches`.
      place: puts them on the devices; their "state" is what checkpoints keep of them.
      evaluate: of the weights: "loss" and, to choose checkpoints by, "bits_per_byte".
      rate: the learning rate of a step, for the record.
      flops_per_token: of the whole step, and `peak`: what all chips could do in a second.
      start: steps done before.

    Raises:
      NonFiniteLoss: names the step, the documents and the last checkpoint.
      CheckpointError: when one could not be written.
    """
    began, signals, spent = time.perf_counter(), _Signals(), Time()
    flights: collections.deque[_Flight] = collections.deque()
    clock = collections.deque([(time.perf_counter(), 0.0)], maxlen=WINDOW)
    seen, skipped, saved, evaluated, found = 0.0, 0, start, start, None
    compiled, rows, step = None, None, start

    def settle(most: int) -> None:
        """Reads what steps told, until no more than `most` are under way."""
        nonlocal seen, skipped
        while len(flights) > most:
            flight = flights.popleft()
            metrics = jax.device_get(flight.metrics)
            skipped = 0 if metrics.finite else skipped + 1
            if skipped > settings.skip:
                last = None if checkpoints is None else checkpoints.latest
                where = "there is no checkpoint" if last is None else f"the last checkpoint is of step {last}"
                raise NonFiniteLoss(f"step {flight.step}: loss {float(metrics.loss)}, gradient norm "
                                    f"{float(metrics.gradient_norm)} ({flight.documents}); {where}")
            seen += float(metrics.weight)
            then, before = clock[0]
            clock.append((time.perf_counter(), seen))
            speed = (seen - before) / max(clock[-1][0] - then, 1e-9)
            record = {"step": flight.step, "loss": float(metrics.loss), "gradient_norm": float(metrics.gradient_norm),
                      "tokens": float(metrics.weight), "tokens_per_s": speed, "padding": flight.padding}
            record |= {name: float(value) for name, value in metrics.aux.items()}
            if rate is not None:
                record["learning_rate"] = float(rate(flight.step - 1))
            if flops_per_token and peak:
                record["mfu"] = speed * flops_per_token / peak
            if not metrics.finite:
                record["skipped"] = True
            report.step(record)

    def measure() -> Mapping[str, float] | None:
        nonlocal evaluated
        if evaluate is None or evaluated == step:
            return found
        settle(0)
        then = time.perf_counter()
        results = evaluate(state.params if state.average is None else state.average)
        report.evaluation({"step": step, **results})
        spent.evaluation += time.perf_counter() - then
        evaluated = step
        clock.clear()
        clock.append((time.perf_counter(), seen))
        return results

    def save() -> None:
        nonlocal saved
        if checkpoints is None or saved == step:
            return
        settle(0)
        then = time.perf_counter()
        checkpoints.save(step, state, rows, found if evaluated == step else None)
        spent.checkpoint += time.perf_counter() - then
        saved = step

    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.heard())
        trace = contextlib.ExitStack()
        stack.callback(trace.close)
        while step < settings.steps and not signals.stop(step):
            if settings.profile is not None and step - start == settings.profiled[0]:
                trace.enter_context(jax.profiler.trace(str(settings.profile)))
            then = time.perf_counter()
            host = next(batches)
            if not flights or flights[-1].metrics.loss.is_ready():
                spent.input += time.perf_counter() - then  # the devices had nothing to do meanwhile
            batch = dict(place(host))
            rows = batch.pop("state")
            if compiled is None:
                then = time.perf_counter()
                compiled = advance.lower(state, batch).compile()
                spent.compile = time.perf_counter() - then
                clock[0] = (time.perf_counter(), 0.0)
            state, metrics = compiled(state, batch)
            step += 1
            flights.append(_Flight(step, metrics, _documents(host["state"]), float(np.mean(host["segments"] == 0))))
            settle(AHEAD)
            if settings.profile is not None and step - start == sum(settings.profiled):
                settle(0)
                trace.close()
            if settings.evaluate_every and step % settings.evaluate_every == 0:
                found = measure()
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                save()
        settle(0)
        if signals.asked is None:
            found = measure()
        save()
        if checkpoints is not None:
            then = time.perf_counter()
            checkpoints.wait()
            spent.checkpoint += time.perf_counter() - then
    spent.whole = time.perf_counter() - began
    return Fitted(state, step, signals.asked if step < settings.steps else None, found, spent)


def _documents(rows: np.ndarray) -> str:
    """What a batch's rows have read, in words."""
    first, last = rows[:, :-1].min(axis=0).tolist(), rows[:, :-1].max(axis=0).tolist()
    return f"rows had read {first} to {last} documents of each phase"

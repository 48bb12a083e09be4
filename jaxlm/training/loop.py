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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxlm.training.checkpoint import CheckpointError, Checkpoints
from jaxlm.training.report import Report
from jaxlm.training.step import Metrics, State

AHEAD = 2  # steps that may be under way when another one's numbers are read
WINDOW = 20  # steps over which tokens per second are averaged
NAMED = 64  # rows of a batch whose documents are named in an error
END = "the end of the batches"


class NonFiniteLoss(ValueError):
    """Loss, gradient or new weights are not finite numbers; says at which step, of what, and where to go on from."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and what in between.

    Attributes:
      steps: updates of the whole training, those of earlier runs included.
      checkpoint_every: steps; None only at the end and when told to stop.
      evaluate_every: steps; None only at the end.
      skip: up to how many steps in a row may be left out because their loss is not finite; 0 stops at the first.
      profile: where a trace of `profiled` is written; None for none.
      profiled: first step (from 0, counted from where this run began) and number of steps of the trace.
    """

    steps: int
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    skip: int = 0
    profile: pathlib.Path | None = None
    profiled: tuple[int, int] = (5, 3)

    def __post_init__(self) -> None:
        every = [number for number in (self.checkpoint_every, self.evaluate_every) if number is not None]
        if min([self.steps, *every]) < 1 or self.skip < 0:
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
      stopped: what ended it early: a signal's name, `END`, or None.
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
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set

    def stop(self, step: int) -> bool:
        """Whether to stop before this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.asked = "SIGTERM"
        return self.asked is not None


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step under way; its batch is this process's, its tokens are all that all processes computed with, read and asked."""

    step: int
    metrics: Metrics
    rate: Any
    batch: Mapping[str, np.ndarray]
    tokens: int


def fit(advance: Callable[[State, PyTree], tuple[State, Metrics]], state: State, batches: Iterator[Mapping[str, np.ndarray]], *,
        place: Callable[[Mapping[str, np.ndarray]], PyTree], settings: Settings, report: Report,
        checkpoints: Checkpoints | None = None, evaluate: Callable[[PyTree, PyTree], Mapping[str, float]] | None = None,
        rate: Callable[[Any], Any] | None = None, flops_per_token: float | None = None, peak: float | None = None,
        documents: Callable[[Mapping[str, np.ndarray], int], Mapping[int, Sequence[tuple[int, int, int]]]] | None = None,
        start: int = 0) -> Fitted:
    """Trains until all steps are done, somebody asks for an end, or there are no more batches.

    After an error, where there is one process, what was done before it is kept like any checkpoint.

    Args:
      advance: compiled by `jax.jit`: the step, which may consume the state.
      batches: of this process's rows, see `jaxlm.data.stream.Batches`.
      place: puts them on the devices; their "state" is what checkpoints keep of them.
      evaluate: of the weights and what the loss hands on: "loss" and, to choose checkpoints by, "bits_per_byte"; one serves the
        checkpoint of its step.
      rate: the learning rate of a step, for the record; traceable.
      flops_per_token: of the whole step, inputs counted, and `peak`: what all chips could do in a second.
      documents: what a batch of a step (from 0) was made of, see `jaxlm.data.stream.Batches.documents`; to name it.
      start: steps done before.

    Raises:
      NonFiniteLoss: names the step, the last checkpoint and the documents of this process.
      CheckpointError: when one could not be written.
    """
    return _Loop(advance, state, batches, place, settings, report, checkpoints, evaluate, rate, flops_per_token, peak,
                 documents, start).run()


class _Loop:
    """`fit` under way."""

    def __init__(self, advance: Any, state: State, batches: Iterator[Mapping[str, np.ndarray]], place: Any, settings: Settings,
                 report: Report, checkpoints: Checkpoints | None, evaluate: Any, rate: Any, flops_per_token: float | None,
                 peak: float | None, documents: Any, start: int) -> None:
        self.advance, self.state, self.batches, self.place = advance, state, batches, place
        self.settings, self.report, self.checkpoints, self.evaluate = settings, report, checkpoints, evaluate
        # On the device like the step, and read with it: computed here and now, it would wait for all that is under way.
        self.rate = None if rate is None else jax.jit(rate)
        self.flops_per_token, self.peak, self.documents = flops_per_token, peak, documents
        self.start = self.step = self.saved = self.evaluated = start
        self.found: Mapping[str, float] | None = None
        self.compiled: Any = None
        self.rows: Any = None  # what checkpoints keep of the batches
        self.flights: collections.deque[_Flight] = collections.deque()
        self.skipped, self.seen = 0, 0  # steps in a row; tokens
        self.spent = Time()
        self.clock: collections.deque[tuple[float, int]] = collections.deque(maxlen=WINDOW + 1)
        self.trace = contextlib.ExitStack()

    def run(self) -> Fitted:
        began, signals, stopped = time.perf_counter(), _Signals(), None
        with signals.heard(), self.trace:
            try:
                while self.step < self.settings.steps and not signals.stop(self.step):
                    if not self._step():
                        stopped = END
                        break
                    if _every(self.settings.evaluate_every, self.step):
                        self._evaluate()
                    if _every(self.settings.checkpoint_every, self.step):
                        self._save()
                self._settle(0)
                if signals.asked is None:
                    self._evaluate()
                self._save()
                if self.checkpoints is not None:
                    with self._aside("checkpoint"):
                        self.checkpoints.wait()
            except Exception as error:
                self._rescue(error)
                raise
        self.spent.whole = time.perf_counter() - began
        stopped = stopped or signals.asked
        return Fitted(self.state, self.step, stopped if self.step < self.settings.steps else None, self.found, self.spent)

    def _rescue(self, error: Exception) -> None:
        """Tells and keeps what was done before an error, which stays the one that is raised."""
        good = not isinstance(error, (NonFiniteLoss, CheckpointError))
        while self.flights:  # also when they cannot be told: each has to be found good
            try:
                self._settle(len(self.flights) - 1)
            except NonFiniteLoss:
                good = False
            except Exception:
                continue
        if good and self.checkpoints is not None and jax.process_count() == 1:  # others would not come to write their parts
            with contextlib.suppress(Exception):
                self._save()
                self.checkpoints.wait()

    def _step(self) -> bool:
        """Puts a step under way; False when there is no batch for it."""
        if self.settings.profile is not None and self.step - self.start == self.settings.profiled[0]:
            self.trace.enter_context(jax.profiler.trace(str(self.settings.profile)))
        then = time.perf_counter()
        host = next(self.batches, None)
        if host is None:
            return False
        if not self.flights or self.flights[-1].metrics.loss.is_ready():
            self.spent.input += time.perf_counter() - then  # the devices had nothing to do meanwhile
        batch = dict(self.place(host))
        rows = batch.pop("state")
        if self.compiled is None:
            then = time.perf_counter()
            self.compiled = self.advance.lower(self.state, batch).compile()
            self.spent.compile = time.perf_counter() - then
            self._restart_clock()
        rate = None if self.rate is None else self.rate(np.int32(self.step))
        self.state, metrics = self.compiled(self.state, batch)
        self.step, self.rows = self.step + 1, rows
        tokens = len(rows) * sum(part.shape[1] for part in _segments(host))
        self.flights.append(_Flight(self.step, metrics, rate, host, tokens))
        self._settle(AHEAD)
        if self.settings.profile is not None and self.step - self.start == sum(self.settings.profiled):
            self._settle(0)
            self.trace.close()
        return True

    def _settle(self, most: int) -> None:
        """Reads what steps told, until no more than `most` are under way."""
        while len(self.flights) > most:
            flight = self.flights.popleft()
            metrics, rate = jax.device_get((flight.metrics, flight.rate))
            self.skipped = 0 if metrics.finite else self.skipped + 1
            if self.skipped > self.settings.skip:
                self.flights.clear()  # they went on from what is no number
                numbers = float(metrics.loss), float(metrics.gradient_norm)
                weights = ", but the new weights are not finite" if np.isfinite(numbers).all() else ""
                raise NonFiniteLoss(f"step {flight.step}: loss {numbers[0]}, gradient norm {numbers[1]}{weights}; "
                                    f"{self._last()}{self._read(flight, '; ')}")
            self.seen += flight.tokens
            then, before = self.clock[0]
            self.clock.append((time.perf_counter(), self.seen))
            speed = (self.seen - before) / max(self.clock[-1][0] - then, 1e-9)
            record = {"step": flight.step, "loss": float(metrics.loss), "gradient_norm": float(metrics.gradient_norm),
                      "tokens": flight.tokens, "weight": float(metrics.weight), "tokens_per_s": speed,
                      "padding": float(np.mean(np.concatenate(_segments(flight.batch), axis=1) == 0))}
            record |= {name: float(value) for name, value in metrics.aux.items()}
            if rate is not None:
                record["learning_rate"] = float(rate)
            if self.flops_per_token and self.peak:
                record["mfu"] = speed * self.flops_per_token / self.peak
            if not metrics.finite:
                record |= {"skipped": True, "documents": self._read(flight)}
            self.report.step(record)

    def _read(self, flight: _Flight, before: str = "") -> str:
        """What a step's batch was made of, in words; nothing where nobody knows."""
        if self.documents is None:
            return ""
        rows = [f"row {row}: {' '.join('/'.join(map(str, one)) for one in read)}"
                for row, read in self.documents(flight.batch, flight.step - 1).items()]
        more = f" and {len(rows) - NAMED} rows more" if len(rows) > NAMED else ""
        return f"{before}documents as phase/source/number, from 0, of {', '.join(rows[:NAMED])}{more}"

    def _last(self) -> str:
        """Where to go on from, in words."""
        try:
            last = None if self.checkpoints is None else self.checkpoints.latest
        except CheckpointError as error:
            return str(error)
        return "there is no checkpoint" if last is None else f"the last checkpoint is of step {last}"

    def _evaluate(self) -> None:
        if self.evaluate is None or self.evaluated == self.step:
            return
        with self._aside("evaluation"):
            weights = self.state.params if self.state.average is None else self.state.average
            self.found = self.evaluate(weights, self.state.carry)
            self.report.evaluation({"step": self.step, **self.found})
        self.evaluated = self.step

    def _save(self) -> None:
        if self.checkpoints is None or self.saved == self.step:
            return
        with self._aside("checkpoint"):
            self.checkpoints.save(self.step, self.state, self.rows, self.found if self.evaluated == self.step else None)
        self.saved = self.step

    @contextlib.contextmanager
    def _aside(self, what: str) -> Iterator[None]:
        """For what the steps wait for; counts its time."""
        self._settle(0)
        then = time.perf_counter()
        yield
        setattr(self.spent, what, getattr(self.spent, what) + time.perf_counter() - then)
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Tokens per second are those of steps from now on."""
        self.clock.clear()
        self.clock.append((time.perf_counter(), self.seen))


def _segments(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Those of every sequence that a row has: of pairs two."""
    return [batch[name] for name in ("input_segments", "segments") if name in batch]


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0

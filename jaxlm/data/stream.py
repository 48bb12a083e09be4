"""Batches of packed examples in an order that depends on a seed and nothing else.

Every row of the global batch is a stream of its own: of B rows each reads one of the shuffled mixture's first B documents, one
of the next B ..., cuts them to fit and fills row after row. So it does not matter how many processes there are, which of them
makes which rows, nor how many workers help. Where a row is, is a few integers, which come with each batch: who keeps them can
go on from there.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from jaxlm.data.source import Source

_MAX_EMPTY = 10_000  # documents without text in a row before it is an error
_LEAST = 8  # tokens for which a document is cut, or an eighth of a row; a row with less room is padded


class Example(Protocol):
    """What packing reads of an example: see `jaxlm.objectives.Text`."""

    tokens: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    prefix: int


class Pair(Protocol):
    """The same of an example for an encoder-decoder: see `jaxlm.objectives.Pair`."""

    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " m"]


class Objective(Protocol):
    """What packing asks of an objective: see `jaxlm.objectives.Objective`."""

    makes: str
    overlap: int
    prefixes: bool

    def example(self, tokens: Int[np.ndarray, " n"], random: np.random.Generator) -> Example | Pair:
        """An example of a piece of a document; as long or longer the longer the piece is.

        Raises:
          ValueError: for a piece with nothing to learn from, which is then left out.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is read for so many steps.

    Attributes:
      sources: each with its share of the documents, in any unit.
      steps: None to the end; the last phase goes on whatever its steps.
    """

    sources: tuple[tuple[Source, float], ...]
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.sources or any(share <= 0 for _, share in self.sources):
            raise ValueError(f"a phase needs sources with shares above 0, got {self.sources}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a phase has at least 1 step, got {self.steps}")


def mixture(phase: Phase, opened: Sequence[Any], *seed: int) -> grain.MapDataset:
    """The phase's documents, shuffled anew each time a source is through, without end.

    Args:
      opened: what each of the phase's sources opens as, or something of the same length in its place.
    """
    datasets = []
    for place, documents in enumerate(opened):
        order = int(np.random.SeedSequence((*seed, place)).generate_state(1)[0])
        datasets.append(grain.MapDataset.source(documents).shuffle(seed=order).repeat(None))
    return grain.MapDataset.mix(datasets, weights=[share for _, share in phase.sources]) if len(datasets) > 1 else datasets[0]


@dataclasses.dataclass(frozen=True)
class _Names:
    """In place of a source's documents, what they are called: (source, number)."""

    source: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> tuple[int, int]:
        return self.source, int(index)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides what the batches are.

    Attributes:
      phases: one after another; every phase begins with its own first documents.
      encode: a document's tokens, with those of its beginning and end.
      objective: of a step, counted from 0.
      rows: of the global batch.
      length: tokens of a row; of pairs, of a row of targets.
      inputs: tokens of a row of inputs, for objectives that make pairs; None for those that make texts.
      seed: of the order and of whatever objectives draw.
      cut: fill rows by cutting documents. Without, documents that do not fit any more begin the next row, and what is longer
        than a row is dropped behind it.
    """

    phases: tuple[Phase, ...]
    encode: Callable[[str], Sequence[int]]
    objective: Callable[[int], Objective]
    rows: int
    length: int
    seed: int = 0
    cut: bool = True
    inputs: int | None = None

    def __post_init__(self) -> None:
        if not self.phases or any(phase.steps is None for phase in self.phases[:-1]):
            raise ValueError("a plan has phases, all but the last of so many steps")
        if min(self.rows, *self.lengths) < 1:
            raise ValueError(f"a batch has at least one row of one token, got {self.rows} of {self.lengths}")
        if self.seed < 0:
            raise ValueError(f"a seed is not negative, got {self.seed}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a row: of one of inputs and one of targets where examples are pairs."""
        return (self.length,) if self.inputs is None else (self.inputs, self.length)

    @property
    def width(self) -> int:
        """Integers of a row's state: documents read of each phase, and tokens read of the current document."""
        return len(self.phases) + 1

    def start(self) -> Int[np.ndarray, "B K"]:
        """The state of all rows before the first step."""
        return np.zeros((self.rows, self.width), np.int32)

    def phase(self, step: int) -> int:
        """Which phase a step belongs to."""
        for index, phase in enumerate(self.phases[:-1]):
            if step < (phase.steps or 0):
                return index
            step -= phase.steps or 0
        return len(self.phases) - 1

    def document(self, row: int, phase: int, count: int) -> int:
        """Where in the phase's mixture the document is that a row reads after so many."""
        # Sources alternate: always the same place among B documents would be always the same source.
        turn = int(np.random.default_rng((self.seed, phase, count)).integers(self.rows))
        return self.rows * count + (row + turn) % self.rows


Batch = Mapping[str, np.ndarray]


class _Filler:
    """Fills rows of consecutive steps."""

    def __init__(self, plan: Plan, documents: Sequence[grain.MapDataset], rows: Sequence[int],
                 state: Int[np.ndarray, "B K"], step: int) -> None:
        self.plan, self.documents, self.rows = plan, documents, rows
        self.state, self.step = {row: state[row].tolist() for row in rows}, step
        self.read: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # a row's document of (phase, index)

    def next(self) -> dict[str, np.ndarray]:
        """The rows of the next step."""
        objective, phase = self.plan.objective(self.step), self.plan.phase(self.step)
        if (objective.makes == "pair") != (self.plan.inputs is not None):
            kind = "pairs" if objective.makes == "pair" else "texts"
            raise ValueError(f"{type(objective).__name__} makes {kind}: a plan says how long inputs are (Plan.inputs) for "
                             "pairs, and for pairs alone")
        if self.step and phase != self.plan.phase(self.step - 1):
            for row in self.rows:
                self.state[row][-1] = 0  # the last phase's documents are left where they are
        before = np.array([self.state[row] for row in self.rows], np.int32)
        made = [self._row(row, objective, phase) for row in self.rows]
        self.step += 1
        batch = {name: np.stack([one[name] for one in made]) for name in made[0]}
        return batch | {"before": before, "state": np.array([self.state[row] for row in self.rows], np.int32)}

    def _row(self, row: int, objective: Objective, phase: int) -> dict[str, np.ndarray]:
        lengths = self.plan.lengths
        out = {name: np.zeros(size, np.float32 if name == "weights" else np.int32)
               for names, size in zip(_NAMES[len(lengths)], lengths, strict=True) for name in names}
        used, segment, empty, least = [0] * len(lengths), 0, 0, min(_LEAST, min(lengths) // 8)
        state = self.state[row]
        while all(part < size for part, size in zip(used, lengths, strict=True)):
            tokens, document = self._document(row, phase)
            rest, rooms = tokens[state[-1]:], [size - part for part, size in zip(used, lengths, strict=True)]
            made, reason = None, None
            if len(rest) >= 2:
                try:
                    made = self._example(objective, (*document, state[-1]), rest, rooms)
                except ValueError as error:
                    reason = error
            if made is None:
                state[phase], state[-1] = state[phase] + 1, 0
                empty += 1
                if empty > _MAX_EMPTY:
                    why = reason or "they have no two tokens"
                    raise ValueError(f"there is nothing to learn from {_MAX_EMPTY} documents in a row: {why}") from reason
                continue
            example, taken = made
            if taken < len(rest) and segment and (not taken or min(rooms) < least or not self.plan.cut):
                break
            if not taken:
                raise ValueError(f"rows of {' and '.join(map(str, lengths))} tokens hold no example of "
                                 f"{type(objective).__name__}, however short the document")
            if len(lengths) == 1 and example.prefix and not objective.prefixes:
                name = type(objective).__name__
                raise ValueError(f"{name} made an example with a prefix of {example.prefix} tokens, and {name}.prefixes says "
                                 "that none has: it must be True")
            segment, empty = segment + 1, 0
            for place, arrays in enumerate(_arrays(example, segment)):
                start, used[place] = used[place], used[place] + len(next(iter(arrays.values())))
                for name, values in arrays.items():
                    out[name][start:used[place]] = values
            if taken == len(rest) or not self.plan.cut:
                state[phase], state[-1] = state[phase] + 1, 0
            else:
                state[-1] += taken - objective.overlap
        return out

    def _document(self, row: int, phase: int) -> tuple[np.ndarray, tuple[int, int]]:
        """The tokens of the row's current document, and what it is called."""
        count = self.state[row][phase]
        if self.read.get(row, (None,))[0] != (phase, count):
            index = self.plan.document(row, phase, count)
            tokens = np.asarray(self.plan.encode(self.documents[phase][index]), np.int32)
            self.read[row] = ((phase, count), tokens, index)
        _, tokens, index = self.read[row]
        return tokens, (phase, index)

    def _example(self, objective: Objective, piece: tuple[int, int, int], rest: np.ndarray,
                 rooms: Sequence[int]) -> tuple[Example | Pair | None, int]:
        """The example of as much of a document as fits, and how much that is; none where nothing does."""
        taken = min(len(rest), sum(rooms) + 1)
        while True:
            try:
                example = objective.example(rest[:taken], np.random.default_rng((self.plan.seed, *piece)))
            except ValueError:
                if taken == len(rest) or tuple(rooms) == self.plan.lengths:
                    raise
                return None, 0  # cut, it is of no use: it may fit whole into the next row
            sizes = [len(next(iter(arrays.values()))) for arrays in _arrays(example, 0)]
            over = max(size - room for size, room in zip(sizes, rooms, strict=True))
            if over <= 0:
                return example, taken
            if taken == 2:
                return None, 0
            taken = max(taken - over, 2)


# A batch's arrays, by how many sequences an example has.
_NAMES = {1: (("tokens", "targets", "weights", "segments", "prefix"),),
          2: (("inputs", "input_segments"), ("targets", "weights", "segments"))}


def _arrays(example: Example | Pair, segment: int) -> tuple[dict[str, Any], ...]:
    """What an example puts into a batch, for each of its sequences; every token of a pair's targets is asked."""
    if hasattr(example, "inputs"):
        return ({"inputs": example.inputs, "input_segments": segment},
                {"targets": example.targets, "weights": 1.0, "segments": segment})
    return ({"tokens": example.tokens, "targets": example.targets, "weights": example.weights, "segments": segment,
             "prefix": min(example.prefix, len(example.tokens))},)


class _Rows(grain.IterDataset):
    """Some rows of every batch, as grain prefetches them in threads and processes."""

    def __init__(self, plan: Plan, documents: Sequence[grain.MapDataset], rows: Sequence[int],
                 state: Int[np.ndarray, "B K"], step: int) -> None:
        super().__init__()
        self.start = plan, documents, list(rows), state, step

    def __iter__(self) -> grain.DatasetIterator:
        if multiprocessing.parent_process() is not None:
            threading.Thread(target=_follow, daemon=True).start()
        return _RowsIterator(_Filler(*self.start))


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, filler: _Filler) -> None:
        super().__init__()
        self.filler = filler

    def __next__(self) -> dict[str, np.ndarray]:
        return self.filler.next()

    def get_state(self) -> dict[str, Any]:
        """For grain's sake: batches carry their state themselves."""
        return {"step": self.filler.step, "state": [self.filler.state[row] for row in self.filler.rows]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Back to what `get_state` gave."""
        self.filler.step = state["step"]
        self.filler.state = dict(zip(self.filler.rows, state["state"], strict=True))
        self.filler.read = {}


class Batches(Iterator[Batch]):
    """Some rows of every batch from a step on, without end. Closing it ends its threads and processes, as a program's end does.

    Batches are of tokens, targets, segments (from 1, 0 is padding) and prefix (tokens of the segment's beginning that all of it
    may see), int32 [R, T]; weights, float32 [R, T]; state, int32 [R, K], and the same before the batch. Batches of pairs have
    inputs and input_segments, int32 [R, N], beside targets, weights and segments: a pair is the same segment of both.
    """

    def __init__(self, plan: Plan, rows: Sequence[int] | None = None, *, state: Int[np.ndarray, "B K"] | None = None,
                 step: int = 0, workers: int = 0, ahead: int = 2) -> None:
        """
        Args:
          rows: of the global batch; default all.
          state: of all rows of the global batch, as the "state" of the batch before `step` had it; default the start.
          workers: processes that read, encode and pack; 0 does it in a thread of this one.
          ahead: batches that are made before they are asked for; 0, without workers, makes each when it is asked for.

        Raises:
          ValueError: as `Source.open`, for a state of another plan's shape, and for rows that the plan does not have.
        """
        rows = list(range(plan.rows)) if rows is None else list(rows)
        if not rows or not set(rows) <= set(range(plan.rows)):
            raise ValueError(f"rows are of 0 to {plan.rows - 1}, at least one, got {rows}")
        state = plan.start() if state is None else np.asarray(state)
        if state.shape != (plan.rows, plan.width):
            raise ValueError(f"the state of these batches is of shape {(plan.rows, plan.width)}, got {state.shape}: it is of "
                             "batches of another size or of other phases")
        # Opened here, once, for all workers.
        opened = [[source.open() for source, _ in phase.sources] for phase in plan.phases]
        names = [[_Names(place, len(one)) for place, one in enumerate(part)] for part in opened]

        def mixed(parts: Sequence[Sequence[Any]]) -> list[grain.MapDataset]:
            return [mixture(phase, part, plan.seed, index)
                    for index, (phase, part) in enumerate(zip(plan.phases, parts, strict=True))]

        documents, self.names = mixed(opened), mixed(names)
        self.plan, self.rows = plan, rows
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's processes read their settings there, and not every program is absl's
            workers = min(workers, len(rows))
            options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=max(ahead, 1))
            with _deaf():
                self.parts = [iter(_Rows(plan, documents, rows[worker::workers], state, step).mp_prefetch(options))
                              for worker in range(workers)]
        else:
            made = _Rows(plan, documents, rows, state, step)
            self.parts = [iter(grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=ahead)
                               if ahead else made)]
        self.starting = _deaf if workers else contextlib.nullcontext
        self.close = weakref.finalize(self, _close, self.parts)

    def __next__(self) -> Batch:
        """
        Raises:
          ValueError: when closed, as after anything that was raised here: some rows would be further than others.
        """
        if not self.parts:
            raise ValueError("these batches are closed")
        try:
            with self.starting():  # workers begin when they are first asked
                made = [next(part) for part in self.parts]
            self.starting = contextlib.nullcontext
        except BaseException:
            self.close()
            raise
        if len(made) == 1:
            return made[0]
        batch: dict[str, np.ndarray] = {}
        for place, part in enumerate(made):
            for name, value in part.items():
                whole = batch.setdefault(name, np.zeros((len(self.rows), *value.shape[1:]), value.dtype))
                whole[place::len(self.parts)] = value
        return batch

    def documents(self, batch: Batch, step: int) -> dict[int, list[tuple[int, int, int]]]:
        """What a batch of these is made of.

        Args:
          step: the batch's, from 0.

        Returns:
          By row of the global batch: of every document that was read, whole or in part, its phase, that one's source, and
          its number in what the source opens as; all from 0.
        """
        phase = self.plan.phase(step)
        found = {}
        for row, before, after in zip(self.rows, batch["before"], batch["state"], strict=True):
            counts = range(int(before[phase]), int(after[phase]) + bool(after[-1]))
            found[row] = [(phase, *self.names[phase][self.plan.document(row, phase, count)]) for count in counts]
        return found

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _follow() -> None:
    """Ends this process when the one that began it has ended, however it has."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin here do not hear Ctrl-C and SIGTERM: they are for the one that waits for them."""
    resource_tracker.ensure_running()  # when it begins, the mask is lifted
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(parts: list[grain.DatasetIterator]) -> None:
    while parts:  # and they go now: at the program's end, what they call on their way out may be gone
        parts.pop().close()

"""Checkpoints: what training needs to go on, written beside it, whole or not at all.

orbax writes them: in the background, from every process its own part, into a directory that gets its name when all is there.
What is read back takes the shardings of the machine at hand, whatever those were that it was written with.
"""

import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

METRIC = "bits_per_byte"  # of an evaluation, the lower the better
ITEMS = ("state", "rows", "about")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; says which and what would help."""


class OtherRun(CheckpointError):
    """A checkpoint of another run; says the first difference.

    Attributes:
      names: of what is known of a run, all that differ.
    """

    def __init__(self, message: str, names: Collection[str]) -> None:
        super().__init__(message)
        self.names = frozenset(names)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: updates made.
      state: as it was saved.
      rows: what batches need to go on, see `jaxlm.data.stream`.
      changed: names of what was free to differ, and does.
    """

    step: int
    state: PyTree
    rows: Any
    changed: frozenset[str] = frozenset()


def _plain(tree: PyTree) -> PyTree:
    """The tree with keys as the numbers they are made of."""
    def plain(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(jax.random.key_data, leaf).update(sharding=leaf.sharding)
        return jax.random.key_data(leaf)
    return jax.tree.map(plain, tree)


def _shapes(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every leaf of a plain tree, by path; parts without leaves as they are, for orbax minds them too."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    return {jax.tree_util.keystr(path, simple=True, separator="/"):
            f"{leaf.dtype}{list(leaf.shape)}" if jax.tree.leaves(leaf) else repr(leaf) for path, leaf in found}


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(key: Any) -> Any:
    """How a key makes numbers; of a shape as well, which `jax.random.key_impl` does not take by itself."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


class _Whole(ocp.path.step.NameFormat):
    """Directories named by their step; those that lack a part (half a copy) are as good as not there."""

    def __init__(self) -> None:
        self.plain = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self.plain.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        return (found for found in self.plain.find_all(base_path) if _whole(found.path))

    def find_step(self, base_path: Any, step: int) -> Any:
        found = self.plain.find_step(base_path, step)
        if not _whole(found.path):
            raise ValueError(f"{found.path} lacks a part")
        return found


def _whole(directory: Any) -> bool:
    return all((directory / item).is_dir() and any((directory / item).iterdir()) for item in ITEMS)


def _unsaid(record: logging.LogRecord) -> bool:
    """Keeps away what orbax logs: its errors are raised here as well, its warnings are about choices made here."""
    return "orbax" not in record.pathname


def _badness(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC] if math.isfinite(metrics[METRIC]) else math.inf


class Checkpoints:
    """The checkpoints of one run.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with Checkpoints(tempfile.mkdtemp(), about={"model": {"width": 8}}) as kept:
      ...     kept.save(3, {"w": jnp.ones(2)}, jnp.zeros((4, 2), int))
      ...     kept.restore({"w": jnp.zeros(2)}, jnp.zeros((4, 2), int)).step
      3
    """

    def __init__(self, directory: str | pathlib.Path, about: Mapping[str, Any], last: int = 2, best: int = 1) -> None:
        """
        Args:
          about: what must be the same for a checkpoint to be of use, as plain JSON: the model, the optimizer, the batch.
          last: how many of the newest are kept.
          best: how many of those with the lowest `METRIC` are kept beside them.
        """
        self.directory, self.about = pathlib.Path(directory).absolute(), dict(about)
        logging.getLogger("absl").addFilter(_unsaid)
        self.names = _Whole()
        managers = ocp.checkpoint_managers
        keep: list[managers.PreservationPolicy] = [managers.LatestN(max(last, 1))]
        if best:
            keep.append(managers.BestN(get_metric_fn=_badness, reverse=True, n=best, keep_checkpoints_without_metrics=False))
        # Without best_fn orbax writes no metrics, and a run that goes on would not know the best any more.
        options = ocp.CheckpointManagerOptions(preservation_policy=managers.AnyPreservationPolicy(keep), best_fn=_badness,
                                               best_mode="min", cleanup_tmp_directories=True, step_name_format=self.names)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)
        except (OSError, ValueError) as error:  # ValueError: metrics that are no JSON
            raise CheckpointError(f"checkpoints cannot be kept in {self.directory}: {error}") from error

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step; waits for one that is being written.

        Raises:
          CheckpointError: as `save`.
        """
        self.wait()
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree, rows: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Begins to write a checkpoint; training may go on, and may donate the state.

        Args:
          metrics: of an evaluation at this step, for choosing what to keep; without `METRIC` they are of no use for that.

        Raises:
          CheckpointError: when this one or the one before it could not be written; what was whole still is.
        """
        self.wait()
        items = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), rows=ocp.args.StandardSave({"rows": rows}),
                                   about=ocp.args.JsonSave(self._about(state, rows)))
        chosen = {METRIC: float(metrics[METRIC])} if metrics is not None and METRIC in metrics else None
        self._guard(lambda: self.manager.save(step, args=items, metrics=chosen, force=True))

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
          CheckpointError: as `save`.
        """
        self._guard(self.manager.wait_until_finished)

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # orbax passes on whatever its threads and the storage below raise
            raise CheckpointError(f"a checkpoint could not be written to {self.directory} ({_reason(error)}): "
                                  f"there are {self._steps()}") from error

    def _steps(self) -> str:
        """Those on disk, in words."""
        found = sorted(one.step for one in self.names.find_all(self.directory))
        return f"whole ones of step {', '.join(map(str, found))}" if found else "no whole ones"

    def _about(self, state: PyTree, rows: Any) -> dict[str, Any]:
        """What is known of the run, with the shapes of what a checkpoint holds."""
        return {**self.about, "shapes": _shapes({"state": _plain(state), "rows": rows})}

    def restore(self, state: PyTree, rows: Any, step: int | None = None, free: Collection[str] = ()) -> Restored:
        """A checkpoint in the shapes, dtypes and shardings of the given ones.

        Args:
          state, rows: arrays or `jax.ShapeDtypeStruct`s with shardings.
          step: default the newest.
          free: names of what is known of the run that need not be the same.

        Raises:
          OtherRun: for one of another model, optimizer or batch; names the first difference.
          CheckpointError: for none, one that cannot be read.
        """
        step = self.latest if step is None else step
        if step not in self.manager.all_steps():
            raise CheckpointError(f"there is no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}; "
                                  f"there are {self._steps()}")
        about = self._read(step, about=ocp.args.JsonRestore()).about
        mine = self._about(state, rows)
        names = {name for name in {**about, **mine}
                 if name not in about or name not in mine or difference(about[name], mine[name]) is not None}
        if names - set(free):
            found, wanted = ({name: value for name, value in one.items() if name not in free} for one in (about, mine))
            raise OtherRun(f"the checkpoint of step {step} in {self.directory} is of another run: "
                           f"{difference(found, wanted)}", names - set(free))
        read = self._read(step, state=ocp.args.StandardRestore(_plain(state)), rows=ocp.args.StandardRestore({"rows": rows}))
        whole = jax.tree.map(lambda like, leaf: jax.random.wrap_key_data(leaf, impl=_kind(like)) if _is_key(like) else leaf,
                             state, read.state)
        return Restored(step, whole, read.rows["rows"], frozenset(names))

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise CheckpointError(f"the checkpoint of step {step} in {self.directory} cannot be read ({_reason(error)}): "
                                  f"remove its folder to go on from another; there are {self._steps()}") from error

    def close(self) -> None:
        """Waits and lets go.

        Raises:
          CheckpointError: as `save`.
        """
        try:
            self.wait()
        finally:
            self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_weights(directory: str | pathlib.Path, shapes: Callable[[Mapping[str, Any]], PyTree], *, step: int | None = None,
                 average: bool = False) -> tuple[int, Mapping[str, Any], PyTree]:
    """The weights alone of a checkpoint; a run that is writing others is not disturbed.

    Args:
      shapes: from what is known of the run (`about`) to `jax.ShapeDtypeStruct`s with shardings.
      step: default the newest.
      average: in place of the last weights, the average over the steps.

    Returns:
      The step, what is known of the run, the weights.

    Raises:
      CheckpointError: for none, one without an average, one that cannot be read.
    """
    names, base = _Whole(), pathlib.Path(directory).absolute()
    found = {one.step: one.path for one in names.find_all(base)} if base.is_dir() else {}
    step = max(found, default=None) if step is None else step
    if step not in found:
        raise CheckpointError(f"there is no checkpoint {'' if step is None else f'of step {step} '}in {base}; there are "
                              f"{', '.join(map(str, sorted(found))) or 'none'}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        about = reader.restore(found[step], args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        if average and not about.get("average"):
            raise CheckpointError(f"the run in {base} kept no average of the weights")
        item = {"average" if average else "params": shapes(about)}
        wanted = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                                        partial_restore=True)
        try:
            read = reader.restore(found[step], args=ocp.args.Composite(state=wanted)).state
        except Exception as error:
            raise CheckpointError(f"the checkpoint of step {step} in {base} cannot be read ({_reason(error)})") from error
    return step, about, next(iter(read.values()))


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom, without the dumps of settings that tensorstore adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = " ".join(re.split(r" \[\w+(?:\[\d+\])?=|\. See full", str(error).strip(), maxsplit=1)[0].splitlines()[:2])
    # What was attempted comes first, why it did not work last.
    return (line if len(line) <= 400 else f"{line[:100]} ... {line[-290:]}") or type(error).__name__


def difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """The first difference between two pieces of plain JSON, in words; None where there is none.

    Example:
      >>> difference({"model": {"width": 8}}, {"model": {"width": 16}})
      'its model.width is 8, here it is 16'
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            inner = f"{where}.{name}" if where else str(name)
            if name not in found or name not in wanted:
                has, lacks = ("it has", "here there is none") if name in found else ("it has no", "here there is one")
                return f"{has} {inner}, {lacks}"
            other = difference(found[name], wanted[name], inner)
            if other is not None:
                return other
        return None
    if isinstance(found, list) and isinstance(wanted, (list, tuple)) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return next((other for i, (one, two) in pairs if (other := difference(one, two, f"{where}.{i}")) is not None), None)
    return None if found == wanted else f"its {where} is {found!r}, here it is {wanted!r}"

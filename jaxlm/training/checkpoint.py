"""Checkpoints: what training needs to go on, written beside it, whole or not at all.

orbax writes them: in the background, from every process its own part, into a directory that gets its name when all is there.
What is read back takes the shardings of the machine at hand, whatever those were that it was written with.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

METRIC = "bits_per_byte"  # of an evaluation, the lower the better


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; says which and what would help."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: updates made.
      state: as it was saved.
      rows: what batches need to go on, see `jaxlm.data.stream`.
    """

    step: int
    state: PyTree
    rows: Any


def _plain(tree: PyTree) -> PyTree:
    """The tree with keys as the numbers they are made of."""
    def plain(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(jax.random.key_data, leaf).update(sharding=leaf.sharding)
        return jax.random.key_data(leaf)
    return jax.tree.map(plain, tree)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


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
        managers = ocp.checkpoint_managers
        keep: list[managers.PreservationPolicy] = [managers.LatestN(max(last, 1))]
        if best:
            keep.append(managers.BestN(get_metric_fn=lambda metrics: metrics[METRIC], reverse=True, n=best,
                                       keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(preservation_policy=managers.AnyPreservationPolicy(keep),
                                               cleanup_tmp_directories=True)
        try:
            self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "rows", "about"))
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be kept in {self.directory}: {error}") from error

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree, rows: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Begins to write a checkpoint; training may go on, and may donate the state.

        Args:
          metrics: of an evaluation at this step, for choosing what to keep.

        Raises:
          CheckpointError: when an earlier one could not be written; that one is not there, those before it are.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), rows=ocp.args.StandardSave({"rows": rows}),
                                   about=ocp.args.JsonSave(self.about))
        self._guard(lambda: self.manager.save(step, args=items, metrics=None if metrics is None else dict(metrics), force=True))

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
          CheckpointError: as `save`.
        """
        self._guard(self.manager.wait_until_finished)

    def _guard(self, what: Any) -> None:
        try:
            self.manager.check_for_errors()
            what()
        except Exception as error:  # orbax passes on whatever its threads and the storage below raise
            left = self.manager.latest_step()
            kept = "there is none before it" if left is None else f"that of step {left} is whole"
            raise CheckpointError(f"a checkpoint could not be written to {self.directory} ({_first_line(error)}): "
                                  f"{kept}") from error

    def restore(self, state: PyTree, rows: Any, step: int | None = None) -> Restored:
        """A checkpoint in the shapes, dtypes and shardings of the given ones.

        Args:
          state, rows: arrays or `jax.ShapeDtypeStruct`s with shardings.
          step: default the newest.

        Raises:
          CheckpointError: for none, one of another model, optimizer or batch (names the first difference), one that cannot be
            read.
        """
        found = self.manager.all_steps()
        step = self.latest if step is None else step
        if step not in found:
            raise CheckpointError(f"there is no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}; "
                                  f"there are {', '.join(map(str, sorted(found))) or 'none'}")
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        other = difference(about, self.about)
        if other is not None:
            raise CheckpointError(f"the checkpoint of step {step} in {self.directory} is of another run: {other}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_plain(state)), rows=ocp.args.StandardRestore({"rows": rows}))
        try:
            read = self.manager.restore(step, args=items)
        except Exception as error:
            raise CheckpointError(f"the checkpoint of step {step} in {self.directory} cannot be read: "
                                  f"{_first_line(error)}") from error
        whole = jax.tree.map(lambda like, leaf: jax.random.wrap_key_data(leaf) if _is_key(like) else leaf, state, read.state)
        return Restored(step, whole, read.rows["rows"])

    def close(self) -> None:
        """Waits and lets go."""
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


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

"""One table from logical axes to mesh axes.

Every Param and every constrained activation names its dimensions ("vocab", "heads", "batch" ...); `RULES` says over which
mesh axes each is split. The mesh decides what happens: axes of size 1 split nothing, so `mesh(data=8)` is data
parallelism, `mesh(fsdp=8)` shards weights as well, `mesh(model=4)` is tensor parallelism, and they combine.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxlm.params import Param, paths
from jaxlm.weight import Int8, is_weight

Rules = Mapping[str, str | tuple[str, ...] | None]

AXES = ("data", "fsdp", "expert", "sequence", "model")

# The field's names for a mesh of one axis over all devices.
PRESETS = {"dp": "data", "fsdp": "fsdp", "tp": "model", "ep": "expert"}

RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    "embed": "fsdp",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": "expert",
    "expert_embed": "fsdp",
    "latent": "fsdp",
    "head": None,
    "layers": None,
    "position": None,
}


# Of vectors between layers. Said where they come to be: a compiler that may choose splits them as the weights are.
ACTIVATIONS = ("batch", "length", None)


def mesh(*, devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh over the five axes data, fsdp, expert, sequence, model; an axis that is not named has size 1.

    Args:
      devices: all of this process group's by default. One size may be -1: what the others leave.

    Raises:
      ValueError: for an unknown axis, a size below 1, sizes whose product is not the number of devices, or devices of several
        TPU slices among which neither data nor fsdp can be divided.

    Example:
      >>> mesh(devices=jax.devices()[:1]).shape["model"]
      1
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(sizes.keys() - set(AXES))
    if unknown:
        raise ValueError(f"no mesh axis is called {', '.join(unknown)}; the axes are {', '.join(AXES)}")
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong:
        raise ValueError(f"the size of mesh axis {wrong[0]!r} must be positive, or -1 for what is left, got {sizes[wrong[0]]}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"only one mesh axis may be -1, got {', '.join(open_axes)}")
    if open_axes:
        sizes[open_axes[0]] = max(len(devices) // math.prod(size for size in sizes.values() if size != -1), 1)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh sizes {dict(zip(AXES, shape, strict=True))} need {math.prod(shape)} devices, "
                         f"there are {len(devices)}")
    return Mesh(_placed(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the mesh's shape: on TPUs so that neighbours in it are neighbours in the machine.

    Of several slices, between which the way is long, "data" takes as many of them as there are, else "fsdp".
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = next((axis for axis in ("data", "fsdp") if shape[AXES.index(axis)] % slices == 0), None)
    if outer is None:
        raise ValueError(f"these devices are of {slices} slices: the size of data or fsdp must be a multiple of that, got "
                         f"{dict(zip(AXES, shape, strict=True))}")
    between = tuple(slices if axis == outer else 1 for axis in AXES)
    within = tuple(size // parts for size, parts in zip(shape, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def check(mesh: Mesh) -> None:
    """Raises:
      ValueError: for what is no mesh, one whose axes are not this module's, or not in Auto mode; says how to make one.
    """
    how = f"make it with jaxlm.sharding.mesh, of axes {', '.join(AXES)}: mesh(model=-1)"
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}; {how}")
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:
        raise ValueError(f"the mesh has an axis {unknown[0]!r}, which no rule splits anything over; {how}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"the mesh's axes are {mesh.axis_types}, and sharding here is left to the compiler (Auto); {how}")


def partition(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int],
              rules: Rules = RULES) -> PartitionSpec:
    """Which mesh axes split each dimension. Of several, the first that together divide it do; it may stay whole.

    Args:
      sizes: of the mesh's axes, by name.

    Raises:
      ValueError: for a logical axis that the rules lack, or two dimensions split over the same mesh axis.

    Example:
      >>> tuple(partition(("embed", "heads", "head"), (64, 8, 16), {"fsdp": 2, "model": 4}))
      ('fsdp', 'model', None)
    """
    used: dict[str, str] = {}
    entries: list[Any] = []
    for logical, size in zip(axes, shape, strict=True):
        if logical is not None and logical not in rules:
            raise ValueError(f"no sharding rule for the logical axis {logical!r}; there are rules for {', '.join(rules)}")
        wanted = rules[logical] if logical is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else (wanted or ())
        wanted = tuple(axis for axis in wanted if sizes.get(axis, 1) > 1)
        for axis in wanted:
            if axis in used:
                raise ValueError(f"mesh axis {axis!r} would split both {used[axis]!r} and {logical!r} of {tuple(axes)}")
            used[axis] = logical
        while size % math.prod(sizes[axis] for axis in wanted):
            wanted = wanted[:-1]
        entries.append(wanted[0] if len(wanted) == 1 else wanted or None)
    return PartitionSpec(*entries)


def names(spec: PartitionSpec) -> set[str]:
    """The mesh axes that split something in a PartitionSpec.

    Example:
      >>> sorted(names(PartitionSpec(("data", "fsdp"), None, "model")))
      ['data', 'fsdp', 'model']
    """
    return {axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None}


def shardings(spec: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A NamedSharding per Param of a spec."""
    return jax.tree.map(lambda p: NamedSharding(mesh, partition(p.axes, p.shape, mesh.shape, rules)), spec,
                        is_leaf=lambda leaf: isinstance(leaf, Param))


def match(tree: PyTree, spec: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Shardings for a tree of weights made after `spec`: an Int8's scale is split like its values where it is not 1."""
    flat = paths(spec)

    def one(path, weight):
        axes = flat[jax.tree_util.keystr(path, simple=True, separator="/")].axes

        def place(shape):
            return NamedSharding(mesh, partition(axes, shape, mesh.shape, rules))
        return Int8(place(weight.values.shape), place(weight.scale.shape)) if isinstance(weight, Int8) else place(weight.shape)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_weight)


def constrain(x: Array, axes: Sequence[str | None], rules: Rules = RULES) -> Array:
    """Asks for x to be split as the rules say over the mesh that `jax.set_mesh` made current; without one, x itself."""
    current = jax.sharding.get_abstract_mesh()
    if current.empty or current.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, current.shape, rules))

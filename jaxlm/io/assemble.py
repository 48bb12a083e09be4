"""Tensors of a checkpoint into the sharded arrays of a model, and back.

Each of their tensors is read once, and from it every shard that this process holds takes its part. Beside the model
itself no more is in memory at a time than the stacked weights that share a row of the name table, and on a CPU not even
these: the arrays keep the buffers they were filled in.
"""

import concurrent.futures
import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from jaxlm import config, model, sharding
from jaxlm.io.families.fields import Family
from jaxlm.io.names import Place, places
from jaxlm.io.source import Source
from jaxlm.params import paths
from jaxlm.weight import Weight, dense, is_weight

# Rows of a matrix taken at a time when it is transposed: so many columns of the result stay in a core's cache.
ROWS = 32

# XLA takes a NumPy buffer as its own, without a copy, from this alignment on.
ALIGNMENT = 64

Index = tuple[tuple[int, int], ...]


def _some(names: set[str]) -> str:
    shown = sorted(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _places(family: Family, cfg: config.Config, names: set[str]) -> tuple[Place, ...]:
    """Every place, by the family's table and prefix that fit these names best."""
    found = [places(table, base, cfg) for table in (family.table, *family.others) for base in family.bases]
    return max(found, key=lambda one: sum(name in names for place in one for name in place.names))


def _match(family: Family, cfg: config.Config, source: Source) -> list[tuple[Place, tuple[str, ...]]]:
    """Every place with the names of its tensors in this source.

    Raises:
      ValueError: for tensors that are missing, left over or of the wrong shape, or twins of a tied tensor that differ.
    """
    names = source.names()
    found = _places(family, cfg, names)
    missing, used, resolved = set(), set(), []
    for place in found:
        mine = []
        for name, others in zip(place.names, place.also, strict=True):
            there = [one for one in (name, *others) if one in names]
            if not there:
                missing.add(name)
                continue
            mine.append(there[0])
            used.update(there)
            for one in there:
                if tuple(source.shape(one)) != place.shape:
                    raise ValueError(f"tensor {one} has shape {tuple(source.shape(one))}; the config needs {place.shape}")
            for twin in there[1:]:
                if not np.array_equal(source.read(there[0]), source.read(twin)):
                    raise ValueError(f"the config ties tensor {twin} to {there[0]}, and they differ")
        resolved.append((place, tuple(mine)))
    if missing:
        raise ValueError(f"missing tensors: {_some(missing)}")
    left = {name for name in names - used if not any(re.fullmatch(pattern, name) for pattern in family.leftover)}
    if family.beyond:
        left = {name for name in left if _layer(name) < cfg.stack.layers}
    if left:
        raise ValueError(f"tensors that a {family.name} of this config has no place for: {_some(left)}")
    return resolved


def _layer(name: str) -> int:
    """Which layer a tensor belongs to; -1 for none."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that XLA can use as it is."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, weight: np.ndarray) -> None:
    """target[...] = weight with the dtype of target; a transposed weight goes in runs of its rows, three times as fast."""
    if weight.ndim < 2 or weight.flags.c_contiguous or not weight.size:
        np.copyto(target, weight, casting="unsafe")
        return
    outer, inner = int(np.argmax(weight.strides)), int(np.argmin(weight.strides))
    if outer == 0 and weight.ndim > 2:  # one expert after the other
        for into, one in zip(target, weight, strict=True):
            _copy(into, one)
        return
    rows = max(1, weight.strides[outer] // (weight.itemsize * weight.shape[inner]))  # that one step along `outer` takes
    step = max(1, ROWS // rows)
    for start in range(0, weight.shape[outer], step):
        part = (slice(None),) * outer + (slice(start, start + step),)
        np.copyto(target[part], weight[part], casting="unsafe")


def _index(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return tuple((one.indices(size)[0], one.indices(size)[1]) for one, size in zip(index, shape, strict=True))


def assemble(cfg: config.Config, family: Family, source: Source, dtype: Any, mesh: Mesh | None = None) -> PyTree:
    """The model's weights out of a checkpoint.

    Args:
      dtype: that the weights are to have, but for those that the family keeps in float32.
      mesh: over which they are split as `jaxlm.sharding` says; None puts them on this process's first device.

    Raises:
      ValueError: for tensors that are missing, left over, of the wrong shape, or hold NaN or infinity; names them.
    """
    spec, dtype = model.spec(cfg), np.dtype(dtype)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), spec)
    else:
        shardings = sharding.shardings(spec, mesh)
    leaves, layouts = paths(spec), paths(shardings)
    arrays: dict[str, jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for place, names in _match(family, cfg, source):
            shapes = [leaves[path].shape for path in place.paths]
            buffers: list[dict[Index, np.ndarray]] = []
            for path, shape in zip(place.paths, shapes, strict=True):
                held = {_index(index, shape) for index in layouts[path].addressable_devices_indices_map(shape).values()}
                exact = any(fnmatch.fnmatchcase(path, pattern) for pattern in family.exact)
                kind = np.dtype(np.float32) if exact else dtype
                buffers.append({index: _empty(tuple(b - a for a, b in index), kind) for index in held})
            for _ in pool.map(lambda job: _fill(source, *job), [(place, name, r, buffers) for r, name in enumerate(names)]):
                pass
            for path, shape, held in zip(place.paths, shapes, buffers, strict=True):
                array = jax.make_array_from_callback(shape, layouts[path],
                                                     lambda index, held=held, shape=shape: held[_index(index, shape)])
                arrays[path] = jax.block_until_ready(array)  # until then an accelerator's host keeps the buffers
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[jax.tree_util.keystr(path, simple=True, separator="/")], spec)


def _fill(source: Source, place: Place, name: str, number: int, buffers: list[dict[Index, np.ndarray]]) -> None:
    """Reads one tensor into all the buffers that hold a part of it; into none it is not read at all."""
    at, count = place.index(number), len(place.leading)

    def held(index: Index) -> bool:
        return all(start <= i < stop for i, (start, stop) in zip(at, index, strict=False))

    wanted = [{index: buffer for index, buffer in one.items() if held(index)} for one in buffers]
    if not any(wanted):
        return
    for weight, into in zip(place.split(source.read(name)), wanted, strict=True):
        for index, buffer in into.items():
            target = buffer[(*(i - start for i, (start, _) in zip(at, index, strict=False)), ...)]
            with np.errstate(over="ignore"):  # found next
                _copy(target, weight[tuple(slice(a, b) for a, b in index[count:])])
            if not np.isfinite(target).all():
                raise ValueError(f"tensor {name} holds NaN or infinity (as {target.dtype})")


def disassemble(params: PyTree, cfg: config.Config, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint that the model would be saved as, under its name; the inverse of `assemble`.

    Raises:
      ValueError: when `params` is not the tree that the config describes; names the first leaf that differs.
    """
    spec, weights = paths(model.spec(cfg)), paths(params, is_leaf=is_weight)
    for path in sorted(spec.keys() | weights.keys()):
        theirs = weights[path].shape if path in weights else "missing"
        ours = spec[path].shape if path in spec else "no such weight"
        if ours != theirs:
            raise ValueError(f"the weights do not fit the config: {path} is {theirs}, the config has {ours}")
    return _tensors(weights, cfg, family)


def _tensors(weights: Mapping[str, Weight], cfg: config.Config, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    for place in places(family.table, family.bases[0], cfg):
        parts = [np.asarray(dense(weights[path])) for path in place.paths]
        for number, name in enumerate(place.names):
            tensor = place.join([part[place.index(number)] for part in parts])
            for one in (name, *(place.also[number] if place.copied else ())):
                yield one, tensor

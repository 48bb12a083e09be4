"""`Param`: the one place where a weight's shape, logical axes and initialiser are written, and what a tree of them gives.

A spec is a nested dict whose leaves are `Param`. Init, abstract shapes, shardings, counts, checkpoints, adapters and name
tables all read it; a leaf's path ("decoder/blocks/0/0/attention/q") is the one name for it everywhere.
"""

import fnmatch
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

Initializer = Callable[["Param", Key[Array, ""], Any], Array]


def fan_in(param: "Param", key: Key[Array, ""], dtype: Any) -> Array:
    """Normal, truncated at two standard deviations, of variance 1 / (number of inputs)."""
    inputs = math.prod(param.shape[axis] for axis in param.inputs)
    # The truncation lowers the standard deviation to 0.8796 of the nominal one.
    return jax.random.truncated_normal(key, -2, 2, param.shape, dtype) * jnp.asarray(inputs**-0.5 / 0.87962566, dtype)


def normal(stddev: float) -> Initializer:
    """Normal of the given standard deviation."""
    return lambda param, key, dtype: jax.random.normal(key, param.shape, dtype) * jnp.asarray(stddev, dtype)


def zeros(param: "Param", key: Key[Array, ""], dtype: Any) -> Array:
    """All zero."""
    return jnp.zeros(param.shape, dtype)


def ones(param: "Param", key: Key[Array, ""], dtype: Any) -> Array:
    """All one."""
    return jnp.ones(param.shape, dtype)


@dataclass(frozen=True)
class Param:
    """A weight to be: its shape, a logical axis per dimension (None: never sharded) and how it starts.

    `inputs` are the dimensions that a product with it sums over: fan-in for the initialiser, and the dimensions that
    share a scale when the weight is quantised.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = fan_in
    inputs: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a Param needs a logical axis per dimension: shape {self.shape}, axes {self.axes}")

    def stacked(self, repeats: int) -> "Param":
        """The same weight for each of `repeats` layers, along a leading "layers" axis."""
        def init(param: Param, key: Key[Array, ""], dtype: Any) -> Array:
            return jax.vmap(lambda k: self.init(self, k, dtype))(jax.random.split(key, repeats))
        return Param((repeats, *self.shape), ("layers", *self.axes), init, tuple(axis + 1 for axis in self.inputs))


Spec = Mapping[str, Any]


def paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Path -> leaf, in the tree's order.

    Example:
      >>> list(paths({"a": {"b": 1}, "c": 2}))
      ['a/b', 'c']
    """
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def init(spec: Spec, key: Key[Array, ""], dtype: Any = jnp.float32) -> PyTree:
    """Fresh weights. Each leaf's key comes from its path, so adding a leaf changes no other."""
    def make(path, param):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return param.init(param, jax.random.fold_in(key, zlib.crc32(name.encode())), dtype)
    return jax.tree_util.tree_map_with_path(make, spec)


def abstract(spec: Spec, dtype: Any = jnp.float32, shardings: PyTree = None) -> PyTree:
    """The tree of `jax.ShapeDtypeStruct` that `init` would fill, for compiling without weights."""
    if shardings is None:
        return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), spec)
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), spec, shardings)


def count(tree: PyTree) -> int:
    """How many numbers a tree of Params or arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def matrix_size(spec: PyTree) -> int:
    """How many numbers a spec's matrices hold: what a token is multiplied with."""
    return sum(math.prod(param.shape) for param in jax.tree.leaves(spec) if param.inputs)


def select(tree: PyTree, *patterns: str) -> dict[str, Any]:
    """The leaves whose path matches one of the shell-style patterns.

    Raises:
      ValueError: for a pattern that matches nothing; names it and some paths.

    Example:
      >>> select({"a": {"bias": 1, "scale": 2}}, "*/bias")
      {'a/bias': 1}
    """
    flat, found = paths(tree), {}
    for pattern in patterns:
        matched = {path: leaf for path, leaf in flat.items() if fnmatch.fnmatchcase(path, pattern)}
        if not matched:
            raise ValueError(f"no path matches {pattern!r}; paths are like {', '.join(list(flat)[:5])}")
        found |= matched
    return {path: leaf for path, leaf in flat.items() if path in found}

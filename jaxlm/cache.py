"""The key-value cache: a pytree that the forward pass only reads, and the functions that write rows to it.

Slot s of a row holds the key and value of position s. `length` says how many slots of each row count; what lies beyond is
never seen. The forward pass returns the new tokens' keys and values beside the logits, and `append` (a run of tokens) or
`commit` (a path of a tree) writes those that are to stay, each row at its own length. Nothing rejected was ever
written, so nothing is rewound.

Keys and values lie as [R, B, K, S, H], R the repeats of a pattern of blocks: the one physical order in which the TPU
compiler writes rows at different lengths without copying the cache. `unstack` splits the leading axis into a tuple, for a
forward pass whose layers are unrolled.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from jaxlm import config, sharding


@flax.struct.dataclass
class KeyValue:
    """Keys and values, [R, B, K, S, H] each; unrolled: a tuple of R arrays [B, K, S, H].

    `v` is None where values are made of the keys: of a `config.LatentAttention`, whose k are [R, B, 1, S, latent + rotated].
    """

    k: Any
    v: Any

    def each(self, change: Callable[[Any], Any]) -> "KeyValue":
        """The same change of both."""
        return KeyValue(change(self.k), None if self.v is None else change(self.v))


@flax.struct.dataclass
class Memory:
    """An encoded source, for cross-attention: the encoder's vectors, or the keys and values that the layers make of them.

    Attributes:
      hidden: [B, S, D] or None; each layer makes its keys and values of it in every call. This is for training.
      layers: laid out like `Cache.layers`, None at places without cross-attention; or None.
      segments: int32 [B, S]; tokens see the source of their own segment (1 where they have none), 0 is padding.
      routing: what the routers of the encoder's mixtures of experts did (`jaxlm.stack.Result`), beside `hidden`, for losses.
    """

    hidden: Float[Array, "B S D"] | None
    layers: tuple[tuple[KeyValue | None, ...], ...] | None
    segments: Int[Array, "B S"]
    routing: Any = None


@flax.struct.dataclass
class Cache:
    """Committed keys and values of every layer.

    Attributes:
      layers: a tuple over groups of a tuple over the pattern's places of KeyValue.
      length: int32 [B], committed slots of each row.
      memory: an encoded source, of decoders that have one: its keys and values are made once and never written again.
    """

    layers: tuple[tuple[KeyValue, ...], ...]
    length: Int[Array, "B"]
    memory: Memory | None = None

    @property
    def slots(self) -> int:
        """S, how many slots a row has."""
        return jax.tree.leaves(self.layers)[0].shape[-2]


def spec(cfg: config.Stack, batch: int, slots: int, dtype: Any) -> Cache:
    """The cache's shapes as `jax.ShapeDtypeStruct`, for compiling without memory."""
    return jax.eval_shape(lambda: allocate(cfg, batch, slots, dtype))


def allocate(cfg: config.Stack, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens.

    Raises:
      ValueError: when batch or slots is not positive.
    """
    if batch < 1 or slots < 1:
        raise ValueError(f"a cache needs at least one row and one slot, got {batch} rows of {slots} slots")

    def one(block: config.Block, repeats: int) -> KeyValue:
        return KeyValue(*(None if kept is None else jnp.zeros((repeats, batch, kept[0], slots, kept[1]), dtype)
                          for kept in block.attention.cached))

    layers = tuple(tuple(one(block, group.repeats) for block in group.pattern) for group in cfg.groups)
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def unstack(cache: Cache) -> Cache:
    """Every layer's keys and values as arrays of their own."""
    memory = cache.memory
    if memory is not None and memory.layers is not None:
        memory = memory.replace(layers=jax.tree.map(tuple, memory.layers))
    return cache.replace(layers=jax.tree.map(tuple, cache.layers), memory=memory)


AXES = ("layers", "batch", "kv_heads", None, "head")  # of stacked keys and values


def constrained(layers: Any) -> Any:
    """Keys and values, of a cache or a memory, split over the current mesh as `AXES` says."""
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, AXES[-leaf.ndim:]), layers)


def _order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes major to minor as a TPU lays such a cache out: slots by head width, or swapped where that takes less padding."""
    def padded(rows: int, lanes: int) -> int:
        return -(-rows // 8) * 8 * -(-lanes // 128) * 128
    axes, (slots, head) = tuple(range(len(shape))), shape[-2:]
    return (*axes[:-2], axes[-1], axes[-2]) if padded(head, slots) < padded(slots, head) else axes


def _update(old: Array, new: Array, *where: Array) -> Array:
    """`dynamic_update_slice` in place. TPU compilers need telling: free to choose, they may lay the result out in another
    order than the argument and copy the whole cache there and back."""
    def pinned(old: Array, new: Array, *where: Array) -> Array:
        def pin(x: Array) -> Array:
            return with_layout_constraint(x, Layout(_order(old.shape)))
        return pin(jax.lax.dynamic_update_slice(pin(old), pin(new), where))

    def plain(old: Array, new: Array, *where: Array) -> Array:
        return jax.lax.dynamic_update_slice(old, new, where)

    return jax.lax.platform_dependent(old, new, *where, tpu=pinned, default=plain)


def _write(layers: Any, new: Any, start: Int[Array, "B"]) -> Any:
    """Rows of `new` at each row's own start. A row that would not fit is filled with NaN, never written shifted."""
    def prepare(old: Float[Array, "*R B K S H"], new: Float[Array, "*R B K T H"]) -> Array:
        fits = start + new.shape[-2] <= old.shape[-2]
        fits = fits.reshape((-1, 1, 1, 1)) if new.ndim == 4 else fits.reshape((1, -1, 1, 1, 1))
        return jnp.where(fits, new, jnp.nan).astype(old.dtype)

    def row(b: Any, layers: Any, new: Any, start: Array) -> Any:
        def one(old: Array, new: Array) -> Array:
            batch, zero = old.ndim - 4, jnp.zeros((), start.dtype)
            where = [zero] * old.ndim
            where[batch], where[-2] = jnp.asarray(b, start.dtype), start[b]
            return _update(old, jax.lax.dynamic_slice_in_dim(new, b, 1, batch), *where)
        return jax.tree.map(one, layers, new)

    def rows(layers: Any, new: Any, start: Array) -> Any:
        # One loop over rows for all layers: every compiler makes these writes in place, which it does not for a scatter.
        if start.shape[0] == 1:
            return row(0, layers, new, start)
        # That it is the number of rows no compiler knows: libtpu 0.0.42 fails on such a loop of a known length (it replaces
        # one of its results by another).
        count = start.shape[0] + jnp.minimum(start[0], 0)
        return jax.lax.fori_loop(0, count, lambda b, layers: row(b, layers, new, start), layers)

    new = jax.tree.map(prepare, layers, new)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return rows(layers, new, start)
    # Each device writes the rows that it holds: a loop over all rows would send each of them to every device.
    places = jax.tree.map(lambda leaf: sharding.partition(AXES[-leaf.ndim:], leaf.shape, mesh.shape), layers)
    batch = sharding.partition(("batch",), start.shape, mesh.shape)
    return jax.shard_map(rows, in_specs=(places, places, batch), out_specs=places, check_vma=False)(layers, new, start)


def append(cache: Cache, new: Any, count: Int[Array, "B"]) -> Cache:
    """Writes the T new tokens' keys and values at each row's length, of which the first `count` are to stay.

    All T are written: the cache must have T free slots from each row's length on.

    Args:
      new: `Output.kv` of a forward pass, KeyValue of [R, B, K, T, H].
      count: 0 to T per row; the rest is junk that the next write covers.

    Raises:
      ValueError: when a row lacks the slots, if lengths are known (outside `jax.jit`). Inside, that row's keys become
        NaN, and so do all its logits from then on.
    """
    width = jax.tree.leaves(new)[0].shape[-2]
    if not isinstance(cache.length, jax.core.Tracer):
        length = np.asarray(cache.length)
        over = np.flatnonzero(length + width > cache.slots)
        if len(over):
            raise ValueError(f"the cache is full: row {over[0]} holds {length[over[0]]} of {cache.slots} slots "
                             f"and {width} more were to be written; allocate more slots")
    return cache.replace(layers=_write(cache.layers, new, cache.length), length=cache.length + count)


def commit(cache: Cache, new: Any, path: Int[Array, "B D"], count: Int[Array, "B"]) -> Cache:
    """Writes the rows `path` of the new tokens' keys and values: what `append` does after a tree was verified.

    Args:
      path: indices into the T new tokens, the accepted ones first; beyond `count` anything within range.
    """
    def pick(rows):
        index = path.reshape((1,) * (rows.ndim - 4) + (path.shape[0], 1, path.shape[1], 1))
        return jnp.take_along_axis(rows, index, axis=-2)
    return append(cache, jax.tree.map(pick, new), count)


def filled(new: Any, slots: int, count: Int[Array, "B"], memory: Memory | None = None) -> Cache:
    """A cache of `slots` slots that starts with these keys and values: a prefill's, without an empty cache before it."""
    def pad(rows):
        widths = [(0, 0)] * rows.ndim
        widths[-2] = (0, slots - rows.shape[-2])
        return jnp.pad(rows, widths)
    return Cache(jax.tree.map(pad, new), count, memory)

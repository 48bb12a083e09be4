"""Products of rows with a matrix per group of rows: `product(rows, weight, sizes)`, for the experts of a mixture.

Rows lie sorted by group; `sizes` says how many each group has, and rows behind the last group give zeros. One function with
several ways to compute it, chosen by the platform that the program is compiled for:

- CPU: a loop over tiles of rows of one group, as many as there are: experts that no row goes to cost nothing. XLA's own
  `ragged_dot` multiplies every row with every group there.
- TPU: megablox, which comes with jax: the gradients of `ragged_dot` are products with all groups under the libtpu that jax 0.10
  and 0.11 pin, and so is the forward pass under that of 0.11.1. It knows no 8-bit weights: for those there is a kernel here,
  so that they are read as 8 bits, and only those of groups that have rows.
- else: `ragged_dot`.

The gradients are written here, so that they too cost what the rows cost. `dense`, every row with every group, is the definition
that the tests hold the others to.
"""

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.weight import Int8, Weight

TILE = 256  # rows at most in a tile on CPUs: the copy of a group's matrix is then a small part of the product
LANES = 128  # of a TPU's vectors
VMEM = 12 << 20  # bytes that a kernel's tiles, each there twice, may take: TPU compilers allow 16 MiB unless told otherwise


def groups_of(sizes: Int[Array, "E"], rows: int) -> Int[Array, "R"]:
    """The group of each of so many rows; E for those behind the last group."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows, dtype=sizes.dtype), side="right").astype(jnp.int32)


def dense(rows: Float[Array, "R D"], weight: Float[Array, "E D F"], sizes: Int[Array, "E"]) -> Float[Array, "R F"]:
    """Every row with every group's matrix, all but its own thrown away."""
    mine = jax.nn.one_hot(groups_of(sizes, rows.shape[0]), weight.shape[0], dtype=rows.dtype)
    return jnp.einsum("RE,RD,EDF->RF", mine, rows, weight.astype(rows.dtype))


def _zero_tail(rows: Float[Array, "R F"], sizes: Int[Array, "E"]) -> Float[Array, "R F"]:
    """Zeros behind the last group, where some ways of computing leave anything."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], rows, 0)


# On CPUs.

def _tile(rows: int, groups: int) -> int:
    """Rows in a tile: four times an even share, so that most groups that have rows need one tile."""
    return min(rows, TILE, 2 ** math.ceil(math.log2(max(4 * rows / groups, 1))))


def _tiles(rows: int, sizes: Int[Array, "E"], tile: int) -> tuple[Array, Array, Array, Array]:
    """How many tiles there are, and of each its group, its first row and the row behind its group's last one."""
    counts = -(-sizes // tile)
    ends, most = jnp.cumsum(counts), rows // tile + sizes.shape[0]
    index = jnp.arange(most, dtype=sizes.dtype)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), sizes.shape[0] - 1)
    stop = jnp.cumsum(sizes)
    start = (stop - sizes)[group] + (index - (ends - counts)[group]) * tile
    return ends[-1], group, start, stop[group]


def _at(weight: Any, group: Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group, 0, keepdims=False), weight)


def _looped(rows: Array, weight: Weight, sizes: Array, transposed: bool) -> Array:
    """`product` tile by tile. A tile that reaches into the next group writes there too: that group's own tiles come later."""
    tile = _tile(rows.shape[0], sizes.shape[0])
    count, group, start, _ = _tiles(rows.shape[0], sizes, tile)
    padded = jnp.concatenate([rows, jnp.zeros((tile, rows.shape[1]), rows.dtype)])
    width = weight.shape[1 if transposed else 2]

    def step(i: Array, out: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(padded, start[i], tile)
        product = jax.lax.dot_general(part, _plain(_at(weight, group[i]), rows.dtype), (((1,), (int(transposed),)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(out, product, start[i], 0)

    out = jax.lax.fori_loop(0, count, step, jnp.zeros((rows.shape[0] + tile, width), rows.dtype))
    return _zero_tail(out[:rows.shape[0]], sizes)


def each(one: Callable[[Any, Array, Array], Array], weights: Any, rows: Float[Array, "R D"],
         sizes: Int[Array, "E"]) -> Float[Array, "R D"]:
    """Any function of a group's weights, some of its rows and its number, tile by tile; for CPUs and without gradients.

    Args:
      weights: trees of arrays with a leading axis of groups.
    """
    tile = _tile(rows.shape[0], sizes.shape[0])
    count, group, start, _ = _tiles(rows.shape[0], sizes, tile)
    padded = jnp.concatenate([rows, jnp.zeros((tile, rows.shape[1]), rows.dtype)])

    def step(i: Array, out: Array) -> Array:
        made = one(_at(weights, group[i]), jax.lax.dynamic_slice_in_dim(padded, start[i], tile), group[i])
        return jax.lax.dynamic_update_slice_in_dim(out, made, start[i], 0)

    return _zero_tail(jax.lax.fori_loop(0, count, step, jnp.zeros_like(padded))[:rows.shape[0]], sizes)


def _plain(weight: Weight, dtype: Any) -> Array:
    return weight.values.astype(dtype) * weight.scale.astype(dtype) if isinstance(weight, Int8) else weight.astype(dtype)


def _looped_outer(rows: Array, given: Array, sizes: Array) -> Array:
    """`_outer` tile by tile."""
    tile = _tile(rows.shape[0], sizes.shape[0])
    count, group, start, stop = _tiles(rows.shape[0], sizes, tile)
    left, right = (jnp.concatenate([x, jnp.zeros((tile, x.shape[1]), x.dtype)]) for x in (rows, given))

    def step(i: Array, out: Array) -> Array:
        inside = (start[i] + jnp.arange(tile) < stop[i])[:, None]
        one, two = (jax.lax.dynamic_slice_in_dim(x, start[i], tile) for x in (left, right))
        add = jax.lax.dot_general(jnp.where(inside, one, 0), two, (((0,), (0,)), ((), ())))
        return jax.lax.dynamic_update_index_in_dim(out, _at(out, group[i]) + add, group[i], 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((sizes.shape[0], rows.shape[1], given.shape[1]), rows.dtype))


# On TPUs.

# A v5e's, which others are like in what matters here: FLOPs a byte. Rows that a matrix unit takes while it loads weights.
FLOPS, BYTES, DEEP = 1.97e14, 8.1e11, 128


def _sizes(size: int, most: int) -> list[int]:
    """Tiles for a dimension: whole where it is no longer than `most`, else multiples of 128 up to that."""
    return [size] if size <= LANES else [*([size] if size <= most else []), *range(LANES, min(most, size), LANES)]


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def active_tiles(rows: int, groups: int, tall: int) -> int:
    """Tiles of rows that are computed where the load is even: one that holds the edge of two groups is, for both."""
    return -(-rows // tall) + min(groups, rows) - 1


def _talls(rows: int) -> list[int]:
    return [tall for tall in (16, 32, 64, 128, 256, 512) if tall <= _padded(rows, 16)]


@functools.cache
def _tiling(rows: int, groups: int, inner: int, outer: int, nbytes: int) -> tuple[int, int, int]:
    """Megablox's tiles of rows, of what is summed and of what comes out, for numbers of so many bytes: those that take the
    least time by their FLOPs (with what pads tiles) and bytes.

    Rows are read again for every column of tiles; a group's matrix for every tile of rows, or once where what is summed is
    taken whole: tiles of rows that follow each other in a group then find it in place.
    """
    def seconds(tall: int, deep: int, wide: int) -> tuple[float, int]:
        tiles, whole = active_tiles(rows, groups, tall), deep >= inner
        products = 2 * tiles * max(tall, DEEP) * _padded(inner, deep) * _padded(outer, wide)
        read = tiles * tall * inner * -(-outer // wide) + (min(groups, rows) if whole else tiles) * inner * outer
        return max(products / FLOPS, nbytes * (read + rows * outer) / BYTES), -deep * wide

    def fits(tall: int, deep: int, wide: int) -> bool:
        return 2 * nbytes * (deep * (tall + wide) + tall * wide) + 4 * tall * wide <= VMEM

    every = itertools.product(_talls(rows), _sizes(inner, 4096), _sizes(outer, 2048))
    return min((tiles for tiles in every if fits(*tiles)), key=lambda tiles: seconds(*tiles))


@functools.cache
def _tiling_outer(rows: int, groups: int, inner: int, outer: int, nbytes: int) -> tuple[int, int, int]:
    """The same for the sums over a group's rows of products of two of them: these stay in place while rows pass, and the wider
    they are, the less often rows are read again."""
    def seconds(tall: int, deep: int, wide: int) -> tuple[float, int]:
        tiles = active_tiles(rows, groups, tall)
        products = 2 * tiles * max(tall, DEEP) * _padded(inner, deep) * _padded(outer, wide)
        read = tiles * tall * (inner * -(-outer // wide) + outer * -(-inner // deep))
        return max(products / FLOPS, nbytes * (read + groups * inner * outer) / BYTES), -deep * wide

    def fits(tall: int, deep: int, wide: int) -> bool:
        return 2 * nbytes * (tall * (deep + wide) + deep * wide) + 4 * deep * wide <= VMEM

    every = itertools.product(_talls(rows), _sizes(inner, 2048), _sizes(outer, 2048))
    return min((tiles for tiles in every if fits(*tiles)), key=lambda tiles: seconds(*tiles))


def _megablox(rows: Array, weight: Weight, sizes: Array, transposed: bool, interpret: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    count, (inner, outer) = rows.shape[0], rows.shape[1:] + (weight.shape[1 if transposed else 2],)
    tiling = _tiling(count, sizes.shape[0], inner, outer, rows.dtype.itemsize)
    padded = jnp.pad(rows, ((0, -count % tiling[0]), (0, 0)))
    out = gmm(padded, weight.astype(rows.dtype), sizes, rows.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
    return _zero_tail(out[:count], sizes)


@functools.cache
def _tiling_int8(rows: int, groups: int, inner: int, outer: int, nbytes: int) -> tuple[int, int, int]:
    """The same for `_int8`, whose weights become rows' numbers in the kernel. What is summed is whole, or divides evenly where
    some tile does: padding it would copy the weights."""
    deep = inner if inner <= 4096 else next((tile for tile in range(2048, 0, -LANES) if inner % tile == 0), 2048)

    def bytes_of(tall: int, wide: int) -> int:
        return 2 * deep * wide + 2 * nbytes * tall * (deep + wide) + (4 + nbytes) * deep * wide + 4 * tall * wide

    def seconds(tall: int, wide: int) -> tuple[float, int]:
        tiles = -(-rows // tall) + min(groups, rows)
        products = 2 * tiles * max(tall, DEEP) * inner * _padded(outer, wide)
        read = nbytes * tiles * tall * inner * -(-outer // wide) + min(groups, rows) * inner * outer
        return max(products / FLOPS, read / BYTES), -wide

    every = itertools.product(_talls(rows), _sizes(outer, 2048))
    tall, wide = min((tiles for tiles in every if bytes_of(*tiles) <= VMEM), key=lambda tiles: seconds(*tiles))
    return tall, deep, wide


def _int8(rows: Float[Array, "R D"], weight: Int8, sizes: Int[Array, "E"], interpret: bool = False) -> Float[Array, "R F"]:
    """`product` with 8-bit weights: a kernel over tiles of rows that each have one group, whose weights it takes as they are.

    Rows are laid out anew so that every group begins a tile. A group's weights are read once for all its tiles, which follow
    each other, where a whole column of them fits; those of groups without rows are not read.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    count, (groups, inner, outer) = rows.shape[0], weight.values.shape
    tall, deep, wide = _tiling_int8(count, groups, inner, outer, rows.dtype.itemsize)
    steps = -(-inner // deep)
    tiles = min(count, count // tall + groups)
    active, group, start, stop = (array[:tiles] if array.ndim else array for array in _tiles(count, sizes, tall))
    # Of tiles that are not there: the last one that is, so that nothing is read for them.
    group = jnp.where(jnp.arange(tiles) < active, group, group[jnp.maximum(active - 1, 0)])
    place = jnp.minimum(start[:, None] + jnp.arange(tall, dtype=start.dtype)[None], count - 1)
    laid = jnp.pad(jnp.take(rows, place.reshape(-1), axis=0), ((0, 0), (0, steps * deep - inner)))
    values = jnp.pad(weight.values, ((0, 0), (0, steps * deep - inner), (0, 0)))

    def there(tile: Any, step: Any, active: Any) -> Any:
        return jnp.where(tile < active[0], step, steps - 1)

    def kernel(group: Any, active: Any, x: Any, w: Any, scale: Any, out: Any, total: Any) -> None:
        step = pl.program_id(2)

        @pl.when(pl.program_id(1) < active[0])
        def _() -> None:
            part = jax.lax.dot_general(x[...], w[...].astype(x.dtype), (((1,), (0,)), ((), ())),
                                       preferred_element_type=jnp.float32)
            total[...] = jnp.where(step == 0, part, total[...] + part)

            @pl.when(step == steps - 1)
            def _() -> None:
                out[...] = (total[...] * scale[...].astype(jnp.float32)).astype(out.dtype)

    made = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((tiles * tall, outer), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(-(-outer // wide), tiles, steps),
            in_specs=[pl.BlockSpec((tall, deep), lambda n, t, k, group, active: (t, there(t, k, active))),
                      pl.BlockSpec((None, deep, wide), lambda n, t, k, group, active: (group[t], there(t, k, active), n)),
                      pl.BlockSpec((None, 1, wide), lambda n, t, k, group, active: (group[t], 0, n))],
            out_specs=pl.BlockSpec((tall, wide), lambda n, t, k, group, active: (t, n)),
            scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * min(tiles, active_tiles(count, groups, tall)) * tall * inner * outer,
                                      transcendentals=0,
                                      bytes_accessed=min(groups, count) * inner * outer + 2 * tiles * tall * (inner + outer)),
        interpret=interpret)(group, active[None], laid, values, weight.scale)
    first = jnp.cumsum(-(-sizes // tall)) - -(-sizes // tall)
    mine = jnp.minimum(groups_of(sizes, count), groups - 1)
    where = first[mine] * tall + jnp.arange(count, dtype=sizes.dtype) - (jnp.cumsum(sizes) - sizes)[mine]
    return _zero_tail(jnp.take(made, where, axis=0, mode="clip"), sizes)


def _on_tpu(rows: Array, weight: Weight, sizes: Array, transposed: bool, interpret: bool = False) -> Array:
    if isinstance(weight, Int8):
        return _int8(rows, weight, sizes, interpret)
    return _megablox(rows, weight, sizes, transposed, interpret)


def _megablox_outer(rows: Array, given: Array, sizes: Array, interpret: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = _tiling_outer(rows.shape[0], sizes.shape[0], rows.shape[1], given.shape[1], rows.dtype.itemsize)
    left, right = (jnp.pad(x, ((0, -x.shape[0] % tiling[0]), (0, 0))) for x in (rows, given))
    with jax.numpy_dtype_promotion("standard"):  # its bookkeeping mixes booleans and integers
        return tgmm(left.T, right, sizes, rows.dtype, tiling, interpret=interpret)


# Elsewhere.

def _ragged(rows: Array, weight: Weight, sizes: Array, transposed: bool) -> Array:
    plain = _plain(weight, rows.dtype)
    return _zero_tail(jax.lax.ragged_dot(rows, plain.swapaxes(1, 2) if transposed else plain, sizes), sizes)


def _ragged_outer(rows: Array, given: Array, sizes: Array) -> Array:
    dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(rows, given, sizes, dimensions)


def _by_platform(*args: Array, cpu: Callable[..., Array], tpu: Callable[..., Array], default: Callable[..., Array]) -> Array:
    return jax.lax.platform_dependent(*args, cpu=cpu, tpu=tpu, default=default)


def _product(rows: Array, weight: Weight, sizes: Array, transposed: bool) -> Array:
    return _by_platform(rows, weight, sizes, cpu=partial(_looped, transposed=transposed),
                        tpu=partial(_on_tpu, transposed=transposed), default=partial(_ragged, transposed=transposed))


@jax.custom_vjp
def product(rows: Float[Array, "R D"], weight: Weight, sizes: Int[Array, "E"]) -> Float[Array, "R F"]:
    """Each row times its group's matrix, in the rows' dtype.

    Args:
      rows: sorted by group.
      weight: [E, D, F]; an `Int8` has one scale per group and column.
      sizes: int32, how many rows each group has; together at most R. Rows behind them give zeros.

    Example:
      >>> rows, weight = jnp.ones((3, 2)), jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 1))
      >>> product(rows, weight, jnp.array([1, 0, 2]))[:, 0].tolist()
      [0.0, 4.0, 4.0]
    """
    return _product(rows, weight, sizes, False)


def _forward(rows, weight, sizes):
    return _product(rows, weight, sizes, False), (rows, weight, sizes)


def _backward(kept, given):
    rows, weight, sizes = kept
    none = np.zeros(sizes.shape, jax.dtypes.float0)
    if isinstance(weight, Int8):
        # Through frozen 8-bit experts gradients pass; they get none.
        nothing = Int8(np.zeros(weight.values.shape, jax.dtypes.float0), jnp.zeros_like(weight.scale))
        return _product(given, _plain(weight, given.dtype), sizes, True), nothing, none
    outer = _by_platform(rows, given, sizes, cpu=_looped_outer, tpu=_megablox_outer, default=_ragged_outer)
    return _product(given, weight, sizes, True), outer.astype(weight.dtype), none


product.defvjp(_forward, _backward)

"""Every way to multiply rows with their group's matrix, forward and gradient, against the definition."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import grouped
from jaxlm.weight import Int8, dense, quantize
from tests import tiny

D, F = 6, 10
SHAPES = {"several rows each": (24, 4), "fewer rows than groups": (3, 8), "several tiles": (2 * grouped.TILE + 7, 2)}


def forced(monkeypatch, backend):
    """Has `product` computed as on some platform; Pallas kernels are interpreted."""
    def pick(*args, **ways):
        way = ways[backend]
        return (partial(way, interpret=True) if backend == "tpu" else way)(*args)
    monkeypatch.setattr(grouped, "_by_platform", pick)


@pytest.fixture(params=["cpu", "tpu", "default"])
def backend(request, monkeypatch):
    forced(monkeypatch, request.param)


def arrays(rows, groups):
    rng = np.random.default_rng(rows)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((rows, D), (groups, D, F), (rows, F)))


def with_gradients(product):
    def run(rows, weight, given, sizes):
        out, back = jax.vjp(lambda rows, weight: product(rows, weight, sizes), rows, weight)
        return out, *back(given)
    return tiny.jit(run)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients(backend, shape):
    rows, groups = SHAPES[shape]
    given, want = with_gradients(grouped.product), with_gradients(grouped.dense)
    values = arrays(rows, groups)

    @hypothesis.settings(max_examples=12)
    @hypothesis.given(st.lists(st.integers(0, rows), min_size=groups - 1, max_size=groups - 1), st.integers(0, rows))
    @hypothesis.example([0] * (groups - 1), rows)  # all in the last group
    @hypothesis.example([rows] * (groups - 1), rows)  # all in the first
    @hypothesis.example([0] * (groups - 1), 0)  # none at all
    @hypothesis.example([1] * (groups - 1), rows - 1)  # rows behind the last group
    def check(cuts, stop):
        sizes = np.diff([0, *sorted(min(cut, stop) for cut in cuts), stop]).astype(np.int32)
        for ours, theirs in zip(given(*values, sizes), want(*values, sizes), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4 if rows > 100 else 2e-5)

    check()


def test_eight_bits(backend):
    """As the matrix that they stand for; that one is as near the true one as its scales allow; inputs have gradients."""
    rows, weight, given = arrays(*SHAPES["several rows each"])
    sizes, small = jnp.array([5, 0, 11, 4], jnp.int32), quantize(weight, (1,))
    assert small.scale.shape == (4, 1, F)
    out, back = jax.vjp(lambda rows: grouped.product(rows, small, sizes), rows)
    want, back_dense = jax.vjp(lambda rows: grouped.product(rows, dense(small), sizes), rows)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(back(given)[0], back_dense(given)[0], atol=2e-5)
    step = np.asarray(small.scale)[np.minimum(grouped.groups_of(sizes, 24), 3), 0]
    error = np.abs(np.asarray(out) - np.asarray(grouped.dense(rows, weight, sizes)))
    assert np.all(error <= np.abs(np.asarray(rows)).sum(1, keepdims=True) * step / 2 + 1e-5) and error.max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_of_any_sizes(backend, shape):
    rows, groups = SHAPES[shape]
    x, weight, _ = arrays(rows, groups)
    small = quantize(weight, (1,))
    product, definition = tiny.jit(lambda *a: grouped.product(*a)), tiny.jit(grouped.dense)
    for sizes in ([0] * groups, [rows] + [0] * (groups - 1), [0] * (groups - 1) + [rows],
                  np.random.default_rng(0).multinomial(rows - 1, [1 / groups] * groups)):
        sizes = np.asarray(sizes, np.int32)
        np.testing.assert_allclose(product(x, small, sizes), definition(x, dense(small), sizes), atol=1e-4)


def test_eight_bits_get_no_gradient():
    rows, weight, _ = arrays(*SHAPES["several rows each"])
    sizes, small = jnp.array([5, 0, 11, 4], jnp.int32), quantize(weight, (1,))
    scale = jax.grad(lambda scale: jnp.sum(grouped.product(rows, Int8(small.values, scale), sizes)))(small.scale)
    assert not np.any(scale)


def test_computes_in_the_rows_dtype(backend):
    rows, weight, given = arrays(*SHAPES["several rows each"])
    sizes = jnp.array([5, 0, 11, 4], jnp.int32)
    out, back = jax.vjp(lambda rows, weight: grouped.product(rows, weight, sizes), rows.astype(jnp.bfloat16), weight)
    assert out.dtype == jnp.bfloat16 and [one.dtype for one in back(given.astype(jnp.bfloat16))] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(out.astype(jnp.float32), grouped.dense(rows, weight, sizes), atol=0.15)


def test_experts_without_rows_cost_nothing_on_a_cpu():
    """The loop goes over tiles that have rows: as many steps as groups that are hit."""
    rows, groups = 4, 16
    count, group, start, stop = grouped._tiles(rows, jnp.zeros(groups, jnp.int32).at[jnp.array([3, 9])].set(jnp.array([1, 3])),
                                               grouped._tile(rows, groups))
    assert int(count) == 4  # tiles of one row: 1 and 3
    assert group[:4].tolist() == [3, 9, 9, 9] and start[:4].tolist() == [0, 1, 2, 3] and stop[:4].tolist() == [1, 4, 4, 4]


@pytest.mark.parametrize("rows, groups, inner, outer", [(64, 4, 16, 24), (8192, 8, 4096, 14336), (65536, 128, 2048, 768),
                                                        (1, 8, 128, 128), (4096, 8, 6144, 16384)])
@pytest.mark.parametrize("nbytes", [2, 4])
def test_tiles_of_a_tpu_fit_its_memory(rows, groups, inner, outer, nbytes):
    tall, deep, wide = grouped._tiling(rows, groups, inner, outer, nbytes)
    assert 2 * nbytes * (deep * (tall + wide) + tall * wide) + 4 * tall * wide <= grouped.VMEM
    assert tall <= -(-rows // 16) * 16 and tall % 16 == 0 and (wide % grouped.LANES == 0 or wide == outer)


@pytest.mark.parametrize("rows, groups, inner, outer", [
    (65536, 8, 4096, 14336), (65536, 8, 14336, 4096), (262144, 128, 2048, 768), (262144, 32, 2880, 2880),
    (262144, 64, 2048, 1408)])
def test_tiles_of_a_tpu_leave_it_bound_by_products(rows, groups, inner, outer):
    """Those of bfloat16 rows, as many as a training step has: by v5e's FLOPs and bytes, and within 1.15 of the FLOPs there
    have to be."""
    tall, deep, wide = grouped._tiling(rows, groups, inner, outer, 2)
    tiles = grouped.active_tiles(rows, groups, tall)
    flops = 2 * tiles * tall * -(-inner // deep) * deep * -(-outer // wide) * wide
    read = rows * inner * -(-outer // wide) + (groups if deep >= inner else tiles) * inner * outer + rows * outer
    assert flops <= 1.15 * 2 * rows * inner * outer
    assert 2 * read / 8.1e11 <= flops / 1.97e14

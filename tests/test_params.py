import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model, params
from jaxlm.params import Param
from tests import tiny

CFG = tiny.decoder([tiny.block(bias=True)] * 3)
SPEC = model.spec(CFG)


@functools.cache
def init(cfg, seed, dtype=jnp.float32):
    return tiny.jit(lambda key: params.init(model.spec(cfg), key, dtype))(jax.random.key(seed))


def test_init_fills_the_spec():
    tree = init(CFG, 0)
    assert {path: leaf.shape for path, leaf in params.paths(tree).items()} == {
        path: param.shape for path, param in params.paths(SPEC).items()}
    q = "decoder/blocks/0/0/attention/q"
    assert not np.array_equal(params.paths(tree)[q], params.paths(init(CFG, 1))[q])
    assert {leaf.dtype for leaf in jax.tree.leaves(init(CFG, 0, jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}


def test_a_leaf_more_changes_no_other():
    without, with_bias = (params.paths(init(tiny.decoder([tiny.block(bias=bias)] * 3), 0)) for bias in (False, True))
    assert len(with_bias) > len(without)
    for path, leaf in without.items():
        np.testing.assert_array_equal(leaf, with_bias[path])


def test_layers_and_leaves_start_apart():
    block = init(CFG, 0)["decoder"]["blocks"]["0"]["0"]
    q, gate, up = block["attention"]["q"], block["feedforward"]["gate"], block["feedforward"]["up"]
    for one, other in ((q[0], q[1]), (gate, up)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("shape, inputs, deviation", [((256, 8, 16), (0,), 1 / 16), ((8, 8, 200), (0, 1), 1 / 8)])
def test_fan_in(shape, inputs, deviation, stacked):
    param = Param(shape, (None,) * 3, inputs=inputs)
    param = param.stacked(4) if stacked else param
    values = param.init(param, jax.random.key(0), jnp.float32)
    assert values.shape == param.shape
    np.testing.assert_allclose(np.std(values), deviation, rtol=0.03)
    assert np.abs(values).max() <= 2 * deviation / 0.8796 * 1.0001


def test_other_initialisers():
    param = Param((500,), (None,))
    np.testing.assert_allclose(np.std(params.normal(0.02)(param, jax.random.key(0), jnp.float32)), 0.02, rtol=0.1)
    assert not np.any(params.zeros(param, jax.random.key(0), jnp.float32))
    assert np.all(params.ones(param, jax.random.key(0), jnp.bfloat16) == 1)


def test_stacked_names_its_axis():
    param = Param((4, 6), ("embed", "mlp"), inputs=(0,)).stacked(3)
    assert (param.shape, param.axes, param.inputs) == ((3, 4, 6), ("layers", "embed", "mlp"), (1,))


def test_abstract_and_count():
    tree = params.abstract(SPEC, jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(tree))
    made = init(CFG, 0)
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, made)
    # Counted by hand: q, o [16, 4, 8]; k, v [16, 2, 8]; their biases; gate, up, down [16, 24]; norms; embedding.
    layer = 2 * 512 + 2 * 256 + 32 + 16 + 16 + 3 * 16 * 24 + 2 * 16
    want = 3 * layer + 19 * 16 + 16
    assert params.count(SPEC) == params.count(tree) == params.count(made) == want
    assert want == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))


def test_abstract_carries_shardings():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    tree = params.abstract(SPEC, shardings=jax.tree.map(lambda _: sharding, SPEC))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(tree))


def test_paths_name_a_leaf():
    names = list(params.paths(SPEC))
    assert names[:2] == ["decoder/blocks/0/0/attention/k", "decoder/blocks/0/0/attention/k_bias"]
    assert names[-2:] == ["decoder/embedding/tokens", "decoder/norm/scale"]
    assert list(params.paths({"a": (1, 2)})) == ["a/0", "a/1"]
    assert list(params.paths({"a": (1, 2)}, is_leaf=lambda leaf: isinstance(leaf, tuple))) == ["a"]


def test_select_keeps_order_and_takes_each_once():
    found = params.select(SPEC, "*/k_bias", "*/attention/k*")
    assert [path.rsplit("/", 1)[1] for path in found] == ["k", "k_bias"]


def test_select_names_a_pattern_without_match():
    with pytest.raises(ValueError, match=r"no path matches 'encoder/\*'; paths are like decoder/blocks/0/0/attention/k"):
        params.select(SPEC, "*/q", "encoder/*")


def test_a_param_needs_an_axis_per_dimension():
    with pytest.raises(ValueError, match=r"shape \(3, 4\), axes \('embed',\)"):
        Param((3, 4), ("embed",))

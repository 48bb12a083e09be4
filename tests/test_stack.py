import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model, params, stack
from jaxlm.config import Rope
from jaxlm.layers.mask import describe
from tests import oracle, tiny

STACK = tiny.GROUPS.stack
X = np.random.default_rng(0).normal(size=(2, 5, 16))
WEIGHTS = tiny.weights(stack.spec(STACK, 16))


def run(weights, taps=(), remat=None, cfg=STACK):
    attentions = [one.attention for one in cfg.blocks()]
    return tiny.jit(lambda p, x: stack.apply(p, cfg, x, describe(attentions, 2, 5), None, taps, remat)[:3])(
        weights, jnp.asarray(X, jnp.float32))


@pytest.mark.parametrize("unrolled", [False, True], ids=["scan", "unrolled"])
def test_layers_run_in_order(unrolled):
    weights = stack.unstack(WEIGHTS, STACK) if unrolled else WEIGHTS
    states = oracle.layers(WEIGHTS, STACK, X, np.broadcast_to(np.arange(5), (2, 5)))
    x, kv, taps = run(weights, (0, 1, 3, 6, 8, 3))
    np.testing.assert_allclose(x, states[-1], atol=5e-5)
    for tap, got in zip((0, 1, 3, 6, 8, 3), taps, strict=True):
        np.testing.assert_allclose(got, states[tap], atol=5e-5)
    shapes = [[jax.tree.map(lambda leaf: leaf.shape, one.k) for one in group] for group in kv]
    if unrolled:
        assert shapes == [[((2, 2, 5, 8),) * 2], [((2, 1, 5, 4),), ((2, 2, 5, 8),)], [((2, 2, 5, 8),) * 2] * 2]
    else:
        assert shapes == [[(2, 2, 2, 5, 8)], [(1, 2, 1, 5, 4), (1, 2, 2, 5, 8)], [(2, 2, 2, 5, 8)] * 2]


def test_a_prefix_of_layers_is_a_slice():
    """Of the weights, of the new keys and values, and of the hidden states."""
    cfg = tiny.decoder([tiny.block(window=2), tiny.block(position=None)] * 3).stack
    weights = tiny.weights(stack.spec(cfg, 16))
    x, kv, taps = run(weights, range(7), cfg=cfg)
    np.testing.assert_array_equal(taps[6], x)
    for repeats in (1, 2):
        prefix = tiny.decoder([tiny.block(window=2), tiny.block(position=None)] * repeats).stack
        assert [len(group.pattern) for group in prefix.groups] == [2]
        sliced = jax.tree.map(lambda leaf, n=repeats: leaf[:n], weights)
        got, kv_prefix, _ = run(sliced, cfg=prefix)
        np.testing.assert_allclose(got, taps[2 * repeats], atol=1e-5)
        np.testing.assert_allclose(kv_prefix[0][1].v, kv[0][1].v[:repeats], atol=1e-5)
        uncut, kv_prefix, _ = run(weights, cfg=prefix)
        np.testing.assert_array_equal(uncut, got)
        assert kv_prefix[0][1].v.shape[0] == repeats
        with pytest.raises(ValueError, match=f"repeated 3 times, there are weights for {repeats}"):
            run(sliced, cfg=cfg)


@pytest.mark.parametrize("unrolled", [False, True], ids=["scan", "unrolled"])
def test_remat_changes_no_gradient(unrolled):
    """With two kinds of rotation among the layers."""
    cfg = tiny.decoder([tiny.block(position=Rope(base)) for base in (10.0, 1000.0)])
    weights = tiny.weights(model.spec(cfg))
    weights = model.unstack(weights, cfg) if unrolled else weights

    def gradient(remat):
        def loss(params):
            return jnp.sum(jnp.sin(model.forward(params, cfg, tiny.tokens(2, 5), remat=remat).logits))
        return jax.grad(loss)

    plain, recomputed = gradient(None), gradient(jax.checkpoint_policies.nothing_saveable)
    assert "remat" not in str(jax.make_jaxpr(plain)(weights)) and "remat" in str(jax.make_jaxpr(recomputed)(weights))
    for got, want in zip(jax.tree.leaves(tiny.jit(recomputed)(weights)), jax.tree.leaves(tiny.jit(plain)(weights)),
                         strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_unstacking_copies_nothing_on_a_cpu():
    """Every layer of a weight whose layers are a multiple of 64 bytes is a view of the stacked one."""
    cfg = tiny.decoder([tiny.block()] * 3)
    weights = jax.block_until_ready(tiny.weights(model.spec(cfg)))
    unrolled = model.unstack(weights, cfg)
    aliased = 0
    for path, leaf in params.paths(weights["decoder"]["blocks"]["0"]["0"]).items():
        one = leaf.nbytes // 3
        for repeat in range(3):
            view = params.paths(unrolled["decoder"]["blocks"]["0"]["0"][repeat])[path]
            np.testing.assert_array_equal(view, leaf[repeat])
            if one % 64 == 0 and leaf.unsafe_buffer_pointer() % 64 == 0:
                assert view.unsafe_buffer_pointer() == leaf.unsafe_buffer_pointer() + repeat * one
                aliased += 1
    assert aliased >= 12
    assert unrolled["decoder"]["embedding"]["tokens"] is weights["decoder"]["embedding"]["tokens"]


def test_views_outlive_the_stacked_weights():
    cfg = tiny.decoder([tiny.block()] * 3)
    weights = tiny.weights(model.spec(cfg))
    want = np.array(weights["decoder"]["blocks"]["0"]["0"]["attention"]["q"])
    unrolled = model.unstack(weights, cfg)
    del weights
    junk = [jnp.full(want.shape, 7.0) + i for i in range(8)]
    for repeat in range(3):
        np.testing.assert_array_equal(unrolled["decoder"]["blocks"]["0"]["0"][repeat]["attention"]["q"], want[repeat])
    assert len(junk) == 8


def test_unstack_of_traced_and_of_split_weights():
    cfg = tiny.decoder([tiny.block()] * 2)
    weights = tiny.weights(model.spec(cfg))
    shapes = jax.eval_shape(lambda w: model.unstack(w, cfg), weights)["decoder"]["blocks"]["0"]["0"]
    assert [one["attention"]["q"].shape for one in shapes] == [(16, 4, 8)] * 2
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("model",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    q = weights["decoder"]["blocks"]["0"]["0"]["attention"]["q"]
    weights["decoder"]["blocks"]["0"]["0"]["attention"]["q"] = jax.device_put(q, split)
    got = model.unstack(weights, cfg)["decoder"]["blocks"]["0"]["0"][1]["attention"]["q"]
    np.testing.assert_array_equal(got, q[1])
    assert len(got.devices()) == 2

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import KeyValue
from jaxlm.config import Alibi, LayerNorm, QkNorm, RmsNorm, Rope
from jaxlm.layers import attention
from jaxlm.layers.mask import describe
from tests import oracle, tiny

SLOPES = (0.5, 0.25, 0.125, 0.0625)
OPTIONS = {
    "plain": {}, "multi-head": {"kv_heads": 4}, "multi-query": {"kv_heads": 1}, "partial": {"position": Rope(width=4)},
    "neighbours": {"position": Rope(interleaved=True)}, "none": {"position": None}, "alibi": {"position": Alibi(SLOPES)},
    "rounded alibi": {"position": Alibi((0.51, 0.2499, 0.13, 0.0601), rounded=True)},
    "both ways": {"causal": False}, "both ways, alibi": {"causal": False, "position": Alibi(SLOPES)},
    "window": {"window": 3}, "scale": {"scale": 1.3}, "softcap": {"softcap": 0.7, "scale": 2.0}, "clip": {"clip": 0.4},
    "biases": {"bias": True, "out_bias": True}, "clip and bias": {"clip": 0.4, "bias": True},
    "norm per head": {"qk_norm": QkNorm(RmsNorm())}, "norm over heads": {"qk_norm": QkNorm(LayerNorm(), per_head=False)},
    "clip and norm": {"clip": 0.4, "qk_norm": QkNorm(RmsNorm(offset=1.0))}, "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 2, "softcap": 1.0}, "width": {"head_width": 6, "heads": 2},
}
X = np.random.default_rng(0).normal(size=(2, 6, 16))
POSITIONS = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]], np.int32)


def both(cfg, positions=POSITIONS, x=X, **known):
    """attention.apply and the oracle's, where there are tokens."""
    params = tiny.weights(attention.spec(cfg, 16))

    @tiny.jit
    def run(params, x):
        return attention.apply(params, cfg, x, describe([cfg], *x.shape[:2], jnp.asarray(positions), **known), None)[0]

    got = run(params, jnp.asarray(x, jnp.float32))
    want = oracle.attention(params, cfg, x, positions, known.get("segments"), known.get("mask"))
    valid = positions >= 0
    return np.asarray(got)[valid], want[valid]


@pytest.mark.parametrize("name", OPTIONS)
def test_attention(name):
    got, want = both(tiny.attention(**OPTIONS[name]))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("fields", [{}, {"window": 2}, {"position": Alibi(SLOPES)}], ids=str)
def test_a_tree(fields):
    mask = np.array([[parent == node or parent in ancestors for parent in range(6)] for node, ancestors in enumerate(
        [(), (0,), (0,), (0, 1), (0, 1), (0, 2)])])[None]
    positions = np.array([[4, 5, 5, 6, 6, 6], [0, 1, 1, 2, 2, -1]], np.int32)
    got, want = both(tiny.attention(**fields), positions, mask=np.repeat(mask, 2, axis=0))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_segments():
    got, want = both(tiny.attention(), np.array([[0, 1, 0, 1, 2, -1], [0, 1, 2, 3, 4, 5]], np.int32),
                     segments=np.array([[1, 1, 2, 2, 2, 0], [4, 4, 4, 4, 4, 4]], np.int32))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_sinks_take_a_share_of_the_softmax():
    """With a huge sink nothing is left for the values; with a tiny one all is as without sinks."""
    cfg = tiny.attention(sinks=True)
    params, known = tiny.weights(attention.spec(cfg, 16)), describe([cfg], 2, 6)
    x = jnp.asarray(X, jnp.float32)

    @tiny.jit
    def run(sink):
        return attention.apply(params | {"sinks": jnp.full(4, sink)}, cfg, x, known, None)[0]

    without = tiny.jit(lambda: attention.apply(params, dataclasses.replace(cfg, sinks=False), x, known, None)[0])()
    np.testing.assert_allclose(run(200.0), np.zeros((2, 6, 16)), atol=1e-6)
    np.testing.assert_allclose(run(-200.0), without, atol=1e-6)


def test_new_keys_and_values_are_what_the_cache_holds():
    """Rotated, biased and clipped keys; a cache made of them gives the next tokens the same output."""
    cfg = tiny.attention(bias=True, clip=0.8, qk_norm=QkNorm(RmsNorm()))
    params, x = tiny.weights(attention.spec(cfg, 16)), jnp.asarray(X, jnp.float32)
    want, kv = tiny.jit(lambda x: attention.apply(params, cfg, x, describe([cfg], 2, 6), None))(x)
    assert kv.k.shape == kv.v.shape == (2, 2, 6, 8)
    cached = KeyValue(kv.k.at[:, :, 4:].set(99.0), kv.v.at[:, :, 4:].set(99.0))
    got, last = tiny.jit(lambda x, length: attention.apply(
        params, cfg, x, describe([cfg], 2, 2, length=length), cached))(x[:, 4:], jnp.array([4, 4]))
    np.testing.assert_allclose(got, want[:, 4:], atol=1e-5)
    np.testing.assert_allclose(last.k, kv.k[:, :, 4:], atol=1e-5)
    assert np.abs(kv.v).max() <= 0.8 + 1e-6


@pytest.mark.parametrize("length", [10, 12, 3, 43])
@pytest.mark.parametrize("kind", ["plain", "cache", "segments", "padding", "positions", "bidirectional", "mask"])
def test_runs_of_queries_change_nothing(monkeypatch, length, kind):
    cfg = tiny.attention(window=6, sinks=True, position=Alibi(SLOPES), causal=kind != "bidirectional")
    params = tiny.weights(attention.spec(cfg, 16))
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, length, 16)), jnp.float32)
    known, cached = {}, None
    if kind == "cache":
        known = {"length": jnp.array([4, 7])}
        cached = KeyValue(*jnp.asarray(random.normal(size=(2, 2, 2, 9, 8)), jnp.float32))
    elif kind == "segments":
        known = {"segments": jnp.asarray(np.sort(random.integers(0, 3, (2, length)), axis=1))}
    elif kind == "padding":
        known = {"lengths": jnp.array([length, 2])}
    elif kind == "positions":  # in any order, so that earlier tokens see later ones
        known = {"positions": jnp.asarray(random.permuted(np.tile(np.arange(length), (2, 1)), axis=1).astype(np.int32))}
    elif kind == "mask":
        known = {"mask": jnp.asarray(np.tri(length, dtype=bool) | (random.random((1, length, length)) < 0.3))}

    def run():
        return tiny.jit(lambda x: attention.apply(params, cfg, x, describe([cfg], 2, length, **known), cached)[0])(x)

    want = run()
    monkeypatch.setattr(attention, "QUERIES", 5)
    monkeypatch.setattr(attention, "SPANS", 4)  # 43 queries: spans of 15 with several runs
    text = str(jax.make_jaxpr(lambda x: attention.apply(params, cfg, x, describe([cfg], 2, length, **known), cached))(x))
    assert f"f32[2,2,2,{length},{length}]" not in text or length <= 5
    valid = np.asarray(describe([cfg], 2, length, **known).positions) >= 0
    np.testing.assert_allclose(np.asarray(run())[valid], np.asarray(want)[valid], atol=1e-5)


def shapes(length, **known):
    """The jaxpr of attention over tokens of this length, as text."""
    cfg = tiny.attention()
    params = tiny.weights(attention.spec(cfg, 16))
    return str(jax.make_jaxpr(lambda x: attention.apply(params, cfg, x, describe([cfg], 1, length, **known), None)[0])(
        jax.ShapeDtypeStruct((1, length, 16), jnp.float32)))


def test_long_inputs_never_hold_all_scores():
    length = 4 * attention.QUERIES
    text = shapes(length, mask=np.ones((1, length, length), bool))
    assert f"f32[1,2,2,{attention.QUERIES},{length}]" in text and f"f32[1,2,2,{length},{length}]" not in text


def test_causal_queries_never_meet_keys_behind_their_run():
    size, length = attention.QUERIES, 3 * attention.QUERIES + 7
    for known in ({}, {"lengths": jnp.array([9])}, {"segments": jnp.ones((1, length), jnp.int32)}):
        text = shapes(length, **known)
        assert all(f"f32[1,2,2,{size},{n * size}]" in text for n in (1, 2, 3)) and f"f32[1,2,2,7,{length}]" in text
        assert f"f32[1,2,2,{size},{length}]" not in text
    # Positions that are given may be in any order.
    assert f"f32[1,2,2,{size},{length}]" in shapes(length, positions=jnp.zeros((1, length), jnp.int32))


def test_padding_gets_no_nan():
    cfg = tiny.attention()
    params = tiny.weights(attention.spec(cfg, 16))

    def run(params, x):
        out, kv = attention.apply(params, cfg, x, describe([cfg], 2, 6, jnp.full((2, 6), -1)), None)
        return out.sum(), kv

    (out, kv), gradient = tiny.jit(jax.value_and_grad(run, has_aux=True))(params, jnp.asarray(X, jnp.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, kv, gradient)))

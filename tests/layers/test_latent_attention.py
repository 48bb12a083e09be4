import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import adapt, config, model, weight
from jaxlm.cache import KeyValue
from jaxlm.config import LayerNorm, Rope
from jaxlm.layers import attention, latent_attention
from jaxlm.layers.mask import describe
from tests import oracle, tiny
from tests.layers.test_attention import POSITIONS, X

OPTIONS = {
    "plain": {}, "queries too": {"query_latent": 10}, "biases": {"query_latent": 10, "bias": True, "out_bias": True},
    "window, halves": {"window": 3, "position": Rope(100.0), "bias": True}, "both ways": {"causal": False, "scale": 0.9},
    "norm": {"norm": LayerNorm(1e-3), "query_latent": 7}, "wide": {"key_width": 20, "value_width": 24, "latent": 3}}


def setting(**fields):
    cfg = tiny.latent(**fields).attention
    return cfg, tiny.weights(latent_attention.spec(cfg, 16))


@pytest.fixture(params=[False, True], ids=["expanded", "absorbed"])
def form(request, monkeypatch):
    monkeypatch.setattr(latent_attention, "absorbed", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("name", OPTIONS)
def test_both_forms(form, name):
    cfg, params = setting(**OPTIONS[name])
    known = describe([cfg], 2, 6, jnp.asarray(POSITIONS))
    got, _ = tiny.jit(lambda p, x: latent_attention.apply(p, cfg, x, known, None))(params, jnp.asarray(X, jnp.float32))
    want = oracle.latent_attention(params, cfg, X, POSITIONS)
    np.testing.assert_allclose(np.asarray(got)[POSITIONS >= 0], want[POSITIONS >= 0], atol=1e-5)


def test_what_the_cache_holds(form):
    """A normalised latent and a turned key, one for all heads; a cache made of them gives the next tokens the same output."""
    cfg, params = setting(query_latent=10, window=4)
    x = jnp.asarray(X, jnp.float32)
    want, kv = tiny.jit(lambda x: latent_attention.apply(params, cfg, x, describe([cfg], 2, 6), None))(x)
    assert kv.k.shape == (2, 1, 6, 16) and kv.v is None
    short = oracle.norm(params["latent_norm"], cfg.norm, X @ np.asarray(params["latent"], np.float64)[:, :12])
    np.testing.assert_allclose(kv.k[:, 0, :, :12], short, atol=1e-5)
    cached = KeyValue(kv.k.at[:, :, 4:].set(99.0), None)
    got, last = tiny.jit(lambda x, length: latent_attention.apply(
        params, cfg, x, describe([cfg], 2, 2, length=length), cached))(x[:, 4:], jnp.array([4, 4]))
    np.testing.assert_allclose(got, want[:, 4:], atol=1e-5)
    np.testing.assert_allclose(last.k, kv.k[:, :, 4:], atol=1e-5)


def test_a_tree(form):
    """Of eight new nodes over a cache, in runs of queries."""
    cfg, params = setting()
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(1, 8, 16)), jnp.float32)
    mask = np.tri(8, dtype=bool) & (random.random((8, 8)) < 0.5) | np.eye(8, dtype=bool)
    positions = 4 + mask.sum(-1).astype(np.int32)[None] - 1
    cached = KeyValue(jnp.asarray(random.normal(size=(1, 1, 7, 16)), jnp.float32), None)
    known = describe([cfg], 1, 8, jnp.asarray(positions), mask=jnp.asarray(mask)[None], length=jnp.array([4]))
    got, kv = tiny.jit(lambda x: latent_attention.apply(params, cfg, x, known, cached))(x)
    # As one softmax over the cached rows and its ancestors' for each node and head.
    rows = np.concatenate([cached.k[0, 0, :4], kv.k[0, 0]]).astype(np.float64)
    latent, turned = rows[:, :12], rows[:, 12:]
    for node in range(8):
        seen = [0, 1, 2, 3, *(4 + np.flatnonzero(mask[node]))]
        want = np.zeros(16)
        for head in range(4):
            q = np.asarray(x[0, node] @ params["q"][:, head], np.float64)
            q = np.append(q[:6], oracle.rotate(cfg.position, 4, q[6:], positions[0, node], 0))
            k = np.concatenate([latent @ np.asarray(params["k"][head]), turned], axis=1)
            shares = np.exp(k[seen] @ q * 10**-0.5)
            want += shares / shares.sum() @ latent[seen] @ np.asarray(params["v"][head]) @ np.asarray(params["o"][head])
        np.testing.assert_allclose(got[0, node], want, atol=1e-5)


def test_gradients_of_both_forms_agree(monkeypatch):
    """And those of long inputs, in runs of queries."""
    cfg, params = setting(query_latent=10, bias=True)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9, 16)), jnp.float32)

    def gradient(form, queries):
        monkeypatch.setattr(latent_attention, "absorbed", lambda *_: form)
        monkeypatch.setattr(attention, "QUERIES", queries)

        def loss(params, x):
            return jnp.sum(jnp.sin(latent_attention.apply(params, cfg, x, describe([cfg], 1, 9), None)[0]))
        return tiny.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    want = gradient(False, 256)
    for other in (gradient(True, 256), gradient(False, 4), gradient(True, 4)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), other, want)


def test_int8(form):
    cfg, params = setting(query_latent=10)
    quantised = tiny.quantised(latent_attention.spec(cfg, 16), params)
    plain = tiny.jit(lambda tree: jax.tree.map(weight.dense, tree, is_leaf=weight.is_weight))(quantised)
    run = tiny.jit(lambda p, x: latent_attention.apply(p, cfg, x, describe([cfg], 2, 6), None)[0])
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(run(quantised, x), run(plain, x), atol=1e-5)


def test_the_form_goes_by_what_it_costs():
    """Of DeepSeek-V3: whole texts are expanded, tokens and trees over a cache are not. Counted again, product by product."""
    cfg = config.LatentAttention(128, 512, 128, 64, 128, 1536)
    sizes = ((64, 0), (1, 4096), (64, 4096), (170, 1 << 20), (171, 1 << 20), (1, 0), (4096, 0), (1, 16), (512, 512))
    for tokens, slots in sizes:
        keys = tokens + slots
        expanded = keys * 512 * (128 + 128) + tokens * keys * (192 + 128)
        absorbed = tokens * 512 * (128 + 128) + tokens * keys * (512 + 64 + 512)
        assert latent_attention.absorbed(cfg, tokens, slots) == (absorbed < expanded)
    assert [latent_attention.absorbed(cfg, *one) for one in sizes[:5]] == [False, True, True, True, False]


def test_no_form_makes_what_the_other_does():
    """Decoding never holds keys or values of the heads, prefill no scores of latents."""
    cfg, params = setting(latent=24)

    def text(length, slots):
        cached = KeyValue(jnp.zeros((1, 1, slots, 28)), None) if slots else None
        known = describe([cfg], 1, length, length=jnp.array([slots]) if slots else None)
        return str(jax.make_jaxpr(lambda x: latent_attention.apply(params, cfg, x, known, cached))(jnp.zeros((1, length, 16))))

    decoding, prefill = text(1, 99), text(33, 0)
    assert "f32[1,1,4,1,28]" in decoding and "4,99,10]" not in decoding and "4,99,5]" not in decoding
    assert "f32[1,4,33,10]" in prefill and "f32[1,1,4,33,28]" not in prefill


def test_it_is_not_turned_into_cross_attention():
    lm = model.Model(tiny.LATENT, tiny.weights(model.spec(tiny.LATENT)))
    with pytest.raises(ValueError, match="must be an Attention, not a LatentAttention"):
        adapt.to_encoder_decoder(lm, start=[1], key=jax.random.key(0))
    encoder = adapt.to_encoder(lm)
    assert not any(one.attention.causal for one in encoder.config.stack.blocks())
    one, other = (lm.stack.blocks()[1].attention for lm in (encoder.config, tiny.LATENT))
    assert dataclasses.replace(one, causal=True) == other

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Embedding, Head, LayerNorm, Learned
from jaxlm.layers import embed
from tests import oracle, tiny

TOKENS = np.array([[1, 0, 18], [4, 4, 7]], np.int32)
POSITIONS = np.array([[0, 1, 2], [5, 6, -1]], np.int32)


@pytest.mark.parametrize("cfg", [
    Embedding(19), Embedding(19, scale=4.0), Embedding(19, position=Learned(8)),
    Embedding(19, 0.5, Learned(9, offset=2), LayerNorm())], ids=str)
def test_embed(cfg):
    params = tiny.weights(embed.spec(cfg, 8))
    want = oracle.embed(params, cfg, TOKENS, POSITIONS)
    got = embed.apply(params, cfg, jnp.asarray(TOKENS), None, jnp.asarray(POSITIONS), jnp.float32)
    np.testing.assert_allclose(got, want, atol=1e-5)

    # Soft inputs: the scaled vectors, before position and norm.
    soft = params["tokens"][TOKENS] * (1.0 if cfg.scale is None else cfg.scale)
    again = embed.apply(params, cfg, None, soft, jnp.asarray(POSITIONS), jnp.float32)
    np.testing.assert_allclose(again, got, atol=1e-6)
    low = embed.apply(params, cfg, jnp.asarray(TOKENS), None, jnp.asarray(POSITIONS), jnp.bfloat16)
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("cfg", [Head(True), Head(False), Head(False, bias=True), Head(True, True, 0.3, 2.0)], ids=str)
def test_head(cfg):
    params = tiny.weights(embed.head_spec(cfg, Embedding(19), 8))
    assert set(params) == ({"bias"} if cfg.bias else set()) | (set() if cfg.tied else {"out"})
    table = tiny.weights(embed.spec(Embedding(19), 8), seed=1)["tokens"]
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    got = embed.logits(params, table, cfg, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, oracle.head(params, table, cfg, x), atol=1e-5)
    assert embed.logits(params, table, cfg, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_a_cap_bounds_the_logits():
    x = jnp.full((1, 1, 8), 1e4)
    table = tiny.weights(embed.spec(Embedding(19), 8))["tokens"]
    capped = embed.logits({}, table, dataclasses.replace(Head(True), softcap=30.0), x)
    assert 29 < np.abs(capped).max() <= 30 < np.abs(embed.logits({}, table, Head(True), x)).max()

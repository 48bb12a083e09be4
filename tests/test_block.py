import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import block
from jaxlm.config import LayerNorm, OutputNorm, ParallelNorm, PostNorm, PreNorm, RmsNorm, SandwichNorm
from jaxlm.layers.mask import describe
from tests import oracle, tiny

X = np.random.default_rng(0).normal(size=(2, 4, 16))
POSITIONS = np.array([[0, 1, 2, 3], [0, 1, -1, -1]], np.int32)
RESIDUALS = {
    "pre": (PreNorm(RmsNorm()), ["attention_norm", "feedforward_norm"]),
    "pre, feed-forward alone": (PreNorm(LayerNorm(), attention=False), ["feedforward_norm"]),
    "post": (PostNorm(LayerNorm()), ["attention_norm_out", "feedforward_norm_out"]),
    "output": (OutputNorm(RmsNorm()), ["attention_norm_out", "feedforward_norm_out"]),
    "sandwich": (SandwichNorm(RmsNorm(offset=1.0)),
                 ["attention_norm", "attention_norm_out", "feedforward_norm", "feedforward_norm_out"]),
    "parallel, shared": (ParallelNorm(LayerNorm(), shared=True), ["attention_norm"]),
    "parallel": (ParallelNorm(LayerNorm(bias=False), shared=False), ["attention_norm", "feedforward_norm"]),
}


@pytest.mark.parametrize("multiplier", [1.0, 0.3])
@pytest.mark.parametrize("name", RESIDUALS)
def test_block(name, multiplier):
    residual, norms = RESIDUALS[name]
    cfg = tiny.block(residual, multiplier=multiplier)
    weights = tiny.weights(block.spec(cfg, 16))
    assert sorted(weights.keys() - {"attention", "feedforward"}) == norms
    x = jnp.asarray(X, jnp.float32)
    got, kv, *_ = tiny.jit(lambda p, x: block.apply(p, cfg, x, describe([cfg.attention], 2, 4, POSITIONS), None))(weights, x)
    want = oracle.block(weights, cfg, X, POSITIONS)
    np.testing.assert_allclose(np.asarray(got)[POSITIONS >= 0], want[POSITIONS >= 0], atol=3e-5)
    assert kv.k.shape == kv.v.shape == (2, 2, 4, 8)


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_multiplier_of_zero_leaves_the_stream(name):
    """Nothing but the norms of the stream itself is left; the parallel form has none."""
    residual, _ = RESIDUALS[name]
    cfg = dataclasses.replace(tiny.block(residual), multiplier=0.0)
    weights, x = tiny.weights(block.spec(cfg, 16)), jnp.asarray(X, jnp.float32)
    got, *_ = tiny.jit(lambda p, x: block.apply(p, cfg, x, describe([cfg.attention], 2, 4), None))(weights, x)
    want = X
    if name == "post":
        for norm in ("attention_norm_out", "feedforward_norm_out"):
            want = oracle.norm(weights[norm], residual.norm, want)
    np.testing.assert_allclose(got, want, atol=1e-5)

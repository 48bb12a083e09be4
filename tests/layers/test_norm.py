import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import LayerNorm, RmsNorm
from jaxlm.layers import norm
from tests import oracle, tiny

X = np.random.default_rng(0).normal(1, 2, (2, 3, 8))


@pytest.mark.parametrize("cfg", [RmsNorm(), RmsNorm(0.3), RmsNorm(offset=1.0), LayerNorm(), LayerNorm(0.3),
                                 LayerNorm(bias=False)], ids=str)
def test_norm(cfg):
    params = tiny.weights(norm.spec(cfg, 8))
    got = norm.apply(params, cfg, jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, oracle.norm(params, cfg, X), atol=1e-5)


@pytest.mark.parametrize("cfg, mean, deviation", [(RmsNorm(0.0, 1.0), None, None), (LayerNorm(0.0), 0.0, 1.0)])
def test_fresh_weights_only_normalise(cfg, mean, deviation):
    params = {name: param.init(param, None, jnp.float32) for name, param in norm.spec(cfg, 8).items()}
    got = np.asarray(norm.apply(params, cfg, jnp.asarray(X, jnp.float32)))
    if mean is None:
        np.testing.assert_allclose((got**2).mean(-1), 1, rtol=1e-5)
    else:
        np.testing.assert_allclose(got.mean(-1), mean, atol=1e-6)
        np.testing.assert_allclose(got.std(-1), deviation, rtol=1e-5)


@pytest.mark.parametrize("cfg", [RmsNorm(), LayerNorm()], ids=str)
def test_low_precision_is_rounded_once(cfg):
    """Sums of bfloat16 squares would be off by percents; the dtype that comes in goes out."""
    params = tiny.weights(norm.spec(cfg, 512))
    x = np.random.default_rng(1).normal(3, 1, (1, 512))
    got = norm.apply(params, cfg, jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    want = oracle.norm(params, cfg, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-2)

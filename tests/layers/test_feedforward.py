import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Activation, Dense
from jaxlm.layers import feedforward
from tests import oracle, tiny

X = np.random.default_rng(0).normal(0, 2, (2, 3, 8))


@pytest.mark.parametrize("cfg", [Dense(12, kind, gated=i % 2 == 0, bias=i % 3 == 0)
                                 for i, kind in enumerate([*Activation, *reversed(Activation)])] + [
    Dense(12, Activation.QUICK_GELU, bias=True, clip=0.7, offset=1.0), Dense(12, clip=0.5), Dense(12, offset=-0.3)], ids=str)
def test_feedforward(cfg):
    params = tiny.weights(feedforward.spec(cfg, 8))
    assert set(params) == {"up", "down"} | ({"gate"} if cfg.gated else set()) | (
        {f"{name}_bias" for name in ("up", "down", *(["gate"] if cfg.gated else []))} if cfg.bias else set())
    got = tiny.jit(lambda p, x: feedforward.apply(p, cfg, x))(params, jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, oracle.feedforward(params, cfg, X), atol=2e-5)


def test_every_activation_is_there():
    assert feedforward.ACTIVATIONS.keys() == set(Activation)


def test_compute_dtype_follows_the_input():
    params = tiny.weights(feedforward.spec(Dense(12, bias=True), 8))
    assert feedforward.apply(params, Dense(12, bias=True), jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16

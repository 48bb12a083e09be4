"""OpenMoE's configuration: the sizes that its paper states, and a step that traces."""

import jax
import jax.numpy as jnp
import pytest

from configs import openmoe_8b
from jaxlm import config, model, params


def test_sizes_and_shapes():
    cfg = openmoe_8b.config().model
    spec, vocabulary = model.spec(cfg), 256384 * 2048
    assert params.count(spec) == pytest.approx(8.7e9, rel=0.05)
    # The paper does not say whether its 2.1 billion count the shared layers, a tenth of them: it lies between.
    active, shared = model.products(cfg) - vocabulary, 4 * 3 * 2048 * 8192
    assert active == pytest.approx(2.1e9, rel=0.06) and active - shared == pytest.approx(2.1e9, rel=0.05)
    layers = [isinstance(block.feedforward, config.Moe) for block in cfg.stack.blocks()]
    assert layers == ([False] * 5 + [True]) * 4
    out = jax.eval_shape(lambda weights, tokens: model.forward(weights, cfg, tokens), params.abstract(spec),
                         jax.ShapeDtypeStruct((2, 2048), jnp.int32))
    assert out.logits.shape == (2, 2048, 256384)

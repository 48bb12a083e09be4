import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import adapt, config, model, weight
from jaxlm.model import Model
from tests import tiny

CFG = tiny.decoder([tiny.block(window=3), tiny.block(window=3), tiny.block()])
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 7)), jnp.int32)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def lm():
    return Model(CFG, tiny.weights(model.spec(CFG)))


def logits(lm, tokens=TOKENS, **given):
    return tiny.jit(lambda p: model.forward(p, lm.config, tokens, **given).logits)(lm.params)


@pytest.mark.parametrize("router", [config.TopK(1, normalize=True), config.TopK(3, normalize=True),
                                    config.TopK(2, config.Score.SIGMOID, normalize=True), config.Hash(2)], ids=str)
def test_upcycled_models_compute_what_they_did(lm, router):
    up = adapt.upcycle(lm, 4, router, key=KEY)
    assert all(one.feedforward.experts == 4 for one in up.config.stack.blocks())
    jax.tree.map(lambda param, leaf: np.testing.assert_equal(param.shape, leaf.shape), model.spec(up.config), up.params)
    np.testing.assert_allclose(logits(up), logits(lm), atol=2e-5)


def test_some_layers_are_upcycled_and_noise_tells_experts_apart(lm):
    up = adapt.upcycle(lm, 4, config.TopK(2, normalize=True), layers=(1,), noise=0.1, key=KEY)
    assert [type(one.feedforward).__name__ for one in up.config.stack.blocks()] == ["Dense", "Moe", "Dense"]
    experts = np.asarray(up.params["decoder"]["blocks"]["0"]["1"]["feedforward"]["experts"]["up"][0])
    spread = np.std(experts - experts.mean(0)) * np.sqrt(4 / 3)
    dense = lm.params["decoder"]["blocks"]["0"]["0"]["feedforward"]["up"][1]
    assert spread == pytest.approx(0.1 * float(jnp.std(dense)), rel=0.2)
    assert float(jnp.max(jnp.abs(logits(up) - logits(lm)))) > 1e-3


def test_upcycled_8_bit_experts(lm):
    spec = model.spec(CFG)
    small = Model(CFG, jax.tree.map(lambda param, leaf: weight.quantize(leaf, param.inputs) if "mlp" in param.axes else leaf,
                                    spec, lm.params))
    up = adapt.upcycle(small, 4, config.TopK(2, normalize=True), key=KEY)
    np.testing.assert_allclose(logits(up), logits(small), atol=2e-5)
    with pytest.raises(ValueError, match="8-bit weights get no noise"):
        adapt.upcycle(small, 4, config.TopK(2), noise=0.1, key=KEY)
    with pytest.raises(ValueError, match="8-bit weights are not split"):
        adapt.split(small, 4, 2)


@pytest.mark.parametrize("gated", [True, False])
def test_split_layers_are_whole_when_all_experts_are_chosen(gated):
    cfg = tiny.decoder([tiny.block(feedforward=config.Dense(24, gated=gated))] * 2)
    lm = Model(cfg, tiny.weights(model.spec(cfg)))
    np.testing.assert_allclose(logits(adapt.split(lm, 4, 4)), logits(lm), atol=2e-5)
    assert float(jnp.max(jnp.abs(logits(adapt.split(lm, 4, 1)) - logits(lm)))) > 1e-3


def test_split_finds_units_with_like_keys(lm):
    """Planted clusters of equal size come out whole."""
    cfg = tiny.decoder([tiny.block(feedforward=config.Dense(24))])
    weights = tiny.weights(model.spec(cfg))
    random = np.random.default_rng(1)
    centres, member = random.normal(size=(4, 16)) * 5, random.permutation(np.repeat(np.arange(4), 6))
    gate = centres[member] + 0.1 * random.normal(size=(24, 16))
    feed = weights["decoder"]["blocks"]["0"]["0"]["feedforward"]
    feed = feed | {"gate": jnp.asarray(gate.T[None], jnp.float32)}
    weights["decoder"]["blocks"]["0"]["0"]["feedforward"] = feed
    up = adapt.split(Model(cfg, weights), 4, 1)
    parts = np.asarray(up.params["decoder"]["blocks"]["0"]["0"]["feedforward"]["experts"]["gate"][0])
    nearest = ((parts.swapaxes(1, 2)[:, :, None] - centres) ** 2).sum(-1).argmin(-1)
    assert all(len(set(row)) == 1 for row in nearest.tolist()) and len(set(nearest[:, 0].tolist())) == 4


def test_encoder_decoders_on_both_sides():
    side = tiny.encoder([tiny.block(causal=False)], head=None)
    cross = tiny.attention(position=None, causal=False, source=side.width)
    cfg = config.EncoderDecoder(side, tiny.decoder([tiny.block(cross=cross)]), (1,))
    lm = Model(cfg, tiny.weights(model.spec(cfg)))
    up = adapt.upcycle(lm, 2, config.TopK(1, normalize=True), key=KEY)

    def run(one):
        return tiny.jit(lambda p: model.forward(p, one.config, TOKENS, memory=model.encode(p, one.config, TOKENS)).logits)(
            one.params)
    np.testing.assert_allclose(run(up), run(lm), atol=2e-5)
    with pytest.raises(ValueError, match="of an encoder-decoder all layers become mixtures"):
        adapt.upcycle(lm, 2, config.TopK(1), layers=(0,), key=KEY)


def test_what_cannot_be_done_is_named(lm):
    with pytest.raises(ValueError, match="layers are some of 0 to 2, got \\[3\\]"):
        adapt.upcycle(lm, 4, config.TopK(1), layers=(3,), key=KEY)
    with pytest.raises(ValueError, match="give a key"):
        adapt.upcycle(lm, 4, config.TopK(1))
    with pytest.raises(ValueError, match="TopK or Hash, got AverageKey"):
        adapt.upcycle(lm, 4, config.AverageKey(1), key=KEY)
    with pytest.raises(ValueError, match="does not divide into 5 experts"):
        adapt.split(lm, 5, 1)
    up = adapt.upcycle(lm, 4, config.TopK(1), layers=(0,), key=KEY)
    with pytest.raises(ValueError, match="layer 0 is a mixture of experts already"):
        adapt.upcycle(up, 4, config.TopK(1), key=KEY)

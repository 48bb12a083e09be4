import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, model, params
from jaxlm.objectives import RoutingLoss, pair, routing, text
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.training import step
from jaxlm.training.optimizer import AdamW, Optimizer
from tests import tiny

ROUTER = config.TopK(2, config.Score.SIGMOID, normalize=True, correction=True)
BLOCK = tiny.block(feedforward=config.Moe(4, config.Dense(6), ROUTER))
CFG = tiny.decoder([BLOCK] * 2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCABULARY, (4, 9)), jnp.int32)
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "weights": jnp.ones((4, 8)).at[3, 5:].set(0),
         "segments": jnp.ones((4, 8), jnp.int32).at[3, 5:].set(0)}


@pytest.fixture(scope="module")
def weights():
    return tiny.weights(model.spec(CFG))


def numpy_losses(weights):
    """The measures of every layer, of the tokens that are none of the padding."""
    out = tiny.jit(lambda p: model.forward(p, CFG, BATCH["tokens"], segments=BATCH["segments"], hidden=(0, 1)))(weights)
    one, found = jax.tree.map(np.asarray, out.routing[0][0]), []
    valid = np.asarray(BATCH["segments"]) > 0
    for layer in range(2):
        chosen = one.experts[layer][valid]
        load = np.bincount(chosen.reshape(-1), minlength=4)
        np.testing.assert_array_equal(load, one.load[layer])
        mean = one.scores[layer] / valid.sum()
        shares = load / load.sum()
        found.append({"balance": 4 * (shares * mean).sum(), "z": one.squares[layer] / valid.sum(),
                      "mutual": one.entropy[layer] / valid.sum() + (mean * np.log(mean)).sum(),
                      "load_entropy": -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / np.log(4)})
    return {name: np.mean([layer[name] for layer in found]) for name in found[0]}


def test_losses_are_means_over_layers_and_added_to_the_mean_of_a_token(weights):
    want = numpy_losses(weights)
    coefficients = RoutingLoss(balance=0.5, z=0.25, mutual=2.0)
    plain, added = (tiny.jit(lambda p, r=r: text.loss(p, CFG, BATCH, routing=r))(weights) for r in (None, coefficients))
    extra = 0.5 * want["balance"] + 0.25 * want["z"] + 2 * want["mutual"]
    np.testing.assert_allclose(added.sum - plain.sum, extra * 29, rtol=1e-4)
    assert added.weight == 29
    told = {"balance": "balance", "z_router": "z", "mutual": "mutual", "load_entropy": "load_entropy"}
    for name, ours in told.items():
        np.testing.assert_allclose(added.aux[name] / 29, want[ours], rtol=1e-4, err_msg=name)
    assert added.aux["dropped"] == 0 and set(plain.aux) == set(added.aux) - {"balance", "z_router", "mutual"}


def test_an_even_load_has_balance_one():
    even = routing.Routing(*(jnp.asarray(x, jnp.float32) for x in ([8.0], [[2.0] * 4], [[4.0] * 4], [0.0], [0.0], [0.0])),
                           None, None)
    found = routing.measures(even)
    np.testing.assert_allclose(found["balance"], [1.0])
    np.testing.assert_allclose(found["load_entropy"], [1.0], rtol=1e-6)
    one = dataclasses.replace(even, scores=jnp.array([[8.0, 0, 0, 0]]), load=jnp.array([[16.0, 0, 0, 0]]))
    found = routing.measures(one)
    np.testing.assert_allclose(found["balance"], [4.0])
    np.testing.assert_allclose([found["load_entropy"][0], found["mutual"][0]], 0, atol=1e-6)


def test_a_model_without_a_mixture_has_its_own_loss():
    loss = Loss(jnp.ones(()), jnp.ones(()), {})
    assert routing.add(loss, {"decoder": ((None,),)}, None, {}) is loss


def test_corrections_move_against_the_load_alone(weights):
    """By their rate and nothing else, whatever the optimizer does to other weights; the loss does not notice."""
    transform = Optimizer(AdamW(), lambda _: 0.1, correction=0.01).transform(model.spec(CFG))

    def loss(p, batch, key, carry):
        return text.loss(p, CFG, batch), carry
    state = step.begin(weights, transform, jax.random.key(0))
    new, metrics = jax.jit(lambda s: step.advance(loss, transform, s, BATCH))(state)
    out = tiny.jit(lambda p: model.forward(p, CFG, BATCH["tokens"], segments=BATCH["segments"]))(weights)
    load = np.asarray(out.routing[0][0].load)
    path = "decoder/blocks/0/0/feedforward/router/correction"
    moved = np.asarray(params.paths(new.params)[path]) - np.asarray(params.paths(weights)[path])
    np.testing.assert_allclose(moved, -0.01 * np.sign(load - load.mean(1, keepdims=True)), atol=1e-7)
    assert np.any(moved)
    assert float(metrics.loss) == pytest.approx(float(metrics.aux["nll"]), rel=1e-6)


def test_routers_of_both_sides_count():
    mixture = config.Moe(4, config.Dense(6), config.TopK(1))
    side = tiny.encoder([tiny.block(causal=False, feedforward=mixture)], head=None)
    cross = tiny.attention(position=None, causal=False, source=side.width)
    cfg = config.EncoderDecoder(side, tiny.decoder([tiny.block(feedforward=mixture, cross=cross)]), (1,))
    weights = tiny.weights(model.spec(cfg))
    batch = BATCH | {"inputs": TOKENS, "input_segments": jnp.ones_like(TOKENS)}
    found = tiny.jit(lambda p: pair.loss(p, cfg, batch, routing=RoutingLoss(balance=1.0)))(weights)
    memory = tiny.jit(lambda p: model.encode(p, cfg, TOKENS, segments=batch["input_segments"]))(weights)
    tokens = pair.shifted(batch["targets"], batch["segments"], 1)
    out = tiny.jit(lambda p: model.forward(p, cfg, tokens, segments=batch["segments"], memory=memory.replace(routing=None)))(
        weights)
    sides = [float(routing.measures(one[0][0])["balance"][0]) for one in (memory.routing, out.routing)]
    assert sides[0] != pytest.approx(sides[1], rel=1e-3)
    assert float(found.aux["balance"] / found.weight) == pytest.approx(np.mean(sides), rel=1e-5)


def test_negative_coefficients_are_refused():
    with pytest.raises(ValueError, match="RoutingLoss.z must not be negative, got -1"):
        RoutingLoss(z=-1)

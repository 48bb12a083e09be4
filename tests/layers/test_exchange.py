"""Experts split over simulated devices give what one device does, forward and gradient, however uneven the load is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxlm import config, sharding
from jaxlm.layers import exchange, moe
from tests import tiny

CFG = config.Moe(8, config.Dense(12, bias=True), config.TopK(2))
D, T = 16, 3
SPEC = moe.spec(CFG, D)["experts"]
MESHES = [{"expert": 8}, {"expert": 4, "model": 2}, {"data": 2, "fsdp": 2, "expert": 2}]
BATCHES = {"divides": 16, "does not divide": 3}


def arrays(rows):
    """Vectors, experts of which most tokens want the first two and some none, weights, what to weigh the outputs by."""
    rng = np.random.default_rng(rows)
    experts = np.where(rng.random((rows, T, 2)) < 0.6, rng.integers(0, 2, (rows, T, 2)), rng.integers(0, 9, (rows, T, 2)))
    x, given = rng.normal(size=(2, rows, T, D))
    return tuple(jnp.asarray(one, dtype) for one, dtype in (
        (x, jnp.float32), (experts, jnp.int32), (rng.random((rows, T, 2)), jnp.float32), (given, jnp.float32)))


def step(apply=exchange.apply):
    """Output and the gradients of everything that has one."""
    def run(params, x, experts, weights, given):
        out, back = jax.vjp(lambda params, x, weights: apply(params, x, experts, weights), params, x, weights)
        return out, back(given)
    return run


def through_devices(params, x, experts, weights):
    return exchange.apply(params, CFG, x, experts, weights)


@functools.cache
def wanted(rows):
    return tiny.jit(step(lambda params, x, experts, weights: moe.reference(params, CFG.expert, x, experts, weights)))(
        tiny.weights(SPEC), *arrays(rows))


def same(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def placed(mesh, rows):
    values = arrays(rows)
    return jax.device_put((tiny.weights(SPEC), *values), (sharding.shardings(SPEC, mesh), *(
        NamedSharding(mesh, sharding.partition(sharding.ACTIVATIONS, value.shape, mesh.shape)) for value in values)))


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_one_device(rows):
    same(tiny.jit(step(through_devices))(tiny.weights(SPEC), *arrays(rows)), wanted(rows))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh(sizes, batch, monkeypatch):
    """Where rows divide: in several rounds, for a quarter of an even share fits into one."""
    monkeypatch.setattr(exchange, "SLACK", 0.25)
    mesh, rows = sharding.mesh(**sizes), BATCHES[batch]
    with jax.set_mesh(mesh):
        compiled = tiny.jit(step(through_devices)).lower(*placed(mesh, rows)).compile()
        same(compiled(*placed(mesh, rows)), wanted(rows))
    text = compiled.as_text()
    # Rounds that are not run cost nothing: nothing of them is kept for the gradient.
    stacked = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert not [shape for shape in stacked if len(shape) == 4 and shape[2:] in ((D, 12), (12, D))], stacked
    assert ("all-to-all(" in text) == (batch == "divides")
    gathered = {tuple(map(int, shape.split(","))) for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)}
    assert not [shape for shape in gathered if np.prod(shape) >= 8 * D * 12 or shape[0] == 8], gathered
    if "fsdp" not in sizes:  # then nothing of a weight's size at all
        assert not [shape for shape in gathered if np.prod(shape) >= 8 // sizes["expert"] * D * 12], gathered


@pytest.mark.parametrize("sizes", [{"expert": 8}], ids=str)
def test_one_round_does_unless_the_load_is_uneven(sizes, monkeypatch):
    """All tokens of all devices to one expert: nothing is dropped, since there are further rounds."""
    mesh, (x, experts, weights, _) = sharding.mesh(**sizes), arrays(16)
    experts = jnp.full_like(experts, 5)
    want = moe.reference(tiny.weights(SPEC), CFG.expert, x, experts, weights)
    with jax.set_mesh(mesh):
        got = tiny.jit(through_devices)(tiny.weights(SPEC), x, experts, weights)
        np.testing.assert_allclose(got, want, atol=5e-5)
        monkeypatch.setattr(exchange, "_later", lambda go, params, tokens, *_: jnp.zeros(tokens.shape))
        less = tiny.jit(lambda *given: through_devices(*given))(tiny.weights(SPEC), x, experts, weights)
    assert float(jnp.max(jnp.abs(less - want))) > 1e-2


def test_eight_bit_experts_over_a_mesh():
    """Scales are split as the columns that they belong to."""
    mesh, rows = sharding.mesh(expert=4, model=2), 16
    weights = tiny.quantised(SPEC, tiny.weights(SPEC))
    x, experts, shares, _ = arrays(rows)
    want = tiny.jit(through_devices)(weights, x, experts, shares)
    with jax.set_mesh(mesh):
        split = jax.device_put(weights, sharding.match(weights, SPEC, mesh))
        assert tuple(split["up"].scale.sharding.spec) == ("expert", None, "model")
        np.testing.assert_allclose(tiny.jit(through_devices)(split, x, experts, shares), want, atol=5e-5)


def test_experts_that_the_axis_does_not_divide():
    cfg = config.Moe(6, config.Dense(4), config.TopK(1))
    weights = tiny.weights(moe.spec(cfg, D)["experts"])
    with jax.set_mesh(sharding.mesh(expert=4, data=2)), pytest.raises(
            ValueError, match="6 experts cannot be split over an expert axis of 4 devices"):
        exchange.apply(weights, cfg, jnp.zeros((8, 1, D)), jnp.zeros((8, 1, 1), jnp.int32), jnp.ones((8, 1, 1)))


def test_gradients_through_rematerialised_layers(monkeypatch):
    """As training has them, in several rounds."""
    monkeypatch.setattr(exchange, "SLACK", 0.5)
    mesh = sharding.mesh(expert=8)
    with jax.set_mesh(mesh):
        again = step(jax.checkpoint(through_devices, policy=jax.checkpoint_policies.nothing_saveable))
        same(tiny.jit(again)(*placed(mesh, 16)), wanted(16))

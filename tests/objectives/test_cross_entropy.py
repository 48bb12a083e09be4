"""The loss in pieces beside the whole in float64 NumPy, its gradients beside those of the plain one, and what it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.objectives import cross_entropy
from tests import tiny

B, T, D, V = 2, 13, 8, 31
_random = np.random.default_rng(0)
X = _random.normal(size=(B, T, D)).astype(np.float32)
WEIGHTS = {"out": _random.normal(size=(V, D)).astype(np.float32), "bias": _random.normal(size=V).astype(np.float32)}
TARGETS = _random.integers(0, V, (B, T))
MASK = (_random.random((B, T)) < 0.7).astype(np.float32) * _random.choice([0.5, 1.0], (B, T)).astype(np.float32)


def head(params, x):
    return jnp.einsum("BTD,VD->BTV", x, params["out"]) + params["bias"][None, None]


def whole(params, x, smoothing=0.0, z=0.0):
    """All logits at once, by JAX, to be differentiated."""
    logp = jax.nn.log_softmax(head(params, x))
    spread = (1 - smoothing) * jax.nn.one_hot(TARGETS, V) + smoothing / V
    loss = -jnp.sum(spread * logp, axis=-1) + z * jax.nn.logsumexp(head(params, x), axis=-1) ** 2
    return jnp.sum(loss * MASK)


@pytest.mark.parametrize("piece", [1, 4, 5, 13, 99])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 1e-2)])
def test_pieces_give_the_whole_and_its_gradients(piece, smoothing, z):
    def loss(params, x):
        return cross_entropy(head, params, x, TARGETS, MASK, piece=piece, smoothing=smoothing, z=z)

    logits = np.einsum("BTD,VD->BTV", X.astype(np.float64), WEIGHTS["out"].astype(np.float64)) + WEIGHTS["bias"]
    normal = np.log(np.exp(logits).sum(axis=-1))
    nll = normal - np.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]
    want = (1 - smoothing) * nll + smoothing * (normal - logits.mean(axis=-1)) + z * normal**2
    found = tiny.jit(loss)(WEIGHTS, X)
    np.testing.assert_allclose(found.sum, (want * MASK).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.aux["nll"], (nll * MASK).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.aux["correct"], ((logits.argmax(axis=-1) == TARGETS) * MASK).sum(), rtol=1e-6)
    np.testing.assert_allclose(found.weight, MASK.sum(), rtol=1e-6)

    # Not only the sum: what is made of it flows back.
    got = tiny.jit(jax.grad(lambda params, x: 3 * loss(params, x).sum / 7, argnums=(0, 1)))(WEIGHTS, X)
    plain = tiny.jit(jax.grad(lambda params, x: 3 * whole(params, x, smoothing, z) / 7, argnums=(0, 1)))(WEIGHTS, X)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_no_array_has_all_logits():
    def loss(params, x):
        return cross_entropy(head, params, x, TARGETS, MASK, piece=4).sum

    for program in (loss, jax.grad(loss, argnums=(0, 1))):
        text = str(jax.make_jaxpr(program)(WEIGHTS, X))
        assert f"{B},4,{V}]" in text and f"{B},{T},{V}]" not in text and f"4,{B},4,{V}]" not in text


def test_targets_without_weight_do_not_matter():
    wild = np.where(MASK > 0, TARGETS, -100)
    a, b = (cross_entropy(head, WEIGHTS, X, jnp.asarray(t), MASK) for t in (TARGETS, wild))
    assert a.sum == b.sum


def test_bfloat16_inputs_and_float32_weights():
    x = jnp.asarray(X, jnp.bfloat16)

    def loss(params, x):
        return cross_entropy(lambda p, y: head(jax.tree.map(lambda leaf: jnp.asarray(leaf, y.dtype), p), y), params, x, TARGETS,
                             MASK, piece=4).sum

    value, (params, toward) = jax.value_and_grad(loss, argnums=(0, 1))(jax.tree.map(jnp.asarray, WEIGHTS), x)
    assert value.dtype == jnp.float32 and toward.dtype == jnp.bfloat16 and params["out"].dtype == jnp.float32
    np.testing.assert_allclose(value, whole(WEIGHTS, X), rtol=2e-2)


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "model": 2}], ids=str)
def test_a_bfloat16_head_on_a_mesh_has_the_gradient_of_one_device(mesh):
    """The parts are rounded as they are made; they are added up in float32, on one device and over several."""
    random = np.random.default_rng(1)
    x, targets = random.normal(size=(4, 5, D)).astype(np.float32), random.integers(0, V, (4, 5))
    weights, mask = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), WEIGHTS), np.ones((4, 5), np.float32)

    def loss(params, x):
        return cross_entropy(lambda p, y: head(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), y), params, x, targets,
                             mask, piece=2).sum

    want = jax.value_and_grad(loss, argnums=(0, 1))(weights, x)
    with jax.set_mesh(sharding.mesh(devices=jax.devices()[:4], **mesh)):
        found = tiny.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weights, x)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][1], want[1][1], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1][0]), jax.tree.leaves(want[1][0]), strict=True):
        assert ours.dtype == theirs.dtype == jnp.bfloat16
        ours, theirs = (np.asarray(leaf, np.float32) for leaf in (ours, theirs))
        assert np.linalg.norm(ours - theirs) < 2**-8 * np.linalg.norm(theirs)

"""Updates beside their formulas in NumPy; which weights decay, stay, or learn at another rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import model
from jaxlm.params import Param, paths
from jaxlm.training.optimizer import Adafactor, AdamW, Freeze, Lion, Muon, Optimizer
from jaxlm.training.schedule import Constant, Linear
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")

SPEC = {"embedding": {"tokens": Param((5, 4), ("vocab", "embed"), inputs=(1,))},
        "blocks": {"w": Param((3, 4, 2, 2), ("layers", "embed", "heads", "head"), inputs=(1,)),
                   "scale": Param((3, 4), ("layers", None))}}
_random = np.random.default_rng(0)
WEIGHTS = jax.tree.map(lambda p: jnp.asarray(_random.normal(size=p.shape), jnp.float32), SPEC)
GRADIENTS = [jax.tree.map(lambda p: jnp.asarray(_random.normal(size=p.shape), jnp.float32), SPEC) for _ in range(4)]


def run(optimizer, steps=4, spec=SPEC, weights=WEIGHTS, gradients=GRADIENTS):
    """Path -> the weights after so many steps."""
    transform = optimizer.transform(spec)

    @jax.jit
    def step(weights, moments, gradient):
        updates, moments = transform.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments

    moments = transform.init(weights)
    for gradient in gradients[:steps]:
        weights, moments = step(weights, moments, gradient)
    return {path: np.asarray(leaf) for path, leaf in paths(weights).items()}


def per_leaf(update, steps=4):
    """The same by a NumPy function (weight, gradient, memory, step) -> (weight, memory), float64."""
    out = {}
    for path, weight in paths(WEIGHTS).items():
        weight, memory = np.asarray(weight, np.float64), None
        for step in range(steps):
            weight, memory = update(path, weight, np.asarray(paths(GRADIENTS[step])[path], np.float64), memory, step)
        out[path] = weight
    return out


def check(found, wanted, rtol=2e-5):
    for path, want in wanted.items():
        np.testing.assert_allclose(found[path], want, rtol=rtol, atol=1e-6, err_msg=path)


def adam(b1=0.9, b2=0.95, eps=1e-8, rate=0.01, decay=0.1, decayed=("blocks/w",)):
    def update(path, weight, gradient, memory, step):
        m, v = (0.0, 0.0) if memory is None else memory
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        direction = m / (1 - b1 ** (step + 1)) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps)
        return weight - rate * (direction + (decay if path in decayed else 0.0) * weight), (m, v)
    return update


def test_adamw_and_what_decays():
    """Weights that take part in products do; embeddings, scales do not."""
    check(run(Optimizer(AdamW(), Constant(0.01), clip=None)), per_leaf(adam()))
    chosen = Optimizer(AdamW(), Constant(0.01), clip=None, decayed=("*/scale", "embedding/*"))
    check(run(chosen), per_leaf(adam(decayed=("blocks/scale", "embedding/tokens"))))


def test_lion():
    def update(path, weight, gradient, memory, step):
        m = 0.0 if memory is None else memory
        direction = np.sign(0.9 * m + 0.1 * gradient)
        return weight - 0.01 * (direction + (0.1 if path == "blocks/w" else 0.0) * weight), 0.99 * m + 0.01 * gradient
    check(run(Optimizer(Lion(), Constant(0.01), clip=None)), per_leaf(update))


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam():
    optimizer = Optimizer(Muon(iterations=5, weight_decay=0.0), Constant(0.01), clip=None)
    found = run(optimizer, steps=1)
    wanted = per_leaf(adam(decay=0.0), steps=1)
    check(found, {path: wanted[path] for path in ("embedding/tokens", "blocks/scale")})
    moved = (np.asarray(WEIGHTS["blocks"]["w"]) - found["blocks/w"]).reshape(3, 4, 4) / 0.01 / (0.2 * 4**0.5)
    for matrix, gradient in zip(moved, np.asarray(GRADIENTS[0]["blocks"]["w"]).reshape(3, 4, 4), strict=True):
        left, _, right = np.linalg.svd(gradient)
        # Five iterations bring singular values near 1, not onto it.
        values = np.diag(left.T @ matrix @ right.T)
        assert np.all((0.6 < values) & (values < 1.3)) and np.abs(left.T @ matrix @ right.T - np.diag(values)).max() < 1e-3


def test_adafactor_keeps_a_row_and_a_column():
    spec = {"blocks": {"w": Param((200, 300), ("embed", "mlp"), inputs=(0,))}}
    weights = {"blocks": {"w": jnp.asarray(_random.normal(size=(200, 300)), jnp.float32)}}
    transform = Optimizer(Adafactor(), Constant(0.01)).transform(spec)
    moments = transform.init(weights)
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) < 1000
    gradient = jax.tree.map(lambda leaf: jnp.asarray(_random.normal(size=leaf.shape), jnp.float32), weights)
    found = run(Optimizer(Adafactor(), Constant(0.01), clip=None), 1, spec, weights, [gradient])["blocks/w"]
    g, w = (np.asarray(tree["blocks"]["w"], np.float64) for tree in (gradient, weights))
    row, column = (g**2).mean(axis=1, keepdims=True), (g**2).mean(axis=0, keepdims=True)
    direction = g / np.sqrt(row * column / (g**2).mean())
    direction /= max(1.0, np.sqrt((direction**2).mean()))
    np.testing.assert_allclose(found, w - 0.01 * direction * np.sqrt((w**2).mean()), rtol=1e-3, atol=1e-5)


def test_clipping_is_of_all_that_is_trained_together():
    """What is frozen counts nothing, and has no moments."""
    free, frozen = ("blocks/w", "blocks/scale"), ("embedding/*",)
    norm = np.sqrt(sum((np.asarray(paths(GRADIENTS[0])[path]) ** 2).sum() for path in free))
    sgd_like = Optimizer(AdamW(b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0), Constant(1e6), clip=0.5, frozen=frozen)
    found = run(sgd_like, steps=1)
    for path in free:  # with such an epsilon Adam's update is the gradient over it
        np.testing.assert_allclose(np.asarray(paths(WEIGHTS)[path]) - found[path], 0.5 / norm * paths(GRADIENTS[0])[path],
                                   rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found["embedding/tokens"], WEIGHTS["embedding"]["tokens"])
    held = jax.tree.leaves(sgd_like.transform(SPEC).init(WEIGHTS))
    assert sum(leaf.size for leaf in held if leaf.ndim) == 2 * sum(paths(WEIGHTS)[path].size for path in free)


@pytest.mark.parametrize("kind", [AdamW(), Lion(weight_decay=0.3), Muon()])
def test_decay_does_not_go_by_multipliers(kind):
    """It takes the schedule's rate of the weight's size, whatever the update's factor is; none of what is frozen."""
    without = dataclasses.replace(kind, weight_decay=0.0)
    for multipliers in ((), (("*", 0.25),)):
        optimizer = Optimizer(kind, Constant(0.01), multipliers=multipliers, frozen=("embedding/*",), decayed=("*",))
        one, other = run(optimizer, 1), run(dataclasses.replace(optimizer, kind=without), 1)
        for path, weight in paths(WEIGHTS).items():
            share = 0.0 if path == "embedding/tokens" else 0.01 * kind.weight_decay
            np.testing.assert_allclose(other[path] - one[path], share * np.asarray(weight), rtol=1e-3, atol=1e-6)


def test_multipliers_scale_the_rate_and_the_schedule_moves_it():
    slow = Optimizer(AdamW(weight_decay=0.0), Constant(0.01), clip=None, multipliers=(("*", 0.5), ("blocks/scale", 2.0)))
    plain, found = run(Optimizer(AdamW(weight_decay=0.0), Constant(0.01), clip=None)), run(slow)
    for path, factor in (("blocks/w", 0.5), ("embedding/tokens", 0.5), ("blocks/scale", 2.0)):
        start = np.asarray(paths(WEIGHTS)[path])
        np.testing.assert_allclose(found[path] - start, factor * (plain[path] - start), rtol=1e-4, atol=1e-6)
    halved = run(Optimizer(AdamW(weight_decay=0.0), Linear(0.01, 0, 2), clip=None), steps=4)
    once = run(Optimizer(AdamW(weight_decay=0.0), Linear(0.01, 0, 2), clip=None), steps=2)
    check(halved, once)  # at its end the rate is 0


@pytest.mark.parametrize("kind", [AdamW(), Lion(), Adafactor(), Muon()])
def test_every_kind_takes_a_models_spec(kind):
    cfg = tiny.LOCAL
    spec = model.spec(cfg)
    weights = tiny.weights(spec)
    found = run(Optimizer(kind, Constant(0.01)), 1, spec, weights, [jax.tree.map(jnp.ones_like, weights)])
    assert all(np.isfinite(leaf).all() and (leaf != np.asarray(paths(weights)[path])).any() for path, leaf in found.items())


@pytest.mark.parametrize(("fields", "message"), [
    ({"frozen": ("nothing/*",)}, "no path matches 'nothing/\\*'; paths are like blocks/"),
    ({"decayed": ("x",)}, "no path matches 'x'"), ({"multipliers": (("x", 2.0),)}, "no path matches 'x'"),
    ({"multipliers": (("blocks/w", 0.0),)}, "multiplier of 'blocks/w' has to be above 0, got 0.0; .* frozen"),
    ({"frozen": ("*",)}, "all weights are frozen by \\*"),
    ({"freeze": Freeze(("nothing/*",), 2)}, "no path matches 'nothing/\\*'"),
    ({"freeze": Freeze(("blocks/*",), 2), "frozen": ("embedding/*",)}, "all weights are frozen for the first 2 steps")])
def test_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(AdamW(), Constant(0.1), **fields).transform(SPEC)


KINDS = [AdamW(), Lion(weight_decay=0.3), Adafactor(weight_decay=0.1), Muon()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_what_is_frozen_at_first_then_begins(kind):
    """Nothing of it moves, decay included; then it does what an optimizer's first steps do, all others what they would have."""
    held, free = ("blocks/*",), ("embedding/tokens",)
    given = {"clip": None, "decayed": ("*",)}
    later = Optimizer(kind, Constant(0.01), freeze=Freeze(held, 2), **given)
    start = {path: np.asarray(weight) for path, weight in paths(WEIGHTS).items()}
    for steps in (1, 2):
        found = run(later, steps)
        assert all(found[path].tobytes() == start[path].tobytes() for path in start if path not in free)
    found, fresh = run(later), run(Optimizer(kind, Constant(0.01), **given), 2, gradients=GRADIENTS[2:])
    unfrozen = run(Optimizer(kind, Constant(0.01), **given))
    for path in start:
        np.testing.assert_allclose(found[path], (unfrozen if path in free else fresh)[path], rtol=1e-5, err_msg=path)
        assert not np.array_equal(found[path], start[path])


def test_what_is_frozen_at_first_does_not_count_when_the_gradient_is_clipped():
    """Until it is free."""
    wild = jax.tree.map(lambda leaf: leaf, GRADIENTS[0])
    wild["embedding"] = {"tokens": jnp.full((5, 4), jnp.inf)}
    plain = AdamW(b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0)  # its update is the gradient over epsilon
    given = {"kind": plain, "schedule": Constant(1e6), "clip": 0.5}
    later = Optimizer(**given, freeze=Freeze(("embedding/*",), 1))
    want = run(Optimizer(**given, frozen=("embedding/*",)), 1)
    check(run(later, 1, gradients=[wild]), want)
    both = run(later, 2, gradients=[wild, GRADIENTS[1]])
    norm = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(GRADIENTS[1])))
    for path, weight in want.items():
        np.testing.assert_allclose(weight - both[path], 0.5 / norm * paths(GRADIENTS[1])[path], rtol=2e-3, atol=1e-5)

"""A step beside the whole batch in NumPy: accumulation, what is drawn, skipping, the average."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import sharding
from jaxlm.params import Param
from jaxlm.training import step as steps
from jaxlm.training.optimizer import AdamW, Freeze, Optimizer

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=8).astype(np.float32)
WEIGHT = np.array([1, 0, 2, 1, 0, 0, 3, 0.5], np.float32)
BATCH = {"x": X, "y": Y, "weight": WEIGHT}
START = {"w": jnp.array([0.5, -1.0, 2.0])}


@flax.struct.dataclass
class Loss:
    sum: jax.Array
    weight: jax.Array
    aux: dict


def squares(params, batch, key, carry):
    error, weight = batch["x"] @ params["w"] - batch["y"], batch["weight"]
    return Loss(jnp.sum(weight * error**2), jnp.sum(weight), {"absolute": jnp.sum(weight * jnp.abs(error))}), carry


def by_hand(rows=slice(None)):
    error = X[rows].astype(np.float64) @ np.asarray(START["w"]) - Y[rows]
    weight = WEIGHT[rows] / WEIGHT[rows].sum()
    return (weight * error**2).sum(), 2 * (weight * error) @ X[rows], (weight * np.abs(error)).sum()


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_accumulation_is_exact_however_the_weights_fall(pieces):
    """Some pieces have no weight at all."""
    gradient, _, metrics = jax.jit(steps.gradients, static_argnums=(0, 5))(squares, START, BATCH, jax.random.key(0), (), pieces)
    loss, want, absolute = by_hand()
    np.testing.assert_allclose(gradient["w"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.aux["absolute"], absolute, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, np.linalg.norm(want), rtol=1e-5)
    assert metrics.weight == WEIGHT.sum() and metrics.finite


def test_pieces_move_nothing_between_devices():
    """Each takes a part of every device's examples, so only gradients are summed, once per piece at most."""
    mesh = sharding.mesh(devices=jax.devices()[:4], data=4)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put({name: np.tile(leaf, (2, *[1] * (leaf.ndim - 1))) for name, leaf in BATCH.items()}, place)
    program = jax.jit(steps.gradients, static_argnums=(0, 5)).lower(squares, START, batch, jax.random.key(0), (), 2).compile()
    text = program.as_text()
    assert "all-to-all" not in text and "collective-permute" not in text and "all-gather" not in text
    gradient, *_ = program(START, batch, jax.random.key(0), ())
    np.testing.assert_allclose(gradient["w"], by_hand()[1], rtol=1e-5)


@pytest.mark.parametrize("pieces", [1, 4])
def test_what_the_loss_hands_on(pieces):
    """From piece to piece and from step to step, and nothing flows back through it."""
    def follows(params, batch, key, carry):
        error = batch["x"] @ params["w"] - batch["y"] + carry["last"]
        return Loss(jnp.sum(error**2), jnp.float32(len(error)), {}), {"last": jnp.sum(batch["x"] @ params["w"]),
                                                                      "count": carry["count"] + 1}

    transform, carry = optax.sgd(0.1), {"last": jnp.float32(0.5), "count": jnp.int32(0)}
    state = steps.begin(START, transform, jax.random.key(0), carry=carry)
    step = jax.jit(lambda state, batch: steps.advance(follows, transform, state, batch, pieces=pieces, skip=True))
    w, last = np.asarray(START["w"], np.float64), 0.5
    for _ in range(2):
        gradient = np.zeros(3)
        for rows in (np.arange(8)[piece::pieces] for piece in range(pieces)):
            gradient += 2 * (X[rows] @ w - Y[rows] + last) @ X[rows] / 8
            last = (X[rows] @ w).sum()
        w = w - 0.1 * gradient
        state, _ = step(state, BATCH)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(state.carry["last"], last, rtol=1e-5)
    assert state.carry["count"] == 2 * pieces
    skipped, metrics = step(state, BATCH | {"x": np.full_like(X, np.inf)})
    assert not metrics.finite and skipped.carry["count"] == 2 * pieces and skipped.carry["last"] == state.carry["last"]


def advance(state, batch=BATCH, **options):
    transform = optax.sgd(0.1)
    return jax.jit(lambda state, batch: steps.advance(squares, transform, state, batch, **options))(state, batch)


def test_an_update_and_the_average():
    state = steps.begin(START, optax.sgd(0.1), jax.random.key(0), average=True)
    new, _ = advance(state, keep=0.75)
    want = np.asarray(START["w"]) - 0.1 * by_hand()[1]
    np.testing.assert_allclose(new.params["w"], want, rtol=1e-5)
    np.testing.assert_allclose(new.average["w"], 0.75 * np.asarray(START["w"]) + 0.25 * want, rtol=1e-5)
    assert new.step == 1
    again, _ = advance(new, keep=0.75)
    assert again.step == 2 and not np.allclose(again.params["w"], new.params["w"])


@pytest.mark.parametrize(("average", "keep"), [(True, None), (False, 0.9)])
def test_an_average_and_how_it_is_kept_go_together(average, keep):
    with pytest.raises(ValueError, match="keep is for a state with an average"):
        advance(steps.begin(START, optax.sgd(0.1), jax.random.key(0), average=average), keep=keep)


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_not_finite_is_told_and_may_be_skipped(skip):
    state = steps.begin(START, optax.sgd(0.1), jax.random.key(0))
    bad = BATCH | {"x": np.where(np.arange(8)[:, None] == 2, np.inf, X).astype(np.float32)}
    new, metrics = advance(state, bad, skip=skip)
    assert not metrics.finite and new.step == 1
    assert np.isfinite(new.params["w"]).all() == skip
    if skip:
        np.testing.assert_array_equal(new.params["w"], START["w"])
        _, metrics = advance(new)
        assert metrics.finite


def test_weights_that_overflow_are_not_finite_though_the_gradient_is():
    def go(rate, **options):
        transform = optax.sgd(rate)
        state = steps.begin(START, transform, jax.random.key(0))
        return jax.jit(lambda state, batch: steps.advance(squares, transform, state, batch, **options))(state, BATCH)

    new, metrics = go(3e38)
    assert not np.isfinite(new.params["w"]).all() and np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm)
    assert not metrics.finite
    assert go(1e15)[1].finite
    new, metrics = go(3e38, skip=True)
    assert not metrics.finite
    np.testing.assert_array_equal(new.params["w"], START["w"])


def test_the_schedule_goes_on_over_skipped_steps_and_moments_do_not():
    """So the rate of a step is the schedule's of that step, and Adam corrects by the gradients that it saw."""
    transform = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 * (step + 1)))
    step = jax.jit(lambda state, batch: steps.advance(squares, transform, state, batch, skip=True)[0])
    first = steps.begin(START, transform, jax.random.key(0))
    skipped = first
    for _ in range(3):
        skipped = step(skipped, BATCH | {"y": np.full(8, np.nan, np.float32)})
    np.testing.assert_array_equal(skipped.params["w"], START["w"])
    once, later = (np.asarray(step(state, BATCH).params["w"]) - np.asarray(START["w"]) for state in (first, skipped))
    np.testing.assert_allclose(later, 4 * once, rtol=1e-5)


def test_what_is_frozen_at_first_counts_skipped_steps_and_waits_with_its_moments():
    """So it is free at the same step as the schedule says; Adam's correction is that of a first update then."""
    spec = {name: Param((3,), (None,)) for name in START} | {"b": Param((3,), (None,))}
    optimizer = Optimizer(AdamW(weight_decay=0.0), lambda step: 0.1, clip=None, freeze=Freeze(("w",), 2))
    transform, start = optimizer.transform(spec), START | {"b": jnp.zeros(3)}

    def both(params, batch, key, carry):
        return squares({"w": params["w"] + params["b"]}, batch, key, carry)

    step = jax.jit(lambda state, batch: steps.advance(both, transform, state, batch, skip=True)[0])
    bad = BATCH | {"y": np.full(8, np.nan, np.float32)}
    state = step(step(steps.begin(start, transform, jax.random.key(0)), bad), BATCH)
    np.testing.assert_array_equal(state.params["w"], START["w"])
    assert state.params["b"].all()
    state = step(state, BATCH)
    np.testing.assert_allclose(np.abs(state.params["w"] - START["w"]), 0.1, rtol=1e-4)


def test_what_is_drawn_depends_on_key_step_and_piece_alone():
    def noisy(params, batch, key, carry):
        return Loss(params["w"].sum() + jax.random.uniform(key), jnp.float32(1.0), {}), carry

    def draw(seed, step, pieces=1):
        state = steps.begin(START, optax.sgd(0.0), jax.random.key(seed)).replace(step=jnp.int32(step))
        return float(steps.advance(noisy, optax.sgd(0.0), state, BATCH, pieces=pieces)[1].loss)

    assert draw(0, 3) == draw(0, 3) and len({draw(0, 3), draw(0, 4), draw(1, 3), draw(0, 3, 2)}) == 4


@pytest.mark.parametrize(("batch", "pieces"), [(BATCH, 3), (BATCH | {"y": Y[:4]}, 2)])
def test_pieces_must_divide_the_batch(batch, pieces):
    with pytest.raises(ValueError, match=f"examples cannot be taken in {pieces} pieces"):
        steps.gradients(squares, START, batch, jax.random.key(0), (), pieces)

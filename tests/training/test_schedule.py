"""Schedules beside their formulas in NumPy, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training.schedule import Constant, Cosine, InverseSquareRoot, Linear, Power, WarmupStableDecay

WARM, STEPS = 4, 20


def warm(step):
    return min((step + 1) / (WARM + 1), 1.0)


def progress(step):
    return min(max(step - WARM, 0) / (STEPS - WARM), 1.0)


def stable(step, curve):
    """Down over steps 10 to 15, then at the floor of 0.1."""
    fallen = min(max(step - 10, 0) / 5, 1.0)
    return 1 - 0.9 * curve(fallen)


def power(step):
    rate = min(8 * 4.0 * ((max(step, WARM) + 1) * 4096) ** -0.51, 0.3) / 0.3
    return rate * (0.1 + 0.9 * min(max(20 - max(step, WARM), 0) / 6, 1.0))


CASES = {
    "constant": (Constant(0.3, WARM), lambda step: 1.0),
    "cosine": (Cosine(0.3, WARM, STEPS, 0.1), lambda step: 0.1 + 0.9 * (1 + np.cos(np.pi * progress(step))) / 2),
    "linear": (Linear(0.3, WARM, STEPS, 0.1), lambda step: 1 - 0.9 * progress(step)),
    "inverse square root": (InverseSquareRoot(0.3, WARM), lambda step: np.sqrt(4 / (4 + max(step - WARM, 0)))),
    "of another scale": (InverseSquareRoot(0.3, WARM, 9), lambda step: np.sqrt(9 / (9 + max(step - WARM, 0)))),
    "wsd": (WarmupStableDecay(0.3, WARM, 15, 0.1, decay_steps=5), lambda step: stable(step, lambda x: x)),
    "wsdc": (WarmupStableDecay(0.3, WARM, STEPS, 0.1, decay_steps=5, constant_steps=5, curve="sqrt"),
             lambda step: stable(step, np.sqrt)),
    "power": (Power(0.3, WARM, STEPS, 0.1, tokens_per_step=4096, batch=8, decay_steps=6), power),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    schedule, share = CASES[name]
    want = [0.3 * warm(step) * share(step) for step in range(STEPS + 6)]
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(STEPS + 6)), want, rtol=1e-5)
    assert schedule(3).dtype == jnp.float32


def test_power_does_not_depend_on_how_long_training_is():
    short, long = (Power(1.0, 2, steps, tokens_per_step=10**6, batch=64) for steps in (50, 5000))
    np.testing.assert_array_equal(jax.vmap(short)(jnp.arange(50)), jax.vmap(long)(jnp.arange(50)))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Cosine(1.0, 5, 5), "more steps than its warm-up"), (lambda: Linear(1.0, 1, 5, 1.5), "a floor of 0 to 1"),
    (lambda: Constant(-1.0), "not negative"), (lambda: InverseSquareRoot(1.0, 0), "at least 1"),
    (lambda: WarmupStableDecay(1.0, 1, 9), "decay_steps must be at least 1"),
    (lambda: WarmupStableDecay(1.0, 4, 9, decay_steps=3, constant_steps=3), "9 steps hold no 4 of warm-up, 3 of decay and 3"),
    (lambda: WarmupStableDecay(1.0, 1, 9, decay_steps=3, curve="cubic"), "linear or sqrt"),
    (lambda: Power(1.0, 1, 9, exponent=0.5), "an exponent of at most 0")])
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Batches as `jaxlm.data.stream` packs them, from examples written out, and a few steps on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import model, params
from jaxlm.recipe import REMAT
from jaxlm.training import step
from tests import tiny


def filled(names, rows, length):
    """Arrays by name: in each row what the examples of it have, one behind the other, and how many there are before each."""
    out = {name: np.zeros((len(rows), length), np.float32 if name == "weights" else np.int32) for name in names}
    for row, examples in enumerate(rows):
        used = 0
        for number, one in enumerate(examples, start=1):
            end = used + len(one[0])
            for name, values in zip(names, (*one, number), strict=True):
                out[name][row, used:end] = values
            used = end
    return out


def texts(rows, length):
    """Of `Text`s."""
    return filled(("tokens", "targets", "weights", "segments"), [[one[:3] for one in row] for row in rows], length)


def pairs(rows, inputs, targets):
    """Of (inputs, targets)."""
    found = filled(("inputs", "input_segments"), [[(one[0],) for one in row] for row in rows], inputs)
    found |= filled(("targets", "segments"), [[(one[1],) for one in row] for row in rows], targets)
    return found | {"weights": (found["segments"] > 0).astype(np.float32)}


def trained(objective, cfg, batch, rate=1e-2):
    """What three steps on the same batch tell, the weights before them and the state after; also in bfloat16, as shapes."""
    spec = model.spec(cfg) | {"extra": objective.extra(cfg)}
    carry, rule = objective.carry(cfg), optax.adam(rate)

    @tiny.jit
    def begin(key):
        return step.begin(params.init(spec, key), rule, key, False, params.init(carry, key))

    @tiny.jit
    def advance(state, batch):
        return step.advance(lambda weights, *given: objective.loss(weights, cfg, *given), rule, state, batch)

    told, state = [], begin(jax.random.key(0))
    weights = state.params
    for _ in range(3):
        state, metrics = advance(state, batch)
        told.append(metrics)
    assert told[2].loss < told[0].loss

    def half(state):
        return objective.loss(state.params, cfg, batch, state.key, state.carry, dtype=jnp.bfloat16, remat=REMAT["products"])

    found, carry = jax.eval_shape(half, state)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, carry))} == {np.dtype(np.float32)}
    assert jax.tree.structure(carry) == jax.tree.structure(state.carry)
    return told, weights, state

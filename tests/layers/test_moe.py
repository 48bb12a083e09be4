"""The mixture of experts against the oracle: outputs, what is dropped, what the statistics say; of every router."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, params
from jaxlm.layers import moe, router
from jaxlm.layers.mask import describe
from jaxlm.weight import Int8, dense
from tests import oracle, tiny

MOES = tiny.MOES
X = np.random.default_rng(0).normal(size=(2, 7, 16))
TOKENS = np.asarray(tiny.tokens(2, 7))
LENGTHS = np.array([7, 4])
POSITIONS = np.where(np.arange(7)[None] < LENGTHS[:, None], np.arange(7)[None], -1).astype(np.int32)
GRU = tiny.weights(router.shared_spec(MOES["recurrent"].router))
STATE = np.random.default_rng(1).normal(size=(2, 7, 5))


def context(positions=POSITIONS):
    return describe([], 2, 7, positions).replace(tokens=jnp.asarray(TOKENS), routing=GRU)


def first_state(cfg):
    return jnp.asarray(STATE, jnp.float32) if isinstance(cfg.router, config.Recurrent) else None


def run(cfg, positions=POSITIONS):
    return tiny.jit(lambda weights, x: moe.apply(weights, cfg, x, context(positions), first_state(cfg)))


def known():
    routers = oracle.Routers(TOKENS, GRU)
    routers.states = {place: STATE[place] for place in np.ndindex(2, 7)}
    return routers


@pytest.mark.parametrize("name", MOES)
def test_equals_numpy(name):
    """With padding, whose vectors are huge: it takes no room and counts nowhere."""
    cfg, routers = MOES[name], known()
    weights = tiny.weights(moe.spec(cfg, 16))
    x = np.where(POSITIONS[..., None] >= 0, X, 30 * X)
    out, routing, state = run(cfg)(weights, jnp.asarray(x, jnp.float32))
    want, did = oracle.moe(weights, cfg, x, POSITIONS, routers)
    valid = POSITIONS >= 0
    np.testing.assert_allclose(np.asarray(out)[valid], want[valid], atol=3e-5)
    assert (state is None) == (first_state(cfg) is None)
    if state is not None:
        after = np.stack([[routers.states[b, t] for t in range(7)] for b in range(2)])
        np.testing.assert_allclose(np.asarray(state)[valid], after[valid], atol=1e-5)
    for field in dataclasses.fields(routing):
        ours, theirs = getattr(routing, field.name), did[field.name]
        assert (ours is None) == (theirs is None), field.name
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5, err_msg=field.name)
    assert routing.tokens == 11 and (routing.dropped > 0) == (cfg.capacity is not None)


def test_no_token_at_all():
    """A row of padding alone, of a mixture that bounds and of one where experts choose."""
    for name in ("capacity", "choice", "softmax"):
        weights = tiny.weights(moe.spec(MOES[name], 16))
        out, routing, _ = run(MOES[name], np.full((2, 7), -1, np.int32))(weights, jnp.asarray(X, jnp.float32))
        assert np.all(np.isfinite(out)) and not routing.tokens and not np.any(routing.load) and not routing.dropped


@pytest.mark.parametrize("capacity", [config.CapacityTokens(2), config.CapacityFactor(1.0)], ids=["tokens", "factor"])
def test_first_come_first_served_and_first_choices_before_second(capacity):
    """Six tokens in one row choose (0, 1), (0, 1), (1, 0), (0, 1), padding, (1, 2): room for 2 or ceil(1 * 2 * 6 / 6)."""
    cfg = config.Moe(6, config.Dense(4), config.TopK(2), capacity=capacity)
    experts = jnp.array([[[0, 1], [0, 1], [1, 0], [0, 1], [6, 6], [1, 2]]])
    kept = moe._kept(cfg, experts)[0].tolist()
    assert kept == [[True, False], [True, False], [True, False], [False, False], [False, False], [True, True]]


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_dropped_is_what_a_loop_drops(k):
    """Any choices, padding anywhere, experts that nobody chooses."""
    cfg = config.Moe(4, config.Dense(4), config.TopK(k), capacity=config.CapacityTokens(3))
    kept = tiny.jit(lambda experts: moe._kept(cfg, experts))

    @hypothesis.given(st.lists(st.one_of(st.just([4] * k), st.permutations(range(4)).map(lambda all: all[:k])),
                               min_size=9, max_size=9))
    def check(row):
        want, taken = np.zeros((9, k), bool), [0] * 4
        for choice in range(k):
            for t, experts in enumerate(row):
                if experts[choice] < 4 and taken[experts[choice]] < 3:
                    taken[experts[choice]] += 1
                    want[t, choice] = True
        np.testing.assert_array_equal(kept(np.array([row], np.int32))[0], want)

    check()


GRADIENTS = ["groups", "capacity", "recurrent", "relu", "keys", "choice"]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_slow_form(name):
    """Finite differences of the oracle along a direction in which no choice changes."""
    cfg = MOES[name]
    weights = tiny.weights(moe.spec(cfg, 16))
    given = np.random.default_rng(2).normal(size=X.shape) * (POSITIONS >= 0)[..., None]
    step = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape), (weights, X))

    def ours(weights, x):
        out, *_ = moe.apply(weights, cfg, x, context(), first_state(cfg))
        return jnp.sum(out * given.astype(np.float32))

    gradient = tiny.jit(jax.grad(ours, (0, 1)))(weights, jnp.asarray(X, jnp.float32))
    got = sum(np.sum(np.asarray(one, np.float64) * two)
              for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))

    def theirs(size):
        moved, x = jax.tree.map(lambda leaf, way: np.asarray(leaf, np.float64) + size * way, (weights, X), step)
        if "correction" in moved.get("router", {}):  # moves choices alone
            moved["router"]["correction"] = weights["router"]["correction"]
        return np.sum(oracle.moe(moved, cfg, x, POSITIONS, known())[0] * given)

    want = (theirs(1e-6) - theirs(-1e-6)) / 2e-6
    np.testing.assert_allclose(got, want, rtol=2e-4)
    if "correction" in weights.get("router", {}):
        assert not np.any(gradient[0]["router"]["correction"])
    else:
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["clip", "relu", "keys", "choice"])
def test_eight_bit_experts(name):
    """One scale per expert and column; the layer is that of the matrices that they stand for."""
    cfg = MOES[name]
    spec = moe.spec(cfg, 16)
    weights = tiny.quantised(spec, tiny.weights(spec))
    assert isinstance(weights["experts"]["up"], Int8) and weights["experts"]["up"].scale.shape == (4, 1, 6)
    assert weights["experts"]["down"].scale.shape == (4, 1, 16)
    plain = jax.tree.map(dense, weights, is_leaf=lambda leaf: isinstance(leaf, Int8))
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(run(cfg)(weights, x)[0], run(cfg)(plain, x)[0], atol=2e-5)


def test_bfloat16():
    """Products in bfloat16, the router's in float32: it chooses as it does in float32."""
    cfg = MOES["groups"]
    weights = tiny.weights(moe.spec(cfg, 16))
    x = jnp.asarray(X, jnp.bfloat16)
    out, routing, _ = run(cfg)(weights, x)
    want, exact, _ = run(cfg)(weights, x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(routing.experts, exact.experts)
    np.testing.assert_allclose(np.asarray(out, np.float32)[POSITIONS >= 0], np.asarray(want)[POSITIONS >= 0], atol=0.15)


def test_weights_are_laid_out_by_expert():
    spec = moe.spec(MOES["gate"], 16)
    assert {path: (param.shape, param.axes, param.inputs) for path, param in params.paths(spec).items()} == {
        "router/product": ((16, 6), ("embed", None), (0,)),
        "experts/gate": ((6, 16, 6), ("experts", "expert_embed", "mlp"), (1,)),
        "experts/up": ((6, 16, 6), ("experts", "expert_embed", "mlp"), (1,)),
        "experts/down": ((6, 6, 16), ("experts", "mlp", "expert_embed"), (1,)),
        "shared/up": ((16, 8), ("embed", "mlp"), (0,)), "shared/down": ((8, 16), ("mlp", "embed"), (0,)),
        "shared_gate": ((16, 1), ("embed", None), (0,))}

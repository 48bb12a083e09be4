"""What routers decide, by hand; that they equal the oracle's is tested with the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import AverageKey, Dense, ExpertGroups, Hash, Moe, Recurrent, Score, TopK
from jaxlm.layers import router
from jaxlm.layers.mask import describe
from tests import oracle, tiny

CONTEXT = describe([], 1, 1)


def decide(choice, logits, **weights):
    """The decision for one token whose logits are these."""
    logits = jnp.asarray(logits, jnp.float32)
    cfg = Moe(len(logits), Dense(2), choice)
    weights = {"product": jnp.eye(len(logits))} | {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    decision, state = router.apply(weights, cfg, logits[None, None], CONTEXT, None, None)
    assert state is None
    return decision.experts[0, 0].tolist(), decision.weights[0, 0], decision


def test_softmax_before_the_choice_or_after_it():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    experts, weights, decision = decide(TopK(2), logits)
    assert experts == [1, 3]
    np.testing.assert_allclose(weights, [0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(decision.scores[0, 0], [0.1, 0.4, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(decide(TopK(2, normalize=True), logits)[1], jax.nn.softmax(logits[[1, 3]]), rtol=1e-6)
    np.testing.assert_allclose(decide(TopK(2, scale=2.0), logits)[1], [0.8, 0.6], rtol=1e-6)
    experts, weights, _ = decide(TopK(1, bias=True), logits, bias=np.log([9.0, 1.0, 1.0, 1.0]))
    assert experts == [0]
    np.testing.assert_allclose(weights, [0.5], rtol=1e-6)


def test_a_correction_moves_the_choice_and_not_the_weights():
    """DeepSeek-V3: sigmoids, of which the chosen ones are divided by their sum."""
    scores = np.array([0.6, 0.5, 0.4, 0.1])
    experts, weights, decision = decide(TopK(2, Score.SIGMOID, normalize=True, scale=2.5, correction=True),
                                        np.log(scores / (1 - scores)), correction=[-0.15, -0.3, 0.0, 0.36])
    assert experts == [3, 0]  # 0.46, 0.45, then 0.4, 0.2
    np.testing.assert_allclose(weights, 2.5 * np.array([0.1, 0.6]) / 0.7, rtol=1e-5)
    np.testing.assert_allclose(decision.scores[0, 0], scores / 1.6, rtol=1e-5)


@pytest.mark.parametrize("best, want", [(1, [6, 1]), (2, [4, 5])], ids=["by the highest", "by two"])
def test_groups_that_score_highest_alone(best, want):
    """Of four pairs of scores, (0, 0.8), (0.55, 0.5), (0.58, 0.56), (0.9, 0), two may be chosen from."""
    scores = np.clip([0.0, 0.8, 0.55, 0.5, 0.58, 0.56, 0.9, 0.0], 1e-6, 1)
    experts, _, _ = decide(TopK(2, Score.SIGMOID, groups=ExpertGroups(4, 2, best)), np.log(scores / (1 - scores)))
    assert experts == want


def test_a_group_outside_is_not_chosen_from_even_if_all_inside_are_negative():
    """With a correction scores may be below zero: what is outside is lower than all of them."""
    experts, _, _ = decide(TopK(2, Score.SIGMOID, groups=ExpertGroups(2, 1, 1), correction=True), [0.0, 0.0, 0.0, 0.0],
                           correction=[-1.0, -2.0, -3.0, -1.5])
    assert experts == [0, 1]


def test_hashes_spread_ids_evenly_over_different_experts():
    cfg, tokens = Moe(8, Dense(2), Hash(3, seed=1)), jnp.arange(4000)[None]
    decision, _ = router.apply({}, cfg, jnp.zeros((1, 4000, 4)), describe([], 1, 4000).replace(tokens=tokens), None, None)
    experts = np.asarray(decision.experts[0])
    assert all(len(set(row)) == 3 for row in experts)
    share = np.bincount(experts.ravel(), minlength=8) / experts.size
    np.testing.assert_allclose(share, 1 / 8, rtol=0.15)
    np.testing.assert_array_equal(experts[:50], [oracle.hashed(token, 3, 1, 8) for token in range(50)])
    assert np.mean(np.asarray(router._hashed(tokens, 3, 2, 8))[0, :, 0] != experts[:, 0]) > 0.8  # another seed
    np.testing.assert_allclose(decision.scores[0].sum(-1), 1, rtol=1e-6)


def test_a_hash_of_embeddings_is_refused():
    with pytest.raises(ValueError, match="a Hash router reads token ids, and this model was given embeddings"):
        router.apply({}, Moe(4, Dense(2), Hash()), jnp.zeros((1, 1, 4)), CONTEXT, None, None)


def test_average_keys_weigh_one():
    cfg, x = Moe(3, Dense(2), AverageKey(2)), jnp.array([[[1.0, 2.0]]])
    keys = jnp.array([[1.0, 0.0, 3.0], [1.0, 2.0, 0.0]])  # products 3, 4, 3: of equal ones the first
    decision, _ = router.apply({}, cfg, x, CONTEXT, None, keys)
    assert decision.experts[0, 0].tolist() == [1, 0] and decision.weights[0, 0].tolist() == [1.0, 1.0]


@pytest.mark.parity
def test_the_gru_is_that_of_torch():
    import torch

    cfg = Recurrent(5, TopK(2))
    weights = tiny.weights(router.shared_spec(cfg))
    x, state = np.random.default_rng(0).normal(size=(2, 1, 4, 5)).astype(np.float32)
    cell = torch.nn.GRUCell(5, 5)
    for name, ours in (("ih", "input"), ("hh", "state")):
        turned = np.asarray(weights[ours]).transpose(1, 2, 0).reshape(15, 5)
        getattr(cell, f"weight_{name}").data = torch.tensor(turned)
        getattr(cell, f"bias_{name}").data = torch.tensor(np.asarray(weights[f"{ours}_bias"]).reshape(15))
    want = cell(torch.tensor(x[0]), torch.tensor(state[0])).detach().numpy()
    np.testing.assert_allclose(router.gru(weights, jnp.asarray(x), jnp.asarray(state))[0], want, atol=1e-6)

"""`generate` with a draft model: drawn rules keep the distribution; meshes and bfloat16 change nothing that they need not."""

import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, generate, model, sharding
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import DraftModel, draft_model, make
from jaxlm.decoding.speculative.drafters.grow import Dynamic, Static, StochasticBeam
from jaxlm.model import Model
from tests import tiny
from tests.decoding import oracle, stubs
from tests.decoding.speculative.sampled import compare

VOCABULARY, LENGTH, ROWS, TEMPERATURE = 5, 3, 4096, 0.7
CFG = tiny.decoder([tiny.block(window=2), tiny.block()], embedding=config.Embedding(VOCABULARY), head=config.Head(tied=True))
PROMPT = [3, 1]


@functools.cache
def small(noise):
    """A model of a vocabulary of five, and with noise another that disagrees with it about every third token."""
    random = np.random.default_rng(2)
    return Model(CFG, jax.tree.map(lambda leaf: 0.8 * leaf + jnp.asarray(noise * random.normal(size=leaf.shape), jnp.float32),
                                   tiny.weights(model.spec(CFG))))


@functools.cache
def joint():
    """Exact probabilities [V, V, V] of three tokens of the first model after the prompt."""
    found = np.ones((VOCABULARY,) * LENGTH)
    for at in range(LENGTH):
        for path in itertools.product(range(VOCABULARY), repeat=at):
            found[path] *= shares(small(0.0), path).reshape(-1, *[1] * (LENGTH - at - 1))
    return found


def shares(lm, text):
    """Exact probabilities of the next token after the prompt and a text."""
    logits = model.forward(lm.params, CFG, jnp.asarray([[*PROMPT, *text]])).logits[0, -1]
    return oracle.softmax(np.asarray(logits, np.float64) / TEMPERATURE)


@pytest.mark.parametrize(("rule", "shape"), [
    ("chain", Static(trees.chain(2), "independent")),
    ("block", Static(trees.chain(2), "independent")),
    ("multi_round", Static(trees.branching(2, 1), "independent")),
    ("k_seq", Static(trees.branching(2, 2), "independent")),
    ("without_replacement", StochasticBeam(3, 2)),
    ("point_mass", Dynamic(4, 2, 2, 2)),
    ("match", Static(trees.branching(2, 1))),
])
def test_drawn_drafts_leave_the_distribution(rule, shape):
    """Three tokens of many rows, the first from the prefill, against all paths; drafts are accepted and rejected."""
    lm, draft = small(0.0), small(0.08)
    apart = np.abs(shares(lm, ()) - shares(draft, ())).sum() / 2
    assert 0.15 < apart < 0.85
    result = generate(lm, [PROMPT] * ROWS, LENGTH, temperature=TEMPERATURE, eos=(), key=11, drafter=draft_model(draft, shape),
                      rule=rule)
    assert result.speculation.exact == ("tokens" if rule == "match" else "distribution")
    emitted = result.speculation.emitted.sum(axis=0)
    assert emitted[0] > ROWS / 20 and emitted[1:].sum() > ROWS / 20
    distance, floor, tail = compare(np.stack(result.tokens), joint())
    print(f"{rule}: TV {distance:.4f}, of exact samples {np.mean(floor):.4f}, chi-square tail {tail:.3f}")
    assert tail > 1e-3 and distance < 1.5 * np.mean(floor)


def test_the_check_sees_a_wrong_draft():
    """Drafts drawn from another distribution than the one that rejection is told of: `chain` with logits of another model."""
    lm, draft = small(0.0), small(0.08)

    @flax.struct.dataclass
    class Liar(DraftModel):
        def propose(self, state, view):
            tree, state = super().propose(state, view)
            return tree.replace(logits=jnp.zeros_like(tree.logits)), state

    honest = draft_model(draft, Static(trees.chain(2), "independent"))
    liar = Liar(honest.params, honest.config, honest.shape, honest.dtype)
    result = generate(lm, [PROMPT] * ROWS, LENGTH, temperature=TEMPERATURE, eos=(), key=11, drafter=liar, rule="chain")
    distance, floor, tail = compare(np.stack(result.tokens), joint())
    assert tail < 1e-6 and distance > 2 * np.mean(floor)


def spread(lm, devices):
    return Model(lm.config, jax.device_put(lm.params, sharding.shardings(model.spec(lm.config), devices)), lm.tokenizer)


@functools.cache
def meshed():
    lm, devices = stubs.random("rope"), sharding.mesh(devices=jax.devices()[:4], data=2, model=2)
    return lm, spread(lm, devices), devices


@pytest.mark.parametrize("drafter", ["lookup+recycling", "aded", "layers:1", "model"])
def test_a_mesh_gives_the_same_tokens(drafter):
    lm, split, devices = meshed()
    prompts = ["abcabc", "hello hello", "x", "fourth"]
    asked = {"temperature": [0.0, 0.4, 0.9, 0.0], "logit_bias": {97: 6.0, 98: 5.5}, "key": 5, "logprobs": True}
    want = generate(lm, prompts, 16, **asked)
    out = generate(split, prompts, 16, drafter=split if drafter == "model" else drafter, tree=5, **asked)
    assert [row.tolist() for row in out.tokens] == [row.tolist() for row in want.tokens]
    for one, other in zip(out.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert out.speculation.tokens_per_call.max() > 1.2


def test_a_draft_model_elsewhere_is_refused():
    lm, split, _ = meshed()
    with pytest.raises(ValueError, match="draft model must be where the target is: it is on one device, the target on a mesh"):
        generate(split, "a", 2, drafter=lm)


@pytest.mark.parametrize("name", [pytest.param("lookup+recycling", marks=pytest.mark.slow), "model"])
def test_bfloat16_parts_from_plain_decoding_only_at_ties(name):
    """Sums in another order round to other bfloat16: where texts part, the two tokens' logits are next to equal."""
    lm, prompts = stubs.random("rope"), ["abcabc", "hello hello", "x"]
    asked = {"max_new_tokens": 24, "logit_bias": {97: 3.0, 98: 2.5}, "dtype": jnp.bfloat16, "eos": (), "logprobs": True}
    plain = generate(lm, prompts, **asked)
    other = generate(lm, prompts, drafter=lm if name == "model" else name, tree=6, **asked)
    assert other.speculation.tokens_per_call.max() > 1.1
    for ours, theirs, mine, its in zip(plain.tokens, other.tokens, plain.logprobs, other.logprobs, strict=True):
        same = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        np.testing.assert_allclose(mine[:same], its[:same], atol=0.1)
        assert same == len(ours) or abs(mine[same] - its[same]) < 0.1


@pytest.mark.slow
def test_a_model_draws_as_the_rule_needs():
    lm = stubs.random("rope")
    drawn = make(lm, 4, lm, 1, draws="independent")
    assert drawn.draws == "independent" and drawn.nodes == 4 and drawn.depth == 3
    assert make("layers:1", trees.branching(2), lm, 1, draws="distinct").draws == "distinct"
    for rule in ("chain", "block", "multi_round", "k_seq", "without_replacement", "match"):
        did = generate(lm, "abc", 8, drafter=lm, rule=rule, temperature=0.5, eos=()).speculation
        assert did.tokens_per_call[0] > 2, rule

"""Generation from a prefix that all of the prompt sees, against whole forward passes without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import beam_search, generate, model, score, sharding
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import Lookup, Recycling, Union, draft_model, first_layers
from jaxlm.decoding.speculative.drafters.base import Start
from jaxlm.decoding.speculative.drafters.grow import Static
from jaxlm.model import Model
from tests import tiny
from tests.decoding import oracle, stubs, test_beam
from tests.decoding.test_score import expected

PROMPTS = [[256, *b"hello"], [256, 97], [256, *b"The cafe"]]
NEW = 10
MIXED = {"temperature": [0.0, 0.2, 0.5], "top_p": [0.5, 1.0, 0.9]}
SEEN = [4, 1, 9]  # of each prompt's 6, 2 and 9 tokens


@functools.cache
def whole(name):
    """(text, prefix, prompt's length) -> logits [T, V] of a forward pass of one row."""
    lm = stubs.random(name)

    @jax.jit
    def run(text, length, prefix, prompted):
        return model.forward(lm.params, lm.config, text[None], lengths=length[None], prefix=prefix[None],
                             context=prompted[None]).logits[0]

    def logits(text, prefix, prompted):
        given = (jnp.asarray(np.pad(text, (0, 32 - len(text))), jnp.int32), *map(jnp.int32, (len(text), prefix, prompted)))
        return np.asarray(run(*given))[:len(text)]
    return logits


def slow(name, row, prefix, limit=NEW, **settings):
    """One row's tokens by the obvious loop."""
    prompt = PROMPTS[row]
    tokens, gap = oracle.generate(lambda text: whole(name)(text, prefix, len(prompt))[-1], prompt, limit,
                                  jax.random.fold_in(jax.random.key(0), row), (), **settings)
    assert gap > 1e-4, "a close call: choose another seed"
    return tokens


def lists(out):
    return [row.tolist() for row in out.tokens]


@functools.cache
def plain(name):
    return generate(stubs.random(name), PROMPTS, NEW, **MIXED, eos=(), prefix=True, logprobs=True)


@pytest.mark.parametrize("name", ["rope", "scaled"])
def test_rows_equal_the_slow_loop(name):
    """Windows and rotations that the prompt's length scales; greedy and sampled rows of unequal prompts. Models of one layer
    would not do: there a prompt's last token sees the same whatever those before it see."""
    lm = stubs.random(name)
    some = generate(lm, PROMPTS, NEW, **MIXED, eos=(), prefix=np.asarray(SEEN), logprobs=True)
    for out, seen in ((plain(name), [len(prompt) for prompt in PROMPTS]), (some, SEEN)):
        for row, prefix in enumerate(seen):
            assert lists(out)[row] == slow(name, row, prefix, **{field: values[row] for field, values in MIXED.items()})
    if name == "rope":
        causal, zeros = (generate(lm, PROMPTS, NEW, **MIXED, eos=(), prefix=prefix, logprobs=True)
                         for prefix in (None, [0, False, 0]))
        assert lists(causal) == lists(zeros) and lists(causal)[1] == lists(some)[1]  # a prefix of one token is none
        before, after = (np.array([row[0] for row in out.logprobs]) for out in (causal, plain(name)))
        assert np.all(np.abs(before - after) > 1e-3)


def test_tokens_before_a_row_change_nothing():
    lm, (one, other) = stubs.random("rope"), (PROMPTS[0], PROMPTS[2])
    places = [np.arange(12) - (12 - len(row)) for row in (one, other)]
    tokens = jnp.asarray([[0] * (12 - len(row)) + row for row in (one, other)], jnp.int32)
    positions = jnp.asarray(np.maximum(places, -1), jnp.int32)
    got = tiny.jit(lambda params: model.forward(params, lm.config, tokens, positions=positions,
                                                prefix=jnp.array([4, 9], jnp.int32)).logits)(lm.params)
    for row, (text, prefix) in enumerate(((one, 4), (other, 9))):
        np.testing.assert_allclose(got[row, 12 - len(text):], whole("rope")(text, prefix, len(text)), atol=1e-4)


DRAFTERS = {
    "joined": lambda: Union((Lookup(length=5), Recycling(trees.branching(4, 2))), (10,)),
    "model": lambda: draft_model(stubs.random("alibi"), Static(trees.branching(2, 2))),
    "layers": lambda: first_layers(stubs.random("rope"), 2),
}


@pytest.mark.parametrize("name", ["joined", "model", pytest.param("layers", marks=pytest.mark.slow)])
def test_plain_equals_speculative(name):
    out = generate(stubs.random("rope"), PROMPTS, NEW, **MIXED, eos=(), prefix=True, logprobs=True, drafter=DRAFTERS[name]())
    assert lists(out) == lists(plain("rope"))
    np.testing.assert_allclose(out.logprobs, plain("rope").logprobs, atol=1e-4)


def test_a_draft_model_reads_the_prefix_as_the_target_does():
    """The target itself drafts: all that it says is accepted, by another rule too, which it is not where it has read the prompt
    in another way."""
    lm = stubs.random("rope")
    asked = {"temperature": [0.0, 0.7, 1.0], "max_new_tokens": 13, "eos": (), "prefix": True}
    out = generate(lm, PROMPTS, drafter=lm, rule="chain", tree=trees.chain(3), **asked)
    assert out.speculation.exact == "distribution" and out.speculation.tokens_per_call.tolist() == [4.0] * 3
    assert lists(out)[0] == slow("rope", 0, 6, limit=13)


def test_recycling_learns_nothing_from_within_a_prefix():
    lengths = jnp.array([4, 2])
    start = Start(jnp.zeros((2, 5), jnp.int32), lengths, None, 8, 9, prefix=jnp.array([3, 0]))
    assert start.predicted().tolist() == [[False, False, True, True, False], [True, True, False, False, False]]
    assert start.replace(prefix=None).predicted().tolist() == start.valid().tolist()


def test_beams_equal_slow_ones():
    lm, eos = stubs.random("rope"), stubs.Bytes.eos_ids
    found = beam_search(lm, PROMPTS, 6, beams=3, returned=3, length_penalty=0.7, prefix=[True, 1, 5])
    for i, (prompt, prefix) in enumerate(zip(PROMPTS, (6, 1, 5), strict=True)):
        def last(text, prefix=prefix, prompted=len(prompt)):  # noqa: B008 (of this row)
            return whole("rope")(text, prefix, prompted)[-1]

        want = test_beam.oracle(last, prompt, 6, 3, eos, 0.7)
        assert lists(found)[3 * i:3 * i + 3] == [tokens for _, tokens in want]
        np.testing.assert_allclose(found.scores[3 * i:3 * i + 3], [value for value, _ in want], rtol=0, atol=1e-5)


def test_scores_are_those_of_a_forward_pass_and_of_generation():
    texts = [[*prompt, *row] for prompt, row in zip(PROMPTS, lists(plain("rope")), strict=True)]
    lengths = [len(prompt) for prompt in PROMPTS]
    scores = score(stubs.random("rope"), texts, prefix=lengths)
    for length, out, logprobs in zip(lengths, scores, plain("rope").logprobs, strict=True):
        assert not out[:length].any()
        np.testing.assert_allclose(out[length:], logprobs, atol=1e-4)
    for text, prefix, out in zip(texts, SEEN, score(stubs.random("rope"), texts, prefix=SEEN), strict=True):
        np.testing.assert_allclose(out[prefix:], expected(whole("rope")(text, prefix, len(text)), text)[prefix:], atol=1e-4)
        assert not out[:prefix].any()


@pytest.mark.slow
def test_a_mesh_gives_the_same_tokens():
    lm, prompts = stubs.random("rope"), [*PROMPTS, [9, 8, 7]]
    devices = sharding.mesh(devices=jax.devices()[:4], data=2, model=2)
    spread = Model(lm.config, jax.device_put(lm.params, sharding.shardings(model.spec(lm.config), devices)), lm.tokenizer)
    asked = {"temperature": [0.0, 0.2, 0.5, 0.0], "eos": (), "prefix": [True, 0, 5, 2]}
    assert lists(generate(spread, prompts, NEW, **asked)) == lists(generate(lm, prompts, NEW, **asked))


@pytest.mark.parametrize(("prefix", "said"), [
    ("all", "prefix must be True, a number of tokens, or one of them per row, got 'all'"),
    (2.0, "prefix must be True, a number of tokens, or one of them per row, got 2.0"),
    ([1, 2], r"prefix must be given once or once per row \(3\), got 2"),
    ([1, 1.5, 2], "the prefix of prompt 1 must be True or a whole number from 0 to its 2 tokens, got 1.5"),
    ([1, None, 2], "the prefix of prompt 1 must be True or a whole number from 0 to its 2 tokens, got None"),
    (np.array([7, 1, 2]), "the prefix of prompt 0 must be True or a whole number from 0 to its 6 tokens, got 7"),
    (-1, "the prefix of prompt 0 must be .* got -1"),
    (3, "the prefix of prompt 1 must be .* from 0 to its 2 tokens, got 3"),
])
def test_what_is_no_prefix_is_named(prefix, said):
    for ask in (generate, beam_search):
        with pytest.raises(ValueError, match=said):
            ask(stubs.random("rope"), PROMPTS, 4, prefix=prefix)
    with pytest.raises(ValueError, match=said):
        score(stubs.random("rope"), PROMPTS, prefix=prefix)


def test_where_there_is_no_prefix():
    lm = stubs.with_source("relative")
    for ask in (generate, beam_search):
        with pytest.raises(ValueError, match="prefix is for decoders: an encoder-decoder's encoder sees all of its source"):
            ask(lm, PROMPTS, 4, prefix=True)
    with pytest.raises(ValueError, match="prefix is for decoders"):
        score(lm, PROMPTS, sources=PROMPTS, prefix=1)
    with pytest.raises(ValueError, match="or one per row: of True nothing is left to score"):
        score(stubs.random("rope"), PROMPTS, prefix=True)

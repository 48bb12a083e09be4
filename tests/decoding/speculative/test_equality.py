"""Speculation gives the tokens of plain decoding: any model, drafter, tree, batch, settings, end of text."""

import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config, model
from jaxlm.decoding import generate as generating
from jaxlm.decoding.generate import generate
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import Lookup, Recycling, Union
from jaxlm.decoding.speculative.rules import Typical
from tests import tiny
from tests.decoding import stubs
from tests.decoding.speculative.scripted import chain_of, scripted

BATCH, NEW, VOCABULARY = 8, 20, stubs.VOCABULARY

CAPPED = tiny.decoder(
    [tiny.block(config.SandwichNorm(config.RmsNorm(offset=1.0)), position=config.Rope(base), window=window, softcap=5.0,
                scale=0.3) for base, window in ((100.0, 3), (10000.0, None))] * 2,
    config.RmsNorm(offset=1.0), config.Head(tied=True, softcap=3.0), config.Embedding(VOCABULARY, scale=4.0))


@functools.cache
def target(name):
    """Windows, ALiBi, sinks, learned positions, rotations that scale with the length, latents, experts, soft caps, 8-bit
    weights; sources."""
    if name in stubs.DECODERS:
        return stubs.random(name)
    if name in stubs.ENCODER_DECODERS:
        return stubs.with_source(name)
    spec = model.spec(CAPPED)
    weights = tiny.weights(spec)
    return model.Model(CAPPED, tiny.quantised(spec, weights) if name == "int8" else weights, stubs.Bytes())


TARGETS = [*stubs.DECODERS, "capped", "int8", *stubs.ENCODER_DECODERS]


@st.composite
def requests(draw):
    """A whole batch. The first row has everything on, so that all requests are one program."""
    def rows(first, values):
        return [first, *(draw(values) for _ in range(BATCH - 1))]

    prompts = [draw(st.lists(st.integers(0, 255), min_size=1, max_size=12)) for _ in range(BATCH)]
    return prompts, {
        "max_new_tokens": [NEW, *(draw(st.sampled_from([1, 2, 3, 8, 9, NEW])) for _ in range(BATCH - 1))],
        "temperature": rows(0.9, st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5])),
        "top_k": rows(50, st.sampled_from([1, 5, 50, VOCABULARY])), "top_p": rows(0.9, st.sampled_from([0.3, 0.9, 1.0])),
        "repetition_penalty": rows(1.2, st.sampled_from([0.8, 1.0, 1.3])),
        "presence_penalty": rows(0.3, st.sampled_from([-0.5, 0.0, 0.5])),
        "frequency_penalty": rows(0.2, st.sampled_from([-0.3, 0.0, 0.4])),
        # A favourite letter or two per row, so that texts repeat themselves, stop strings occur and lookups hit.
        "logit_bias": [{draw(st.integers(97, 104)): 6.0, draw(st.integers(97, 104)): 5.5} for _ in range(BATCH)],
        "stop_strings": [["aa", "bcb"], *([draw(st.sampled_from(["ab", "cc", "hgh", "zzz"]))] for _ in range(BATCH - 1))],
        "eos": draw(st.lists(st.integers(97, 104), max_size=2)), "key": draw(st.integers(0, 1000)), "logprobs": True}


def check(lm, prompts, asked, drafter):
    """Asks plainly and with the drafter, which may be a function of the plain texts."""
    begins, sources = generating.started(lm, prompts, None)
    if sources is not None:  # a start's tokens behind the first count as new
        asked = asked | {"max_new_tokens": (np.asarray(asked["max_new_tokens"]) + len(begins[0]) - 1).tolist()}
    plain = generate(lm, prompts, **asked)
    texts = [[*begin, *map(int, tokens)] for begin, tokens in zip(begins, plain.tokens, strict=True)]
    drafted = generate(lm, prompts, drafter=drafter(texts) if callable(drafter) else drafter, **asked)
    assert [row.tolist() for row in drafted.tokens] == [row.tolist() for row in plain.tokens]
    assert drafted.finish == plain.finish and drafted.text == plain.text
    for ours, theirs in zip(drafted.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    did = drafted.speculation
    emitted = did.emitted @ np.arange(1, did.emitted.shape[1] + 1)
    assert emitted.tolist() == [len(row) - 1 for row in drafted.tokens]  # the prefill gives the first
    assert did.exact == "tokens" and did.calls.tolist() == sum(did.sizes.values()).tolist()
    return did


SLOW = ("capped", "experts", "int8", "learned", "latent", "relative")  # their drafters are tested on every run


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TARGETS])
@settings(max_examples=12)
@given(requests(), st.integers(0, 2**31), st.sampled_from([0.2, 0.7, 0.95]))
def test_random_trees(name, request_, seed, right):
    check(target(name), *request_, lambda texts: scripted(texts, VOCABULARY, seed, right))


DRAFTERS = {
    "lookup": Lookup(length=4, nodes=9),
    "recycling": Recycling(trees.branching(3, 2, 1)),
    "union": Union((Lookup(length=5), Recycling(trees.branching(4, 2))), (10,)),
    "sizes": Union((Lookup(length=5), Recycling(trees.branching(4, 2))), (1, 3, 10), jnp.asarray([1.0, 1.2, 2.0])),
}


@pytest.mark.parametrize(("name", "drafter"), [pytest.param(name, drafter, marks=pytest.mark.slow if name == "sides" else ())
                                               for name, drafter in zip(TARGETS, itertools.cycle(DRAFTERS), strict=False)])
@settings(max_examples=12)
@given(requests())
def test_drafters(name, drafter, request_):
    """Each in turn, on all kinds of targets."""
    check(target(name), *request_, DRAFTERS[drafter])


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_text_that_repeats_itself_is_drafted(name):
    lm = stubs.markov(dict(zip(b"abcde", b"bcdea", strict=True)), stubs.Bytes())
    did = check(lm, [list(b"xa")], {"max_new_tokens": 32, "eos": (), "logprobs": True}, DRAFTERS[name])
    assert did.tokens_per_call[0] > 2
    if name == "sizes":
        assert did.sizes[1][0] and did.sizes[10][0]


class TestAdversaries:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_an_oracle_gets_depth_and_one(self, temperature):
        did = check(target("rope"), [list(b"abc"), list(b"defg")], {
            "max_new_tokens": 21, "temperature": temperature, "eos": (), "logprobs": True},
            lambda texts: chain_of(texts, VOCABULARY, 0))
        assert did.tokens_per_call.tolist() == [5.0, 5.0] and did.emitted[:, 4].tolist() == [4, 4]

    def test_the_always_wrong_get_one(self):
        did = check(target("rope"), [list(b"abc"), list(b"defg")], {"max_new_tokens": 9, "eos": (), "logprobs": True},
                    lambda texts: chain_of(texts, VOCABULARY, 1))
        assert did.tokens_per_call.tolist() == [1.0, 1.0]

    def test_all_texts_at_once_end_inside_the_path(self):
        """An oracle's path of 8 goes past the end of text, the limit and the stop string of these rows."""
        prompts = [list(b"abc"), list(b"defg"), list(b"h"), list(b"ij")]
        asked = {"max_new_tokens": [1, 2, 8, 20], "logit_bias": {97: 9.0, 98: 8.5, 99: 8.0}, "temperature": 1.0,
                 "stop_strings": [[], [], [], ["ab", "bc", "ca"]], "eos": (), "logprobs": True, "key": 3}
        free = generate(target("rope"), prompts, **{**asked, "stop_strings": None})
        check(target("rope"), prompts, asked, lambda texts: chain_of(
            [[*prompt, *map(int, tokens)] for prompt, tokens in zip(prompts, free.tokens, strict=True)], VOCABULARY, 0, 9))


def final(lm, prompts, asked, drafter):
    """The loop's last state."""
    names = ("top_k", "logit_bias", "banned_tokens", "stop_strings", "eos", "dtype", "rule", "tree", "drafter_state", "start",
             "prefix")
    off = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0, "key": 0, "logprobs": False, **dict.fromkeys(names)}
    *_, (state, _) = generating._Job(lm, prompts, **{**off, **asked}, drafter=drafter).run(None)
    return state


@pytest.mark.parametrize("name", ["rope", "learned"])
def test_the_cache_is_that_of_the_text_and_the_smallest_will_do(name, monkeypatch):
    """No slot more than prompt, limit and depth; every row's keys and values as if its text had been read."""
    monkeypatch.setattr(generating, "bucket", lambda length, smallest=16: length)
    monkeypatch.setattr(generating, "slots_for", lambda tokens, slack: tokens + slack)
    lm, prompts = target(name), [list(b"abcabcabc"), list(b"de"), list(b"fghij")]
    asked = {"max_new_tokens": [NEW, 4, 11], "temperature": [1.0, 0.0, 0.7], "eos": ()}
    plain = generate(lm, prompts, **asked)
    texts = [[*prompt, *map(int, tokens)] for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    state = final(lm, prompts, asked, scripted(texts, VOCABULARY, 1, 0.8, nodes=7))
    assert state.plain.cache.slots == 9 + NEW + 6
    for row, text in enumerate(texts):
        assert int(state.plain.cache.length[row]) == len(text) - 1  # the last token was chosen, not yet read
        read = model.forward(lm.ready, lm.config, jnp.asarray([text[:-1]]), context=jnp.asarray([len(prompts[row])]))
        for ours, theirs in zip(jax.tree.leaves(state.plain.cache.layers), jax.tree.leaves(read.kv), strict=True):
            np.testing.assert_allclose(ours[row, :, :len(text) - 1], theirs[0], atol=1e-4)


def test_a_row_does_not_depend_on_its_mates():
    prompts = [list(b"abcabc"), list(b"xyz"), list(b"hello hello")]
    asked = {"temperature": 0.8, "max_new_tokens": 12, "logit_bias": {97: 5.0, 98: 5.0}}
    keys = jax.random.split(jax.random.key(1), 3)
    together = generate(target("rope"), prompts, key=keys, drafter=DRAFTERS["union"], **asked)
    for row, prompt in enumerate(prompts):
        alone = generate(target("rope"), [prompt], key=keys[row:row + 1], drafter=DRAFTERS["union"], **asked)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()


def test_segments_and_warm_states_change_nothing():
    """Text in pieces of a few calls, and a table that remembers an earlier request."""
    lm, prompts, asked = target("rope"), ["abcabc", "hello hello"], {"max_new_tokens": 16, "logit_bias": {97: 9.0, 98: 8.5}}
    plain, pieces = generate(lm, prompts, **asked), []
    cold = generate(lm, prompts, drafter="lookup+recycling", tree=6, on_text=pieces.append, segment=2, **asked)
    warm = generate(lm, prompts, drafter="lookup+recycling", tree=6, drafter_state=cold.speculation.state, **asked)
    assert plain.text == cold.text == warm.text == ["".join(row) for row in zip(*pieces, strict=True)]
    assert warm.speculation.calls.sum() < cold.speculation.calls.sum()


CROWDED = stubs.decoder(*[tiny.block(feedforward=tiny.MOES[name]) for name in ("capacity", "switch")])


def test_a_capacity_drops_nothing_and_the_experts_of_a_call_are_counted():
    """An oracle drafts four tokens, so the nodes of every call are the text itself; the second row is done after two calls."""
    weights, prompts = tiny.weights(model.spec(CROWDED)), [list(b"aaaaaaaa"), list(b"defg")]
    lm, free = model.Model(CROWDED, weights), model.Model(config.dropless(CROWDED), weights)
    asked = {"max_new_tokens": [21, 11], "eos": (), "logprobs": True}
    did = check(lm, prompts, asked, lambda texts: chain_of(texts, VOCABULARY, 0))
    new = generate(lm, prompts, **asked).tokens
    assert [row.tolist() for row in new] == [row.tolist() for row in generate(free, prompts, **asked).tokens]
    text, _ = generating.padded([[*prompt, *row] for prompt, row in zip(prompts, new, strict=True)], 29)
    kept, dropped = (jax.jit(model.forward, static_argnums=1)(weights, one.config, jnp.asarray(text)) for one in (free, lm))
    assert np.abs(kept.logits[0] - dropped.logits[0]).max() > 1e-3

    counts = []
    for layer in kept.routing[0]:
        for call in range(4):
            nodes = [layer.experts[0, row, len(prompts[row]) + 5 * call:][:5] for row in range(2 if call < 2 else 1)]
            counts.append(len(np.unique(np.concatenate(nodes))))
    assert did.calls.tolist() == [4, 2] and did.experts == pytest.approx(np.mean(counts))
    assert generate(target("rope"), "abc", 4, drafter="lookup").speculation.experts is None


def test_a_lookup_of_short_trees_in_a_union_keeps_its_word():
    """Its continuations are as long as its own trees are deep, so no call writes more than the cache has room for."""
    drafter = Union((Lookup(length=10, nodes=3), Recycling(trees.branching(3))), (6,))
    lm = stubs.markov(dict(zip(b"abcde", b"bcdea", strict=True)), stubs.Bytes())
    did = check(lm, [list(b"xabcd")], {"max_new_tokens": 58, "eos": (), "logprobs": True}, drafter)
    assert drafter.depth == 2 and did.emitted.shape == (1, 3)


def test_one_program_serves_all_requests_of_a_bucket(compilations):
    lm = target("rope")

    def ask(seed, prompt, limit):
        rng = np.random.default_rng(seed)
        return generate(lm, [rng.integers(0, 256, prompt).tolist()], limit, drafter=DRAFTERS["sizes"],
                        temperature=0.1 + seed / 10)

    ask(0, 7, 12)
    before = generating._run._cache_size(), generating._prefill._cache_size()
    with compilations() as names:
        for seed in range(1, 5):
            ask(seed, 3 * seed, 12 + seed)
    assert names == [] and before == (generating._run._cache_size(), generating._prefill._cache_size())


def test_drafters_of_equal_fields_are_told_apart():
    """jax takes trees of two such dataclasses for equal where their hashes meet: the classes are in the programs' keys."""
    @flax.struct.dataclass
    class Silent(Lookup):
        def propose(self, state, view):
            tree, state = super().propose(state, view)
            return tree.replace(tokens=jnp.where(jnp.arange(self.nodes)[None] > 0, -1, tree.tokens)), state

    ours, theirs = Lookup(length=4, nodes=3), Silent(length=4, nodes=3)
    assert generating._types(ours) == (Lookup,) and generating._types(theirs) == (Silent,)
    assert generating._types(Union((ours, ours), (5,))) != generating._types(Union((ours, theirs), (5,)))
    before = generating._run._cache_size()
    lm = stubs.markov(dict(zip(b"abcd", b"bcda", strict=True)), stubs.Bytes())
    calls = [generate(lm, "abcdabcdab", 12, drafter=one, eos=()).speculation.calls[0] for one in (ours, theirs)]
    assert calls[0] < calls[1] and generating._run._cache_size() == before + 2


class TestRefusals:
    @pytest.mark.parametrize(("asked", "says"), [
        ({"drafter": "nonsense"}, "there is no drafter 'nonsense'"),
        ({"drafter": "lookup+nonsense"}, "there is no drafter 'nonsense'"),
        ({"drafter": "recycling", "rule": "nonsense"}, "there is no rule 'nonsense'"),
        ({"rule": "match"}, "name a drafter"), ({"tree": 4}, "name a drafter"),
        ({"drafter": "recycling", "tree": 1}, "at least 2"), ({"drafter": 3}, "a name, a Model or a Drafter"),
        ({"drafter": "lookup", "tree": trees.chain(2)}, "number of nodes"),
        ({"drafter": "lookup+recycling", "tree": trees.chain(2)}, "number of nodes"),
        ({"drafter": DRAFTERS["lookup"], "tree": 4}, "tree of its own"),
        ({"drafter": "lookup", "tree": 100}, "2 to 49 nodes, got 100"), ({"drafter": "lookup+lookup"}, "every drafter once"),
        ({"drafter": "lookup+recycling", "tree": 500}, "500 nodes was asked for"),
        ({"drafter": "recycling", "rule": 3}, "a name or a rule"),
        ({"drafter": "recycling", "rule": Typical}, "a name or a rule"),
        ({"drafter": "lookup", "drafter_state": {"a": 1}}, "Lookup keeps nothing"),
        ({"drafter": "recycling", "drafter_state": (1, 2)}, "not one that such a Union left")])
    def test_says_what_is_wrong(self, asked, says):
        with pytest.raises(ValueError, match=says):
            generate(target("rope"), "abc", 4, **asked)


def test_more_tokens_than_the_context_leaves_room_for():
    """A tree's nodes may stand past the context; the text may not."""
    lm = dataclasses.replace(target("rope"), config=dataclasses.replace(target("rope").config, length=16))
    plain = generate(lm, "abcdefgh", 7, eos=())
    assert generate(lm, "abcdefgh", 7, eos=(), drafter=DRAFTERS["union"]).tokens[0].tolist() == plain.tokens[0].tolist()
    with pytest.raises(ValueError, match="context of 16"):
        generate(lm, "abcdefgh", 8, eos=(), drafter=DRAFTERS["union"])

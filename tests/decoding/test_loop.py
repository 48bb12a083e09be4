"""The loop with a stub in the model's place: logits after position p of a row are a row of a table."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.cache import Cache, KeyValue
from jaxlm.decoding import loop, stop
from jaxlm.decoding.logits import Settings
from tests.decoding import oracle

ROWS, VOCABULARY, CAPACITY, SLOTS = 4, 9, 12, 20
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 0, 1, 2, 3], [8, 8]]
LIMITS = [12, 9, 11, 5]
EOS = (0, 7)
PIECES = [b"", b"a", b"b", b"ab", b"c", b"\xe2", b"\x82", b"\xac", b"d"]
STOPS = [["abc", "dd"], [], ["€"], ["ba"]]
UNTOUCHED = -7.0
SETTINGS = {"temperature": [0.0, 0.8, 1.2, 1.0], "top_k": [9, 4, 9, 6], "top_p": [1.0, 0.9, 0.95, 1.0],
            "min_p": [0.0, 0.02, 0.0, 0.0], "typical_p": [1.0, 1.0, 0.9, 1.0], "repetition": [1.2, 1.0, 0.9, 1.0],
            "presence": [0.0, 0.3, 0.0, -0.2], "frequency": [0.1, 0.0, 0.0, 0.2]}


def visible(slots, length):
    return jnp.arange(slots)[None, :] < length[:, None]


def stub(params, tokens, cache):
    """Keys are the tokens, values their positions; what the cache shows takes part in the logits, times zero."""
    logits = jnp.take_along_axis(params, cache.length[:, None, None], axis=1)
    k = cache.layers[0][0].k
    seen = jnp.sum(jnp.where(visible(k.shape[-2], cache.length)[None, :, None, :, None], k, 0.0), axis=(0, 2, 3, 4))
    shape = (1, tokens.shape[0], 1, 1, 1)
    kv = KeyValue(tokens.astype(jnp.float32).reshape(shape), cache.length.astype(jnp.float32).reshape(shape))
    return logits + 0.0 * seen[:, None, None], ((kv,),)


go = jax.jit(partial(loop.run, stub))
start = jax.jit(loop.begin, static_argnames=("capacity", "logprobs"))


def table(seed, eos=0.0):
    """Random logits; tokens that end a row are less likely by `eos`."""
    logits = np.random.default_rng(seed).normal(size=(ROWS, SLOTS, VOCABULARY), scale=2).astype(np.float32)
    logits[:, :, list(EOS)] -= eos
    return logits


def full_request(limits=LIMITS, seed=0):
    settings = Settings(**{name: jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32)
                           for name, value in SETTINGS.items()})
    prompted = np.zeros((ROWS, VOCABULARY), bool)
    for row, prompt in enumerate(PROMPTS):
        prompted[row, prompt] = True
    return loop.Request(jax.random.split(jax.random.key(seed), ROWS), jnp.asarray(limits, jnp.int32),
                        jnp.asarray([*EOS, -1], jnp.int32), settings, jnp.asarray(prompted),
                        stop.automaton(STOPS, PIECES, VOCABULARY))


def plain_request(limits=LIMITS):
    return loop.Request(jax.random.split(jax.random.key(0), ROWS), jnp.asarray(limits, jnp.int32),
                        jnp.zeros(0, jnp.int32), Settings(), None, None)


def begin(logits, request, slots=SLOTS, logprobs=True):
    """The state after the prompts: their tokens in the cache, other slots marked."""
    k, v = (np.full((1, ROWS, 1, slots, 1), UNTOUCHED, np.float32) for _ in "kv")
    for row, prompt in enumerate(PROMPTS):
        k[0, row, 0, :len(prompt), 0], v[0, row, 0, :len(prompt), 0] = prompt, range(len(prompt))
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    cache = Cache(((KeyValue(jnp.asarray(k), jnp.asarray(v)),),), jnp.asarray(lengths))
    return start(cache, request, jnp.asarray(logits[np.arange(ROWS), lengths - 1]), capacity=CAPACITY, logprobs=logprobs)


def run(logits, state, request, steps=CAPACITY):
    return go(jnp.asarray(logits), state, request, jnp.asarray(steps, jnp.int32))


def output(state, row):
    return np.asarray(state.tokens)[row, :int(state.count[row])].tolist()


def check_cache(state):
    """The cache holds each row's text but its last token, at most one slot of junk after it, and nothing else."""
    cached = state.cache.layers[0][0]
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *output(state, row)]
        length = int(state.cache.length[row])
        assert length == len(text) - 1 if int(state.count[row]) else len(text)
        np.testing.assert_array_equal(cached.k[0, row, 0, :length, 0], text[:length])
        np.testing.assert_array_equal(cached.v[0, row, 0, :length, 0], range(length))
        assert np.all(np.asarray(cached.k[0, row, 0, length + 1:, 0]) == UNTOUCHED)
        assert np.all(np.asarray(cached.v[0, row, 0, length + 1:, 0]) == UNTOUCHED)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(lambda x: np.asarray(x), tree) for tree in (a, b)))


@pytest.mark.parametrize("seed", range(6))
def test_rows_equal_the_slow_loop(seed):
    logits, request = table(seed, eos=1.5), full_request(seed=seed)
    state = run(logits, begin(logits, request), request)
    assert np.all(np.asarray(state.done)) and np.all(np.asarray(state.finite))
    for row, prompt in enumerate(PROMPTS):
        settings = {name: values[row] for name, values in SETTINGS.items()}
        want, gap = oracle.generate(lambda text, row=row: logits[row, len(text) - 1], prompt, LIMITS[row], request.keys[row],
                                    EOS, **settings)
        assert gap > 1e-4, "a close call: choose other seeds"
        want = want[:oracle.first_stop([PIECES[token] for token in want], STOPS[row])]
        assert output(state, row) == want
        raw = [logits[row, len(prompt) + i - 1].astype(float) for i in range(len(want))]
        np.testing.assert_allclose(state.logprobs[row, :len(want)],
                                   [np.log(oracle.softmax(x)[token]) for x, token in zip(raw, want, strict=True)], atol=1e-5)
        np.testing.assert_array_equal(state.counts[row], np.bincount(want, minlength=VOCABULARY))
        assert int(state.last[row]) == want[-1]
        stopped = oracle.first_stop([PIECES[token] for token in want], STOPS[row]) is not None
        assert bool(request.automaton.found[state.stop[row]]) == stopped
    check_cache(state)


def test_rows_end_in_every_way():
    """The seeds above are not all of a kind."""
    ends = set()
    for seed in range(6):
        logits, request = table(seed, eos=1.5), full_request(seed=seed)
        state = run(logits, begin(logits, request), request)
        for row in range(ROWS):
            emitted = output(state, row)
            ends.add("eos" if emitted[-1] in EOS else "stop" if bool(request.automaton.found[state.stop[row]]) else "limit")
    assert ends == {"eos", "stop", "limit"}


@given(st.lists(st.integers(0, 6), max_size=6), st.integers(0, 3))
def test_cut_into_segments_it_ends_in_the_same_state(segments, seed):
    logits, request = table(seed, eos=3.0), full_request(seed=seed)
    whole = run(logits, begin(logits, request), request)
    state = begin(logits, request)
    for steps in [*segments, *[1] * CAPACITY]:
        state = run(logits, state, request, steps)
        check_cache(state)
    equal(state, whole)


def test_a_step_adds_one_token_to_each_live_row():
    logits, request = table(3), plain_request()
    state = begin(logits, request)
    for step in range(CAPACITY):
        assert [int(n) for n in state.count] == [min(step + 1, limit) for limit in LIMITS]
        assert [bool(done) for done in state.done] == [step + 1 >= limit for limit in LIMITS]
        state = run(logits, state, request, 1)


def test_finished_rows_stay_as_they_are():
    logits, request = table(3), full_request()
    state = begin(logits, request)
    watched = 0
    while not np.all(np.asarray(state.done)):
        later = run(logits, state, request, 1)
        for row in np.flatnonzero(np.asarray(state.done)):
            for name in ("last", "tokens", "logprobs", "count", "done", "stop", "counts", "finite"):
                np.testing.assert_array_equal(getattr(later, name)[row], getattr(state, name)[row])
            assert later.cache.length[row] == state.cache.length[row]
            watched += 1
        state = later
    assert watched > 5
    equal(run(logits, state, request), state)


def test_a_limit_of_nothing_emits_nothing():
    logits, request = table(0), plain_request([0, 3, 0, 1])
    state = run(logits, begin(logits, request), request)
    assert state.count.tolist() == [0, 3, 0, 1]
    check_cache(state)


def test_end_of_text_as_the_first_token():
    logits = table(0)
    logits[1, len(PROMPTS[1]) - 1, 7] = 50.0
    request = plain_request().replace(eos=jnp.array([7, -1], jnp.int32))
    first = begin(logits, request)
    assert bool(first.done[1]) and int(first.count[1]) == 1
    assert output(run(logits, first, request), 1) == [7]


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_logits_that_are_not_finite_end_their_row_alone(junk, place):
    logits, request = table(1), plain_request()
    want = run(logits, begin(logits, request), request)
    broken = logits.copy()
    broken[2, len(PROMPTS[2]) - 1 + place, 4 if junk > 0 or np.isnan(junk) else slice(None)] = junk
    state = run(broken, begin(broken, request), request)
    assert state.finite.tolist() == [True, True, False, True] and bool(state.done[2])
    assert int(state.count[2]) == place + 1
    for row in (0, 1, 3):
        assert output(state, row) == output(want, row)


def test_one_token_of_no_probability_is_finite():
    logits, request = table(1), plain_request()
    logits[:, :, 4] = -np.inf
    state = run(logits, begin(logits, request), request)
    assert np.all(np.asarray(state.finite)) and 4 not in np.concatenate([output(state, row) for row in range(ROWS)])


def test_what_a_finished_row_would_choose_does_not_matter():
    logits, request = table(1), plain_request()
    want = run(logits, begin(logits, request), request)
    logits[3, len(PROMPTS[3]) + LIMITS[3] - 1:] = np.nan
    equal(run(logits, begin(logits, request), request).finite, want.finite)


def test_a_cache_of_just_the_right_size_is_enough_and_one_slot_less_is_seen():
    logits, request = table(2), plain_request()
    need = max(len(prompt) + limit for prompt, limit in zip(PROMPTS, LIMITS, strict=True))
    longest = int(np.argmax([len(prompt) + limit for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]))
    want = run(logits, begin(logits, request), request)
    exact = run(logits, begin(logits, request, slots=need), request)
    for row in range(ROWS):
        assert output(exact, row) == output(want, row)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(exact.cache.layers))
    short = run(logits, begin(logits, request, slots=need - 3), request)
    assert short.finite.tolist() == [row != longest for row in range(ROWS)]


def traced(step, batch, slots, width=64, unrolled=True):
    """The loop on the cache of one layer, laid out for unrolled layers (as one CPU device has it) or for scanned ones."""
    request = loop.Request(jax.random.split(jax.random.key(0), batch), jnp.full(batch, 9, jnp.int32),
                           jnp.zeros(4, jnp.int32), Settings(temperature=jnp.ones(batch), top_p=jnp.ones(batch)), None, None)

    def first(request):
        one = jnp.zeros((batch, 1, slots, width))
        one = (one,) if unrolled else one[None]
        cache = Cache(((KeyValue(one, one),),), jnp.ones(batch, jnp.int32))
        return loop.begin(cache, request, jnp.zeros((batch, VOCABULARY)), 16, True)

    state = jax.eval_shape(first, request)
    run = jax.jit(partial(loop.run, step), donate_argnums=1)
    return run.trace(jnp.zeros((batch, VOCABULARY)), state, request, jnp.zeros((), jnp.int32))


def attentive(params, tokens, cache):
    """A stub that reads all keys in a product, as attention does."""
    k = cache.layers[0][0].k[0]
    shown = visible(k.shape[-2], cache.length).astype(jnp.float32)[:, None, None]
    seen = jnp.sum(jax.lax.dot_general(shown, k, (((3,), (2,)), ((0, 1), (0, 1)))), axis=(1, 2, 3))
    new = jnp.broadcast_to(tokens.astype(jnp.float32)[:, :, None, None], (*k.shape[:2], 1, k.shape[-1]))
    new = (new,) if isinstance(cache.layers[0][0].k, tuple) else new[None]
    return (params + seen[:, None])[:, None], ((KeyValue(new, new),),)


@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_written_in_place(batch, unrolled):
    slots, width = 4096, 64
    keys = batch * slots * width * 4
    memory = traced(attentive, batch, slots, width, unrolled).lower().compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * keys
    assert memory.temp_size_in_bytes < keys / 10


def calls_of_the_host(step):
    """What in the traced and in the compiled loop leaves the device."""
    whole = traced(step, 2, 16)
    jaxpr, hlo = str(whole.jaxpr), whole.lower().compile().as_text()
    assert "while" in jaxpr and "random_fold_in" in jaxpr and " while(" in hlo
    found = re.findall(r"\w*callback\w*", jaxpr) + re.findall(r"custom_call_target=\"(\w*callback\w*)\"", hlo)
    return found + re.findall(r" (infeed|outfeed|send|recv)\(", hlo)


def test_no_call_of_the_host_in_the_loop():
    assert calls_of_the_host(attentive) == []


def test_a_call_of_the_host_is_seen():
    def chatty(params, tokens, cache):
        jax.debug.callback(lambda x: None, tokens)
        return attentive(params, tokens, cache)

    found = calls_of_the_host(chatty)
    assert "debug_callback" in found and any("cpu_callback" in name for name in found)

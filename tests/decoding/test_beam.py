"""Beam search beside a slow one in NumPy, with a stub that reads the whole text out of the cache, and beside transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jaxlm
from jaxlm import cache as caching
from jaxlm import config, model, sharding
from jaxlm.decoding import beam
from jaxlm.decoding.beam import beam_search
from jaxlm.decoding.generate import padded
from jaxlm.model import Model
from tests import tiny
from tests.decoding import stubs
from tests.io import synthetic
from tests.io.goldens import make_bart, make_t5

VOCABULARY, CAPACITY, WIDTH, BEAMS, STATES = 11, 8, 5, 3, 97
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 0, 1]]
SLOTS = WIDTH + CAPACITY


def mix(text):
    """A number that depends on every token of a text and its place."""
    return sum((i + 1) * (i + 2) * (int(token) + 1) for i, token in enumerate(text)) % STATES


def stub(table, tokens, cache):
    """Logits that depend on every token so far: keys are the tokens, and what lies beyond the length is junk."""
    k = cache.layers[0][0].k[0, :, 0, :, 0]
    place = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    text = jnp.where(place == cache.length[:, None], tokens, k.astype(jnp.int32))
    terms = jnp.where(place <= cache.length[:, None], (place + 1) * (place + 2) * (text + 1), 0)
    kv = caching.KeyValue(tokens.astype(jnp.float32)[None, :, None, :, None], jnp.zeros((1, *tokens.shape[:1], 1, 1, 1)))
    return table[jnp.sum(terms, axis=1) % STATES][:, None], ((kv,),)


@functools.partial(jax.jit, static_argnames=("beams",))
def search(table, cache, logits, request, beams=BEAMS):
    return beam.run(stub, table, beam.begin(cache, request, logits, beams), request)


def filled():
    k = np.full((1, len(PROMPTS), 1, SLOTS, 1), 77, np.float32)
    for i, prompt in enumerate(PROMPTS):
        k[0, i, 0, :len(prompt), 0] = prompt
    kv = caching.KeyValue(jnp.asarray(k), jnp.zeros(k.shape))
    return caching.Cache(((kv,),), jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - np.log(np.sum(np.exp(logits - logits.max())))


def oracle(logits_of, prompt, limit, beams, eos, penalty=1.0, stopping=False, minimum=0, banned=(), ngram=0, first=None,
           last=None, renormalise=False, before=0):
    """The definition, a row at a time: [(score, text)], the best first; of `length` tokens so many were there `before`."""
    running, finished = [(0.0, [])], []
    for length in range(1 + before, limit + 1):
        candidates = []
        for score, text in running:
            logp = log_softmax(logits_of([*prompt, *text]))
            logp[list(banned)] = -np.inf
            whole = [*prompt, *text]
            if ngram:
                runs = [tuple(whole[i:i + ngram]) for i in range(len(whole) - ngram + 1)]
                logp[[token for token in range(len(logp)) if (*whole[len(whole) - ngram + 1:], token) in runs]] = -np.inf
            if length <= minimum:
                logp[list(eos)] = -np.inf
            for token in [first] * (length == 1 + before) + [last] * (length == limit):
                if token is not None:
                    logp[:] = -np.inf
                    logp[token] = 0
            if renormalise:
                logp = log_softmax(logp)
            candidates += [(score + p, [*text, token]) for token, p in enumerate(logp) if p > -np.inf]
        candidates.sort(key=lambda candidate: -candidate[0])
        ended = [candidate[1][-1] in eos or length == limit for candidate in candidates]
        finished += [(score / length ** penalty, text) for (score, text), end in zip(candidates[:beams], ended, strict=False)
                     if end]
        finished = sorted(finished, key=lambda candidate: -candidate[0])[:beams]
        running = [candidate for candidate, end in zip(candidates, ended, strict=True) if not end][:beams]
        if len(finished) == beams:
            reach = limit if stopping == "never" and penalty > 0 else length
            if stopping is True or not running or running[0][0] / reach ** penalty <= finished[-1][0]:
                break
    return finished


def request(limit, eos=(0, 7), penalty=1.0, stopping=False, minimum=0, banned=(), ngram=0, first=None, last=None,
            renormalise=False):
    divisors = beam.divisors(penalty, np.zeros(len(PROMPTS), int), limit, CAPACITY)
    hope = np.full_like(divisors, divisors.flat[-1]) if stopping == "never" and penalty > 0 else divisors
    bias, before = np.zeros((len(PROMPTS), VOCABULARY), np.float32), np.full((len(PROMPTS), WIDTH), -1)
    bias[:, list(banned)] = -np.inf
    for i, prompt in enumerate(PROMPTS):
        before[i, WIDTH - len(prompt):] = prompt
    first, last = (None if token is None else jnp.asarray(token, jnp.int32) for token in (first, last))
    every = np.ones(len(PROMPTS), np.int32)
    return beam.Request(jnp.asarray(limit * every), jnp.asarray(eos, jnp.int32), jnp.asarray(divisors), jnp.asarray(hope),
                        jnp.asarray(stopping is True), jnp.asarray(minimum * every), first, last, jnp.asarray(bias),
                        jnp.asarray(before, jnp.int32), ngram, renormalise)


def check(table, limit, eos=(0, 7), beams=BEAMS, **settings):
    logits = jnp.asarray(np.stack([table[mix(prompt)] for prompt in PROMPTS]))
    state = search(jnp.asarray(table), filled(), logits, request(limit, eos, **settings), beams)
    for i, prompt in enumerate(PROMPTS):
        want = oracle(lambda text: table[mix(text)], prompt, limit, beams, eos, **settings)
        assert [state.texts[i, j, :state.lengths[i, j]].tolist() for j in range(len(want))] == [text for _, text in want]
        np.testing.assert_allclose(state.best[i, :len(want)], [score for score, _ in want], rtol=0, atol=1e-5)
        assert np.all(state.best[i, len(want):] < -1e6)  # where fewer texts than beams are possible
    return state


def table(seed, scale=2.0, endings=0.0):
    logits = np.random.default_rng(seed).normal(size=(STATES, VOCABULARY), scale=scale).astype(np.float32)
    logits[:, [0, 7]] += endings
    return logits


common = {"seed": st.integers(0, 10**6), "scale": st.sampled_from([0.3, 2.0, 6.0]),
          "endings": st.sampled_from([-2.0, 0.0, 2.0]), "limit": st.sampled_from([1, 4, CAPACITY]),
          "penalty": st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.5]), "stopping": st.sampled_from([True, False, "never"])}


# Rows that ended before others, and to which later texts would have come.
@example(seed=0, scale=2.0, endings=0.0, limit=CAPACITY, penalty=0.6, stopping=True, minimum=0, banned=())
@example(seed=0, scale=2.0, endings=2.0, limit=CAPACITY, penalty=1.0, stopping=False, minimum=0, banned=())
@given(**common, minimum=st.integers(0, 3), banned=st.sampled_from([(), (3,), (3, 7)]))
def test_texts_and_scores_are_those_of_the_definition(seed, scale, endings, **settings):
    check(table(seed, scale, endings), **settings)


@given(**common, ngram=st.sampled_from([1, 2, 3]), minimum=st.integers(0, 3))
def test_no_run_of_tokens_comes_twice(seed, scale, endings, **settings):
    check(table(seed, scale, endings), **settings)


@given(**common, first=st.integers(0, VOCABULARY - 1))
def test_the_first_and_the_last_token_can_be_forced(seed, scale, endings, **settings):
    check(table(seed, scale, endings), **settings, last=7, banned=[2], renormalise=True)


def test_one_beam_takes_the_likeliest_token_and_no_token_need_end_a_text():
    logits = table(5)
    state = check(logits, CAPACITY, eos=(), beams=1)
    text = []
    for _ in range(CAPACITY):
        text.append(int(np.argmax(logits[mix([*PROMPTS[1], *text])])))
    assert state.texts[1, 0].tolist() == text


def test_ties_go_to_the_lower_beam_and_then_to_the_lower_id():
    state = check(np.zeros((STATES, VOCABULARY), np.float32), 2, eos=())
    assert state.texts[0, :, :2].tolist() == [[0, 0], [0, 1], [0, 2]]


def test_a_search_ends_where_nothing_can_change():
    logits = table(3)
    logits[:, 4], logits[:, 0] = 20.0, 30.0  # a text goes on with 4, or ends
    assert check(logits, CAPACITY, stopping=True).count < check(logits, CAPACITY, penalty=2.5, stopping="never").count


def test_reordering_moves_keys_and_values_within_a_row_and_repeating_takes_everything_along():
    rng = np.random.default_rng(0)
    stacked, memory = rng.normal(size=(2, 2, 3, 4, 5)), rng.integers(0, 2, (2, 6))
    kv = caching.KeyValue(jnp.asarray(stacked), tuple(jnp.asarray(stacked)))
    cache = caching.Cache(((kv, caching.KeyValue(kv.k, None)),), jnp.asarray([3, 1], jnp.int32))
    wide, segments = beam.repeat((cache, jnp.asarray(memory)), 3)
    assert wide.length.tolist() == [3, 3, 3, 1, 1, 1]
    np.testing.assert_array_equal(segments, np.repeat(memory, 3, axis=0))
    marked = jnp.arange(6.0)[:, None, None, None]
    wide = wide.replace(layers=jax.tree.map(
        lambda leaf: leaf * (marked if leaf.ndim == 4 else marked[None]), wide.layers))
    moved = beam.reorder(wide, jnp.asarray([[2, 0, 2], [1, 1, 0]]))
    want = np.repeat(stacked, 3, axis=1) * np.array([2, 0, 2, 4, 4, 3]).reshape(1, 6, 1, 1, 1)
    np.testing.assert_allclose(moved.layers[0][0].k, want, rtol=1e-6)
    np.testing.assert_allclose(np.stack(moved.layers[0][0].v), want, rtol=1e-6)
    np.testing.assert_array_equal(moved.layers[0][1].k, moved.layers[0][0].k)


TEXTS = ["a longer one", "two", "b"]
ASKED = {"beams": 3, "returned": 3, "length_penalty": 0.7, "banned_tokens": [[101], [], [102]]}


def test_a_model_gives_the_texts_of_the_definition_and_compiles_once(compilations):
    lm = stubs.random("rope")
    run = synthetic.runner(lm.params, lm.config, 32)
    found = beam_search(lm, TEXTS, 7, **ASKED)
    for i, text in enumerate(TEXTS):
        want = oracle(lambda tokens: run(tokens)[-1], lm.tokenizer.encode(text), 7, 3, lm.tokenizer.eos_ids, 0.7,
                      banned=ASKED["banned_tokens"][i])
        assert [row.tolist() for row in found.tokens[3 * i:3 * i + 3]] == [tokens for _, tokens in want]
        np.testing.assert_allclose(found.scores[3 * i:3 * i + 3], [score for score, _ in want], rtol=0, atol=1e-5)
        assert found.text[3 * i] == lm.tokenizer.decode([token for token in want[0][1] if token < lm.tokenizer.size])
    with compilations() as names:
        beam_search(lm, ["x", "another", "more"], 5, **ASKED | {"returned": 1, "length_penalty": 2, "early_stopping": "never"})
    assert "_prefill" not in names and "_search" not in names


class Telling(stubs.Bytes):
    """Says of a text only whether it continues another."""

    def decode(self, tokens, continued=False):
        return "continues" if continued else "begins"


def test_an_encoder_decoder_reads_sources():
    unordered = tiny.attention(position=None, causal=False, source=tiny.WIDTH)
    side = {"width": tiny.WIDTH, "embedding": config.Embedding(stubs.VOCABULARY), "norm": tiny.NORM, "length": 32}
    cfg = config.EncoderDecoder(
        config.Encoder(stack=config.stack_of([tiny.block(causal=False)]), head=None, **side),
        config.Decoder(stack=config.stack_of([dataclasses.replace(tiny.block(), cross=unordered)] * 2), head=tiny.HEAD, **side),
        start=(stubs.BOS,))
    lm, starts = Model(cfg, tiny.weights(model.spec(cfg)), Telling()), [[5, 6, 7], [stubs.BOS], [9]]

    @tiny.jit
    def run(source, end, tokens, length):
        memory = model.encode(lm.params, cfg, source, lengths=end)
        return model.forward(lm.params, cfg, tokens, lengths=length, at=length[:, None] - 1, memory=memory).logits[0, 0]

    found = beam_search(lm, TEXTS, 7, beams=3, returned=2, start=starts, no_repeat_ngram=2, forced_last=stubs.EOS,
                        renormalise=True, length_penalty=1.5, min_new_tokens=5)
    assert found.text == ["begins"] * 6
    for i, text in enumerate(TEXTS):
        source = padded([lm.tokenizer.encode(text)], 32)
        want = oracle(lambda tokens, source=source: run(*source, *padded([tokens], 32)), starts[i], 7, 3,
                      lm.tokenizer.eos_ids, 1.5, minimum=5, ngram=2, last=stubs.EOS, renormalise=True,
                      before=len(starts[i]) - 1)
        assert [row.tolist() for row in found.tokens[2 * i:2 * i + 2]] == [tokens for _, tokens in want[:2]]
        np.testing.assert_allclose(found.scores[2 * i:2 * i + 2], [score for score, _ in want[:2]], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="counts the 2 tokens of start behind the first: it must be at least 3, got 2"):
        beam_search(lm, TEXTS, 2, start=starts)
    with pytest.raises(ValueError, match="a text's start has 1 token that does not count and 32 new ones.*at most 31 fit"):
        beam_search(lm, TEXTS, 32, start=starts)


def test_a_mesh_gives_the_same_texts():
    lm, texts = stubs.random("rope"), [*TEXTS, "fourth"]
    devices = sharding.mesh(devices=jax.devices()[:4], data=2, model=2)
    spread = Model(lm.config, jax.device_put(lm.params, sharding.shardings(model.spec(lm.config), devices)), lm.tokenizer)
    asked = {"beams": 3, "returned": 2, "no_repeat_ngram": 2}
    want, found = (beam_search(either, texts, 7, **asked) for either in (lm, spread))
    assert found.text == want.text
    np.testing.assert_allclose(found.scores, want.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("asked", "said"), [
    ({"beams": 0}, "beams must be 1 to 260, got 0"),
    ({"beams": 261}, "beams must be 1 to 260, got 261"),
    ({"beams": 2.0}, "beams must be a whole number, got 2.0"),
    ({"beams": True}, "beams must be a whole number, got True"),
    ({"returned": 5}, "returned must be 1 to 4, got 5"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": 63}, "a prompt has 3 tokens and 63 new ones were asked for.*at most 61 fit"),
    ({"min_new_tokens": 9}, "min_new_tokens must be 0 to 8, got 9"),
    ({"no_repeat_ngram": -1}, "no_repeat_ngram must be at least 0, got -1"),
    ({"early_stopping": "always"}, "early_stopping must be True, False or \"never\", got 'always'"),
    ({"length_penalty": "long"}, "length_penalty must be a number, got 'long'"),
    ({"length_penalty": 50.0}, "length_penalty must be a number such that 8 tokens to its power stay within.*got 50.0"),
    ({"length_penalty": float("nan")}, "length_penalty must be a number such that.*got nan"),
    ({"forced_first": 260}, "forced_first holds token id 260, out of range: 0 to 259"),
    ({"forced_last": "end"}, "forced_last must hold token ids, whole numbers, got 'end'"),
    ({"eos": [-1]}, "eos holds token id -1, out of range"),
])
def test_what_cannot_be_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        beam_search(stubs.random("rope"), "ab", **{"max_new_tokens": 8} | asked)


def test_logits_that_are_not_finite_are_told():
    lm = stubs.scripted(b"abcdefgh", 0)
    positions = lm.params["decoder"]["embedding"]["positions"]
    lm.params["decoder"]["embedding"]["positions"] = positions.at[6, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="logits for row 1 are not finite after 4 tokens: its weights hold NaN"):
        beam_search(lm, [[1, 2], [1, 2, 3, 4]], 8)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_texts_and_scores_are_those_of_transformers(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    size, pad, new = 40, 39, 12
    cfg = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    theirs = transformers.LlamaForCausalLM(cfg).eval()
    theirs.save_pretrained(tmp_path)
    ours = jaxlm.load(tmp_path)
    prompts = [[3, 7, 7, 1, 9, 20, 4], [20, 5], [8, 8, 8, 1]]
    longest = max(map(len, prompts))
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    asked = [{"length_penalty": penalty, "early_stopping": stopping, "eos": [5, 11, 17, 23, 30, 33]}
             for penalty in (-0.5, 0.0, 1.0, 2.0) for stopping in (True, False, "never")]
    asked += [{"eos": []}, {"eos": [2], "renormalise": True},
              {"eos": [5, 11, 17], "min_new_tokens": 6, "no_repeat_ngram": 2},
              {"eos": [5, 11, 17], "forced_last": 5, "no_repeat_ngram": 1, "length_penalty": 0.3}]
    names = {"no_repeat_ngram": "no_repeat_ngram_size", "forced_last": "forced_eos_token_id",
             "renormalise": "renormalize_logits", "eos": "eos_token_id"}
    lengths = set()
    for settings in asked:
        named = {names.get(name, name): value for name, value in settings.items() if value != []}
        out = theirs.generate(
            padded, attention_mask=mask, num_beams=4, num_return_sequences=4, max_new_tokens=new, do_sample=False,
            pad_token_id=pad, bad_words_ids=[[pad]], return_dict_in_generate=True, output_scores=True, **named)
        found = beam_search(ours, prompts, new, beams=4, returned=4, banned_tokens=[pad], **settings)
        want = [row[row != pad].tolist() for row in out.sequences[:, longest:].numpy()]
        assert [row.tolist() for row in found.tokens] == want, settings
        np.testing.assert_allclose(found.scores, out.sequences_scores.numpy(), rtol=2e-6, atol=1e-5)
        lengths |= set(map(len, want))
    assert len(lengths) > 5


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("made", "name", "pad"), [
    (make_bart, "bart", 47), (make_bart, "mbart", 47), (make_t5, "t5 tied, unscaled", 31)])
def test_texts_from_sources_are_those_of_transformers(made, name, pad, tmp_path):
    """BART's text begins with two tokens: the second is a forced one there."""
    import torch

    fields, eos = made.CASES[name], [5, 11, 17, 23, 30]
    theirs = made.build(fields)
    theirs.save_pretrained(tmp_path)
    theirs.generation_config.forced_bos_token_id = forced = fields.get("forced_bos_token_id")
    theirs.generation_config.save_pretrained(tmp_path)
    ours = jaxlm.load(tmp_path)
    assert len(ours.config.start) == 1 + (forced is not None)
    longest = max(map(len, made.SOURCES))
    source = torch.tensor([row + [pad] * (longest - len(row)) for row in made.SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in made.SOURCES])
    asked = [{"length_penalty": penalty, "early_stopping": stopping}
             for penalty in (1.0, 2.0) for stopping in (True, False, "never")]
    asked += [{"min_new_tokens": 6, "no_repeat_ngram": 2, "forced_last": 5}]
    names = {"no_repeat_ngram": "no_repeat_ngram_size", "forced_last": "forced_eos_token_id"}
    lengths = set()
    for settings in asked:
        named = {"forced_eos_token_id": None} | {names.get(name, name): value for name, value in settings.items()}
        out = theirs.generate(
            source, attention_mask=mask, num_beams=4, num_return_sequences=4, max_new_tokens=made.NEW, do_sample=False,
            pad_token_id=pad, bad_words_ids=[[pad]], eos_token_id=eos, return_dict_in_generate=True, output_scores=True,
            **named)
        found = beam_search(ours, made.SOURCES, made.NEW, beams=4, returned=4, banned_tokens=[pad], eos=eos, **settings)
        begun = len(ours.config.start)
        assert out.sequences[:, :begun].tolist() == [list(ours.config.start)] * len(out.sequences)
        want = [row[row != pad].tolist() for row in out.sequences[:, begun:].numpy()]
        assert [row.tolist() for row in found.tokens] == want, settings
        np.testing.assert_allclose(found.scores, out.sequences_scores.numpy(), rtol=2e-6, atol=1e-5)
        lengths |= set(map(len, want))
    assert len(lengths) > 3

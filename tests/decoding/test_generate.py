import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jaxlm import beam_search, config, generate, model, params, score, sharding, weight
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decoding import loop
from jaxlm.decoding.generate import Forward, _prefill, _run, bucket
from jaxlm.decoding.logits import Settings
from jaxlm.model import Model
from tests import oracle as whole_text
from tests import tiny
from tests.decoding import oracle, stubs

# Of one shape: prompts to a bucket of 16, 64 slots, up to 16 new tokens. 3 rows, or 1.
PROMPTS = ["hello", "a", "The café"]
NEW = 10
MIXED = {"temperature": [0.0, 0.2, 0.5], "top_p": [0.5, 1.0, 0.9]}


def encoded(prompts=PROMPTS):
    return [stubs.Bytes().encode(prompt) for prompt in prompts]


def lists(rows):
    return [np.asarray(row).tolist() for row in rows]


@functools.cache
def slow_logits(cfg):
    """A whole forward pass without a cache; a prompt's rotations are scaled as its length asks, as they were when made."""
    @jax.jit
    def forward(params, text, length, prompted):
        index = jnp.arange(text.shape[0], dtype=jnp.int32)
        positions = jnp.where(index < length, index, -1)[None]
        return model.forward(params, cfg, text[None], positions=positions, context=prompted[None]).logits[0, length - 1]

    return forward


def slow(lm, prompt, row, limit=NEW, key=0, eos=(stubs.EOS, stubs.EOT), **settings):
    """One row's tokens by the obvious loop."""
    forward = slow_logits(lm.config)

    def logits(text):
        padded = jnp.asarray(np.pad(text, (0, 32 - len(text))), jnp.int32)
        return np.asarray(forward(lm.params, padded, jnp.int32(len(text)), jnp.int32(len(prompt))))

    tokens, gap = oracle.generate(logits, prompt, limit, jax.random.fold_in(jax.random.key(key), row), eos, **settings)
    assert gap > 1e-4, "a close call: choose another seed"
    return tokens


def prepared(name, batch, length):
    """(model, step function, request, tokens of a bucket of 16) for looking at programs without running them."""
    lm = stubs.random(name, length)
    request = loop.Request(jax.random.split(jax.random.key(0), batch), jnp.full(batch, 9, jnp.int32), jnp.zeros(4, jnp.int32),
                           Settings(temperature=jnp.ones(batch)), None, None)
    return lm, Forward(lm.config, None), request, jnp.zeros((batch, 16), jnp.int32)


@functools.cache
def plain(name):
    """Text of a random model under MIXED."""
    return generate(stubs.random(name), PROMPTS, NEW, **MIXED, logprobs=True)


# Equal to the slow loop.

@pytest.mark.parametrize("name", stubs.DECODERS)
def test_rows_equal_the_slow_loop(name):
    for row, prompt in enumerate(encoded()):
        settings = {field: values[row] for field, values in MIXED.items()}
        assert plain(name).tokens[row].tolist() == slow(stubs.random(name), prompt, row, **settings)
    assert len({tuple(row) for row in lists(plain(name).tokens)}) == 3


def test_greedy_equals_float64():
    lm = stubs.random("rope")
    greedy = generate(lm, PROMPTS, NEW)
    for row, prompt in enumerate(encoded()):
        want, gap = oracle.generate(lambda text: whole_text.decoder(lm.params, lm.config, [text])[0][0, -1], prompt, NEW, None,
                                    lm.tokenizer.eos_ids)
        assert gap > 1e-4 and greedy.tokens[row].tolist() == want
    assert greedy.tokens[0].tolist() == plain("rope").tokens[0].tolist()


EVERYTHING = {"temperature": [0.3, 0.0, 0.7], "top_k": [1000, 5, 40], "top_p": [0.9, 0.3, 1.0], "min_p": [0.0, 0.1, 0.02],
              "typical_p": [1.0, 0.5, 0.8], "repetition": [1.3, 1.1, 0.9], "presence": [0.2, 0.0, -0.4],
              "frequency": [0.0, 0.5, 0.1]}


def test_every_setting_at_once_equals_the_slow_loop():
    lm = stubs.random("alibi")
    biases = [{96: -np.inf, 211: 1.5}, None, {206: -2.0}]
    given = {f"{name}_penalty" if name in ("repetition", "presence", "frequency") else name: values
             for name, values in EVERYTHING.items()}
    fast = generate(lm, PROMPTS, NEW, **given, logit_bias=biases, banned_tokens=[[], [50], [3, 4]], key=5)
    for row, prompt in enumerate(encoded()):
        bias = {**(biases[row] or {}), **dict.fromkeys([[], [50], [3, 4]][row], -np.inf)}
        settings = {name: values[row] for name, values in EVERYTHING.items()}
        assert fast.tokens[row].tolist() == slow(lm, prompt, row, key=5, bias=bias, **settings)


# Equal however it is run.

def test_scanned_layers_give_the_same_tokens():
    lm = dataclasses.replace(stubs.random("rope"))
    lm.__dict__["ready"] = lm.params
    assert lists(generate(lm, PROMPTS, NEW, **MIXED).tokens) == lists(plain("rope").tokens)


@pytest.fixture(scope="module")
def rows_of_rope():
    keys = jax.random.split(jax.random.key(7), 3)
    return keys, generate(stubs.random("rope"), PROMPTS, [NEW, 4, 7], temperature=0.4, key=keys, eos=())


def test_rows_of_a_ragged_batch_equal_each_row_alone(rows_of_rope):
    keys, together = rows_of_rope
    assert [len(row) for row in together.tokens] == [NEW, 4, 7] and together.prompt_tokens == [6, 2, 10]
    for row, prompt in enumerate(PROMPTS):
        alone = generate(stubs.random("rope"), prompt, [NEW, 4, 7][row], temperature=0.4, key=keys[row:row + 1],
                         eos=())
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        assert alone.text[0] == together.text[row]


def test_a_row_does_not_depend_on_its_mates(rows_of_rope):
    keys, before = rows_of_rope
    mates = generate(stubs.random("rope"), ["other mates", "a", "x"], [3, 4, 16], temperature=[0.9, 0.4, 0.1], key=keys,
                     eos=())
    assert mates.tokens[1].tolist() == before.tokens[1].tolist()
    turned = generate(stubs.random("rope"), PROMPTS[::-1], [7, 4, NEW], temperature=0.4, key=keys[::-1], eos=())
    assert lists(turned.tokens) == lists(before.tokens)[::-1]


def test_the_seed_decides(rows_of_rope):
    lm, (_, before) = stubs.random("rope"), rows_of_rope
    def draw(key):
        return lists(generate(lm, PROMPTS, [NEW, 4, 7], temperature=0.4, key=key, eos=()).tokens)

    first = draw(1)
    assert first == draw(1) == draw(np.int64(1)) == draw(jax.random.key(1))
    assert first != draw(2) and first != lists(before.tokens)
    same_prompt = generate(lm, ["a"] * 3, NEW, temperature=0.4, key=1, eos=())
    assert len({tuple(row) for row in lists(same_prompt.tokens)}) == 3


def test_a_mesh_gives_the_same_tokens():
    lm = stubs.random("rope")
    devices = sharding.mesh(devices=jax.devices()[:4], data=2, model=2)
    spread = Model(lm.config, jax.device_put(lm.params, sharding.shardings(model.spec(lm.config), devices)), lm.tokenizer)
    assert spread.mesh == devices
    prompts, pieces = [*PROMPTS, "fourth"], []
    settings = {"temperature": [0.0, 0.2, 0.5, 0.3], "repetition_penalty": 1.2, "stop_strings": ["zzz"], "logprobs": True}
    want, out = (generate(either, prompts, NEW, **settings) for either in (lm, spread))
    assert lists(out.tokens) == lists(want.tokens) and out.text == want.text
    for one, other in zip(out.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    generate(spread, prompts, NEW, **settings, on_text=pieces.append, segment=4)
    assert ["".join(row) for row in zip(*pieces, strict=True)] == want.text


def test_another_device_gives_the_same_tokens():
    lm = stubs.scripted(b"elsewhere", 3, stubs.Bytes())
    moved = Model(lm.config, jax.device_put(lm.params, jax.devices()[3]), lm.tokenizer)
    assert generate(moved, "ab", 9).text == ["elsewhere"]


def test_8_bit_weights_equal_the_same_weights_written_out():
    lm = stubs.random("rope")
    small = tiny.quantised(model.spec(lm.config), lm.params)
    assert small["decoder"]["blocks"]["0"]["0"]["attention"]["q"].values.dtype == jnp.int8
    rounded = jax.tree.map(weight.dense, small, is_leaf=weight.is_weight)
    out, want = (generate(Model(lm.config, params, lm.tokenizer), PROMPTS, NEW, **MIXED, logprobs=True)
                 for params in (small, rounded))
    assert lists(out.tokens) == lists(want.tokens)
    for row, (one, other, full) in enumerate(zip(out.logprobs, want.logprobs, plain("rope").logprobs, strict=True)):
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert abs(one[0] - full[0]) > 1e-3, row


def test_bfloat16():
    lm = stubs.random("alibi")
    half = Model(lm.config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.params), lm.tokenizer)
    for stored, dtype in ((half, None), (lm, jnp.bfloat16)):
        out = generate(stored, PROMPTS, NEW, **MIXED, logprobs=True, dtype=dtype)
        texts = [prompt + row.tolist() for prompt, row in zip(encoded(), out.tokens, strict=True)]
        rounded, exact = score(stored, texts, dtype=dtype), score(lm, texts)
        for row, prompt in enumerate(encoded()):
            np.testing.assert_allclose(out.logprobs[row], rounded[row][len(prompt):], atol=0.15)
            for scores in (out.logprobs[row], rounded[row][len(prompt):]):
                np.testing.assert_allclose(scores, exact[row][len(prompt):], atol=0.3)
                assert np.any(np.abs(scores - exact[row][len(prompt):]) > 1e-3)


@pytest.mark.parametrize(("stored", "dtype"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16"),
                                               ("bfloat16", "float32")])
def test_the_cache_has_the_dtype_of_the_computation(stored, dtype):
    lm, _, request, tokens = prepared("alibi", 2, 64)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored), lm.params)
    prefill = functools.partial(_prefill, Forward(lm.config, dtype), slots=32, capacity=16, logprobs=True)
    state = jax.eval_shape(prefill, params, tokens, jnp.ones(2, jnp.int32), request)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.cache.layers)} == {jnp.dtype(dtype or stored)}
    assert state.logprobs.dtype == jnp.float32


# What comes with the tokens.

@pytest.mark.parametrize("name", ["rope", "learned"])
def test_log_probabilities_equal_score(name):
    out = plain(name)
    texts = [prompt + row.tolist() for prompt, row in zip(encoded(), out.tokens, strict=True)]
    for row, (prompt, scores) in enumerate(zip(encoded(), score(stubs.random(name), texts), strict=True)):
        assert out.logprobs[row].shape == out.tokens[row].shape
        np.testing.assert_allclose(out.logprobs[row], scores[len(prompt):], atol=1e-4)


def test_what_is_returned():
    out = plain("rope")
    assert out.prompt_tokens == [6, 2, 10]
    assert out.text == [stubs.Bytes().decode(row) for row in lists(out.tokens)]
    assert all(row.dtype == np.int32 for row in out.tokens)
    assert out.finish == ["eos" if row[-1] in stubs.Bytes.eos_ids else "length" for row in out.tokens]
    assert out.seconds.prefill > 0 and out.seconds.decode > 0
    later = sum(len(row) - 1 for row in out.tokens)
    assert out.tokens_per_s == pytest.approx(later / out.seconds.decode)


def test_ids_give_what_text_gives():
    lm = stubs.random("rope")
    nameless = dataclasses.replace(lm, tokenizer=None)
    want = plain("rope")
    for prompts in (encoded(), [np.array(row) for row in encoded()]):
        out = generate(nameless, prompts, NEW, **MIXED, eos=stubs.Bytes.eos_ids, logprobs=True)
        assert lists(out.tokens) == lists(want.tokens) and out.text is None and out.finish == want.finish
    one = generate(nameless, encoded()[1], NEW, temperature=0.4)
    assert lists(one.tokens) == lists(generate(nameless, [encoded()[1]], NEW, temperature=0.4).tokens)


# A model that says what it is told, 3 tokens of prompt.

PROMPT = "ab"


def say(script, max_new_tokens=16, tokenizer=None, **arguments):
    tokenizer = tokenizer or stubs.Bytes()
    script = script.encode() if isinstance(script, str) else script
    return generate(stubs.scripted(script, 3, tokenizer), PROMPT, max_new_tokens, **arguments)


def test_one_new_token():
    out = say("xyz", 1)
    assert (lists(out.tokens), out.text, out.finish) == ([[120]], ["x"], ["length"])
    assert out.tokens_per_s == 0.0 and out.seconds.decode == 0.0


def test_end_of_text():
    for script, count in (([stubs.EOS, 120], 1), ([120, 121, stubs.EOT, 122], 3)):
        out = say(script)
        assert out.tokens[0].tolist() == script[:count] and out.finish == ["eos"]
        assert out.text == ["xy"[:count - 1]]
    out = say([120, 121, stubs.EOS, 122], 4, eos=())
    assert out.tokens[0].tolist() == [120, 121, stubs.EOS, 122] and out.finish == ["length"] and out.text == ["xyz"]
    for eos in (122, [122], np.int64(122), (1, 2, 3, 122)):
        out = say([120, stubs.EOS, 122], 8, eos=eos)
        assert out.tokens[0].tolist() == [120, stubs.EOS, 122] and out.text == ["xz"] and out.finish == ["eos"]


@pytest.mark.parametrize(("script", "stops", "text", "count"), [
    ("one STOP two", "STOP", "one ", 8),
    ("one STOP two", ["two", "STOP"], "one ", 8),
    ("one STOP two", ["STOPS"], "one STOP two\x7f\x7f\x7f\x7f", 16),
    ("one STOP two", ["on"], "", 2),
    ("abcd", ["abcd", "bc"], "a", 3),
    ("aaab", "aab", "a", 4),
    ("naïve €5 😀!", "€", "naïve ", 10),
    ("naïve €5 😀!", ["😀"], "naïve €5 ", 16),
    ("é" * 3 + "ê", "ê", "ééé", 8),
], ids=str)
def test_stop_strings(script, stops, text, count):
    script = (script.encode() + b"\x7f" * 16)[:16]
    pieces = []
    for arguments in ({}, {"on_text": pieces.append, "segment": 1}):
        out = say(script, stop_strings=stops, **arguments)
        assert (out.text[0], len(out.tokens[0])) == (text, count)
        assert out.finish == ["stop" if count < 16 or "😀" in stops else "length"]
    assert "".join(piece for [piece] in pieces) == text


def test_a_stop_string_inside_a_token():
    tokenizer = stubs.Bytes({200: b"x END y STOP", 201: b"EN"})
    for stops in ("END", ["STOP", "END"], ["END", "STOP"]):
        out = say([97, 200, 98], tokenizer=tokenizer, stop_strings=stops)
        assert (out.text, lists(out.tokens), out.finish) == (["ax "], [[97, 200]], ["stop"])
    pieces = []
    out = say([97, 201, 68, 98], tokenizer=tokenizer, stop_strings=["END"], on_text=pieces.append, segment=1)
    assert out.text == ["a"] and "".join(piece for [piece] in pieces) == "a"


def test_end_of_text_comes_before_the_stop_string_it_would_complete():
    out = say([97, 68, 98], stop_strings="aD", eos=68)
    assert (out.text, out.finish) == ([""], ["eos"])
    out = say([97, stubs.EOS, 98], stop_strings="ab")
    assert (out.text, out.finish) == (["a"], ["eos"])


def test_a_finished_row_that_waits_for_others_completes_no_stop_string():
    out = generate(stubs.scripted(b"dddddddd", 3, stubs.Bytes()), ["ab"] * 3, [1, 4, 2], stop_strings=[["dd"], None, ["ddd"]])
    assert out.text == ["d", "dddd", "dd"] and out.finish == ["length"] * 3


def test_rows_have_stop_strings_of_their_own():
    lm = stubs.scripted(b"....abcdefgh", 0, stubs.Bytes())
    out = generate(lm, ["abc", "abc", "abc"], 8, stop_strings=[["e"], None, ["gx", "fg"]])
    assert out.text == ["abcd", "abcdefgh", "abcde"] and out.finish == ["stop", "length", "stop"]
    out = generate(lm, ["abc", "abc", "abc"], 8, stop_strings=["cd", [], ("gh",)])
    assert out.text == ["ab", "abcdefgh", "abcdef"]


@pytest.mark.parametrize("segment", [1, 2, 3, 7, 16])
def test_streamed_pieces_add_up(segment):
    for script, stops in (("aé€😀b STOP c", None), ("aé€😀b STOP c", "STOP"), (b"\x80a\xe2\x82b\xf0\x9f\x98", None),
                          (b"ab\xe2\x82", None), ("S ST STO STOP", ["STOP"]), ("xyz\ufffd\ufffd", ["z\ufffd"])):
        pieces, script = [], script.encode() if isinstance(script, str) else script
        out = say(script, len(script), stop_strings=stops, on_text=pieces.append, segment=segment)
        assert "".join(piece for [piece] in pieces) == out.text[0] == say(script, len(script), stop_strings=stops).text[0]
        steps = len(out.tokens[0]) - 1
        assert len(pieces) == 1 + -(-steps // segment) + 1
        if b"\xe2\x82b" not in script and "\ufffd" not in out.text[0]:
            assert all("\ufffd" not in piece for [piece] in pieces)


def test_text_is_shown_as_soon_as_it_is_sure():
    pieces = []
    say("one STOP", 8, stop_strings="STOP", on_text=pieces.append, segment=1)
    assert [piece for [piece] in pieces] == ["", "", "", "o", "n", "e", " ", "", ""]
    pieces = []
    say("aé€", 6, on_text=pieces.append, segment=1)
    assert [piece for [piece] in pieces] == ["a", "", "é", "", "", "€", ""]


@pytest.mark.parametrize("segment", [1, 3, 8])
def test_streamed_rows_of_random_bytes_add_up(segment):
    pieces = []
    out = generate(stubs.random("rope"), PROMPTS, NEW, **MIXED, logprobs=True, on_text=pieces.append, segment=segment)
    assert lists(out.tokens) == lists(plain("rope").tokens) and out.text == plain("rope").text
    assert ["".join(row) for row in zip(*pieces, strict=True)] == out.text
    for a, b in zip(out.logprobs, plain("rope").logprobs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_real_tokenizer():
    """Byte-level BPE with tokens of several characters; it lacks the model's last ids, as models with round sizes have it."""
    symbols = sorted(ByteLevel.alphabet())
    words = ["he", "ll", "hell", "Ġw", "Â¬", "ST", "OP"]
    merges = ["h e", "l l", "he ll", "Ġ w", "Â ¬", "S T", "O P"]
    tokenizer = Tokenizer.from_gguf({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": [*symbols[:240], *words, *symbols[240:], "<end>"],
        "tokenizer.ggml.token_type": [1] * (256 + len(words)) + [3], "tokenizer.ggml.eos_token_id": 256 + len(words)})
    end, size = 256 + len(words), 280
    for text, stops, want, finish in (("hello world¬ STOP x", None, "hello world¬ STOP x", "eos"),
                                      ("hello world¬ STOP x", "STOP", "hello world¬ ", "stop"),
                                      ("hello world¬ STOP x", "d¬", "hello worl", "stop"),
                                      ("hell", "ello", "hell", "eos")):
        script, prompt, pieces = [*tokenizer.encode(text), 275, end], tokenizer.encode("hell"), []
        table = np.zeros((stubs.LENGTH, size))
        table[np.arange(len(script)) + len(prompt) - 1, script] = 50
        out = generate(stubs.with_logits(table, tokenizer), "hell", 30, stop_strings=stops, on_text=pieces.append, segment=2)
        assert (out.text, out.finish) == ([want], [finish])
        assert "".join(piece for [piece] in pieces) == want
        assert len(prompt) == 1 and (finish != "eos" or out.tokens[0].tolist() == script)
    # A special token has no text, but stops where its name is a stop string.
    script = [*tokenizer.encode("hell"), end, symbols.index("x")]
    table = np.zeros((stubs.LENGTH, size))
    table[np.arange(len(script)), script] = 50
    lm, pieces = stubs.with_logits(table, tokenizer), []
    out = generate(lm, ["hell"] * 2, len(script), stop_strings=[["<end>"], ["x"]], eos=(), on_text=pieces.append, segment=1)
    assert (out.text, out.finish) == (["hell", "hell"], ["stop", "stop"]) and lists(out.tokens) == [script[:-1], script]
    assert ["".join(row) for row in zip(*pieces, strict=True)] == out.text


def test_banned_and_biased_tokens():
    logits = np.zeros((stubs.LENGTH, stubs.VOCABULARY))
    logits[:, 97], logits[:, 98], logits[:, 99] = 3, 2, 1
    lm = stubs.with_logits(logits, stubs.Bytes())
    prompts = ["x", "y", "z"]
    def texts(**arguments):
        return generate(lm, prompts, 3, **arguments).text
    assert texts(banned_tokens=[97]) == ["bbb"] * 3
    assert texts(banned_tokens=np.array([97, 98])) == ["ccc"] * 3
    assert texts(banned_tokens={97, 98}) == ["ccc"] * 3
    assert texts(banned_tokens=[[97], [], [97, 98]]) == ["bbb", "aaa", "ccc"]
    assert texts(logit_bias={99: 2.5}) == ["ccc"] * 3
    assert texts(logit_bias=[{98: 1.5}, None, {97: -np.inf, 98: -5}]) == ["bbb", "aaa", "ccc"]
    assert texts(logit_bias={99: 2.5}, banned_tokens=[99]) == ["aaa"] * 3
    # At any temperature and however often drawn.
    hot = generate(lm, prompts, 16, temperature=1e30, banned_tokens=list(range(3, 260)), top_k=200, eos=())
    assert set(np.concatenate(hot.tokens).tolist()) <= {0, 1, 2}


def test_penalties_see_prompt_and_output_as_documented():
    logits = np.zeros((stubs.LENGTH, stubs.VOCABULARY))
    logits[:, 97], logits[:, 98], logits[:, 99] = 3.0, 2.5, 2.2
    lm = stubs.with_logits(logits, stubs.Bytes())
    # 3 / 1.4 is below 2.2, and 2.2 / 1.4 below 2.5 / 1.4 below 3 / 1.4.
    nearly_off = [1e-6, 0, 0]
    out = generate(lm, ["a", "b", "x"], 4, repetition_penalty=1.4, presence_penalty=nearly_off, frequency_penalty=nearly_off)
    assert out.text == ["bcaa", "acaa", "abca"]
    out = generate(lm, ["b", "b", "b"], 6, repetition_penalty=[1.4, 1, 1], presence_penalty=[0, 1.0, 0],
                   frequency_penalty=[0, 0, 0.3])
    assert out.text == ["acaaaa", "abcaaa", "aababc"]


# Programs.

def test_a_bucket_of_lengths_is_compiled_once(compilations):
    lm = stubs.random("learned")
    def go(lengths, new, **arguments):
        return generate(lm, [list(range(n)) for n in lengths], new, **arguments)
    assert go([3, 5, 1], 9, temperature=0.5).seconds.compile > 0
    with compilations() as names:
        for lengths, new in (([16, 1, 2], 16), ([7, 7, 7], [1, 2, 3]), ([1, 1, 1], 2)):
            out = go(lengths, new, temperature=[0.1, 0.9, 0.0], key=3, eos=[1, 2, 3])
            assert out.seconds.compile == 0
        go([2, 9, 4], 12, temperature=0.3, on_text=lambda pieces: None, segment=2)
    assert not [name for name in names if "prefill" in name or "run" in name], names
    with compilations() as names:
        go([17, 1, 1], 16, temperature=0.5)  # another bucket of prompts, the same cache
    assert [name for name in names if "prefill" in name] and not [name for name in names if "run" in name]


def test_buckets_waste_at_most_a_quarter():
    buckets = [bucket(n) for n in range(1, 3000)]
    assert buckets == sorted(buckets) and len(set(buckets)) < 40
    assert all(n <= size and (size == 16 or size - n <= size / 4) for n, size in enumerate(buckets, 1))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_of_a_model_neither_copies_the_cache_nor_calls_the_host(batch):
    lm, step, request, tokens = prepared("rope", batch, 8192)
    prefill = functools.partial(_prefill, step, slots=8192, capacity=16, logprobs=False)
    state = jax.eval_shape(prefill, lm.ready, tokens, jnp.ones(batch, jnp.int32), request)
    compiled = _run.lower(step, lm.ready, state, request, jnp.zeros((), jnp.int32)).compile()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache.layers))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 8
    text = compiled.as_text()
    assert not [word for word in ("callback", "infeed(", "outfeed(", "send(", "recv(") if word in text]


# Bad input.

def weak():
    return stubs.scripted(b"xyz", 3, stubs.Bytes())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompts": []}, "no prompts were given"),
    ({"prompts": ""}, "prompt 0 is empty"),
    ({"prompts": ["a", "", "b"]}, "prompt 1 is empty"),
    ({"prompts": [[1], []]}, "prompt 1 is empty"),
    ({"prompts": [[1], [1] * 65]}, "prompt 1 has 65 tokens, the model's context is 64"),
    ({"prompts": "x" * 80}, "prompt 0 has 81 tokens"),
    ({"prompts": [[1] * 10, [1] * 60], "max_new_tokens": 5}, "prompt 1 has 60 tokens and 5 new .* at most 4 fit"),
    ({"prompts": [[1] * 64], "max_new_tokens": 1}, "at most 0 fit"),
    ({"max_new_tokens": [4, 80]}, "80 new ones"),
    ({"prompts": [[1], [2, 260]]}, "prompt 1 holds token id 260, out of range: 0 to 259"),
    ({"prompts": [[-1], [2]]}, "prompt 0 holds token id -1"),
    ({"prompts": [[1.5], [2]]}, "prompt 0 must hold token ids, whole numbers, got 1.5"),
    ({"prompts": [None, [2]]}, "prompt 0 must be text or token ids"),
    ({"prompts": None}, "prompts must be"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
    ({"max_new_tokens": -3}, "max_new_tokens .* got -3"),
    ({"max_new_tokens": 2.0}, "max_new_tokens .* got 2.0"),
    ({"max_new_tokens": True}, "max_new_tokens .* got True"),
    ({"max_new_tokens": None}, "max_new_tokens .* got None"),
    ({"max_new_tokens": "8"}, "max_new_tokens .* got 8"),
    ({"max_new_tokens": [3, 0]}, "max_new_tokens .* one per row"),
    ({"max_new_tokens": [1, 2, 3]}, r"max_new_tokens .* one per row \(2\)"),
    ({"temperature": -0.5}, "temperature must be .* got -0.5"),
    ({"temperature": np.nan}, "temperature must be .* got nan"),
    ({"temperature": np.inf}, "temperature must be .* got inf"),
    ({"temperature": 1e39}, "temperature must be .* got 1e[+]39"),
    ({"temperature": [1.0, -2.0]}, "temperature must be .* got -2"),
    ({"temperature": [1.0, 1.0, 1.0]}, r"temperature must be one number or one per row \(2\)"),
    ({"temperature": [[1.0], [1.0]]}, "temperature must be one number or one per row"),
    ({"temperature": "warm"}, "temperature must be .* got 'warm'"),
    ({"temperature": None}, "temperature must be .* got None"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
    ({"top_p": 1.01}, "top_p .* got 1.01"),
    ({"top_p": [0.5, np.nan]}, "top_p .* got nan"),
    ({"top_k": 0}, "top_k must be in .* got 0"),
    ({"top_k": -1}, "top_k must be in .* got -1"),
    ({"top_k": [5, 0]}, "top_k must be in .* got 0"),
    ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
    ({"top_k": np.nan}, "top_k must be .* got nan"),
    ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
    ({"min_p": 1.5}, "min_p must be in"),
    ({"typical_p": 0.0}, r"typical_p must be in \(0, 1\]"),
    ({"typical_p": 2}, "typical_p must be in"),
    ({"repetition_penalty": 0}, "repetition_penalty must be in"),
    ({"repetition_penalty": np.inf}, "repetition_penalty must be in .* got inf"),
    ({"presence_penalty": np.inf}, "presence_penalty must be in .* got inf"),
    ({"frequency_penalty": np.nan}, "frequency_penalty must be in .* got nan"),
    ({"frequency_penalty": [0.0] * 5}, "frequency_penalty must be one number or one per row"),
    ({"logit_bias": {260: 1.0}}, "logit_bias holds token id 260, out of range: 0 to 259"),
    ({"logit_bias": {3: np.nan}}, r"logit_bias of token 3 must be a number up to 1e\+30, got nan"),
    ({"logit_bias": {3: np.inf}}, "logit_bias of token 3"),
    ({"logit_bias": {3: 1e39}}, "logit_bias of token 3"),
    ({"logit_bias": [{3: 1.0}]}, r"logit_bias must be given once or once per row \(2\)"),
    ({"logit_bias": [(3, 1.0), (4, 1.0)]}, "logit_bias must be"),
    ({"banned_tokens": [-1]}, "banned_tokens holds token id -1"),
    ({"banned_tokens": [[1], [2], [3]]}, r"banned_tokens must be one list of ids or one per row \(2\)"),
    ({"banned_tokens": range(260)}, "row 0 bans every token"),
    ({"banned_tokens": [[], range(259)], "logit_bias": {259: -np.inf}}, "row 1 bans every token"),
    ({"stop_strings": ""}, "stop string must not be empty"),
    ({"stop_strings": ["a", ""]}, "stop string must not be empty"),
    ({"stop_strings": [["a"], ["b"], ["c"]]}, r"stop_strings must be given once or once per row \(2\)"),
    ({"stop_strings": [["a"], [3]]}, "stop_strings must be"),
    ({"stop_strings": 3}, "stop_strings must be"),
    ({"eos": 260}, "eos holds token id 260, out of range"),
    ({"eos": [1, -1]}, "eos holds token id -1, out of range"),
    ({"key": "abc"}, "key must be a seed or made by jax.random.key, got 'abc'"),
    ({"key": None}, "key must be a seed .* got None"),
    ({"key": 1.5}, "key must be a seed .* got 1.5"),
    ({"key": np.zeros(2, np.uint32)}, "key must be a seed .*uint32"),
    ({"key": lambda: jax.random.split(jax.random.key(0), 3)}, r"one key or one per row \(2\), got \(3,\)"),
    ({"key": lambda: jax.random.split(jax.random.key(0), (2, 2))}, r"one key or one per row \(2\)"),
    ({"segment": 0, "on_text": print}, "segment must be at least 1"),
    ({"eos": 2.5}, "eos must be a token id or a list of them, got 2.5"),
    ({"eos": "</s>"}, "eos must be a token id or a list of them, got '</s>'"),
    ({"eos": [1.7]}, "eos must hold token ids, whole numbers, got 1.7"),
    ({"eos": [None]}, "eos must hold token ids, whole numbers, got None"),
    ({"banned_tokens": [1.5]}, "banned_tokens must hold token ids, whole numbers, got 1.5"),
    ({"banned_tokens": "abc"}, "banned_tokens must be a token id or a list of them, got 'abc'"),
    ({"logit_bias": {1.5: 1}}, "logit_bias must hold token ids, whole numbers, got 1.5"),
    ({"logit_bias": {"a": 1}}, "logit_bias must hold token ids, whole numbers, got 'a'"),
    ({"logit_bias": {1: "x"}}, "logit_bias of token 1 must be a number"),
    ({"logit_bias": {1: None}}, "logit_bias of token 1 must be a number"),
    ({"logit_bias": 5}, "logit_bias must be {token id: number}"),
    ({"max_new_tokens": [[1, 2], [3]]}, "max_new_tokens must be one number or one per row"),
    ({"dtype": "foo"}, "dtype must be a floating-point type"),
    ({"dtype": int}, "dtype must be a floating-point type"),
    ({"prompts": b"hello"}, "prompts must be text, token ids or a list of either"),
    ({"prompts": [True, False]}, "must hold token ids, whole numbers, got True"),
    ({"prompts": [{"role": "user", "content": "hi"}]}, "model.tokenizer.chat"),
    ({"key": 2**32}, "a seed must be 0 to"),
    ({"key": -1}, "a seed must be 0 to"),
], ids=lambda value: str(list(value)[0]) if isinstance(value, dict) else "")
def test_bad_input_is_named(arguments, message):
    arguments = {name: value() if getattr(value, "__name__", "") == "<lambda>" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        generate(weak(), **{"prompts": ["a", "b"], "max_new_tokens": 4} | arguments)


@pytest.mark.parametrize("ask", [generate, score, beam_search])
def test_experts_that_choose_among_later_tokens_are_refused(ask):
    cfg = stubs.decoder(tiny.block(), tiny.block(feedforward=tiny.MOES["choice"]), length=256)
    lm = Model(cfg, params.abstract(model.spec(cfg), jnp.float32))
    with pytest.raises(ValueError, match=r"block 1 of the decoder has the router ExpertChoice: .* such as TopK"):
        ask(lm, [[1, 2]])


def test_capacities_are_left_out_of_decoders_alone():
    sides = dataclasses.replace(tiny.EXPERT_SIDES, encoder=tiny.encoder(
        [tiny.block(feedforward=tiny.MOES["capacity"], causal=False)]), decoder=tiny.decoder(
        [tiny.block(cross=tiny.cross(), feedforward=tiny.MOES["switch"]), tiny.block()]))
    step = Forward.of(sides, None)
    assert step.whole.encoder == sides.encoder and step.whole.decoder == step.config
    kept = dataclasses.replace(tiny.MOES["switch"], capacity=None)
    assert [block.feedforward for block in step.config.stack.blocks()] == [kept, tiny.block().feedforward]
    assert config.dropless(stubs.DECODERS["experts"]) == stubs.DECODERS["experts"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompts": "text"}, "no tokenizer: give prompts as lists of token ids"),
    ({"prompts": [1], "stop_strings": "x"}, "stop strings need a tokenizer"),
    ({"prompts": [1], "on_text": print}, "streaming text needs a tokenizer"),
])
def test_what_needs_a_tokenizer(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(stubs.scripted(b"x", 1), max_new_tokens=2, **arguments)


@pytest.mark.parametrize(("place", "tokens"), [(9, 1), (12, 4)])
def test_weights_that_are_not_finite(place, tokens):
    lm = stubs.scripted(b"abcdefghijklmnop", 0, stubs.Bytes())
    table = lm.params["decoder"]["embedding"]["positions"]
    lm.params["decoder"]["embedding"]["positions"] = table.at[place, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=f"row 2 are not finite after {tokens} tokens: its weights hold NaN"):
        generate(lm, PROMPTS, 5)
    assert generate(lm, ["hello", "a", "x"], 3).finish == ["length"] * 3

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import generate, model, score, sharding
from jaxlm.decoding.score import CHUNK
from jaxlm.model import Model
from tests import oracle as whole_text
from tests import tiny
from tests.decoding import oracle, stubs


def random_ids(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, stubs.VOCABULARY, n).tolist() for n in lengths]


def expected(logits, row):
    """Log-probability of each token of a row, from the logits of the whole row."""
    return [0.0, *(np.log(oracle.softmax(x.astype(float))[token]) for x, token in zip(logits[:-1], row[1:], strict=True))]


@functools.cache
def forward(cfg):
    return jax.jit(lambda params, row: model.forward(params, cfg, row[None]).logits[0])


@pytest.mark.parametrize("name", stubs.DECODERS)
def test_a_ragged_batch_equals_the_forward_pass_of_each_row(name):
    lm, rows = stubs.random(name), random_ids(9, 2, 13, 1)
    out = score(lm, rows)
    assert [len(row) for row in out] == [9, 2, 13, 1] and all(row.dtype == np.float32 and row[0] == 0 for row in out)
    for row, scores in zip(rows, out, strict=True):
        if name == "scaled":  # its rotations depend on the row's length, which padding would change
            logits = np.asarray(forward(lm.config)(lm.params, jnp.asarray(row)))
        else:
            logits = whole_text.decoder(lm.params, lm.config, [row])[0][0]
        np.testing.assert_allclose(scores, expected(logits, row), atol=1e-4)


def test_longer_than_a_chunk():
    lm, rows = stubs.random("rope", 400), random_ids(CHUNK * 2 + 13, CHUNK, CHUNK + 1, 5)
    for row, scores in zip(rows, score(lm, rows), strict=True):
        logits = forward(lm.config)(lm.params, jnp.asarray(np.pad(row, (0, 320 - len(row)))))
        np.testing.assert_allclose(scores, expected(np.asarray(logits)[:len(row)], row), atol=1e-4)


def test_text_and_ids_and_the_whole_context():
    lm = stubs.random("learned")
    [text], [ids] = score(lm, "hello"), score(lm, lm.tokenizer.encode("hello"))
    np.testing.assert_array_equal(text, ids)
    full = random_ids(64)
    [scores] = score(lm, full)
    assert scores.shape == (64,)
    np.testing.assert_allclose(scores, expected(whole_text.decoder(lm.params, lm.config, full)[0][0], full[0]), atol=1e-4)


def test_probabilities_of_all_continuations_add_up():
    lm = stubs.random("learned")
    out = score(lm, [[5, 6, token] for token in range(stubs.VOCABULARY)])
    np.testing.assert_allclose(np.exp([row[2] for row in out]).sum(), 1, atol=1e-4)
    assert len({float(row[1]) for row in out}) == 1


def test_a_mesh_and_8_bits():
    lm, rows = stubs.random("rope"), random_ids(9, 2, 13, 1)
    small = tiny.quantised(model.spec(lm.config), lm.params)
    devices = sharding.mesh(devices=jax.devices()[:4], data=2, model=2)
    spread = Model(lm.config, jax.device_put(small, sharding.match(small, model.spec(lm.config), devices)))
    for one, other, full in zip(score(Model(lm.config, small), rows), score(spread, rows), score(lm, rows), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
        np.testing.assert_allclose(one, full, atol=0.1)


@pytest.mark.parametrize(("prompts", "message"), [
    ([], "no prompts were given"),
    (["a", ""], "prompt 1 is empty"),
    ([[1] * 65], "prompt 0 has 65 tokens, the model's context is 64"),
    ([[1, 2], [260]], "prompt 1 holds token id 260"),
], ids=str)
def test_bad_input_is_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        score(stubs.random("learned"), prompts)


def test_weights_that_are_not_finite():
    lm = stubs.scripted(b"abcdefgh", 0)
    table = lm.params["decoder"]["embedding"]["positions"]
    lm.params["decoder"]["embedding"]["positions"] = table.at[6, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="prompt 1 are not finite"):
        score(lm, [[1] * 6, [2] * 8, [3] * 8])
    assert len(score(lm, [[1] * 6, [2] * 2, [3] * 6])) == 3


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        score(dataclasses.replace(stubs.random("learned"), tokenizer=None), "text")


def test_greedy_text_has_the_best_score_at_every_step():
    lm = stubs.random("learned")
    out = generate(lm, [[7, 8, 9]], 6, logprobs=True, eos=())
    text = [7, 8, 9, *out.tokens[0].tolist()]
    for place in (3, 5, 8):
        others = score(lm, [[*text[:place], token] for token in range(stubs.VOCABULARY)])
        assert int(np.argmax([row[place] for row in others])) == text[place]
        np.testing.assert_allclose(max(row[place] for row in others), out.logprobs[0][place - 3], atol=1e-4)


SOURCES = [[5, 6, 7, 8], [9], list(range(20, 33))]


@pytest.mark.parametrize("name", stubs.ENCODER_DECODERS)
def test_a_text_is_scored_given_its_source(name):
    """Against one forward pass of each pair alone, and as generation says of what it wrote."""
    lm, texts = stubs.with_source(name), random_ids(7, 1, 4)
    begins = list(lm.config.start)
    for source, text, scores in zip(SOURCES, texts, score(lm, texts, sources=SOURCES), strict=True):
        logits = whole_text.encoder_decoder(lm.params, lm.config, [source], [[*begins, *text]])[0]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected(logits, [*begins, *text])[len(begins):], atol=1e-4)
    [alone] = score(lm, texts[0], sources=SOURCES[1:2], start=[11])
    logits = whole_text.encoder_decoder(lm.params, lm.config, SOURCES[1:2], [[11, *texts[0]]])[0]
    np.testing.assert_allclose(alone, expected(logits, [11, *texts[0]])[1:], atol=1e-4)


def test_one_source_for_all_and_text_with_its_end():
    lm = stubs.with_source("relative")
    one, other, again = score(lm, ["abc", [*b"abc", stubs.EOS], [*b"abd", stubs.EOS]], sources="xyz")
    np.testing.assert_array_equal(one, other)
    assert len(one) == 4 and one[0] == again[0] != 0 and one[2] != again[2]
    [written] = score(lm, ["abc"], sources=[[stubs.BOS, *b"xyz"]])
    np.testing.assert_allclose(written, one, atol=1e-5)
    starts = [[0], [7, 8], [0]]
    some = score(lm, ["abc"] * 3, sources="xyz", start=starts)
    for found, each in zip(some, score(lm, ["abc"] * 3, sources=["xyz"] * 3, start=starts), strict=True):
        np.testing.assert_array_equal(found, each)
    np.testing.assert_allclose(some[2], one, atol=1e-5)
    assert some[1][0] != one[0]


@pytest.mark.parametrize(("name", "prompts", "given", "message"), [
    ("relative", [[1]], {}, "give sources"),
    ("relative", [[1], [2], [3]], {"sources": [[1], [2]]}, "one for each of the 3 prompts, got 2"),
    ("relative", [[1]], {"sources": [[260]]}, "prompt 0 holds token id 260"),
    ("relative", [[1], [1] * 64], {"sources": [[1]]}, "prompt 1 has 65 tokens with its start, the model's context is 64"),
    ("learned", [[1]], {"sources": [[1]]}, "sources and start are for encoder-decoders"),
], ids=str)
def test_bad_sources_are_named(name, prompts, given, message):
    lm = stubs.random(name) if name in stubs.DECODERS else stubs.with_source(name)
    with pytest.raises(ValueError, match=message):
        score(lm, prompts, **given)

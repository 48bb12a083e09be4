"""Vectors of texts, against pooling written out in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import jaxlm
from jaxlm import encoding, model
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.model import Model
from tests import tiny

LENGTHS = (9, 3, 14, 1, 6)
TEXTS = [[int(i) for i in np.random.default_rng(i).integers(0, 13, length)] for i, length in enumerate(LENGTHS)]

POOLED = {
    "mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1], "max": lambda x: x.max(0),
    "weighted_mean": lambda x: np.average(x, axis=0, weights=np.arange(1, len(x) + 1)),
}


def built(cfg):
    return Model(cfg, tiny.weights(model.spec(cfg)))


def hidden(cfg, params):
    """The last hidden states of each text, in a batch of another width than `embed` takes."""
    tokens = jnp.asarray([text + [0] * (15 - len(text)) for text in TEXTS], jnp.int32)
    forward = tiny.jit(lambda params, tokens, lengths: model.forward(params, cfg, tokens, lengths=lengths, logits=False).last)
    out = np.asarray(forward(params, tokens, jnp.asarray(LENGTHS, jnp.int32)))
    return [row[:length] for row, length in zip(out, LENGTHS, strict=True)]


def normal(rows):
    return np.stack([row / np.linalg.norm(row) for row in rows])


@pytest.fixture(scope="module")
def sentence():
    return built(tiny.ENCODERS["vector"])


@pytest.fixture(scope="module")
def states(sentence):
    return hidden(sentence.config, sentence.params)


def test_a_sentence_encoders_own_vectors(sentence, states):
    head = sentence.params["encoder"]["head"]
    expected = normal([POOLED["weighted_mean"](x) @ np.asarray(head["out"]) + np.asarray(head["bias"])
                       for x in states])
    before = encoding._embed._cache_size()
    vectors = jaxlm.embed(sentence, TEXTS, batch=2)
    assert vectors.shape == (5, 5) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(jaxlm.embed(sentence, TEXTS[:2], batch=64), expected[:2], atol=1e-5)
    assert encoding._embed._cache_size() == before + 1  # up to 16 tokens there is one width, and the last batch is filled up


@pytest.mark.parametrize("name", ["max", "first"])
def test_another_pooling_and_no_normalisation(sentence, states, name):
    head = sentence.params["encoder"]["head"]
    expected = [POOLED[name](x) @ np.asarray(head["out"]) + np.asarray(head["bias"]) for x in states]
    np.testing.assert_allclose(jaxlm.embed(sentence, TEXTS, pooling=name, normalize=False), expected, atol=1e-5)


@pytest.mark.parametrize("cfg, pooling", [(tiny.ENCODERS["masked"], "first"), (tiny.CAUSAL["learned"], "last"),
                                          (tiny.ENCODER_DECODERS["sides"], "mean")], ids=["encoder", "decoder", "both"])
def test_other_models_with_a_pooling(cfg, pooling):
    lm = built(cfg)
    side = model.encoder(cfg, lm.params) if hasattr(cfg, "encoder") else (cfg, lm.params)
    expected = normal([POOLED[pooling](x) for x in hidden(*side)])
    np.testing.assert_allclose(jaxlm.embed(lm, TEXTS, pooling=pooling), expected, atol=1e-5)
    with pytest.raises(ValueError, match="does not say how it makes vectors: give pooling, one of 'mean', 'first'"):
        jaxlm.embed(lm, TEXTS)


def test_long_texts_are_cut_between_the_special_tokens(sentence):
    words = {word: i for i, word in enumerate(["[CLS]", "[SEP]", *"abcdefgh"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    lm = Model(sentence.config, sentence.params, Tokenizer(backend))
    np.testing.assert_array_equal(jaxlm.embed(lm, ["a b c d e", "h"], truncate=5),
                                  jaxlm.embed(sentence, [[0, 2, 3, 4, 1], [0, 9, 1]]))
    for ids in ([[4, 5, 6]], [4, 5, 6], np.array([4, 5, 6]), jnp.asarray([[4, 5, 6]])):
        np.testing.assert_array_equal(jaxlm.embed(lm, ids, truncate=2), jaxlm.embed(sentence, [[4, 5]]))
    np.testing.assert_array_equal(jaxlm.embed(lm, "a " * 80, truncate=900), jaxlm.embed(sentence, [[0] + [2] * 62 + [1]]))
    np.testing.assert_array_equal(jaxlm.embed(lm, "a " * 80), jaxlm.embed(lm, "a " * 80, truncate=900))
    bare = Model(dataclasses.replace(sentence.config, head=None), sentence.params, lm.tokenizer)
    with pytest.raises(ValueError, match="prompt 1 has 82 tokens, the model's context is 64"):
        jaxlm.embed(bare, ["a", "a " * 80], pooling="mean")


def test_what_cannot_be(sentence):
    with pytest.raises(ValueError, match=r"pooling must be one of 'mean', .*'weighted_mean', got 'sum'"):
        jaxlm.embed(sentence, TEXTS, pooling="sum")
    with pytest.raises(ValueError, match="batch and truncate must be positive, got 0 and None"):
        jaxlm.embed(sentence, TEXTS, batch=0)
    with pytest.raises(ValueError, match="has no tokenizer"):
        jaxlm.embed(sentence, "text", truncate=3)
    params = {"encoder": sentence.params["encoder"] | {"norm": {"scale": jnp.full(tiny.WIDTH, jnp.nan)}}}
    with pytest.raises(ValueError, match="vector of text 0 is not finite"):
        jaxlm.embed(Model(sentence.config, params), TEXTS)

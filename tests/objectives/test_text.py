"""The loss of packed texts, against float64 sums over one forward pass per document."""

import functools

import jax
import numpy as np
import pytest

from jaxlm import config, model
from jaxlm.objectives import (
    AsPrefix,
    AsText,
    CausalLM,
    FillInTheMiddle,
    IdentifierTagging,
    MaskedLM,
    Mode,
    PrefixLM,
    SpanCorruption,
    Text,
    text,
)
from tests import tiny
from tests.decoding import oracle

CFG = tiny.decoder([tiny.block()] * 2, head=config.Head(tied=False, bias=True))
RANDOM = np.random.default_rng(0)


def packed(examples, length):
    """One row of several examples, and padding."""
    row = {name: np.zeros((1, length), np.float32 if name == "weights" else np.int32)
           for name in ("tokens", "targets", "weights", "segments", "prefix")}
    used = 0
    for number, one in enumerate(examples, start=1):
        end = used + len(one.tokens)
        for name in ("tokens", "targets", "weights"):
            row[name][0, used:end] = getattr(one, name)
        row["segments"][0, used:end], row["prefix"][0, used:end] = number, one.prefix
        used = end
    return row


@tiny.jit
def forward(weights, tokens, mask):
    return model.forward(weights, CFG, tokens, mask=mask).logits[0]


@functools.partial(tiny.jit, static_argnames="prefixes")
def loss(weights, batch, sizes, prefixes):
    return text.loss(weights, CFG, batch, sizes=sizes, prefixes=prefixes, piece=16)


def alone(weights, examples, sizes):
    """Sums over the examples, each in a forward pass of its own with its mask written out."""
    nll, asked, size, correct = 0.0, 0.0, 0.0, 0.0
    for one in examples:
        index = np.arange(32)
        mask = (index[None] <= index[:, None]) | (index[None] < one.prefix)
        logits = forward(weights, np.resize(one.tokens, 32)[None], mask[None])[:len(one.tokens)]
        for row, target, weight in zip(np.asarray(logits, np.float64), one.targets, one.weights, strict=True):
            nll -= weight * np.log(oracle.softmax(row)[target])
            asked, size = asked + weight, size + weight * sizes[target]
            correct += weight * (np.argmax(row) == target)
    return {"nll": nll, "weight": asked, "bytes": size, "correct": correct}


@pytest.mark.parametrize("objective", [CausalLM(), FillInTheMiddle(1, 2, 3, rate=1.0), AsText(PrefixLM()),
                                       AsText(SpanCorruption((4, 5, 6, 7), rate=0.3)),
                                       AsPrefix(MaskedLM(1, tiny.VOCABULARY, rate=0.3))], ids=lambda one: type(one).__name__)
def test_packed_texts_are_as_if_each_were_alone(objective):
    weights, sizes = tiny.weights(model.spec(CFG)), RANDOM.integers(0, 9, tiny.VOCABULARY)
    examples = [objective.example(RANDOM.integers(8, tiny.VOCABULARY, n), RANDOM) for n in (9, 14, 2)]
    batch = packed(examples, 64)
    found = loss(weights, batch, sizes, any(one.prefix for one in examples))
    want = alone(weights, examples, sizes)
    np.testing.assert_allclose(found.sum, want["nll"], rtol=1e-5)
    np.testing.assert_allclose(found.weight, want["weight"])
    for name in ("nll", "bytes", "correct"):
        np.testing.assert_allclose(found.aux[name], want[name], rtol=1e-5, err_msg=name)


def test_without_prefixes_the_batch_need_not_say_any():
    weights, batch = tiny.weights(model.spec(CFG)), packed([CausalLM().example(np.arange(9), RANDOM)], 16)
    del batch["prefix"]
    found = jax.eval_shape(lambda: text.loss(weights, CFG, batch))
    assert found.sum.shape == () and set(found.aux) == {"nll", "correct"}


SINGLE = tiny.encoder([tiny.block(position=None, causal=False)], config.Classifier(1, None))


@pytest.mark.parametrize(("cfg", "labels"), [(tiny.ENCODERS["masked"], None), (tiny.ENCODERS["tokens"], 2), (SINGLE, 1)],
                         ids=["tokens", "labels", "one label"])
def test_encoders_are_asked_for_tokens_and_for_labels(cfg, labels):
    """Of one label the logit is that of 1: its loss is that of a sigmoid."""
    weights, kinds = tiny.weights(model.spec(cfg)), max(labels, 2) if labels else tiny.VOCABULARY
    examples = [Text(*RANDOM.integers(0, (tiny.VOCABULARY, kinds), (n, 2)).T, RANDOM.random(n), n) for n in (9, 14, 2)]
    found = tiny.jit(lambda weights, batch: text.loss(weights, cfg, batch, sizes=np.ones(tiny.VOCABULARY), piece=16))(
        weights, packed(examples, 32))
    nll, right, asked = 0.0, 0.0, sum(one.weights.sum() for one in examples)
    forward = tiny.jit(lambda weights, tokens, lengths: model.forward(weights, cfg, tokens, lengths=lengths).logits)
    for one in examples:
        logits = np.asarray(forward(weights, np.resize(one.tokens, 14)[None], np.array([len(one.tokens)])), np.float64)
        for row, target, weight in zip(logits[0], one.targets, one.weights):  # noqa: B905
            shares = oracle.softmax(row) if labels != 1 else np.array([1, np.exp(row[0])]) / (1 + np.exp(row[0]))
            nll, right = nll - weight * np.log(shares[target]), right + weight * (np.argmax(shares) == target)
    np.testing.assert_allclose((found.sum, found.weight, found.aux["correct"]), (nll, asked, right), rtol=1e-5)
    assert ("bytes" in found.aux) == (labels is None)


ENCODER = tiny.decoder([tiny.block(causal=False)])


@pytest.mark.parametrize(("objective", "cfg", "says"), [
    (PrefixLM(), CFG, r"makes pairs, for encoder-decoders: AsText\(PrefixLM"), (CausalLM(), ENCODER, "Attention.causal"),
    (CausalLM(), tiny.decoder([tiny.block(), tiny.block(causal=False)]), "attention that sees it"),
    (MaskedLM(1, 19), CFG, r"Attention\(causal=False\) everywhere, or AsPrefix\(MaskedLM"),
    (AsPrefix(MaskedLM(1, 19)), ENCODER, "attention that sees it"),
    (FillInTheMiddle(1, 2, 19), CFG, "FillInTheMiddle needs the token 19, and this model's vocabulary of 19 has 0 to 18"),
    (AsText(SpanCorruption((4, 500))), CFG, "AsText needs the token 500"), (Mode(-1, CausalLM()), CFG, "the token -1"),
    (MaskedLM(1, 21), ENCODER, "MaskedLM needs the token 20"),
    (CausalLM(), tiny.ENCODERS["masked"], "attention that sees it"),
    (PrefixLM(), tiny.ENCODERS["masked"], "makes pairs, for encoder-decoders: this is an encoder alone"),
    (MaskedLM(1, 19), tiny.ENCODERS["vector"], "MaskedLM asks for tokens, and this model's head gives none"),
    (MaskedLM(1, 19), tiny.ENCODERS["tokens"], "head gives none: it needs a jaxlm.config.Head, got Classifier"),
    (IdentifierTagging(), tiny.ENCODERS["masked"], r"one of 2 labels of every token: .* Classifier\(labels=2, pooling=None\)"),
    (IdentifierTagging(), tiny.ENCODERS["labels"], "one of 2 labels of every token"),
    (CausalLM(), tiny.ENCODER_DECODERS["shared"].decoder, "attends to a source"),
    (CausalLM(), tiny.ENCODER_DECODERS["shared"], "makes texts for decoders, and this model is an encoder-decoder"),
    (SpanCorruption((4, 14)), tiny.ENCODER_DECODERS["sides"], "the token 14, and this model's vocabulary of 13")])
def test_what_a_model_cannot_take(objective, cfg, says):
    with pytest.raises(ValueError, match=says):
        objective.check(cfg)
    for fitting, other in ((MaskedLM(1, 19), ENCODER), (MaskedLM(1, 19), tiny.ENCODERS["masked"]), (AsText(PrefixLM()), CFG),
                           (AsPrefix(MaskedLM(1, 19)), CFG), (IdentifierTagging(), tiny.ENCODERS["tokens"]),
                           (IdentifierTagging(), SINGLE), (Mode(3, PrefixLM()), tiny.ENCODER_DECODERS["sides"])):
        fitting.check(other)


def test_only_pairs_become_texts():
    with pytest.raises(ValueError, match="CausalLM makes texts"):
        AsText(CausalLM())

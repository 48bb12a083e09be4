"""The loss of packed texts, against float64 sums over one forward pass per document."""

import functools

import jax
import numpy as np
import pytest

from jaxlm import config, model
from jaxlm.objectives import AsPrefix, AsText, CausalLM, FillInTheMiddle, MaskedLM, Mode, PrefixLM, SpanCorruption, text
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


ENCODER = tiny.decoder([tiny.block(causal=False)])


@pytest.mark.parametrize(("objective", "cfg", "says"), [
    (PrefixLM(), CFG, r"makes pairs, for encoder-decoders: AsText\(PrefixLM"), (CausalLM(), ENCODER, "Attention.causal"),
    (CausalLM(), tiny.decoder([tiny.block(), tiny.block(causal=False)]), "attention that sees it"),
    (MaskedLM(1, 19), CFG, r"Attention\(causal=False\) everywhere, or AsPrefix\(MaskedLM"),
    (AsPrefix(MaskedLM(1, 19)), ENCODER, "attention that sees it"),
    (FillInTheMiddle(1, 2, 19), CFG, "FillInTheMiddle needs the token 19, and this model's vocabulary of 19 has 0 to 18"),
    (AsText(SpanCorruption((4, 500))), CFG, "AsText needs the token 500"), (Mode(-1, CausalLM()), CFG, "the token -1"),
    (MaskedLM(1, 21), ENCODER, "MaskedLM needs the token 20")])
def test_what_a_model_cannot_take(objective, cfg, says):
    with pytest.raises(ValueError, match=says):
        text.check(objective, cfg)
    text.check(MaskedLM(1, 19), ENCODER)
    text.check(AsText(PrefixLM()), CFG)
    text.check(AsPrefix(MaskedLM(1, 19)), CFG)


def test_only_pairs_become_texts():
    with pytest.raises(ValueError, match="CausalLM makes texts"):
        AsText(CausalLM())

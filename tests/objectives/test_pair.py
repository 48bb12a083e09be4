"""The loss of packed pairs, against float64 sums over one forward pass per pair."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model
from jaxlm.objectives import Mixture, PrefixLM, SpanCorruption, pair, ul2
from tests import tiny
from tests.decoding import oracle

RANDOM = np.random.default_rng(0)
LENGTHS = 40, 32


def packed(examples):
    """One row of several pairs, and padding."""
    names = ("inputs", "input_segments"), ("targets", "segments")
    row = {name: np.zeros((1, length), np.int32) for part, length in zip(names, LENGTHS, strict=True) for name in part}
    for (tokens, segments), place in zip(names, (0, 1), strict=True):
        used = 0
        for number, one in enumerate(examples, start=1):
            end = used + len(one[place])
            row[tokens][0, used:end], row[segments][0, used:end] = one[place], number
            used = end
    return row | {"weights": (row["segments"] > 0).astype(np.float32)}


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_packed_pairs_are_as_if_each_were_alone(name):
    cfg = tiny.ENCODER_DECODERS[name]
    weights, sizes = tiny.weights(model.spec(cfg)), RANDOM.integers(0, 9, tiny.VOCABULARY)
    objective = Mixture((PrefixLM(), SpanCorruption((4, 5, 6, 7), rate=0.3, end=1), ul2((4, 5, 6), 7, 8, 9)), (1, 1, 1))
    examples = [objective.example(RANDOM.integers(8, 13, n), RANDOM) for n in (9, 14, 4)]
    found = tiny.jit(lambda weights, batch: pair.loss(weights, cfg, batch, sizes=sizes, piece=16))(weights, packed(examples))

    @tiny.jit
    def forward(weights, inputs, count, tokens):
        memory = model.encode(weights, cfg, inputs, lengths=count)
        return model.forward(weights, cfg, tokens, memory=memory).logits[0]

    nll, right, asked, size = 0.0, 0.0, 0, 0
    for inputs, targets in examples:
        given, read = np.resize(inputs, LENGTHS[0]), np.resize([cfg.start[-1], *targets[:-1]], LENGTHS[1])
        logits = np.asarray(forward(weights, given[None], np.array([len(inputs)]), read[None]), np.float64)
        shares = [oracle.softmax(row)[target] for row, target in zip(logits, targets, strict=False)]
        nll, right = nll - np.log(shares).sum(), right + (logits[:len(targets)].argmax(-1) == targets).sum()
        asked, size = asked + len(targets), size + sizes[targets].sum()
    np.testing.assert_allclose((found.sum, found.weight, found.aux["correct"], found.aux["bytes"]), (nll, asked, right, size),
                               rtol=1e-5)


def test_long_pairs_are_learned_without_all_scores():
    """They are there for 256 queries at a time, on both sides and between them, whatever is kept for the backward pass."""
    cfg, shape = tiny.ENCODER_DECODERS["shared"], jax.ShapeDtypeStruct
    batch = {name: shape((2, length), jnp.int32) for name, length in
             (("inputs", 1536), ("input_segments", 1536), ("targets", 1024), ("segments", 1024), ("weights", 1024))}
    batch["weights"] = shape((2, 1024), jnp.float32)
    weights = jax.eval_shape(lambda: tiny.weights(model.spec(cfg)))
    made = str(jax.make_jaxpr(jax.grad(lambda weights, batch: pair.loss(weights, cfg, batch).sum))(weights, batch))
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\w\[([0-9,]+)\]", made)}
    assert any(one[-2:] == (256, 1536) for one in shapes)
    assert not [one for one in shapes if len(one) > 1 and min(one[-2:]) >= 1024]

"""ELECTRA's two losses against float64 sums over one pass per text, and what flows where."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config, model
from jaxlm.objectives import MaskedLM, electra
from jaxlm.objectives.electra import Electra
from tests import oracle, tiny
from tests.decoding.oracle import softmax
from tests.objectives import rows

RANDOM = np.random.default_rng(0)
MASK = MaskedLM(1, tiny.VOCABULARY, rate=0.4, hidden=1.0, replaced=0.0)
MODEL = tiny.encoder([tiny.block(causal=False)], config.Classifier(1, None, config.Transform(config.Activation.GELU)),
                     embedding=config.Embedding(tiny.VOCABULARY, position=config.Learned(64)))
GENERATOR = tiny.encoder([tiny.block(causal=False, heads=2, kv_heads=1, head_width=4)],
                         config.Head(True, True, transform=config.Transform(config.Activation.GELU)), width=8,
                         embedding=config.Embedding(tiny.VOCABULARY, position=config.Learned(64), width=16))
OBJECTIVE = Electra(MASK, GENERATOR)


def examples(*lengths):
    return [MASK.example(RANDOM.integers(2, tiny.VOCABULARY, n), RANDOM) for n in lengths]


def generator_of(weights, objective):
    tree = weights["extra"]["generator"]
    shared = {name: weights["encoder"]["embedding"][name] for name in ("tokens", "positions")} if objective.tied else {}
    return tree | {"embedding": tree["embedding"] | shared}


def test_both_losses():
    spec = OBJECTIVE.extra(MODEL)
    assert set(spec["generator"]["embedding"]) == {"projection", "projection_bias"}
    weights, key = tiny.weights(model.spec(MODEL) | {"extra": spec}), jax.random.key(3)
    packed = [examples(9, 3, 1), examples(7, 6)]
    batch = rows.texts(packed, 14)

    @tiny.jit
    def both(weights, batch):
        tree = generator_of(weights, OBJECTIVE)
        last = model.forward({"encoder": tree}, GENERATOR, batch["tokens"], segments=batch["segments"], logits=False).last
        return OBJECTIVE.loss(weights, MODEL, batch, key, ())[0], electra.sample(tree, GENERATOR, last, key)

    found, drawn = both(weights, batch)
    filling, telling, right, told, hidden, replaced = 0.0, 0.0, 0, 0, 0, 0
    for row, texts in enumerate(packed):
        used = 0
        for one in texts:
            logits = oracle.side(generator_of(weights, OBJECTIVE), GENERATOR, one.tokens[None])[0][0]
            asked = one.weights > 0
            filling -= sum(np.log(softmax(logits[i])[one.targets[i]]) for i in np.flatnonzero(asked))
            right += np.sum((logits.argmax(-1) == one.targets)[asked])
            shown = np.where(asked, drawn[row, used:used + len(asked)], one.targets)
            wrong = shown != one.targets
            score = oracle.side(weights["encoder"], MODEL, shown[None])[0][0, :, 0]
            telling += np.sum(np.log1p(np.exp(np.where(wrong, -score, score))))
            told += np.sum((score > 0) == wrong)
            hidden, replaced, used = hidden + asked.sum(), replaced + wrong.sum(), used + len(asked)
    assert found.weight == 26 and 0 < replaced < hidden
    np.testing.assert_allclose(found.sum / 26, filling / hidden + 50 * telling / 26, rtol=1e-5)
    want = {"generator": filling / hidden, "generator_nll": filling / hidden, "generator_correct": right / hidden,
            "discriminator": telling / 26, "discriminator_nll": telling / 26, "discriminator_correct": told / 26,
            "replaced": replaced / 26}
    assert set(found.aux) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(found.aux[name] / 26, value, rtol=1e-5, err_msg=name)


def test_tokens_are_drawn_as_the_generator_says():
    weights = tiny.weights(model.spec(GENERATOR))["encoder"]
    last = np.broadcast_to(RANDOM.normal(size=8).astype(np.float32), (8, 700, 8))
    drawn = tiny.jit(lambda last: electra.sample(weights, GENERATOR, last, jax.random.key(0), 2.0))(last)
    want = softmax(oracle.head(weights["head"], weights["embedding"]["tokens"], GENERATOR.head, last[:1, :1])[0, 0] / 2)
    count = np.bincount(np.asarray(drawn).reshape(-1), minlength=tiny.VOCABULARY)
    assert drawn.shape == (8, 700) and np.all(np.abs(count - 5600 * want) < 5 * np.sqrt(5600 * want * (1 - want)) + 1)


def test_nothing_flows_through_the_tokens_that_were_drawn():
    objective = dataclasses.replace(OBJECTIVE, tied=False)
    weights = tiny.weights(model.spec(MODEL) | {"extra": objective.extra(MODEL)})
    batch = rows.texts([examples(9, 5)], 16)

    @tiny.jit
    def gradient(weights):
        return jax.grad(lambda weights: objective.loss(weights, MODEL, batch, jax.random.key(0), ())[0].aux["discriminator"])(
            weights)

    found = gradient(weights)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found["extra"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found["encoder"]))


def test_training_lowers_the_loss():
    rows.trained(OBJECTIVE, MODEL, rows.texts([examples(9, 7)] * 16, 16))


@pytest.mark.parametrize(("objective", "cfg", "says"), [
    (OBJECTIVE, tiny.ENCODERS["tokens"], r"head Classifier\(labels=1, pooling=None\)"),
    (OBJECTIVE, tiny.LOCAL, "got Decoder"),
    (Electra(MASK, dataclasses.replace(GENERATOR, embedding=config.Embedding(tiny.VOCABULARY, width=12))), MODEL,
     r"those of tokens are \(19, 16\) and \(19, 12\): set the generator's Embedding.width"),
    (Electra(MASK, dataclasses.replace(GENERATOR, embedding=config.Embedding(20, width=16))), MODEL, "has 20 tokens"),
    (Electra(MASK, dataclasses.replace(GENERATOR, length=32)), MODEL, "reads 32 tokens, the model 64")])
def test_what_electra_cannot_take(objective, cfg, says):
    with pytest.raises(ValueError, match=says):
        objective.check(cfg)
    OBJECTIVE.check(MODEL)
    with pytest.raises(ValueError, match=r"it needs a jaxlm\.config\.Head"):
        Electra(MASK, MODEL)

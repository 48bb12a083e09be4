"""Mined pairs and the decisions about them, against float64 sums over one pass per pair; several losses at once."""

import jax
import numpy as np
import pytest

from jaxlm import config, model
from jaxlm.objectives import PrefixLM, matching, pair
from jaxlm.objectives.contrastive import Contrastive, Momentum
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.objectives.joint import Joint, Reversed, together
from jaxlm.objectives.masked import MaskedLM
from jaxlm.objectives.matching import Matching
from tests import oracle, tiny
from tests.decoding.oracle import softmax
from tests.objectives import rows

RANDOM = np.random.default_rng(0)
MODEL = config.EncoderDecoder(tiny.encoder([tiny.block(causal=False)]), tiny.decoder([tiny.block(cross=tiny.cross())]), (2,))
CONTRASTIVE = Contrastive(3, vector=config.Vector(config.Pooling.MEAN, width=6), temperature=0.5)
OBJECTIVE = Matching(CONTRASTIVE, start=3, room=2.0)


def some_pairs(count):
    return [tuple(RANDOM.integers(4, tiny.VOCABULARY, n).astype(np.int32) for n in RANDOM.integers(2, 6, 2))
            for _ in range(count)]


def test_segments_move_whole_and_only_where_there_is_room():
    batch = rows.pairs([some_pairs(3), some_pairs(2)], 16, 16)
    segments, tokens = batch["segments"], batch["targets"]
    gather = jax.jit(matching.gathered, static_argnums=3)
    for width in (9, 14):
        chosen, asked = RANDOM.integers(0, 6, (2, 3)), RANDOM.random((2, 3)) < 0.8
        index, placed = map(np.asarray, gather(segments, chosen, asked, width))
        for row in range(2):
            used = 0
            for segment in range(1, 4):
                place = chosen[row, segment - 1]
                text = tokens[place // 3][segments[place // 3] == place % 3 + 1]
                text = text[:0] if not asked[row, segment - 1] or used + len(text) > width else text
                np.testing.assert_array_equal(tokens.reshape(-1)[index[row][placed[row] == segment]], text)
                if not asked[row, segment - 1] or len(text):
                    used += len(text)
                else:
                    break


def test_the_more_alike_the_likelier_and_never_the_own():
    scores, asked = RANDOM.normal(size=(4, 4)).astype(np.float32), np.array([True, True, False, True])
    draw = tiny.jit(jax.vmap(lambda key: matching.mined(scores, asked, key)))
    chosen, some = draw(jax.random.split(jax.random.key(0), 3000))
    np.testing.assert_array_equal(some[0], asked)
    for i in (0, 1, 3):
        others = [j for j in (0, 1, 3) if j != i]
        count = np.bincount(chosen[:, i], minlength=4)
        assert count[others].sum() == 3000
        np.testing.assert_allclose(count[others] / 3000, softmax(scores[i, others].astype(float)), atol=0.05)
    alone = tiny.jit(matching.mined)(scores, np.array([True, False, False, False]), jax.random.key(0))[1]
    assert not np.any(alone)


def test_three_decisions_of_every_pair():
    weights, key = tiny.weights(model.spec(MODEL) | {"extra": OBJECTIVE.extra(MODEL)}), jax.random.key(1)
    packed = [some_pairs(3), some_pairs(2)]
    batch = rows.pairs(packed, 16, 16)

    @tiny.jit
    def both(weights, batch):
        sides = ((batch["inputs"], batch["input_segments"]), (batch["targets"], batch["segments"]))
        (inputs, asked), (targets, _) = (CONTRASTIVE.vectors(weights, MODEL, *side) for side in sides)
        first, second = jax.random.split(key)
        scores = 2 * inputs @ targets.T
        chosen = matching.mined(scores.T, asked, first)[0], matching.mined(scores, asked, second)[0]
        return OBJECTIVE.loss(weights, MODEL, batch, key, ())[0], *chosen

    found, source, target = both(weights, batch)
    places = [(row, place) for row in range(2) for place in range(len(packed[row]))]
    decisions = [(row, place, row, place, 1) for row, place in places]
    decisions += [(*divmod(int(source[3 * row + place]), 3), row, place, 0) for row, place in places]
    decisions += [(row, place, *divmod(int(target[3 * row + place]), 3), 0) for row, place in places]
    tree = weights["encoder"] | {"embedding": {"tokens": weights["decoder"]["embedding"]["tokens"]}}
    total, right = 0.0, 0
    for row, place, other_row, other, label in decisions:
        assert label == ((row, place) == (other_row, other))
        inputs, targets = packed[row][place][0], packed[other_row][other][1]
        memory = oracle.side(tree, MODEL.encoder, inputs[None])[1]
        read = np.array([[3, *targets[:-1]]])
        last = oracle.side(weights["decoder"], MODEL.decoder, read, None, np.ones_like(read), None, None,
                           (memory, np.ones((1, len(inputs)), int)))[1]
        logits = oracle.read(weights["extra"]["match"], matching.HEAD, last[:, -1:], None)[0, 0]
        total, right = total - np.log(softmax(logits)[label]), right + (np.argmax(logits) == label)
    np.testing.assert_allclose((found.sum, found.weight), (total, 15), rtol=1e-5)
    np.testing.assert_array_equal([found.aux["correct"], found.aux["mined"]], [right, 10])


def test_together_is_the_sum_of_means():
    losses = Loss(6.0, 3.0, {"nll": 9.0}), Loss(np.float32(10.0), np.float32(5.0), {}), Loss(0.0, 0.0, {})
    found = together({"one": (1.0, losses[0]), "other": (0.5, losses[1]), "none": (1.0, losses[2])})
    np.testing.assert_allclose(found.sum / found.weight, 6 / 3 + 0.5 * 10 / 5)
    assert {name: float(value / found.weight) for name, value in found.aux.items()} == {
        "one": 2.0, "one_nll": 3.0, "other": 2.0, "none": 0.0}


JOINT = Joint(("text", "back", "contrastive", "matching"),
              (PrefixLM(), Reversed(), Contrastive(3, vector=CONTRASTIVE.vector, temperature=0.5, momentum=Momentum(0.9, 4)),
               OBJECTIVE), (1.0, 1.0, 0.5, 1.0))


def test_all_of_them_at_once():
    JOINT.check(MODEL)
    assert JOINT.makes == "pair" and JOINT.special == (3,) and set(JOINT.extra(MODEL)) == {"vector", "match"}
    assert isinstance(JOINT.example(np.arange(4, 9), RANDOM), tuple)
    batch = rows.pairs([some_pairs(3), some_pairs(2)], 16, 16)
    told, weights, state = rows.trained(JOINT, MODEL, batch)
    assert np.all(np.any(state.carry["queue"]["inputs"], axis=1))
    swapped = {"inputs": batch["targets"], "input_segments": batch["segments"], "targets": batch["inputs"],
               "segments": batch["input_segments"], "weights": (batch["input_segments"] > 0).astype(np.float32)}

    @tiny.jit
    def alone(weights, batch):
        return pair.loss(weights, MODEL, batch)

    ways = alone(weights, batch), alone(weights, swapped)
    np.testing.assert_allclose([told[0].aux[name] for name in ("text", "back")], [one.sum / one.weight for one in ways],
                               rtol=1e-5)
    parts = [float(told[0].aux[name]) * factor for name, factor in zip(JOINT.names, JOINT.factors, strict=True)]
    np.testing.assert_allclose((told[0].loss, told[0].weight), (sum(parts), batch["weights"].sum()), rtol=1e-5)


def test_what_cannot_be_joined():
    with pytest.raises(ValueError, match="MaskedLM takes examples for encoders"):
        Joint(("one", "other"), (PrefixLM(), MaskedLM(1, 9)), (1.0, 1.0))
    with pytest.raises(ValueError, match="as many names"):
        Joint(("one",), (PrefixLM(), Reversed()), (1.0, 1.0))
    with pytest.raises(ValueError, match="names are different"):
        Joint(("one", "one"), (PrefixLM(), Reversed()), (1.0, 1.0))
    with pytest.raises(ValueError, match="hand something on between steps, here one, other"):
        Joint(("one", "other"), (JOINT.objectives[2],) * 2, (1.0, 1.0)).check(MODEL)
    with pytest.raises(ValueError, match="other weights as 'vector'"):
        wider = Contrastive(3, vector=config.Vector(config.Pooling.MEAN, width=7))
        Joint(("one", "other"), (wider, OBJECTIVE), (1.0, 1.0)).check(MODEL)
    for one in (OBJECTIVE, Reversed()):
        with pytest.raises(ValueError, match="this model is Encoder"):
            one.check(MODEL.encoder)
    with pytest.raises(ValueError, match="negatives=0"):
        Matching(Contrastive(2, negatives=1, between=3))
    with pytest.raises(ValueError, match="Joint"):
        OBJECTIVE.example(np.arange(4), RANDOM)

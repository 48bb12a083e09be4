"""E2S2's noise, and its four losses against float64 sums over one pass per text."""

import jax
import numpy as np
import pytest

from jaxlm import config, model
from jaxlm.objectives import SpanCorruption, e2s2
from jaxlm.objectives.e2s2 import E2S2
from jaxlm.objectives.masked import MaskedLM
from tests import oracle, tiny
from tests.decoding.oracle import softmax
from tests.objectives import rows

RANDOM = np.random.default_rng(0)
MODEL = config.EncoderDecoder(tiny.encoder([tiny.block(causal=False)]), tiny.decoder([tiny.block(cross=tiny.cross())]), (2,))
OBJECTIVE = E2S2(SpanCorruption((3, 4), rate=0.3), 3, (3, 4), shuffled=0.5, replaced=0.3, denoising=0.7, alike=0.4,
                 temperature=0.5)


def packed():
    return [[OBJECTIVE.example(RANDOM.integers(5, tiny.VOCABULARY, n), RANDOM) for n in row] for row in ((9, 4), (11,))]


def test_noise_is_as_it_is_said_to_be():
    tokens = RANDOM.integers(5, 500, (4, 3001)).astype(np.int32)
    tokens[:, ::7] = 3
    segments = np.repeat([[1, 2, 0]], [1501, 1400, 100], axis=1) * np.ones((4, 1), np.int32)
    noise = tiny.jit(lambda key: e2s2.noised(tokens, segments, key, 0.4, 0.2, 500, (3,)))
    shown, kinds = map(np.asarray, noise(jax.random.key(0)))
    free = (segments > 0) & (tokens != 3)
    np.testing.assert_array_equal(shown[~free], tokens[~free])
    np.testing.assert_array_equal(kinds == 0, np.where(kinds == 2, False, shown == tokens))
    assert not np.any(kinds[~free])
    # Where nothing was replaced in a run, it is the run in another order.
    runs = [array[:, :3000].reshape(-1, 3) for array in (tokens, shown, kinds, free, segments)]
    pure = ~np.any(runs[2] == 2, axis=1)
    np.testing.assert_array_equal(np.sort(runs[1][pure]), np.sort(runs[0][pure]))
    whole = np.all(runs[3], axis=1) & (runs[4][:, 0] == runs[4][:, 2])
    assert not np.any(runs[2][~whole] == 1)
    # Five of the six orders are others.
    assert abs(np.mean(runs[2][whole & pure].any(axis=1)) - _moved_share(0.4, 0.2)) < 0.04
    assert abs(np.mean(kinds[free & (kinds != 1)] == 2) - 0.2) < 0.02
    assert len(np.unique(shown[kinds == 2])) > 400


def _moved_share(shuffled, replaced):
    """Of runs in which nothing was replaced: what moved is never replaced; three of six orders leave one token at its place,
    two none, one all."""
    stay = (1 - replaced)**3 * (1 - shuffled + shuffled / 6)
    moved = shuffled * (3 / 6 * (1 - replaced) + 2 / 6)
    return moved / (stay + moved)


def test_all_four_losses():
    weights, key = tiny.weights(model.spec(MODEL) | {"extra": OBJECTIVE.extra(MODEL)}), jax.random.key(5)
    given = packed()
    batch = rows.pairs(given, 16, 16)
    found, shown, kinds = tiny.jit(lambda weights, batch: (
        OBJECTIVE.loss(weights, MODEL, batch, key, ())[0],
        *e2s2.noised(batch["inputs"], batch["input_segments"], key, 0.5, 0.3, tiny.VOCABULARY, (3, 4))))(weights, batch)
    tree = weights["encoder"] | {"embedding": {"tokens": weights["decoder"]["embedding"]["tokens"]}}
    nll, told, asked, read, vectors = [0.0, 0.0], 0.0, 0, 0, ([], [])
    for row, pairs in enumerate(given):
        for segment, (inputs, targets) in enumerate(pairs, start=1):
            here = batch["input_segments"][row] == segment
            for version, text in enumerate((inputs, np.asarray(shown[row])[here])):
                memory = oracle.side(tree, MODEL.encoder, text[None])[1]
                vectors[version].append(memory[0].mean(0) / np.linalg.norm(memory[0].mean(0)))
                tokens = np.array([[2, *targets[:-1]]])
                logits = oracle.side(weights["decoder"], MODEL.decoder, tokens, None, np.ones_like(tokens), None, None,
                                     (memory, np.ones((1, len(text)), int)))[0][0]
                nll[version] -= sum(np.log(softmax(line)[target]) for line, target in zip(logits, targets, strict=True))
            scores = oracle.read(weights["extra"]["noise"], e2s2.KINDS, memory, None)[0]
            told -= sum(np.log(softmax(line)[kind]) for line, kind in zip(scores, np.asarray(kinds[row])[here], strict=True))
            asked, read = asked + len(targets), read + len(inputs)
    alike = 0.0
    for one, other in (vectors, vectors[::-1]):
        for i in range(3):
            scores = [one[i] @ other[j] / 0.5 for j in range(3)] + [one[i] @ one[j] / 0.5 for j in range(3) if j != i]
            alike -= np.log(softmax(np.array(scores))[i]) / 2
    want = {"plain": nll[0] / asked, "noisy": nll[1] / asked, "denoising": told / read, "alike": alike / 3}
    for name, value in want.items():
        np.testing.assert_allclose(found.aux[name] / asked, value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.sum / found.weight, sum(want[name] * factor for name, factor in (
        ("plain", 0.5), ("noisy", 0.5), ("denoising", 0.7), ("alike", 0.4))), rtol=1e-5)


def test_training_lowers_the_loss():
    rows.trained(OBJECTIVE, MODEL, rows.pairs(packed(), 16, 16))


def test_what_e2s2_cannot_take():
    with pytest.raises(ValueError, match="MaskedLM makes texts for encoders"):
        E2S2(MaskedLM(1, 9), 2, ())
    with pytest.raises(ValueError, match="shares"):
        E2S2(SpanCorruption((3,)), 2, (), shuffled=1.5)
    with pytest.raises(ValueError, match="this model is Encoder"):
        OBJECTIVE.check(MODEL.encoder)
    OBJECTIVE.check(MODEL)

"""DupMAE's three losses against float64 sums, its decoder against one text at a time with its sight written out."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config, model
from jaxlm.objectives import MaskedLM, dupmae
from jaxlm.objectives.dupmae import DupMae
from tests import oracle, tiny
from tests.decoding.oracle import softmax
from tests.objectives import rows

RANDOM = np.random.default_rng(0)
MASK = MaskedLM(1, tiny.VOCABULARY, rate=0.4)
OBJECTIVE = DupMae(MASK, 3, rate=0.6, factor=0.3)
MODELS = {
    "rope": tiny.encoder([tiny.block(causal=False, window=3)], config.Head(True, True)),
    "learned": tiny.encoder([tiny.block(config.PostNorm(config.LayerNorm()), causal=False, position=None)], config.Head(False),
                            None, config.Embedding(tiny.VOCABULARY, 2.0, config.Learned(64), config.LayerNorm(), 2))}


def examples(*lengths):
    return [MASK.example(RANDOM.integers(2, tiny.VOCABULARY, n), RANDOM) for n in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_all_three_losses(name):
    cfg, key = MODELS[name], jax.random.key(2)
    weights = tiny.weights(model.spec(cfg) | {"extra": OBJECTIVE.extra(cfg)})
    packed = [examples(8, 1, 5), examples(10)]
    batch = rows.texts(packed, 15)
    found, sight = tiny.jit(lambda weights, batch: (
        OBJECTIVE.loss(weights, cfg, batch, key, ())[0], jax.random.bernoulli(key, 0.4, (2, 15, 15))))(weights, batch)
    tree, extra = weights["encoder"], weights["extra"]["decoder"]
    layer, table = OBJECTIVE._layer(cfg), np.asarray(tree["embedding"]["tokens"], np.float64)
    masked, decoder, words, hidden, rest = 0.0, 0.0, [], 0, 0
    for row, texts in enumerate(packed):
        used = 0
        for one in texts:
            length, place = len(one.tokens), np.arange(len(one.tokens))[None]
            logits, last, _ = oracle.side(tree, cfg, one.tokens[None])
            logits, vector = logits[0], last[0, 0]
            masked -= sum(np.log(softmax(logits[i])[one.targets[i]]) for i in np.flatnonzero(one.weights))
            seen = np.array(sight[row, used:used + length, used:used + length])
            np.fill_diagonal(seen, False)
            seen[:, 0] = True
            context = table[one.targets] * (cfg.embedding.scale or 1.0)
            context[0] = vector
            streams = [_embedded(tree["embedding"], cfg.embedding, y, place) for y in (np.tile(vector, (length, 1)), context)]
            for i in range(1, length):
                # The query alone before the context; the context's own states do not matter.
                mask = np.ones((1, length + 1, length + 1), bool)
                mask[0, 0] = [False, *seen[i]]
                x = np.concatenate([streams[0][:, i:i + 1], streams[1]], axis=1)
                state = oracle.block(oracle_tree(extra["block"]), layer, x, np.concatenate([[[i]], place], axis=1), None, mask)
                state = state if cfg.norm is None else oracle.norm(extra["norm"], cfg.norm, state)
                said = oracle.head(tree.get("head"), table, cfg.head, state)[0, 0]
                decoder -= np.log(softmax(said)[one.targets[i]])
            if length > 1:
                shares = np.log(softmax(logits[1:].max(axis=0)))
                words.append(-sum(shares[token] for token in set(one.targets[1:].tolist())) / (length - 1))
            hidden, rest, used = hidden + np.sum(one.weights), rest + length - 1, used + length
    want = {"masked": masked / hidden, "decoder": decoder / rest, "words": np.mean(words)}
    for part, value in want.items():
        np.testing.assert_allclose(found.aux[part] / found.weight, value, rtol=1e-5, err_msg=part)
    np.testing.assert_allclose(found.sum / hidden, want["masked"] + want["decoder"] + 0.3 * want["words"], rtol=1e-5)


def _embedded(tree, cfg, vectors, place):
    """Vectors in place of looked-up ones."""
    stand = {**tree, "tokens": vectors}
    return oracle.embed(stand, dataclasses.replace(cfg, scale=None), np.arange(len(vectors))[None], place)


def oracle_tree(tree):
    return {name: oracle_tree(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def test_words_are_the_same_in_pieces():
    cfg = MODELS["rope"]
    weights = tiny.weights(model.spec(cfg))["encoder"]
    last, segments = RANDOM.normal(size=(2, 10, 16)).astype(np.float32), np.repeat([[1, 2, 0]], [4, 5, 1], axis=1)
    segments, ordinary = np.tile(segments, (2, 1)), RANDOM.random((2, 10)) < 0.7

    def gradient(piece):
        return tiny.jit(jax.value_and_grad(lambda last: dupmae.words(weights, cfg, last, segments, ordinary, 2, piece).sum()))(
            last)

    for one, other in zip(jax.tree.leaves(gradient(256)), jax.tree.leaves(gradient(3)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_decoder_teaches_the_first_token():
    cfg = MODELS["rope"]
    weights, batch = tiny.weights(model.spec(cfg) | {"extra": OBJECTIVE.extra(cfg)}), rows.texts([examples(8, 4)], 12)

    @tiny.jit
    def gradient(vector):
        def total(vector):
            state = OBJECTIVE.decoded(weights, cfg, vector, batch["targets"], batch["segments"], jax.random.key(0))
            return state[0, 3].sum()
        return jax.grad(total)(vector)

    found = gradient(RANDOM.normal(size=(1, 12, 16)).astype(np.float32))
    assert np.flatnonzero(np.any(found[0], axis=1)).tolist() == [0, 3]  # as the first key, and as its own query


def test_training_lowers_the_loss():
    rows.trained(OBJECTIVE, MODELS["rope"], rows.texts([examples(8, 4), examples(12)], 12))


@pytest.mark.parametrize(("cfg", "says"), [
    (tiny.ENCODERS["tokens"], "Encoder with a jaxlm.config.Head"), (tiny.LOCAL, "got Decoder"),
    (tiny.ENCODERS["masked"], "Embedding.width must be None, got 12")])
def test_what_dupmae_cannot_take(cfg, says):
    with pytest.raises(ValueError, match=says):
        OBJECTIVE.check(cfg)
    OBJECTIVE.check(MODELS["rope"])
    with pytest.raises(ValueError, match="rate is between"):
        DupMae(MASK, 2, rate=1.0)

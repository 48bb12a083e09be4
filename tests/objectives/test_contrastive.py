"""Vectors of packed segments, InfoNCE and the queue, against float64 sums over one forward pass per text."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config, model, params
from jaxlm.layers import embed
from jaxlm.objectives import contrastive
from jaxlm.objectives.contrastive import Contrastive, Momentum, Texts
from jaxlm.objectives.spans import SpanCorruption
from tests import oracle, tiny
from tests.objectives import rows

RANDOM = np.random.default_rng(0)
ENCODER = tiny.encoder([tiny.block(causal=False)], config.Vector(config.Pooling.MEAN))
PAIR = tiny.ENCODER_DECODERS["shared"]
VECTOR = config.Vector(config.Pooling.FIRST, width=6, bias=True)


def documents(*lengths):
    return [RANDOM.integers(1, tiny.VOCABULARY, n).astype(np.int32) for n in lengths]


def some_pairs(count):
    return [tuple(documents(*RANDOM.integers(2, 7, 2))) for _ in range(count)]


def weights_of(objective, cfg):
    return tiny.weights(model.spec(cfg) | {"extra": objective.extra(cfg)})


def softmax_loss(scores, at):
    """Sum of -log softmax over the rows, float64."""
    scores = np.asarray(scores, np.float64)
    top = scores.max(axis=1, keepdims=True)
    return float(np.sum(np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0] - scores[np.arange(len(at)), at]))


@pytest.mark.parametrize("pooling", config.Pooling)
def test_segments_are_pooled_as_rows_are(pooling):
    x, lengths = RANDOM.normal(size=(9, 4)).astype(np.float32), np.array([3, 1, 4])
    segments = np.array([[1] * 3 + [2] + [3] * 4 + [0]], np.int32)
    alone = np.stack([np.resize(x[start:start + count], (4, 4)) for start, count in zip((0, 3, 4), lengths, strict=True)])

    @tiny.jit
    def both(x, segments, alone, valid):
        return *contrastive.pooled(pooling, x, segments, 4), embed.pool(pooling, alone, valid)

    found, present, want = both(x[None], segments, alone, np.arange(4)[None] < lengths[:, None])
    np.testing.assert_array_equal(present, [[True, True, True, False]])
    np.testing.assert_allclose(found[0, :3], want, rtol=1e-6)
    np.testing.assert_array_equal(found[0, 3], 0)


@pytest.mark.parametrize(("objective", "cfg"), [
    (Contrastive(3, temperature=0.3), ENCODER),
    (Contrastive(3, vector=VECTOR, learned=True, symmetric=False), PAIR),
    (Contrastive(3, vector=config.Vector(config.Pooling.LAST), negatives=2, between=0), PAIR)], ids=["head", "product", "hard"])
def test_packed_pairs_are_as_if_each_were_alone(objective, cfg):
    given = some_pairs(5)
    extra = [[], documents(3), documents(2, 3), [], documents(1)] if objective.negatives else [[]] * 5
    packed = [(one, np.concatenate([other, *(np.insert(text, 0, 0) for text in more)]))
              for (one, other), more in zip(given, extra, strict=True)]
    batch, weights = rows.pairs([packed[:3], packed[3:]], 24, 32), weights_of(objective, cfg)

    @tiny.jit
    def loss(weights, batch):
        return objective.loss(weights, cfg, batch, jax.random.key(0), {})[0]

    vector = objective.vector or cfg.head
    side = cfg.encoder if cfg is PAIR else cfg
    tree, head = weights["encoder"], weights["extra"].get("vector", {})
    if cfg is PAIR:
        tree = tree | {"embedding": {"tokens": weights["decoder"]["embedding"]["tokens"]}}

    def vectors(texts):
        return np.concatenate([oracle.read(head, vector, oracle.side(tree, side, text[None])[1], np.arange(len(text))[None])
                               for text in texts])

    scale = np.exp(float(weights["extra"]["scale"])) if objective.learned else 1 / objective.temperature
    inputs, targets = vectors([one for one, _ in given]), vectors([other for _, other in given])
    others = [text for more in extra for text in more]
    keys = np.concatenate([targets, vectors(others)]) if others else targets
    want = softmax_loss(scale * inputs @ keys.T, np.arange(5))
    if objective.symmetric:
        want = (want + softmax_loss(scale * targets @ inputs.T, np.arange(5))) / 2
    found = loss(weights, batch)
    np.testing.assert_allclose((found.sum, found.weight), (want, 5), rtol=1e-4)
    # Half of what is right in either way.
    right = [np.argmax(inputs @ keys.T, axis=1), np.argmax(targets @ inputs.T, axis=1)][:1 + objective.symmetric]
    np.testing.assert_allclose(found.aux["correct"], np.mean([np.sum(one == np.arange(5)) for one in right]))


def test_negatives_are_those_of_all_devices():
    objective, batch = Contrastive(3), rows.pairs([some_pairs(3) for _ in range(4)], 24, 24)
    weights = weights_of(objective, ENCODER)

    def loss(weights, batch):
        return objective.loss(weights, ENCODER, batch, jax.random.key(0), {})[0].sum

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = tiny.jit(loss)(weights, jax.device_put(batch, over))
    np.testing.assert_allclose(split, tiny.jit(loss)(weights, batch), rtol=1e-5)


def test_the_queue_keeps_the_newest_and_no_empty_places():
    queue, new = np.array([[1], [2], [0]], np.float32), np.array([[7], [8], [9]], np.float32)
    push = tiny.jit(contrastive._pushed)
    for there, want in (([1, 0, 0], [7, 1, 2]), ([0, 0, 0], [1, 2, 0]), ([0, 1, 1], [8, 9, 1]), ([1, 1, 1], [7, 8, 9])):
        np.testing.assert_array_equal(push(queue, new, np.array(there, bool))[:, 0], want)


def test_momentum_follows_and_its_keys_stay_as_negatives():
    cfg, objective = PAIR, Contrastive(2, vector=VECTOR, temperature=0.5, momentum=Momentum(0.75, 5))
    weights = weights_of(objective, cfg)
    spec = objective.carry(cfg)
    paths = params.paths({name: part for name, part in spec.items() if name != "queue"})
    assert set(paths) < set(params.paths(model.spec(cfg) | {"extra": objective.extra(cfg)}))
    carry = tiny.weights(spec, seed=3) | {"queue": params.init(spec["queue"], jax.random.key(0))}

    def run(weights, batch, carry):
        def total(weights, carry):
            loss, after = objective.loss(weights, cfg, batch, jax.random.key(0), carry)
            return loss.sum, after
        (value, after), (gradient, back) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(weights, carry)
        return value, after, gradient, back

    run, vectors = tiny.jit(run), tiny.jit(lambda weights, tokens, segments: objective.vectors(weights, cfg, tokens, segments))
    before = {"inputs": np.zeros((0, 6)), "targets": np.zeros((0, 6))}
    for _ in range(2):
        batch = rows.pairs([some_pairs(2), some_pairs(1)], 16, 16)
        value, after, gradient, back = run(weights, batch, carry)
        slow = {name: part for name, part in after.items() if name != "queue"}
        for path, old in params.paths({name: carry[name] for name in slow}).items():
            np.testing.assert_allclose(params.paths(after)[path], 0.75 * old + 0.25 * params.paths(weights)[path], rtol=1e-5,
                                       atol=1e-6)
        sides = {"inputs": (batch["inputs"], batch["input_segments"]), "targets": (batch["targets"], batch["segments"])}
        fast = {name: np.asarray(vectors(weights, *side)[0], np.float64)[:3] for name, side in sides.items()}
        keys = {name: np.asarray(vectors(slow, *side)[0], np.float64)[:3] for name, side in sides.items()}
        want = [softmax_loss(fast[one] @ np.concatenate([keys[other], before[other]]).T * 2, np.arange(3))
                for one, other in (("inputs", "targets"), ("targets", "inputs"))]
        np.testing.assert_allclose(value, np.mean(want), rtol=1e-4)
        before = {name: np.concatenate([keys[name], before[name]])[:5] for name in keys}
        for name, queue in after["queue"].items():
            np.testing.assert_allclose(queue[:len(before[name])], before[name], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(queue[len(before[name]):], 0)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(back))
        assert np.any(gradient["encoder"]["blocks"]["0"]["0"]["attention"]["q"]) and np.any(gradient["extra"]["vector"]["out"])
        carry = after


def test_training_brings_pairs_together():
    objective = Contrastive(2, vector=dataclasses.replace(VECTOR, bias=False), learned=True, temperature=0.2)
    *_, state = rows.trained(objective, PAIR, rows.pairs([some_pairs(2), some_pairs(1)], 16, 16))
    assert float(state.params["extra"]["scale"]) != float(np.float32(-np.log(0.2)))


class Letters:
    """A tokenizer of letters."""

    def decode(self, tokens):
        return "".join(chr(96 + token) if token else "|" for token in tokens)

    def encode(self, text, **_):
        return [0 if letter == "|" else ord(letter) - 96 for letter in text]


def test_documents_of_several_texts():
    objective = Texts(between=18, separator="|", edges=(17,), tokenizer=Letters())
    inputs, targets = objective.example(np.array([17, 1, 2, 0, 3, 0, 4, 5, 17]), RANDOM)
    assert inputs.tolist() == [17, 1, 2, 17] and targets.tolist() == [17, 3, 17, 18, 17, 4, 5, 17]
    for document, says in (([1, 2], "several texts"), ([1, 0, 0, 2], "several texts")):
        with pytest.raises(ValueError, match=says):
            objective.example(np.array(document), RANDOM)
    with pytest.raises(ValueError, match="no tokenizer"):
        dataclasses.replace(objective, tokenizer=None).example(np.array([1, 0, 2]), RANDOM)
    whole = Contrastive(2, objective, negatives=1, between=18)
    assert whole.example(np.array([17, 1, 0, 3, 17]), RANDOM).targets.tolist() == [17, 3, 17]
    assert whole.special == (18, 17, 18)


def test_what_contrastive_cannot_take():
    with pytest.raises(ValueError, match="says what vectors are"):
        Contrastive(2).check(PAIR)
    with pytest.raises(ValueError, match="token 19"):
        Contrastive(2, negatives=1, between=19).check(ENCODER)
    with pytest.raises(ValueError, match="attends to a source"):
        Contrastive(2, vector=VECTOR).check(PAIR.decoder)
    for fields in ({"count": 0}, {"count": 1, "temperature": 0.0}, {"count": 1, "negatives": 1}, {"count": 1, "between": 3}):
        with pytest.raises(ValueError, match="at least 1|divides the targets"):
            Contrastive(**fields)
    with pytest.raises(ValueError, match="Joint"):
        Contrastive(2).example(np.arange(4), RANDOM)
    with pytest.raises(ValueError, match="queue"):
        Momentum(1.0)
    Contrastive(2, SpanCorruption((3,)), VECTOR).check(PAIR)

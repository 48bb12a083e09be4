
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cache, model, params
from jaxlm.layers import attention
from tests import oracle, tiny

LENGTHS = np.array([12, 7, 3])
POSITIONS = np.where(np.arange(12)[None] < LENGTHS[:, None], np.arange(12)[None], -1).astype(np.int32)


@pytest.mark.parametrize("cfg", [*tiny.CAUSAL.values(), tiny.BIDIRECTIONAL], ids=[*tiny.CAUSAL, "bidirectional"])
def test_forward_equals_numpy(cfg):
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(3, 12)
    taps = range(cfg.stack.layers + 1)
    out = tiny.jit(lambda p, t: model.forward(p, cfg, t, positions=POSITIONS, hidden=taps))(weights, tokens)
    logits, states = oracle.decoder(weights, cfg, tokens, POSITIONS)
    valid = POSITIONS >= 0
    assert out.logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out.logits)[valid], logits[valid], atol=3e-5)
    for state, want in zip(out.hidden, states, strict=True):
        np.testing.assert_allclose(np.asarray(state)[valid], want[valid], atol=3e-5)


@pytest.mark.parametrize("name", ["local", "learned", "scalings"])
def test_packed_documents_are_separate_ones(name):
    """5, 4 and 3 tokens in a row, padding after the second. With a small `context` scalings go by each token's own
    position, in either form."""
    cfg = tiny.CAUSAL[name]
    weights = tiny.weights(model.spec(cfg))
    segments = np.array([[1] * 5 + [2] * 4 + [0] + [3] * 3])
    tokens = np.asarray(tiny.tokens(1, 13))
    forward = tiny.jit(lambda t, **known: model.forward(weights, cfg, t, context=np.array([1], np.int32), **known).logits)
    packed = np.asarray(forward(tokens, segments=segments))
    for segment in (1, 2, 3):
        mine = segments[0] == segment
        alone = np.where(np.arange(13) < mine.sum(), np.arange(13), -1).astype(np.int32)[None]
        padded = np.zeros_like(tokens)
        padded[0, :mine.sum()] = tokens[0, mine]
        want = np.asarray(forward(padded, positions=alone))
        np.testing.assert_allclose(packed[0, mine], want[0, :mine.sum()], atol=2e-5)


@pytest.mark.parametrize("name", ["local", "alibi", "learned"])
def test_soft_inputs_equal_looked_up_ones(name):
    """Soft inputs come scaled, and get positions and norm as tokens do."""
    cfg = tiny.CAUSAL[name]
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 5)
    soft = weights["decoder"]["embedding"]["tokens"][tokens] * (cfg.embedding.scale or 1.0)
    want = tiny.jit(lambda t: model.forward(weights, cfg, t).logits)(tokens)
    got = tiny.jit(lambda x: model.forward(weights, cfg, embeddings=x).logits)(soft)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_hidden_states_are_what_shorter_models_give():
    cfg = tiny.decoder([tiny.block(), tiny.block(window=2)] * 3, norm=None)
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 5)

    def prefix(repeats):
        shorter = tiny.decoder([tiny.block(), tiny.block(window=2)] * repeats, norm=None)
        tree = weights["decoder"]
        blocks = jax.tree.map(lambda leaf: leaf[:repeats], tree["blocks"])
        return tiny.jit(lambda p, t: model.forward(p, shorter, t).last)({"decoder": tree | {"blocks": blocks}}, tokens)

    for tree in (weights, model.unstack(weights, cfg)):
        hidden = tiny.jit(lambda p, t: model.forward(p, cfg, t, hidden=(2, 4, 6)).hidden)(tree, tokens)
        for repeats, state in zip((1, 2, 3), hidden, strict=True):
            np.testing.assert_allclose(state, prefix(repeats), atol=1e-5)


@pytest.mark.parametrize("name, layers, repeats, unrolled", [
    ("groups", 1, [1], False), ("groups", 3, [2, 1], False), ("groups", 7, [2, 1, 1, 1], False),
    ("groups", 7, [2, 1, 1, 1], True), ("latent", 3, [1, 1], False), ("latent", 3, [1, 1], True)])
def test_a_prefix_is_the_first_layers_of_weights_and_cache(name, layers, repeats, unrolled):
    """Of groups of 2, (1, 1) and 2 x (1, 1) layers: within the first, within the second, in the last one's last repeat."""
    cfg, tokens = tiny.CAUSAL[name], tiny.tokens(2, 9)
    weights, count = tiny.weights(model.spec(cfg)), np.array([5, 5], np.int32)
    read = tiny.jit(lambda: model.forward(weights, cfg, tokens[:, :5]).kv)()
    known = cache.filled(read, 12, jnp.asarray(count))
    want = tiny.jit(lambda: model.forward(weights, cfg, tokens[:, 5:], cache=known, hidden=(layers,)))()
    if unrolled:
        weights, known = model.unstack(weights, cfg), cache.unstack(known)
    first, part, kept = model.prefix(cfg, weights, known, layers)
    assert first.stack.blocks() == cfg.stack.blocks()[:layers] and [group.repeats for group in first.stack.groups] == repeats
    got = tiny.jit(lambda: model.forward(part, first, tokens[:, 5:], cache=kept, hidden=(layers,)))()
    np.testing.assert_allclose(got.hidden[0], want.hidden[0], atol=1e-5)
    if not unrolled:  # not even by a slice
        assert part["decoder"]["blocks"]["0"]["0"]["attention"]["q"] is weights["decoder"]["blocks"]["0"]["0"]["attention"]["q"]


@pytest.mark.parametrize("layers", [0, 9])
def test_a_prefix_has_no_more_layers_than_there_are(layers):
    with pytest.raises(ValueError, match=f"1 to 8 layers, got {layers}"):
        model.prefix(tiny.GROUPS, {"decoder": {"blocks": {}}}, None, layers)


def test_at_chooses_tokens_and_the_head_may_be_left_out():
    cfg = tiny.LOCAL
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(3, 6)
    at = np.array([[5, 0], [2, 2], [1, 3]])
    forward = tiny.jit(lambda at, logits: model.forward(weights, cfg, tokens, at=at, logits=logits), static_argnums=1)
    whole, some, none = forward(None, True), forward(at, True), forward(None, False)
    np.testing.assert_allclose(some.logits, np.take_along_axis(np.asarray(whole.logits), at[:, :, None], 1), atol=1e-6)
    assert some.logits.shape == (3, 2, 19) and none.logits is None
    np.testing.assert_allclose(none.last, whole.last, atol=1e-6)
    assert some.last.shape == (3, 6, 16)


def test_what_stands_at_no_position_does_not_matter():
    cfg = tiny.LOCAL
    weights, tokens = tiny.weights(model.spec(cfg)), np.asarray(tiny.tokens(3, 12))
    forward = tiny.jit(lambda t: model.forward(weights, cfg, t, positions=POSITIONS).logits)
    other = np.where(POSITIONS < 0, -1, tokens)
    np.testing.assert_array_equal(np.asarray(forward(tokens))[POSITIONS >= 0],
                                  np.asarray(forward(other))[POSITIONS >= 0])


def test_a_prefix_mask():
    """The first 3 tokens see each other; equal to the oracle's under the same mask."""
    cfg = tiny.LOCAL
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 6)
    mask = np.tri(6, dtype=bool) | (np.arange(6) < 3)[None]
    got = tiny.jit(lambda t: model.forward(weights, cfg, t, mask=mask[None]).logits)(tokens)
    want, _ = oracle.decoder(weights, cfg, tokens, None, None, np.stack([mask, mask]))
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtype_of_the_computation(dtype):
    cfg = tiny.GROUPS
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(1, 4)
    out = tiny.jit(lambda t: model.forward(weights, cfg, t, dtype=dtype, hidden=(0, 3)))(tokens)
    assert out.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in (out.last, *out.hidden, *jax.tree.leaves(out.kv))} == {jnp.dtype(dtype or jnp.float32)}
    exact, _ = oracle.decoder(weights, cfg, tokens)
    np.testing.assert_allclose(out.logits, exact, atol=3e-5 if dtype is None else 0.15)


def test_bfloat16_weights_are_computed_in_bfloat16():
    cfg = tiny.LOCAL
    weights = params.abstract(model.spec(cfg), jnp.bfloat16)
    out = jax.eval_shape(lambda p, t: model.forward(p, cfg, t), weights, tiny.tokens(1, 4))
    assert out.last.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32


def test_check_tokens():
    model.check_tokens(jnp.array([[0, 18]]), 19)
    with pytest.raises(ValueError, match=r"token id 19 at \(1, 0\) is out of range: the vocabulary has 19, ids 0 to 18"):
        model.check_tokens(jnp.array([[0, 18], [19, -1]]), 19)
    with pytest.raises(ValueError, match=r"token id -1 at \(1,\)"):
        model.check_tokens(np.array([3, -1]), 19)
    jax.jit(lambda t: model.check_tokens(t, 19))(jnp.array([99]))  # unknown until it runs


@pytest.mark.parametrize("cached", [0, 3])
def test_lengths_say_where_padding_begins(cached):
    """With and without a cache: as the positions that they stand for; ids in the padding do not matter."""
    weights = tiny.weights(model.spec(CFG))
    tokens = np.array([[5, 6, 7, 99], [8, 99, 99, 99]])
    places = np.array([[0, 1, 2, -1], [0, -1, -1, -1]])
    kept = None
    if cached:
        first = model.forward(weights, CFG, np.array([[1, 2, 3], [4, 5, 6]]))
        kept = cache.filled(first.kv, 8, jnp.array([3, 2]))
        places = np.where(places >= 0, places + np.array([[3], [2]]), -1)
    want = model.forward(weights, CFG, tokens, positions=places, cache=kept)
    got = model.forward(weights, CFG, tokens, lengths=np.array([3, 1]), cache=kept)
    np.testing.assert_allclose(np.asarray(got.logits)[places >= 0], np.asarray(want.logits)[places >= 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"token id 99 at \(0, 3\) is out of range"):
        model.forward(weights, CFG, tokens, lengths=np.array([4, 1]), cache=kept)


CFG = tiny.decoder([tiny.block()] * 2)
TOKENS = np.ones((2, 3), np.int32)
REFUSED = {
    "forward takes either tokens or embeddings": {},
    "either tokens or embeddings": {"tokens": TOKENS, "embeddings": np.ones((2, 3, 16))},
    r"tokens must be \[B, T\] and embeddings \[B, T, 16\], got shape \(2, 3, 1\)": {"tokens": TOKENS[..., None]},
    r"tokens must be \[B, T\] and embeddings \[B, T, 16\], got shape \(3,\)": {"tokens": TOKENS[0]},
    r"embeddings \[B, T, 16\], got shape \(2, 16\)": {"embeddings": np.ones((2, 16), np.float32)},
    r"at least one row and one token, got shape \(2, 0\)": {"tokens": TOKENS[:, :0]},
    r"at least one row and one token, got shape \(0, 3\)": {"tokens": TOKENS[:0]},
    r"embeddings must be \[B, T, 16\], got \(2, 3, 8\)": {"embeddings": np.ones((2, 3, 8), np.float32)},
    "segments: for packed training batches, not together with a cache":
        {"tokens": TOKENS, "segments": TOKENS, "cache": cache.allocate(CFG.stack, 2, 4)},
    "prefix: not together with a cache": {"tokens": TOKENS, "prefix": TOKENS, "cache": cache.allocate(CFG.stack, 2, 4)},
    r"prefix must be \(2, 3\), got \(3,\)": {"tokens": TOKENS, "prefix": TOKENS[0]},
    r"positions must be \(2, 3\), got \(3,\)": {"tokens": TOKENS, "positions": TOKENS[0]},
    r"segments must be \(2, 3\), got \(2, 2\)": {"tokens": TOKENS, "segments": TOKENS[:, :2]},
    r"lengths must be \(2,\), got \(3,\)": {"tokens": TOKENS, "lengths": np.ones(3, np.int32)},
    "forward takes positions or lengths, not both": {"tokens": TOKENS, "positions": TOKENS, "lengths": TOKENS[:, 0]},
    r"mask must be bool \[2 or 1, 3, 3\], got bool \(3, 3\)": {"tokens": TOKENS, "mask": np.ones((3, 3), bool)},
    r"mask must be bool \[2 or 1, 3, 3\], got int32 \(1, 3, 3\)":
        {"tokens": TOKENS, "mask": np.ones((1, 3, 3), np.int32)},
    r"hidden layer 3 does not exist: 0 \(embeddings\) to 2": {"tokens": TOKENS, "hidden": (0, 3)},
    "hidden layer -1 does not exist": {"tokens": TOKENS, "hidden": (-1,)},
    r"context must be of rank 1 with 2 rows, got shape \(3,\)": {"tokens": TOKENS, "context": np.ones(3, np.int32)},
    r"at must be of rank 2 with 2 rows, got shape \(2,\)": {"tokens": TOKENS, "at": np.ones(2, np.int32)},
    "the cache holds 3 rows, the input 2": {"tokens": TOKENS, "cache": cache.allocate(CFG.stack, 3, 4)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises(ValueError, match=message):
        model.forward(params.abstract(model.spec(CFG)), CFG, **REFUSED[message])


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_encoders_equal_numpy(name):
    """Every head, of padded rows."""
    cfg = tiny.ENCODERS[name]
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(3, 12)
    types = None if cfg.embedding.types is None else np.asarray(tiny.tokens(3, 12, seed=1)) % 2
    got = tiny.jit(lambda p, t: model.forward(p, cfg, t, lengths=LENGTHS, types=types).logits)(weights, tokens)
    want, _, _ = oracle.side(weights["encoder"], cfg, tokens, POSITIONS, types=types)
    valid = POSITIONS >= 0 if want.shape[:2] == POSITIONS.shape else slice(None)
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], atol=3e-5)


SOURCE_LENGTHS = np.array([9, 5, 2])


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_encoder_decoders_equal_numpy(name):
    """At once; through a cache that holds the source's keys and values; with unrolled layers."""
    cfg = tiny.ENCODER_DECODERS[name]
    weights = tiny.weights(model.spec(cfg))
    inputs, tokens = tiny.tokens(3, 9) % cfg.encoder.embedding.vocabulary, tiny.tokens(3, 12, seed=1)
    segments = (np.arange(9)[None] < SOURCE_LENGTHS[:, None]).astype(int)
    want = oracle.encoder_decoder(weights, cfg, inputs, tokens, segments)

    @tiny.jit
    def run(weights):
        source = model.encode(weights, cfg, inputs, lengths=SOURCE_LENGTHS)
        whole = model.forward(weights, cfg, tokens, memory=source).logits
        kept = model.remember(weights, cfg, source)
        first = model.forward(weights, cfg, tokens[:, :7], memory=kept)
        filled = cache.filled(first.kv, 16, np.full(3, 7, np.int32), kept)
        second = model.forward(weights, cfg, tokens[:, 7:], cache=filled)
        unrolled = model.forward(model.unstack(weights, cfg), cfg, tokens[:, 7:], cache=cache.unstack(filled))
        again = model.remember(model.unstack(weights, cfg), cfg, source)
        assert jax.tree.structure(again.layers) == jax.tree.structure(cache.unstack(filled).memory.layers)
        return whole, jnp.concatenate([first.logits, second.logits], axis=1), unrolled.logits

    whole, cached, unrolled = run(weights)
    np.testing.assert_allclose(whole, want, atol=3e-5)
    np.testing.assert_allclose(cached, want, atol=3e-5)
    np.testing.assert_allclose(unrolled, want[:, 7:], atol=3e-5)


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_packed_pairs_are_separate_ones(name):
    """Each segment sees its own source, also in runs of queries."""
    cfg = tiny.ENCODER_DECODERS[name]
    weights = tiny.weights(model.spec(cfg))
    input_segments = np.array([[1] * 4 + [2] * 3 + [3] * 2 + [0]])
    segments = np.array([[1] * 2 + [2] * 5 + [3] * 4 + [0]])
    inputs, tokens = tiny.tokens(1, 10) % cfg.encoder.embedding.vocabulary, tiny.tokens(1, 12, seed=1)
    want = oracle.encoder_decoder(weights, cfg, inputs, tokens, input_segments, segments)

    def run(weights):
        source = model.encode(weights, cfg, inputs, segments=input_segments)
        return model.forward(weights, cfg, tokens, segments=segments, memory=source).logits

    np.testing.assert_allclose(tiny.jit(run)(weights)[:, :11], want[:, :11], atol=3e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", 4)
        np.testing.assert_allclose(tiny.jit(lambda w: run(w))(weights)[:, :11], want[:, :11], atol=3e-5)


def test_the_sides_work_alone():
    cfg = tiny.ENCODER_DECODERS["shared"]
    weights, inputs = tiny.weights(model.spec(cfg)), tiny.tokens(2, 6)
    side, tree = model.encoder(cfg, weights)
    assert jax.tree.structure(tree) == jax.tree.structure(model.spec(side))
    alone = tiny.jit(lambda w: model.forward(w, side, inputs).last)(tree)
    np.testing.assert_allclose(alone, tiny.jit(lambda w: model.encode(w, cfg, inputs).hidden)(weights), atol=1e-6)
    tokens = tiny.tokens(2, 4)
    only = {"decoder": weights["decoder"]}
    source = cache.Memory(alone, None, jnp.ones((2, 6), jnp.int32))
    np.testing.assert_allclose(tiny.jit(lambda w: model.forward(w, cfg.decoder, tokens, memory=source).logits)(only),
                               oracle.encoder_decoder(weights, cfg, inputs, tokens), atol=3e-5)


def test_a_prefix_of_a_decoder_keeps_its_part_of_the_source():
    cfg = tiny.ENCODER_DECODERS["sides"]
    weights, inputs, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 6) % 13, tiny.tokens(2, 4)
    source = model.encode(weights, cfg, inputs)
    empty = cache.allocate(cfg.decoder.stack, 2, 8).replace(memory=model.remember(weights, cfg, source))
    shorter, params_, kept = model.prefix(cfg.decoder, weights, empty, 3)
    states = tiny.jit(lambda w: model.forward(w, cfg, tokens, memory=source, hidden=(3,)).hidden)(weights)
    got = tiny.jit(lambda w: model.forward(w, shorter, tokens, cache=kept, hidden=(3,)).hidden)(params_)
    np.testing.assert_allclose(got[0], states[0], atol=1e-5)


def test_places_of_a_source_without_a_token_are_not_seen():
    cfg = tiny.ENCODER_DECODERS["shared"]
    weights, inputs, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(3, 9), tiny.tokens(3, 4, seed=1)
    positions = np.where(np.arange(9)[None] < SOURCE_LENGTHS[:, None], np.arange(9)[None], -1).astype(np.int32)

    @tiny.jit
    def run(weights):
        return [model.forward(weights, cfg, tokens, memory=model.encode(weights, cfg, inputs, **given)).logits
                for given in ({"lengths": SOURCE_LENGTHS}, {"positions": positions})]
    np.testing.assert_allclose(*run(weights), atol=1e-5)


def test_a_segment_without_a_source_adds_nothing():
    cfg = tiny.ENCODER_DECODERS["shared"]
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(1, 4)
    segments, source = np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 0, 0]])
    inputs = tiny.tokens(1, 5, seed=1)

    @tiny.jit
    def run(weights, inputs):
        return model.forward(weights, cfg, tokens, segments=segments,
                             memory=model.encode(weights, cfg, inputs, segments=source)).logits
    want = oracle.encoder_decoder(weights, cfg, inputs, tokens, source, segments)
    np.testing.assert_allclose(run(weights, inputs), want, atol=3e-5)


def test_logits_of_some_tokens_of_a_classifier():
    cfg = tiny.ENCODERS["tokens"]
    weights, tokens, at = tiny.weights(model.spec(cfg)), tiny.tokens(2, 6), jnp.array([[5, 1], [0, 0]])
    run = tiny.jit(lambda w, at: model.forward(w, cfg, tokens, at=at).logits)
    want = np.take_along_axis(np.asarray(run(weights, None)), np.asarray(at)[..., None], 1)
    np.testing.assert_allclose(run(weights, at), want, atol=1e-6)
    with pytest.raises(ValueError, match="takes no `at`"):
        model.forward(tiny.weights(model.spec(tiny.ENCODERS["vector"])), tiny.ENCODERS["vector"], tokens, at=at)


def test_more_is_refused_than_there_are_positions_or_types():
    cfg = tiny.ENCODERS["masked"]
    weights = tiny.weights(model.spec(cfg))
    with pytest.raises(ValueError, match="a row has 65 tokens, and there are 64 learned positions"):
        model.forward(weights, cfg, tiny.tokens(1, 65))
    with pytest.raises(ValueError, match="type 2 is out of range: 0 to 1"):
        model.forward(weights, cfg, tiny.tokens(1, 3), types=jnp.array([[0, 1, 2]]))


def test_what_is_no_source():
    cfg = tiny.ENCODER_DECODERS["shared"]
    weights = tiny.weights(model.spec(cfg))
    with pytest.raises(ValueError, match="holds keys and values already"):
        model.remember(weights, cfg, cache.Memory(None, (), jnp.ones((1, 3), jnp.int32)))
    side, tree = model.encoder(cfg, weights)
    with pytest.raises(ValueError, match="forward reads the text of a Encoder"):
        model.encode(tree, side, tiny.tokens(1, 3))


@pytest.mark.parametrize(("says", "given"), [
    ("attends to a source", {}),
    ("given twice|holds a source already", {"both": True}),
    ("3 rows, the tokens 2", {"rows": 3}),
])
def test_sources_that_are_wrong(says, given):
    cfg = tiny.ENCODER_DECODERS["shared"]
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 4)
    source = cache.Memory(jnp.zeros((given.get("rows", 2), 5, 16)), None, jnp.ones((given.get("rows", 2), 5), jnp.int32))
    arguments = {"memory": source} if given else {}
    if "both" in given:
        arguments["cache"] = cache.allocate(cfg.decoder.stack, 2, 8).replace(memory=source)
    with pytest.raises(ValueError, match=says):
        model.forward(weights, cfg, tokens, **arguments)


def test_what_encoders_do_not_take():
    cfg = tiny.ENCODERS["vector"]
    weights, tokens = tiny.weights(model.spec(cfg)), tiny.tokens(2, 4)
    with pytest.raises(ValueError, match="no use for a cache"):
        model.forward(weights, cfg, tokens, cache=cache.allocate(cfg.stack, 2, 8))
    with pytest.raises(ValueError, match="rows of several segments"):
        model.forward(weights, cfg, tokens, segments=jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="no types"):
        model.forward(weights, cfg, tokens, types=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="leave out `memory`"):
        model.forward(weights, cfg, tokens, memory=cache.Memory(jnp.zeros((2, 5, 16)), None, jnp.ones((2, 5), jnp.int32)))

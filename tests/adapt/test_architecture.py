import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm.params
from jaxlm import adapt, config, model, sharding
from jaxlm.config import (
    Classifier,
    Dense,
    Embedding,
    Group,
    Head,
    LayerNorm,
    ParallelNorm,
    Pooling,
    PreNorm,
    QkNorm,
    RmsNorm,
    Rope,
    SandwichNorm,
    Stack,
    Vector,
)
from jaxlm.io import families
from jaxlm.model import Model
from jaxlm.objectives import pair
from jaxlm.training import step as steps
from jaxlm.training.optimizer import AdamW, Optimizer
from tests import tiny

# Groups of other shapes and norms, one of several repeats, one with a pattern of two.
CFG = tiny.decoder(Stack((
    Group((tiny.block(SandwichNorm(RmsNorm(offset=1.0)), position=Rope(50.0), window=3, softcap=4.0, scale=0.4),), 4),
    Group((tiny.block(ParallelNorm(LayerNorm(), shared=True), Dense(8, gated=False), multiplier=0.5, kv_heads=4, bias=True),
           tiny.block(PreNorm(RmsNorm()), qk_norm=QkNorm(RmsNorm()), sinks=True)), 2))),
    head=Head(tied=False, bias=True, softcap=5.0))
SIMPLE = tiny.decoder([tiny.block()] * 2)
TOKENS, SOURCE = tiny.tokens(2, 7), tiny.tokens(2, 5, seed=1)


def made(cfg):
    return Model(cfg, tiny.weights(model.spec(cfg)), "a tokenizer")


def forward(lm, tokens=TOKENS, **given):
    run = tiny.jit(lambda params, given: model.forward(params, lm.config, tokens, **given))
    out = run(lm.params, given)
    return np.asarray(out.last if out.logits is None else out.logits)


def same(lm, other):
    """The same model, of the same arrays."""
    assert lm.config == other.config and lm.tokenizer == other.tokenizer
    ours, theirs = jaxlm.params.paths(lm.params), jaxlm.params.paths(other.params)
    assert ours.keys() == theirs.keys() and all(leaf is theirs[path] for path, leaf in ours.items())


def fits(lm):
    """The tree is the one of the config, which JSON keeps, and no array is there twice."""
    spec, leaves = jaxlm.params.paths(model.spec(lm.config)), jaxlm.params.paths(lm.params)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: param.shape for path, param in spec.items()}
    assert config.from_json(config.to_json(lm.config)) == lm.config
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves.values()}) == len(leaves)
    assert lm.tokenizer == "a tokenizer"


def layer(lm, side, index):
    """One layer's config and weights."""
    cfg = getattr(lm.config, side, lm.config)
    g, p, r = cfg.stack.place(index)
    return cfg.stack.blocks()[index], jax.tree.map(lambda leaf: leaf[r], lm.params[side]["blocks"][str(g)][str(p)])


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_to_encoder_decoder_copies_the_decoder():
    lm = made(CFG)
    both = adapt.to_encoder_decoder(lm, start=(3, 1))
    fits(both)
    assert both.config.start == (3, 1) and not both.config.shared and not both.config.projection
    equal(both.params["encoder"], adapt.to_encoder(lm).params["encoder"])
    for index in range(CFG.stack.layers):
        one, tree = layer(both, "decoder", index)
        _, old = layer(lm, "decoder", index)
        assert one.cross == dataclasses.replace(one.attention, position=None, causal=False, window=None, source=16)
        equal(tree["cross_attention"], old["attention"])
        norms = [name for name in tree if name.startswith("cross_attention_norm")]
        assert len(norms) == {SandwichNorm: 2, ParallelNorm: 0, PreNorm: 1}[type(one.residual)]
        for name in norms:
            equal(tree[name], old[name.replace("cross_", "")])
    same(adapt.decoder_of(both), lm)
    same(adapt.encoder_of(both), Model(both.config.encoder, {"encoder": both.params["encoder"]}, "a tokenizer"))
    # Nothing is looked at yet: the decoder as it was.
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "cross_attention" in str(path) and "'o'" in str(path) else leaf, both.params)
    memory = model.Memory(jnp.ones((2, 5, 16)), None, jnp.ones((2, 5), jnp.int32))
    np.testing.assert_allclose(forward(Model(both.config, silent), memory=memory), forward(lm), atol=1e-5)


def test_to_encoder_decoder_with_one_table():
    both = adapt.to_encoder_decoder(made(SIMPLE), start=(0,), shared=True)
    fits(both)
    assert "tokens" not in both.params["encoder"]["embedding"]


def test_an_encoder_of_the_decoders_own_arrays_gets_copies():
    lm = made(CFG)
    both = adapt.to_encoder_decoder(lm, adapt.to_encoder(lm, range(4)), start=(0,))
    fits(both)
    assert [one.attention.causal for one in both.config.encoder.stack.blocks()] == [False] * 4 + [True] * 4


BATCH = {"inputs": SOURCE, "input_segments": jnp.ones_like(SOURCE), "targets": TOKENS, "segments": jnp.ones_like(TOKENS),
         "weights": jnp.ones(TOKENS.shape)}


def changed(before, after):
    before = jaxlm.params.paths(before)
    return {path for path, leaf in jaxlm.params.paths(after).items() if not np.array_equal(leaf, before[path])}


def test_all_of_it_learns():
    """Also what was copied is a weight of its own: a step may write over the arrays that it was given."""
    both = adapt.to_encoder_decoder(made(SIMPLE), start=(0,))
    before = jax.tree.map(np.array, both.params)
    transform = Optimizer(AdamW(), optax.constant_schedule(0.01)).transform(model.spec(both.config))

    def loss(params, batch, key, carry):
        return pair.loss(params, both.config, batch), carry

    step = tiny.jit(lambda state, batch: steps.advance(loss, transform, state, batch), donate_argnums=0)
    state, metrics = step(steps.begin(both.params, transform, jax.random.key(1)), BATCH)
    assert metrics.finite and changed(before, state.params) == set(jaxlm.params.paths(before))


def test_another_size_trains_cross_attention_first():
    small = dataclasses.replace(SIMPLE, width=12, stack=Stack((Group((tiny.block(kv_heads=1),), 3),)))
    reader, writer = made(small), made(SIMPLE)
    with pytest.raises(ValueError, match="the encoder is 12 wide and the decoder 16: cross-attention begins fresh and needs"):
        adapt.to_encoder_decoder(writer, reader, start=(0,))
    both = adapt.to_encoder_decoder(writer, reader, start=(0,), key=jax.random.key(0))
    fits(both)
    place = both.params["decoder"]["blocks"]["0"]["0"]
    assert place["cross_attention"]["k"].shape == (2, 12, 2, 8) and not both.config.projection
    assert not np.array_equal(place["cross_attention"]["q"], place["attention"]["q"])
    assert (place["cross_attention_norm"]["scale"] == 1).all()
    same(adapt.encoder_of(both), adapt.to_encoder(reader))
    same(adapt.decoder_of(both), writer)

    frozen = adapt.but_cross_attention(both.config)
    paths = set(jaxlm.params.paths(both.params))
    assert paths - set(frozen) == {path for path in paths if "/cross_attention" in path} != set()
    transform = Optimizer(AdamW(), optax.constant_schedule(0.01), frozen=frozen).transform(model.spec(both.config))
    ones = jax.tree.map(jnp.ones_like, both.params)
    with jax.numpy_dtype_promotion("standard"):  # for optax's Adam
        updates, _ = jax.jit(lambda params: transform.update(ones, transform.init(params), params))(both.params)
    assert changed(both.params, optax.apply_updates(both.params, updates)) == paths - set(frozen)


def test_fresh_weights_lie_on_the_models_mesh_in_its_dtype():
    mesh = sharding.mesh(devices=jax.devices()[:2], fsdp=2)
    spec = model.spec(SIMPLE)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.weights(spec))
    lm = Model(SIMPLE, jax.device_put(weights, sharding.shardings(spec, mesh)))
    small = dataclasses.replace(SIMPLE, width=12)
    both = adapt.to_encoder_decoder(lm, made(small), start=(0,), key=jax.random.key(0))
    for name in ("q", "o"):
        place = both.params["decoder"]["blocks"]["0"]["0"]
        assert place["cross_attention"][name].sharding == place["attention"][name].sharding
        assert place["cross_attention"][name].dtype == jnp.bfloat16


def test_to_encoder_sees_both_sides():
    lm = made(CFG)
    encoder = adapt.to_encoder(lm, head="masked")
    fits(encoder)
    assert encoder.config.stack.layers == CFG.stack.layers and not any(
        one.attention.causal for one in encoder.config.stack.blocks())
    everything = jnp.ones((1, 7, 7), bool)
    np.testing.assert_allclose(forward(encoder), forward(lm, mask=everything), atol=1e-5)
    same(adapt.to_decoder(encoder), lm)  # views, both ways
    bare = adapt.to_encoder(lm)
    assert bare.config.head is None and "head" not in bare.params["encoder"]
    same(adapt.to_encoder(bare), bare)


def test_to_encoder_of_some_layers():
    """Of layers that lay together some see both sides: each keeps its own weights."""
    lm = made(CFG)
    encoder = adapt.to_encoder(lm, [1, 2, 7], head="masked")
    fits(encoder)
    assert [one.attention.causal for one in encoder.config.stack.blocks()] == [layer not in (1, 2, 7) for layer in range(8)]
    for index in range(CFG.stack.layers):
        one, tree = layer(encoder, "encoder", index)
        old, weights = layer(lm, "decoder", index)
        assert dataclasses.replace(one, attention=old.attention) == old
        equal(tree, weights)
    again = adapt.to_decoder(encoder)
    np.testing.assert_allclose(forward(again), forward(lm), atol=1e-5)
    # Whole groups are not copied.
    halves = adapt.to_encoder(lm, range(4, 8))
    assert all(a is b for a, b in zip(jax.tree.leaves(halves.params["encoder"]["blocks"]),
                                      jax.tree.leaves(lm.params["decoder"]["blocks"]), strict=True))
    assert [group.repeats for group in halves.config.stack.groups] == [4, 2]


def test_heads():
    lm = made(SIMPLE)
    vector = adapt.to_encoder(lm, head=Vector(Pooling.MEAN))
    fits(vector)
    assert "head" not in vector.params["encoder"]
    labels = adapt.to_encoder(lm, head=Classifier(3, Pooling.LAST), key=jax.random.key(0))
    fits(labels)
    assert labels.params["encoder"]["head"]["out"].shape == (16, 3)
    untied = adapt.to_encoder(labels, head=Head(False), key=jax.random.key(0))
    fits(untied)
    back = adapt.to_decoder(labels)
    assert back.config.head == Head(tied=True)
    same(back, lm)
    assert adapt.to_decoder(untied).config.head == Head(False)
    other = adapt.to_decoder(labels, Head(False, True), key=jax.random.key(0))
    fits(other)
    with pytest.raises(ValueError, match="a new Head need a key"):
        adapt.to_decoder(labels, Head(False))


def test_what_a_text_begins_with_is_the_tokenizers():
    tokenizer = types.SimpleNamespace(bos_id=None, eos_id=3)
    lm = dataclasses.replace(made(SIMPLE), tokenizer=tokenizer)
    assert adapt.to_encoder_decoder(lm).config.start == (3,)
    with pytest.raises(ValueError, match="give `start`"):
        adapt.to_encoder_decoder(dataclasses.replace(lm, tokenizer=None))


def test_a_block_without_its_first_norm():
    """Nothing is there to copy for cross-attention's."""
    cfg = tiny.decoder([tiny.block(PreNorm(RmsNorm(), attention=False)), tiny.block()])
    both = adapt.to_encoder_decoder(made(cfg), start=(0,))
    fits(both)
    for path, leaf in jaxlm.params.paths(both.params["decoder"]["blocks"]["0"]["0"]).items():
        if path.startswith("cross_attention_norm"):
            np.testing.assert_array_equal(leaf, 1.0)


def test_one_stack_in_three_modes():
    """As UniXcoder's: what a text begins with, and the mask, say what it is."""
    decoder = made(SIMPLE)
    encoder = adapt.to_encoder(decoder, head="masked")
    by_prefix = tiny.jit(lambda params, prefix: model.forward(params, SIMPLE, TOKENS, prefix=prefix).logits)
    by_mask = tiny.jit(lambda params, mask: model.forward(params, encoder.config, TOKENS, mask=mask).logits)
    index = jnp.arange(7)
    for read in (0, 4, 7):  # decoder, encoder-decoder, encoder
        mask = ((index[None] < read) | (index[None] <= index[:, None]))[None]
        np.testing.assert_allclose(by_prefix(decoder.params, jnp.full((2, 7), read, jnp.int32)),
                                   by_mask(encoder.params, mask), atol=1e-5)
    np.testing.assert_allclose(by_mask(encoder.params, jnp.ones((1, 7, 7), bool)), forward(encoder), atol=1e-5)


def test_a_gemma_becomes_a_t5gemma():
    block = tiny.block(SandwichNorm(RmsNorm(offset=1.0)), Dense(24, config.Activation.GELU_TANH), softcap=5.0)
    local = dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=3))
    cfg = tiny.decoder([local, block] * 2, RmsNorm(offset=1.0), Head(tied=True, softcap=3.0),
                       Embedding(tiny.VOCABULARY, scale=4.0))
    both = adapt.to_encoder_decoder(made(cfg), start=(2,))
    family, values = families.write(both.config)
    assert family.name == "t5gemma" and values["encoder"]["sliding_window"] == 2 and values["decoder"]["sliding_window"] == 3


PAIR = tiny.ENCODER_DECODERS["shared"]


@pytest.mark.parametrize("message, run", {
    "to_encoder_decoder takes the model of a config Decoder, got EncoderDecoder; encoder_of and decoder_of take an Enc":
        lambda: adapt.to_encoder_decoder(made(PAIR), start=(0,)),
    "to_encoder_decoder takes a model that attends to no source: decoder_of leaves that out":
        lambda: adapt.to_encoder_decoder(Model(PAIR.decoder, {"decoder": made(PAIR).params["decoder"]}), start=(0,)),
    "EncoderDecoder.start must hold at least one token": lambda: adapt.to_encoder_decoder(made(SIMPLE), start=()),
    "one table of tokens serves both sides only where": lambda: adapt.to_encoder_decoder(
        made(SIMPLE), made(dataclasses.replace(SIMPLE, embedding=Embedding(5))), start=(0,), shared=True),
    "layer 2 does not exist: 0 to 1": lambda: adapt.to_encoder(made(SIMPLE), [0, 2]),
    'layers must be "all" or numbers of layers, got \'some\'': lambda: adapt.to_encoder(made(SIMPLE), "some"),
    'layers must be "all" or numbers of layers, got Model': lambda: adapt.to_encoder(made(SIMPLE), made(SIMPLE)),
    'layers must be "all" or numbers of layers, got .0.5': lambda: adapt.to_encoder(made(SIMPLE), [0.5]),
    "of a model that gives logits, or a config of one, got 'masked' of NoneType":
        lambda: adapt.to_encoder(adapt.to_encoder(made(SIMPLE)), head="masked"),
    "the weights of a new Classifier need a key": lambda: adapt.to_encoder(made(SIMPLE), head=Classifier(2, None)),
    "to_decoder takes the model of a config Encoder, got Decoder": lambda: adapt.to_decoder(made(SIMPLE)),
    "encoder_of takes an encoder-decoder, got a Decoder": lambda: adapt.encoder_of(made(SIMPLE)),
    "an encoder writes no text": lambda: adapt.decoder_of(adapt.to_encoder(made(SIMPLE))),
}.items())
def test_errors(message, run):
    with pytest.raises(ValueError, match=message):
        run()

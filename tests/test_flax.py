import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlm.flax as doors
from jaxlm import block, cache, model, params
from jaxlm.config import Embedding, LayerNorm, Learned, QkNorm, RelativeBias, RmsNorm, Rope
from jaxlm.layers import attention, embed, feedforward, norm, position
from jaxlm.layers.mask import describe
from tests import tiny

KEY = jax.random.key(3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
TOKENS = tiny.tokens(2, 5)


def same(got, want, tolerance=0.0):
    """Trees of one structure, equal leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want)


@pytest.mark.parametrize("name", ["learned", "groups"])
def test_decoder_has_the_same_tree_and_output(name):
    cfg = tiny.CAUSAL[name]
    decoder = doors.Decoder(cfg)
    variables = tiny.jit(decoder.init)(KEY, TOKENS)
    assert variables.keys() == {"params"}
    same(variables["params"], tiny.jit(lambda key: params.init(model.spec(cfg), key))(KEY), 1e-6)

    weights = tiny.weights(model.spec(cfg))
    got = tiny.jit(lambda w: decoder.apply({"params": w}, TOKENS, hidden=(0, 1)))(weights)
    same(got, tiny.jit(lambda w: model.forward(w, cfg, TOKENS, hidden=(0, 1)))(weights), 1e-6)


def test_decoder_takes_every_argument_and_kind_of_weight():
    cfg = tiny.LOCAL
    spec = model.spec(cfg)
    weights = model.unstack(tiny.quantised(spec, tiny.weights(spec)), cfg)
    memory = cache.unstack(cache.allocate(cfg.stack, 2, 8))
    known = {"cache": memory.replace(length=jnp.array([0, 2])), "at": jnp.array([[4], [1]])}
    got = tiny.jit(lambda w: doors.Decoder(cfg).apply({"params": w}, TOKENS, **known))(weights)
    same(got, tiny.jit(lambda w: model.forward(w, cfg, TOKENS, **known))(weights), 1e-6)
    with pytest.raises(ValueError, match="hidden layer 9 does not exist"):
        doors.Decoder(cfg).apply({"params": weights}, TOKENS, hidden=(9,))


def test_encoders_and_encoder_decoders_have_the_same_tree_and_output():
    cfg = tiny.ENCODERS["labels"]
    weights = tiny.weights(model.spec(cfg))
    assert jax.tree.structure(jax.eval_shape(doors.Encoder(cfg).init, KEY, TOKENS)["params"]) == jax.tree.structure(weights)
    same(tiny.jit(lambda w: doors.Encoder(cfg).apply({"params": w}, TOKENS))(weights),
         tiny.jit(lambda w: model.forward(w, cfg, TOKENS))(weights), 1e-6)

    both, inputs = tiny.ENCODER_DECODERS["shared"], tiny.tokens(2, 4, seed=1)
    weights = tiny.weights(model.spec(both))
    module = doors.EncoderDecoder(both)
    assert jax.tree.structure(jax.eval_shape(module.init, KEY, inputs, TOKENS)["params"]) == jax.tree.structure(weights)
    lengths = jnp.array([4, 2])
    got = tiny.jit(lambda w: module.apply({"params": w}, inputs, TOKENS, input_lengths=lengths).logits)(weights)

    def want(weights, call):
        return call(weights, TOKENS, memory=model.encode(weights, both, inputs, lengths=lengths)).logits

    np.testing.assert_allclose(got, tiny.jit(lambda w: want(w, lambda w, *a, **k: model.forward(w, both, *a, **k)))(weights),
                               atol=1e-6)
    nnx_module = doors.to_nnx(model.Model(both, weights))
    same(nnx_module.weights(), weights)
    np.testing.assert_allclose(got, nnx.jit(lambda m: want(m.weights(), lambda _, *a, **k: m(*a, **k)))(nnx_module), atol=1e-5)


def test_a_bias_that_the_stack_holds_is_asked_for():
    attend = tiny.attention(position=RelativeBias(8, 6))
    weights = tiny.weights(attention.spec(attend, 16))
    with pytest.raises(ValueError, match="its layers share: give `bias`"):
        doors.Attention(attend).apply({"params": weights}, X)
    table = tiny.weights({"table": position.relative_spec(attend.position, attend.heads)})["table"]
    out, _ = tiny.jit(lambda w: doors.Attention(attend).apply({"params": w}, X, bias=position.Shared(table)))(weights)
    alone = dataclasses.replace(attend, position=dataclasses.replace(attend.position, shared=False))
    want, _ = tiny.jit(lambda w: doors.Attention(alone).apply({"params": w | {"relative_bias": table}}, X))(weights)
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_a_block_turns_the_queries_of_its_cross_attention_too():
    one = tiny.block(position=None, cross=tiny.attention(position=Rope(50.0), causal=False, source=16))
    weights = tiny.weights(block.spec(one, 16))
    source = cache.Memory(X, None, jnp.ones((2, 5), jnp.int32))
    got, _ = tiny.jit(lambda w: doors.Block(one).apply({"params": w}, X, source=source))(weights)
    context = describe([one.attention, one.cross], 2, 5).replace(source=source)
    want, *_ = tiny.jit(lambda w: block.apply(w, one, X, context, None))(weights)
    np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="attention to a source is part of a Block"):
        doors.Attention(one.cross).apply({"params": weights["cross_attention"]}, X)


def test_types_of_an_embedding():
    cfg, types = Embedding(19, types=2), jnp.array([[0, 1, 0, 1, 1]] * 2)
    weights = tiny.weights(embed.spec(cfg, 16))
    got = tiny.jit(lambda w: doors.Embedding(cfg, 16).apply({"params": w}, TOKENS, types=types))(weights)
    np.testing.assert_allclose(got, weights["tokens"][TOKENS] + weights["types"][types], atol=1e-6)


def test_parameters_in_another_dtype():
    decoder = doors.Decoder(tiny.LOCAL, param_dtype=jnp.bfloat16)
    tree = jax.eval_shape(decoder.init, KEY, TOKENS)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}


ATTENTION = tiny.attention(bias=True, window=3, qk_norm=QkNorm(RmsNorm()), sinks=True)
BLOCK = tiny.block(window=3)
EMBEDDING = Embedding(19, 2.0, Learned(8), LayerNorm())
LAYERS = {
    "norm": (doors.Norm(LayerNorm()), norm.spec(LayerNorm(), 16), (X,),
             lambda p: norm.apply(p, LayerNorm(), X)),
    "feedforward": (doors.FeedForward(BLOCK.feedforward), feedforward.spec(BLOCK.feedforward, 16), (X,),
                    lambda p: feedforward.apply(p, BLOCK.feedforward, X)),
    "embedding": (doors.Embedding(EMBEDDING, 16), embed.spec(EMBEDDING, 16), (TOKENS,),
                  lambda p: embed.apply(p, EMBEDDING, TOKENS, None, jnp.arange(5)[None].repeat(2, 0), jnp.float32)),
    "attention": (doors.Attention(ATTENTION), attention.spec(ATTENTION, 16), (X,),
                  lambda p: attention.apply(p, ATTENTION, X, describe([ATTENTION], 2, 5), None)),
    "block": (doors.Block(BLOCK), block.spec(BLOCK, 16), (X,),
              lambda p: block.apply(p, BLOCK, X, describe([BLOCK.attention], 2, 5), None)[:2]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_alone(name):
    module, spec, arguments, pure = LAYERS[name]
    same(tiny.jit(module.init)(KEY, *arguments)["params"], tiny.jit(lambda key: params.init(spec, key))(KEY), 1e-6)
    weights = tiny.weights(spec)
    same(tiny.jit(lambda w: module.apply({"params": w}, *arguments))(weights), tiny.jit(pure)(weights), 1e-6)


@pytest.mark.parametrize("name", ["attention", "block"])
def test_a_layer_takes_positions_segments_masks_and_cached_keys(name):
    module, spec, _, _ = LAYERS[name]
    weights = tiny.weights(spec)
    apply = tiny.jit(lambda *arguments, **known: module.apply({"params": weights}, *arguments, **known))
    whole, kv = apply(X)
    cached = jax.tree.map(lambda leaf: leaf[:, :, :3], kv)
    same(apply(X[:, 3:], cached, length=jnp.array([3, 3]))[0], whole[:, 3:], 1e-5)
    with pytest.raises(ValueError, match="cached keys and values need `length`"):
        apply(X[:, 3:], cached)
    same(apply(X, mask=jnp.tri(5, dtype=bool)[None], positions=jnp.arange(5)[None].repeat(2, 0))[0], whole, 1e-5)
    packed, _ = apply(X, segments=jnp.array([[1, 1, 2, 2, 2]] * 2))
    same(packed[:, :2], whole[:, :2], 1e-5)
    same(packed[:, 2:], apply(X[:, 2:])[0], 1e-5)


def test_layers_compose_in_a_module_of_ones_own():
    """Two blocks of one config get weights of their own, from keys of their own."""
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x, _ = doors.Block(BLOCK)(x)
            return doors.Norm(RmsNorm())(x)

    variables = tiny.jit(Two().init)(KEY, X)["params"]
    assert variables.keys() == {"Block_0", "Block_1", "Norm_0"}
    assert params.paths(variables["Block_0"]).keys() == params.paths(block.spec(BLOCK, 16)).keys()
    assert not np.array_equal(variables["Block_0"]["attention"]["q"], variables["Block_1"]["attention"]["q"])
    assert tiny.jit(Two().apply)({"params": variables}, X).shape == X.shape


def test_apply_without_parameters_says_so():
    with pytest.raises(Exception, match="params"):
        doors.Norm(RmsNorm()).apply({}, X)


class TestNnx:
    cfg = tiny.LOCAL
    weights = tiny.weights(model.spec(cfg))

    def module(self, weights=None):
        return doors.to_nnx(model.Model(self.cfg, self.weights if weights is None else weights))

    def test_has_the_same_tree(self):
        module = self.module()
        _, state = nnx.split(module)
        same(nnx.to_pure_dict(state), self.weights)
        same(module.weights(), self.weights)
        names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
        assert names == params.paths(self.weights).keys()

    def test_calls_forward(self):
        want = tiny.jit(lambda w: model.forward(w, self.cfg, TOKENS, hidden=(1,)))(self.weights)
        same(nnx.jit(lambda module: module(TOKENS, hidden=(1,)))(self.module()), want, 1e-5)
        merged = nnx.merge(*nnx.split(self.module()))
        same(nnx.jit(lambda module: module(TOKENS, hidden=(1,)))(merged), want, 1e-5)

    def test_two_modules_share_a_program(self):
        graphs = [nnx.split(self.module())[0] for _ in range(2)]
        assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])

    def test_takes_every_kind_of_weight(self):
        spec = model.spec(self.cfg)
        weights = model.unstack(tiny.quantised(spec, self.weights), self.cfg)
        module = self.module(weights)
        same(module.weights(), weights)
        same(nnx.jit(lambda module: module(TOKENS).logits)(module),
             tiny.jit(lambda w: model.forward(w, self.cfg, TOKENS).logits)(weights), 1e-5)


def loss(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def test_training_is_the_same_through_each_door():
    # eps keeps gradients that are all rounding from steps of full size
    cfg, tokens, tx, steps = tiny.decoder([tiny.block()] * 2), tiny.tokens(4, 9), optax.adam(1e-2, eps=1e-4), 5
    weights = tiny.weights(model.spec(cfg))

    def train(forward):
        @tiny.jit
        def step(weights, state):
            value, gradient = jax.value_and_grad(lambda w: loss(forward(w), tokens))(weights)
            with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in integers
                updates, state = tx.update(gradient, state, weights)
            return optax.apply_updates(weights, updates), state, value

        current, state, losses = weights, tx.init(weights), []
        for _ in range(steps):
            current, state, value = step(current, state)
            losses.append(float(value))
        return current, losses

    pure, losses = train(lambda w: model.forward(w, cfg, tokens).logits)
    linen, linen_losses = train(lambda w: doors.Decoder(cfg).apply({"params": w}, tokens).logits)

    module = doors.to_nnx(model.Model(cfg, weights))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, gradient = nnx.value_and_grad(lambda module: loss(module(tokens).logits, tokens))(module)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(module, gradient)
        return value

    nnx_losses = [float(step(module, optimizer)) for _ in range(steps)]

    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(linen_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(nnx_losses, losses, rtol=1e-4)
    same(linen, pure, 1e-5)
    same(module.weights(), pure, 1e-4)

"""The door for Flax users: Linen modules and an NNX module over the same trees of weights.

`Decoder(cfg).init(key, tokens)["params"]` equals `jaxlm.params.init(jaxlm.model.spec(cfg), key)`, values
included, so weights go back and forth as they are, and any kind of weight (`jaxlm.weight`) may stand in them.
A module only makes its parameters after the layer's spec and calls the layer's pure function.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import block, config, model, params
from jaxlm.cache import KeyValue
from jaxlm.layers import attention, embed, feedforward, latent_attention, moe, norm
from jaxlm.layers.mask import Context, describe


def _weights(module: nn.Module, spec: params.Spec) -> dict[str, Any]:
    """The module's parameters: as they are, or fresh as `params.init` makes them."""
    def fresh(_: Array, name: str) -> PyTree:
        key = module.scope.rngs["params"].as_jax_rng()
        return params.init({name: spec[name]}, key, module.param_dtype)[name]

    # Linen's own check of a parameter that is there expects plain arrays.
    return {name: module.get_variable("params", name) if module.has_variable("params", name)
            else module.param(name, fresh, name) for name in spec}


def _context(cfg: config.SelfAttention, x: Float[Array, "B T D"], cached: KeyValue | None,
             known: dict[str, Any], cross: config.Attention | None = None) -> Context:
    known = dict(known)
    shared = {name: known.pop(name, None) for name in ("bias", "source", "tokens", "routing")}
    if cached is not None and known.get("length") is None:
        raise ValueError("cached keys and values need `length`, how many of their slots count in each row")
    if isinstance(cfg.position, config.RelativeBias) and cfg.position.shared and shared["bias"] is None:
        raise ValueError("the stack holds a relative bias that its layers share: give `bias`, a jaxlm.layers.position.Shared")
    layers = [cfg] if cross is None else [cfg, cross]
    return describe(layers, *x.shape[:2], **known).replace(**shared)


class Norm(nn.Module):
    """`jaxlm.layers.norm` over the last axis."""

    cfg: config.Norm
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The normalised x."""
        return norm.apply(_weights(self, norm.spec(self.cfg, x.shape[-1])), self.cfg, x)


class FeedForward(nn.Module):
    """`jaxlm.layers.feedforward`."""

    cfg: config.Dense
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output, without the residual."""
        return feedforward.apply(_weights(self, feedforward.spec(self.cfg, x.shape[-1])), self.cfg, x)


class Moe(nn.Module):
    """`jaxlm.layers.moe`: a mixture of experts, with a router that needs no other layer's state."""

    cfg: config.Moe
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"] | None = None,
                 **known: Any) -> tuple[Float[Array, "B T D"], moe.Routing]:
        """The layer's output, without the residual, and what the router did.

        Args:
          tokens: ids, which a `jaxlm.config.Hash` reads.
          known: positions (-1 for padding), segments or lengths as `jaxlm.layers.mask.describe` takes them.

        Raises:
          ValueError: for a hash without tokens, and for a recurrent router.
        """
        context = describe((), *x.shape[:2], **known).replace(tokens=tokens)
        return moe.apply(_weights(self, moe.spec(self.cfg, x.shape[-1])), self.cfg, x, context)[:2]


class Embedding(nn.Module):
    """`jaxlm.layers.embed`: vectors of tokens."""

    cfg: config.Embedding
    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"],
                 positions: Int[Array, "B T"] | None = None,
                 types: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Default positions: from 0 on; types: 0."""
        weights = _weights(self, embed.spec(self.cfg, self.width))
        positions = describe((), *tokens.shape, positions).positions
        return embed.apply(weights, self.cfg, tokens, None, positions, weights["tokens"].dtype, types)


class Attention(nn.Module):
    """`jaxlm.layers.attention`, or `jaxlm.layers.latent_attention`."""

    cfg: config.SelfAttention
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cached: KeyValue | None = None,
                 **known: Any) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The output and the T tokens' keys and values.

        Args:
          cached: committed keys and values, as `jaxlm.cache.KeyValue` has them of one layer, of which `length` count.
          known: positions, segments, mask, length, total as `jaxlm.layers.mask.describe` takes them; `bias`, `source` and
            `tokens` (for a router that reads ids) as `jaxlm.layers.mask.Context` has them.

        Raises:
          ValueError: for `cached` without `length`, a relative bias that the stack holds without `bias`, and for the attention
            to a source, which only a `Block` has.
        """
        latent = isinstance(self.cfg, config.LatentAttention)
        if not latent and self.cfg.source is not None:
            raise ValueError("attention to a source is part of a Block: its Attention.source is not None")
        layer = latent_attention if latent else attention
        weights = _weights(self, layer.spec(self.cfg, x.shape[-1]))
        return layer.apply(weights, self.cfg, x, _context(self.cfg, x, cached, known), cached)


class Block(nn.Module):
    """`jaxlm.block`: attention and feed-forward around the residual stream."""

    cfg: config.Block
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cached: KeyValue | None = None, memory: KeyValue | None = None,
                 **known: Any) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The output and the T tokens' keys and values; arguments as `Attention` and `jaxlm.block.apply` take them."""
        weights = _weights(self, block.spec(self.cfg, x.shape[-1]))
        return block.apply(weights, self.cfg, x, _context(self.cfg.attention, x, cached, known, self.cfg.cross), cached,
                           memory)[:2]


class Decoder(nn.Module):
    """`jaxlm.model.forward`: a decoder-only language model, whose one module holds the whole tree.

    Example:
      >>> import jax
      >>> one = config.Block(config.Attention(2, 1, 4), config.Dense(16), config.PreNorm(config.RmsNorm()))
      >>> stack, embedding = config.stack_of([one] * 2), config.Embedding(11)
      >>> cfg = config.Decoder(8, embedding, stack, config.RmsNorm(), config.Head(tied=True), length=32)
      >>> decoder = Decoder(cfg)
      >>> variables = jax.jit(decoder.init)(jax.random.key(0), jnp.array([[1, 2, 3]]))
      >>> jax.jit(decoder.apply)(variables, jnp.array([[1, 2, 3]])).logits.shape
      (1, 3, 11)
    """

    cfg: config.Decoder
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"] | None = None, **arguments: Any) -> model.Output:
        """Arguments and errors as `jaxlm.model.forward` has them."""
        return model.forward(_weights(self, model.spec(self.cfg)), self.cfg, tokens, **arguments)


class Encoder(nn.Module):
    """`jaxlm.model.forward` of an encoder, whose one module holds the whole tree."""

    cfg: config.Encoder
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"] | None = None, **arguments: Any) -> model.Output:
        """Arguments and errors as `jaxlm.model.forward` has them."""
        return model.forward(_weights(self, model.spec(self.cfg)), self.cfg, tokens, **arguments)


class EncoderDecoder(nn.Module):
    """`jaxlm.model.encode`, then `jaxlm.model.forward` of the decoder; one module holds both trees.

    Example:
      >>> import jax
      >>> attention, norm = config.Attention(2, 2, 4, config.RelativeBias(8, 20, True), causal=False), config.RmsNorm()
      >>> cross = config.Attention(2, 2, 4, None, causal=False, source=8)
      >>> reads = config.Block(attention, config.Dense(16), config.PreNorm(norm))
      >>> writes = config.Block(config.Attention(2, 2, 4), config.Dense(16), config.PreNorm(norm), cross=cross)
      >>> cfg = config.EncoderDecoder(
      ...     config.Encoder(8, config.Embedding(11), config.stack_of([reads] * 2), norm, None, 32),
      ...     config.Decoder(8, config.Embedding(11), config.stack_of([writes] * 2), norm, config.Head(True), 32), start=(0,))
      >>> both = EncoderDecoder(cfg)
      >>> inputs, tokens = jnp.array([[4, 5, 6, 7]]), jnp.array([[0, 4]])
      >>> variables = jax.jit(both.init)(jax.random.key(0), inputs, tokens)
      >>> jax.jit(both.apply)(variables, inputs, tokens).logits.shape
      (1, 2, 11)
    """

    cfg: config.EncoderDecoder
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Int[Array, "B S"], tokens: Int[Array, "B T"], *, input_segments: Int[Array, "B S"] | None = None,
                 input_lengths: Int[Array, "B"] | None = None, **arguments: Any) -> model.Output:
        """Logits of the tokens that follow each of the decoder's.

        Args:
          inputs, input_segments, input_lengths: the source, as `jaxlm.model.encode` takes it.
          arguments: as `jaxlm.model.forward` takes them.
        """
        weights = _weights(self, model.spec(self.cfg))
        memory = model.encode(weights, self.cfg, inputs, segments=input_segments, lengths=input_lengths)
        return model.forward(weights, self.cfg, tokens, memory=memory, **arguments)


@functools.cache
def _nnx_model() -> type:
    from flax import nnx  # here, not above: it breaks with many versions of jax that the rest works with

    def wrap(tree: PyTree) -> Any:
        if isinstance(tree, dict):
            return nnx.Dict({name: wrap(branch) for name, branch in tree.items()})
        return nnx.List(wrap(branch) for branch in tree) if isinstance(tree, tuple) else nnx.Param(tree)

    def unwrap(node: Any) -> PyTree:
        if isinstance(node, nnx.Dict):
            return {name: unwrap(branch) for name, branch in node.items()}
        return tuple(unwrap(branch) for branch in node) if isinstance(node, nnx.List) else node.get_value()

    class Model(nnx.Module):
        """A model: each weight is an `nnx.Param` at its own path."""

        def __init__(self, cfg: config.Config, weights: PyTree):
            self.cfg, self.sides = cfg, tuple(weights)
            for name, tree in weights.items():
                setattr(self, name, wrap(tree))

        def __call__(self, tokens: Int[Array, "B T"] | None = None, **arguments: Any) -> model.Output:
            """Arguments and errors as `jaxlm.model.forward` has them."""
            return model.forward(self.weights(), self.cfg, tokens, **arguments)

        def weights(self) -> PyTree:
            """The tree as the pure functions take it."""
            return {name: unwrap(getattr(self, name)) for name in self.sides}

    return Model


def to_nnx(model: model.Model) -> Any:
    """An `nnx.Module` of the model's weights that is called like `jaxlm.model.forward`.

    `.weights()` gives the tree back, as it is by then. Needs a flax.nnx that works with the installed jax.
    """
    return _nnx_model()(model.config, model.params)

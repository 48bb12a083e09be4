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
from jaxlm.layers import attention, embed, feedforward, norm
from jaxlm.layers.mask import Context, describe


def _weights(module: nn.Module, spec: params.Spec) -> dict[str, Any]:
    """The module's parameters: as they are, or fresh as `params.init` makes them."""
    def fresh(_: Array, name: str) -> PyTree:
        key = module.scope.rngs["params"].as_jax_rng()
        return params.init({name: spec[name]}, key, module.param_dtype)[name]

    # Linen's own check of a parameter that is there expects plain arrays.
    return {name: module.get_variable("params", name) if module.has_variable("params", name)
            else module.param(name, fresh, name) for name in spec}


def _context(cfg: config.Attention, x: Float[Array, "B T D"], cached: KeyValue | None,
             known: dict[str, Array]) -> Context:
    if cached is not None and known.get("length") is None:
        raise ValueError("cached keys and values need `length`, how many of their slots count in each row")
    return describe([cfg], *x.shape[:2], **known)


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


class Embedding(nn.Module):
    """`jaxlm.layers.embed`: vectors of tokens."""

    cfg: config.Embedding
    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"],
                 positions: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Default positions: from 0 on."""
        weights = _weights(self, embed.spec(self.cfg, self.width))
        positions = describe((), *tokens.shape, positions).positions
        return embed.apply(weights, self.cfg, tokens, None, positions, weights["tokens"].dtype)


class Attention(nn.Module):
    """`jaxlm.layers.attention`."""

    cfg: config.Attention
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cached: KeyValue | None = None,
                 **known: Array) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The output and the T tokens' keys and values.

        Args:
          cached: committed keys and values [B, K, S, H], of which `length` count.
          known: positions, segments, mask, length, total as `jaxlm.layers.mask.describe` takes them.

        Raises:
          ValueError: for `cached` without `length`.
        """
        weights = _weights(self, attention.spec(self.cfg, x.shape[-1]))
        return attention.apply(weights, self.cfg, x, _context(self.cfg, x, cached, known), cached)


class Block(nn.Module):
    """`jaxlm.block`: attention and feed-forward around the residual stream."""

    cfg: config.Block
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cached: KeyValue | None = None,
                 **known: Array) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The output and the T tokens' keys and values; arguments as `Attention` takes them."""
        weights = _weights(self, block.spec(self.cfg, x.shape[-1]))
        return block.apply(weights, self.cfg, x, _context(self.cfg.attention, x, cached, known), cached)


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


@functools.cache
def _nnx_decoder() -> type:
    from flax import nnx  # here, not above: it breaks with many versions of jax that the rest works with

    def wrap(tree: PyTree) -> Any:
        if isinstance(tree, dict):
            return nnx.Dict({name: wrap(branch) for name, branch in tree.items()})
        return nnx.List(wrap(branch) for branch in tree) if isinstance(tree, tuple) else nnx.Param(tree)

    def unwrap(node: Any) -> PyTree:
        if isinstance(node, nnx.Dict):
            return {name: unwrap(branch) for name, branch in node.items()}
        return tuple(unwrap(branch) for branch in node) if isinstance(node, nnx.List) else node.get_value()

    class Decoder(nnx.Module):
        """A decoder-only language model: each weight is an `nnx.Param` at its own path."""

        def __init__(self, cfg: config.Decoder, weights: PyTree):
            self.cfg = cfg
            self.decoder = wrap(weights["decoder"])

        def __call__(self, tokens: Int[Array, "B T"] | None = None, **arguments: Any) -> model.Output:
            """Arguments and errors as `jaxlm.model.forward` has them."""
            return model.forward(self.weights(), self.cfg, tokens, **arguments)

        def weights(self) -> PyTree:
            """The tree as the pure functions take it."""
            return {"decoder": unwrap(self.decoder)}

    return Decoder


def to_nnx(model: model.Model) -> Any:
    """An `nnx.Module` of the model's weights that is called like `jaxlm.model.forward`.

    `.weights()` gives the tree back, as it is by then. Needs a flax.nnx that works with the installed jax.
    """
    return _nnx_decoder()(model.config, model.params)

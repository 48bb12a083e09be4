"""Token vectors in; logits of tokens or labels, or one vector per text, out."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm import config
from jaxlm.layers import norm, position
from jaxlm.layers.feedforward import ACTIVATIONS
from jaxlm.params import Param, normal, zeros
from jaxlm.weight import einsum, take


def spec(cfg: config.Embedding, width: int) -> dict[str, Any]:
    """tokens [V, W], positions [P, W] where learned, types, norm and projection [W, D] where there are any; W is D without."""
    own = cfg.width or width
    tree: dict[str, Any] = {"tokens": Param((cfg.vocabulary, own), ("vocab", "embed"), normal(0.02), (1,))}
    if isinstance(cfg.position, config.Learned):
        tree["positions"] = Param((cfg.position.length, own), ("position", "embed"), normal(0.02), (1,))
    if cfg.types is not None:
        tree["types"] = Param((cfg.types, own), (None, "embed"), normal(0.02), (1,))
    if cfg.norm is not None:
        tree["norm"] = norm.spec(cfg.norm, own)
    if cfg.width is not None:
        tree["projection"] = Param((own, width), (None, "embed"), inputs=(0,))
        tree["projection_bias"] = Param((width,), (None,), zeros)
    return tree


def apply(params: dict[str, Any], cfg: config.Embedding, tokens: Int[Array, "B T"] | None,
          embeddings: Float[Array, "B T W"] | None, positions: Int[Array, "B T"], dtype: Any,
          types: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
    """Vectors of the tokens, or the given `embeddings` (soft inputs) in their place; then position, type, norm and projection.

    `scale` applies to looked-up vectors only: soft inputs come as the stack is to see them. Types are 0 where none are given.
    """
    if embeddings is None:
        x = take(params["tokens"], tokens, dtype)
        if cfg.scale is not None:
            x = x * jnp.asarray(cfg.scale, dtype)
    else:
        x = embeddings.astype(dtype)
    if isinstance(cfg.position, config.Learned):
        x = x + take(params["positions"], jnp.maximum(positions, 0) + cfg.position.offset, dtype)
    elif cfg.position is not None:
        x = x + position.sinusoids(cfg.position, x.shape[-1], jnp.maximum(positions, 0)).astype(dtype)
    if cfg.types is not None:
        x = x + take(params["types"], jnp.zeros_like(positions) if types is None else types, dtype)
    if cfg.norm is not None:
        x = norm.apply(params["norm"], cfg.norm, x)
    if cfg.width is not None:
        x = einsum("BTW,WD->BTD", x, params["projection"]) + params["projection_bias"].astype(dtype)[None, None]
    return x


def _transform_spec(cfg: config.Transform, width: int, out: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"product": Param((width, out), ("embed", None), inputs=(0,))}
    if cfg.bias:
        tree["bias"] = Param((out,), (None,), zeros)
    return tree if cfg.norm is None else tree | {"norm": norm.spec(cfg.norm, out)}


def _transform(params: dict[str, Any], cfg: config.Transform, x: Float[Array, "... D"]) -> Float[Array, "... W"]:
    y = einsum("BTD,DW->BTW", x, params["product"])
    if cfg.bias:
        y = y + params["bias"].astype(y.dtype)[None, None]
    y = ACTIVATIONS[cfg.activation](y)
    return y if cfg.norm is None else norm.apply(params["norm"], cfg.norm, y)


Heads = config.Head | config.Classifier | config.Vector


def head_spec(cfg: Heads, embedding: config.Embedding, width: int) -> dict[str, Any]:
    """Of a language model's head: out [V, W] unless tied, bias [V], the transform; of a classifier: out [D, labels], bias, the
    transform; of a vector: out [D, width] and bias where it has a width."""
    match cfg:
        case config.Head():
            own = embedding.width or width
            tree: dict[str, Any] = {} if cfg.tied else {
                "out": Param((embedding.vocabulary, own), ("vocab", "embed"), inputs=(1,))}
            if cfg.bias:
                tree["bias"] = Param((embedding.vocabulary,), ("vocab",), zeros)
            return tree | {"transform": _transform_spec(cfg.transform, width, own)} if cfg.transform is not None else tree
        case config.Classifier():
            tree = {"out": Param((width, cfg.labels), ("embed", None), inputs=(0,))}
            if cfg.bias:
                tree["bias"] = Param((cfg.labels,), (None,), zeros)
            return tree | {"transform": _transform_spec(cfg.transform, width, width)} if cfg.transform is not None else tree
        case config.Vector(width=out):
            tree = {} if out is None else {"out": Param((width, out), ("embed", None), inputs=(0,))}
            return tree | {"bias": Param((out,), (None,), zeros)} if cfg.bias else tree


def logits(params: dict[str, Any], tokens: Any, cfg: config.Head, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits. `tokens` is the embedding's matrix, used when tied."""
    if cfg.transform is not None:
        x = _transform(params["transform"], cfg.transform, x)
    y = einsum("BTD,VD->BTV", x, tokens if cfg.tied else params["out"], dtype=jnp.float32)
    if cfg.bias:
        y = y + params["bias"].astype(jnp.float32)[None, None]
    if cfg.scale != 1.0:
        y = y * cfg.scale
    return y if cfg.softcap is None else jnp.tanh(y / cfg.softcap) * cfg.softcap


def pool(cfg: config.Pooling, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """One vector per row, float32, of the tokens that there are: at least one in every row."""
    y, on = x.astype(jnp.float32), valid[:, :, None]
    index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    match cfg:
        case config.Pooling.MAX:
            return jnp.max(jnp.where(on, y, -jnp.inf), axis=1)
        case config.Pooling.FIRST | config.Pooling.LAST:
            last = cfg is config.Pooling.LAST
            at = jnp.max(jnp.where(valid, index, 0), axis=1) if last else jnp.argmax(valid, axis=1)
            return jnp.take_along_axis(y, at[:, None, None], axis=1)[:, 0]
        case config.Pooling.MEAN:
            weights = valid.astype(jnp.float32)
        case config.Pooling.WEIGHTED_MEAN:
            weights = jnp.cumsum(valid.astype(jnp.float32), axis=1) * valid.astype(jnp.float32)
    return jnp.sum(y * weights[:, :, None], axis=1) / jnp.sum(weights, axis=1)[:, None]


def classify(params: dict[str, Any], cfg: config.Classifier, x: Float[Array, "B T D"],
             valid: Bool[Array, "B T"]) -> Float[Array, "B labels"] | Float[Array, "B T labels"]:
    """Float32 logits over labels, per row or per token."""
    y = x if cfg.pooling is None else pool(cfg.pooling, x, valid).astype(x.dtype)[:, None]
    if cfg.transform is not None:
        y = _transform(params["transform"], cfg.transform, y)
    y = einsum("BTD,DL->BTL", y, params["out"], dtype=jnp.float32)
    if cfg.bias:
        y = y + params["bias"].astype(jnp.float32)[None, None]
    return y if cfg.pooling is None else y[:, 0]


def vector(params: dict[str, Any], cfg: config.Vector, x: Float[Array, "B T D"],
           valid: Bool[Array, "B T"]) -> Float[Array, "B W"]:
    """One float32 vector per row."""
    y = pool(cfg.pooling, x, valid)
    if cfg.width is not None:
        y = einsum("BD,DW->BW", y.astype(x.dtype), params["out"], dtype=jnp.float32)
    if cfg.bias:
        y = y + params["bias"].astype(jnp.float32)[None]
    # As PyTorch's normalize: a zero vector stays zero.
    return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12) if cfg.normalize else y

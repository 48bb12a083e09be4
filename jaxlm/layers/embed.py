"""Token vectors in, logits out."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.layers import norm
from jaxlm.params import Param, normal, zeros
from jaxlm.weight import einsum, take


def spec(cfg: config.Embedding, width: int) -> dict[str, Any]:
    """tokens [V, D], positions [P, D] where learned, and the norm where there is one."""
    tree: dict[str, Any] = {"tokens": Param((cfg.vocabulary, width), ("vocab", "embed"), normal(0.02), (1,))}
    if cfg.position is not None:
        tree["positions"] = Param((cfg.position.length, width), ("position", "embed"), normal(0.02), (1,))
    if cfg.norm is not None:
        tree["norm"] = norm.spec(cfg.norm, width)
    return tree


def apply(params: dict[str, Any], cfg: config.Embedding, tokens: Int[Array, "B T"] | None,
          embeddings: Float[Array, "B T D"] | None, positions: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Vectors of the tokens, or the given `embeddings` (soft inputs) in their place; then position and norm.

    `scale` applies to looked-up vectors only: soft inputs come as the stack is to see them.
    """
    if embeddings is None:
        x = take(params["tokens"], tokens, dtype)
        if cfg.scale is not None:
            x = x * jnp.asarray(cfg.scale, dtype)
    else:
        x = embeddings.astype(dtype)
    if cfg.position is not None:
        x = x + take(params["positions"], jnp.maximum(positions, 0) + cfg.position.offset, dtype)
    return x if cfg.norm is None else norm.apply(params["norm"], cfg.norm, x)


def head_spec(cfg: config.Head, vocabulary: int, width: int) -> dict[str, Param]:
    """out [V, D] unless tied, and bias [V] where there is one."""
    tree = {} if cfg.tied else {"out": Param((vocabulary, width), ("vocab", "embed"), inputs=(1,))}
    return tree | {"bias": Param((vocabulary,), ("vocab",), zeros)} if cfg.bias else tree


def logits(params: dict[str, Any], tokens: Any, cfg: config.Head, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits. `tokens` is the embedding's matrix, used when tied."""
    y = einsum("BTD,VD->BTV", x, tokens if cfg.tied else params["out"], dtype=jnp.float32)
    if cfg.bias:
        y = y + params["bias"].astype(jnp.float32)[None, None]
    if cfg.scale != 1.0:
        y = y * cfg.scale
    return y if cfg.softcap is None else jnp.tanh(y / cfg.softcap) * cfg.softcap

"""RMS and layer normalisation over the last axis, in float32 whatever the input."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.params import Param, ones, zeros


def spec(cfg: config.Norm, width: int) -> dict[str, Param]:
    """`scale` [width], and `bias` [width] for a LayerNorm that has one. Norm weights are never split."""
    if isinstance(cfg, config.RmsNorm):
        return {"scale": Param((width,), (None,), zeros if cfg.offset else ones)}
    scale = {"scale": Param((width,), (None,), ones)}
    return scale | {"bias": Param((width,), (None,), zeros)} if cfg.bias else scale


def apply(params: dict[str, Any], cfg: config.Norm, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The normalised x, in x's dtype."""
    y = x.astype(jnp.float32)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = params["scale"].astype(jnp.float32).reshape(shape)
    if isinstance(cfg, config.RmsNorm):
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.eps)
        return (y * (scale + cfg.offset)).astype(x.dtype)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.eps) * scale
    if cfg.bias:
        y = y + params["bias"].astype(jnp.float32).reshape(shape)
    return y.astype(x.dtype)

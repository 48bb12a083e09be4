"""The one block: attention and feed-forward around the residual stream, norms placed as the config says."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.cache import KeyValue
from jaxlm.layers import attention, feedforward, norm
from jaxlm.layers.mask import Context


def _norms(residual: config.Residual) -> tuple[str, ...]:
    match residual:
        case config.PreNorm():
            return ("attention_norm", "feedforward_norm")
        case config.PostNorm() | config.OutputNorm():
            return ("attention_norm_out", "feedforward_norm_out")
        case config.SandwichNorm():
            return ("attention_norm", "attention_norm_out", "feedforward_norm", "feedforward_norm_out")
        case config.ParallelNorm(shared=shared):
            return ("attention_norm",) if shared else ("attention_norm", "feedforward_norm")


def spec(cfg: config.Block, width: int) -> dict[str, Any]:
    """attention, feedforward and the norms around them."""
    tree = {"attention": attention.spec(cfg.attention, width), "feedforward": feedforward.spec(cfg.feedforward, width)}
    return tree | {name: norm.spec(cfg.residual.norm, width) for name in _norms(cfg.residual)}


def apply(params: dict[str, Any], cfg: config.Block, x: Float[Array, "B T D"], context: Context,
          cached: KeyValue | None) -> tuple[Float[Array, "B T D"], KeyValue]:
    """The block's output and the T tokens' keys and values."""
    residual, names = cfg.residual, _norms(cfg.residual)

    def normed(name: str, y: Array) -> Array:
        return norm.apply(params[name], residual.norm, y) if name in names else y

    def attend(y: Array) -> tuple[Array, KeyValue]:
        return attention.apply(params["attention"], cfg.attention, y, context, cached)

    def feed(y: Array) -> Array:
        return feedforward.apply(params["feedforward"], cfg.feedforward, y)

    def scaled(y: Array) -> Array:
        return y if cfg.multiplier == 1.0 else y * jnp.asarray(cfg.multiplier, y.dtype)

    match residual:
        case config.ParallelNorm(shared=shared):
            first = normed("attention_norm", x)
            out, kv = attend(first)
            return x + scaled(out + feed(first if shared else normed("feedforward_norm", x))), kv
        case config.PostNorm():
            out, kv = attend(x)
            x = normed("attention_norm_out", x + scaled(out))
            return normed("feedforward_norm_out", x + scaled(feed(x))), kv
        case _:
            out, kv = attend(normed("attention_norm", x))
            x = x + scaled(normed("attention_norm_out", out))
            return x + scaled(normed("feedforward_norm_out", feed(normed("feedforward_norm", x)))), kv

"""The one block: attention, a decoder's attention to a source, and feed-forward around the residual stream, norms placed as
the config says."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.cache import KeyValue
from jaxlm.layers import attention, feedforward, latent_attention, moe, norm
from jaxlm.layers.mask import Context


def _norms(cfg: config.Block) -> tuple[str, ...]:
    layers = ("attention", "feedforward") if cfg.cross is None else ("attention", "cross_attention", "feedforward")
    match cfg.residual:
        case config.PreNorm(attention=first):
            return tuple(f"{layer}_norm" for layer in (layers if first else layers[1:]))
        case config.PostNorm() | config.OutputNorm():
            return tuple(f"{layer}_norm_out" for layer in layers)
        case config.SandwichNorm():
            return tuple(f"{layer}_norm{end}" for layer in layers for end in ("", "_out"))
        case config.ParallelNorm(shared=shared):
            return tuple(f"{layer}_norm" for layer in (layers[:1] if shared else layers))


def spec(cfg: config.Block, width: int) -> dict[str, Any]:
    """attention, cross_attention, feedforward and the norms around them."""
    feed = moe if isinstance(cfg.feedforward, config.Moe) else feedforward
    tree = {"attention": _attention(cfg).spec(cfg.attention, width), "feedforward": feed.spec(cfg.feedforward, width)}
    if cfg.cross is not None:
        tree["cross_attention"] = attention.spec(cfg.cross, width)
    return tree | {name: norm.spec(cfg.residual.norm, width) for name in _norms(cfg)}


def _attention(cfg: config.Block) -> Any:
    """The module of the block's kind of attention."""
    return latent_attention if isinstance(cfg.attention, config.LatentAttention) else attention


class Result(NamedTuple):
    """What a block gives: its output, the T tokens' keys and values, what a mixture's router did (None without one), and the
    state for the routers of layers that follow (None where none has one)."""

    x: Float[Array, "B T D"]
    kv: KeyValue
    routing: moe.Routing | None
    state: Float[Array, "B T P"] | None


def apply(params: dict[str, Any], cfg: config.Block, x: Float[Array, "B T D"], context: Context, cached: KeyValue | None,
          memory: KeyValue | None = None, state: Float[Array, "B T P"] | None = None) -> Result:
    """The block.

    Args:
      memory: keys and values of an encoded source; None makes them of `context.source.hidden`, where there is one.
      state: what the router of the layer before left, of routers that are recurrent.
    """
    routing = None
    residual, names = cfg.residual, _norms(cfg)

    def normed(name: str, y: Array) -> Array:
        return norm.apply(params[name], residual.norm, y) if name in names else y

    def attend(y: Array) -> tuple[Array, KeyValue]:
        return _attention(cfg).apply(params["attention"], cfg.attention, y, context, cached)

    def look(y: Array) -> Array:
        return attention.cross(params["cross_attention"], cfg.cross, y, context, memory)

    def feed(y: Array) -> Array:
        nonlocal routing, state
        if not isinstance(cfg.feedforward, config.Moe):
            return feedforward.apply(params["feedforward"], cfg.feedforward, y)
        y, routing, state = moe.apply(params["feedforward"], cfg.feedforward, y, context, state)
        return y

    def scaled(y: Array) -> Array:
        return y if cfg.multiplier == 1.0 else y * jnp.asarray(cfg.multiplier, y.dtype)

    match residual:
        case config.ParallelNorm(shared=shared):
            first = normed("attention_norm", x)
            out, kv = attend(first)
            if cfg.cross is not None:
                out = out + look(first if shared else normed("cross_attention_norm", x))
            x = x + scaled(out + feed(first if shared else normed("feedforward_norm", x)))
        case config.PostNorm():
            out, kv = attend(x)
            x = normed("attention_norm_out", x + scaled(out))
            if cfg.cross is not None:
                x = normed("cross_attention_norm_out", x + scaled(look(x)))
            x = normed("feedforward_norm_out", x + scaled(feed(x)))
        case _:
            out, kv = attend(normed("attention_norm", x))
            x = x + scaled(normed("attention_norm_out", out))
            if cfg.cross is not None:
                x = x + scaled(normed("cross_attention_norm_out", look(normed("cross_attention_norm", x))))
            x = x + scaled(normed("feedforward_norm_out", feed(normed("feedforward_norm", x))))
    return Result(x, kv, routing, state)

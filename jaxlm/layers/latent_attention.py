"""Attention whose keys and values are products of one short vector per token (multi-head latent attention, MLA).

Two forms give the same output. Expanded: every head's keys and values are made of the tokens' short vectors, and attention is
the usual one. Absorbed: queries are brought to the short vectors' space instead, where all heads read the same keys; what
they take from there becomes their values after. The cache keeps what the absorbed form reads.
https://arxiv.org/abs/2405.04434
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.cache import KeyValue
from jaxlm.layers import attention, norm, position
from jaxlm.layers.mask import Context
from jaxlm.params import Param, zeros
from jaxlm.weight import einsum


def spec(cfg: config.LatentAttention, width: int) -> dict[str, Any]:
    """latent [D, R + r] and latent_norm [R]; k [N, R, Hk], v [N, R, Hv] and o [N, Hv, D]; q [D, N, Hk + r], or q_latent [D, Q],
    q_latent_norm [Q] and q [Q, N, Hk + r]; biases where configured. R is `latent`, r `rotated`, Q `query_latent`.

    Heads lead in k and v: decoding multiplies head by head, which compilers then do without copying them.
    """
    kept, queried = cfg.latent + cfg.rotated, cfg.query_latent
    tree: dict[str, Any] = {
        "latent": Param((width, kept), ("embed", None), inputs=(0,)),
        "latent_norm": norm.spec(cfg.norm, cfg.latent),
        "k": Param((cfg.heads, cfg.latent, cfg.key_width), ("heads", "latent", "head"), inputs=(1,)),
        "v": Param((cfg.heads, cfg.latent, cfg.value_width), ("heads", "latent", "head"), inputs=(1,)),
        "o": Param((cfg.heads, cfg.value_width, width), ("heads", "head", "embed"), inputs=(0, 1)),
    }
    if queried is None:
        tree["q"] = Param((width, cfg.heads, cfg.head_width), ("embed", "heads", "head"), inputs=(0,))
    else:
        tree["q_latent"] = Param((width, queried), ("embed", None), inputs=(0,))
        tree["q_latent_norm"] = norm.spec(cfg.norm, queried)
        tree["q"] = Param((queried, cfg.heads, cfg.head_width), ("latent", "heads", "head"), inputs=(0,))
    if cfg.bias:
        tree["latent_bias"] = Param((kept,), (None,), zeros)
        if queried is not None:
            tree["q_latent_bias"] = Param((queried,), (None,), zeros)
    if cfg.out_bias:
        tree["o_bias"] = Param((width,), (None,), zeros)
    return tree


def absorbed(cfg: config.LatentAttention, tokens: int, slots: int) -> bool:
    """Whether the absorbed form takes fewer multiplications, of so many new tokens and slots of a cache.

    To expand a key costs `latent * (key_width + value_width)` a head, to absorb a query and bring its output back as much; a
    query and a key cost `pair` or `latent_pair`. In DeepSeek-V3 these are 131072, 320 and 1088 a head: without a cache the
    expanded form is the cheaper, and with a long one it is for more than 170 tokens. Bytes speak for the absorbed form below
    that: it reads 576 numbers for each slot, the expanded form writes and reads 128 * 320 more.
    """
    # One layer of DeepSeek-V2-Lite on two cores, expanded and absorbed, ms: 1 token over 4096 slots 215 and 5, 16: 251 and 35,
    # 64: 293 and 138, 256: 737 and 656; 512 without a cache 170 and 260 (jax 0.10.2, float32).
    keys, made = tokens + slots, cfg.heads * cfg.latent * (cfg.key_width + cfg.value_width)
    return tokens * (made + keys * cfg.latent_pair) < keys * (made + tokens * cfg.pair)


def apply(params: dict[str, Any], cfg: config.LatentAttention, x: Float[Array, "B T D"], context: Context,
          cached: KeyValue | None) -> tuple[Float[Array, "B T D"], KeyValue]:
    """The attention output, and what a cache is to keep of the T tokens: k [B, 1, T, R + r], the normalised latent and the
    turned part of the key, and no v.

    Args:
      cached: the same of this layer's committed tokens, [B, 1, S, R + r]; `context.length` says how many slots count.
    """
    q, rows = _queries(params, cfg, x, context), _kept(params, cfg, x, context)
    new = KeyValue(rows[:, None], None)
    if absorbed(cfg, x.shape[1], 0 if cached is None else cached.k.shape[-2]):
        mixed = _absorbed(params, cfg, q, new, cached, context)
    else:
        mixed = _expanded(params, cfg, q, new, cached, context)
    out = einsum("BTNH,NHD->BTD", mixed, params["o"])
    return out + params["o_bias"].astype(out.dtype)[None, None] if cfg.out_bias else out, new


def _queries(params: dict[str, Any], cfg: config.LatentAttention, x: Float[Array, "B T D"],
             context: Context) -> Float[Array, "B T N H"]:
    """Scaled, their last `rotated` dimensions turned."""
    if cfg.query_latent is not None:
        x = einsum("BTD,DR->BTR", x, params["q_latent"])
        if cfg.bias:
            x = x + params["q_latent_bias"].astype(x.dtype)[None, None]
        x = norm.apply(params["q_latent_norm"], cfg.norm, x)
    q = einsum("BTD,DNH->BTNH", x, params["q"])
    q = q * jnp.asarray(cfg.head_width**-0.5 if cfg.scale is None else cfg.scale, q.dtype)
    return jnp.concatenate([q[..., :cfg.key_width], _turned(cfg, q[..., cfg.key_width:], context)], axis=-1)


def _kept(params: dict[str, Any], cfg: config.LatentAttention, x: Float[Array, "B T D"],
          context: Context) -> Float[Array, "B T R"]:
    """What a cache keeps: the latent, normalised, and the part of the keys that all heads share, turned."""
    rows = einsum("BTD,DR->BTR", x, params["latent"])
    if cfg.bias:
        rows = rows + params["latent_bias"].astype(rows.dtype)[None, None]
    latent = norm.apply(params["latent_norm"], cfg.norm, rows[..., :cfg.latent])
    return jnp.concatenate([latent, _turned(cfg, rows[:, :, None, cfg.latent:], context)[:, :, 0]], axis=-1)


def _turned(cfg: config.LatentAttention, x: Float[Array, "B T N H"], context: Context) -> Float[Array, "B T N H"]:
    return position.rotate(x, *context.rotations[cfg.position, cfg.rotated], cfg.position.interleaved)


def _expanded(params: dict[str, Any], cfg: config.LatentAttention, q: Float[Array, "B T N H"], new: KeyValue,
              cached: KeyValue | None, context: Context) -> Float[Array, "B T N V"]:
    def expand(kept: KeyValue) -> KeyValue:
        rows = kept.k[:, 0].astype(q.dtype)
        latent, shared = rows[..., :cfg.latent], rows[:, None, :, cfg.latent:]
        k, v = (einsum("BSR,NRH->BSNH", latent, params[name]).transpose(0, 2, 1, 3) for name in "kv")
        shared = jnp.broadcast_to(shared, (*k.shape[:3], cfg.rotated))
        return KeyValue(jnp.concatenate([k, shared], axis=-1), v)

    committed = None if cached is None else expand(cached)
    mixed = attention.mix(cfg, q.transpose(0, 2, 1, 3)[:, :, None], expand(new), committed, context)
    return mixed[:, :, 0].transpose(0, 2, 1, 3)


def _absorbed(params: dict[str, Any], cfg: config.LatentAttention, q: Float[Array, "B T N H"], new: KeyValue,
              cached: KeyValue | None, context: Context) -> Float[Array, "B T N V"]:
    def whole(kept: KeyValue) -> KeyValue:
        # Keys are values too, turned part and all: to leave that out here would copy the cache, to leave it out of the output
        # costs a ninth more of the values' product (64 columns beside 512).
        return KeyValue(kept.k, kept.k)

    inner = einsum("BTNH,NRH->BTNR", q[..., :cfg.key_width], params["k"])
    q = jnp.concatenate([inner, q[..., cfg.key_width:]], axis=-1).transpose(0, 2, 1, 3)[:, None]
    mixed = attention.mix(cfg, q, whole(new), None if cached is None else whole(cached), context)
    return einsum("BTNR,NRH->BTNH", mixed[:, 0, ..., :cfg.latent].transpose(0, 2, 1, 3), params["v"])

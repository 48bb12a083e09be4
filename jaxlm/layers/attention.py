"""Softmax attention over two parts: the committed cache, only read, and the T new tokens, masked among themselves.

The parts share one softmax and are never concatenated, so the mask of new tokens (causal, a prefix, a tree) is T wide however
long the cache is. Long inputs are taken in runs of queries so that scores stay small.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm import config
from jaxlm.cache import KeyValue
from jaxlm.layers import mask, norm, position
from jaxlm.layers.mask import Context
from jaxlm.params import Param, normal, zeros
from jaxlm.weight import einsum

QUERIES = 256  # per run: bounds the scores of long inputs to QUERIES x keys
SPANS = 16  # of causal queries at most, each of which meets keys up to its own end: n of them make (n + 1) / 2n of the scores

# Finite, so that a token that may see nothing (padding) gets junk and not NaN.
MASKED = -1e30


def spec(cfg: config.Attention, width: int) -> dict[str, Any]:
    """q [D, N, H], k and v [D, K, H], o [N, H, D], with their biases, norms and sinks where configured."""
    heads, kv_heads, head = cfg.heads, cfg.kv_heads, cfg.head_width
    tree: dict[str, Any] = {
        "q": Param((width, heads, head), ("embed", "heads", "head"), inputs=(0,)),
        "k": Param((width, kv_heads, head), ("embed", "kv_heads", "head"), inputs=(0,)),
        "v": Param((width, kv_heads, head), ("embed", "kv_heads", "head"), inputs=(0,)),
        "o": Param((heads, head, width), ("heads", "head", "embed"), inputs=(0, 1)),
    }
    if cfg.bias:
        tree["q_bias"] = Param((heads, head), ("heads", "head"), zeros)
        tree["k_bias"] = Param((kv_heads, head), ("kv_heads", "head"), zeros)
        tree["v_bias"] = Param((kv_heads, head), ("kv_heads", "head"), zeros)
    if cfg.out_bias:
        tree["o_bias"] = Param((width,), (None,), zeros)
    if cfg.qk_norm is not None:
        whole = not cfg.qk_norm.per_head
        tree["q_norm"] = norm.spec(cfg.qk_norm.norm, head * (heads if whole else 1))
        tree["k_norm"] = norm.spec(cfg.qk_norm.norm, head * (kv_heads if whole else 1))
    if cfg.sinks:
        tree["sinks"] = Param((heads,), ("heads",), normal(1.0))
    return tree


def _project(params: dict[str, Any], cfg: config.Attention, x: Float[Array, "B T D"],
             name: str) -> Float[Array, "B T N H"]:
    y = einsum("BTD,DNH->BTNH", x, params[name])
    if cfg.bias:
        y = y + params[f"{name}_bias"].astype(y.dtype)[None, None]
    if cfg.clip is not None:
        y = jnp.clip(y, -cfg.clip, cfg.clip)
    if cfg.qk_norm is not None and name in ("q", "k"):
        whole = y if cfg.qk_norm.per_head else y.reshape(*y.shape[:2], -1)
        y = norm.apply(params[f"{name}_norm"], cfg.qk_norm.norm, whole).reshape(y.shape)
    return y


ROWS = ((0, 1), (0, 1))  # rows of the batch and key-value heads go side by side in every product


def _scores(cfg: config.Attention, q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], allowed: Bool[Array, "B T S"],
            queries: Array, keys: Array) -> Float[Array, "B K G T S"]:
    """Masked scores before the softmax, float32."""
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jax.lax.dot_general(flat, k.astype(q.dtype), (((3,), (3,)), ROWS), preferred_element_type=jnp.float32)
    scores = scores.reshape(*q.shape[:4], k.shape[2])
    if cfg.softcap is not None:
        scores = jnp.tanh(scores / cfg.softcap) * cfg.softcap
    if isinstance(cfg.position, config.Alibi):
        scores = scores + position.alibi_bias(cfg.position, cfg.kv_heads, queries, keys)
    return jnp.where(allowed[:, None, None], scores, MASKED)


def _attend(cfg: config.Attention, sinks: Float[Array, "N"] | None, q: Float[Array, "B K G T H"], queries: Array,
            parts: list[tuple[KeyValue, Array, Array]]) -> Float[Array, "B K G T H"]:
    """One softmax over all parts, each (keys and values, who may see what, key positions)."""
    scores = [_scores(cfg, q, kv.k, allowed, queries, keys) for kv, allowed, keys in parts]
    top = jnp.max(scores[0], axis=-1, keepdims=True)
    for part in scores[1:]:
        top = jnp.maximum(top, jnp.max(part, axis=-1, keepdims=True))
    total = jnp.zeros_like(top)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, cfg.kv_heads, -1, 1, 1)
        top = jnp.maximum(top, sink)
        total = jnp.exp(sink - top)
    top = jax.lax.stop_gradient(top)
    out = jnp.zeros((), jnp.float32)
    for part, (kv, _, _) in zip(scores, parts, strict=True):
        shares = jnp.exp(part - top)
        total = total + jnp.sum(shares, axis=-1, keepdims=True)
        flat = shares.astype(q.dtype).reshape(*q.shape[:2], -1, part.shape[-1])
        mixed = jax.lax.dot_general(flat, kv.v.astype(q.dtype), (((3,), (2,)), ROWS), preferred_element_type=jnp.float32)
        out = out + mixed.reshape(q.shape)
    return (out / total).astype(q.dtype)


def apply(params: dict[str, Any], cfg: config.Attention, x: Float[Array, "B T D"], context: Context,
          cached: KeyValue | None) -> tuple[Float[Array, "B T D"], KeyValue]:
    """The attention output, and the T tokens' own keys and values [B, K, T, H].

    Args:
      cached: this layer's committed keys and values [B, K, S, H]; `context.length` says how many slots count.
    """
    q, k, v = (_project(params, cfg, x, name) for name in "qkv")
    if isinstance(cfg.position, config.Rope):
        cos, sin = context.rotations[cfg.position, cfg.rotated]
        q = position.rotate(q, cos, sin, cfg.position.interleaved)
        k = position.rotate(k, cos, sin, cfg.position.interleaved)
    q = q * jnp.asarray(cfg.head_width**-0.5 if cfg.scale is None else cfg.scale, q.dtype)
    q = q.reshape(*q.shape[:2], cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_width).transpose(0, 2, 3, 1, 4)
    new = KeyValue(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    sinks = params["sinks"] if cfg.sinks else None

    def run(q: Array, positions: Array, segments: Array | None, prefix: Array | None, rows: Array | None,
            seen: int) -> Array:
        """The output of a run of queries, none of which may see a new token behind the first `seen`."""
        queries = context.replace(positions=positions, segments=segments, prefix=prefix, mask=rows)
        near = context.until(seen)
        parts = [(KeyValue(new.k[:, :, :seen], new.v[:, :, :seen]), mask.among(cfg, near, queries), near.positions)]
        if cached is not None:
            slots = cached.k.shape[-2]
            slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (q.shape[0], slots))
            parts.insert(0, (cached, mask.committed(cfg, queries, slots), slot))
        return _attend(cfg, sinks, q, positions, parts)

    def part(y: Array | None, axis: int, start: int, end: int) -> Array | None:
        return None if y is None else jax.lax.slice_in_dim(y, start, end, axis=axis)

    def span(start: int, end: int, seen: int) -> list[Array]:
        """The outputs of a span of queries: of as many whole runs as there are, and of what is left."""
        whole = start + (end - start) // QUERIES * QUERIES

        def stacked(y: Array | None, axis: int) -> Array | None:
            y = part(y, axis, start, whole)
            return None if y is None else jnp.moveaxis(y.reshape(*y.shape[:axis], -1, QUERIES, *y.shape[axis + 1:]), axis, 0)

        outs = []
        # Differentiated, the scores of several runs are made again one after another: all of them are never kept.
        again = partial(run, seen=seen) if length <= QUERIES else jax.checkpoint(partial(run, seen=seen))
        if whole - start > QUERIES:
            runs = jax.lax.map(lambda args: again(*args), tuple(map(stacked, given, axes)))
            outs.append(jnp.moveaxis(runs, 0, 3).reshape(*q.shape[:3], whole - start, q.shape[4]))
        elif whole > start:
            outs.append(again(*(part(y, axis, start, whole) for y, axis in zip(given, axes, strict=True))))
        if whole < end:
            outs.append(again(*(part(y, axis, whole, end) for y, axis in zip(given, axes, strict=True))))
        return outs

    given, length = (q, context.positions, context.segments, context.prefix, context.mask), x.shape[1]
    axes = (3, 1, 1, 1, 1)  # along which the queries lie
    if context.ordered and cfg.causal and context.mask is None:
        size = -(-length // (QUERIES * SPANS)) * QUERIES
        outs = [out for start in range(0, length, size)
                for end in [min(start + size, length)] for out in span(start, end, end)]
    else:
        outs = span(0, length, length)
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)
    out = out.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], cfg.heads, cfg.head_width)
    out = einsum("BTNH,NHD->BTD", out, params["o"])
    if cfg.out_bias:
        out = out + params["o_bias"].astype(out.dtype)[None, None]
    return out, new

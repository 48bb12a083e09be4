"""Softmax attention over two parts: the committed cache, only read, and the T new tokens, masked among themselves; and a
decoder's attention to an encoded source, `cross`.

The parts share one softmax and are never concatenated, so the mask of new tokens (causal, a prefix, a tree) is T wide however
long the cache is. Long inputs are taken in runs of queries so that scores stay small.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm import config
from jaxlm.cache import KeyValue
from jaxlm.layers import mask, norm, position
from jaxlm.layers.mask import Context
from jaxlm.params import Initializer, Param, fan_in, normal, zeros
from jaxlm.weight import einsum

QUERIES = 256  # per run: bounds the scores of long inputs to QUERIES x keys
SPANS = 16  # of causal queries at most, each of which meets keys up to its own end: n of them make (n + 1) / 2n of the scores

# Finite, so that a token that may see nothing (padding) gets junk and not NaN.
MASKED = -1e30


def spec(cfg: config.Attention, width: int) -> dict[str, Any]:
    """q [D, N, H], k and v [D, K, H] (D that of the source), o [N, H, D], with biases, norms, sinks, table where configured."""
    heads, kv_heads, head, source = cfg.heads, cfg.kv_heads, cfg.head_width, cfg.source or width
    tree: dict[str, Any] = {
        "q": Param((width, heads, head), ("embed", "heads", "head"), _queries(cfg), inputs=(0,)),
        "k": Param((source, kv_heads, head), ("embed", "kv_heads", "head"), inputs=(0,)),
        "v": Param((source, kv_heads, head), ("embed", "kv_heads", "head"), inputs=(0,)),
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
    if isinstance(cfg.position, config.RelativeBias) and not cfg.position.shared:
        tree["relative_bias"] = position.relative_spec(cfg.position, heads)
    return tree


def _queries(cfg: config.Attention) -> Initializer:
    """`fan_in`; where scores are scaled by more than usual (T5's are not at all), smaller by as much: they begin as usual."""
    less = cfg.head_width**-0.5 / (cfg.scale or cfg.head_width**-0.5)
    return fan_in if less >= 1 else lambda param, key, dtype: fan_in(param, key, dtype) * jnp.asarray(less, dtype)


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


class Part(NamedTuple):
    """Keys [B, K, S, H] and values [B, K, S, V], which each query may see [B, T, S], and what is added to scores
    [B, K, G, T, S]."""

    kv: KeyValue
    allowed: Bool[Array, "B T S"]
    bias: Float[Array, "B K G T S"] | None


def _scores(softcap: float | None, q: Float[Array, "B K G T H"], part: Part) -> Float[Array, "B K G T S"]:
    """Masked scores before the softmax, float32. Queries are scaled."""
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jax.lax.dot_general(flat, part.kv.k.astype(q.dtype), (((3,), (3,)), ROWS), preferred_element_type=jnp.float32)
    scores = scores.reshape(*q.shape[:4], part.kv.k.shape[2])
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    if part.bias is not None:
        scores = scores + part.bias
    return jnp.where(part.allowed[:, None, None], scores, MASKED)


def _attend(softcap: float | None, sinks: Float[Array, "N"] | None, q: Float[Array, "B K G T H"],
            parts: list[Part]) -> Float[Array, "B K G T V"]:
    """One softmax over all parts."""
    scores = [_scores(softcap, q, part) for part in parts]
    top = jnp.max(scores[0], axis=-1, keepdims=True)
    for part in scores[1:]:
        top = jnp.maximum(top, jnp.max(part, axis=-1, keepdims=True))
    total = jnp.zeros_like(top)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, q.shape[1], -1, 1, 1)
        top = jnp.maximum(top, sink)
        total = jnp.exp(sink - top)
    top = jax.lax.stop_gradient(top)
    out = jnp.zeros((), jnp.float32)
    for score, part in zip(scores, parts, strict=True):
        shares = jnp.exp(score - top)
        total = total + jnp.sum(shares, axis=-1, keepdims=True)
        flat = shares.astype(q.dtype).reshape(*q.shape[:2], -1, score.shape[-1])
        mixed = jax.lax.dot_general(flat, part.kv.v.astype(q.dtype), (((3,), (2,)), ROWS), preferred_element_type=jnp.float32)
        out = out + mixed.reshape(*q.shape[:4], -1)
    return (out / total).astype(q.dtype)


def _grouped(cfg: config.Attention, q: Float[Array, "B T N H"]) -> Float[Array, "B K G T H"]:
    """Queries by the key-value head that they share, scaled."""
    q = q * jnp.asarray(cfg.head_width**-0.5 if cfg.scale is None else cfg.scale, q.dtype)
    return q.reshape(*q.shape[:2], cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_width).transpose(0, 2, 3, 1, 4)


def _out(params: dict[str, Any], cfg: config.Attention, mixed: Float[Array, "B K G T H"]) -> Float[Array, "B T D"]:
    """The output's product."""
    mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(mixed.shape[0], mixed.shape[3], cfg.heads, cfg.head_width)
    out = einsum("BTNH,NHD->BTD", mixed, params["o"])
    return out + params["o_bias"].astype(out.dtype)[None, None] if cfg.out_bias else out


def _runs(run: Callable[..., Array], given: Sequence[Array | None], axes: Sequence[int],
          spans: Sequence[tuple[int, int, int]]) -> Float[Array, "B K G T H"]:
    """The outputs of all queries, at most QUERIES at a time.

    Args:
      run: from a part of each of `given` and how many keys it may see to its output.
      given: first the queries; None stays None.
      axes: of each of these, along which the queries lie.
      spans: (first query, end, keys that it may see) in order.
    """
    length = given[0].shape[axes[0]]

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
            outs.append(jnp.moveaxis(runs, 0, 3).reshape(*runs.shape[1:4], whole - start, runs.shape[5]))
        elif whole > start:
            outs.append(again(*(part(y, axis, start, whole) for y, axis in zip(given, axes, strict=True))))
        if whole < end:
            outs.append(again(*(part(y, axis, whole, end) for y, axis in zip(given, axes, strict=True))))
        return outs

    outs = [out for one in spans for out in span(*one)]
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)


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
    q = _grouped(cfg, q)
    new = KeyValue(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    def heads(bias: Float[Array, "B N T S"]) -> Float[Array, "B K G T S"]:
        return bias.reshape(bias.shape[0], cfg.kv_heads, -1, *bias.shape[2:])

    def bias(queries: Context, keys: Array, name: str, start: Array | None) -> Float[Array, "B K G T S"] | None:
        """What is added to scores. `start`: the run's first place, where keys are the call's own."""
        match cfg.position:
            case config.Alibi():
                return position.alibi_bias(cfg.position, cfg.kv_heads, queries.positions, keys)
            case config.RelativeBias(shared=shared):
                kept = getattr(context.bias, name) if shared else None
                if kept is not None:
                    return heads(kept)
                table = context.bias.table if shared else params["relative_bias"]
                if start is not None and context.counted:
                    return heads(position.relative_bias_of_run(cfg.position, table, start, queries.positions.shape[1],
                                                               keys.shape[1]))
                return heads(position.relative_bias(cfg.position, table, queries.positions, keys))
        return None

    mixed = mix(cfg, q, new, cached, context, softcap=cfg.softcap, sinks=params["sinks"] if cfg.sinks else None, bias=bias)
    return _out(params, cfg, mixed), new


def mix(cfg: config.SelfAttention, q: Float[Array, "B K G T H"], new: KeyValue, cached: KeyValue | None, context: Context, *,
        softcap: float | None = None, sinks: Float[Array, "N"] | None = None,
        bias: Callable[..., Array | None] = lambda *_: None) -> Float[Array, "B K G T V"]:
    """The values that the T tokens' queries take from the cache and from the tokens themselves.

    Args:
      cfg: says which keys are seen: causal, window.
      q: scaled.
      new: keys [B, K, T, H] and values [B, K, T, V] of the T tokens.
      cached: committed keys and values [B, K, S, H] and [B, K, S, V].
      bias: from a run's context, positions of keys, "among" or "committed", and the run's first place (None with the cache) to
        what is added to scores.
    """
    batch, length = context.positions.shape
    slots = 0 if cached is None else cached.k.shape[-2]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (batch, slots))

    def run(q: Array, place: Array, positions: Array, segments: Array | None, prefix: Array | None, rows: Array | None,
            seen: int) -> Array:
        """The output of a run of queries, none of which may see a new token behind the first `seen`."""
        queries = context.replace(positions=positions, segments=segments, prefix=prefix, mask=rows)
        near = context.until(seen)
        parts = [Part(KeyValue(new.k[:, :, :seen], new.v[:, :, :seen]), mask.among(cfg, near, queries),
                      bias(queries, near.positions, "among", place[0, 0]))]
        if cached is not None:
            parts.insert(0, Part(cached, mask.committed(cfg, queries, slots), bias(queries, slot, "committed", None)))
        return _attend(softcap, sinks, q, parts)

    place = jnp.arange(length, dtype=jnp.int32)[None]
    given = (q, place, context.positions, context.segments, context.prefix, context.mask)
    spans = [(0, length, length)]
    if context.ordered and cfg.causal and context.mask is None:
        size = -(-length // (QUERIES * SPANS)) * QUERIES
        spans = [(start, min(start + size, length), min(start + size, length)) for start in range(0, length, size)]
    return _runs(run, given, (3, 1, 1, 1, 1, 1), spans)


def remember(params: dict[str, Any], cfg: config.Attention, source: Float[Array, "B S D"],
             segments: Int[Array, "B S"]) -> KeyValue:
    """What `cross` reads of an encoded source: keys and values [B, K, S, H]."""
    k, v = (_project(params, cfg, source, name) for name in "kv")
    if isinstance(cfg.position, config.Rope):
        places = mask.count(*segments.shape, None, segments, None)
        cos, sin = position.rotation(cfg.position, cfg.rotated, places, places)
        k = position.rotate(k, cos, sin, cfg.position.interleaved)
    return KeyValue(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))


def cross(params: dict[str, Any], cfg: config.Attention, x: Float[Array, "B T D"], context: Context,
          memory: KeyValue | None) -> Float[Array, "B T D"]:
    """The output of attention to an encoded source.

    Args:
      memory: what `remember` made; None makes it of `context.source.hidden`.
    """
    if memory is None:
        memory = remember(params, cfg, context.source.hidden.astype(x.dtype), context.source.segments)
    q = _project(params, cfg, x, "q")
    if isinstance(cfg.position, config.Rope):
        q = position.rotate(q, *context.rotations[cfg.position, cfg.rotated], cfg.position.interleaved)
    q = _grouped(cfg, q)
    sinks = params["sinks"] if cfg.sinks else None

    def run(q: Array, segments: Array | None, seen: int) -> Array:
        allowed = mask.source(context.replace(segments=segments))
        out = _attend(cfg.softcap, sinks, q, [Part(memory, allowed, None)])
        # Where a segment has no source there is nothing to add.
        return out if segments is None else jnp.where(jnp.any(allowed, axis=-1)[:, None, None, :, None], out, 0)

    length = x.shape[1]
    return _out(params, cfg, _runs(run, (q, context.segments), (3, 1), [(0, length, length)]))

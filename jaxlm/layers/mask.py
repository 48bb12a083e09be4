"""Who may attend to whom, described by positions and segments; arrays are made where they are used. True = may attend."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlm import config
from jaxlm.cache import Memory
from jaxlm.layers import position


@flax.struct.dataclass
class Context:
    """What the layers know of the tokens, beside their vectors.

    Attributes:
      positions: int32 [B, T], -1 where there is no token.
      segments: int32 [B, T] or None; tokens see only their own segment, 0 is padding.
      mask: bool [B or 1, T, T] or None; takes the place of the causal rule among the T tokens (a tree, a prefix).
      prefix: int32 [B, T] or None; keys before this position are seen from earlier queries too, where the causal rule holds.
      length: int32 [B] or None; committed slots of each row of the cache.
      rotations: cosines and sines by (Rope, rotated width): see `jaxlm.layers.position.rotations`.
      bias: what the stack's layers share of a relative bias, or None.
      source: an encoded source, or None.
      tokens: int32 [B, T], ids, or None where the model was given embeddings.
      routing: the weights that the routers of all layers share, or None.
      ordered: whether it is known that no token sees one that stands behind it.
      counted: whether it is known that positions of tokens that see each other are as far apart as their places.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None
    mask: Bool[Array, "B T T"] | None
    prefix: Int[Array, "B T"] | None
    length: Int[Array, "B"] | None
    rotations: dict[Any, Any]
    bias: position.Shared | None = None
    source: Memory | None = None
    tokens: Int[Array, "B T"] | None = None
    routing: Any = None
    ordered: bool = flax.struct.field(pytree_node=False, default=False)
    counted: bool = flax.struct.field(pytree_node=False, default=False)

    def until(self, end: int) -> "Context":
        """Of the first `end` tokens. Their rotations stay as they are."""
        segments, prefix = (None if array is None else array[:, :end] for array in (self.segments, self.prefix))
        rows = None if self.mask is None else self.mask[:, :end, :end]
        return self.replace(positions=self.positions[:, :end], segments=segments, prefix=prefix, mask=rows)


def count(batch: int, width: int, length: Array | None, segments: Array | None,
          lengths: Array | None) -> Int[Array, "B T"]:
    """Positions from the cache's length on; restarting in each segment, -1 in segment 0 and from each row's `lengths` on."""
    index = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
    if segments is None:
        counted = index if length is None else index + length[:, None]
    else:
        starts = jnp.concatenate([jnp.ones((batch, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
        counted = jnp.where(segments == 0, -1, index - start)
    return counted if lengths is None else jnp.where(index < lengths[:, None], counted, -1)


def describe(layers: Iterable[config.SelfAttention], batch: int, width: int, positions: Int[Array, "B T"] | None = None,
             segments: Int[Array, "B T"] | None = None, mask: Bool[Array, "B T T"] | None = None,
             length: Int[Array, "B"] | None = None, total: Int[Array, "B"] | None = None,
             lengths: Int[Array, "B"] | None = None, prefix: Int[Array, "B T"] | None = None) -> Context:
    """The context of a call for these layers, T = `width`; arguments as `jaxlm.model.forward` takes them.

    Args:
      length: committed slots of the cache.
      total: tokens each row will hold when its text is complete; default up to the largest position.
      lengths: how many of the T tokens there are, where no positions are given.
    """
    counted = positions is None
    ordered = counted and prefix is None
    if positions is None:
        positions = count(batch, width, length, segments, lengths)
    reach = jnp.max(positions, axis=1) + 1 if total is None else total
    reach = jnp.maximum(reach[:, None], positions + 1)
    return Context(positions, segments, mask, prefix, length, position.rotations(layers, positions, reach), ordered=ordered,
                   counted=counted)


def among(cfg: config.SelfAttention, context: Context, queries: Context | None = None) -> Bool[Array, "B Q T"]:
    """Which of the T tokens each of them may see; with `queries`, each of a run of Q of them."""
    queries = context if queries is None else queries
    query, key = queries.positions[:, :, None], context.positions[:, None, :]
    allowed = (key >= 0) & (query >= 0)
    if context.mask is not None:
        allowed = allowed & queries.mask
    elif cfg.causal:
        before = key <= query
        if context.prefix is not None:
            before = before | (key < queries.prefix[:, :, None])
        allowed = allowed & before
    if cfg.window is not None:
        allowed = allowed & (query - key < cfg.window) & (key - query < cfg.window)
    if context.segments is not None:
        allowed = allowed & (queries.segments[:, :, None] == context.segments[:, None, :])
    return allowed


def committed(cfg: config.SelfAttention, context: Context, slots: int) -> Bool[Array, "B T S"]:
    """Which slots of the cache each of the T tokens may see."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    allowed = slot < context.length[:, None, None]
    if cfg.window is not None:
        allowed = allowed & (context.positions[:, :, None] - slot < cfg.window)
    return jnp.broadcast_to(allowed, (*context.positions.shape, slots))


def source(context: Context) -> Bool[Array, "B T|1 S"]:
    """Which tokens of the encoded source each of the T tokens may see; where there are no segments, all see the same."""
    segments = context.source.segments
    if context.segments is None:
        return (segments == 1)[:, None]
    return (segments[:, None, :] == context.segments[:, :, None]) & (segments != 0)[:, None]

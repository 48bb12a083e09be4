"""A stack of blocks: groups in order, each a pattern of blocks repeated and scanned, or unrolled.

Weights of a group are stacked along a leading "layers" axis, so a prefix of layers is a slice. A group's weights (and its
cache) may instead be a tuple with a tree per repeat, as `unstack` gives: the layers are then unrolled, which is what XLA
compiles best for a CPU, and without the copies that slicing a stacked array costs there.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlm import block, config
from jaxlm.cache import KeyValue
from jaxlm.layers.mask import Context


def spec(cfg: config.Stack, width: int) -> dict[str, Any]:
    """"0/0/attention/q": group, place in the group's pattern, then the block's own path; leading axis "layers"."""
    return {str(g): {str(p): jax.tree.map(lambda param, n=group.repeats: param.stacked(n), block.spec(one, width))
                     for p, one in enumerate(group.pattern)} for g, group in enumerate(cfg.groups)}


def unstack(params: dict[str, Any], cfg: config.Stack) -> dict[str, Any]:
    """The same weights with each group's place as a tuple over repeats. On one CPU device nothing is copied."""
    def pick(leaf: Any, repeat: int) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) or len(leaf.devices()) > 1:
            return leaf[repeat]
        device = next(iter(leaf.devices()))
        # On a CPU a view of the same memory where its alignment allows: device_put keeps the array behind it alive.
        return jax.device_put(np.asarray(leaf)[repeat], device) if device.platform == "cpu" else leaf[repeat]

    return {str(g): {str(p): tuple(jax.tree.map(lambda leaf, r=r: pick(leaf, r), params[str(g)][str(p)])
                                   for r in range(group.repeats))
                     for p in range(len(group.pattern))} for g, group in enumerate(cfg.groups)}


def apply(params: dict[str, Any], cfg: config.Stack, x: Float[Array, "B T D"], context: Context,
          cache: tuple[tuple[KeyValue, ...], ...] | None, taps: Sequence[int] = (),
          remat: Any = None) -> tuple[Float[Array, "B T D"], PyTree, tuple[Array, ...]]:
    """The last block's output, every layer's new keys and values, and the hidden states asked for.

    Args:
      cache: `Cache.layers`, stacked or unrolled as the weights are; only read.
      taps: 0 is x itself, i the output of the i-th block.
      remat: a `jax.checkpoint` policy, or None: `jax.checkpoint_policies.nothing_saveable` recomputes whole blocks.

    Returns:
      (x, a tree like `cache` with T slots instead of S, one array [B, T, D] per tap)

    Raises:
      ValueError: when only one of weights and cache is unrolled.
    """
    taps = tuple(taps)
    kept = tuple(x if tap == 0 else jnp.zeros_like(x) for tap in taps)
    layer, new = 0, []
    for g, group in enumerate(cfg.groups):
        trees = tuple(params[str(g)][str(p)] for p in range(len(group.pattern)))
        cached = None if cache is None else cache[g]
        unrolled = isinstance(trees[0], tuple)
        if cached is not None and isinstance(cached[0].k, tuple) != unrolled:
            raise ValueError("weights and cache must both be stacked or both be unstacked: see jaxlm.model.unstack and "
                             "jaxlm.cache.unstack")

        def repeat(carry: Any, trees: Any, caches: Any, group: config.Group = group) -> tuple[Any, Any]:
            x, kept, layer = carry
            fresh = []
            for p, one in enumerate(group.pattern):
                def run(tree: Any, x: Array, context: Context, cached: Any, one: config.Block = one) -> Any:
                    return block.apply(tree, one, x, context, cached)
                if remat is not None:
                    run = jax.checkpoint(run, policy=remat)
                x, kv = run(trees[p], x, context, None if caches is None else caches[p])
                layer = layer + 1
                kept = tuple(jnp.where(layer == tap, x, old) for tap, old in zip(taps, kept, strict=True))
                fresh.append(kv)
            return (x, kept, layer), tuple(fresh)

        if unrolled:
            outs = []
            for r in range(group.repeats):
                mine = None if cached is None else tuple(_at(kv, r) for kv in cached)
                (x, kept, layer), fresh = repeat((x, kept, layer), tuple(tree[r] for tree in trees), mine)
                outs.append(fresh)
            new.append(tuple(KeyValue(*(tuple(getattr(out[p], name) for out in outs) for name in "kv"))
                             for p in range(len(group.pattern))))
        else:
            def body(carry: Any, xs: Any, cached: Any = cached, repeat: Any = repeat) -> tuple[Any, Any]:
                trees, index = xs
                return repeat(carry, trees, None if cached is None else jax.tree.map(
                    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), cached))
            carry = (x, kept, jnp.asarray(layer, jnp.int32))
            (x, kept, _), fresh = jax.lax.scan(body, carry, (trees, jnp.arange(group.repeats)))
            layer += group.repeats * len(group.pattern)
            new.append(fresh)
    return x, tuple(new), kept


def _at(kv: KeyValue, repeat: int) -> KeyValue:
    return KeyValue(kv.k[repeat], kv.v[repeat])

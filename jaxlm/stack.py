"""A stack of blocks: groups in order, each a pattern of blocks repeated and scanned, or unrolled.

Weights of a group are stacked along a leading "layers" axis, so a prefix of layers is a slice. A group's weights (and its
cache) may instead be a tuple with a tree per repeat, as `unstack` gives: the layers are then unrolled, which is what XLA
compiles best for a CPU, and without the copies that slicing a stacked array costs there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import block, config, sharding
from jaxlm.cache import KeyValue
from jaxlm.layers import attention, moe, router
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


def prefix(cfg: config.Stack, layers: int) -> config.Stack:
    """The first blocks of a stack. A group of which only whole repeats are left stays one; else the rest is a group more.

    Raises:
      ValueError: when the stack has not so many blocks.
    """
    if not 1 <= layers <= cfg.layers:
        raise ValueError(f"a prefix of this stack has 1 to {cfg.layers} layers, got {layers}")
    groups = []
    for group in cfg.groups:
        whole, rest = divmod(min(layers, len(group.pattern) * group.repeats), len(group.pattern))
        if whole:
            groups.append(config.Group(group.pattern, whole))
        if rest:
            groups.append(config.Group(group.pattern[:rest], 1))
        layers -= len(group.pattern) * whole + rest
    return config.Stack(tuple(groups))


def prefix_weights(params: dict[str, Any], cfg: config.Stack, layers: int) -> dict[str, Any]:
    """The weights of `prefix(cfg, layers)`, stacked or unrolled as they come. What begins with a group keeps all its repeats:
    they are not read, and cutting would copy the weights."""
    def cut(place: Any, start: int, count: int) -> Any:
        if start == 0:
            return place
        if isinstance(place, tuple):
            return place[start:start + count]
        return jax.tree.map(lambda leaf: leaf[start:start + count], place)

    return {str(i): {str(p): cut(params[str(g)][str(p)], start, group.repeats) for p in range(len(group.pattern))}
            for i, (group, g, start) in enumerate(_origins(cfg, layers))}


Layers = tuple[tuple[KeyValue | None, ...], ...]


def prefix_cache(cache: Layers, cfg: config.Stack, layers: int) -> Layers:
    """`Cache.layers` or `Memory.layers` of `prefix(cfg, layers)`. What begins with a group keeps all its repeats: they are not
    read, and cutting would copy the cache."""
    def cut(kv: KeyValue | None, start: int, count: int) -> KeyValue | None:
        return kv if kv is None or start == 0 else kv.each(lambda leaf: leaf[start:start + count])

    return tuple(tuple(cut(kv, start, group.repeats) for kv in cache[g][:len(group.pattern)])
                 for group, g, start in _origins(cfg, layers))


def _origins(cfg: config.Stack, layers: int) -> list[tuple[config.Group, int, int]]:
    """For each group of a prefix: itself, the group that it is cut from, and the repeat there that it starts at."""
    found, g, start = [], 0, 0
    for group in prefix(cfg, layers).groups:
        if start == cfg.groups[g].repeats:
            g, start = g + 1, 0
        found.append((group, g, start))
        start += group.repeats
    return found


def apply(params: dict[str, Any], cfg: config.Stack, x: Float[Array, "B T D"], context: Context,
          cache: tuple[tuple[KeyValue, ...], ...] | None, taps: Sequence[int] = (),
          remat: Any = None, memory: Layers | None = None) -> "Result":
    """All blocks in order.

    Args:
      cache: `Cache.layers`, stacked or unrolled as the weights are; only read.
      taps: 0 is x itself, i the output of the i-th block.
      remat: a `jax.checkpoint` policy, or None: `jax.checkpoint_policies.nothing_saveable` recomputes whole blocks.
      memory: `Memory.layers`, laid out as the cache.

    Raises:
      ValueError: when only one of weights and cache is unrolled.
    """
    kept = {tap: x for tap in taps}  # a tap that is still to come holds x's place
    carry, new, routing = Carry(x, kept, jnp.zeros((), jnp.int32), _first_state(cfg, x)), [], []
    for g, group in enumerate(cfg.groups):
        trees = tuple(params[str(g)][str(p)] for p in range(len(group.pattern)))
        caches = (None,) * len(trees) if cache is None else cache[g]
        memories = (None,) * len(trees) if memory is None else memory[g]
        unrolled = isinstance(trees[0], tuple)
        if any(kv is not None and isinstance(kv.k, tuple) != unrolled for kv in (*caches, *memories)):
            raise ValueError("weights, cache and memory must both be stacked or both be unstacked: see jaxlm.model.unstack and "
                             "jaxlm.cache.unstack")
        through = _unrolled if unrolled else _scanned
        carry, (fresh, routed) = through(group, trees, caches, memories, carry, context, remat)
        new.append(fresh)
        routing.append(routed)
    return Result(carry.x, tuple(new), tuple(carry.kept[tap] for tap in taps), tuple(routing))


class Result(NamedTuple):
    """What a stack gives.

    Attributes:
      x: the last block's output.
      kv: every layer's new keys and values: a tree like `Cache.layers`, with T slots instead of S.
      taps: [B, T, D], one for each that was asked for.
      routing: a tuple over groups of a tuple over the pattern's places: a `jaxlm.layers.moe.Routing` with a leading axis of
        repeats where there is a mixture of experts, else None.
    """

    x: Float[Array, "B T D"]
    kv: PyTree
    taps: tuple[Float[Array, "B T D"], ...]
    routing: PyTree


def _recurrent(cfg: config.Stack) -> config.Recurrent | None:
    """The recurrent router of a stack, where it has one."""
    routers = (block.feedforward.router for block in cfg.blocks() if isinstance(block.feedforward, config.Moe))
    return next((router for router in routers if isinstance(router, config.Recurrent)), None)


def shared_spec(cfg: config.Stack) -> dict[str, Any]:
    """What the routers of all layers share, or nothing."""
    recurrent = _recurrent(cfg)
    return {} if recurrent is None else router.shared_spec(recurrent)


def _first_state(cfg: config.Stack, x: Float[Array, "B T D"]) -> Float[Array, "B T P"] | None:
    recurrent = _recurrent(cfg)
    return None if recurrent is None else jnp.zeros((*x.shape[:2], recurrent.width), x.dtype)


class Carry(NamedTuple):
    """What goes from layer to layer: the vectors, the taps, how many layers there were, the routers' state."""

    x: Float[Array, "B T D"]
    kept: dict[int, Float[Array, "B T D"]]
    layer: Array
    state: Float[Array, "B T P"] | None


Places = Sequence[KeyValue | None]  # of a pattern
Fresh = tuple[tuple[KeyValue, ...], tuple[moe.Routing | None, ...]]  # what the places of a pattern give


def _once(group: config.Group, trees: Sequence[Any], caches: Places, memories: Places, carry: Carry, context: Context,
          remat: Any) -> tuple[Carry, Fresh]:
    """The group's pattern of blocks, once."""
    x, kept, layer, state = carry
    fresh, routing = [], []
    for p, one in enumerate(group.pattern):
        run = partial(_block, one)
        if remat is not None:
            run = jax.checkpoint(run, policy=remat)
        x, kv, routed, state = run(trees[p], x, context, caches[p], memories[p], state)
        layer = layer + 1
        kept = {tap: jnp.where(layer == tap, x, old) for tap, old in kept.items()}
        fresh.append(kv)
        routing.append(routed)
    return Carry(x, kept, layer, state), (tuple(fresh), tuple(routing))


def _block(cfg: config.Block, params: Any, x: Array, context: Context, cached: KeyValue | None, memory: KeyValue | None,
           state: Array | None) -> block.Result:
    result = block.apply(params, cfg, x, context, cached, memory, state)
    return result._replace(x=sharding.constrain(result.x, sharding.ACTIVATIONS))


def _unrolled(group: config.Group, trees: Sequence[Any], caches: Places, memories: Places, carry: Carry, context: Context,
              remat: Any) -> tuple[Carry, Fresh]:
    def at(places: Places, repeat: int) -> Places:
        return tuple(None if kv is None else kv.each(lambda leaf: leaf[repeat]) for kv in places)

    outs, routing = [], []
    for r in range(group.repeats):
        mine = [tree[r] for tree in trees]
        carry, (fresh, routed) = _once(group, mine, at(caches, r), at(memories, r), carry, context, remat)
        outs.append(fresh)
        routing.append(routed)
    kv = tuple(jax.tree.map(lambda *leaves: leaves, *place) for place in zip(*outs, strict=True))
    return carry, (kv, jax.tree.map(lambda *layers: jnp.stack(layers), *routing))


def _scanned(group: config.Group, trees: Sequence[Any], caches: Places, memories: Places, carry: Carry, context: Context,
             remat: Any) -> tuple[Carry, Fresh]:
    def at(stacked: Any, repeat: Array) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, repeat, 0, keepdims=False), stacked)

    # The cache is indexed inside, not scanned over: scanning would copy all of it at every step. So are weights of which a
    # prefix takes the first repeats only; scanning over all is better for gradients.
    stacked = {leaf.shape[0] for leaf in jax.tree.leaves(trees)}
    if min(stacked) < group.repeats:
        raise ValueError(f"a group of layers is repeated {group.repeats} times, there are weights for {min(stacked)}")
    whole = stacked == {group.repeats}

    def body(carry: Carry, xs: tuple[Any, Array]) -> tuple[Carry, Fresh]:
        scanned, repeat = xs
        mine = scanned if whole else at(tuple(trees), repeat)
        return _once(group, mine, at(caches, repeat), at(memories, repeat), carry, context, remat)

    return jax.lax.scan(body, carry, (tuple(trees) if whole else (), jnp.arange(group.repeats)))


def remember(params: dict[str, Any], cfg: config.Stack, source: Float[Array, "B S D"], segments: Int[Array, "B S"]) -> Layers:
    """The keys and values that every layer with cross-attention makes of an encoded source, as `Memory.layers`."""
    def one(tree: Any, attend: config.Attention) -> KeyValue:
        def make(weights: Any) -> KeyValue:
            return attention.remember(weights, attend, source, segments)

        if isinstance(tree, tuple):
            made = [make(weights["cross_attention"]) for weights in tree]
            return KeyValue(tuple(kv.k for kv in made), tuple(kv.v for kv in made))
        return jax.lax.map(make, tree["cross_attention"])

    return tuple(tuple(None if place.cross is None else one(params[str(g)][str(p)], place.cross)
                       for p, place in enumerate(group.pattern)) for g, group in enumerate(cfg.groups))

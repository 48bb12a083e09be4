"""Dense feed-forward layers made mixtures of experts."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxlm import config
from jaxlm.adapt.architecture import init, rebuilt
from jaxlm.layers import router as routers
from jaxlm.model import Model
from jaxlm.weight import Int8, Weight

Layers = Sequence[int] | None  # of a stack, from 0; None is all
# Of a layer's path, its new config, the model's width, how many repeats are stacked and the old weights, the new ones.
Grow = Callable[[str, config.Moe, int, int, PyTree], PyTree]


def upcycle(model: Model, experts: int, router: config.TopK | config.Hash, *, layers: Layers = None, noise: float = 0.0,
            key: Key[Array, ""] | None = None) -> Model:
    """Every feed-forward layer copied into each of `experts` experts, with a fresh router.

    Where the router's weights sum to 1 (`config.TopK(k, normalize=True)`, hashes), the model computes what it did before.

    Args:
      layers: which layers of the stack (or of both) become mixtures.
      noise: standard deviation, in those of the weights, of what is added to every expert's weights to tell them apart.
      key: for the router and the noise.

    Raises:
      ValueError: for a layer that is a mixture already or does not exist, 8-bit weights that are to get noise, or no key where
        one is needed.

    Reference: Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055
    """
    if not isinstance(router, config.TopK | config.Hash):
        raise ValueError(f"upcycling needs a router whose tokens choose, TopK or Hash, got {type(router).__name__}")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    if key is None and (noise or isinstance(router, config.TopK)):
        raise ValueError("a fresh router and noise are drawn: give a key")

    def change(one: config.Dense) -> config.Moe:
        return config.Moe(experts, one, router)

    def grow(path: str, one: config.Moe, width: int, repeats: int, tree: PyTree) -> PyTree:
        def copies(name: str, leaf: Weight) -> Weight:
            def spread(array: Array) -> Array:
                return jnp.broadcast_to(array[:, None], (array.shape[0], experts, *array.shape[1:]))
            if not noise:
                return jax.tree.map(spread, leaf)
            if isinstance(leaf, Int8):
                raise ValueError("8-bit weights get no noise: upcycle before they are quantised")
            own = jax.random.fold_in(key, zlib.crc32(f"{path}/{name}".encode()))
            drawn = jax.random.normal(own, spread(leaf).shape, leaf.dtype)
            return spread(leaf) + drawn * (noise * jnp.std(leaf)).astype(leaf.dtype)

        grown = {"experts": {name: copies(name, leaf) for name, leaf in tree.items()}}
        fresh = jax.tree.map(lambda param: param.stacked(repeats), routers.spec(one, width))
        return grown | (init(model, {path: {"router": fresh}}, key)[path] if fresh else {})

    return _changed(model, layers, change, grow)


def split(model: Model, experts: int, k: int, *, layers: Layers = None, rounds: int = 20) -> Model:
    """Every feed-forward layer divided into `experts` of equal width, hidden units with similar keys together; a token goes to
    the `k` whose keys, averaged, it agrees with most (EMoE). With k = experts the model computes what it did before.

    Keys are the columns of the gate, of `up` where there is none; the clusters of equal size are those of k-means, with every
    unit at the nearest centre that has room, surest first.

    Args:
      layers: which layers of the stack become mixtures.
      rounds: of k-means.

    Raises:
      ValueError: for widths that do not divide, 8-bit weights, a bias of the output, and as `upcycle`.

    Reference: Qiu et al. 2023, https://arxiv.org/abs/2310.10908
    """
    if rounds < 1:
        raise ValueError(f"k-means takes at least 1 round, got {rounds}")

    def change(one: config.Dense) -> config.Moe:
        if one.width % experts:
            raise ValueError(f"a feed-forward layer of width {one.width} does not divide into {experts} experts")
        if one.bias:
            raise ValueError("the output's bias belongs to no expert: layers with biases are not split")
        return config.Moe(experts, dataclasses.replace(one, width=one.width // experts), config.AverageKey(k))

    def grow(path: str, one: config.Moe, width: int, repeats: int, tree: PyTree) -> PyTree:
        if any(isinstance(leaf, Int8) for leaf in tree.values()):
            raise ValueError("8-bit weights are not split: their scales are shared; split before they are quantised")
        keys = np.asarray(tree["gate" if one.expert.gated else "up"], np.float32)
        order = jnp.asarray(np.stack([_clusters(layer.T, experts, rounds) for layer in keys]))

        def parted(name: str, leaf: Array) -> Array:
            if name == "down":
                sorted_ = jnp.take_along_axis(leaf, order[:, :, None], axis=1)
                return sorted_.reshape(repeats, experts, -1, leaf.shape[2])
            sorted_ = jnp.take_along_axis(leaf, order[:, None], axis=2)
            return sorted_.reshape(repeats, leaf.shape[1], experts, -1).swapaxes(1, 2)
        return {"experts": {name: parted(name, leaf) for name, leaf in tree.items()}}

    return _changed(model, layers, change, grow)


def _clusters(keys: np.ndarray, count: int, rounds: int) -> np.ndarray:
    """The keys' numbers, sorted into `count` clusters of equal size."""
    size = len(keys) // count
    centres = keys[np.linspace(0, len(keys) - 1, count).astype(int)]
    best = None
    for _ in range(rounds):
        distance = ((keys**2).sum(1)[:, None] - 2 * keys @ centres.T + (centres**2).sum(1)[None])
        near = np.sort(distance, axis=1)
        cluster, room = np.full(len(keys), -1), np.full(count, size)
        for unit in np.argsort(near[:, 0] - near[:, min(1, count - 1)]):  # the surest first
            choice = next(c for c in np.argsort(distance[unit]) if room[c])
            cluster[unit], room[choice] = choice, room[choice] - 1
        if best is not None and (cluster == best).all():
            break
        best = cluster
        centres = np.stack([keys[cluster == c].mean(0) for c in range(count)])
    return np.argsort(best, kind="stable")


def _changed(model: Model, layers: Layers, change: Callable[[config.Dense], config.Moe], grow: Grow) -> Model:
    """The model with some of its feed-forward layers made mixtures."""
    cfg = model.config
    if not isinstance(cfg, config.EncoderDecoder):
        name = "decoder" if isinstance(cfg, config.Decoder) else "encoder"
        changed, weights = _side(cfg, model.params[name], layers, change, grow, name)
        return Model(changed, model.params | {name: weights}, model.tokenizer)
    if layers is not None:
        raise ValueError("of an encoder-decoder all layers become mixtures: leave out `layers`")
    sides = {name: _side(getattr(cfg, name), model.params[name], None, change, grow, name) for name in ("encoder", "decoder")}
    changed = dataclasses.replace(cfg, **{name: side for name, (side, _) in sides.items()})
    return Model(changed, model.params | {name: weights for name, (_, weights) in sides.items()}, model.tokenizer)


def _side(cfg: config.Decoder | config.Encoder, tree: PyTree, layers: Layers, change: Callable[[config.Dense], config.Moe],
          grow: Grow, name: str) -> tuple[Any, PyTree]:
    blocks = list(cfg.stack.blocks())
    chosen = set(range(len(blocks)) if layers is None else layers)
    if not chosen or not chosen <= set(range(len(blocks))):
        raise ValueError(f"layers are some of 0 to {len(blocks) - 1}, got {sorted(chosen)}")
    for layer in sorted(chosen):
        if not isinstance(blocks[layer].feedforward, config.Dense):
            raise ValueError(f"layer {layer} is a mixture of experts already")
        blocks[layer] = dataclasses.replace(blocks[layer], feedforward=change(blocks[layer].feedforward))
    stack, side = rebuilt(tree, cfg.stack, blocks)
    trees = {g: dict(places) for g, places in side["blocks"].items()}
    for g, group in enumerate(stack.groups):
        for p, one in enumerate(group.pattern):
            place = trees[str(g)][str(p)]
            if isinstance(one.feedforward, config.Moe) and "experts" not in place["feedforward"]:
                path = f"{name}/blocks/{g}/{p}/feedforward"
                made = grow(path, one.feedforward, cfg.width, group.repeats, place["feedforward"])
                trees[str(g)][str(p)] = place | {"feedforward": made}
    return dataclasses.replace(cfg, stack=stack), side | {"blocks": trees}

"""What a call of the target costs by the size of its tree: measured on the device at hand, or estimated for a chip.

Up to the ridge of its roofline an accelerator is busy reading weights, and verifies a few nodes in the time of one; a CPU's
ridge is low. Which sizes of tree are worth having follows from that. Of a mixture of experts more nodes also read more weights:
every token goes to experts of its own.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import cache as caching
from jaxlm import config, model
from jaxlm.decoding.speculative import tree as trees
from jaxlm.layers import moe
from jaxlm.model import Model


@dataclasses.dataclass(frozen=True)
class Chip:
    """What bounds a chip: `bandwidth` of its memory in bytes per second, `flops` of bfloat16 products per second."""

    bandwidth: float
    flops: float

    @property
    def ridge(self) -> float:
        """Tokens per call up to which products of bfloat16 weights take no longer than reading them."""
        return self.flops / self.bandwidth


# As published by their makers; TPU kinds by jax's `device_kind`.
CHIPS = {
    "TPU v4": Chip(1.2e12, 2.75e14), "TPU v5 lite": Chip(8.1e11, 1.97e14), "TPU v5p": Chip(2.8e12, 4.59e14),
    "TPU v6 lite": Chip(1.6e12, 9.2e14), "NVIDIA H200": Chip(4.8e12, 9.9e14),
}


def chip(kind: str) -> Chip | None:
    """The chip of this `device_kind`, None for one that is not known."""
    return next((one for name, one in CHIPS.items() if kind.startswith(name)), None)


def unread(cfg: config.Decoder, weights: PyTree, tokens: int) -> float:
    """Bytes of experts that a call on so many tokens need not read: 0 where the model has no mixture of experts.

    Of E experts a token goes to k, so P tokens leave out E (1 - k/E)^P of them. This takes tokens to choose by themselves and
    experts to be equally likely; a text's neighbours choose more alike than that.

    Args:
      weights: arrays, or their shapes, stacked by layer.
    """
    left = 0.0
    for g, group in enumerate(cfg.stack.groups):
        for p, block in enumerate(group.pattern):
            layer = block.feedforward
            if isinstance(layer, config.Moe):
                experts = weights["decoder"]["blocks"][str(g)][str(p)]["feedforward"]["experts"]
                left += _nbytes(experts) * (1 - moe.chosen(layer) / layer.experts) ** tokens
    return left


def reads(target: Model, tokens: int) -> float:
    """Bytes of weights that a call of the target on so many tokens reads: see `unread`."""
    cfg, tree = target.decoder, target.params["decoder"]
    table = 0 if isinstance(cfg.head, config.Head) and cfg.head.tied else _nbytes(tree["embedding"]["tokens"])
    return _nbytes(tree) - table - unread(cfg, target.params, tokens)


def _nbytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def roofline(one: Chip, weights: float | Callable[[int], float], parameters: float, batch: int, sizes: tuple[int, ...],
             chips: int = 1) -> np.ndarray:
    """Seconds of a call with each size of tree, if the chip did nothing but its bound.

    Args:
      weights: bytes read per call, those of committed keys and values among them; or what gives them for a number of tokens.
      parameters: numbers that take part in products.
      chips: among which all of it is evenly split.
    """
    def seconds(tokens: int) -> float:
        read = weights(tokens) if callable(weights) else weights
        return max(read / one.bandwidth, 2 * parameters * tokens / one.flops) / chips

    return np.array([seconds(batch * size) for size in sizes])


MORE = 4.0  # times the weights of plain decoding that the largest tree may read: few trees give more tokens than that


def budgets(devices: Any, batch: int, most: int = 64, read: Callable[[int], float] | None = None) -> tuple[int, ...]:
    """Sizes of tree worth compiling for: one node, which is plain decoding, and three powers of two up to what a call carries.

    Args:
      read: gives the bytes that a call on a number of tokens reads, where they are not always the same (`reads`).

    Example:
      >>> budgets(jax.devices("cpu"), 1)
      (1, 4, 8, 16)
    """
    device = next(iter(devices))
    known = chip(device.device_kind)
    # Rows of a product that a CPU takes in twice the time of one: see jaxlm.weight. Other accelerators count as small.
    room = (16 if device.platform == "cpu" else 128 if known is None else known.ridge) / batch
    largest = min(most, max(2, 2 ** int(math.log2(max(room, 2)))))
    while read is not None and largest > 2 and read(batch * largest) > MORE * read(batch):
        largest = 2 ** ((largest - 1).bit_length() - 1)
    return tuple(sorted({1, *(max(largest // part, 2) for part in (4, 2, 1))}))


@partial(jax.jit, static_argnames=("cfg", "slots", "dtype"))
def _half_full(cfg: Any, params: PyTree, batch: Int[Array, "B"], slots: int, dtype: Any) -> caching.Cache:
    memory = None
    if isinstance(cfg, config.EncoderDecoder):
        hidden = jnp.zeros((batch.shape[0], slots // 2, cfg.source), dtype or params["decoder"]["embedding"]["tokens"].dtype)
        memory = model.remember(params, cfg, caching.Memory(hidden, None, jnp.ones(hidden.shape[:2], jnp.int32)))
    out = model.forward(params, cfg, jnp.zeros((batch.shape[0], 1), jnp.int32), logits=False, dtype=dtype, memory=memory)
    return caching.filled(out.kv, slots, jnp.full_like(batch, slots // 2), memory)


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _call(cfg: Any, params: PyTree, tokens: Int[Array, "B P"], cache: caching.Cache,
          dtype: Any) -> tuple[Float[Array, "B P"], PyTree]:
    template = trees.chain(tokens.shape[1] - 1)
    tree = trees.plant(template, tokens)
    positions = cache.length[:, None] + jnp.asarray(template.depths)[None]
    out = model.forward(params, cfg, tokens, positions=positions, mask=tree.ancestors(), cache=cache, dtype=dtype)
    return jnp.max(out.logits, axis=-1), out.kv


def measure(target: Model, batch: int, sizes: tuple[int, ...], dtype: Any = None, slots: int = 512,
            turns: int = 5) -> tuple[float, ...]:
    """Seconds of a call of the target with each size of tree: the best of a few turns, on a cache (and a source) half full.

    The nodes carry random tokens, so that those of a mixture go to as many experts as `unread` says: equal ones would all go to
    the same. Measured once for a model, batch and sizes: see `Model.costs`.
    """
    key = (batch, sizes, str(dtype))
    if key not in target.costs:
        params, best = target.ready, [math.inf] * len(sizes)
        cfg = config.dropless(target.config)
        tokens = np.random.default_rng(0).integers(0, target.decoder.embedding.vocabulary, (batch, max(sizes)), np.int32)
        with target.context():
            cache = _half_full(cfg, params, jnp.zeros(batch, jnp.int32), min(slots, target.decoder.length), dtype)
            for turn in range(turns + 1):  # the first compiles
                for place, size in enumerate(sizes):
                    began = time.perf_counter()
                    jax.block_until_ready(_call(cfg, params, jnp.asarray(tokens[:, :size]), cache, dtype))
                    if turn:
                        best[place] = min(best[place], time.perf_counter() - began)
        target.costs[key] = tuple(best)
    return target.costs[key]

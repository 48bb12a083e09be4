"""The device's half of objectives that make pairs: a batch of packed sources and what is asked of each to a loss."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxlm import config, model
from jaxlm.objectives import text
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.objectives.routing import RoutingLoss
from jaxlm.objectives.routing import add as with_routing


def check(name: str, makes: str) -> None:
    """
    Args:
      name, makes: of an objective, see `jaxlm.objectives.Objective`.

    Raises:
      ValueError: when an encoder-decoder cannot take what it makes; says what it can.
    """
    if makes != "pair":
        raise ValueError(f"{name} makes texts for {makes}s, and this model is an encoder-decoder: it learns from pairs, as "
                         "SpanCorruption, PrefixLM and ul2 make them")


def shifted(targets: Int[Array, "B T"], segments: Int[Array, "B T"], start: int) -> Int[Array, "B T"]:
    """What the decoder reads where each of the targets is asked: the one before it, `start` at the beginning of a segment.

    Example:
      >>> shifted(jnp.array([[5, 6, 7, 8, 0]]), jnp.array([[1, 1, 2, 2, 0]]), 9).tolist()
      [[9, 5, 9, 7, 9]]
    """
    before, other = (jnp.pad(array, ((0, 0), (1, 0)))[:, :-1] for array in (targets, segments))
    return jnp.where(segments == other, before, start).at[:, 0].set(start)


def loss(params: PyTree, cfg: config.EncoderDecoder, batch: Mapping[str, Array], *, sizes: Int[np.ndarray, "V"] | None = None,
         piece: int = 256, smoothing: float = 0.0, z: float = 0.0, dtype: Any = None, remat: Any = None,
         routing: RoutingLoss | None = None) -> Loss:
    """The summed loss of a batch of pairs. Each text of the decoder begins with the last of the model's start tokens.

    Args:
      batch: as `jaxlm.data.stream.Batches` makes it: inputs and input_segments [B, N], targets, weights and segments [B, T].
      sizes, piece, smoothing, z, dtype, remat, routing: as `jaxlm.objectives.text.loss` takes them, as what is returned.
    """
    if dtype is not None:
        params = model.cast(params, cfg, dtype)
    memory = model.encode(params, cfg, batch["inputs"], segments=batch["input_segments"], dtype=dtype, remat=remat)
    tokens = shifted(batch["targets"], batch["segments"], cfg.start[-1])
    out = model.forward(params, cfg, tokens, segments=batch["segments"], memory=memory, logits=False, dtype=dtype, remat=remat)
    found = text.asked(params["decoder"], cfg.decoder, out.last, batch, sizes=sizes, piece=piece, smoothing=smoothing, z=z)
    return with_routing(found, {"encoder": memory.routing, "decoder": out.routing}, routing, params)

"""The device's half of objectives that make texts: a batch of packed examples to a loss."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import config, model
from jaxlm.layers import embed
from jaxlm.objectives.base import Objective
from jaxlm.objectives.cross_entropy import Loss, cross_entropy


def check(objective: Objective, cfg: config.Decoder) -> None:
    """Raises:
      ValueError: when the model cannot take what the objective makes, says which would; or when the objective needs tokens that
        its vocabulary does not have.
    """
    vocabulary = cfg.embedding.vocabulary
    causal = {block.attention.causal for block in cfg.stack.blocks()}
    name = type(objective).__name__
    if objective.makes == "pair":
        raise ValueError(f"{name} makes pairs, for encoder-decoders: AsText({name}(...)) is for this model")
    if objective.makes == "decoder" and causal != {True}:
        raise ValueError(f"{name} asks for the next token, and this model has attention that sees it: it needs "
                         "Attention.causal everywhere")
    if objective.makes == "encoder" and True in causal:
        raise ValueError(f"{name} asks for hidden tokens from both sides, and this model's attention is causal: it needs "
                         f"Attention(causal=False) everywhere, or AsPrefix({name}(...)) of a decoder")
    for token in objective.special:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name} needs the token {token}, and this model's vocabulary of {vocabulary} has 0 to "
                             f"{vocabulary - 1}")


def loss(params: PyTree, cfg: config.Decoder, batch: Mapping[str, Array], *, sizes: Int[np.ndarray, "V"] | None = None,
         prefixes: bool = False, piece: int = 256, smoothing: float = 0.0, z: float = 0.0, dtype: Any = None,
         remat: Any = None) -> Loss:
    """The summed loss of a batch of texts.

    Args:
      batch: as `jaxlm.data.stream.Batches` makes it: tokens, targets, weights and segments [B, T].
      sizes: UTF-8 bytes of every token, to count those that are asked: see `aux`.
      prefixes: whether examples may begin with a prefix that is seen from everywhere; the batch then says how long it is.
      piece, smoothing, z: as `cross_entropy` takes them.
      dtype: of the computation; default that of the weights.
      remat: see `jaxlm.stack.apply`.

    Returns:
      aux: as `cross_entropy`, and "bytes", those of the tokens asked.
    """
    if dtype is not None:
        params = model.cast(params, cfg, dtype)
    out = model.forward(params, cfg, batch["tokens"], segments=batch["segments"], prefix=batch["prefix"] if prefixes else None,
                        logits=False, dtype=dtype, remat=remat)
    tree = params["decoder"]

    def head(part: PyTree, x: Float[Array, "B n D"]) -> Float[Array, "B n V"]:
        return embed.logits(part.get("head", {}), part.get("tokens"), cfg.head, x)

    part = {"head": tree["head"]} if "head" in tree else {}
    if cfg.head.tied:
        part["tokens"] = tree["embedding"]["tokens"]
    found = cross_entropy(head, part, out.last, batch["targets"], batch["weights"], piece=piece, smoothing=smoothing, z=z)
    if sizes is None:
        return found
    asked = jnp.take(jnp.asarray(sizes, jnp.float32), batch["targets"], mode="clip") * batch["weights"]
    return found._replace(aux=found.aux | {"bytes": jnp.sum(asked)})

"""The device's half of objectives that make texts: a batch of packed examples to a loss."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import config, model
from jaxlm.layers import embed
from jaxlm.objectives.cross_entropy import Loss, cross_entropy
from jaxlm.objectives.routing import RoutingLoss
from jaxlm.objectives.routing import add as with_routing


def check(name: str, makes: str, labels: int | None, cfg: config.Decoder | config.Encoder) -> None:
    """
    Args:
      name, makes, labels: of an objective, see `jaxlm.objectives.Objective`.

    Raises:
      ValueError: when the model cannot take what it makes; says which would.
    """
    blocks = cfg.stack.blocks()
    causal = {block.attention.causal for block in blocks}
    if makes == "pair":
        how = f"AsText({name}(...)) is for this model" if isinstance(cfg, config.Decoder) else "this is an encoder alone"
        raise ValueError(f"{name} makes pairs, for encoder-decoders: {how}")
    if makes == "decoder" and causal != {True}:
        raise ValueError(f"{name} asks for the next token, and this model has attention that sees it: it needs "
                         "Attention.causal everywhere")
    if makes == "encoder" and causal == {True}:  # an encoder may have some causal layers left: `jaxlm.adapt.to_encoder`
        raise ValueError(f"{name} asks for hidden tokens from both sides, and this model's attention is causal: it needs "
                         f"Attention(causal=False) everywhere, or AsPrefix({name}(...)) of a decoder")
    if any(block.cross is not None for block in blocks):
        raise ValueError(f"{name} makes texts, and this decoder attends to a source: it is trained as an EncoderDecoder's")
    if labels is None and not isinstance(cfg.head, config.Head):
        raise ValueError(f"{name} asks for tokens, and this model's head gives none: it needs a jaxlm.config.Head, got "
                         f"{cfg.head}")
    # One logit is as good as two.
    fitting = isinstance(cfg.head, config.Classifier) and cfg.head.pooling is None and max(cfg.head.labels, 2) == labels
    if labels is not None and not fitting:
        raise ValueError(f"{name} asks for one of {labels} labels of every token: the model needs the head "
                         f"Classifier(labels={labels}, pooling=None), got {cfg.head}")


def loss(params: PyTree, cfg: config.Decoder | config.Encoder, batch: Mapping[str, Array], *,
         sizes: Int[np.ndarray, "V"] | None = None, prefixes: bool = False, piece: int = 256, smoothing: float = 0.0,
         z: float = 0.0, dtype: Any = None, remat: Any = None, routing: RoutingLoss | None = None) -> Loss:
    """The summed loss of a batch of texts.

    Args:
      batch: as `jaxlm.data.stream.Batches` makes it: tokens, targets, weights and segments [B, T]. Targets are labels where the
        head is a `jaxlm.config.Classifier` of tokens; of a single one 0 and 1 are, and its logit is that of 1.
      sizes: UTF-8 bytes of every token, to count those that are asked: see `aux`.
      prefixes: whether examples may begin with a prefix that is seen from everywhere; the batch then says how long it is.
      piece, smoothing, z: as `cross_entropy` takes them.
      dtype: of the computation; default that of the weights.
      remat: see `jaxlm.stack.apply`.
      routing: losses of the routers of mixtures of experts, beside.

    Returns:
      aux: as `cross_entropy`, and "bytes", those of the tokens asked, where tokens are asked; of routers as
        `jaxlm.objectives.routing.add` has it.
    """
    if dtype is not None:
        params = model.cast(params, cfg, dtype)
    out = model.forward(params, cfg, batch["tokens"], segments=batch["segments"], prefix=batch["prefix"] if prefixes else None,
                        logits=False, dtype=dtype, remat=remat)
    side = "decoder" if isinstance(cfg, config.Decoder) else "encoder"
    found = asked(params[side], cfg, out.last, batch, sizes=sizes, piece=piece, smoothing=smoothing, z=z)
    return with_routing(found, {side: out.routing}, routing, params)


def asked(tree: PyTree, cfg: config.Decoder | config.Encoder, last: Float[Array, "B T D"], batch: Mapping[str, Array], *,
          sizes: Int[np.ndarray, "V"] | None = None, piece: int = 256, smoothing: float = 0.0, z: float = 0.0) -> Loss:
    """The loss of what a batch asks, where a model has ended in `last`.

    Args:
      tree: the weights under "decoder" or "encoder".
      batch: its targets and weights count.
      sizes, piece, smoothing, z: as for `loss`, as what it returns.
    """
    def head(part: PyTree, x: Float[Array, "B n D"]) -> Float[Array, "B n V"]:
        if isinstance(cfg.head, config.Head):
            return embed.logits(part.get("head", {}), part.get("tokens"), cfg.head, x)
        logits = embed.classify(part["head"], cfg.head, x, None)
        return jnp.pad(logits, ((0, 0), (0, 0), (1, 0))) if cfg.head.labels == 1 else logits

    part = {"head": tree["head"]} if "head" in tree else {}
    if isinstance(cfg.head, config.Head) and cfg.head.tied:
        part["tokens"] = tree["embedding"]["tokens"]
    found = cross_entropy(head, part, last, batch["targets"], batch["weights"], piece=piece, smoothing=smoothing, z=z)
    if sizes is None or not isinstance(cfg.head, config.Head):
        return found
    size = jnp.take(jnp.asarray(sizes, jnp.float32), batch["targets"], mode="clip") * batch["weights"]
    return found._replace(aux=found.aux | {"bytes": jnp.sum(size)})

"""DupMAE: an encoder whose first token has to carry a text, so that a single layer can rebuild it, and whose other tokens have
to carry which words it has."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlm import block, config, model
from jaxlm.layers import embed, norm
from jaxlm.layers.mask import describe
from jaxlm.objectives import text
from jaxlm.objectives.base import Ids, Objective, Text
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.objectives.joint import together
from jaxlm.objectives.masked import MaskedLM
from jaxlm.params import Spec
from jaxlm.weight import take

UNSEEN = -1e30  # finite: what a word scores of which no token says anything


def words(tree: PyTree, cfg: config.Encoder, last: Float[Array, "B T D"], segments: Int[Array, "B T"],
          ordinary: Bool[Array, "B T"], count: int, piece: int = 256) -> Float[Array, "B n V"]:
    """Of every segment and word the most that any of its ordinary tokens says for it: logits, a piece of tokens at a time."""
    part = {name: tree[name] for name in ("head",) if name in tree} | {"tokens": tree["embedding"]["tokens"]}
    batch, length = segments.shape
    pieces = -(-length // piece)
    pad = pieces * -(-length // pieces) - length

    def split(y: Array) -> Array:
        y = jnp.pad(y, ((0, 0), (0, pad), *[(0, 0)] * (y.ndim - 2)))
        return jnp.moveaxis(y.reshape(batch, pieces, -1, *y.shape[2:]), 1, 0)

    @jax.checkpoint  # differentiated, the logits of a piece are made again: all of them are never kept
    def most(part: PyTree, x: Array, owner: Array) -> Array:
        scores = embed.logits(part.get("head", {}), part["tokens"], cfg.head, x)
        return jnp.stack([jnp.max(jnp.where((owner == i)[:, :, None], scores, UNSEEN), axis=1) for i in range(1, count + 1)],
                         axis=1)

    def step(best: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        return jnp.maximum(best, most(part, *given)), None

    first = jnp.full((batch, count, cfg.embedding.vocabulary), UNSEEN, jnp.float32)
    return jax.lax.scan(step, first, (split(last), split(jnp.where(ordinary, segments, 0))))[0]


def bag(scores: Float[Array, "B n V"], tokens: Int[Array, "B T"], segments: Int[Array, "B T"],
        ordinary: Bool[Array, "B T"]) -> Loss:
    """-log of the softmax over words, of every word that a segment has, each once and weighing 1 / ordinary tokens."""
    batch, count, size = scores.shape
    place = jnp.where(ordinary & (segments <= count), segments, 0)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    has = jnp.zeros((batch, count + 1, size), jnp.float32).at[rows, place, tokens].set(1.0)[:, 1:]
    many = jnp.zeros((batch, count + 1), jnp.float32).at[rows, place].add(1.0)[:, 1:]
    shares = jax.nn.log_softmax(scores, axis=-1)
    each = -jnp.sum(jnp.where(has > 0, shares, 0.0), axis=-1) / jnp.maximum(many, 1.0)
    return Loss(jnp.sum(each), jnp.sum(many > 0, dtype=jnp.float32), {})


@dataclasses.dataclass(frozen=True)
class DupMae(Objective):
    """A masked language model, and two decoders that only training has. From the vector of a text's first token one layer asks
    for every token of it, each seeing a share of the others that is drawn for it alone (RetroMAE's enhanced decoding); and from
    what the other tokens say by the masked-LM head, the most of each word, the words of the text.

    Attributes:
      masked: of the encoder; the paper's rate is 0.3.
      count: texts of a row whose words are asked, at most: what is beyond them in a row is left out of that loss.
      rate: share of the tokens that a token does not see in the decoder.
      factor: of the words' loss.

    Reference: Xiao et al. 2023, section 3, https://arxiv.org/abs/2305.02564; decoding as Xiao et al. 2022, section 3.3,
    https://arxiv.org/abs/2205.12035. Words weigh as in the released code; the first token alone is no ordinary one here.
    """

    makes: ClassVar[Literal["encoder"]] = "encoder"
    prefixes: ClassVar[bool] = True
    masked: MaskedLM
    count: int
    rate: float = 0.5
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or self.count < 1:
            raise ValueError(f"rate is between 0 and 1 and count at least 1, got {self.rate} and {self.count}")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As the masked language model."""
        return self.masked.special

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """The masked language model's: the targets are the document."""
        return self.masked.example(tokens, random)

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: for a model that is no encoder with a masked-LM head, or has an embedding of another width.
        """
        super().check(cfg)
        if not isinstance(cfg, config.Encoder) or not isinstance(cfg.head, config.Head):
            raise ValueError(f"DupMae trains an Encoder with a jaxlm.config.Head, got {type(cfg).__name__} with "
                             f"{getattr(cfg, 'head', None)}")
        if cfg.embedding.width is not None:
            raise ValueError("DupMae's decoder reads a text's vector among embeddings: Embedding.width must be None, got "
                             f"{cfg.embedding.width}")

    def _layer(self, cfg: config.Encoder) -> config.Block:
        """As the model's last, seeing everything."""
        last = cfg.stack.blocks()[-1]
        position = last.attention.position
        if isinstance(position, config.RelativeBias):
            position = dataclasses.replace(position, shared=False)
        return dataclasses.replace(last, attention=dataclasses.replace(last.attention, window=None, position=position))

    def extra(self, cfg: config.Encoder) -> Spec:
        """The decoder's layer under "decoder"."""
        tree = {"block": block.spec(self._layer(cfg), cfg.width)}
        return {"decoder": tree if cfg.norm is None else tree | {"norm": norm.spec(cfg.norm, cfg.width)}}

    def decoded(self, params: PyTree, cfg: config.Encoder, vector: Float[Array, "B T D"], tokens: Int[Array, "B T"],
                segments: Int[Array, "B T"], key: Key[Array, ""]) -> Float[Array, "B T D"]:
        """The decoder's state at every token: its queries are the text's vector at each place, its keys the vector (in the
        first place) and the tokens.

        Args:
          params: in the dtype of the computation.
          vector: at each token that of its text.
        """
        batch, length = tokens.shape
        layer = self._layer(cfg)
        places = describe((), batch, length, segments=segments).positions
        first = places == 0
        tree, dtype = params["encoder"]["embedding"], vector.dtype
        table = take(tree["tokens"], tokens, dtype)
        if cfg.embedding.scale is not None:
            table = table * jnp.asarray(cfg.embedding.scale, dtype)
        streams = [embed.apply(tree, cfg.embedding, None, y, places, dtype)
                   for y in (vector, jnp.where(first[:, :, None], vector, table))]
        # Both streams go through the layer as one text of twice the length, of which the second half is only looked at.
        seen = jax.random.bernoulli(key, 1 - self.rate, (batch, length, length)) & ~jnp.eye(length, dtype=bool)[None]
        seen = seen | first[:, None]
        sight = jnp.concatenate([jnp.zeros_like(seen), seen], axis=2)
        known = describe((layer.attention,), batch, 2 * length, positions=jnp.tile(places, (1, 2)),
                         segments=jnp.tile(segments, (1, 2)), mask=jnp.concatenate([sight, sight], axis=1))
        out, *_ = block.apply(params["extra"]["decoder"]["block"], layer, jnp.concatenate(streams, axis=1), known, None)
        out = out[:, :length]
        return out if cfg.norm is None else norm.apply(params["extra"]["decoder"]["norm"], cfg.norm, out)

    def loss(self, params: PyTree, cfg: config.Encoder, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree, *,
             dtype: Any = None, remat: Any = None, **_: Any) -> tuple[Loss, PyTree]:
        """The mean losses of hidden tokens, of all tokens but the first in the decoder, and, times `factor`, of words.

        Returns:
          aux: "masked", "decoder" and "words", the three means, the first two with "_nll" and "_correct" behind them as
            `jaxlm.objectives.cross_entropy` says. The weight is that of hidden tokens.
        """
        if dtype is not None:
            params = params | model.cast(params, cfg, dtype)
        segments, tokens, tree = batch["segments"], batch["targets"], params["encoder"]
        last = model.forward(params, cfg, batch["tokens"], segments=segments, logits=False, dtype=dtype, remat=remat).last
        masked = text.asked(tree, cfg, last, batch)
        places = describe((), *tokens.shape, segments=segments).positions
        starts = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] - jnp.maximum(places, 0)
        vector = jnp.take_along_axis(last, starts[:, :, None], axis=1)
        state = self.decoded(params, cfg, vector, tokens, segments, key)
        ordinary = places > 0
        rebuilt = text.asked(tree, cfg, state, {"targets": tokens, "weights": ordinary.astype(jnp.float32)})
        said = words(tree, cfg, last, segments, ordinary, self.count)
        return together({"masked": (1.0, masked), "decoder": (1.0, rebuilt),
                         "words": (self.factor, bag(said, tokens, segments, ordinary))}), carry

"""Whether two texts belong together, told by a decoder that reads one and looks at the other; the false ones are mined from the
batch, the likelier the more alike they are."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlm import config, model
from jaxlm.cache import Memory
from jaxlm.layers import embed
from jaxlm.objectives.base import Example, Ids, Objective
from jaxlm.objectives.contrastive import MASKED, Contrastive, pooled
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.objectives.pair import shifted
from jaxlm.params import Spec

HEAD = config.Classifier(labels=2, pooling=None)


def mined(scores: Float[Array, "P P"], asked: Bool[Array, "P"],
          key: Key[Array, ""]) -> tuple[Int[Array, "P"], Bool[Array, "P"]]:
    """For each of the pairs asked another one's key, drawn by the softmax of its scores, and whether there is one."""
    others = asked[None] & ~jnp.eye(len(asked), dtype=bool)
    chosen = jax.random.categorical(key, jnp.where(others, jax.lax.stop_gradient(scores), MASKED))
    return chosen.astype(jnp.int32), asked & jnp.any(others, axis=1)


def gathered(segments: Int[Array, "B S"], chosen: Int[Array, "B n"], asked: Bool[Array, "B n"],
             width: int) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
    """Rows that hold, one behind the other, a segment of any row of the batch for each segment of theirs.

    Args:
      chosen: row * n + segment - 1.
      asked: which of them are wanted. Those that do not fit into `width` any more are left out.

    Returns:
      Where each token is in the batch's rows laid end to end, and its segment in its new row, 0 for none.

    Example:
      >>> gathered(jnp.array([[1, 1, 2, 0]]), jnp.array([[1, 0]]), jnp.array([[True, True]]), 4)
      (Array([[2, 0, 1, 0]], dtype=int32), Array([[1, 2, 2, 0]], dtype=int32))
    """
    batch, length = segments.shape
    count = chosen.shape[1]
    member = segments[:, None] == jnp.arange(1, count + 1, dtype=segments.dtype)[None, :, None]
    starts = (jnp.argmax(member, axis=2) + length * jnp.arange(batch)[:, None]).reshape(-1).astype(jnp.int32)
    sizes = jnp.sum(member, axis=2, dtype=jnp.int32).reshape(-1)
    size = jnp.where(asked, sizes[chosen], 0)
    end = jnp.cumsum(size, axis=1)
    place = jnp.arange(width, dtype=jnp.int32)[None]
    owner = jnp.sum(place[:, :, None] >= end[:, None], axis=2, dtype=jnp.int32)
    inside = owner < count
    owner = jnp.minimum(owner, count - 1)

    def of(values: Int[Array, "B n"]) -> Int[Array, "B W"]:
        return jnp.take_along_axis(values, owner, axis=1)

    inside = inside & (of(end) <= width)
    index = of(starts[chosen]) + place - of(end - size)
    return jnp.where(inside, index, 0), jnp.where(inside, owner + 1, 0)


@dataclasses.dataclass(frozen=True)
class Matching(Objective):
    """Text-code matching: every pair, its targets with another pair's inputs, and its inputs with another's targets, each told
    to be a pair or not from the state in which the decoder would ask for the targets' last token.

    Where the targets end with a token for that, as pairs mostly do, all else has been read then; the paper reads it too.

    Attributes:
      contrastive: whose vectors and `count` say which others are mined; in a `Joint` the one that is learned there.
      start: token that the decoder's text begins with here; None is the model's own.
      pairs: makes the pairs; None where `Joint` has others that do.
      room: tokens of a row of mined pairs, as a multiple of the batch's; pairs that do not fit are left out.

    Reference: Wang et al. 2023, section 3.2, https://arxiv.org/abs/2305.07922; negatives as Li et al. 2021, section 3.2,
    https://arxiv.org/abs/2107.07651
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    contrastive: Contrastive
    start: int | None = None
    pairs: Objective | None = None
    room: float = 1.5

    def __post_init__(self) -> None:
        if self.contrastive.between is not None:
            raise ValueError("Matching mines its negatives: it takes pairs without further texts, Contrastive(negatives=0)")
        if self.pairs is not None and self.pairs.makes != "pair":
            raise ValueError(f"Matching needs pairs, {type(self.pairs).__name__} makes texts for {self.pairs.makes}s")
        if self.room < 1:
            raise ValueError(f"room is at least 1, got {self.room}")

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """As what makes the pairs."""
        return 0 if self.pairs is None else self.pairs.overlap

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As what makes the pairs, and the start."""
        return *(() if self.pairs is None else self.pairs.special), *(() if self.start is None else (self.start,))

    def example(self, tokens: Ids, random: np.random.Generator) -> Example:
        """As `pairs`.

        Raises:
          ValueError: where there is none.
        """
        if self.pairs is None:
            raise ValueError("Matching has no `pairs`: say what makes them, or put it into a Joint")
        return self.pairs.example(tokens, random)

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: for what is no encoder-decoder, and as `Contrastive`.
        """
        if not isinstance(cfg, config.EncoderDecoder):
            raise ValueError(f"Matching reads with an EncoderDecoder's decoder, this model is {type(cfg).__name__}")
        super().check(cfg)
        self.contrastive.check(cfg)

    def extra(self, cfg: config.EncoderDecoder) -> Spec:
        """The classifier of the decoder's states under "match", beside what `contrastive` has."""
        return {**self.contrastive.extra(cfg), "match": embed.head_spec(HEAD, cfg.decoder.embedding, cfg.decoder.width)}

    def loss(self, params: PyTree, cfg: config.EncoderDecoder, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree,
             *, dtype: Any = None, remat: Any = None, **_: Any) -> tuple[Loss, PyTree]:
        """The weight is the number of decisions: three of each pair, less those that had no other or no room.

        Returns:
          aux: "correct", decisions that are right; "mined", of the decisions those about mined ones.
        """
        count, cast = self.contrastive.count, params
        if dtype is not None:
            cast = model.cast(params, cfg, dtype)
        given = {"dtype": dtype, "remat": remat}
        sides = ((batch["inputs"], batch["input_segments"]), (batch["targets"], batch["segments"]))
        (inputs, ours), (targets, theirs) = (self.contrastive.vectors(params, cfg, *side, **given) for side in sides)
        asked = ours & theirs
        scores = (inputs @ targets.T) * self.contrastive.scale(params)
        memory = model.encode(cast, cfg, batch["inputs"], segments=batch["input_segments"], **given)

        def decide(tokens: Array, segments: Array, memory: Memory, label: int, asked: Bool[Array, "P"]) -> Loss:
            """The loss of the pairs that are in both rows."""
            start = cfg.start[-1] if self.start is None else self.start
            out = model.forward(cast, cfg, shifted(tokens, segments, start), segments=segments, memory=memory, logits=False,
                                **given)
            state, there = pooled(config.Pooling.LAST, out.last, segments, count)
            held = jnp.any(memory.segments[:, None] == jnp.arange(1, count + 1, dtype=jnp.int32)[None, :, None], axis=2)
            asked = asked.reshape(there.shape) & there & held
            shares = jax.nn.log_softmax(embed.classify(params["extra"]["match"], HEAD, state, there), axis=-1)
            right = asked & (shares[..., label] > shares[..., 1 - label])
            return Loss(-jnp.sum(jnp.where(asked, shares[..., label], 0.0)), jnp.sum(asked, dtype=jnp.float32),
                        {"correct": jnp.sum(right, dtype=jnp.float32)})

        def moved(array: Array, segments: Array, chosen: Array, wanted: Array) -> tuple[Array, Array]:
            """Tokens or vectors of other pairs, and their segments."""
            rows = len(segments)
            index, placed = gathered(segments, chosen.reshape(rows, count), wanted.reshape(rows, count),
                                     int(segments.shape[1] * self.room))
            return jnp.take(array.reshape(-1, *array.shape[2:]), index, axis=0, mode="clip"), placed

        first, second = jax.random.split(key)
        source, some = mined(scores.T, asked, first)
        hidden, placed = moved(memory.hidden, batch["input_segments"], source, some)
        target, more = mined(scores, asked, second)
        tokens, segments = moved(batch["targets"], batch["segments"], target, more)
        true = decide(batch["targets"], batch["segments"], memory, 1, asked)
        false = [decide(batch["targets"], batch["segments"], Memory(hidden, None, placed), 0, some),
                 decide(tokens, segments, memory, 0, more)]
        found = [true, *false]
        return Loss(sum(one.sum for one in found), sum(one.weight for one in found),
                    {"correct": sum(one.aux["correct"] for one in found), "mined": sum(one.weight for one in false)}), carry

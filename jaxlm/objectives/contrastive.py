"""Vectors of texts that belong together drawn near, those of others apart: InfoNCE over packed pairs.

A row holds several pairs; vectors are pooled segment by segment, so that nothing is padded. Under `jax.jit` a batch that is
split over devices is one batch: the negatives of a text are all other texts of it. There is no dropout here, so the same text
twice is no pair (as SimCSE has it): the pairs are the objective's, two corruptions of a text for example.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlm import config, model
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.layers import embed
from jaxlm.objectives.base import Example, Ids, Objective, Pair, check, without_edges
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.params import Param, Spec, zeros

MASKED = -1e30  # finite, as in `jaxlm.layers.attention`
LARGEST = 100.0  # scale of cosines: a learned one goes no further (Radford et al. 2021, section 2.5)
EXACT = jax.lax.Precision.HIGHEST


def pooled(cfg: config.Pooling, x: Float[Array, "B T D"], segments: Int[Array, "B T"],
           count: int) -> tuple[Float[Array, "B n D"], Bool[Array, "B n"]]:
    """A float32 vector of each of the segments 1 to `count` of every row, and which of them there are; the others' are zero.

    As `jaxlm.layers.embed.pool` does it to rows of one text.
    """
    member = segments[:, None] == jnp.arange(1, count + 1, dtype=segments.dtype)[None, :, None]
    present = jnp.any(member, axis=2)
    y = x.astype(jnp.float32)
    if cfg is config.Pooling.MAX:
        tops = [jnp.max(jnp.where(member[:, i, :, None], y, -jnp.inf), axis=1) for i in range(count)]
        return jnp.where(present[:, :, None], jnp.stack(tops, axis=1), 0.0), present
    weights = member.astype(jnp.float32)
    index = jnp.cumsum(weights, axis=2)
    match cfg:
        case config.Pooling.FIRST:
            weights = jnp.where(index == 1, weights, 0.0)
        case config.Pooling.LAST:
            weights = jnp.where(index == index[:, :, -1:], weights, 0.0)
        case config.Pooling.WEIGHTED_MEAN:
            weights = weights * index
    sums = jnp.einsum("BnT,BTD->BnD", weights, y, precision=EXACT)
    return sums / jnp.maximum(jnp.sum(weights, axis=2), 1.0)[:, :, None], present


def encoded(params: PyTree, cfg: config.Config, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], dtype: Any,
            remat: Any) -> Float[Array, "B T D"]:
    """What the model, or the encoder of an encoder-decoder, ends in."""
    side, tree = model.encoder(cfg, params) if isinstance(cfg, config.EncoderDecoder) else (cfg, params)
    if dtype is not None:
        tree = model.cast(tree, side, dtype)
    return model.forward(tree, side, tokens, segments=segments, logits=False, dtype=dtype, remat=remat).last


def info_nce(queries: Float[Array, "P W"], keys: Float[Array, "K W"], at: Int[Array, "P"], asked: Bool[Array, "P"],
             seen: Bool[Array, "P|1 K"], scale: Float[Array, ""] | float) -> Loss:
    """-log of the softmax's share, among the keys that each query sees, of the one that belongs to it, of the queries asked.

    Args:
      at: which key belongs to each query; it has to be seen.
      scale: of the products: 1 / temperature.

    Returns:
      aux: "correct", the queries whose own key is the nearest.

    Reference: van den Oord et al. 2018, equation 4, https://arxiv.org/abs/1807.03748
    """
    scores = jnp.where(seen, jnp.einsum("PW,KW->PK", queries, keys, precision=EXACT) * scale, MASKED)
    own = jnp.take_along_axis(scores, at[:, None], axis=1)[:, 0]
    nll = jnp.where(asked, jax.nn.logsumexp(scores, axis=1) - own, 0.0)
    correct = asked & (own >= jnp.max(scores, axis=1))
    return Loss(jnp.sum(nll), jnp.sum(asked, dtype=jnp.float32), {"correct": jnp.sum(correct, dtype=jnp.float32)})


def parts(tokens: Int[Array, "B T"], segments: Int[Array, "B T"], between: int, count: int,
          most: int) -> Int[Array, "B T"]:
    """Segments of their own for the texts that a token divides each segment into: (i - 1) * most + j, from 1, for the j-th of
    segment i; 0 for the token itself, for segments beyond `count` and for texts of one beyond `most`.

    Example:
      >>> parts(jnp.array([[5, 9, 6, 7, 9, 8, 5, 0]]), jnp.array([[1, 1, 1, 1, 1, 1, 2, 0]]), 9, 2, 2).tolist()
      [[1, 0, 2, 2, 0, 0, 3, 0]]
    """
    divides = (tokens == between).astype(jnp.int32)
    so_far = jnp.cumsum(divides, axis=1)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    place = so_far - jax.lax.cummax(jnp.where(starts, so_far - divides, 0), axis=1)
    kept = (divides == 0) & (segments > 0) & (segments <= count) & (place < most)
    return jnp.where(kept, (segments - 1) * most + place + 1, 0)


@dataclasses.dataclass(frozen=True)
class Texts(Objective):
    """Pairs from documents that are several texts with a separator between them: a query, what belongs to it, and any number
    of texts that do not, though they may look so.

    Each gets the tokens that a document begins and ends with.

    Attributes:
      between: token that stands between the texts of the targets.
      separator: between the texts of a document. The tokenizer has to keep it.
      edges: tokens that documents may begin and end with. None is those that the tokenizer puts there.
      tokenizer: the documents'.
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    between: int
    separator: str = "\t"
    edges: tuple[int, ...] | None = None
    tokenizer: Tokenizer | None = None

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """What is between texts and around documents."""
        return self.between, *(self.edges or ())

    def example(self, tokens: Ids, random: np.random.Generator) -> Pair:
        """
        Raises:
          ValueError: for a document of one text, or with an empty one; and without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("Texts reads the text of documents and was given no tokenizer")
        first, body, last = without_edges(check(tokens), self.edges or ())
        found = [self.tokenizer.encode(text, add_special=False, parse_special=False)
                 for text in self.tokenizer.decode(body).split(self.separator)]
        if len(found) < 2 or not all(found):
            raise ValueError(f"this document is not several texts with {self.separator!r} between them")
        query, *others = ([*first, *text, *last] for text in found)
        targets = others[0] + [token for text in others[1:] for token in (self.between, *text)]
        return Pair(np.array(query, np.int32), np.array(targets, np.int32))


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Keys from an encoder that follows the one that is trained, and those of earlier batches in a queue.

    Attributes:
      share: of the old encoder that a step (or a piece of a batch) keeps.
      queue: how many keys of earlier batches are negatives too, of each side.

    Reference: He et al. 2020, https://arxiv.org/abs/1911.05722; as in Li et al. 2021, https://arxiv.org/abs/2107.07651, which
    CodeT5+ follows, without its soft targets.
    """

    share: float = 0.995
    queue: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.queue < 1:
            raise ValueError(f"share is in [0, 1) and a queue holds at least 1, got {self.share} and {self.queue}")


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """InfoNCE of a pair's two texts, both read by the same encoder: every input against all targets and, with `symmetric`,
    every target against all inputs, as the mean of both.

    Of a batch that is taken in pieces the negatives are those of the piece.

    Attributes:
      count: pairs of a row, at most: what is beyond them in a row is left out.
      pairs: makes them; None where `Joint` has others that do.
      vector: what a text's vector is; None as the head of the model, which then is a `jaxlm.config.Vector`. With a width, the
        product's weights are of training alone.
      temperature: divides products of vectors; where it is learned, it begins there.
      learned: whether it is.
      negatives: how many further texts of a pair's targets are negatives (for all of the batch), see `Texts`.
      between: the token between them, needed with negatives.
      momentum: None without.
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    count: int
    pairs: Objective | None = None
    vector: config.Vector | None = None
    temperature: float = 0.05
    learned: bool = False
    symmetric: bool = True
    negatives: int = 0
    between: int | None = None
    momentum: Momentum | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.negatives < 0 or not self.temperature > 0:
            raise ValueError("count is at least 1, negatives at least 0 and temperature above 0, got "
                             f"{self.count}, {self.negatives} and {self.temperature}")
        if (self.between is None) != (self.negatives == 0):
            raise ValueError("`between` says what divides the targets, where and only where there are negatives, got "
                             f"{self.between} for {self.negatives}")
        if self.pairs is not None and self.pairs.makes != "pair":
            raise ValueError(f"Contrastive needs pairs, {type(self.pairs).__name__} makes texts for {self.pairs.makes}s")

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """As what makes the pairs."""
        return 0 if self.pairs is None else self.pairs.overlap

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As what makes the pairs, and the token between targets."""
        return *(() if self.pairs is None else self.pairs.special), *(() if self.between is None else (self.between,))

    def example(self, tokens: Ids, random: np.random.Generator) -> Example:
        """As `pairs`.

        Raises:
          ValueError: where there is none.
        """
        if self.pairs is None:
            raise ValueError("Contrastive has no `pairs`: say what makes them, or put it into a Joint")
        return self.pairs.example(tokens, random)

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: for a model without vectors, and as every objective.
        """
        super().check(cfg)
        self._vector(cfg)
        side = _side(cfg)
        if any(block.cross is not None for block in side.stack.blocks()):
            raise ValueError("this decoder attends to a source: the vectors are those of an EncoderDecoder's encoder")

    def _vector(self, cfg: config.Config) -> config.Vector:
        own = getattr(cfg, "head", None)
        if self.vector is None and not isinstance(own, config.Vector):
            raise ValueError("Contrastive.vector, a jaxlm.config.Vector, says what vectors are where the model's head does "
                             f"not, got the head {own}")
        return self.vector or own

    def extra(self, cfg: config.Config) -> Spec:
        """The vector's product under "vector", where it has one that is not the model's; the logarithm of a learned scale."""
        tree: dict[str, Any] = {}
        if self.vector is not None and self.vector.width is not None:
            tree["vector"] = embed.head_spec(self.vector, _side(cfg).embedding, _side(cfg).width)
        if self.learned:
            begin = -math.log(self.temperature)
            tree["scale"] = Param((), (), lambda param, key, dtype: jnp.full((), begin, dtype))
        return tree

    def carry(self, cfg: config.Config) -> PyTree:
        """The encoder that follows, under the paths of the one that is trained, and "queue": of each side vectors, the newest
        first; a place without one is zero."""
        if self.momentum is None:
            return {}
        known, extra = model.spec(cfg), self.extra(cfg)
        tree: dict[str, Any] = dict(known)
        if isinstance(cfg, config.EncoderDecoder):
            tree = {"encoder": known["encoder"]}
            if cfg.shared:
                tree["decoder"] = {"embedding": {"tokens": known["decoder"]["embedding"]["tokens"]}}
        if "vector" in extra:
            tree["extra"] = {"vector": extra["vector"]}
        width = self._vector(cfg).width or _side(cfg).width
        return tree | {"queue": dict.fromkeys(("inputs", "targets"), Param((self.momentum.queue, width), (None, None), zeros))}

    def vectors(self, params: PyTree, cfg: config.Config, tokens: Int[Array, "B T"], segments: Int[Array, "B T"],
                count: int | None = None, *, dtype: Any = None,
                remat: Any = None) -> tuple[Float[Array, "P W"], Bool[Array, "P"]]:
        """Of segments 1 to `count` of every row, row after row, and which of them there are; P is B * count."""
        count = count or self.count
        vector = self._vector(cfg)
        x, present = pooled(vector.pooling, encoded(params, cfg, tokens, segments, dtype, remat), segments, count)
        head = params["encoder"].get("head", {}) if self.vector is None else params.get("extra", {}).get("vector", {})
        # Each a text of one token; the length of a vector of zeros has no gradient.
        alone = jnp.where(present[:, :, None], x, 1.0).reshape(-1, 1, x.shape[-1])
        return embed.vector(head, vector, alone, jnp.ones(alone.shape[:2], bool)), present.reshape(-1)

    def scale(self, params: PyTree) -> Float[Array, ""] | float:
        """Of products: 1 / temperature."""
        return jnp.minimum(jnp.exp(params["extra"]["scale"]), LARGEST) if self.learned else 1 / self.temperature

    def loss(self, params: PyTree, cfg: config.Config, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree, *,
             dtype: Any = None, remat: Any = None, **_: Any) -> tuple[Loss, PyTree]:
        """The weight is the number of pairs.

        Returns:
          aux: "correct", as `info_nce`, of both ways the mean.
        """
        texts = 1 + self.negatives
        divided = batch["segments"]
        if self.between is not None:
            divided = parts(batch["targets"], divided, self.between, self.count, texts)

        def both(weights: PyTree) -> list[tuple[Array, Array]]:
            given = ("inputs", batch["input_segments"], self.count), ("targets", divided, self.count * texts)
            return [self.vectors(weights, cfg, batch[name], segments, count, dtype=dtype, remat=remat)
                    for name, segments, count in given]

        (inputs, given), (targets, present) = both(params)
        keys, queue = {"inputs": inputs, "targets": targets}, {}
        own = jnp.arange(len(inputs), dtype=jnp.int32)
        asked = given & present[::texts]
        there = {"inputs": asked, "targets": present & jnp.repeat(asked, texts)}
        if self.momentum is not None:
            queue = {name: jax.lax.stop_gradient(rows) for name, rows in carry["queue"].items()}
            slow = _follow({name: part for name, part in carry.items() if name != "queue"}, params, self.momentum.share)
            (keys["inputs"], _), (keys["targets"], _) = jax.lax.stop_gradient(both(slow))
            carry = slow | {"queue": {name: _pushed(queue[name], keys[name], there[name]) for name in queue}}

        def way(queries: Array, name: str, at: Array) -> Loss:
            all_keys, seen = keys[name], there[name]
            if queue:
                all_keys = jnp.concatenate([all_keys, queue[name]])
                seen = jnp.concatenate([seen, jnp.any(queue[name] != 0, axis=1)])
            return info_nce(queries, all_keys, at, asked, seen[None], self.scale(params))

        ways = [way(inputs, "targets", own * texts)]
        if self.symmetric:
            ways.append(way(targets[::texts], "inputs", own))
        return Loss(sum(one.sum for one in ways) / len(ways), ways[0].weight,
                    {"correct": sum(one.aux["correct"] for one in ways) / len(ways)}), carry


def _side(cfg: config.Config) -> config.Decoder | config.Encoder:
    return cfg.encoder if isinstance(cfg, config.EncoderDecoder) else cfg


def _follow(slow: PyTree, params: PyTree, share: float) -> PyTree:
    """The mean of the weights that are kept and those, of the same paths, that are trained."""
    if isinstance(slow, Mapping):
        return {name: _follow(part, params[name], share) for name, part in slow.items()}
    return jax.lax.stop_gradient(share * slow + (1 - share) * params.astype(slow.dtype))


def _pushed(queue: Float[Array, "Q W"], rows: Float[Array, "K W"], there: Bool[Array, "K"]) -> Float[Array, "Q W"]:
    """The queue with new rows before the old ones, as many as it holds; none of them is empty while there are others behind."""
    whole = jnp.concatenate([jnp.where(there[:, None], rows, 0.0), queue])
    empty = ~jnp.any(whole != 0, axis=1)
    return whole[jnp.argsort(empty, stable=True)[:len(queue)]]

"""What an objective is: a function from a document to an example, and what examples look like.

Most share a loss, that of predicted tokens, and differ in what they show and what they ask; one may have a loss of its own,
with weights that only training has and with what it hands on from step to step.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlm import config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.objectives import pair as pairs
from jaxlm.objectives import text
from jaxlm.objectives.cross_entropy import Loss
from jaxlm.objectives.routing import RoutingLoss
from jaxlm.params import Spec

Ids = Int[np.ndarray, " n"]


class Text(NamedTuple):
    """An example for a single stack: each of n tokens is read, and something is asked there.

    Attributes:
      tokens: int32 [n], read.
      targets: int32 [n], asked: the next token for decoders, the token itself (or a label) for encoders.
      weights: float32 [n], of each in the loss; 0 where nothing is asked.
      prefix: how many tokens from the start every token of the document may see, later ones only earlier ones; 0 is causal.
    """

    tokens: Ids
    targets: Ids
    weights: Float[np.ndarray, " n"]
    prefix: int = 0


class Pair(NamedTuple):
    """An example for an encoder-decoder.

    Attributes:
      inputs: int32 [n], read by the encoder.
      targets: int32 [m], asked of the decoder.
    """

    inputs: Ids
    targets: Ids


Example = Text | Pair


class Objective:
    """The base of all objectives; subclasses are frozen dataclasses.

    One with a loss of its own overrides `loss`, and `extra` and `carry` where it needs them. Whatever a recipe has its model
    learn has one loss: all with one of their own are equal.

    Attributes:
      makes: what its examples are for: "decoder" or "encoder" (`Text`), or "pair" (`Pair`; `AsText` makes texts of them).
      overlap: tokens that the next piece of a document that is cut shares with the last, so that none is never asked.
      prefixes: whether an example may have a prefix; where none has, models need not look for any.
      special: ids that it puts into examples, or looks for in documents.
      labels: how many there are, where targets are labels of tokens; None where they are tokens.
    """

    makes: ClassVar[Literal["decoder", "encoder", "pair"]]
    overlap: ClassVar[int] = 0
    prefixes: ClassVar[bool] = False
    special: ClassVar[tuple[int, ...]] = ()
    labels: ClassVar[int | None] = None

    def example(self, tokens: Ids, random: np.random.Generator) -> Example:
        """An example of a document of at least two tokens.

        Raises:
          ValueError: for a document that is too short.
        """
        raise NotImplementedError

    @property
    def own(self) -> "Objective | None":
        """The objective with a loss of its own that this one's examples are for; None where they are for every one's."""
        return None if type(self).loss is Objective.loss else self

    def check(self, cfg: config.Config) -> None:
        """
        Raises:
          ValueError: when the model cannot take what this makes, says which would; or when it needs tokens that the model's
            vocabulary does not have.
        """
        name = type(self).__name__
        if self.own is None and isinstance(cfg, config.EncoderDecoder):
            pairs.check(name, self.makes)
        elif self.own is None:
            text.check(name, self.makes, self.labels, cfg)
        sides = (cfg.encoder, cfg.decoder) if isinstance(cfg, config.EncoderDecoder) else (cfg,)
        vocabulary = min(side.embedding.vocabulary for side in sides)
        for token in self.special:
            if not 0 <= token < vocabulary:
                raise ValueError(f"{name} needs the token {token}, and this model's vocabulary of {vocabulary} has 0 to "
                                 f"{vocabulary - 1}")

    def extra(self, cfg: config.Config) -> Spec:
        """Weights beside the model's that only training has; they are under "extra" in the weights that `loss` is given."""
        return {}

    def carry(self, cfg: config.Config) -> PyTree:
        """Params of what the loss hands on from step to step, without gradients: a queue, a momentum encoder. One with the path
        and the shape of a weight begins as that weight does."""
        return ()

    def loss(self, params: PyTree, cfg: config.Config, batch: Mapping[str, Array], key: Key[Array, ""], carry: PyTree, *,
             sizes: Int[np.ndarray, " V"] | None = None, prefixes: bool = False, smoothing: float = 0.0, z: float = 0.0,
             dtype: Any = None, remat: Any = None, routing: RoutingLoss | None = None) -> tuple[Loss, PyTree]:
        """The summed loss of a batch, and what the next one is given as `carry`.

        Args:
          batch: as `jaxlm.data.stream.Batches` makes it.
          key: for whatever is drawn: of a step and, of a batch that is taken in pieces, of the piece.
          sizes, prefixes, smoothing, z, dtype, remat: as `jaxlm.objectives.text.loss` takes them.
          routing: as that takes it too; only to be given where this method is not overridden.
        """
        given = {"sizes": sizes, "smoothing": smoothing, "z": z, "dtype": dtype, "remat": remat, "routing": routing}
        if isinstance(cfg, config.EncoderDecoder):
            return pairs.loss(params, cfg, batch, **given), carry
        return text.loss(params, cfg, batch, prefixes=prefixes, **given), carry


def check(tokens: Ids, least: int = 2) -> Ids:
    """The document as int32.

    Raises:
      ValueError: for one with fewer tokens than `least`, or that is not one row of ids.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"a document is one row of token ids, got shape {tokens.shape} of {tokens.dtype}")
    if len(tokens) < least:
        raise ValueError(f"this objective needs documents of at least {least} tokens, got one of {len(tokens)}")
    return tokens.astype(np.int32)


def without_edges(tokens: Ids, edges: Collection[int]) -> tuple[Ids, Ids, Ids]:
    """(beginning, document, end): the tokens of `edges` that a document begins and ends with, and what is between them."""
    own = np.flatnonzero(~np.isin(tokens, edges))
    begin, end = (own[0], own[-1] + 1) if len(own) else (len(tokens), len(tokens))
    return tokens[:begin], tokens[begin:end], tokens[end:]


def told(objective: Objective, edges: tuple[int, ...], tokenizer: Tokenizer | None = None) -> Objective:
    """The objective, with those that it is made of, told which tokens documents begin and end with, and whose tokens they are.

    These are the dataclass fields called `edges` and `never`, and `tokenizer`, where they are None.
    """
    if not dataclasses.is_dataclass(objective):
        return objective
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if field.name in ("edges", "never") and value is None:
            changes[field.name] = edges
        elif field.name == "tokenizer" and value is None:
            changes[field.name] = tokenizer
        elif isinstance(value, Objective):
            changes[field.name] = told(value, edges, tokenizer)
        elif isinstance(value, tuple) and value and all(isinstance(one, Objective) for one in value):
            changes[field.name] = tuple(told(one, edges, tokenizer) for one in value)
    return dataclasses.replace(objective, **changes)


def as_text(pair: Pair) -> Text:
    """A pair for a decoder-only model: the inputs as a prefix that all may see, then the targets, which alone are asked."""
    whole = np.concatenate([pair.inputs, pair.targets]).astype(np.int32)
    weights = np.ones(len(whole) - 1, np.float32)
    weights[:len(pair.inputs) - 1] = 0.0
    return Text(whole[:-1], whole[1:], weights, len(pair.inputs))


@dataclasses.dataclass(frozen=True)
class AsText(Objective):
    """An objective that makes pairs, for a decoder-only model: see `as_text`."""

    makes: ClassVar[Literal["decoder"]] = "decoder"
    prefixes: ClassVar[bool] = True
    objective: Objective

    def __post_init__(self) -> None:
        if self.objective.makes != "pair":
            raise ValueError(f"AsText is for objectives that make pairs, {type(self.objective).__name__} makes texts for "
                             f"{self.objective.makes}s")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As the objective."""
        return self.objective.special

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """The pair in one text."""
        made = self.objective.example(tokens, random)
        assert isinstance(made, Pair)
        return as_text(made)


@dataclasses.dataclass(frozen=True)
class AsPrefix(Objective):
    """An encoder's objective, for a decoder-only model: all of an example is a prefix, so that every token sees every other.

    As on encoders, what is asked at a token is the token itself.
    """

    makes: ClassVar[Literal["decoder"]] = "decoder"
    prefixes: ClassVar[bool] = True
    objective: Objective

    def __post_init__(self) -> None:
        if self.objective.makes != "encoder":
            raise ValueError(f"AsPrefix is for objectives of encoders, {type(self.objective).__name__} makes examples for "
                             f"{'encoder-decoder' if self.objective.makes == 'pair' else self.objective.makes}s")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """As the objective."""
        return self.objective.special

    @property
    def labels(self) -> int | None:  # type: ignore[override]
        """As the objective."""
        return self.objective.labels

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """The objective's example as a prefix."""
        made = self.objective.example(tokens, random)
        assert isinstance(made, Text)
        return made._replace(prefix=len(made.tokens))


@dataclasses.dataclass(frozen=True)
class Mode(Objective):
    """Another objective's examples with a token before them that says which it is.

    Attributes:
      token: put before the tokens read. In a `Text` nothing is asked of it but what follows.
    """

    token: int
    objective: Objective

    @property
    def makes(self) -> str:  # type: ignore[override]
        """As the objective."""
        return self.objective.makes

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """As the objective."""
        return self.objective.overlap

    @property
    def prefixes(self) -> bool:  # type: ignore[override]
        """As the objective."""
        return self.objective.prefixes

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """The objective's, and the mode's."""
        return self.token, *self.objective.special

    @property
    def labels(self) -> int | None:  # type: ignore[override]
        """As the objective."""
        return self.objective.labels

    @property
    def own(self) -> Objective | None:
        """As the objective."""
        return self.objective.own

    def example(self, tokens: Ids, random: np.random.Generator) -> Example:
        """The objective's example, marked."""
        made = self.objective.example(tokens, random)
        first = np.array([self.token], np.int32)
        if isinstance(made, Pair):
            return Pair(np.concatenate([first, made.inputs]), made.targets)
        ahead = made.tokens[:1] if self.makes == "decoder" else first
        return Text(np.concatenate([first, made.tokens]), np.concatenate([ahead, made.targets]),
                    np.concatenate([np.zeros(1, np.float32), made.weights]), made.prefix + 1 if made.prefix else 0)


def _same(objectives: Sequence[Objective]) -> str:
    """What all of them make.

    Raises:
      ValueError: for none, or when they make different things.
    """
    kinds = {objective.makes for objective in objectives}
    if len(kinds) != 1:
        raise ValueError(f"objectives of one model make examples of one kind, these make {', '.join(sorted(kinds)) or 'none'}")
    if len({objective.labels for objective in objectives}) > 1:
        raise ValueError("objectives of one model ask for tokens or for labels, all of them for as many, these for "
                         f"{', '.join(str(one.labels or 'tokens') for one in objectives)}")
    return kinds.pop()


def sharing(objectives: Sequence[Objective]) -> Objective | None:
    """The `own` that all of them have.

    Raises:
      ValueError: when they differ; names the first two.
    """
    for one in objectives:
        if one.own != objectives[0].own:
            names = [f"{type(o).__name__} has {'the common one' if o.own is None else f'that of {o.own}'}"
                     for o in (objectives[0], one)]
            raise ValueError(f"objectives of one model share one loss: {names[0]}, {names[1]}")
    return objectives[0].own


@dataclasses.dataclass(frozen=True)
class Mixture(Objective):
    """For every document one of several objectives.

    Attributes:
      shares: how often each is taken, in any unit.
    """

    objectives: tuple[Objective, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        _same(self.objectives)
        sharing(self.objectives)
        if len(self.shares) != len(self.objectives) or min(self.shares) < 0 or not sum(self.shares) > 0:
            raise ValueError(f"a mixture of {len(self.objectives)} objectives needs as many shares, none negative and not all "
                             f"0, got {self.shares}")

    @property
    def makes(self) -> str:  # type: ignore[override]
        """As its objectives."""
        return self.objectives[0].makes

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """The most that any of them needs."""
        return max(objective.overlap for objective in self.objectives)

    @property
    def prefixes(self) -> bool:  # type: ignore[override]
        """Whether any of them makes some."""
        return any(objective.prefixes for objective in self.objectives)

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those of all of them."""
        return tuple(token for objective in self.objectives for token in objective.special)

    @property
    def labels(self) -> int | None:  # type: ignore[override]
        """As its objectives."""
        return self.objectives[0].labels

    @property
    def own(self) -> Objective | None:
        """As its objectives."""
        return self.objectives[0].own

    def example(self, tokens: Ids, random: np.random.Generator) -> Example:
        """An example of the objective that is drawn."""
        shares = np.asarray(self.shares, np.float64)
        return self.objectives[int(random.choice(len(shares), p=shares / shares.sum()))].example(tokens, random)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Objectives one after another.

    Attributes:
      phases: (objective, steps); the last one's steps may be None: to the end.
    """

    phases: tuple[tuple[Objective, int | None], ...]

    def __post_init__(self) -> None:
        _same([objective for objective, _ in self.phases])
        sharing([objective for objective, _ in self.phases])
        *before, last = [steps for _, steps in self.phases]
        if any(steps is None or steps < 1 for steps in before) or (last is not None and last < 1):
            raise ValueError(f"every phase but the last has at least 1 step, got {[steps for _, steps in self.phases]}")

    def at(self, step: int) -> Objective:
        """The objective of a step, from 0; after the last phase its objective stays."""
        for objective, steps in self.phases:
            if steps is None or step < steps:
                return objective
            step -= steps
        return self.phases[-1][0]

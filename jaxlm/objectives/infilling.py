"""Infilling with causal decoders: what belongs in the middle is moved to the end, and the model learns to write it there."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from jaxlm.objectives.base import Ids, Objective, Text, check, without_edges
from jaxlm.objectives.causal import following
from jaxlm.objectives.spans import spans, split


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle(Objective):
    """A document cut in two places: prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM), each behind its token.

    Attributes:
      prefix, suffix, middle: the tokens before the parts.
      end: token behind the middle, None for none; a document's own at its end is that token.
      rate: share of documents that are cut; others are read as they are.
      spm: share of the cut ones that come with the suffix first: prefix token, suffix token, suffix, middle token, then prefix
        and middle in one piece.
      edges: other tokens that documents may begin or end with, like those of beginning and end: they stay around the
        whole. None is those that the tokenizer puts there.

    Reference: Bavarian et al. 2022, section 3, https://arxiv.org/abs/2207.14255. Departs from it: cuts lie between tokens.
    """

    makes: ClassVar[Literal["decoder"]] = "decoder"
    overlap: ClassVar[int] = 1
    prefix: int
    suffix: int
    middle: int
    end: int | None = None
    rate: float = 0.5
    spm: float = 0.5
    edges: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 0 <= self.spm <= 1:
            raise ValueError(f"rate and spm are shares, 0 to 1, got {self.rate} and {self.spm}")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """The tokens before and behind the parts, and around the document."""
        return self.prefix, self.suffix, self.middle, *self._edges

    @property
    def _edges(self) -> tuple[int, ...]:
        return (self.edges or ()) if self.end is None else (*(self.edges or ()), self.end)

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """Both cuts are drawn uniformly; parts may be empty."""
        tokens = check(tokens)
        if random.random() >= self.rate:
            return following(tokens)
        first, tokens, last = without_edges(tokens, self._edges)
        low, high = np.sort(random.integers(0, len(tokens) + 1, 2))
        head, body, tail = tokens[:low], tokens[low:high], tokens[high:]
        end = [] if self.end is None or self.end in last else [self.end]
        if random.random() < self.spm:
            parts = [first, [self.prefix, self.suffix], tail, [self.middle], head, body, end, last]
        else:
            parts = [first, [self.prefix], head, [self.suffix], tail, [self.middle], body, end, last]
        return following(np.concatenate(parts).astype(np.int32))


@dataclasses.dataclass(frozen=True)
class CausalSpans(Objective):
    """CodeGen2's mixture: a document as it is, or with spans moved behind it, each after its sentinel.

    Attributes:
      sentinels: as for `SpanCorruption`.
      separator: between the document and the spans.
      end: behind every span.
      corrupted: share of documents with spans.
      rate, mean: of them, as for `SpanCorruption`.
      edges: tokens that documents may begin or end with, like those of beginning and end: they stay there. None is those
        that the tokenizer puts there.

    Reference: Nijkamp et al. 2023, section 3.3, https://arxiv.org/abs/2305.02309
    """

    makes: ClassVar[Literal["decoder"]] = "decoder"
    overlap: ClassVar[int] = 1
    sentinels: tuple[int, ...]
    separator: int
    end: int
    corrupted: float = 0.5
    rate: float = 0.15
    mean: float = 3.0
    edges: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.corrupted <= 1 or not 0 < self.rate < 1 or self.mean < 1 or not self.sentinels:
            raise ValueError(f"corrupted and rate are shares, spans have at least 1 token on average and there is at least one "
                             f"sentinel, got {self}")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Sentinels, what is between and behind, and around the document."""
        return *self.sentinels, self.separator, self.end, *(self.edges or ())

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """All tokens are asked, those of the document too."""
        tokens = check(tokens)
        if random.random() >= self.corrupted:
            return following(tokens)
        first, tokens, last = without_edges(tokens, self.edges or ())
        mask = spans(len(check(tokens, 1)), self.rate, self.mean, len(self.sentinels), random)
        left, gone = split(tokens, mask, self.sentinels)
        starts = np.flatnonzero(np.isin(gone, self.sentinels))
        pieces = [[*piece, self.end] for piece in np.split(gone, starts[1:])]
        return following(np.concatenate([first, left, last, [self.separator], *pieces]).astype(np.int32))

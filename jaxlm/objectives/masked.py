"""Masked language model: a share of the tokens is hidden and asked for, all others are seen."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool

from jaxlm.objectives.base import Ids, Objective, Text, check


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedLM(Objective):
    """BERT's: of the chosen tokens most become the mask, some another token, some stay.

    Attributes:
      mask: the token that hides.
      vocabulary: other tokens are drawn from 0 to vocabulary - 1.
      rate: share of the tokens that is chosen: exactly, rounded, at least one. With `starts`, whole words are taken as long as
        they fit.
      hidden, replaced: shares of the chosen that become the mask and another token; the rest stays.
      never: ids that are not chosen, like those of beginning and end. None is those that the tokenizer puts there.
      starts: bool [V], tokens that begin a word: words are then chosen whole. None chooses tokens.

    Reference: Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805; rate 0.3 is MosaicBERT's.
    """

    makes: ClassVar[Literal["encoder"]] = "encoder"
    prefixes: ClassVar[bool] = True
    mask: int
    vocabulary: int
    rate: float = 0.15
    hidden: float = 0.8
    replaced: float = 0.1
    never: tuple[int, ...] | None = None
    starts: Bool[np.ndarray, " V"] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or min(self.hidden, self.replaced) < 0 or self.hidden + self.replaced > 1:
            raise ValueError(f"rate must be in (0, 1], hidden and replaced shares that sum to at most 1, got {self.rate}, "
                             f"{self.hidden} and {self.replaced}")
        if not 0 <= self.mask < self.vocabulary:
            raise ValueError(f"the mask must be a token of the vocabulary of {self.vocabulary}, got {self.mask}")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """The mask, the last of the tokens that are drawn, and those never chosen."""
        return self.mask, self.vocabulary - 1, *(self.never or ())

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """Everything is seen from everywhere."""
        tokens = check(tokens, 1)
        free = ~np.isin(tokens, self.never or ())
        if not free.any():
            raise ValueError("this document has no token that may be chosen")
        chosen = self._choose(tokens, free, random)
        shown, fate = tokens.copy(), random.random(len(chosen))
        shown[chosen[fate < self.hidden]] = self.mask
        other = chosen[(fate >= self.hidden) & (fate < self.hidden + self.replaced)]
        shown[other] = random.integers(0, self.vocabulary, len(other))
        weights = np.zeros(len(tokens), np.float32)
        weights[chosen] = 1.0
        return Text(shown, tokens, weights, len(tokens))

    def _choose(self, tokens: Ids, free: Bool[np.ndarray, " n"], random: np.random.Generator) -> Ids:
        """Places of the chosen tokens."""
        places = np.flatnonzero(free)
        count = max(1, round(self.rate * len(places)))
        if self.starts is None:
            return np.sort(random.permutation(places)[:count])
        # A word goes on until a token that begins one, or that is never chosen.
        begins = self.starts[tokens[places]] | (np.diff(places, prepend=-2) > 1)
        words = np.split(places, np.flatnonzero(begins)[1:])
        taken: list[np.ndarray] = []
        for word in (words[i] for i in random.permutation(len(words))):
            if len(word) <= count - sum(map(len, taken)) or not taken:
                taken.append(word)
        return np.sort(np.concatenate(taken))

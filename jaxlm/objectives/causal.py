"""The next token: of everything (causal language model) or of what comes after a prefix that all may see."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from jaxlm.objectives.base import Ids, Objective, Pair, Text, check


def following(tokens: Ids) -> Text:
    """Every token asked from those before it."""
    return Text(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32))


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Every token from those before it."""

    makes: ClassVar[Literal["decoder"]] = "decoder"
    overlap: ClassVar[int] = 1

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """Nothing is drawn."""
        return following(check(tokens))


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """The rest of a document from its beginning, cut at a place that is drawn uniformly.

    Attributes:
      least, most: share of the document that the beginning is of; at least one token is left on either side.

    Reference: Raffel et al. 2020, section 3.2.4, https://arxiv.org/abs/1910.10683
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most <= 1:
            raise ValueError(f"a prefix is a share of the document, 0 <= least <= most <= 1, got {self.least} and {self.most}")

    def example(self, tokens: Ids, random: np.random.Generator) -> Pair:
        """Beginning and rest."""
        tokens = check(tokens)
        low, high = (int(np.clip(round(share * len(tokens)), 1, len(tokens) - 1)) for share in (self.least, self.most))
        cut = int(random.integers(low, high + 1))
        return Pair(tokens[:cut], tokens[cut:])

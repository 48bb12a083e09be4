"""Span corruption: runs of tokens become one sentinel each, and the targets say what they were; and UL2's mixture of such."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool

from jaxlm.objectives.base import Ids, Mixture, Mode, Objective, Pair, check, without_edges
from jaxlm.objectives.causal import PrefixLM


def segment(total: int, parts: int, random: np.random.Generator) -> Ids:
    """Lengths of `parts` parts, each at least 1, that sum to `total`: every way is as likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def lengths(length: int, rate: float, mean: float, most: int) -> tuple[int, int]:
    """(tokens corrupted, spans) of a text of so many tokens: some of both kinds, at most `most` spans."""
    noise = int(np.clip(round(length * rate), 1, length - 1))
    spans = int(np.clip(round(noise / mean), 1, min(noise, length - noise, most)))
    return noise, spans


def spans(length: int, rate: float, mean: float, most: int, random: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Which tokens are corrupted: as many as `lengths` says, in as many spans, the text beginning with one that is not.

    A text of a single token is corrupted whole.
    """
    if length == 1:
        return np.ones(1, bool)
    noise, count = lengths(length, rate, mean, most)
    kept, lost = segment(length - noise, count, random), segment(noise, count, random)
    return np.repeat(np.tile([False, True], count), np.stack([kept, lost], axis=1).reshape(-1))


def split(tokens: Ids, mask: Bool[np.ndarray, " n"], sentinels: Sequence[int]) -> Pair:
    """The tokens with each masked run as one sentinel, and each sentinel with the run that it stands for."""
    runs = np.flatnonzero(np.diff(mask, prepend=False))
    inputs, targets, at = [], [], 0
    for begin, sentinel in zip(runs[::2], sentinels, strict=False):
        end = begin + int(np.argmin(np.append(mask[begin:], False)))
        inputs += [tokens[at:begin], [sentinel]]
        targets += [[sentinel], tokens[begin:end]]
        at = end
    return Pair(np.concatenate([*inputs, tokens[at:]]).astype(np.int32), np.concatenate([[], *targets]).astype(np.int32))


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's.

    Attributes:
      sentinels: tokens that stand for the first, second, ... span; there are never more spans than these.
      rate: share of tokens corrupted, rounded to whole tokens.
      mean: tokens per span.
      end: token at the end of inputs and targets; None for none. A document's own at its end is that of the inputs.
      edges: other tokens that documents may begin or end with, like those of beginning and end: they stay there, in the
        inputs. None is those that the tokenizer puts there.

    Reference: Raffel et al. 2020, section 3.1.4, https://arxiv.org/abs/1910.10683
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    sentinels: tuple[int, ...]
    rate: float = 0.15
    mean: float = 3.0
    end: int | None = None
    edges: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sentinels or len(set(self.sentinels)) < len(self.sentinels):
            raise ValueError(f"sentinels are different tokens, at least one, got {self.sentinels}")
        if not 0 < self.rate < 1 or self.mean < 1:
            raise ValueError(f"rate must be between 0 and 1 and spans have at least 1 token on average, got {self.rate} and "
                             f"{self.mean}")

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Sentinels, and what is around documents."""
        return *self.sentinels, *self._edges

    @property
    def _edges(self) -> tuple[int, ...]:
        return (self.edges or ()) if self.end is None else (*(self.edges or ()), self.end)

    def example(self, tokens: Ids, random: np.random.Generator) -> Pair:
        """What is left, and what is gone."""
        first, tokens, last = without_edges(check(tokens), self._edges)
        mask = spans(len(check(tokens, 1)), self.rate, self.mean, len(self.sentinels), random)
        inputs, targets = split(tokens, mask, self.sentinels)
        end = np.array([] if self.end is None else [self.end], np.int32)
        inputs = np.concatenate([first, inputs, last, end[:0] if self.end in last else end])
        return Pair(inputs, np.concatenate([targets, end]))


def ul2(sentinels: tuple[int, ...], regular: int | None, sequential: int | None, extreme: int | None,
        end: int | None = None, edges: tuple[int, ...] | None = None) -> Mixture:
    """UL2's seven denoisers in equal shares: two regular, the sequential one, four extreme.

    Args:
      regular, sequential, extreme: mode tokens of R, S and X, None for none.
      end, edges: as for `SpanCorruption`.

    Reference: Tay et al. 2022, section 3.1, https://arxiv.org/abs/2205.05131
    """
    def marked(token: int | None, objective: Objective) -> Objective:
        return objective if token is None else Mode(token, objective)

    def corrupted(token: int | None, mean: float, rate: float) -> Objective:
        return marked(token, SpanCorruption(sentinels, rate, mean, end, edges))

    denoisers = (corrupted(regular, 3, 0.15), corrupted(regular, 8, 0.15), marked(sequential, PrefixLM(0.5, 1.0)),
                 corrupted(extreme, 3, 0.5), corrupted(extreme, 8, 0.5), corrupted(extreme, 64, 0.15),
                 corrupted(extreme, 64, 0.5))
    return Mixture(denoisers, (1.0,) * len(denoisers))

"""Documents that are pairs already: a translation, a summary, a repaired program."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.objectives.base import Ids, Objective, Pair, check, without_edges


@dataclasses.dataclass(frozen=True)
class SourceTarget(Objective):
    """The target of a source; a document holds both, as `jaxlm.data.source.ParallelLines` makes it.

    Attributes:
      between: what stands between them; the tokenizer has to make one token of it.
      edges: tokens that documents begin and end with: inputs and targets end with them too. None is what the tokenizer puts
        there.
      tokenizer: the documents'; None is the recipe's.
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    between: str = "\x1e"
    edges: tuple[int, ...] | None = None
    tokenizer: Tokenizer | None = None

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those around documents."""
        return self.edges or ()

    def example(self, tokens: Ids, random: np.random.Generator) -> Pair:
        """
        Raises:
          ValueError: for a document without the token between, or that is cut before its end; without a tokenizer, or where
            that makes several tokens of what stands between.
        """
        first, body, last = without_edges(check(tokens), self.edges or ())
        if self.tokenizer is None:
            raise ValueError("SourceTarget needs the documents' tokenizer")
        between = self.tokenizer.encode(self.between, add_special=False, parse_special=False)
        if len(between) != 1:
            raise ValueError(f"the tokenizer makes {len(between)} tokens of {self.between!r}, which stands between source and "
                             "target: it needs to be one")
        places = np.flatnonzero(body == between[0])
        if len(places) != 1 or (self.edges and not len(last)):
            raise ValueError(f"a document is a source, {self.between!r}, a target and its end; this has {len(places)} of the "
                             f"second{'' if len(last) else ' and no end'}")
        source, target = body[:places[0]], body[places[0] + 1:]
        return Pair(np.concatenate([first, source, last]), np.concatenate([target, last]))

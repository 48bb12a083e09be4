"""CodeT5's objectives beside span corruption: what the names in code are, which tokens are of names, code for text and back.

They need the tokenizer: the documents are tokens, and the names are in their text.
"""

import bisect
import dataclasses
import functools
from collections.abc import Collection
from typing import ClassVar, Literal

import numpy as np

from jaxlm.data.identifiers import Spelling, functions, identifiers, in_bytes
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.objectives.base import Ids, Objective, Pair, Text, check, without_edges


def _given(objective: Objective, tokenizer: Tokenizer | None) -> Tokenizer:
    """Raises:
      ValueError: for none.
    """
    if tokenizer is None:
        raise ValueError(f"{type(objective).__name__} reads the text of documents and was given no tokenizer")
    return tokenizer


def _behind(tokens: Collection[int], end: int | None) -> list[int]:
    """The end, unless the tokens have it."""
    return [] if end is None or end in tokens else [end]


@dataclasses.dataclass(frozen=True)
class MaskedIdentifiers(Objective):
    """Masked identifier prediction: every name in the code becomes a sentinel, the same one wherever it stands, and the targets
    say what each stands for.

    Tokens that are not of names stay as they are; of one that is both, what is no name stays, in tokens of its own. Filled in,
    the inputs are the text that they were made from.

    Attributes:
      sentinels: tokens that stand for the first, second, ... name. Of more names than these as many are drawn, and the others
        stay.
      language: of the code, see `jaxlm.data.identifiers.LANGUAGES`.
      end: token at the end of inputs and targets; None for none. A document's own at its end is that of the inputs.
      edges: other tokens that documents may begin or end with, like those of beginning and end: they stay there, in the
        inputs. None is those that the tokenizer puts there.
      tokenizer: the documents'.

    Reference: Wang et al. 2021, section 3.2, https://arxiv.org/abs/2109.00859
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    sentinels: tuple[int, ...]
    language: str = "python"
    end: int | None = None
    edges: tuple[int, ...] | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if not self.sentinels or len(set(self.sentinels)) < len(self.sentinels):
            raise ValueError(f"sentinels are different tokens, at least one, got {self.sentinels}")
        identifiers("", self.language)  # which languages there are, and what they need

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Sentinels, and what is around documents."""
        return *self.sentinels, *self._edges

    @property
    def _edges(self) -> tuple[int, ...]:
        return (self.edges or ()) if self.end is None else (*(self.edges or ()), self.end)

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(_given(self, self.tokenizer))

    def example(self, tokens: Ids, random: np.random.Generator) -> Pair:
        """The code without names, and the names.

        Raises:
          ValueError: for a document without names, and without a tokenizer.
        """
        first, tokens, last = without_edges(check(tokens), self._edges)
        ids, pieces = tokens.tolist(), self._spelling.pieces(tokens.tolist())
        data, starts = b"".join(pieces), np.cumsum([0, *map(len, pieces)]).tolist()
        found = in_bytes(data, self.language)
        names = list(dict.fromkeys(one.name for one in found))
        if not names:
            raise ValueError(f"this document has no identifiers of {self.language}")
        if len(names) > len(self.sentinels):
            names = [names[i] for i in np.sort(random.permutation(len(names))[:len(self.sentinels)])]
        sentinel = dict(zip(names, self.sentinels, strict=False))

        def between(begin: int, end: int) -> list[int]:
            """Tokens of these bytes, the document's where they lie inside."""
            low, high = bisect.bisect_left(starts, begin), bisect.bisect_right(starts, end) - 1
            if low > high:
                return self._spelling.spell(data[begin:end])
            head, tail = data[begin:starts[low]], data[starts[high]:end]
            return [*self._spelling.spell(head), *ids[low:high], *self._spelling.spell(tail)]

        inputs, at = list(first), 0
        for begin, end, name in found:
            if name in sentinel:
                inputs += [*between(at, begin), sentinel[name]]
                at = end
        inputs += [*between(at, len(data)), *last, *_behind(last, self.end)]
        targets = [token for name, mask in sentinel.items() for token in (mask, *self._spelling.spell(name.encode()))]
        return Pair(np.array(inputs, np.int32), np.array([*targets, *_behind((), self.end)], np.int32))


@dataclasses.dataclass(frozen=True)
class IdentifierTagging(Objective):
    """Which tokens are of identifiers: targets are 1 at those and 0 at others, so that the model needs a head that tells
    `labels` classes of tokens apart.

    Attributes:
      language: of the code, see `jaxlm.data.identifiers.LANGUAGES`.
      never: ids that are not asked, like those of beginning and end. None is those that the tokenizer puts there.
      tokenizer: the documents'.

    Reference: Wang et al. 2021, section 3.2, https://arxiv.org/abs/2109.00859
    """

    makes: ClassVar[Literal["encoder"]] = "encoder"
    prefixes: ClassVar[bool] = True
    labels: ClassVar[int] = 2
    language: str = "python"
    never: tuple[int, ...] | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        identifiers("", self.language)  # which languages there are, and what they need

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those never asked."""
        return self.never or ()

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(_given(self, self.tokenizer))

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """Everything is seen from everywhere; a token with a single letter of a name is of it.

        Raises:
          ValueError: for a document of which nothing is asked, and without a tokenizer.
        """
        tokens = check(tokens, 1)
        asked = ~np.isin(tokens, self.never or ())
        if not asked.any():
            raise ValueError("this document has no token that may be asked")
        pieces = self._spelling.pieces(tokens.tolist())
        data, starts = b"".join(pieces), np.cumsum([0, *map(len, pieces)])
        letters = np.zeros(len(data) + 1, np.int32)  # of names, before each byte
        for begin, end, _ in in_bytes(data, self.language):
            letters[begin + 1:end + 1] = 1
        counts = np.cumsum(letters)[starts]
        return Text(tokens, (np.diff(counts) > 0).astype(np.int32), asked.astype(np.float32), len(tokens))


@dataclasses.dataclass(frozen=True)
class DualGeneration(Objective):
    """Bimodal dual generation: of a Python function with a docstring, the code from the docstring or the docstring from the
    code, each behind its token. Of a document with several one is drawn. The tokenizer has to keep lines and indentation.

    Attributes:
      code, text: tokens before code and before docstrings.
      share: of the examples that ask for code; the others ask for the docstring.
      otherwise: for documents without such a function, and pieces of one that are cut where they make no sense. None leaves
        them out.
      end, edges: as for `MaskedIdentifiers`.
      tokenizer: the documents'.

    Reference: Wang et al. 2021, section 3.2, https://arxiv.org/abs/2109.00859
    """

    makes: ClassVar[Literal["pair"]] = "pair"
    code: int
    text: int
    share: float = 0.5
    otherwise: Objective | None = None
    end: int | None = None
    edges: tuple[int, ...] | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if self.code == self.text or not 0 <= self.share <= 1:
            raise ValueError(f"code and text are different tokens and share is 0 to 1, got {self.code}, {self.text} and "
                             f"{self.share}")
        if self.otherwise is not None and self.otherwise.makes != "pair":
            raise ValueError(f"DualGeneration makes pairs, and {type(self.otherwise).__name__} makes texts for "
                             f"{self.otherwise.makes}s")

    @property
    def overlap(self) -> int:  # type: ignore[override]
        """As the other objective."""
        return 0 if self.otherwise is None else self.otherwise.overlap

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """The tokens before the parts, around documents, and those of the other objective."""
        return self.code, self.text, *self._edges, *(() if self.otherwise is None else self.otherwise.special)

    @property
    def _edges(self) -> tuple[int, ...]:
        return (self.edges or ()) if self.end is None else (*(self.edges or ()), self.end)

    def example(self, tokens: Ids, random: np.random.Generator) -> Pair:
        """Docstring and code, in either direction.

        Raises:
          ValueError: for a document without a function with a docstring, where there is no other objective; and without a
            tokenizer.
        """
        first, body, last = without_edges(check(tokens), self._edges)
        tokenizer = _given(self, self.tokenizer)
        found = functions(tokenizer.decode(body))
        if not found:
            if self.otherwise is None:
                raise ValueError("this document has no Python function with a docstring")
            made = self.otherwise.example(tokens, random)
            assert isinstance(made, Pair)
            return made
        one = found[int(random.integers(len(found)))]
        parts = [[mark, *tokenizer.encode(part, add_special=False, parse_special=False)]
                 for mark, part in ((self.text, one.docstring), (self.code, one.code))]
        given, asked = parts if random.random() < self.share else parts[::-1]
        return Pair(np.array([*first, *given, *last, *_behind(last, self.end)], np.int32),
                    np.array([*asked, *_behind((), self.end)], np.int32))

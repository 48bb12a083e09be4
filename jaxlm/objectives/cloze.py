"""Classification by a masked language model's own head: the answer is the token at a mask."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.objectives.base import Ids, Objective, Text, check, without_edges


@dataclasses.dataclass(frozen=True)
class Cloze(Objective):
    """Hides the one token that answers a prompt, and asks for it.

    Documents are a prompt and its answer, which is one token. A share of ordinary examples beside them is a mixture:
    `Mixture((Cloze(...), MaskedLM(...)), (0.8, 0.2))`.

    Attributes:
      mask: the token that hides.
      anchor: token before the answer, the last one in the document counts; None is for documents that end with the answer.
      answers: what may be one; documents with others are left out. None takes any token.
      edges: tokens that documents may begin and end with. None is those that the tokenizer puts there.

    Reference: Clavié et al. 2025, section 2, https://arxiv.org/abs/2502.03793
    """

    makes: ClassVar[Literal["encoder"]] = "encoder"
    prefixes: ClassVar[bool] = True
    mask: int
    anchor: int | None = None
    answers: tuple[int, ...] | None = None
    edges: tuple[int, ...] | None = None

    @property
    def special(self) -> tuple[int, ...]:  # type: ignore[override]
        """The mask, what is around documents, the anchor and the answers."""
        return (self.mask, *(self.edges or ()), *(() if self.anchor is None else (self.anchor,)), *(self.answers or ()))

    def example(self, tokens: Ids, random: np.random.Generator) -> Text:
        """Everything is seen from everywhere but the answer.

        Raises:
          ValueError: for a document without an answer, or with one that is none of `answers`.
        """
        tokens = check(tokens)
        first, body, _ = without_edges(tokens, self.edges or ())
        place = len(body) - 1
        if self.anchor is not None:
            anchors = np.flatnonzero(body == self.anchor)
            place = int(anchors[-1]) + 1 if len(anchors) else len(body)
        if not 0 <= place < len(body):
            behind = "" if self.anchor is None else f" behind the token {self.anchor}"
            raise ValueError(f"this document has no answer{behind}")
        answer = int(body[place])
        if self.answers is not None and answer not in self.answers:
            raise ValueError(f"this document's answer is the token {answer}, and answers are {self.answers}")
        shown, weights = tokens.copy(), np.zeros(len(tokens), np.float32)
        shown[len(first) + place], weights[len(first) + place] = self.mask, 1.0
        return Text(shown, tokens, weights, len(tokens))


def classify(logits: Float[Array, "... V"], labels: Sequence[int | Sequence[int]]) -> Float[Array, "... L"]:
    """Log-probabilities of labels, which sum to 1 over them, from logits at the mask.

    Args:
      labels: for each the token that means it, or several, whose probabilities add up.

    Example:
      >>> classify(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), [1, (0, 2)]).round(2).tolist()
      [-1.100000023841858, -0.4099999964237213]
    """
    logits = logits.astype(jnp.float32)
    means = [np.atleast_1d(np.asarray(label, np.int32)) for label in labels]
    scores = jnp.stack([jax.nn.logsumexp(logits[..., tokens], axis=-1) for tokens in means], axis=-1)
    return jax.nn.log_softmax(scores, axis=-1)

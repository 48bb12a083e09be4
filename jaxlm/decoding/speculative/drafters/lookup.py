"""Prompt lookup: what followed the last few tokens earlier in prompt or output, or in an encoder's source, is proposed again.

Reference: Saxena's prompt lookup decoding (2023). Departs from it: several continuations go into one tree, and a copy that
reaches the end of the text goes on with its own beginning.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, Source, Start, View
from jaxlm.decoding.speculative.tree import Tree

# How often a copied token is accepted where 1, 2, ... tokens before it agree, of the best match and of others: SmolLM2-135M
# on 30 questions of Spec-Bench. A source's begin with the same: they are higher where it is edited, lower where translated.
PRIORS = (0.12, 0.25, 0.46, 0.61, 0.68, 0.72, 0.75, 0.86), (0.05, 0.24, 0.45, 0.52, 0.68, 0.7, 0.77, 0.88)


@flax.struct.dataclass
class Match:
    """Where the text's end occurred before.

    Attributes:
      at: int32 [B, R], the occurrence's last position.
      length: int32 [B, R], tokens that agree, 0 for no occurrence.
    """

    at: Int[Array, "B R"]
    length: Int[Array, "B R"]


def occurrences(history: Int[Array, "B S"], length: Int[Array, "B"], longest: int, count: int, begin: int = 0) -> Match:
    """The `count` earlier positions whose last tokens agree with the row's longest, the latest first among equals.

    Args:
      length: position of the last token.
      longest: how many tokens are compared.
      begin: position of the text's first token. A source may stand before it, with ids of -1 where it has none; no match goes
        across, and of equals the source's come first, those nearest to the text's own place before others: copies keep up.
    """
    slots = history.shape[1]
    index = jnp.arange(slots, dtype=jnp.int32)[None]
    place = jnp.where(index < begin, index, index - begin)  # in its own text
    agree, runs = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
    for back in range(longest):
        last = jnp.take_along_axis(history, jnp.maximum(length - back, 0)[:, None], axis=1)
        shifted = jnp.roll(history, back, axis=1)
        agree = agree & (shifted == last) & (place >= back) & (length[:, None] - begin >= back)
        runs = runs + agree.astype(jnp.int32)
    order = jnp.where(index < begin, 2 * slots - jnp.abs(place - (length[:, None] - begin)), place)
    rank = jnp.where((index < length[:, None]) & (runs > 0), 2 * runs * slots + order, -1)
    best, at = jax.lax.top_k(rank, count)
    return Match(jnp.where(best >= 0, at, 0), jnp.where(best >= 0, jnp.take_along_axis(runs, at, axis=1), 0))


@flax.struct.dataclass
class Lookup(Drafter):
    """Proposes the continuations of the longest earlier matches, in the text and in the source before it.

    A source whose ids are another vocabulary's is not searched.

    Attributes:
      length: tokens that a continuation has at most, D.
      count: continuations looked for; those that agree share nodes.
      longest, shortest: tokens of a match that are compared, and that must agree.
      nodes: of the tree, the root among them; the continuation of the longest match comes first.
    """

    length: int = flax.struct.field(pytree_node=False, default=12)
    count: int = flax.struct.field(pytree_node=False, default=4)
    longest: int = flax.struct.field(pytree_node=False, default=8)
    shortest: int = flax.struct.field(pytree_node=False, default=1)
    nodes: int = flax.struct.field(pytree_node=False, default=16)

    def __post_init__(self) -> None:
        if self.length < 1 or self.count < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError(f"lookup needs a length and a count of at least 1 and 1 <= shortest <= longest, got {self}")
        if not 2 <= self.nodes <= 1 + self.count * self.length:
            raise ValueError(f"{self.count} continuations of {self.length} tokens make trees of 2 to "
                             f"{1 + self.count * self.length} nodes, got {self.nodes}")

    @property
    def offered(self) -> int:
        """The continuations' tokens, before any are merged, and the root."""
        return 1 + self.count * self.depth

    @property
    def depth(self) -> int:
        """The length of a continuation."""
        return min(self.length, self.nodes - 1)

    @property
    def classes(self) -> int:
        """Of nodes: by how many tokens agree up to the parent, whether the match is the best one, and whether it is the
        source's."""
        return 4 * self.longest

    @property
    def priors(self) -> tuple[float, ...]:
        """Acceptance of each class before any was seen."""
        agreed = np.minimum(np.arange(self.longest), len(PRIORS[0]) - 1)
        return 2 * tuple(np.asarray(PRIORS)[:, agreed].reshape(-1).tolist())

    def init(self, start: Start, kept: PyTree | None) -> Source | None:
        """The source that is searched."""
        return start.searchable()

    def candidates(self, state: Source | None, view: View) -> Tree:
        """All continuations, chain after chain, not merged."""
        history, begin = view.history, 0
        if state is not None:
            history = jnp.concatenate([jnp.where(state.valid(), state.tokens, -1), history], axis=1)
            begin = state.tokens.shape[1]
        last = view.length + begin
        found = occurrences(history, last, self.longest, self.count, begin)
        step = jnp.arange(self.depth, dtype=jnp.int32)[None, None]
        period = jnp.maximum(last[:, None] - found.at, 1)[..., None]
        copied = found.at[..., None] + 1 + step % period
        batch, read = history.shape[0], (found.at < begin)[..., None]
        tokens = jnp.take_along_axis(history, copied.reshape(batch, -1), axis=1)
        within = ((found.length >= self.shortest)[..., None] & (~read | (copied < begin))).reshape(batch, -1)
        valid, tokens = within & (tokens >= 0), jnp.maximum(tokens, 0)
        agreed = jnp.minimum(found.length[..., None] + step, self.longest) - 1
        kinds = agreed + jnp.where(jnp.arange(self.count) == 0, 0, self.longest)[None, :, None]
        kinds = kinds + jnp.where(read, 2 * self.longest, 0)
        template = trees.Template((-1, *(0 if node % self.depth == 0 else node for node in range(self.count * self.depth))))
        tokens = jnp.concatenate([view.state.last[:, None], tokens], axis=1)
        valid = jnp.concatenate([jnp.ones((batch, 1), bool), valid], axis=1)
        kinds = jnp.concatenate([jnp.full((batch, 1), -1, jnp.int32), kinds.reshape(batch, -1)], axis=1)
        return trees.plant(template, tokens, valid, kinds=kinds[..., None])

    def propose(self, state: Source | None, view: View) -> tuple[Tree, Source | None]:
        """The continuations as one tree."""
        tree = trees.merge(self.candidates(state, view))
        # Longer agreement first, the best match before others, and each node before its children.
        shares = jnp.where(tree.kinds[..., 0] % (2 * self.longest) < self.longest, 0.9, 0.6)
        return trees.prune(tree, shares, self.nodes), state

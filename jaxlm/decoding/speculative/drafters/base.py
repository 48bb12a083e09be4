"""What a drafter is: three pure functions over a state of its own, `init`, `propose` and `observe`.

A drafter is a pytree whose arrays (weights) are traced and whose other fields are static, so it is an argument of the compiled
program and equal drafters share one. `digest` is the drafter's own summary of the target's logits, taken wherever the
target was run, prompt and tree alike: nothing as large as logits is kept.
"""

from typing import ClassVar, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm.cache import Memory
from jaxlm.decoding import loop
from jaxlm.decoding.speculative.tree import Tree
from jaxlm.decoding.speculative.verify import Walk


class Source(NamedTuple):
    """What an encoder is to read: tokens [B, S], junk from each row's length on."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, "B"]

    def valid(self) -> Bool[Array, "B S"]:
        """Where the source has tokens."""
        return jnp.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


@flax.struct.dataclass
class Start:
    """The prompt, when the target has read it.

    Attributes:
      tokens: int32 [B, T]; junk from `length` on.
      length: int32 [B].
      digest: what the drafter's `digest` made of the logits after every prompt token, [B, T, ...]; None unless it reads
        prompts.
      slots: S, how many tokens a row will have at most.
      vocabulary: V.
      source: what the target's encoder has read; None without one.
      memory: what it made of that: `Memory.hidden`.
      source_vocabulary: of the source's ids.
      prefix: int32 [B], how many of its first tokens all of the prompt has seen; None where it was read from left to right.
    """

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    digest: PyTree
    slots: int = flax.struct.field(pytree_node=False)
    vocabulary: int = flax.struct.field(pytree_node=False)
    source: Source | None = None
    memory: Memory | None = None
    source_vocabulary: int | None = flax.struct.field(pytree_node=False, default=None)
    prefix: Int[Array, "B"] | None = None

    def searchable(self) -> Source | None:
        """The source, where its ids are those of the text: where both vocabularies are of one size."""
        return self.source if self.source_vocabulary == self.vocabulary else None

    def valid(self) -> Bool[Array, "B T"]:
        """Where the prompt has tokens."""
        return jnp.arange(self.tokens.shape[1])[None] < self.length[:, None]

    def predicted(self) -> Bool[Array, "B T"]:
        """Where the logits are of a token that the model has not seen: not within a prefix but after its last token."""
        valid = self.valid()
        return valid if self.prefix is None else valid & (jnp.arange(self.tokens.shape[1])[None] >= self.prefix[:, None] - 1)


@flax.struct.dataclass
class View:
    """What a drafter sees when it proposes.

    Attributes:
      history: int32 [B, S], prompt and output; the last token stands at `length`, junk behind it.
      state: of the plain loop: `cache` (the target's; its length is the last token's position), `last`, `counts`, `done`.
      request: settings, keys.
      target: the target's weights.
    """

    history: Int[Array, "B S"]
    state: loop.State
    request: loop.Request
    target: PyTree

    @property
    def length(self) -> Int[Array, "B"]:
        """Position of every row's last token, the root."""
        return self.state.cache.length


@flax.struct.dataclass
class Seen:
    """What came of a proposal.

    Attributes:
      tree: the nodes that the target was run on.
      digest: [B, P, ...], the drafter's summary of the logits after each.
      walk: the nodes accepted and the tokens chosen.
      view: as a proposal would see it now.
    """

    tree: Tree
    digest: PyTree
    walk: Walk
    view: View

    def visited(self) -> Bool[Array, "B P"]:
        """The root and the accepted nodes, of rows that were not done before."""
        on = jnp.arange(self.walk.path.shape[1])[None] < self.walk.count[:, None]
        node = jnp.arange(self.tree.nodes)[None, None, :]
        return jnp.any((self.walk.path[:, :, None] == node) & on[:, :, None], axis=1)


class Drafter:
    """The base of all drafters; subclasses are `flax.struct.dataclass`es.

    Attributes:
      draws: how the children of a node are drawn from `Tree.logits`: "fixed" (not drawn, or with the target's own noise: no
        `Tree.logits`), "independent" (with replacement) or "distinct" (without, in the order of the nodes).
      reads_prompt: whether `init` wants the digest of the prompt's logits.
      classes: how many classes the nodes of `candidates` fall into; 0 for drafters that cannot be part of a union.
      priors: how often a node of each class is accepted where its parent is, before any was seen.
    """

    draws: ClassVar[str] = "fixed"
    reads_prompt: bool = False
    classes: int = 0
    priors: tuple[float, ...] = ()

    @property
    def nodes(self) -> int:
        """P, the most nodes of a tree, the root among them."""
        raise NotImplementedError

    @property
    def offered(self) -> int:
        """Nodes of `candidates`, the root among them."""
        return self.nodes

    @property
    def depth(self) -> int:
        """D, the most edges of a path."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of tree that a call may verify, in nodes; the last is P. A drafter of several has `choose`."""
        return (self.nodes,)

    def init(self, start: Start, kept: PyTree | None) -> PyTree:
        """The state after a prompt. `kept` is what `keep` gave of an earlier request's, None for a cold start."""
        return ()

    def keep(self, state: PyTree) -> PyTree:
        """What of a state another request may begin with; nothing, unless a drafter says otherwise."""
        return ()

    def digest(self, logits: Float[Array, "B P V"]) -> PyTree:
        """What to remember of logits, [B, P, ...]."""
        return ()

    def propose(self, state: PyTree, view: View) -> tuple[Tree, PyTree]:
        """A tree of `nodes` nodes, whose first carries the last token."""
        raise NotImplementedError

    def candidates(self, state: PyTree, view: View) -> Tree:
        """More nodes than a tree has room for, with their classes as `kinds`, for a union to choose from."""
        raise NotImplementedError

    def choose(self, state: PyTree, tree: Tree, view: View) -> Int[Array, ""]:
        """Which of `sizes` to verify: the tree's first nodes are then taken."""
        raise NotImplementedError

    def observe(self, state: PyTree, seen: Seen) -> PyTree:
        """The state after a call of the target."""
        return state



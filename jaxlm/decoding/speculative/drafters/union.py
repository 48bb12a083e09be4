"""Several drafters in one tree, and the choice of its size at every step.

Every node that a drafter proposes belongs to one of its classes (the weight of a recycled token, how many tokens agree before
a copied one), and the acceptance of each class is counted as the text goes on, apart for nodes that several drafters propose.
The products of those rates along the paths rank all nodes, so a budget is spent where acceptance is likely, whoever proposed
it; and because the nodes are sorted, the first n are the best tree of n: a union of several sizes takes the one that is worth
most for what it costs.
"""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, Start, View
from jaxlm.decoding.speculative.tree import Tree

# An estimate starts as if `_PRIOR` nodes of its class had been seen, and forgets: a node counts half after about 700 calls.
_PRIOR, _KEEP = 16.0, 0.999
# What is left of the doubt in a node that another drafter proposes too is less by this share, before any was seen.
_AGREED = 0.2


class State(NamedTuple):
    """Of a union.

    Attributes:
      members: the drafters' states.
      tested: float32 [C], nodes of each class whose parent was accepted, older ones counting less. A member's classes come
        twice: for nodes that it alone proposes, and for those that a later member proposes too.
      accepted: float32 [C], those of them that were accepted.
    """

    members: tuple[PyTree, ...]
    tested: Float[Array, " C"]
    accepted: Float[Array, " C"]


@flax.struct.dataclass
class Union(Drafter):
    """One tree of the nodes that its members rank highest together.

    Attributes:
      members: drafters with `candidates`, `classes` and `priors`.
      budgets: sizes of tree in nodes, rising; the tree has the last.
      costs: float32 [sizes], time of a call of the target with each, in any unit; None with one size.

    Raises:
      ValueError: for members that cannot be part of a union, or budgets and costs that do not fit.
    """

    members: tuple[Drafter, ...]
    budgets: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(16,))
    costs: Float[Array, " n"] | None = None

    def __post_init__(self) -> None:
        single = [type(member).__name__ for member in self.members if isinstance(member, Drafter) and not member.classes]
        if single:
            raise ValueError(f"{single[0]} has no classes of candidates and cannot be part of a union")
        if list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1 or self.nodes < 2:
            raise ValueError(f"budgets are rising sizes of tree, the largest at least 2 nodes, got {self.budgets}")
        if (self.costs is None) != (len(self.budgets) == 1):
            raise ValueError(f"a union of {len(self.budgets)} sizes of tree needs as many costs, and one of a single size none")

    @property
    def nodes(self) -> int:
        """The largest budget."""
        return self.budgets[-1]

    @property
    def depth(self) -> int:
        """The members' largest."""
        return min(max(member.depth for member in self.members), self.nodes - 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The budgets."""
        return self.budgets

    @property
    def reads_prompt(self) -> bool:
        """Whether a member does."""
        return any(member.reads_prompt for member in self.members)

    def _class(self, kinds: Int[Array, "B P n"]) -> Int[Array, "B P"]:
        """The class of nodes that are in these classes of the members; -1 for none."""
        has = kinds >= 0
        first = jnp.argmax(has, axis=2).astype(jnp.int32)
        several = jnp.sum(has, axis=2, dtype=jnp.int32) > 1
        counts = np.array([member.classes for member in self.members], np.int32)
        starts = np.cumsum([0, *2 * counts[:-1]], dtype=np.int32)
        own = jnp.take_along_axis(kinds, first[..., None], axis=2)[..., 0]
        found = own + jnp.asarray(starts)[first] + jnp.where(several, jnp.asarray(counts)[first], 0)
        return jnp.where(jnp.any(has, axis=2), found, -1)

    def init(self, start: Start, kept: State | None) -> State:
        """The members' states; rates of acceptance are those kept, or the members' priors."""
        states = []
        for place, member in enumerate(self.members):
            own = None if kept is None else kept.members[place]
            digest = start.digest[place] if member.reads_prompt else None
            states.append(member.init(start.replace(digest=digest), own))
        if kept is not None:
            return State(tuple(states), kept.tested, kept.accepted)
        alone = [np.asarray(member.priors) for member in self.members]
        both = [rate + _AGREED * (1 - rate) for rate in alone]
        priors = jnp.asarray(np.concatenate([rates for pair in zip(alone, both, strict=True) for rates in pair]), jnp.float32)
        return State(tuple(states), jnp.full_like(priors, _PRIOR), _PRIOR * priors)

    def keep(self, state: State) -> State:
        """What the members keep, and the rates of acceptance."""
        return state._replace(members=tuple(member.keep(own) for member, own in zip(self.members, state.members, strict=True)))

    def digest(self, logits: Float[Array, "B P V"]) -> tuple[PyTree, ...]:
        """The members' digests."""
        return tuple(member.digest(logits) for member in self.members)

    def propose(self, state: State, view: View) -> tuple[Tree, State]:
        """The members' candidates, merged and cut to the budget."""
        drafts = [member.candidates(own, view) for member, own in zip(self.members, state.members, strict=True)]
        total = len(self.members)

        def kinds_of(place: int, draft: Tree) -> Int[Array, "B P n"]:
            return jnp.pad(draft.kinds, ((0, 0), (0, 0), (place, total - 1 - place)), constant_values=-1)

        tokens, parents, kinds, count = [], [], [], 0
        for place, draft in enumerate(drafts):
            skip = 1 if place else 0  # all have the same root
            shift = count - skip
            tokens.append(draft.tokens[:, skip:])
            above = jnp.broadcast_to(draft.parents, draft.tokens.shape)[:, skip:]
            parents.append(jnp.where(above > 0, above + shift, above))
            kinds.append(kinds_of(place, draft)[:, skip:])
            count += draft.nodes - skip
        whole = trees.merge(Tree(jnp.concatenate(tokens, axis=1), jnp.concatenate(parents, axis=1),
                                 max(draft.depth for draft in drafts), sum(draft.width for draft in drafts),
                                 kinds=jnp.concatenate(kinds, axis=1)))
        kinds = self._class(whole.kinds)
        rates = jnp.minimum(state.accepted / state.tested, 0.999)
        shares = jnp.where(kinds >= 0, rates[jnp.maximum(kinds, 0)], 0.0)
        return trees.prune(whole.replace(kinds=kinds[..., None]), shares, self.nodes), state

    def choose(self, state: State, tree: Tree, view: View) -> Int[Array, ""]:
        """The budget with the most expected tokens per cost, over the rows that are not done."""
        live = (~view.state.done)[:, None]
        scores = jnp.where(live & tree.valid(), tree.scores, 0.0)
        expected = jnp.stack([jnp.sum(scores[:, :size]) for size in self.budgets])
        return jnp.argmax(expected / self.costs).astype(jnp.int32)

    def observe(self, state: State, seen: Seen) -> State:
        """The members observe for themselves; nodes below an accepted one are counted."""
        states = tuple(member.observe(own, seen.replace(digest=seen.digest[place])) for place, (member, own)
                       in enumerate(zip(self.members, state.members, strict=True)))
        tree, visited = seen.tree, seen.visited()
        tested = (tree.parents >= 0) & jnp.take_along_axis(visited, jnp.maximum(tree.parents, 0), axis=1)
        # The token that was chosen after a visited node, whether or not the walk could go on to a child.
        at = jnp.sum(tree.ancestors(), axis=-1, dtype=jnp.int32) - 2  # the depth of a node's parent
        chosen = jnp.take_along_axis(seen.walk.tokens, jnp.maximum(jnp.broadcast_to(at, tree.tokens.shape), 0), axis=1)
        accepted = tested & (tree.tokens == chosen)
        kinds = jnp.where(tested, tree.kinds[..., 0], -1)
        hot = (kinds[..., None] == jnp.arange(state.tested.shape[0])[None, None]).astype(jnp.float32)
        count = jnp.sum(hot, axis=(0, 1))
        hits = jnp.sum(hot * accepted[..., None].astype(jnp.float32), axis=(0, 1))
        return State(states, state.tested * _KEEP + count, state.accepted * _KEEP + hits)

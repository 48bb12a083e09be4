"""Token Recycling: what followed a token last time is what is proposed after it now.

Tables hold the likeliest successors of every token, and of the last two and three, as the target last gave them; a template is
filled from them level by level, from the longest context that is known. The nodes that a tree computes and rejects are not
lost: their logits go into the tables like those of accepted ones.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxlm import sharding
from jaxlm.decoding.logits import noise
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, Start, View
from jaxlm.decoding.speculative.tree import Template, Tree

# How often a child of each rank is accepted where its parent is, at depths 1 to 4 alike: SmolLM2-135M, contexts of one token,
# 829 calls on 24 questions of Spec-Bench.
ACCURACIES = ((0.447, 0.097, 0.052, 0.042, 0.021, 0.02, 0.014, 0.014),)

TEMPLATE = trees.best(ACCURACIES, 81)

# Lower ends of the classes of nodes, by share among the kept successors, and how often each class is accepted, at depth 1
# and deeper, for each length of context, where prompt lookup does not propose it too: SmolLM2-135M on 30 questions of
# Spec-Bench, smoothed where a class was rare.
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.12, 0.06, 0.03, 0.0)
PRIORS = ((0.28, 0.3, 0.24, 0.24, 0.16, 0.08, 0.07, 0.045, 0.025, 0.012,
           0.45, 0.38, 0.25, 0.2, 0.17, 0.1, 0.06, 0.03, 0.025, 0.012),
          (0.52, 0.45, 0.3, 0.2, 0.2, 0.07, 0.03, 0.025, 0.02, 0.012,
           0.53, 0.5, 0.38, 0.35, 0.15, 0.12, 0.05, 0.03, 0.02, 0.012),
          (0.58, 0.4, 0.32, 0.25, 0.25, 0.15, 0.05, 0.035, 0.035, 0.03,
           0.65, 0.5, 0.42, 0.35, 0.18, 0.16, 0.06, 0.03, 0.02, 0.012))


class Successors(NamedTuple):
    """The likeliest next tokens and their logits, by falling logit; ids of -1 are none."""

    ids: Int[Array, "*B K"]
    logits: Float[Array, "*B K"]


def _largest(logits: Float[Array, "*B V"], count: int) -> Successors:
    """The `count` largest: those of the `count` blocks with the largest maxima hold them all, so few are sorted."""
    block = 128
    wide = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % block)], constant_values=-jnp.inf)
    wide = wide.reshape(*logits.shape[:-1], -1, block)
    _, rows = jax.lax.top_k(jnp.max(wide, axis=-1), min(count, wide.shape[-2]))
    near = jnp.take_along_axis(wide, rows[..., None], axis=-2).reshape(*logits.shape[:-1], -1)
    values, places = jax.lax.top_k(near, count)
    ids = jnp.take_along_axis(rows, places // block, axis=-1) * block + places % block
    return Successors(ids, values)


def likeliest(logits: Float[Array, "B *P V"], count: int) -> Successors:
    """The `count` largest logits."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = ("batch", *[None] * (logits.ndim - 2), "vocab")
    split = None if mesh.empty else sharding.partition(axes, logits.shape, mesh.shape)
    if split is None or split[-1] is None:
        return _largest(logits, count)

    # Each device's own first: a search among all would gather the logits on every device.
    def own(part: Float[Array, "B *P V"]) -> Successors:
        found = _largest(part, min(count, part.shape[-1]))
        return found._replace(ids=found.ids + jax.lax.axis_index(split[-1]) * part.shape[-1])

    found = jax.shard_map(own, in_specs=split, out_specs=Successors(split, split), check_vma=False)(logits)
    found = jax.tree.map(lambda leaf: sharding.constrain(leaf, (*axes[:-1], None)), found)
    values, places = jax.lax.top_k(found.logits, count)
    return Successors(jnp.take_along_axis(found.ids, places, axis=-1), values)


class Table(NamedTuple):
    """The successors of contexts of so many tokens; of those that share a place, the one seen last.

    Attributes:
      contexts: uint32 [n], the number of the context at each place; None for contexts of one token, each of which has a place
        of its own.
      successors: [n, K].
    """

    contexts: UInt32[Array, " n"] | None
    successors: Successors


def _number(tokens: Sequence[Int[Array, "..."]]) -> UInt32[Array, "..."]:
    """A number for the context, the last token first."""
    return functools.reduce(trees.mixed, tokens, jnp.zeros((), jnp.uint32))


def _place(number: UInt32[Array, "..."], slots: int) -> Int[Array, "..."]:
    return (number % jnp.uint32(slots)).astype(jnp.int32)


@flax.struct.dataclass
class Recycling(Drafter):
    """Proposes recycled tokens; needs no training and, between calls, next to no time.

    With temperature, a node's successors are ordered by their stored logits plus the very noise that the target will add.

    Attributes:
      template: the tree; a node of rank r gets its parent's r-th successor.
      count: successors that the table keeps of each token.
      reads_prompt: fills the table from the prompt's logits, which costs the head's product over the prompt.
      order: tokens of the longest context that successors are kept for; 1 is the paper's table.
      slots: contexts that are kept of each length above one.

    Reference: Luo et al. 2024, section 3, https://arxiv.org/abs/2408.08696. Departs from it: the template comes from
    `tree.best`, contexts are longer, nodes on the accepted path overrule others of the same context, and sampling is supported.
    """

    template: Template = flax.struct.field(pytree_node=False, default=TEMPLATE)
    count: int = flax.struct.field(pytree_node=False, default=8)
    reads_prompt: bool = flax.struct.field(pytree_node=False, default=True)
    order: int = flax.struct.field(pytree_node=False, default=3)
    slots: int = flax.struct.field(pytree_node=False, default=1 << 16)

    def __post_init__(self) -> None:
        if min(self.count, self.order, self.slots) < 1 or self.template.width > self.count:
            raise ValueError("recycling needs an order and slots of at least 1 and as many successors as its template is wide, "
                             f"{self.template.width}, got count={self.count}, order={self.order}, slots={self.slots}")

    @property
    def nodes(self) -> int:
        """Those of the template."""
        return self.template.nodes

    @property
    def depth(self) -> int:
        """That of the template."""
        return self.template.depth

    def init(self, start: Start, kept: tuple[Table, ...] | None) -> tuple[Table, ...]:
        """The tables, all rows share them: the kept ones or empty ones, and what the prompt says."""
        def empty(slots: int) -> Successors:
            return Successors(jnp.full((slots, self.count), -1, jnp.int32), jnp.zeros((slots, self.count), jnp.float32))

        longer = [Table(jnp.zeros(self.slots, jnp.uint32), empty(self.slots)) for _ in range(1, self.order)]
        tables = (Table(None, empty(start.vocabulary)), *longer) if kept is None else kept
        if not self.reads_prompt:
            return tables
        before = [jnp.pad(start.tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :start.tokens.shape[1]]
                  for back in range(1, self.order)]
        return self._learn(tables, [start.tokens, *before], start.digest, start.predicted().astype(jnp.int32) - 1)

    def keep(self, state: tuple[Table, ...]) -> tuple[Table, ...]:
        """All of it."""
        return state

    def digest(self, logits: Float[Array, "B P V"]) -> Successors:
        """The likeliest successors."""
        return likeliest(logits, self.count)

    def _learn(self, tables: tuple[Table, ...], context: Sequence[Int[Array, "B P"]], seen: Successors,
               rank: Int[Array, "B P"]) -> tuple[Table, ...]:
        """Of entries for the same place the one of highest rank counts, the last among equals; rank -1 does not.

        Args:
          context: the tokens themselves, those before them, and so on.
        """
        size, rank = rank.size, rank.reshape(-1)
        # Scatters with repeated indices write in no certain order, so the winner is found first.
        order = jnp.where(rank >= 0, rank * size + jnp.arange(size, dtype=jnp.int32), -1)
        learned = []
        for length, table in enumerate(tables, 1):
            slots = table.successors.ids.shape[0]
            number = None if length == 1 else _number([tokens.reshape(-1) for tokens in context[:length]])
            at = context[0].reshape(-1) if number is None else _place(number, slots)
            winner = jnp.full(slots, -1, jnp.int32).at[at].max(order, mode="drop")
            place = jnp.where((order >= 0) & (winner[jnp.clip(at, 0, slots - 1)] == order), at, slots)
            new = jax.tree.map(lambda old, new, place=place: old.at[place].set(new.reshape(-1, self.count), mode="drop"),
                               table.successors, seen)
            contexts = None if number is None else table.contexts.at[place].set(number, mode="drop")
            learned.append(Table(contexts, new))
        return tuple(learned)

    def successors(self, tables: tuple[Table, ...], context: Sequence[Int[Array, "B n"]], view: View,
                   depth: int) -> tuple[Successors, Int[Array, "B n"]]:
        """What is known to follow nodes of one depth, by falling logit, or by falling sum with the noise there is.

        Returns:
          (the successors, how many tokens of context they are known for)
        """
        rows = jax.tree.map(lambda leaf: leaf[context[0]], tables[0].successors)
        known = jnp.ones(context[0].shape, jnp.int32)
        for length, table in enumerate(tables[1:], 2):
            number = _number(context[:length])
            at = _place(number, self.slots)
            hit = table.contexts[at] == number
            rows = jax.tree.map(lambda old, leaf, at=at, hit=hit: jnp.where(hit[..., None], leaf[at], old), rows,
                                table.successors)
            known = jnp.where(hit, length, known)
        if view.request.settings.temperature is None:
            return rows, known
        hot = view.request.settings.temperature
        drawn = noise(view.request.keys, view.length + depth + 1, tables[0].successors.ids.shape[0])
        near = jnp.take_along_axis(drawn[:, None, :], jnp.maximum(rows.ids, 0), axis=2)
        sums = rows.logits / jnp.where(hot > 0, jnp.maximum(hot, 1e-30), 1.0)[:, None, None]
        sums = jnp.where(rows.ids >= 0, sums + jnp.where((hot > 0)[:, None, None], near, 0.0), -jnp.inf)
        _, order = jax.lax.top_k(sums, self.count)
        return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, order, axis=2), rows), known

    @property
    def classes(self) -> int:
        """Of nodes: by the tokens of context they are known for, and their share among the successors kept, at depth 1 and
        deeper."""
        return self.order * 2 * len(SHARES)

    @property
    def priors(self) -> tuple[float, ...]:
        """Acceptance of each class before any was seen."""
        return tuple(rate for length in range(self.order) for rate in PRIORS[min(length, len(PRIORS) - 1)])

    def _before(self, view: View, root: Int[Array, "B"]) -> list[Int[Array, "B"]]:
        """The tokens before the one at `root`, the nearest first."""
        found = []
        for back in range(1, self.order):
            token = jnp.take_along_axis(view.history, jnp.maximum(root - back, 0)[:, None], axis=1)[:, 0]
            found.append(jnp.where(root >= back, token, -1))
        return found

    def candidates(self, state: tuple[Table, ...], view: View) -> Tree:
        """The template, filled, with each node's class; nodes for which the tables have nothing are none."""
        template, width = self.template, len(SHARES)
        tokens = jnp.zeros((view.length.shape[0], template.nodes), jnp.int32).at[:, 0].set(view.state.last)
        before = [jnp.zeros_like(tokens).at[:, 0].set(token) for token in self._before(view, view.length)]
        valid: Bool[Array, "B P"] = jnp.ones(tokens.shape, bool)
        kinds = jnp.full(tokens.shape, -1, jnp.int32)
        for depth, level in enumerate(template.levels[1:]):
            parents = np.asarray(template.parents)[level]
            above = np.unique(parents)
            context = [part[:, above] for part in (tokens, *before)]
            rows, known = self.successors(state, context, view, depth)
            where, ranks = np.searchsorted(above, parents), template.ranks[level]
            ids = rows.ids[:, where, ranks]
            shares = jax.nn.softmax(jnp.where(rows.ids >= 0, rows.logits, -jnp.inf), axis=-1)[:, where, ranks]
            kind = jnp.minimum(jnp.sum(shares[..., None] < jnp.asarray(SHARES, jnp.float32)[None, None], axis=-1,
                                       dtype=jnp.int32), width - 1)
            tokens = tokens.at[:, level].set(jnp.maximum(ids, 0))
            before = [part.at[:, level].set(near[:, where]) for part, near in zip(before, context, strict=False)]
            valid = valid.at[:, level].set(ids >= 0)
            kinds = kinds.at[:, level].set(kind + (2 * (known[:, where] - 1) + (1 if depth else 0)) * width)
        return trees.plant(template, tokens, valid, kinds=kinds[..., None])

    def propose(self, state: tuple[Table, ...], view: View) -> tuple[Tree, tuple[Table, ...]]:
        """The template, filled."""
        return self.candidates(state, view), state

    def observe(self, state: tuple[Table, ...], seen: Seen) -> tuple[Table, ...]:
        """Learns from every node of rows that are not done."""
        tree = seen.tree
        live = tree.valid() & (seen.walk.count > 0)[:, None]
        rank = jnp.where(live, seen.visited().astype(jnp.int32), -1)
        context, above = [tree.tokens], jnp.broadcast_to(tree.parents, tree.tokens.shape)
        for token in self._before(seen.view, seen.view.length - seen.walk.count):
            near = jnp.take_along_axis(context[-1], jnp.maximum(above, 0), axis=1)
            context.append(jnp.where(above >= 0, near, token[:, None]))
        return self._learn(state, context, seen.digest, rank)

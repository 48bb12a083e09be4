"""Token Recycling: what followed a token last time is what is proposed after it now.

A table holds the likeliest successors of every token, as the target last gave them; a template is filled from it level by
level. The nodes that a tree computes and rejects are not lost: their logits go into the table like those of accepted ones.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm import sharding
from jaxlm.decoding.logits import noise
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, Start, View
from jaxlm.decoding.speculative.tree import Template, Tree

# What the standard template takes for the acceptance of a child of each rank; assumed, after the shape of the paper's tree.
ACCURACIES = ((0.42, 0.13, 0.07, 0.05, 0.03, 0.03, 0.02, 0.02),)

# Lower ends of the classes of nodes, by share among the kept successors, and how often each class is accepted, at depth 1
# and deeper, where prompt lookup does not propose it too: SmolLM2-135M on 30 questions of Spec-Bench.
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.12, 0.06, 0.03, 0.0)
PRIORS = (0.44, 0.44, 0.33, 0.28, 0.25, 0.11, 0.06, 0.03, 0.02, 0.012,
          0.49, 0.38, 0.3, 0.28, 0.21, 0.11, 0.1, 0.03, 0.025, 0.012)


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


@flax.struct.dataclass
class Recycling(Drafter):
    """Proposes recycled tokens; needs no training and, between calls, next to no time.

    With temperature, a node's successors are ordered by their stored logits plus the very noise that the target will add.

    Attributes:
      template: the tree; a node of rank r gets its parent's r-th successor.
      count: successors that the table keeps of each token.
      reads_prompt: fills the table from the prompt's logits, which costs the head's product over the prompt.

    Reference: Luo et al. 2024, section 3, https://arxiv.org/abs/2408.08696. Departs from it: the template comes from
    `tree.best`, nodes on the accepted path overrule others with the same token, and sampling is supported.
    """

    template: Template = flax.struct.field(pytree_node=False, default=trees.best(ACCURACIES, 81))
    count: int = flax.struct.field(pytree_node=False, default=8)
    reads_prompt: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def nodes(self) -> int:
        """Those of the template."""
        return self.template.nodes

    @property
    def depth(self) -> int:
        """That of the template."""
        return self.template.depth

    def init(self, start: Start, kept: Successors | None) -> Successors:
        """The table, all rows share it: the kept one or an empty one, and what the prompt says."""
        shape = start.vocabulary, self.count
        table = Successors(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)) if kept is None else kept
        if not self.reads_prompt:
            return table
        order = jnp.broadcast_to(jnp.arange(start.tokens.shape[1], dtype=jnp.int32)[None], start.tokens.shape)
        return self._learn(table, start.tokens, start.digest, jnp.where(start.valid(), order, -1))

    def keep(self, state: Successors) -> Successors:
        """All of it."""
        return state

    def digest(self, logits: Float[Array, "B P V"]) -> Successors:
        """The likeliest successors."""
        return likeliest(logits, self.count)

    def _learn(self, table: Successors, tokens: Int[Array, "B P"], seen: Successors, rank: Int[Array, "B P"]) -> Successors:
        """Of entries for the same token the one of highest rank counts, the last among equals; rank -1 does not."""
        vocabulary, tokens, rank = table.ids.shape[0], tokens.reshape(-1), rank.reshape(-1)
        # Scatters with repeated indices write in no certain order, so the winner is found first.
        order = jnp.where(rank >= 0, rank * tokens.size + jnp.arange(tokens.size, dtype=jnp.int32), -1)
        winner = jnp.full(vocabulary, -1, jnp.int32).at[tokens].max(order, mode="drop")
        place = jnp.where((order >= 0) & (winner[jnp.clip(tokens, 0, vocabulary - 1)] == order), tokens, vocabulary)
        return jax.tree.map(lambda old, new: old.at[place].set(new.reshape(-1, self.count), mode="drop"), table, seen)

    def successors(self, table: Successors, tokens: Int[Array, "B n"], view: View, depth: int) -> Successors:
        """The table's rows for nodes of one depth, by falling logit, or by falling sum with the noise there is."""
        rows = jax.tree.map(lambda leaf: leaf[tokens], table)
        if view.request.settings.temperature is None:
            return rows
        hot = view.request.settings.temperature
        drawn = noise(view.request.keys, view.length + depth + 1, table.ids.shape[0])
        near = jnp.take_along_axis(drawn[:, None, :], jnp.maximum(rows.ids, 0), axis=2)
        sums = rows.logits / jnp.where(hot > 0, jnp.maximum(hot, 1e-30), 1.0)[:, None, None]
        sums = jnp.where(rows.ids >= 0, sums + jnp.where((hot > 0)[:, None, None], near, 0.0), -jnp.inf)
        _, order = jax.lax.top_k(sums, self.count)
        return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, order, axis=2), rows)

    @property
    def classes(self) -> int:
        """Of nodes: by their share among the successors that the table keeps, at depth 1 and deeper."""
        return 2 * len(SHARES)

    @property
    def priors(self) -> tuple[float, ...]:
        """Acceptance of each class before any was seen."""
        return PRIORS

    def candidates(self, state: Successors, view: View) -> Tree:
        """The template, filled, with each node's class; nodes for which the table has nothing are none."""
        template = self.template
        tokens = jnp.zeros((view.length.shape[0], template.nodes), jnp.int32).at[:, 0].set(view.state.last)
        valid: Bool[Array, "B P"] = jnp.ones(tokens.shape, bool)
        kinds = jnp.full(tokens.shape, -1, jnp.int32)
        for depth, level in enumerate(template.levels[1:]):
            parents = np.asarray(template.parents)[level]
            above = np.unique(parents)
            rows = self.successors(state, tokens[:, above], view, depth)
            where = np.searchsorted(above, parents)
            ids = rows.ids[:, where, template.ranks[level]]
            shares = jax.nn.softmax(jnp.where(rows.ids >= 0, rows.logits, -jnp.inf), axis=-1)[:, where, template.ranks[level]]
            kind = jnp.sum(shares[..., None] < jnp.asarray(SHARES, jnp.float32)[None, None], axis=-1, dtype=jnp.int32)
            tokens = tokens.at[:, level].set(jnp.maximum(ids, 0))
            valid = valid.at[:, level].set(ids >= 0)
            kinds = kinds.at[:, level].set(jnp.minimum(kind, len(SHARES) - 1) + (len(SHARES) if depth else 0))
        return trees.plant(template, tokens, valid, kinds=kinds[..., None])

    def propose(self, state: Successors, view: View) -> tuple[Tree, Successors]:
        """The template, filled."""
        return self.candidates(state, view), state

    def observe(self, state: Successors, seen: Seen) -> Successors:
        """Learns from every node of rows that are not done."""
        live = seen.tree.valid() & (seen.walk.count > 0)[:, None]
        rank = jnp.where(live, seen.visited().astype(jnp.int32), -1)
        return self._learn(state, seen.tree.tokens, seen.digest, rank)

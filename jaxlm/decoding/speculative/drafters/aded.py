"""ADED: a table of trigrams stands in for the target, and a search in the manner of Monte Carlo tree search drafts from it.

The table counts what followed every two tokens, in a corpus, in prompts and in the target's own text. A simulation goes down
from the root by PUCT, likely successors first and seldom visited ones sooner, to a token that it gives successors of its own;
the tokens visited most are the tree.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, Start, View
from jaxlm.decoding.speculative.tree import Tree

Ids = TypeVar("Ids", Array, np.ndarray)

WAYS = 4  # pairs of tokens that share a bucket; so a table loses few pairs until it is nearly full

# Lower ends of the classes of nodes, by share, and how often each class is accepted, at depth 1 and deeper: measured for
# SmolLM2-135M on 24 questions of Spec-Bench, with and without a corpus of Wikipedia text.
SHARES = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0.0)
PRIORS = (0.94, 0.94, 0.82, 0.54, 0.22, 0.12, 0.06, 0.02,
          0.95, 0.94, 0.9, 0.75, 0.42, 0.24, 0.1, 0.01)


class Table(NamedTuple):
    """What followed pairs of tokens: every pair belongs to one bucket, of `WAYS` pairs each.

    Attributes:
      keys: int32 [n, WAYS, 2], the pairs; -1 for none.
      ids: int32 [n, WAYS, K], successors, in no order; -1 for none.
      counts: float32 [n, WAYS, K], how often each followed; 0 for none.
    """

    keys: Int[Array, "n W 2"]
    ids: Int[Array, "n W K"]
    counts: Float[Array, "n W K"]


class Successors(NamedTuple):
    """What may follow, and how likely each is; ids of -1 are none."""

    ids: Int[Array, "B K"]
    shares: Float[Array, "B K"]


def empty(pairs: int, successors: int) -> Table:
    """A table for so many pairs, a multiple of `WAYS`, that has seen nothing."""
    buckets = pairs // WAYS
    shape = buckets, WAYS, successors
    return Table(jnp.full((buckets, WAYS, 2), -1, jnp.int32), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))


def bucket(first: Ids, second: Ids, buckets: int) -> Ids:
    """Where pairs of tokens belong, int32; the same for NumPy and JAX arrays."""
    number = first.astype(np.uint32) * np.uint32(2654435761) + second.astype(np.uint32)
    for factor in (2246822519, 3266489917):
        number = (number ^ (number >> np.uint32(15))) * np.uint32(factor)
    return ((number ^ (number >> np.uint32(16))) % np.uint32(buckets)).astype(np.int32)


def trigrams(token_ids: Iterable[Sequence[int] | np.ndarray], pairs: int = 1 << 16, successors: int = 8,
             most: float = 2.0) -> Table:
    """The table of a corpus, to draft from it from the first token on. Counts in NumPy.

    Args:
      token_ids: sequences; no trigram crosses from one to the next.
      pairs: that the table has room for, a multiple of 4; the most frequent of each bucket stay.
      successors: kept of every pair, the most frequent.
      most: pairs seen more often are scaled down to this total, so that the target's own text soon outweighs the corpus.
    """
    parts = [np.stack([ids[:-2], ids[1:-1], ids[2:]], axis=1)
             for ids in (np.asarray(sequence, np.int32) for sequence in token_ids) if len(ids) > 2]
    table = Table(*(np.array(leaf) for leaf in empty(pairs, successors)))
    if not parts:
        return jax.tree.map(jnp.asarray, table)
    triples, counts = np.unique(np.concatenate(parts), axis=0, return_counts=True)
    starts = np.flatnonzero(np.r_[True, np.any(triples[1:, :2] != triples[:-1, :2], axis=1)])
    pair = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(triples)]))
    totals = np.add.reduceat(counts, starts)

    def ranks(groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Place of each item in its group by falling weight, the first among equals."""
        order = np.lexsort((-weights, groups))
        begins = np.r_[True, groups[order][1:] != groups[order][:-1]]
        place = np.arange(len(groups)) - np.maximum.accumulate(np.where(begins, np.arange(len(groups)), 0))
        result = np.empty_like(place)
        result[order] = place
        return result

    home = bucket(triples[starts, 0], triples[starts, 1], len(table.keys))
    way, place = ranks(home, totals), ranks(pair, counts)
    stays = way < WAYS
    table.keys[home[stays], way[stays]] = triples[starts[stays], :2]
    kept = stays[pair] & (place < successors)
    at = home[pair[kept]], way[pair[kept]], place[kept]
    table.ids[at] = triples[kept, 2]
    table.counts[at] = (counts * np.minimum(1.0, most / totals)[pair])[kept]
    return jax.tree.map(jnp.asarray, table)


def learn(table: Table, triples: Int[Array, "n 3"], on: Bool[Array, " n"]) -> Table:
    """Counts the trigrams that are on, one after another.

    A new pair takes the place of the least counted of its bucket, a new successor that of the least counted of its pair.
    """
    order = jnp.argsort(~on, stable=True)

    def once(index: Int[Array, ""], table: Table) -> Table:
        pair, third = triples[order[index], :2], triples[order[index], 2]
        home = bucket(pair[0], pair[1], table.keys.shape[0])
        keys, ids, counts = (jax.lax.dynamic_index_in_dim(leaf, home, keepdims=False) for leaf in table)
        same = jnp.all(keys == pair[None], axis=1)
        known = jnp.any(same)
        way = jnp.where(known, jnp.argmax(same), jnp.argmin(jnp.sum(counts, axis=1))).astype(jnp.int32)
        own, weights = jnp.where(known, ids[way], -1), jnp.where(known, counts[way], 0.0)
        again = jnp.any(own == third)
        place = jnp.where(again, jnp.argmax(own == third), jnp.argmin(weights))
        # The new counts must not read the ids nor the other way round, or XLA copies one of the two to write in place.
        here = jnp.arange(own.shape[0]) == place
        rows = Table(pair, jnp.where(here, third, own), jnp.where(here, jnp.where(again, weights, 0.0) + 1.0, weights))
        return jax.tree.map(lambda leaf, row: jax.lax.dynamic_update_slice(leaf, row[None, None], (home, way, 0)), table, rows)

    return jax.lax.fori_loop(0, jnp.sum(on, dtype=jnp.int32), once, table)


class _Search(NamedTuple):
    """A search tree; every simulation adds the successors of one token, a family. Family 0 are the root's.

    Attributes:
      ids, shares: [B, S + 1, K], the tokens and their estimated probability after their parent; 0 for none.
      visits, worth: [B, S + 1, K], simulations that came by, and the sum of their rewards.
      below: int32 [B, S + 1, K], the token's family; 0 for none.
      token, parent: int32 [B, S + 1], whose family it is: its id and its node of the tree.
      product, total: float32 [B, S + 1], of the shares along the path from the root.
    """

    ids: Int[Array, "B F K"]
    shares: Float[Array, "B F K"]
    visits: Float[Array, "B F K"]
    worth: Float[Array, "B F K"]
    below: Int[Array, "B F K"]
    token: Int[Array, "B F"]
    parent: Int[Array, "B F"]
    product: Float[Array, "B F"]
    total: Float[Array, "B F"]


@flax.struct.dataclass
class ADED(Drafter):
    """Drafts from trigrams; needs no training. All rows and requests share the table.

    Attributes:
      nodes: P, the root among them.
      length: tokens that a path has at most.
      simulations: of every search.
      exploration, growth: c1 and c2 of PUCT: a token of share p with n of its parent's N visits scores
        mean reward + (c1 + log((N + c2 + 1) / c2)) p sqrt(N) / (1 + n). With c1 = 0 and a large c2 nothing is explored.
      successors: K, kept of every pair of tokens.
      pairs: of tokens that the table has room for, a multiple of 4.
      smoothing: a successor's share is its count over the pair's total and this much more.
      corpus: the table to start with, of `trigrams` with the same sizes; None for an empty one.

    Raises:
      ValueError: when a number is too small, the simulations are too few for the nodes, or `pairs` is not a multiple of 4.

    Reference: Liu et al. 2024, https://arxiv.org/abs/2407.12021, and its public code for the numbers. Departs from it: tokens
    that were not visited have reward 0 and no priority, a reward looks one token ahead instead of playing to the end at random,
    and shares come from counts, not from steps of 0.04 up to 3.
    """

    nodes: int = flax.struct.field(pytree_node=False, default=24)
    length: int = flax.struct.field(pytree_node=False, default=8)
    simulations: int = flax.struct.field(pytree_node=False, default=24)
    exploration: float = flax.struct.field(pytree_node=False, default=32.0)
    growth: float = flax.struct.field(pytree_node=False, default=8.0)
    successors: int = flax.struct.field(pytree_node=False, default=8)
    pairs: int = flax.struct.field(pytree_node=False, default=1 << 16)
    smoothing: float = flax.struct.field(pytree_node=False, default=1.0)
    corpus: Table | None = None

    def __post_init__(self) -> None:
        if min(self.nodes - 1, self.length, self.simulations, self.successors) < 1:
            raise ValueError("a search needs at least 2 nodes, and 1 for length, simulations and successors, got "
                             f"{self.nodes}, {self.length}, {self.simulations}, {self.successors}")
        most = 1 + (self.simulations + 1) * self.successors
        if self.nodes > most:
            raise ValueError(f"{self.simulations} simulations give at most {most} nodes, got {self.nodes}")
        if self.pairs < WAYS or self.pairs % WAYS:
            raise ValueError(f"pairs must be a positive multiple of {WAYS}, got {self.pairs}")
        if min(self.growth, self.smoothing) <= 0:
            raise ValueError(f"growth and smoothing must be positive, got {self.growth}, {self.smoothing}")

    @property
    def depth(self) -> int:
        """The length of a path."""
        return min(self.length, self.nodes - 1)

    @property
    def classes(self) -> int:
        """Of nodes: by their share, at depth 1 and deeper."""
        return 2 * len(SHARES)

    @property
    def priors(self) -> tuple[float, ...]:
        """Acceptance of each class before any was seen."""
        return PRIORS

    def init(self, start: Start, kept: Table | None) -> Table:
        """The kept table, the corpus's or an empty one, and the trigrams of prompt and source.

        Raises:
          ValueError: when the table is not of the drafter's sizes.
        """
        table = kept if kept is not None else self.corpus if self.corpus is not None else empty(self.pairs, self.successors)
        pairs, successors = table.ids.shape[0] * WAYS, table.ids.shape[2]
        if (pairs, successors) != (self.pairs, self.successors):
            raise ValueError(f"the table has {pairs} pairs and {successors} successors of each, the drafter {self.pairs} and "
                             f"{self.successors}")
        for text in (start.searchable(), start):
            if text is not None and text.tokens.shape[1] > 2:
                triples = jnp.stack([text.tokens[:, :-2], text.tokens[:, 1:-1], text.tokens[:, 2:]], axis=2)
                table = learn(table, triples.reshape(-1, 3), text.valid()[:, 2:].reshape(-1))
        return table

    def keep(self, state: Table) -> Table:
        """All of it."""
        return state

    def observe(self, state: Table, seen: Seen) -> Table:
        """Learns the new tokens."""
        steps = jnp.arange(seen.walk.tokens.shape[1], dtype=jnp.int32)[None]
        history, place = seen.view.history, (seen.view.length - seen.walk.count)[:, None] + 1 + steps
        triples = jnp.stack([jnp.take_along_axis(history, place - back, axis=1) for back in (2, 1, 0)], axis=2)
        return learn(state, triples.reshape(-1, 3), (steps < seen.walk.count[:, None]).reshape(-1))

    def look(self, table: Table, first: Int[Array, "B"], second: Int[Array, "B"]) -> Successors:
        """What follows pairs of tokens."""
        home = bucket(first, second, table.keys.shape[0])
        same = jnp.all(table.keys[home] == jnp.stack([first, second], axis=1)[:, None], axis=2)
        way = jnp.argmax(same, axis=1)
        known = jnp.any(same, axis=1)[:, None]
        counts = jnp.where(known, table.counts[home, way], 0.0)
        return Successors(jnp.where(known, table.ids[home, way], -1),
                          counts / (jnp.sum(counts, axis=1, keepdims=True) + self.smoothing))

    def _simulate(self, table: Table, index: Int[Array, ""], search: _Search) -> _Search:
        """One simulation: select, expand, reward, and the way back; its family is number `index`."""
        batch, families, count = search.ids.shape
        passed = 1.0 + jnp.sum(search.visits, axis=2, keepdims=True)
        bonus = (self.exploration + jnp.log((passed + self.growth + 1.0) / self.growth)) * search.shares * jnp.sqrt(passed)
        scores = search.worth / jnp.maximum(search.visits, 1.0) + bonus / (1.0 + search.visits)
        best = jnp.argmax(jnp.where(search.shares > 0, scores, -1.0), axis=2).astype(jnp.int32)
        best = best + jnp.arange(families, dtype=jnp.int32)[None] * count  # a token's place among all

        def at(leaf: Array, place: Int[Array, "B"]) -> Array:
            return jnp.take_along_axis(leaf.reshape(batch, -1), place[:, None], axis=1)[:, 0]

        place = jnp.arange(families * count, dtype=jnp.int32)[None]
        family, going = jnp.zeros(batch, jnp.int32), search.shares[:, 0].max(axis=1) > 0
        leaf, by, depth = family, jnp.zeros((batch, families * count), bool), family
        for _ in range(self.depth):
            leaf = jnp.where(going, at(best, family), leaf)
            by = by | (going[:, None] & (place == leaf[:, None]))
            depth = depth + going.astype(jnp.int32)
            below = at(search.below, leaf)
            going = going & (below > 0)
            family = jnp.where(going, below, family)

        share, token = at(search.shares, leaf), at(search.ids, leaf)
        found = self.look(table, at(search.token, family), token)
        room = depth < self.depth
        shares = jnp.where(room[:, None], found.shares, 0.0)
        product, total = at(search.product, family) * share, at(search.total, family) + share
        reward = total + jnp.max(found.shares, axis=1)
        new = (jnp.max(shares, axis=1) > 0)[:, None] & (place == leaf[:, None])
        by = by.reshape(search.ids.shape)
        return _Search(
            search.ids.at[:, index].set(found.ids), search.shares.at[:, index].set(shares),
            search.visits + by.astype(jnp.float32), search.worth + jnp.where(by, reward[:, None, None], 0.0),
            jnp.where(new.reshape(by.shape), index, search.below), search.token.at[:, index].set(token),
            search.parent.at[:, index].set(leaf + 1), search.product.at[:, index].set(product),
            search.total.at[:, index].set(total))

    def candidates(self, state: Table, view: View) -> Tree:
        """The tokens that the search visited most, with their classes; among those never visited the likeliest."""
        batch, families, count = view.length.shape[0], self.simulations + 1, self.successors
        before = jnp.take_along_axis(view.history, view.length[:, None] - 1, axis=1)[:, 0]
        first = self.look(state, before, view.state.last)

        def full(value: Any, dtype: Any, *shape: int) -> Array:
            return jnp.full((batch, families, *shape), value, dtype)

        none, zeros, ones = full(0, jnp.int32), full(0.0, jnp.float32, count), full(1.0, jnp.float32)
        search = _Search(full(-1, jnp.int32, count).at[:, 0].set(first.ids), zeros.at[:, 0].set(first.shares), zeros, zeros,
                         full(0, jnp.int32, count), none.at[:, 0].set(view.state.last), none, ones, 0.0 * ones)
        needed = jnp.where(jnp.any(first.shares > 0), families, 1)
        search = jax.lax.fori_loop(1, needed, lambda index, search: self._simulate(state, index, search), search)

        valid = (search.shares > 0).reshape(batch, -1)
        parents = jnp.where(valid, jnp.repeat(search.parent, count, axis=1), -1)
        # The shares of visits are the tree's order; less than one visit stands for none, the more the likelier.
        likely = search.product[..., None] * search.shares
        passed = 1.0 + jnp.sum(search.visits, axis=2, keepdims=True)
        shares = (jnp.maximum(search.visits, likely) / passed).reshape(batch, -1)
        kinds = jnp.sum(search.shares[..., None] < jnp.asarray(SHARES, jnp.float32)[None, None, None], axis=-1, dtype=jnp.int32)
        kinds = (kinds + jnp.where(search.parent > 0, len(SHARES), 0)[..., None]).reshape(batch, -1)

        def rooted(leaf: Array, root: Array | int) -> Array:
            return jnp.concatenate([jnp.broadcast_to(jnp.asarray(root, leaf.dtype), (batch,))[:, None], leaf], axis=1)

        tokens = jnp.maximum(search.ids, 0).reshape(batch, -1)
        kinds = rooted(jnp.where(valid, kinds, -1), -1)[..., None]
        tree = Tree(rooted(tokens, view.state.last), rooted(parents, -1), self.depth, count, kinds=kinds)
        return trees.prune(tree, rooted(shares, 0.0), self.nodes)

    def propose(self, state: Table, view: View) -> tuple[Tree, Table]:
        """The search's tree."""
        return self.candidates(state, view), state

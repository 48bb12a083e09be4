"""Verification: walks a tree with the target's logits and says which tokens come out.

The walk goes from the root down, one node of every row at a time, as plain decoding would: the logits after the node, with
the row's penalties for just the tokens on its path, go through the same functions to the same record of tokens, stop strings
and limits. A `Rule` says only which token comes next and to which child, if any, the walk goes on. So nothing has to be
rolled back, and rules do not know of settings, stops or batches.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlm.decoding import loop
from jaxlm.decoding.logits import Settings, choose, penalise
from jaxlm.decoding.speculative.tree import Tree

Exactness = Literal["tokens", "distribution", "lossy"]


def subkeys(keys: Key[Array, "B"], positions: Int[Array, "B"], purpose: int) -> Key[Array, "B"]:
    """Keys for one purpose at each row's absolute position, independent of every other purpose's and of `logits.noise`.

    Args:
      purpose: below 16 for drafters, from 16 on for rules.
    """
    def row(key: Key[Array, ""], at: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, at), purpose)
    return jax.vmap(row)(keys, positions)


@flax.struct.dataclass
class Place:
    """Where the walk is: a node of every row and what the target says after it.

    Attributes:
      node: int32 [B].
      logits: float32 [B, V], with bias and penalties, before temperature and filters.
      settings: the rows'.
      keys: PRNG keys [B].
      position: int32 [B], absolute index of the token to be chosen.
    """

    node: Int[Array, "B"]
    logits: Float[Array, "B V"]
    settings: Settings
    keys: Key[Array, "B"]
    position: Int[Array, "B"]


class Rule(Protocol):
    """How a target's logits and a drafted tree become tokens. Frozen and hashable: compiled programs depend on it.

    Attributes:
      exact: "tokens" gives those of plain decoding under the same keys, "distribution" draws from the same distribution,
        "lossy" neither.
      draws: how drafts must have been drawn, see `jaxlm.decoding.speculative.drafters.Drafter.draws`; None: in any way.
    """

    exact: ClassVar[Exactness]
    draws: ClassVar[frozenset[str] | None]

    def plan(self, tree: Tree, everywhere: Callable[[], Float[Array, "B P V"]], keys: Key[Array, "B"], settings: Settings,
             position: Int[Array, "B P"]) -> Any:
        """What `visit` wants to know of the tree as a whole.

        Args:
          everywhere: gives the logits after every node as `Place.logits` has them after one.
          position: absolute index of the token that follows each node.
        """

    def visit(self, plan: Any, tree: Tree, place: Place) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The next token of every row, and the child to go on to: -1 where the token is the last of this call."""


@flax.struct.dataclass
class Walk:
    """What a call of the target gave.

    Attributes:
      path: int32 [B, D + 1], the nodes visited; junk from `count` on.
      tokens: int32 [B, D + 1], the token chosen at each of them.
      count: int32 [B], how many: 0 for rows that were done.
    """

    path: Int[Array, "B steps"]
    tokens: Int[Array, "B steps"]
    count: Int[Array, "B"]


def _everywhere(state: loop.State, request: loop.Request, tree: Tree, logits: Float[Array, "B P V"]) -> Float[Array, "B P V"]:
    """Bias and penalties at every node, for the tokens of its own path."""
    batch, nodes, vocabulary = logits.shape
    counts = state.counts
    if counts is not None:
        on = jnp.broadcast_to(tree.ancestors(), (batch, nodes, nodes)).astype(jnp.int32).at[:, :, 0].set(0)  # 0 is counted
        rows, node = jnp.arange(batch)[:, None, None], jnp.arange(nodes)[None, :, None]
        counts = jnp.broadcast_to(counts[:, None], logits.shape).at[rows, node, tree.tokens[:, None, :]].add(on)
        counts = counts.reshape(-1, vocabulary)

    def spread(leaf: Array) -> Array:
        return jnp.repeat(leaf, nodes, axis=0)

    settings = jax.tree.map(spread, request.settings)
    prompted = None if request.prompted is None else spread(request.prompted)
    return penalise(logits.reshape(-1, vocabulary), settings, counts, prompted).reshape(logits.shape)


def walk(rule: Rule, state: loop.State, request: loop.Request, tree: Tree,
         logits: Float[Array, "B P V"]) -> tuple[loop.State, Walk]:
    """Follows the tree from its root, records every token, and stops where the rule or the row's end says so.

    Args:
      state: as it was before the call: `cache.length` is the root's position.
      logits: what the target says after every node, as it comes.
    """
    batch, steps = tree.tokens.shape[0], tree.depth + 1
    root = state.cache.length
    plan = rule.plan(tree, lambda: _everywhere(state, request, tree, logits), request.keys, request.settings,
                     root[:, None] + tree.depths() + 1)

    def going(carry: tuple[Array, ...]) -> Array:
        return jnp.any(carry[2])

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, node, live, state, path, tokens, count = carry
        row = jnp.take_along_axis(logits, node[:, None, None], axis=1)[:, 0]
        processed = penalise(row, request.settings, state.counts, request.prompted)
        token, child = rule.visit(plan, tree, Place(node, processed, request.settings, request.keys, root + index + 1))
        state = loop.record(state, request, row, token, live)
        path = jax.lax.dynamic_update_index_in_dim(path, node, index, 1)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index, 1)
        count = count + live.astype(jnp.int32)
        live = live & (child >= 0) & ~state.done
        return index + 1, jnp.where(live, child, node), live, state, path, tokens, count

    none, junk = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, steps), jnp.int32)
    carry = jnp.zeros((), jnp.int32), none, ~state.done, state, junk, junk, none
    *_, state, path, tokens, count = jax.lax.while_loop(going, advance, carry)
    return state, Walk(path, tokens, count)


@flax.struct.dataclass
class Match:
    """Sample and match: the target chooses as plain decoding does, under the same noise, and a child that agrees is accepted.

    Drafts only decide what has been computed already, so any draft will do, and the tokens are plain decoding's.

    Reference: the shared noise is the coupling of Daliri et al. 2024, section 3, https://arxiv.org/abs/2408.07978.
    """

    exact: ClassVar[Exactness] = "tokens"
    draws: ClassVar[frozenset[str] | None] = None

    def plan(self, tree: Tree, everywhere: Callable[[], Array], keys: Array, settings: Settings, position: Array) -> None:
        """Nothing: a node is enough."""

    def visit(self, plan: None, tree: Tree, place: Place) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The token of plain decoding and the child that carries it."""
        token = choose(place.logits, place.settings, place.keys, place.position)
        return token, tree.child(place.node, token)

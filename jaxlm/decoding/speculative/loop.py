"""The compiled loop of speculative decoding: draft, verify, accept and commit in one `lax.while_loop`.

A step of the loop calls the target once, on a tree; every row moves on by as many tokens as were accepted and one. Where a
drafter has several sizes of tree, each is a loop of its own inside the outer one that runs once or not at all: unlike a
conditional it updates the cache in place.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm.cache import Cache, commit
from jaxlm.decoding import loop
from jaxlm.decoding.speculative.drafters.base import Drafter, Seen, View
from jaxlm.decoding.speculative.tree import Tree
from jaxlm.decoding.speculative.verify import Rule, walk

Step = Callable[[PyTree, Int[Array, "B P"], Cache, Int[Array, "B P"], Bool[Array, "B P P"]],
                tuple[Float[Array, "B P V"], PyTree, Float[Array, ""]]]


@flax.struct.dataclass
class State:
    """Where every row is, and what it took.

    Attributes:
      plain: the state of the plain loop.
      history: int32 [B, S], prompt and output; junk behind the last token, which stands at `plain.cache.length`.
      drafter: the drafter's own.
      emitted: int32 [B, D + 1], calls of the target that gave 1, 2, ... D + 1 tokens.
      sizes: int32 [B, n], calls that verified each of the drafter's sizes of tree.
      experts: float32, the sum over calls of how many experts each touched (`jaxlm.layers.moe.touched`).
    """

    plain: loop.State
    history: Int[Array, "B S"]
    drafter: PyTree
    emitted: Int[Array, "B steps"]
    sizes: Int[Array, "B n"]
    experts: Float[Array, ""]


def begin(plain: loop.State, prompt: Int[Array, "B T"], drafter: Drafter, drafted: PyTree) -> State:
    """The state after the prompt, whose first token `jaxlm.decoding.loop.begin` chose.

    Args:
      prompt: junk behind each row's tokens.
      drafted: the drafter's state.
    """
    batch, slots = prompt.shape[0], plain.cache.slots
    history = jnp.pad(prompt, ((0, 0), (0, slots - prompt.shape[1])))
    history = history.at[jnp.arange(batch), plain.cache.length].set(plain.last, mode="drop")
    return State(plain, history, drafted, jnp.zeros((batch, drafter.depth + 1), jnp.int32),
                 jnp.zeros((batch, len(drafter.sizes)), jnp.int32), jnp.zeros(()))


def advance(step: Step, rule: Rule, drafter: Drafter, params: PyTree, state: State, request: loop.Request, tree: Tree,
            size: int) -> State:
    """One call of the target, on the first nodes of a tree: `size` is their place among the drafter's sizes."""
    tree, old = tree.prefix(drafter.sizes[size]), state.plain.cache
    on = tree.ancestors()
    depths = jnp.sum(on, axis=-1, dtype=jnp.int32) - 1
    # Rows that are done have no tokens, so they touch no experts.
    positions = jnp.where(tree.valid() & ~state.plain.done[:, None], old.length[:, None] + depths, -1)
    logits, kv, experts = step(params, jnp.maximum(tree.tokens, 0), old, positions, on)
    digest = drafter.digest(logits)
    plain, walked = walk(rule, state.plain, request, tree, logits)
    # As in the plain loop, the write waits for the tokens, so for every read of the cache, and is made in place.
    start = old.length + jnp.minimum(jnp.min(walked.count), 0)
    cache = commit(old.replace(length=start), kv, walked.path, walked.count)
    plain = plain.replace(cache=cache)

    ordinal = jnp.arange(walked.path.shape[1], dtype=jnp.int32)[None]
    place = jnp.where(ordinal < walked.count[:, None], old.length[:, None] + 1 + ordinal, state.history.shape[1])
    rows = jnp.arange(place.shape[0])[:, None]
    history = state.history.at[rows, place].set(walked.tokens, mode="drop")
    drafted = drafter.observe(state.drafter, Seen(tree, digest, walked, View(history, plain, request, params)))
    steps = jnp.arange(1, state.emitted.shape[1] + 1)[None]
    emitted = state.emitted + (walked.count[:, None] == steps).astype(jnp.int32)
    sizes = state.sizes.at[:, size].add((walked.count > 0).astype(jnp.int32))
    return State(plain, history, drafted, emitted, sizes, state.experts + experts)


def run(step: Step, rule: Rule, drafter: Drafter, params: PyTree, state: State, request: loop.Request,
        calls: Int[Array, ""]) -> State:
    """Extends all rows by at most `calls` calls of the target, or until every row is done.

    The cache needs D slots behind the last token that a row may get: what a call rejects is written there and never seen.
    """
    def unfinished(carry: tuple[Array, State]) -> Bool[Array, ""]:
        index, state = carry
        return (index < calls) & ~jnp.all(state.plain.done)

    def once(carry: tuple[Array, State]) -> tuple[Array, State]:
        index, state = carry
        view = View(state.history, state.plain, request, params)
        tree, drafted = drafter.propose(state.drafter, view)
        if tree.nodes != drafter.nodes or tree.depth > drafter.depth:
            raise ValueError(f"{type(drafter).__name__} proposed a tree of {tree.nodes} nodes and depth {tree.depth}, it "
                             f"promised {drafter.nodes} nodes and a depth of at most {drafter.depth}")
        state = state.replace(drafter=drafted)
        if len(drafter.sizes) == 1:
            return index + 1, advance(step, rule, drafter, params, state, request, tree, 0)
        chosen = drafter.choose(drafted, tree, view)
        for size in range(len(drafter.sizes)):
            chosen, state = jax.lax.while_loop(
                lambda pair, size=size: pair[0] == size,
                lambda pair, size=size: (jnp.full((), -1, jnp.int32),
                                         advance(step, rule, drafter, params, pair[1], request, tree, size)),
                (chosen, state))
        return index + 1, state

    return jax.lax.while_loop(unfinished, once, (jnp.zeros((), jnp.int32), state))[1]

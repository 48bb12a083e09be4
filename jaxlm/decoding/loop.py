"""The compiled loop: one `lax.while_loop` that extends every row until it ends.

The loop knows a model only as a step function (weights, tokens, cache) -> (logits, new keys and values), so it is tested
with a stub. Its state is one pytree; running it for a number of steps and again gives the same text as running it once,
because a row's noise is keyed by its own key and the absolute position of the token, and by nothing else.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlm.cache import Cache, append
from jaxlm.decoding.logits import Settings, choose, penalise
from jaxlm.decoding.stop import Automaton

Step = Callable[[PyTree, Int[Array, "B P"], Cache], tuple[Float[Array, "B P V"], PyTree]]


@flax.struct.dataclass
class State:
    """Where every row is.

    Attributes:
      cache: holds everything but each row's last token.
      last: int32 [B], the last token: chosen, its keys and values not yet in the cache.
      tokens: int32 [B, M], the output so far; junk beyond `count`.
      logprobs: float32 [B, M], log-probability of each output token under the model itself, or None.
      count: int32 [B], tokens in the output.
      done: bool [B].
      stop: int32 [B], state of the stop-string automaton, or None.
      counts: int32 [B, V], occurrences of each token in the output, or None without penalties.
      finite: bool [B], false once a row's logits were not finite.
    """

    cache: Cache
    last: Int[Array, "B"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"] | None
    count: Int[Array, "B"]
    done: Bool[Array, "B"]
    stop: Int[Array, "B"] | None
    counts: Int[Array, "B V"] | None
    finite: Bool[Array, "B"]


@flax.struct.dataclass
class Request:
    """What is asked of every row; does not change while the loop runs.

    Attributes:
      keys: PRNG keys [B].
      limit: int32 [B], most tokens to emit, at most M.
      eos: int32 [n], tokens that end a row, -1 where there are fewer.
      settings: how tokens are chosen.
      prompted: bool [B, V], tokens of the prompt, or None without a repetition penalty.
      automaton: stop strings, or None.
    """

    keys: Key[Array, "B"]
    limit: Int[Array, "B"]
    eos: Int[Array, " n"]
    settings: Settings
    prompted: Bool[Array, "B V"] | None
    automaton: Automaton | None


def record(state: State, request: Request, logits: Float[Array, "B V"], token: Int[Array, "B"],
           live: Bool[Array, "B"]) -> State:
    """Appends a token to the output of every live row, and sees whether it ends the row.

    Args:
      logits: what the model said before the token, as it came.
      live: rows that the token is for; the others stay as they are.
    """
    rows = jnp.arange(state.count.shape[0])
    token = jnp.where(live, token, state.last)
    place = jnp.where(live, state.count, state.tokens.shape[1])  # out of range: dropped
    tokens = state.tokens.at[rows, place].set(token, mode="drop")
    count = state.count + live.astype(jnp.int32)
    ended = (count >= request.limit) | jnp.any(token[:, None] == request.eos[None, :], axis=1)
    finite = state.finite & (~live | jnp.isfinite(jnp.max(logits, axis=-1)))
    logprobs = state.logprobs
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]
        logprobs = logprobs.at[rows, place].set(chosen, mode="drop")
    counts = state.counts
    if counts is not None:
        counts = counts.at[rows, token].add(live.astype(jnp.int32))
    stop = state.stop
    if stop is not None:
        stop = jnp.where(live, request.automaton.step[stop, token], stop)
        ended = ended | request.automaton.found[stop]
    return state.replace(last=token, tokens=tokens, logprobs=logprobs, count=count, done=state.done | (live & ended) | ~finite,
                         stop=stop, counts=counts, finite=finite)


def emit(state: State, request: Request, logits: Float[Array, "B V"]) -> State:
    """Chooses each live row's next token from the logits after its last one, and records it."""
    token = choose(penalise(logits, request.settings, state.counts, request.prompted), request.settings, request.keys,
                   state.cache.length)
    return record(state, request, logits, token, ~state.done)


def begin(cache: Cache, request: Request, logits: Float[Array, "B V"], capacity: int, logprobs: bool) -> State:
    """The state after the prompt: its keys and values in the cache, the first token chosen from the logits at its end."""
    batch, vocabulary = logits.shape
    state = State(
        cache=cache, last=jnp.zeros(batch, jnp.int32), tokens=jnp.zeros((batch, capacity), jnp.int32),
        logprobs=jnp.zeros((batch, capacity), jnp.float32) if logprobs else None, count=jnp.zeros(batch, jnp.int32),
        done=request.limit <= 0, stop=None if request.automaton is None else request.automaton.start,
        counts=jnp.zeros((batch, vocabulary), jnp.int32) if request.settings.penalised else None,
        finite=jnp.ones(batch, bool))
    return emit(state, request, logits)


def run(step: Step, params: PyTree, state: State, request: Request, steps: Int[Array, ""]) -> State:
    """Extends all rows by at most `steps` tokens, or until every row is done."""
    def unfinished(carry: tuple[Array, State]) -> Bool[Array, ""]:
        index, state = carry
        return (index < steps) & ~jnp.all(state.done)

    def advance(carry: tuple[Array, State]) -> tuple[Array, State]:
        index, state = carry
        old = state.cache
        logits, kv = step(params, state.last[:, None], old)
        grown = old.replace(length=old.length + jnp.where(state.done, 0, 1))
        state = emit(state.replace(cache=grown), request, logits[:, 0])
        # The write waits for the chosen token, so for every read of the cache: it can then be made in place. The minimum
        # is 0; no compiler knows that.
        start = old.length + jnp.minimum(state.last, 0)
        return index + 1, state.replace(cache=append(old.replace(length=start), kv, grown.length - start))

    return jax.lax.while_loop(unfinished, advance, (jnp.zeros((), jnp.int32), state))[1]

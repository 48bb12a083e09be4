"""`beam_search`: the likeliest texts by a search that keeps several beginnings of each row's text.

One `lax.while_loop`: every step extends all beams of all rows by a token, orders the extensions by their summed
log-probabilities and moves the cache's rows along. The loop knows a model only as a step function, as `jaxlm.decoding.loop`
does. Rules, scores and when a search ends are those of transformers' `generate(num_beams=...)`, and no row depends on the
rows beside it.
"""

import dataclasses
import math
import operator
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm import cache as caching
from jaxlm.decoding.generate import (
    Forward,
    Source,
    biases_of,
    bucket,
    counted,
    known,
    padded,
    prefixes,
    prompt_width,
    several,
    slots_for,
    source_of,
    started,
    token_id,
)
from jaxlm.decoding.generate import begin as prefill
from jaxlm.decoding.loop import Step
from jaxlm.model import Model

_NEVER = -1e9  # the score of what is not to be chosen


@flax.struct.dataclass
class Request:
    """What is asked of every row; does not change while the loop runs.

    Attributes:
      limit: int32 [B], most tokens of a text, at most M.
      eos: int32 [n], tokens that end a text.
      penalty: float32 [B, M], what the score of a text of 1, 2, ... tokens is divided by.
      hope: float32 [B, M], what a running text's score is divided by, after 1, 2, ... tokens, to tell the best it may come to.
      first_full: bool, whether a row ends as soon as it has a finished text for every beam.
      minimum: int32 [B], tokens before one of `eos` may come.
      first, last: int32, the token that every text begins with, or ends with where it reaches the limit; None for any.
      bias: float32 [B, V], added to the log-probabilities, or None; -inf bans a token.
      prompt: int32 [B, T], behind padding of -1; None without `ngram`.
      ngram: no run of so many tokens comes twice in prompt and text; 0 is off.
      renormalise: whether the probabilities of what is left of the tokens sum to one.
    """

    limit: Int[Array, "B"]
    eos: Int[Array, " n"]
    penalty: Float[Array, "B M"]
    hope: Float[Array, "B M"]
    first_full: Bool[Array, ""]
    minimum: Int[Array, "B"]
    first: Int[Array, ""] | None = None
    last: Int[Array, ""] | None = None
    bias: Float[Array, "B V"] | None = None
    prompt: Int[Array, "B T"] | None = None
    ngram: int = flax.struct.field(pytree_node=False, default=0)
    renormalise: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class State:
    """Where every row is: its running beams, likeliest first, and its best finished texts.

    Attributes:
      cache: rows [B * beams], a row's beams side by side; holds everything but each beam's last token.
      count: int32, tokens in every running text.
      tokens: int32 [B, beams, M], running texts, -1 beyond `count`.
      scores: float32 [B, beams], their summed log-probabilities.
      texts: int32 [B, beams, M], finished ones.
      lengths: int32 [B, beams], their tokens; 0 where there is none yet.
      best: float32 [B, beams], their scores, divided by the length's penalty, highest first; -1e9 where there is none.
      open: bool [B], whether a running text may yet come among the finished.
      finite: bool [B], false once a row's logits were not finite.
    """

    cache: caching.Cache
    count: Int[Array, ""]
    tokens: Int[Array, "B beams M"]
    scores: Float[Array, "B beams"]
    texts: Int[Array, "B beams M"]
    lengths: Int[Array, "B beams"]
    best: Float[Array, "B beams"]
    open: Bool[Array, "B"]
    finite: Bool[Array, "B"]


def repeat(cache: caching.Cache, beams: int) -> caching.Cache:
    """The cache with every row `beams` times, side by side; whatever else it holds too."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=max(leaf.ndim - 4, 0)), cache)


def reorder(cache: caching.Cache, parents: Int[Array, "B beams"]) -> caching.Cache:
    """Every beam's keys and values replaced by those of one beam of its row. Beams of a row are equally long."""
    batch, beams = parents.shape

    def one(leaf: Float[Array, "*R rows K S H"]) -> Array:
        axis = leaf.ndim - 4
        split = leaf.reshape(*leaf.shape[:axis], batch, beams, *leaf.shape[axis + 1:])
        take = jax.vmap(lambda row, parents: jnp.take(row, parents, axis=axis), in_axes=(axis, 0), out_axes=axis)
        return take(split, parents).reshape(leaf.shape)
    return cache.replace(layers=jax.tree.map(one, cache.layers))


def ban_repeats(scores: Float[Array, "B beams V"], text: Int[Array, "B beams S"], end: Int[Array, ""],
                size: int) -> Float[Array, "B beams V"]:
    """-inf for every token that would complete a run of `size` tokens that the text already has.

    Args:
      text: -1 before its first token, and from `end` on.
    """
    windows = text.shape[-1] - size + 1
    suffix = jax.lax.dynamic_slice_in_dim(text, end - (size - 1), size - 1, axis=2)
    equal = jnp.ones((*text.shape[:2], windows), bool)
    for i in range(size - 1):
        equal = equal & (text[:, :, i:i + windows] == suffix[:, :, i:i + 1])
    last = text[:, :, size - 1:]
    banned = jnp.where(equal & (last >= 0), last, scores.shape[-1])  # out of range: dropped
    return jax.vmap(jax.vmap(lambda row, ids: row.at[ids].set(-jnp.inf, mode="drop")))(scores, banned)


def force(scores: Float[Array, "B beams V"], token: Int[Array, ""], when: Bool[Array, "#B"]) -> Float[Array, "B beams V"]:
    """In rows where `when`, a log-probability of 0 for this token and -inf for all others."""
    sure = jnp.where(jnp.arange(scores.shape[-1], dtype=jnp.int32) == token, 0.0, -jnp.inf)
    return jnp.where(when[:, None, None], sure[None, None], scores)


def process(scores: Float[Array, "B beams V"], request: Request, tokens: Int[Array, "B beams M"],
            count: Int[Array, ""]) -> Float[Array, "B beams V"]:
    """Log-probabilities of the next token after all that was asked: bans, then the least length, then forced tokens."""
    if request.bias is not None:
        scores = scores + request.bias[:, None]
    if request.ngram:
        before = jnp.broadcast_to(request.prompt[:, None], (*tokens.shape[:2], request.prompt.shape[1]))
        scores = ban_repeats(scores, jnp.concatenate([before, tokens], axis=2), before.shape[2] + count, request.ngram)
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    early = jnp.any(ids[:, None] == request.eos[None], axis=1)[None] & (count < request.minimum)[:, None]
    scores = jnp.where(early[:, None], -jnp.inf, scores)
    if request.first is not None:
        scores = force(scores, request.first, (count == 0)[None])
    if request.last is not None:
        scores = force(scores, request.last, count == request.limit - 1)
    return jax.nn.log_softmax(scores, axis=-1) if request.renormalise else scores


def _pick(entries: Array, index: Int[Array, "B n"]) -> Array:
    """Some of each row's entries."""
    return jax.vmap(lambda row, index: row[index])(entries, index)


def select(state: State, request: Request, logits: Float[Array, "B beams V"]) -> tuple[State, Int[Array, "B beams"]]:
    """Extends every row's beams by a token; also gives the beam that each of the new ones extends.

    The candidates are so many of the likeliest extensions that enough remain when all that can end a text do. Those among
    the first `beams` that end are finished texts, the likeliest others run on; ties go to the lower beam, then the lower id.
    """
    batch, beams, vocabulary = logits.shape
    count = state.count + 1
    logp = process(jax.nn.log_softmax(logits, axis=-1), request, state.tokens, state.count)
    total = (logp + state.scores[:, :, None]).reshape(batch, beams * vocabulary)
    kept = min(max(2, 1 + len(request.eos)) * beams, beams * vocabulary)
    scores, index = jax.lax.top_k(total, kept)
    parents, token = index // vocabulary, index % vocabulary
    tokens = jax.lax.dynamic_update_slice_in_dim(_pick(state.tokens, parents), token[:, :, None], state.count, axis=2)
    full = count >= request.limit
    ends = jnp.any(token[:, :, None] == request.eos[None, None], axis=2) | full[:, None]

    running, chosen = jax.lax.top_k(scores + jnp.where(ends, _NEVER, 0.0), beams)

    closed = ~state.open | (request.first_full & jnp.all(state.lengths > 0, axis=1))
    counts = ends & (jnp.arange(kept, dtype=jnp.int32) < beams)[None] & ~closed[:, None]
    final = jnp.where(counts, scores / request.penalty[:, state.count][:, None], _NEVER)
    best, places = jax.lax.top_k(jnp.concatenate([state.best, final], axis=1), beams)

    def merge(old: Array, new: Array) -> Array:
        return _pick(jnp.concatenate([old, new], axis=1), places)

    finite = jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)), axis=1)
    state = state.replace(
        count=count, tokens=_pick(tokens, chosen), scores=running, texts=merge(state.texts, tokens),
        lengths=merge(state.lengths, jnp.where(counts, count, 0)), best=best,
        open=state.open & ~full & (running[:, 0] / request.hope[:, state.count] > best[:, -1]), finite=state.finite & finite)
    return state, _pick(parents, chosen)


def begin(cache: caching.Cache, request: Request, logits: Float[Array, "B V"], beams: int) -> State:
    """The state after the prompts, their keys and values in the cache: the beams begin with the likeliest first tokens.

    Args:
      cache: a row per prompt.
      logits: after each prompt's last token.
    """
    batch, capacity = request.penalty.shape
    texts = jnp.full((batch, beams, capacity), -1, jnp.int32)
    none = jnp.full((batch, beams), _NEVER, jnp.float32)
    state = State(
        cache=repeat(cache, beams), count=jnp.zeros((), jnp.int32), tokens=texts,
        scores=none.at[:, 0].set(0.0),  # all beams are the same yet: only the first is extended
        texts=texts, lengths=jnp.zeros((batch, beams), jnp.int32), best=none,
        open=jnp.ones(batch, bool), finite=jnp.ones(batch, bool))
    return select(state, request, jnp.broadcast_to(logits[:, None], (batch, beams, logits.shape[1])))[0]


def run(step: Step, params: PyTree, state: State, request: Request) -> State:
    """Extends the beams until no row's finished texts can change, by the rule that was asked for."""
    def unfinished(state: State) -> Bool[Array, ""]:
        full = request.first_full & jnp.all(state.lengths > 0)
        return jnp.any(state.open) & ~full & jnp.all(state.finite)

    def advance(state: State) -> State:
        old, (batch, beams) = state.cache, state.scores.shape
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=2, keepdims=False)
        logits, kv = step(params, last.reshape(batch * beams, 1), old)
        state, parents = select(state, request, logits.reshape(batch, beams, -1))
        # As in `loop.run`: the write waits for every read of the cache. The minimum is 0; no compiler knows that.
        old = old.replace(length=old.length + jnp.minimum(parents.reshape(-1), 0))
        return state.replace(cache=reorder(caching.append(old, kv, jnp.ones_like(old.length)), parents))

    return jax.lax.while_loop(unfinished, advance, state)


@partial(jax.jit, static_argnames=("step", "slots"))
def _prefill(step: Forward, params: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], slots: int,
             source: Source | None, prefix: Int[Array, "B"] | None) -> tuple[caching.Cache, Float[Array, "B V"]]:
    return prefill(step, params, tokens, lengths, slots, source, prefix)[:2]


@partial(jax.jit, static_argnames=("step", "beams"))
def _search(step: Forward, params: PyTree, cache: caching.Cache, logits: Float[Array, "B V"], request: Request,
            beams: int) -> State:
    state = begin(cache, request, logits, beams)
    layers = caching.constrained(state.cache.layers)
    state = run(step, params, state.replace(cache=state.cache.replace(layers=layers)), request)
    return state.replace(cache=None)


@dataclasses.dataclass(frozen=True)
class Beams:
    """What a beam search found: `returned` texts for each prompt, the best first, prompt after prompt.

    Attributes:
      tokens: int32 arrays, the end-of-text token included where one was reached.
      text: decoded, without special tokens; None without a tokenizer.
      scores: float32 [prompts * returned], log-probability of the text divided by its tokens (with those of `start` behind the
        first) to the power of the length penalty.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    scores: np.ndarray


def _whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError("a truth value")
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if not low <= number <= high:
        raise ValueError(f"{name} must be {f'at least {low}' if high == math.inf else f'{low} to {high}'}, got {number}")
    return number


def divisors(length_penalty: Any, before: Int[np.ndarray, "B"], limit: int, capacity: int) -> Float[np.ndarray, "B M"]:
    """What scores of texts of 1, 2, ... M = `capacity` tokens are divided by, to which each row's tokens `before` count too;
    those beyond the limit are not used.

    Raises:
      ValueError: for a penalty that is no number, or one that makes a divisor overflow or vanish.
    """
    try:
        lengths = np.minimum(before[:, None] + np.arange(1, capacity + 1)[None], limit).astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            divisors = (lengths ** float(length_penalty)).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"length_penalty must be a number, got {length_penalty!r}") from error
    if not np.all((divisors > 1e-30) & (divisors < 1e30)):
        raise ValueError(f"length_penalty must be a number such that {limit} tokens to its power stay within 1e-30 and 1e30, "
                         f"got {length_penalty}")
    return divisors


def beam_search(model: Model, prompts: Any, max_new_tokens: int = 128, *, beams: int = 4, length_penalty: float = 1.0,
                early_stopping: bool | Literal["never"] = False, returned: int = 1, eos: Any = None,
                forced_first: int | None = None, forced_last: int | None = None, no_repeat_ngram: int = 0,
                min_new_tokens: int = 0, banned_tokens: Any = None, renormalise: bool = False, dtype: Any = None,
                start: Any = None, prefix: Any = None) -> Beams:
    """The likeliest continuations of each prompt, as far as a beam search finds them; an encoder-decoder reads it as its source
    and begins a text of its own.

    Args:
      prompts: a string, token ids, or a list of either.
      max_new_tokens: at least 1, the same for all rows. An encoder-decoder's tokens of `start` behind the first count as new,
        here, in `min_new_tokens` and for `length_penalty`, as forced first tokens do in transformers: so the same settings
        give the same texts and scores there.
      beams: how many beginnings of a text are kept at each step.
      length_penalty: scores are divided by the text's tokens (the end-of-text token among them, the prompt's not) to this
        power: above 0 favours long texts.
      early_stopping: True: a row ends when it has `beams` finished texts. False: when the likeliest running text, by its
        present length, is worse than all of them. "never": when it is by its best possible length, which finds the best.
      returned: how many texts per prompt, at most `beams`.
      eos: ids that end a text; default the tokenizer's, () for none.
      forced_first: a token that every text begins with.
      forced_last: a token that every text of `max_new_tokens` ends with.
      no_repeat_ngram: no run of so many tokens comes twice in prompt and text; 0 is off. Padding is no part of a prompt
        (in transformers it is).
      min_new_tokens: tokens before an id of `eos` may come.
      banned_tokens: ids never to emit, one list or one per row.
      renormalise: whether scores are log-probabilities among the tokens that may come, not among all (Marian's are).
      dtype: of the computation; default that of the weights.
      start: token ids that an encoder-decoder's text begins with, for all rows or for each; default the config's. They are
        not in the result; `no_repeat_ngram` sees them as a prompt.
      prefix: how much of its beginning all of a prompt may see, as `generate` takes it.

    Raises:
      ValueError: for bad input, named; or when logits are not finite.

    Reference: transformers 5.23, `GenerationMixin._beam_search`. Departs from it in what ties do, which is undefined there.
    """
    (rows, sources), cfg = started(model, prompts, start), model.decoder
    batch, vocabulary = len(rows), cfg.embedding.vocabulary
    limit = _whole("max_new_tokens", max_new_tokens, 1)
    before = counted(rows, sources, np.full(batch, limit))
    beams = _whole("beams", beams, 1, vocabulary)
    returned = _whole("returned", returned, 1, beams)
    ngram = _whole("no_repeat_ngram", no_repeat_ngram, 0)
    minimum = _whole("min_new_tokens", min_new_tokens, 0, limit)
    longest = max(len(row) for row in rows)
    total = limit + (longest if sources is None else 1)
    ngram = 0 if ngram >= total else ngram
    if total > cfg.length:
        named = f"a prompt has {longest} tokens" if sources is None else "a text's start has 1 token that does not count"
        raise ValueError(f"{named} and {limit} new ones were asked for: together more than the model's context of "
                         f"{cfg.length}; at most {cfg.length - total + limit} fit")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}')
    if eos is None:
        eos = () if model.tokenizer is None else model.tokenizer.eos_ids
    eos = sorted({token_id("eos", token, vocabulary) for token in several("eos", eos)})
    first, last = (None if token is None else jnp.asarray(token_id(name, token, vocabulary), jnp.int32)
                   for name, token in (("forced_first", forced_first), ("forced_last", forced_last)))

    capacity = bucket(limit)
    width = min(bucket(longest), cfg.length) if sources is None else prompt_width(rows, cfg.length)
    penalty = divisors(length_penalty, before, limit, capacity)
    hope = np.full_like(penalty, penalty.flat[-1]) if early_stopping == "never" and length_penalty > 0 else penalty
    prompt = np.full((batch, width), -1, np.int32)
    for i, row in enumerate(rows):
        prompt[i, width - len(row):] = row
    request = Request(
        jnp.asarray(limit - before, jnp.int32), jnp.asarray(eos, jnp.int32), jnp.asarray(penalty), jnp.asarray(hope),
        jnp.asarray(early_stopping is True), jnp.asarray(minimum - before, jnp.int32), first, last,
        biases_of(None, banned_tokens, batch, vocabulary), jnp.asarray(prompt) if ngram else None, ngram, renormalise)
    step, slots = Forward.of(model.config, dtype), max(slots_for(total, 0), width)
    tokens, lengths = map(jnp.asarray, padded(rows, width))
    source = None if sources is None else source_of(sources, model.config.encoder.length)
    seen = prefixes(prefix, rows, sources)
    with model.context():
        params = model.ready
        cache, logits = _prefill(step, params, tokens, lengths, slots, source, seen)
        state = jax.device_get(_search(step, params, cache, logits, request, beams))
    bad = np.flatnonzero(~state.finite)
    if len(bad):
        raise ValueError(f"the model's logits for row {bad[0]} are not finite after {state.count} tokens: its weights hold NaN "
                         "or infinite values, or overflow in this dtype")
    found = [state.texts[i, j, :state.lengths[i, j]] for i in range(batch) for j in range(returned)]
    text = None
    if model.tokenizer is not None:
        text = [model.tokenizer.decode(known(row, model.tokenizer), continued=sources is None) for row in found]
    return Beams(found, text, state.best[:, :returned].reshape(-1))

"""`generate`: from prompts to text, at once or in pieces as it comes.

Everything on the host is here: checking what was asked, padding prompts to a bucket of lengths, cutting the answer. On the
device there are two programs, the prefill and the loop, each compiled once per model, batch and bucket.
"""

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlm import cache as caching
from jaxlm import config, model
from jaxlm.decoding import loop, stop
from jaxlm.decoding.logits import Settings
from jaxlm.decoding.speculative import drafters, rules
from jaxlm.decoding.speculative import loop as speculation
from jaxlm.decoding.speculative.drafters.base import Drafter, Source, Start
from jaxlm.decoding.speculative.tree import Template
from jaxlm.decoding.speculative.verify import Rule
from jaxlm.layers import moe
from jaxlm.model import Model

_LARGEST = 1e30  # of temperatures, penalties and biases: larger ones may overflow in float32


@dataclasses.dataclass(frozen=True)
class Forward:
    """The loop's step function for a decoder: compared by value, so equal models share a compiled program. `whole` is the
    encoder-decoder that it is part of."""

    config: config.Decoder
    dtype: Any
    whole: config.EncoderDecoder | None = None

    @classmethod
    def of(cls, cfg: config.Config, dtype: Any) -> "Forward":
        """Of a decoder, or an encoder-decoder's. Its experts drop nothing: a text must not depend on how it is cut into calls.

        Raises:
          ValueError: for a decoder whose experts choose tokens.
        """
        cfg = config.dropless(cfg)
        made = cls(cfg.decoder, dtype, cfg) if isinstance(cfg, config.EncoderDecoder) else cls(cfg, dtype)
        for layer, block in enumerate(made.config.stack.blocks()):
            if isinstance(block.feedforward, config.Moe) and isinstance(block.feedforward.router, config.ExpertChoice):
                raise ValueError(f"block {layer} of the decoder has the router ExpertChoice: its experts choose among all the "
                                 "tokens of a text, so what comes of one depends on later ones and no text can be generated "
                                 "or scored; a decoder needs a router by which tokens choose, such as TopK")
        return made

    def __call__(self, params: PyTree, tokens: Int[Array, "B P"], cache: caching.Cache,
                 positions: Int[Array, "B P"] | None = None,
                 mask: Bool[Array, "B P P"] | None = None) -> tuple[Float[Array, "B P V"], PyTree]:
        """Logits after each of the P tokens and their keys and values; positions and mask are a tree's."""
        return self.verify(params, tokens, cache, positions, mask)[:2]

    def verify(self, params: PyTree, tokens: Int[Array, "B P"], cache: caching.Cache, positions: Int[Array, "B P"] | None,
               mask: Bool[Array, "B P P"] | None) -> tuple[Float[Array, "B P V"], PyTree, Float[Array, ""]]:
        """The same, and how many experts the tokens went to."""
        # Scalings that depend on how long the text is see what plain decoding would: up to the token itself.
        out = model.forward(params, self.config, tokens, positions=positions, mask=mask, cache=cache, dtype=self.dtype,
                            context=cache.length + 1)
        return out.logits, out.kv, moe.touched(out.routing)


def bucket(length: int, smallest: int = 16) -> int:
    """The next length for which programs are compiled: four to an octave, so at most a quarter is padding.

    Example:
      >>> [bucket(n) for n in (1, 17, 33, 200, 800)]
      [16, 20, 40, 224, 896]
    """
    if length <= smallest:
        return smallest
    step = 2 ** (math.ceil(math.log2(length)) - 3)
    return -(-length // step) * step


_DIGEST_BYTES = 1 << 28  # of logits at a time, where a drafter reads the prompt's


def _digest(step: Forward, params: PyTree, drafter: Drafter, last: Float[Array, "B T D"]) -> PyTree:
    """The drafter's digest of the logits after every prompt token, a few tokens at a time."""
    batch, length, width = last.shape
    most = max(_DIGEST_BYTES // (4 * batch * step.config.embedding.vocabulary), 1)
    parts = -(-length // min(length, most))
    size = -(-length // parts)
    pieces = jnp.pad(last, ((0, 0), (0, parts * size - length), (0, 0))).reshape(batch, parts, size, width)
    digests = jax.lax.map(lambda piece: drafter.digest(model.logits(params, step.config, piece)), pieces.swapaxes(0, 1))
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(batch, parts * size, *leaf.shape[3:])[:, :length], digests)


def slots_for(tokens: int, slack: int) -> int:
    """Slots of a cache whose rows hold so many tokens, and behind the last one `slack` more that a call writes."""
    return bucket(tokens + slack, 64)


Types = tuple[type, ...]


def _types(tree: PyTree) -> Types:
    """The classes of all nodes of a tree, which `jax.jit` should tell apart and does not always.

    Trees of two dataclasses with equal fields compare equal (jaxlib 0.10): only their hashes differ, so about one time in a
    hundred a program that was compiled for one of two drafters would be run for the other.
    """
    def walk(node: Any) -> Types:
        data = node.node_data()
        return (() if data is None else (data[0],)) + sum(map(walk, node.children()), ())
    return walk(jax.tree.structure(tree))


def begin(step: Forward, params: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], slots: int,
          source: Source | None = None, prefix: Int[Array, "B"] | None = None
          ) -> tuple[caching.Cache, Float[Array, "B V"], Float[Array, "B T D"], caching.Memory | None]:
    """A cache of so many slots that holds the prompts, and the layers' keys and values of the sources; the logits after each
    prompt's last token; what the head reads of every one; and what the encoder made of the sources.

    Args:
      prefix: how many tokens of its beginning all of a prompt may see.
    """
    encoded = memory = None
    if step.whole is not None:
        encoded = model.encode(params, step.whole, source.tokens, lengths=source.lengths, dtype=step.dtype)
        memory = model.remember(params, step.whole, encoded)
        memory = memory.replace(layers=caching.constrained(memory.layers))
    out = model.forward(params, step.config, tokens, lengths=lengths, context=lengths, at=lengths[:, None] - 1,
                        dtype=step.dtype, memory=memory, prefix=prefix)
    cache = caching.filled(out.kv, slots, lengths, memory)
    return cache.replace(layers=caching.constrained(cache.layers)), out.logits[:, 0], out.last, encoded


@partial(jax.jit, static_argnames=("step", "slots", "capacity", "logprobs", "types"))
def _prefill(step: Forward, params: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], request: loop.Request,
             slots: int, capacity: int, logprobs: bool, drafter: Drafter | None = None, kept: PyTree = None,
             types: Types = (), source: Source | None = None,
             prefix: Int[Array, "B"] | None = None) -> loop.State | speculation.State:
    cache, logits, last, encoded = begin(step, params, tokens, lengths, slots, source, prefix)
    state = loop.begin(cache, request, logits, capacity, logprobs)
    if drafter is None:
        return state
    digest = _digest(step, params, drafter, last) if drafter.reads_prompt else None
    words = None if step.whole is None else step.whole.encoder.embedding.vocabulary
    start = Start(tokens, lengths, digest, slots, step.config.embedding.vocabulary, source, encoded, words, prefix)
    drafted = drafter.init(start, kept)
    return speculation.begin(state, tokens, drafter, drafted)


@partial(jax.jit, static_argnames=("step", "rule", "types"), donate_argnames=("state",))
def _run(step: Forward, params: PyTree, state: loop.State | speculation.State, request: loop.Request, steps: Int[Array, ""],
         drafter: Drafter | None = None, rule: Rule | None = None, types: Types = ()) -> loop.State | speculation.State:
    if drafter is None:
        return loop.run(step, params, state, request, steps)
    return speculation.run(step.verify, rule, drafter, params, state, request, steps)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds: `compile` both programs (next to 0 when known) and measure calls for "auto", `prefill` to every row's
    first token, `decode` the rest."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass(frozen=True)
class Speculation:
    """What speculation did, a row per prompt.

    Attributes:
      calls: int [B], calls of the target after the prefill in which the row was not yet done.
      emitted: int [B, D + 1], how many of them gave 1, 2, ... D + 1 tokens.
      sizes: {nodes of the verified tree: int [B], calls}.
      exact: "tokens" where the rule gives plain decoding's tokens, "distribution" where it draws from the same distribution,
        "lossy" where neither holds.
      state: what the drafter keeps for a later request: `generate(..., drafter_state=...)`.
      experts: how many experts of a layer a call touched, with the nodes of all rows together: the mean over calls and the
        layers that have some; 0 without calls, None where the model has no mixture of experts.
    """

    calls: np.ndarray
    emitted: np.ndarray
    sizes: dict[int, np.ndarray]
    exact: str
    state: PyTree
    experts: float | None = None

    @property
    def tokens_per_call(self) -> np.ndarray:
        """float [B], mean tokens that a call of the target gave each row; 0 for rows without calls."""
        tokens = self.emitted @ np.arange(1, self.emitted.shape[1] + 1)
        return tokens / np.maximum(self.calls, 1)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, a row per prompt.

    Attributes:
      tokens: int32 arrays, the end-of-text token included where one was reached.
      text: decoded, without special tokens, cut before a stop string; None without a tokenizer.
      finish: "eos", "stop" or "length" for each row.
      logprobs: of each token under the model itself (before temperature, filters and penalties), or None.
      prompt_tokens: how many tokens each prompt has, or source.
      seconds: what it took.
      speculation: what a drafter did, or None.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    finish: list[str]
    logprobs: list[np.ndarray] | None
    prompt_tokens: list[int]
    seconds: Seconds
    speculation: Speculation | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first of each row, per second of decoding; 0 where there are none."""
        later = sum(max(len(row) - 1, 0) for row in self.tokens)
        return later / self.seconds.decode if later else 0.0


def _rows(name: str, value: Any, batch: int, low: float, high: float, off: float, kind: Any, open_low: bool = False) -> Any:
    """A setting as an array [B], or None where every row has it off. Whole numbers are cut to `high`."""
    try:
        values = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be one number or one per row ({batch}), got {value!r}") from error
    if kind == jnp.int32:
        if np.any(values % 1):
            raise ValueError(f"{name} must be a whole number, got {value}")
        values = np.minimum(values, high)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise ValueError(f"{name} must be one number or one per row ({batch}), got shape {values.shape}")
    good = (values > low if open_low else values >= low) & (values <= high)
    if not np.all(good):
        bracket = "(" if open_low else "["
        wrong = values[~good].flat[0] if values.ndim else value
        raise ValueError(f"{name} must be in {bracket}{low:g}, {high:g}], got {wrong}")
    if np.all(values == off):
        return None
    return jnp.asarray(np.broadcast_to(values, batch), kind)


def _stops(stop_strings: Any, batch: int) -> tuple[tuple[str, ...], ...]:
    """Every row's stop strings."""
    try:
        if stop_strings is not None and all(isinstance(string, str) for string in stop_strings):
            stop_strings = [stop_strings] * batch
        rows = _per_row("stop_strings", stop_strings, batch, ())
        rows = tuple((row,) if isinstance(row, str) else tuple(row or ()) for row in rows)
        wrong = [string for row in rows for string in row if not isinstance(string, str)]
    except TypeError:
        wrong = [stop_strings]
    if wrong:
        raise ValueError(f"stop_strings must be a string, a list of strings or a list of them per row, got {wrong[0]!r}")
    return rows


def _per_row(name: str, value: Any, batch: int, single: type | tuple[()]) -> list[Any]:
    """A value for every row, or one value per row, as a list."""
    if value is None or isinstance(value, single):
        return [value] * batch
    value = list(value)
    if len(value) != batch:
        raise ValueError(f"{name} must be given once or once per row ({batch}), got {len(value)}")
    return value


def token_id(name: str, token: Any, vocabulary: int) -> int:
    """A token id that the model has."""
    try:
        if isinstance(token, (bool, np.bool_)):
            raise TypeError("a truth value")
        token = operator.index(token)
    except TypeError as error:
        raise ValueError(f"{name} must hold token ids, whole numbers, got {token!r}") from error
    if not 0 <= token < vocabulary:
        raise ValueError(f"{name} holds token id {token}, out of range: 0 to {vocabulary - 1}")
    return token


def several(name: str, value: Any) -> list[Any]:
    """One id or several, as a list."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, (str, bytes)) or not isinstance(value, (int, Iterable)):
        raise ValueError(f"{name} must be a token id or a list of them, got {value!r}")
    return [value] if isinstance(value, int) else list(value)


def biases_of(logit_bias: Any, banned: Any, batch: int, vocabulary: int) -> Float[Array, "B V"] | None:
    """What is added to the logits for `generate`'s logit_bias and banned_tokens; None for neither.

    Raises:
      ValueError: for what is neither once nor once per row, ids out of range, or a row without a token left.
    """
    if logit_bias is not None and not isinstance(logit_bias, (Mapping, list, tuple)):
        raise ValueError(f"logit_bias must be {{token id: number}}, once or once per row, got {logit_bias!r}")
    biases = _per_row("logit_bias", logit_bias, batch, Mapping)
    if not all(row is None or isinstance(row, Mapping) for row in biases):
        raise ValueError(f"logit_bias must be {{token id: number}}, once or once per row, got {logit_bias!r}")
    bans = [] if banned is None else several("banned_tokens", banned)
    if all(np.ndim(ban) == 0 and ban is not None for ban in bans):
        bans = [bans] * batch
    if len(bans) != batch:
        raise ValueError(f"banned_tokens must be one list of ids or one per row ({batch}), got {len(bans)}")
    if not any(biases) and not any(row is not None and len(row) for row in bans):
        return None
    bias = np.zeros((batch, vocabulary), np.float32)
    for row, (values, ban) in enumerate(zip(biases, bans, strict=True)):
        for token, value in (values or {}).items():
            if not isinstance(value, (int, float, np.number)) or not value <= _LARGEST:
                raise ValueError(f"logit_bias of token {token} must be a number up to {_LARGEST:g}, got {value!r}")
            bias[row, token_id("logit_bias", token, vocabulary)] += value if value >= -_LARGEST else -math.inf
        for token in () if ban is None else several("banned_tokens", ban):
            bias[row, token_id("banned_tokens", token, vocabulary)] = -math.inf
        if np.all(np.isneginf(bias[row])):
            raise ValueError(f"row {row} bans every token of the vocabulary")
    return jnp.asarray(bias)


def listed(prompts: Any) -> list[Any]:
    """A string, token ids, or a list of either, as a list with an item for each prompt.

    Raises:
      ValueError: for anything else, and for no prompts.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise ValueError(f"prompts must be text, token ids or a list of either, got {prompts!r}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts and not isinstance(prompts[0], (str, Mapping)) and np.ndim(prompts[0]) == 0 and prompts[0] is not None:
        prompts = [prompts]
    if not prompts:
        raise ValueError("no prompts were given: a batch of zero rows has nothing to generate")
    return prompts


def encode(model: Model, prompts: Any, written: bool = False) -> list[list[int]]:
    """Token ids of every prompt: a string, token ids, or a list of either. Of an encoder-decoder these are sources.

    Args:
      written: they are what an encoder-decoder's decoder is to have written; a string ends with the tokenizer's `eos_id`, and
        has no other special tokens around it.

    Raises:
      ValueError: for no prompts, a prompt without tokens, one longer than the context, ids out of range, or text without a
        tokenizer; names the prompt.
    """
    cfg = model.config
    if isinstance(cfg, config.EncoderDecoder):
        cfg = cfg.decoder if written else cfg.encoder
    rows = []
    for i, prompt in enumerate(listed(prompts)):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError("the model has no tokenizer: give prompts as lists of token ids")
            prompt = _written(model.tokenizer, prompt) if written else model.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            raise ValueError("prompts are text or token ids, not messages: write a conversation as text with "
                             "model.tokenizer.chat(messages), and encode that with add_special=False")
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
            raise ValueError(f"prompt {i} must be text or token ids, got {prompt!r}")
        row = [token_id(f"prompt {i}", token, cfg.embedding.vocabulary) for token in prompt]
        if not row:
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if len(row) > cfg.length:
            raise ValueError(f"prompt {i} has {len(row)} tokens, the model's context is {cfg.length}")
        rows.append(row)
    return rows


def _written(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that a decoder writes."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [*(tokenizer.target or tokenizer).encode(text, add_special=False), *end]


def started(model: Model, prompts: Any, start: Any) -> tuple[list[list[int]], list[list[int]] | None]:
    """What every row of the decoder's begins with, and the encoder's sources: the prompts themselves and None without encoder.

    Args:
      start: token ids that an encoder-decoder's text begins with, for all rows or for each; None is the config's.

    Raises:
      ValueError: as `encode`; for a start that holds no token ids, is empty, or comes with a decoder-only model.
    """
    rows, cfg = encode(model, prompts), model.config
    if not isinstance(cfg, config.EncoderDecoder):
        if start is not None:
            raise ValueError("start is for encoder-decoders; a decoder's text begins with its prompt")
        return rows, None
    start = cfg.start if start is None else start
    if isinstance(start, (str, bytes)) or not isinstance(start, Iterable):
        raise ValueError(f"start must be a list of token ids, or one for each row, got {start!r}")
    starts = list(start)
    if all(np.ndim(one) == 0 for one in starts):
        starts = [starts] * len(rows)
    starts = [[token_id("start", token, cfg.decoder.embedding.vocabulary) for token in one]
              for one in _per_row("start", starts, len(rows), ())]
    if not all(starts):
        raise ValueError("start is empty: a decoder's text begins with at least one token")
    return starts, rows


def counted(starts: Sequence[Sequence[int]], sources: Any, limits: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """How many of each row's new tokens an encoder-decoder's start has: all but its first one. None of a decoder's prompt.

    Raises:
      ValueError: where none is left to be chosen.
    """
    before = np.array([0 if sources is None else len(row) - 1 for row in starts])
    full = np.flatnonzero(limits <= before)
    if len(full):
        row = full[0]
        raise ValueError(f"row {row}: max_new_tokens counts the {before[row]} tokens of start behind the first: it must be at "
                         f"least {before[row] + 1}, got {limits[row]}")
    return before


def prefixes(prefix: Any, rows: Sequence[Sequence[int]], sources: Any) -> Int[Array, "B"] | None:
    """How many tokens of its beginning all of each row may see; None where all rows are read from left to right.

    Args:
      prefix: True is all of a row, False or None nothing.

    Raises:
      ValueError: for what is neither True nor a number of tokens that the row has, once or once per row; names the row. And for
        an encoder-decoder.
    """
    if hasattr(prefix, "__array__"):
        prefix = np.asarray(prefix).tolist()
    if prefix is None or prefix is False:
        return None
    if sources is not None:
        raise ValueError("prefix is for decoders: an encoder-decoder's encoder sees all of its source")
    if not isinstance(prefix, (bool, int, Sequence)) or isinstance(prefix, (str, bytes)):
        raise ValueError(f"prefix must be True, a number of tokens, or one of them per row, got {prefix!r}")
    found = []
    for i, (row, one) in enumerate(zip(rows, _per_row("prefix", prefix, len(rows), (bool, int)), strict=True)):
        one = len(row) * one if isinstance(one, (bool, np.bool_)) else one
        if not isinstance(one, (int, np.integer)) or not 0 <= one <= len(row):
            raise ValueError(f"the prefix of prompt {i} must be True or a whole number from 0 to its {len(row)} tokens, got "
                             f"{one!r}")
        found.append(one)
    return jnp.asarray(found, jnp.int32) if any(found) else None


def padded(rows: Sequence[Sequence[int]], width: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Rows side by side, zeros behind them, and their lengths."""
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def source_of(rows: Sequence[Sequence[int]] | None, longest: int) -> Source | None:
    """Sources of up to `longest` tokens as arrays."""
    if rows is None:
        return None
    tokens, lengths = padded(rows, min(bucket(max(map(len, rows))), longest))
    return Source(jnp.asarray(tokens), jnp.asarray(lengths))


def prompt_width(rows: Sequence[Sequence[int]], longest: int) -> int:
    """To how many tokens prompts are padded: a decoder that has only begun is not padded to a prompt's usual length."""
    most = max(map(len, rows))
    return min(most if most < 4 else bucket(most, 4), longest)


def row_keys(key: Any, batch: int) -> Key[Array, "B"]:
    """A key per row: given ones as they are; row i of one key or seed gets fold_in(key, i), whatever the batch."""
    if isinstance(key, (int, np.integer)):
        if not 0 <= key < 2**32:
            raise ValueError(f"a seed must be 0 to 2**32 - 1, got {key}")
        key = jax.random.key(int(key))
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be a seed or made by jax.random.key, got {key!r}")
    if key.ndim:
        if key.shape != (batch,):
            raise ValueError(f"there must be one key or one per row ({batch}), got {key.shape}")
        return key
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))


@functools.lru_cache(maxsize=8)
def _automaton(stops: tuple[tuple[str, ...], ...], tokenizer: Any, vocabulary: int) -> stop.Automaton:
    spoken, special = tokenizer.token_bytes(), {}
    for string in {string for row in stops for string in row}:
        ids = tokenizer.encode(string, add_special=False) if string else []
        if len(ids) == 1 and not spoken[ids[0]] and tokenizer.decode(ids, skip_special=False) == string:
            special[string] = ids[0]
    return stop.automaton(stops, spoken, vocabulary, special)


class _Job:
    """A checked request on its way through prefill and loop."""

    def __init__(self, model: Model, prompts: Any, *, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any,
                 min_p: Any, typical_p: Any, repetition_penalty: Any, presence_penalty: Any, frequency_penalty: Any,
                 logit_bias: Any, banned_tokens: Any, stop_strings: Any, eos: Any, key: Any, logprobs: bool, dtype: Any,
                 drafter: Any, rule: Any, tree: Any, drafter_state: Any, start: Any, prefix: Any):
        cfg = model.decoder
        self.model, (self.rows, self.sources) = model, started(model, prompts, start)
        Forward.of(model.config, None)  # before anything is measured
        batch, vocabulary = len(self.rows), cfg.embedding.vocabulary
        try:
            limits = np.asarray(max_new_tokens)
        except ValueError as error:
            raise ValueError(f"max_new_tokens must be one number or one per row, got {max_new_tokens}") from error
        if limits.dtype.kind not in "iu" or limits.ndim > 1 or (limits.ndim and len(limits) != batch) or np.any(limits < 1):
            raise ValueError(f"max_new_tokens must be a positive integer, or one per row ({batch}), got {max_new_tokens}")
        limits = np.broadcast_to(limits, batch)
        before = counted(self.rows, self.sources, limits)
        for i, (row, limit) in enumerate(zip(self.rows, limits, strict=True)):
            room = cfg.length - len(row) + before[i]
            if limit > room:
                named = f"prompt {i} has {len(row)} tokens" if self.sources is None else (
                    f"the start of row {i} has 1 token that does not count")
                raise ValueError(f"{named} and {limit} new ones were asked for: together more than the model's context of "
                                 f"{cfg.length}; at most {room} fit")
        self.limits = limits - before
        self.prefix = prefixes(prefix, self.rows, self.sources)
        number = partial(_rows, batch=batch)
        settings = Settings(
            temperature=number("temperature", temperature, low=0, high=_LARGEST, off=0, kind=jnp.float32),
            top_k=number("top_k", vocabulary if top_k is None else top_k, low=1, high=vocabulary, off=vocabulary,
                         kind=jnp.int32),
            top_p=number("top_p", top_p, low=0, high=1, off=1, kind=jnp.float32, open_low=True),
            min_p=number("min_p", min_p, low=0, high=1, off=0, kind=jnp.float32),
            typical_p=number("typical_p", typical_p, low=0, high=1, off=1, kind=jnp.float32, open_low=True),
            repetition=number("repetition_penalty", repetition_penalty, low=0, high=_LARGEST, off=1, kind=jnp.float32,
                              open_low=True),
            presence=number("presence_penalty", presence_penalty, low=-_LARGEST, high=_LARGEST, off=0, kind=jnp.float32),
            frequency=number("frequency_penalty", frequency_penalty, low=-_LARGEST, high=_LARGEST, off=0, kind=jnp.float32),
            bias=biases_of(logit_bias, banned_tokens, batch, vocabulary))
        if settings.temperature is None:  # filters never change an argmax
            settings = settings.replace(top_k=None, top_p=None, min_p=None, typical_p=None)
        if eos is None:
            eos = () if model.tokenizer is None else model.tokenizer.eos_ids
        self.eos = eos = tuple(token_id("eos", token, vocabulary) for token in several("eos", eos))
        self.stops = _stops(stop_strings, batch)
        automaton = None
        if any(self.stops):
            if model.tokenizer is None:
                raise ValueError("stop strings need a tokenizer, the model has none")
            automaton = _automaton(self.stops, model.tokenizer, vocabulary)
        prompted = None
        if settings.repetition is not None:
            prompted = np.zeros((batch, vocabulary), bool)
            for i, row in enumerate(self.rows):
                prompted[i, row] = True
            prompted = jnp.asarray(prompted)
        self.request = loop.Request(row_keys(key, batch), jnp.asarray(self.limits, jnp.int32),
                                    jnp.asarray([*eos, *[-1] * (-len(eos) % 4)], jnp.int32), settings, prompted, automaton)
        try:
            self.dtype = None if dtype is None else jnp.dtype(dtype)
        except TypeError as error:
            raise ValueError(f"dtype must be a floating-point type like jnp.bfloat16, got {dtype!r}") from error
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating-point type like jnp.bfloat16, got {dtype!r}")
        self.logprobs = logprobs
        self.drafter, self.rule, self.kept, self.made = None, None, drafter_state, 0.0
        if drafter is not None and drafter != "none":
            began = time.perf_counter()
            self.drafter = drafters.make(drafter, tree, model, batch, self.dtype, rules.needed(rules.find(rule)))
            self.made = time.perf_counter() - began
            self.rule = rules.make(rule, self.drafter)
            if drafter_state is not None:
                _check_kept(self.drafter, drafter_state, vocabulary)
        elif rule is not None or tree is not None or drafter_state is not None:
            raise ValueError("rule, tree and drafter_state are for speculation: name a drafter with them")

    def run(self, segment: int | None) -> Iterator[tuple[loop.State | speculation.State, Seconds]]:
        """The state after the prefill, then after each segment of the loop (None: one), with the seconds spent so far."""
        rows, cfg = self.rows, self.model.decoder
        width = min(bucket(max(map(len, rows))), cfg.length) if self.sources is None else prompt_width(rows, cfg.length)
        capacity = bucket(int(max(self.limits)))
        slack = 0 if self.drafter is None else self.drafter.depth  # a call writes so much behind the last token
        slots = slots_for(max(len(row) + int(limit) for row, limit in zip(rows, self.limits, strict=True)), slack)
        slots = max(slots, width)
        tokens, lengths = padded(rows, width)
        source = None if self.sources is None else source_of(self.sources, self.model.config.encoder.length)
        step, types = Forward.of(self.model.config, self.dtype), _types(self.drafter)
        params = self.model.ready
        with self.model.context():
            arguments = (step, params, jnp.asarray(tokens), jnp.asarray(lengths), self.request, slots, capacity, self.logprobs,
                         self.drafter, self.kept, types, source, self.prefix)
            spent = Seconds(compile=self.made + self._compile(_prefill, arguments))
            began = time.perf_counter()
            state = jax.block_until_ready(_prefill(*arguments))
            spent = dataclasses.replace(spent, prefill=time.perf_counter() - began)
            yield state, spent
            steps = jnp.asarray(capacity if segment is None else segment, jnp.int32)
            while not np.all(np.asarray(_plain(state).done)):
                arguments = (step, params, state, self.request, steps, self.drafter, self.rule, types)
                # For every segment: on a mesh the loop may give back its state split in another way than it took it.
                spent = dataclasses.replace(spent, compile=spent.compile + self._compile(_run, arguments))
                began = time.perf_counter()
                state = jax.block_until_ready(_run(*arguments))
                spent = dataclasses.replace(spent, decode=spent.decode + time.perf_counter() - began)
                yield state, spent

    def _compile(self, program: Any, arguments: tuple[Any, ...]) -> float:
        """Seconds to compile the program for these arguments: 0 where this model's has been, with nothing looked up."""
        def look(leaf: Any) -> Any:
            return (leaf.shape, leaf.dtype, leaf.sharding) if isinstance(leaf, jax.Array) else leaf

        step, params, *rest = arguments
        leaves, tree = jax.tree.flatten(rest)
        key = (program, step, tree, *map(look, leaves))
        if key in self.model.compiled:
            return 0.0
        began = time.perf_counter()
        program.lower(*arguments).compile()
        self.model.compiled.add(key)
        return time.perf_counter() - began

    def check(self, state: loop.State | speculation.State) -> None:
        state = _plain(state)
        bad = np.flatnonzero(~np.asarray(state.finite))
        if len(bad):
            raise ValueError(f"the model's logits for row {bad[0]} are not finite after {int(state.count[bad[0]])} tokens: "
                             "its weights hold NaN or infinite values, or overflow in this dtype")

    def result(self, state: loop.State | speculation.State, spent: Seconds) -> Generation:
        self.check(state)
        speculated, state = self._speculation(state), _plain(state)
        tokens, count = np.asarray(state.tokens), np.asarray(state.count)
        emitted = [tokens[i, :count[i]] for i in range(len(self.rows))]
        text, finish = None, []
        if self.model.tokenizer is not None:
            continued = self.sources is None
            text = [self.model.tokenizer.decode(known(row, self.model.tokenizer), continued=continued) for row in emitted]
        stopped = (np.zeros(len(emitted), bool) if state.stop is None
                   else np.asarray(self.request.automaton.found)[np.asarray(state.stop)])
        for i, row in enumerate(emitted):
            if stopped[i]:
                text[i] = text[i][:_cut(text[i], self.stops[i])]
            finish.append("eos" if len(row) and int(row[-1]) in self.eos else "stop" if stopped[i] else "length")
        logprobs = None if state.logprobs is None else [np.asarray(state.logprobs)[i, :n] for i, n in enumerate(count)]
        return Generation(emitted, text, finish, logprobs,
                          [len(row) for row in self.sources or self.rows], spent, speculated)

    def _speculation(self, state: loop.State | speculation.State) -> Speculation | None:
        if self.drafter is None:
            return None
        emitted, sizes = np.asarray(state.emitted), np.asarray(state.sizes)
        experts = None
        if any(isinstance(block.feedforward, config.Moe) for block in self.model.decoder.stack.blocks()):
            experts = float(state.experts) / max(int(emitted.sum(axis=1).max()), 1)  # the longest row is in every call
        return Speculation(emitted.sum(axis=1), emitted, dict(zip(self.drafter.sizes, sizes.T, strict=True)), self.rule.exact,
                           self.drafter.keep(state.drafter), experts)


def _check_kept(drafter: Drafter, kept: PyTree, vocabulary: int) -> None:
    """Raises:
      ValueError: for a state that is not one that such a drafter keeps.
    """
    def fresh() -> PyTree:
        width = bucket(1)
        digest = drafter.digest(jnp.zeros((1, width, vocabulary), jnp.float32)) if drafter.reads_prompt else None
        start = Start(jnp.zeros((1, width), jnp.int32), jnp.ones(1, jnp.int32), digest, bucket(1, 64), vocabulary)
        return drafter.keep(drafter.init(start, None))

    def look(tree: PyTree) -> Any:
        leaves, shape = jax.tree.flatten(tree)
        return shape, [(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves]

    wanted = () if type(drafter).keep is Drafter.keep else jax.eval_shape(fresh)
    name = type(drafter).__name__
    if not jax.tree.leaves(wanted) and jax.tree.leaves(kept):
        raise ValueError(f"{name} keeps nothing from request to request: leave out drafter_state")
    if look(wanted) != look(kept):
        raise ValueError(f"this drafter_state is not one that such a {name} left with a vocabulary of {vocabulary}")


def _plain(state: loop.State | speculation.State) -> loop.State:
    return state.plain if isinstance(state, speculation.State) else state


def known(tokens: np.ndarray, tokenizer: Any) -> list[int]:
    """Without the ids that only the model has: embeddings are often padded to a round size."""
    return tokens[tokens < tokenizer.size].tolist()


class _Pieces:
    """Cuts the growing text of every row into pieces that can no longer change."""

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]], continued: bool):
        self.tokenizer, self.streams = tokenizer, [tokenizer.stream(continued=continued) for _ in stops]
        self.stops = stops
        self.text, self.seen, self.shown = [""] * len(stops), [0] * len(stops), [0] * len(stops)

    def _show(self, row: int, end: int) -> str:
        end = max(self.shown[row], end)
        piece = self.text[row][self.shown[row]:end]
        self.shown[row] = end
        return piece

    def push(self, tokens: np.ndarray, count: np.ndarray) -> list[str]:
        out = []
        for i, stream in enumerate(self.streams):
            self.text[i] += stream.push(known(tokens[i, self.seen[i]:count[i]], self.tokenizer))
            self.seen[i] = int(count[i])
            held = max((len(string) - 1 for string in self.stops[i]), default=0)
            out.append(self._show(i, min(len(self.text[i]) - held, _cut(self.text[i], self.stops[i]))))
        return out

    def finish(self, text: Sequence[str]) -> list[str]:
        self.text = list(text)
        return [self._show(i, len(row)) for i, row in enumerate(text)]


def _cut(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins, or the text's length."""
    return min((at for string in stops if (at := text.find(string)) >= 0), default=len(text))


def generate(model: Model, prompts: Any, max_new_tokens: Any = 128, *, temperature: Any = 0.0, top_k: Any = None,
             top_p: Any = 1.0, min_p: Any = 0.0, typical_p: Any = 1.0, repetition_penalty: Any = 1.0,
             presence_penalty: Any = 0.0, frequency_penalty: Any = 0.0, logit_bias: Any = None, banned_tokens: Any = None,
             stop_strings: Any = None, eos: Any = None, key: Any = 0, logprobs: bool = False, dtype: Any = None,
             drafter: str | Drafter | Model | None = None, rule: str | Rule | None = None, tree: int | Template | None = None,
             drafter_state: PyTree = None, start: Any = None, prefix: Any = None,
             on_text: Callable[[list[str]], None] | None = None, segment: int = 16) -> Generation:
    """Continues each prompt; an encoder-decoder reads it as its source and begins a text of its own.

    Every number may be given per row. With the same key a row's text is the same whatever rows are beside it, and whatever
    drafts it: only with a `rule` that is not "match" does it depend on the drafts too.

    Args:
      prompts: a string, token ids, or a list of either.
      max_new_tokens: at least 1. Of an encoder-decoder the tokens of `start` behind the first count too, as forced first tokens
        do in transformers.
      temperature: 0 (greedy) takes the likeliest token, ties to the lowest id.
      top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty: see
        `jaxlm.decoding.logits.Settings`.
      logit_bias: {token id: what is added to its logit}, -inf (or less than -1e30) to ban.
      banned_tokens: ids never to emit.
      stop_strings: a string, or a list for all rows, or a list of lists; a row ends at the token that completes one.
      eos: ids that end a row; default the tokenizer's, () for none.
      key: a seed, a `jax.random.key`, or one key per row.
      logprobs: also return every token's log-probability.
      dtype: of the computation; default that of the weights.
      drafter: speculates: a name ("lookup", "recycling", "aded", several joined by "+", "auto", "layers:12": see
        `jaxlm.decoding.speculative.drafters.make`), a smaller model of the same vocabulary (with an encoder of its own, or
        attending to what the target's made of the source), or a drafter. None decodes plainly.
      rule: of acceptance, a name or a rule of `jaxlm.decoding.speculative.rules`; default "match", which gives the tokens of
        plain decoding.
      tree: how many nodes a drafted tree has, or its `Template`; default the drafter's own.
      drafter_state: what an earlier request's `speculation.state` left: a warm start.
      start: token ids that an encoder-decoder's text begins with (a language's, say), for all rows or for each; default the
        config's. The result's tokens are those that follow.
      prefix: True lets all tokens of a prompt see each other, as a prefix language model or UniXcoder's encoder-decoder mode
        does; a number lets its first tokens be seen by all. What follows is causal, and so is everything by default.
      on_text: called after the prefill and then every `segment` steps with each row's new text. The pieces add up to the
        result's text: what may yet turn out to begin a stop string, or lacks bytes of a character, is held back.
      segment: steps of the loop between two looks of the host; only with `on_text`.

    Raises:
      ValueError: for bad input, named; when logits are not finite; or for a decoder whose experts choose tokens.
    """
    if on_text is not None and model.tokenizer is None:
        raise ValueError("streaming text needs a tokenizer, the model has none")
    if segment < 1:
        raise ValueError(f"segment must be at least 1 step, got {segment}")
    job = _Job(model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
               typical_p=typical_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
               frequency_penalty=frequency_penalty, logit_bias=logit_bias, banned_tokens=banned_tokens,
               stop_strings=stop_strings, eos=eos, key=key, logprobs=logprobs, dtype=dtype, drafter=drafter, rule=rule,
               tree=tree, drafter_state=drafter_state, start=start, prefix=prefix)
    pieces = None if on_text is None else _Pieces(model.tokenizer, job.stops, job.sources is None)
    for state, spent in job.run(None if on_text is None else segment):  # noqa: B007 (the last is the result's)
        job.check(state)
        if pieces is not None:
            on_text(pieces.push(np.asarray(_plain(state).tokens), np.asarray(_plain(state).count)))
    result = job.result(state, spent)
    if pieces is not None:
        on_text(pieces.finish(result.text))
    return result

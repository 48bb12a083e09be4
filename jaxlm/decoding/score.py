"""`score`: the log-probability of every token of a text under the model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import config, model
from jaxlm.decoding.generate import Forward, Source, bucket, encode, padded, prefixes, source_of, started
from jaxlm.layers import embed
from jaxlm.model import Model

CHUNK = 128  # tokens, of all rows together, whose logits exist at once


@partial(jax.jit, static_argnames=("step",))
def _score(step: Forward, params: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"],
           source: Source | None, prefix: Int[Array, "B"] | None) -> Float[Array, "B T"]:
    """The log-probability of token t + 1 at place t; junk at the last."""
    memory = None
    if step.whole is not None:
        memory = model.encode(params, step.whole, source.tokens, lengths=source.lengths, dtype=step.dtype)
    out = model.forward(params, step.config, tokens, lengths=lengths, context=lengths, logits=False, dtype=step.dtype,
                        memory=memory, prefix=prefix)
    tree = params["decoder"]

    def chunk(args: tuple[Array, Array]) -> Array:
        x, following = args
        logits = embed.logits(tree.get("head", {}), tree["embedding"]["tokens"], step.config.head, x)
        logp = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.take_along_axis(logp, following[..., None], axis=-1)[..., 0]

    following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    size = max(1, CHUNK // tokens.shape[0])
    pad = -tokens.shape[1] % size
    x = jnp.pad(out.last, ((0, 0), (0, pad), (0, 0)))

    def split(y: Array) -> Array:
        return jnp.moveaxis(y.reshape(y.shape[0], -1, size, *y.shape[2:]), 1, 0)

    scores = jax.lax.map(chunk, (split(x), split(jnp.pad(following, ((0, 0), (0, pad))))))
    return jnp.moveaxis(scores, 0, 1).reshape(tokens.shape[0], -1)[:, :tokens.shape[1]]


def score(model: Model, prompts: Any, *, sources: Any = None, start: Any = None, prefix: Any = None,
          dtype: Any = None) -> list[np.ndarray]:
    """Natural-log probability of each token given those before it, and given a source where the model has an encoder.

    Args:
      prompts: a string, token ids, or a list of either. Of an encoder-decoder what the decoder writes, from behind `start` to
        the end-of-text token: a string gets that one at its end.
      sources: what an encoder-decoder reads, for each prompt or one for all, as `generate` takes its prompts.
      start: token ids that an encoder-decoder's text begins with, for all rows or for each; default the config's.
      prefix: how many tokens of its beginning all of a text may see, a number or one per row: those that were a prompt where
        `generate` was called with `prefix=True`.
      dtype: of the computation; default that of the weights.

    Returns:
      float32 [n] per prompt of n tokens; the first, which nothing precedes, is 0: not so of an encoder-decoder's, which
      follows `start`. So are those of a prefix, which are given and not predicted.

    Raises:
      ValueError: for bad prompts or sources, named, for a prefix that is no number of the text's tokens, or when the
        result is not finite.
    """
    whole, cfg = isinstance(model.config, config.EncoderDecoder), model.decoder
    texts, starts, source = encode(model, prompts, whole), None, None
    if whole:
        if sources is None:
            raise ValueError("an encoder-decoder's text is scored given what its encoder reads: give sources")
        read = encode(model, sources)
        read = read * len(texts) if len(read) == 1 else read
        if len(read) != len(texts):
            raise ValueError(f"there must be one source or one for each of the {len(texts)} prompts, got {len(read)}")
        starts, _ = started(model, read, start)
        source = source_of(read, model.config.encoder.length)
    elif sources is not None or start is not None:
        raise ValueError("sources and start are for encoder-decoders; a decoder's text depends on nothing else")
    begins = [[]] * len(texts) if starts is None else starts
    rows = [[*begin, *text] for begin, text in zip(begins, texts, strict=True)]
    longest = max(map(len, rows))
    if longest > cfg.length:
        raise ValueError(f"prompt {[len(row) for row in rows].index(longest)} has {longest} tokens with its start, the model's "
                         f"context is {cfg.length}")
    if prefix is True:
        raise ValueError("prefix must be the number of tokens that are given, or one per row: of True nothing is left to score")
    seen = prefixes(prefix, rows, source)
    tokens, lengths = padded(rows, min(bucket(longest), cfg.length))
    with model.context():
        step = Forward.of(model.config, dtype)
        scores = np.asarray(_score(step, model.ready, jnp.asarray(tokens), jnp.asarray(lengths), source, seen))
    given = np.zeros(len(rows), int) if seen is None else np.asarray(seen)
    out = []
    for i, (begin, row) in enumerate(zip(begins, rows, strict=True)):
        known = np.concatenate([np.zeros(1, np.float32), scores[i, :len(row) - 1]])[len(begin):]
        known[:given[i]] = 0
        if not np.all(np.isfinite(known)):
            raise ValueError(f"the model's log-probabilities for prompt {i} are not finite: its weights hold NaN or infinite "
                             "values, or overflow in this dtype")
        out.append(known)
    return out

"""`embed`: one vector per text, from an encoder, the encoder of an encoder-decoder, or a decoder's last hidden states."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import config, model
from jaxlm.config import Pooling
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decoding.generate import encode, listed
from jaxlm.layers import embed as layer
from jaxlm.model import Model

SHORTEST = 16  # tokens of a row; longer rows are twice, four times ... as long: one program each


@partial(jax.jit, static_argnames=("cfg", "head", "dtype"))
def _embed(cfg: config.Encoder | config.Decoder, head: config.Vector, params: PyTree, tokens: Int[Array, "B T"],
           lengths: Int[Array, "B"], dtype: Any) -> Float[Array, "B W"]:
    last = model.forward(params, cfg, tokens, lengths=lengths, context=lengths, logits=False, dtype=dtype).last
    product = params["encoder"].get("head", {}) if isinstance(cfg.head, config.Vector) else {}
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return layer.vector(product, head, last, valid)


def _side(lm: Model) -> tuple[config.Encoder | config.Decoder, PyTree]:
    """What reads the texts."""
    if isinstance(lm.config, config.EncoderDecoder):
        return model.encoder(lm.config, lm.ready)
    return lm.config, lm.ready


def _head(cfg: config.Encoder | config.Decoder, pooling: Pooling | str | None, normalize: bool | None) -> config.Vector:
    """The model's own way of making vectors, or the one asked for.

    Raises:
      ValueError: when there is neither.
    """
    own = cfg.head if isinstance(cfg.head, config.Vector) else None
    names = ", ".join(repr(kind.value) for kind in Pooling)
    if own is None and pooling is None:
        raise ValueError(f"this model does not say how it makes vectors: give pooling, one of {names}")
    try:
        pooling = own.pooling if pooling is None else Pooling(pooling)
    except ValueError as error:
        raise ValueError(f"pooling must be one of {names}, got {pooling!r}") from error
    if own is None:
        return config.Vector(pooling, normalize is not False)
    return dataclasses.replace(own, pooling=pooling, normalize=own.normalize if normalize is None else normalize)


def _cut(tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
    """The tokens of as much of a text as fits, between the special ones that stand around the whole."""
    whole, inner = tokenizer.encode(text), tokenizer.encode(text, add_special=False)
    around = len(whole) - len(inner)
    before = next((i for i in range(around + 1) if whole[i:i + len(inner)] == inner), 0)
    if len(whole) <= longest:
        return whole
    return whole[:before] + inner[:max(longest - around, 0)] + whole[before + len(inner):]


def embed(lm: Model, texts: Any, *, pooling: Pooling | str | None = None, normalize: bool | None = None,
          truncate: int | None = None, batch: int = 32, dtype: Any = None) -> Float[np.ndarray, "n W"]:
    """A vector for each text, float32.

    Texts of like length go through the model together, in rows of as few different lengths as a quarter of padding allows on
    average: a program is compiled for each.

    Args:
      texts: a string, token ids, or a list of either. Of an encoder-decoder the encoder reads them.
      pooling: in place of the model's own; other models than sentence encoders need it: decoders are best read at "last".
      normalize: whether vectors are of length 1; None is as the model has it, or else yes.
      truncate: tokens of a text that are read, special ones counted. None: sentence encoders read as many as their
        `max_seq_length` says, other models refuse texts longer than their context.
      batch: texts at a time.
      dtype: of the computation; default that of the weights.

    Raises:
      ValueError: for bad texts, named as prompts, no pooling, or when the result is not finite.

    Example:
      >>> embed(model, ["A cat sits.", "Stocks fell."]).shape  # doctest: +SKIP
      (2, 384)
    """
    cfg, params = _side(lm)
    head = _head(cfg, pooling, normalize)
    if batch < 1 or (truncate is not None and truncate < 1):
        raise ValueError(f"batch and truncate must be positive, got {batch} and {truncate}")
    if truncate is None and isinstance(cfg.head, config.Vector) and lm.tokenizer is not None:
        truncate = cfg.length
    if truncate is not None:
        limit = min(truncate, cfg.length)
        texts = [_cut(lm.tokenizer, text, limit) if isinstance(text, str) and lm.tokenizer is not None else
                 text[:limit] if isinstance(text, (list, tuple, np.ndarray, jax.Array)) else text for text in listed(texts)]
    rows = encode(lm, texts)
    vectors: np.ndarray | None = None
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    count = min(batch, len(rows))
    for start in range(0, len(rows), count):
        some = order[start:start + count]
        width = SHORTEST
        while width < len(rows[some[-1]]):
            width *= 2
        tokens, lengths = np.zeros((count, min(width, cfg.length)), np.int32), np.ones(count, np.int32)
        for place, i in enumerate(some):
            tokens[place, :len(rows[i])], lengths[place] = rows[i], len(rows[i])
        with lm.context():
            found = np.asarray(_embed(cfg, head, params, jnp.asarray(tokens), jnp.asarray(lengths), dtype))
        if vectors is None:
            vectors = np.empty((len(rows), found.shape[1]), np.float32)
        vectors[some] = found[:len(some)]
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise ValueError(f"the model's vector of text {wrong[0]} is not finite: its weights hold NaN or infinite values, or "
                         "overflow in this dtype")
    return vectors

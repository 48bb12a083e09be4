"""`score`: the log-probability of every token of a text under the model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import model
from jaxlm.decoding.generate import Forward, bucket, encode
from jaxlm.layers import embed
from jaxlm.model import Model

CHUNK = 128  # tokens, of all rows together, whose logits exist at once


@partial(jax.jit, static_argnames=("step",))
def _score(step: Forward, params: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T"]:
    """The log-probability of token t + 1 at place t; junk at the last."""
    out = model.forward(params, step.config, tokens, lengths=lengths, context=lengths, logits=False, dtype=step.dtype)
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


def score(model: Model, prompts: Any, *, dtype: Any = None) -> list[np.ndarray]:
    """Natural-log probability of each token given those before it.

    Args:
      prompts: a string, token ids, or a list of either.
      dtype: of the computation; default that of the weights.

    Returns:
      float32 [n] per prompt of n tokens; the first, which nothing precedes, is 0.

    Raises:
      ValueError: for bad prompts, named, or when the result is not finite.
    """
    rows = encode(model, prompts)
    width = min(bucket(max(len(row) for row in rows)), model.config.length)
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    with model.context():
        scores = np.asarray(_score(Forward(model.config, dtype), model.ready, jnp.asarray(tokens), lengths))
    out = [np.concatenate([np.zeros(1, np.float32), scores[i, :len(row) - 1]]) for i, row in enumerate(rows)]
    for i, row in enumerate(out):
        if not np.all(np.isfinite(row)):
            raise ValueError(f"the model's log-probabilities for prompt {i} are not finite: its weights hold NaN or infinite "
                             "values, or overflow in this dtype")
    return out

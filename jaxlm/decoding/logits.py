"""From logits to the next token: penalties, biases, temperature, filters, noise.

All of it works row by row on [B, V] with settings as arrays [B], so one compiled program serves any mixture of settings. A
setting that no row uses is None, and costs nothing. Filters find a threshold by bisection over the bits of a float instead of
sorting the vocabulary.

The order is that of transformers: bias and penalties, temperature, top-k, top-p, min-p, typical-p.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


@flax.struct.dataclass
class Settings:
    """How each row chooses its tokens; arrays [B], or None where no row uses it.

    Attributes:
      temperature: 0 takes the most likely token. None: all rows do.
      top_k: keeps the k most likely tokens; the vocabulary's size is off.
      top_p: keeps the most likely tokens that together reach probability p; 1 is off.
      min_p: keeps tokens at least min_p times as likely as the likeliest; 0 is off.
      typical_p: keeps the tokens nearest to the distribution's entropy that together reach p; 1 is off.
      repetition: divides positive logits of tokens in prompt or output by it, multiplies negative ones; 1 is off.
      presence: lowers the logits of tokens in the output once; 0 is off.
      frequency: lowers them once per occurrence; 0 is off.
      bias: float32 [B, V], added to the logits; -inf bans a token.
    """

    temperature: Float[Array, "B"] | None = None
    top_k: Int[Array, "B"] | None = None
    top_p: Float[Array, "B"] | None = None
    min_p: Float[Array, "B"] | None = None
    typical_p: Float[Array, "B"] | None = None
    repetition: Float[Array, "B"] | None = None
    presence: Float[Array, "B"] | None = None
    frequency: Float[Array, "B"] | None = None
    bias: Float[Array, "B V"] | None = None

    @property
    def penalised(self) -> bool:
        """Whether any row needs to know which tokens came before."""
        return any(x is not None for x in (self.repetition, self.presence, self.frequency))


def _ordered(x: Float[Array, "*B V"]) -> UInt32[Array, "*B V"]:
    """Integers in the same order as the floats."""
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 equals 0.0
    top = jnp.uint32(1 << 31)
    return jnp.where(bits >= top, ~bits, bits | top)


def reaching(scores: Float[Array, "B V"], mass: Float[Array, "B V"], target: Float[Array, "B"]) -> Bool[Array, "B V"]:
    """The highest scores whose mass together reaches the target: as few as do, ties included; all when none do.

    Example:
      >>> reaching(jnp.array([[1., 3., 2.]]), jnp.array([[.2, .5, .3]]), jnp.array([.6])).tolist()
      [[False, True, True]]
    """
    order = _ordered(scores)

    def narrow(bit: Any, low: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        candidate = low | (jnp.uint32(1) << (jnp.uint32(31) - bit.astype(jnp.uint32)))
        enough = jnp.sum(jnp.where(order >= candidate[:, None], mass, 0.0), axis=-1) >= target
        return jnp.where(enough, candidate, low)

    low = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(scores.shape[:1], jnp.uint32))
    return order >= low[:, None]


def penalise(logits: Float[Array, "B V"], settings: Settings, counts: Int[Array, "B V"] | None,
             prompted: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
    """Bias and penalties, in this order: what changes the model's preferences, temperature zero included.

    Args:
      counts: how often each token stands in the output so far.
      prompted: whether it stands in the prompt.
    """
    if settings.bias is not None:
        logits = logits + settings.bias
    if settings.repetition is not None:
        r = settings.repetition[:, None]
        logits = jnp.where((counts > 0) | prompted, jnp.where(logits > 0, logits / r, logits * r), logits)
    if settings.presence is not None:
        logits = logits - settings.presence[:, None] * (counts > 0).astype(jnp.float32)
    if settings.frequency is not None:
        logits = logits - settings.frequency[:, None] * counts.astype(jnp.float32)
    return logits


def restrict(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Temperature and filters: logits of the distribution to draw from, -inf where a filter cut.

    Rows of temperature 0 keep their own scale; their argmax survives every filter.
    """
    if settings.temperature is None:
        return logits
    # Below 1e-30 logits would overflow.
    logits = logits / jnp.where(settings.temperature > 0, jnp.maximum(settings.temperature, 1e-30), 1.0)[:, None]

    def keep(allowed: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        return jnp.where(allowed, logits, -jnp.inf)

    if settings.top_k is not None:
        logits = keep(reaching(logits, jnp.ones_like(logits), settings.top_k.astype(jnp.float32)))
    if settings.top_p is not None:
        off = (settings.top_p >= 1)[:, None]
        logits = keep(off | reaching(logits, jax.nn.softmax(logits, axis=-1), settings.top_p))
    if settings.min_p is not None:
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = keep(logits >= top + jnp.log(settings.min_p)[:, None])
    if settings.typical_p is not None:
        logp = jax.nn.log_softmax(logits, axis=-1)
        p = jnp.exp(logp)
        entropy = -jnp.sum(jnp.where(p > 0, p * logp, 0.0), axis=-1, keepdims=True)
        # The likeliest token need not be a typical one.
        off = ((settings.typical_p >= 1) | (settings.temperature <= 0))[:, None]
        logits = keep(off | reaching(-jnp.abs(-logp - entropy), p, settings.typical_p))
    return logits


def noise(keys: Key[Array, "B"], positions: Int[Array, "B"], vocabulary: int) -> Float[Array, "B V"]:
    """Gumbel noise for the token at each row's absolute position: a function of the row's key and that position alone."""
    def row(key: Key[Array, ""], at: Int[Array, ""]) -> Float[Array, "V"]:
        return jax.random.gumbel(jax.random.fold_in(key, at), (vocabulary,), jnp.float32)
    return jax.vmap(row)(keys, positions)


def first_of_top(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """argmax, the lowest id on ties, as two plain reductions: XLA turns them into vector code on every platform, an argmax not.

    A row that holds NaN gives its last id.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(logits == top, ids, logits.shape[-1] - 1), axis=-1)


def distribution(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Log-probabilities of what `choose` draws: at temperature 0 those of its one token, 0 and -inf.

    Args:
      logits: after `penalise`.

    Example:
      >>> distribution(jnp.array([[1., 3., 2.]]), Settings()).tolist()
      [[-inf, 0.0, -inf]]
    """
    logits = restrict(logits, settings)
    sure = first_of_top(logits)[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    certain = jnp.where(sure, 0.0, -jnp.inf)
    if settings.temperature is None:
        return certain
    return jnp.where((settings.temperature > 0)[:, None], jax.nn.log_softmax(logits, axis=-1), certain)


def choose(logits: Float[Array, "B V"], settings: Settings, keys: Key[Array, "B"],
           positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """The next token: argmax of logits plus noise, which draws from their softmax; without noise at temperature 0.

    Args:
      logits: after `penalise`.
      positions: absolute index of the token to be chosen.
    """
    logits = restrict(logits, settings)
    if settings.temperature is not None:
        drawn = noise(keys, positions, logits.shape[-1])
        logits = logits + jnp.where((settings.temperature > 0)[:, None], drawn, 0.0)
    return first_of_top(logits)

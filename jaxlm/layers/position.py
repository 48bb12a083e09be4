"""Rotary angles and their scalings, the biases of ALiBi and T5, and fixed sines.

Frequencies are computed in float64 NumPy from the config and rounded once. A scaling that depends on how long the context is
(dynamic NTK, LongRoPE) is a function of `context` [B, T]: the number of tokens that the row holds when the token is
computed. It is per token, so a token's rotation never depends on how the text was cut into calls.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.params import Param, normal


def _inverse(base: float, width: int) -> np.ndarray:
    return base ** -(np.arange(0, width, 2, dtype=np.float64) / width)


def _yarn(scaling: config.YarnScaling, base: float, width: int) -> np.ndarray:
    """Reference: section 3.2 of https://arxiv.org/abs/2309.00071."""
    def dimension(rotations: float) -> float:  # where a dimension turns this often within the original length
        return width * math.log(scaling.length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    inverse = _inverse(base, width)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def _llama3(scaling: config.Llama3Scaling, base: float, width: int) -> np.ndarray:
    inverse = _inverse(base, width)
    turns = scaling.length * inverse / (2 * math.pi)
    smooth = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return inverse / scaling.factor * (1 - smooth) + inverse * smooth


def frequencies(cfg: config.Rope, width: int, context: Int[Array, "B T"]) -> tuple[Float[Array, "B|1 T|1 R"], float]:
    """Radians per position for each of the R = width / 2 rotated pairs, and the factor on cosine and sine."""
    def fixed(inverse: np.ndarray) -> Array:
        return jnp.asarray(inverse[None, None], jnp.float32)

    match cfg.scaling:
        case None:
            return fixed(_inverse(cfg.base, width)), 1.0
        case config.LinearScaling(factor):
            return fixed(_inverse(cfg.base, width) / factor), 1.0
        case config.Llama3Scaling() as scaling:
            return fixed(_llama3(scaling, cfg.base, width)), 1.0
        case config.YarnScaling() as scaling:
            return fixed(_yarn(scaling, cfg.base, width)), scaling.magnitude
        case config.DynamicNtkScaling(factor, length):
            ratio = jnp.maximum(context, length).astype(jnp.float32) / length
            growth = (factor * ratio - (factor - 1)) ** (width / (width - 2))
            exponents = jnp.asarray(-np.arange(0, width, 2) / width, jnp.float32)
            return fixed(_inverse(cfg.base, width)) * growth[..., None] ** exponents[None, None], 1.0
        case config.LongRopeScaling() as scaling:
            inverse = _inverse(cfg.base, width)
            short, long = fixed(inverse / np.array(scaling.short)), fixed(inverse / np.array(scaling.long))
            return jnp.where((context > scaling.length)[..., None], long, short), scaling.magnitude


def rotation(cfg: config.Rope, width: int, positions: Int[Array, "B T"],
             context: Int[Array, "B T"]) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosine and sine for each token and rotated pair, float32."""
    inverse, magnitude = frequencies(cfg, width, context)
    angles = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotations(layers: Iterable[config.SelfAttention], positions: Int[Array, "B T"],
              context: Int[Array, "B T"]) -> OrderedDict[tuple[config.Rope, int], tuple[Array, Array]]:
    """Cosines and sines by (Rope, rotated width), each kind among the layers once."""
    # In the layers' order: that of a set differs between processes, which must trace the same program. An OrderedDict, as
    # jax sorts the keys of a plain one and these have no order.
    kinds = OrderedDict.fromkeys((one.position, one.rotated) for one in layers if isinstance(one.position, config.Rope))
    return OrderedDict((kind, rotation(*kind, positions, context)) for kind in kinds)


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"],
           interleaved: bool) -> Float[Array, "B T N H"]:
    """Turns the leading 2R dimensions of every head; the rest passes through."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    if interleaved:
        pairs = turned.reshape(*turned.shape[:-1], width // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :width // 2], turned[..., width // 2:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def alibi_slopes(heads: int, top: float = 8.0) -> tuple[float, ...]:
    """2^(-top / n), 2^(-2 top / n) ... for n heads; when n is no power of two, every other slope of 2n fills up.

    Reference: https://arxiv.org/abs/2108.12409 and its released code.

    Example:
      >>> alibi_slopes(4)
      (0.25, 0.0625, 0.015625, 0.00390625)
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-top * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-top * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return tuple(slopes)


def alibi_bias(cfg: config.Alibi, kv_heads: int, queries: Int[Array, "B T"],
               keys: Int[Array, "B S"]) -> Float[Array, "B K G T|1 S"]:
    """-slope * distance between the positions, float32; when rounded, what differs from it by a constant per query."""
    slope = jnp.asarray(cfg.slopes, jnp.float32).reshape(1, kv_heads, -1, 1, 1)
    if cfg.rounded:
        def rounded(x: Array) -> Array:  # a cast to bfloat16 and back is something that XLA may leave out
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return rounded(rounded(slope) * rounded(keys.astype(jnp.float32))[:, None, None, None])
    distance = jnp.abs(keys[:, None, :] - queries[:, :, None]).astype(jnp.float32)
    return -slope * distance[:, None, None]


def sinusoids(cfg: config.Sinusoidal, width: int, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Sines, then cosines, float32; a last odd dimension is 0. Beyond 2^24 positions are no longer told apart."""
    pairs = width // 2
    inverse = cfg.base ** -(np.arange(pairs) / (max(pairs - 1, 1) if cfg.reaching else pairs))
    angles = (positions + cfg.offset).astype(jnp.float32)[..., None] * jnp.asarray(inverse[None, None], jnp.float32)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, 0), (0, width % 2)))


def relative_spec(cfg: config.RelativeBias, heads: int) -> Param:
    """The table, [buckets, N]."""
    return Param((cfg.buckets, heads), (None, "heads"), normal(0.02))


def buckets(cfg: config.RelativeBias) -> Int[np.ndarray, " differences"]:
    """The bucket of each difference key - query from -distance to distance; those beyond are as these.

    Example:
      >>> buckets(config.RelativeBias(buckets=8, distance=16))[8:18].tolist()
      [6, 5, 5, 4, 4, 3, 2, 1, 0, 0]
    """
    difference = np.arange(-cfg.distance, cfg.distance + 1)
    count, first = cfg.buckets, np.zeros_like(difference)
    if cfg.bidirectional:
        count //= 2
        first = np.where(difference > 0, count, 0)
        away = np.abs(difference)
    else:
        away = np.maximum(-difference, 0)
    exact = count // 2
    # In float32, as the models were trained: it decides which side of a border a distance falls on.
    grown = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(cfg.distance / exact))
    far = np.minimum(exact + (grown * np.float32(count - exact)).astype(np.int64), count - 1)
    return first + np.where(away < exact, away, far)


def _by_difference(cfg: config.RelativeBias, table: Float[Array, "U N"],
                   differences: Int[Array, "..."]) -> Float[Array, "... N"]:
    values = jnp.take(table.astype(jnp.float32), jnp.asarray(buckets(cfg)), axis=0)
    return jnp.take(values, jnp.clip(differences, -cfg.distance, cfg.distance) + cfg.distance, axis=0, mode="clip")


def relative_bias(cfg: config.RelativeBias, table: Float[Array, "U N"], queries: Int[Array, "B T"],
                  keys: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
    """What is added to the scores, float32, for tokens at any positions."""
    return jnp.moveaxis(_by_difference(cfg, table, keys[:, None, :] - queries[:, :, None]), -1, 1)


def relative_bias_of_run(cfg: config.RelativeBias, table: Float[Array, "U N"], start: Int[Array, ""], queries: int,
                         keys: int) -> Float[Array, "1 N T S"]:
    """The same for a run of queries from place `start` on, and keys from place 0 on: no number is looked up for every pair."""
    length = queries + keys
    line = _by_difference(cfg, table, jnp.arange(length, dtype=jnp.int32) - (queries - 1) - start).T
    # Rows one shorter than the line that fills them begin one later each: row i is the line from place queries - 1 - i on.
    tiled = jnp.broadcast_to(line[:, None, :], (line.shape[0], queries, length)).reshape(line.shape[0], -1)
    rows = tiled[:, :queries * (length - 1)].reshape(line.shape[0], queries, length - 1)
    return rows[None, :, :, queries - 1:queries - 1 + keys]


@flax.struct.dataclass
class Shared:
    """A relative bias that all layers of a stack share.

    Attributes:
      table: [buckets, N].
      among: float32 [B or 1, N, T, T], of the T tokens among themselves, where T is small enough to keep it.
      committed: float32 [B, N, T, S], of the T tokens and the slots of the cache.
    """

    table: Float[Array, "U N"]
    among: Float[Array, "B N T T"] | None = None
    committed: Float[Array, "B N T S"] | None = None

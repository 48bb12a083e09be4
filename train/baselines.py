"""What a trained model has to beat on held-out text, in bits per byte: compressors, and n-grams that read the same data."""

import gzip
import lzma
import math
from collections.abc import Sequence

import numpy as np


def _bytes(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]


def compressors(texts: Sequence[str]) -> dict[str, float]:
    """gzip's and xz's bits per byte with their strongest settings, every text by itself as a model reads it.

    Raises:
      ValueError: when there is no text.
    """
    whole = [text.encode() for text in texts]
    size = sum(map(len, whole))
    if not size:
        raise ValueError("there is nothing to compress: no text, or empty ones only")
    return {"gzip": 8 * sum(len(gzip.compress(text, 9)) for text in whole) / size,
            "xz": 8 * sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in whole) / size}


def kneser_ney(texts: Sequence[str], held_out: Sequence[str], order: int = 5, discount: float = 0.75) -> float:
    """Bits per byte of held-out texts under an interpolated Kneser-Ney model of bytes.

    Args:
      order: bytes of an n-gram, at most 7; the first bytes of a text follow zeros.
      discount: taken from every count.

    Raises:
      ValueError: for an order that is out of range, and when either has no text.

    Reference: Chen and Goodman 1998, section 2.7, https://dash.harvard.edu/handle/1/25104739
    """
    if not 1 <= order <= 7:
        raise ValueError(f"an n-gram that fits a 64-bit number has 1 to 7 bytes, got {order}")
    read, asked = (_grams(part, order) for part in (texts, held_out))
    if not len(read) or not len(asked):
        raise ValueError("an n-gram model needs text to count and text to measure, one of the two is empty")
    counts = {order: np.unique(read, return_counts=True)}
    for n in range(order - 1, 0, -1):
        # Shorter n-grams count by how many different bytes stand before them.
        counts[n] = np.unique(counts[n + 1][0] % 256**n, return_counts=True)
    share = np.full(len(asked), 1 / 256)
    for n in range(1, order + 1):
        grams, count = counts[n]
        contexts, which = np.unique(grams // 256, return_inverse=True)
        total, kinds = np.bincount(which, count), np.bincount(which)
        code = asked % 256**n
        seen, context = _find(grams, code), _find(contexts, code // 256)
        known = context >= 0
        times = np.where(seen >= 0, count[seen], 0)
        own = np.maximum(times - discount, 0) / total[context]
        share = np.where(known, own + discount * kinds[context] / total[context] * share, share)
    return float(-np.mean(np.log(share)) / math.log(2))


def _grams(texts: Sequence[str], order: int) -> np.ndarray:
    """The n-gram that ends in each byte, as a number in base 256."""
    parts = [np.zeros(0, np.int64)]
    for text in _bytes(texts):
        padded = np.concatenate([np.zeros(order - 1, np.int64), text])
        code = np.zeros(len(text), np.int64)
        for place in range(order):
            code = code * 256 + padded[place:place + len(text)]
        parts.append(code)
    return np.concatenate(parts)


def _find(sorted_codes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Where each stands among the sorted ones; -1 for those that do not."""
    place = np.minimum(np.searchsorted(sorted_codes, codes), len(sorted_codes) - 1)
    return np.where(sorted_codes[place] == codes, place, -1)

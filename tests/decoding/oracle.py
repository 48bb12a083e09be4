"""Decoding once more, in float64 NumPy and the slow obvious way: sorts, searches, one whole forward pass per token."""

import jax
import numpy as np


def softmax(logits):
    shares = np.exp(logits - np.max(logits))
    return shares / shares.sum()


def smallest(scores, mass, target):
    """The scores' own value down to which their mass, from the highest on, reaches the target; -inf when it never does."""
    total = 0.0
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        total += mass[i]
        if total >= target:
            return scores[i]
    return -np.inf


def typicality(logits):
    """Minus the distance between a token's surprise and the mean surprise."""
    p = softmax(logits)
    surprise = np.array([-np.log(x) if x > 0 else np.inf for x in p])
    return -np.abs(surprise - sum(x * s for x, s in zip(p, surprise, strict=True) if x > 0))


def restrict(logits, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0, typical_p=1.0):
    """One row's temperature and filters, in this order; each sees what the one before it left."""
    logits = np.array(logits, np.float64)
    if temperature > 0:
        logits = logits / temperature
    if top_k is not None:
        logits[logits < sorted(logits)[-min(top_k, len(logits))]] = -np.inf
    if top_p < 1:
        logits[logits < smallest(logits, softmax(logits), top_p)] = -np.inf
    if min_p > 0:
        p = softmax(logits)
        logits[p < min_p * p.max()] = -np.inf
    if typical_p < 1:
        scores = typicality(logits)
        logits[scores < smallest(scores, softmax(logits), typical_p)] = -np.inf
    return logits


def penalise(logits, prompt, output, repetition=1.0, presence=0.0, frequency=0.0, bias=None):
    """One row's bias and penalties, in this order."""
    logits = np.array(logits, np.float64)
    for token, value in (bias or {}).items():
        logits[token] += value
    for token in set(prompt) | set(output):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token in set(output):
        logits[token] -= presence + frequency * list(output).count(token)
    return logits


def noise(key, position, vocabulary):
    return np.asarray(jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary,), np.float32), np.float64)


def generate(logits, prompt, limit, key, eos=(), repetition=1.0, presence=0.0, frequency=0.0, bias=None, **restrictions):
    """One row's tokens and the least gap between the best and the second best choice on the way.

    Args:
      logits: called with the whole text so far, gives the logits [V] after its last token.
    """
    text, gap = list(prompt), np.inf
    while len(text) < len(prompt) + limit:
        scores = penalise(logits(text), prompt, text[len(prompt):], repetition, presence, frequency, bias)
        if restrictions.get("temperature", 0.0) > 0:
            scores = restrict(scores, **restrictions) + noise(key, len(text), len(scores))
        token = int(np.argmax(scores))
        gap = min(gap, scores[token] - np.max(np.delete(scores, token)))
        text.append(token)
        if token in eos:
            break
    return text[len(prompt):], gap


def first_stop(pieces, stops):
    """How many pieces of bytes until one of the strings stands in what they make together; None if never."""
    text = b""
    for i, piece in enumerate(pieces):
        text += piece
        if any(string.encode() in text for string in stops):
            return i + 1
    return None

"""Tiny models whose weights follow from their tensors' names, and how the tests run them."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm import model
from tests.io.goldens.make_goldens import PATH, weight


class Synthetic:
    """A `jaxlm.io.source.Source` of the goldens' weights, with names and shapes as transformers has them."""

    def __init__(self, config, tensors, dtype=np.float32):
        self.config, self.tensors, self.dtype = dict(config), {name: tuple(shape) for name, shape in tensors.items()}, dtype
        self.reads = []

    def names(self):
        return set(self.tensors)

    def shape(self, name):
        return self.tensors[name]

    def read(self, name):
        self.reads.append(name)
        return weight(name, self.tensors[name]).astype(self.dtype)


@functools.cache
def goldens():
    """The text, and the cases by name, each with its logits."""
    with np.load(PATH) as arrays:
        data = json.loads(arrays["cases"].tobytes())
        return data["text"], {name: case | {"logits": arrays[f"logits {name}"]} for name, case in data["cases"].items()}


def case(name, dtype=np.float32):
    """A golden case's config, as a source."""
    found = goldens()[1][name]
    return Synthetic(found["config"], found["tensors"], dtype)


BFLOAT16 = ml_dtypes.bfloat16


def runner(params, cfg, width):
    """tokens -> logits [T, V] of a text of up to `width` tokens; compiled once."""
    forward = jax.jit(lambda params, tokens, positions: model.forward(params, cfg, tokens, positions=positions).logits)

    def logits(tokens):
        padded = jnp.array([list(tokens) + [0] * (width - len(tokens))], jnp.int32)
        index = jnp.arange(width, dtype=jnp.int32)
        positions = jnp.where(index < len(tokens), index, -1)[None]
        return np.asarray(forward(params, padded, positions))[0, :len(tokens)]
    return logits


def greedy(logits, tokens, count):
    """The `count` tokens that follow, by running the growing text again and again."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(np.argmax(logits(tokens)[-1])))
    return tokens[-count:]

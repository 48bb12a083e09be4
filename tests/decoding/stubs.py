"""A tokenizer of single bytes, and a model that says what it is told to."""

import codecs
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config, model
from tests import tiny

VOCABULARY, BOS, EOS, EOT = 260, 256, 257, 258  # id = byte, three special tokens, and an id that the tokenizer lacks


class Bytes:
    """What generation asks of a tokenizer: an id below 256 is that byte, special ids add no text.

    `words` gives some ids other bytes to stand for.
    """

    eos_id, eos_ids, target = EOS, (EOS, EOT), None
    size = 259

    def __init__(self, words=None):
        self.table = [(words or {}).get(i, bytes([i]) if i < 256 else b"") for i in range(self.size)]

    def encode(self, text, add_special=True):
        if not add_special:
            return list(text.encode())
        return [BOS, *text.encode()] if text else []

    def token_bytes(self):
        return list(self.table)

    def decode(self, tokens, continued=False):
        stream = self.stream()
        return stream.push(tokens) + stream.flush()

    def stream(self, continued=False):
        return Stream(self.table)


class Stream:
    """Text as far as it is sure: an unfinished character waits for its other bytes."""

    def __init__(self, table):
        self.table = table
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens):
        assert all(0 <= token < len(self.table) for token in tokens), "the tokenizer has no such id"
        return self.decoder.decode(b"".join(self.table[token] for token in tokens))

    def flush(self):
        return self.decoder.decode(b"", final=True)


def decoder(*blocks, position=None, **fields):
    return tiny.decoder(blocks, embedding=config.Embedding(VOCABULARY, position=position), **fields)


# Few layers: programs are compiled for each, and what a layer does is tested elsewhere.
DECODERS = {
    "rope": decoder(*[tiny.block(window=3, position=config.Rope(100.0))] * 2,
                    tiny.block(qk_norm=config.QkNorm(config.RmsNorm()))),
    "alibi": decoder(tiny.block(kv_heads=1, position=config.Alibi((0.5, 0.25, 0.125, 0.0625)), bias=True, sinks=True),
                     head=config.Head(tied=False, bias=True)),
    "learned": decoder(tiny.block(config.PostNorm(config.LayerNorm()), position=None), norm=None,
                       position=config.Learned(66, offset=2), head=config.Head(tied=False)),
    "scaled": decoder(tiny.block(position=config.Rope(100.0, scaling=config.DynamicNtkScaling(2.0, 4))),
                      tiny.block(position=config.Rope(100.0, scaling=config.LongRopeScaling(
                          (1.0, 1.5, 2.0, 2.5), (1.0, 3.0, 5.0, 9.0), 8, 1.2)))),
    "experts": decoder(tiny.block(feedforward=tiny.MOES["groups"])),
    "latent": decoder(tiny.latent(query_latent=10), tiny.latent(window=6, position=config.Rope(100.0))),
}


@functools.cache
def random(name, length=64):
    """Random weights."""
    cfg = dataclasses.replace(DECODERS[name], length=length)
    return model.Model(cfg, tiny.weights(model.spec(cfg)), Bytes())


# As T5, and sides that differ in width, positions and norms, where a block does not look at the source and one has a relative
# bias of its own.
ENCODER_DECODERS = {
    "relative": config.EncoderDecoder(
        tiny.encoder([tiny.block(position=config.RelativeBias(8, 6, True), causal=False)],
                     embedding=config.Embedding(VOCABULARY)),
        decoder(*[tiny.block(position=config.RelativeBias(8, 6), cross=tiny.cross())] * 2), (0,)),
    "sides": config.EncoderDecoder(
        tiny.encoder([tiny.block(config.PostNorm(config.LayerNorm()), position=None, causal=False)], None, None,
                     config.Embedding(256, position=config.Learned(66, 2)), width=12),
        decoder(tiny.block(position=config.RelativeBias(8, 6, shared=False)),
                tiny.block(config.PostNorm(config.LayerNorm()), position=None, cross=tiny.cross(12, bias=True, out_bias=True)),
                position=config.Learned(66, offset=2), head=config.Head(tied=False)), (3, 1), shared=False),
}


@functools.cache
def with_source(name):
    """Random weights of an encoder-decoder; those of "sides" stay stacked, so that generation scans over layers."""
    cfg = ENCODER_DECODERS[name]
    lm = model.Model(cfg, tiny.weights(model.spec(cfg)), Bytes())
    if name == "sides":
        lm.__dict__["ready"] = lm.params
    return lm


LENGTH = 64

# Attention and feed-forward add nothing, every token's vector is zero and position p's is the p-th unit vector, so the
# head's p-th column is the logits after position p.
SCRIPTED = config.Decoder(
    LENGTH, config.Embedding(VOCABULARY, position=config.Learned(LENGTH)),
    config.stack_of([config.Block(config.Attention(1, 1, 2, position=None), config.Dense(2, gated=False),
                                  config.PreNorm(config.RmsNorm()))]),
    None, config.Head(tied=False), LENGTH)


def scripted(script, start, tokenizer=None, strength=50.0):
    """A model whose greedy token at absolute position start + i is script[i], whatever came before; beyond it, id 259."""
    tokens = np.full(LENGTH + 1, VOCABULARY - 1)
    tokens[start:start + len(script)] = list(script)
    out = np.zeros((VOCABULARY, LENGTH), np.float32)
    out[tokens[1:], np.arange(LENGTH)] = strength
    return with_logits(out.T, tokenizer)


def with_logits(logits, tokenizer=None):
    """A model whose logits after position p are logits[p]: [LENGTH, V]."""
    def zeros(branch):
        return {name: zeros(leaf) if isinstance(leaf, dict) else jnp.zeros(leaf.shape) for name, leaf in branch.items()}

    cfg = dataclasses.replace(SCRIPTED, embedding=dataclasses.replace(SCRIPTED.embedding, vocabulary=logits.shape[1]))
    tree = zeros(model.spec(cfg))
    tree["decoder"]["embedding"]["positions"] = jnp.eye(LENGTH)
    tree["decoder"]["head"]["out"] = jnp.asarray(np.ascontiguousarray(logits.T), jnp.float32)
    return model.Model(cfg, tree, tokenizer)


def markov(successors, tokenizer=None):
    """A model that knows only the last token: after `token` it says successors[token], after any other the token itself."""
    cfg = dataclasses.replace(SCRIPTED, width=VOCABULARY, embedding=config.Embedding(VOCABULARY))
    tree = jax.tree.map(lambda param: jnp.zeros(param.shape), model.spec(cfg))
    after = np.arange(VOCABULARY)
    after[list(successors)] = list(successors.values())
    tree["decoder"]["embedding"]["tokens"] = jnp.eye(VOCABULARY)
    tree["decoder"]["head"]["out"] = jnp.zeros((VOCABULARY, VOCABULARY)).at[after, np.arange(VOCABULARY)].set(50.0)
    return model.Model(cfg, tree, tokenizer)

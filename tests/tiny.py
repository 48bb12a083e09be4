"""Tiny models that between them switch on everything a config has, and weights for any spec without a compilation."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import weight
from jaxlm.config import (
    Activation,
    Alibi,
    Attention,
    AverageKey,
    Block,
    CapacityFactor,
    CapacityFraction,
    CapacityTokens,
    Classifier,
    Decoder,
    Dense,
    DynamicNtkScaling,
    Embedding,
    Encoder,
    EncoderDecoder,
    ExpertChoice,
    ExpertGroups,
    Group,
    Hash,
    Head,
    LatentAttention,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Moe,
    OutputNorm,
    ParallelNorm,
    Pooling,
    PostNorm,
    PreNorm,
    QkNorm,
    Recurrent,
    RelativeBias,
    ReluNorm,
    RmsNorm,
    Rope,
    SandwichNorm,
    Score,
    Sinusoidal,
    Stack,
    TopK,
    Transform,
    Vector,
    YarnScaling,
    stack_of,
)

WIDTH, VOCABULARY = 16, 19

NORM, HEAD, EMBEDDING = RmsNorm(), Head(tied=True), Embedding(VOCABULARY)


# What runs once is compiled without optimisation, in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def attention(heads=4, kv_heads=2, head_width=8, **fields):
    return Attention(heads, kv_heads, head_width, **fields)


def block(residual=None, feedforward=None, multiplier=1.0, cross=None, **fields):
    """A block with `fields` of its attention."""
    return Block(attention(**fields), feedforward or Dense(24), residual or PreNorm(RmsNorm()), multiplier, cross)


def latent(**fields):
    """A block of latent attention."""
    return Block(LatentAttention(**{"heads": 4, "latent": 12, "key_width": 6, "rotated": 4, "value_width": 5} | fields),
                 Dense(24), PreNorm(RmsNorm()))


def cross(source=WIDTH, **fields):
    return attention(**{"position": None, "causal": False, "source": source} | fields)


def decoder(blocks, norm=NORM, head=HEAD, embedding=EMBEDDING, length=64):
    stack = blocks if isinstance(blocks, Stack) else stack_of(blocks)
    return Decoder(WIDTH, embedding, stack, norm, head, length)


def weights(spec, seed=0):
    """Float32 weights by path: no norm's scale is one and no bias zero."""
    def make(path, param):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=param.shape)
        if param.inputs:
            values *= math.prod(param.shape[axis] for axis in param.inputs) ** -0.5
        elif name.endswith("scale"):
            values = 1 + 0.2 * values
        return jnp.asarray(values, jnp.float32)
    return jax.tree_util.tree_map_with_path(make, spec)


def quantised(spec, tree):
    return jit(lambda tree: jax.tree.map(
        lambda param, leaf: weight.quantize(leaf, param.inputs) if param.inputs else leaf, spec, tree))(tree)


def tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, shape), jnp.int32)


# Local and global layers with a rotation each, sandwich norms that store scale - 1, caps, a scaled embedding.
LOCAL = decoder(
    [block(SandwichNorm(RmsNorm(offset=1.0)), Dense(24, Activation.GELU_TANH), position=Rope(base), window=window,
           softcap=5.0, scale=0.3) for base, window in ((100.0, 3), (10000.0, None))] * 2,
    RmsNorm(offset=1.0), Head(tied=True, softcap=3.0), Embedding(VOCABULARY, scale=4.0))

# ALiBi, biases everywhere, one key-value head for all, a norm on the embedding, an untied head with a bias.
ALIBI = decoder(
    [block(PreNorm(LayerNorm()), Dense(24, Activation.GELU, gated=False, bias=True), kv_heads=1,
           position=Alibi((0.5, 0.25, 0.125, 0.0625)), bias=True, out_bias=True)] * 2,
    LayerNorm(bias=False), Head(tied=False, bias=True), Embedding(VOCABULARY, norm=LayerNorm()))

# Learned positions, norms after the sums and none at the end, one layer.
LEARNED = decoder(
    [block(PostNorm(LayerNorm()), Dense(24, Activation.RELU, gated=False), kv_heads=4, position=None)],
    None, Head(tied=False), Embedding(VOCABULARY, position=Learned(66, offset=2)))

# Every rotary scaling, one layer each; turned in part, and neighbours paired.
SCALINGS = decoder([block(position=position) for position in (
    Rope(100.0, width=6, scaling=LinearScaling(3.0)),
    Rope(100.0, scaling=DynamicNtkScaling(2.0, 4)),
    Rope(100.0, interleaved=True, scaling=YarnScaling(4.0, 64, 1.1, beta_fast=4.0)),
    Rope(100.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    Rope(100.0, scaling=LongRopeScaling((1.0, 1.5, 2.0, 2.5), (1.0, 3.0, 5.0, 9.0), 8, 1.2)))])

# Sinks in windowed layers, layers without positions, clipped projections.
SINKS = decoder([block(position=position, window=window, sinks=window is not None, clip=1.0, out_bias=True)
                 for position, window in ((Rope(), 4), (None, None))] * 2)

# Groups of different shapes, the norms of other families, multipliers.
GROUPS = decoder(
    Stack((
        Group((block(OutputNorm(RmsNorm()), qk_norm=QkNorm(RmsNorm(), per_head=False)),), 2),
        Group((block(ParallelNorm(LayerNorm(), shared=True), multiplier=0.5, heads=2, kv_heads=1, head_width=4),
               block(ParallelNorm(RmsNorm(), shared=False), Dense(8, Activation.SQUARED_RELU, gated=False),
                     qk_norm=QkNorm(LayerNorm()))), 1),
        Group((block(PreNorm(RmsNorm()), multiplier=0.7, window=5),
               block(PreNorm(LayerNorm(bias=False)), bias=True)), 2))),
    head=Head(tied=True, scale=0.6))

# Queries of a short vector of their own and of the block's input; biases, a scale, a scaled rotation; a window.
LATENT = decoder([latent(query_latent=10, bias=True, out_bias=True, scale=0.4, norm=RmsNorm(1e-3),
                         position=Rope(100.0, interleaved=True, scaling=YarnScaling(4.0, 64, 1.1, beta_fast=4.0))),
                  latent(window=5, bias=True, position=Rope(100.0))] * 2)

CAUSAL = {"local": LOCAL, "alibi": ALIBI, "learned": LEARNED, "scalings": SCALINGS, "sinks": SINKS,
          "groups": GROUPS, "latent": LATENT}

# Encoders have no cache.
BIDIRECTIONAL = decoder([block(causal=False, window=window, position=position)
                         for window, position in ((None, Rope()), (3, Alibi((0.5, 0.25, 0.125, 0.0625))))])


def encoder(blocks, head=None, norm=NORM, embedding=EMBEDDING, width=WIDTH):
    return Encoder(width, embedding, stack_of(blocks), norm, head, 64)


# BERT's embedding and head, at two widths; T5's bias, shared and in every layer; sines; every head.
ENCODERS = {
    "masked": encoder([block(PostNorm(LayerNorm()), Dense(24, Activation.GELU, False, True), position=None, causal=False,
                             bias=True, out_bias=True)] * 2,
                      Head(True, True, transform=Transform(Activation.GELU, LayerNorm())), None,
                      Embedding(VOCABULARY, position=Learned(66, 2), norm=LayerNorm(), types=2, width=12)),
    "labels": encoder([block(position=RelativeBias(8, 6, True), causal=False)] * 2,
                      Classifier(3, Pooling.MEAN, Transform(Activation.GELU, RmsNorm(), bias=False)),
                      embedding=Embedding(VOCABULARY, position=Sinusoidal(50.0, 3))),
    "tokens": encoder([block(position=RelativeBias(8, 6, True, shared=False), causal=False)] * 2,
                      Classifier(2, None, bias=False), embedding=Embedding(VOCABULARY, position=Sinusoidal(reaching=True))),
    "vector": encoder([block(causal=False)], Vector(Pooling.WEIGHTED_MEAN, True, 5, True)),
}

# As T5; and sides that differ in everything, where one block of the decoder does not look at the source.
ENCODER_DECODERS = {
    "shared": EncoderDecoder(
        encoder([block(position=RelativeBias(8, 6, True), causal=False, scale=1.0)] * 2),
        decoder([block(position=RelativeBias(8, 6), scale=1.0, cross=cross(scale=1.0))] * 2,
                head=Head(tied=True, scale=0.25)), (0,)),
    "sides": EncoderDecoder(
        encoder([block(PostNorm(LayerNorm()), position=None, causal=False)], None, None,
                Embedding(13, position=Learned(66, 2)), width=12),
        decoder([block(PostNorm(LayerNorm()), cross=cross(20, kv_heads=4, bias=True, out_bias=True, softcap=3.0)),
                 block(PostNorm(LayerNorm())),
                 block(SandwichNorm(RmsNorm()), cross=cross(20, qk_norm=QkNorm(RmsNorm()), clip=1.0), multiplier=0.7),
                 block(OutputNorm(RmsNorm()), position=RelativeBias(8, 6, shared=False), cross=cross(20, sinks=True)),
                 block(ParallelNorm(LayerNorm(), True), cross=cross(20, position=Rope(50.0, 4, True)))],
                head=Head(tied=False)), (3, 1), shared=False, projection=True),
}


# Every router: as DeepSeek-V3, Qwen2-MoE, Mixtral, GPT-OSS, Switch, NLLB-MoE, RMoE, hash layers, BlockFFN, EMoE, expert choice.
MOES = {
    "groups": Moe(8, Dense(6), TopK(3, Score.SIGMOID, True, 2.5, ExpertGroups(4, 2, 2), correction=True), shared=Dense(10)),
    "gate": Moe(6, Dense(6), TopK(2, groups=ExpertGroups(3, 2)), shared=Dense(8, gated=False), shared_gate=True),
    "softmax": Moe(4, Dense(8), TopK(2, normalize=True)),
    "clip": Moe(4, Dense(6, Activation.QUICK_GELU, bias=True, clip=0.7, offset=1.0), TopK(2, normalize=True, bias=True)),
    "switch": Moe(4, Dense(6, Activation.RELU, gated=False), TopK(1), capacity=CapacityFactor(0.7)),
    "capacity": Moe(4, Dense(6, bias=True), TopK(2, correction=True), capacity=CapacityTokens(2)),
    "fraction": Moe(4, Dense(6), TopK(2, normalize=True, scale=0.8), capacity=CapacityFraction(0.3, True, True)),
    "recurrent": Moe(4, Dense(6), Recurrent(5, TopK(2, normalize=True))),
    "hash": Moe(6, Dense(6, Activation.GELU, gated=False, bias=True), Hash(2, seed=3)),
    "relu": Moe(4, Dense(6, bias=True), ReluNorm()),
    "keys": Moe(4, Dense(6), AverageKey(2)),
    "keys of up": Moe(4, Dense(6, gated=False), AverageKey(1)),
    "choice": Moe(4, Dense(6, bias=True), ExpertChoice(1.5), shared=Dense(6)),
}

# Mixtures in one group with dense blocks between, where the recurrent router's state goes from repeat to repeat; a stack that
# begins dense; a group for each number of experts.
EXPERTS = {
    "routers": decoder(Stack((
        Group((block(feedforward=MOES["recurrent"]), block(feedforward=Dense(8)), block(feedforward=MOES["clip"])), 2),
        Group((block(feedforward=MOES["hash"]), block(feedforward=MOES["relu"]), block(feedforward=MOES["keys"])), 1)))),
    "groups": decoder([block(), *[block(feedforward=MOES["groups"])] * 2, block(feedforward=MOES["gate"])]),
    "drops": decoder([block(feedforward=MOES["switch"]), block(PostNorm(LayerNorm()), MOES["capacity"])]),
}

EXPERT_ENCODER = encoder([block(feedforward=MOES["choice"], causal=False)] * 2, Vector(Pooling.MEAN))

# As Switch: every second block, on both sides.
EXPERT_SIDES = EncoderDecoder(
    encoder([block(causal=False), block(feedforward=MOES["softmax"], causal=False)]),
    decoder([block(cross=cross()), block(feedforward=MOES["gate"], cross=cross())]), (0,))

"""Models as compositions of the stack. Here: `decoder`, a decoder-only language model.

`forward` is the one call: training, prefill, one token, k tokens, a tree, soft inputs are the same function of explicit
positions, mask, segments and cache. It writes nothing: the new tokens' keys and values come out beside the logits.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm import config, sharding, stack
from jaxlm.cache import Cache
from jaxlm.layers import embed, norm
from jaxlm.layers.mask import describe
from jaxlm.params import Param, Spec


@flax.struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      logits: float32 [B, T, V], or [B, Q, V] where `at` chose Q of the T tokens; None where logits were not asked for.
      hidden: an array [B, T, D] for each layer asked for.
      last: [B, T, D], what the head reads: the stack's output after the final norm.
      kv: the T tokens' keys and values of every layer, for `cache.append` and `cache.commit`.
    """

    logits: Float[Array, "B T V"] | None
    hidden: tuple[Float[Array, "B T D"], ...]
    last: Float[Array, "B T D"]
    kv: PyTree


def spec(cfg: config.Decoder) -> Spec:
    """The tree of Params of a decoder-only model."""
    tree: dict[str, Any] = {"embedding": embed.spec(cfg.embedding, cfg.width), "blocks": stack.spec(cfg.stack, cfg.width)}
    if cfg.norm is not None:
        tree["norm"] = norm.spec(cfg.norm, cfg.width)
    head = embed.head_spec(cfg.head, cfg.embedding.vocabulary, cfg.width)
    return {"decoder": tree | {"head": head} if head else tree}


def products(cfg: config.Decoder) -> int:
    """How many weights take part in the products of a token: all matrices, the embedding's where the head is tied to it."""
    tree = spec(cfg)["decoder"]
    matrices = dict(tree) | {"embedding": {"tokens": tree["embedding"]["tokens"]} if cfg.head.tied else {}}
    return sum(math.prod(param.shape) for param in jax.tree.leaves(matrices) if param.inputs)


def cast(params: PyTree, cfg: config.Decoder, dtype: Any) -> PyTree:
    """The weights with those that take part in products in another dtype; split ones are then gathered in it."""
    def one(param: Param, weight: Any) -> Any:
        return weight.astype(dtype) if param.inputs and isinstance(weight, jax.Array) else weight
    return jax.tree.map(one, spec(cfg), params)


def unstack(params: PyTree, cfg: config.Decoder) -> PyTree:
    """The same weights laid out for unrolled layers: see `jaxlm.stack`. Made on every call; keep it."""
    tree = params["decoder"]
    return {"decoder": tree | {"blocks": stack.unstack(tree["blocks"], cfg.stack)}}


def prefix(cfg: config.Decoder, params: PyTree, cache: Cache, layers: int) -> tuple[config.Decoder, PyTree, Cache]:
    """The model that is the first blocks of another, with the same embedding, final norm and head, and its part of a cache.

    Nothing is copied, but for the last blocks of a prefix that ends within a repeat of a group's pattern.

    Raises:
      ValueError: when there are not so many blocks.
    """
    tree = params["decoder"]
    tree = tree | {"blocks": stack.prefix_weights(tree["blocks"], cfg.stack, layers)}
    kept = cache.replace(layers=stack.prefix_cache(cache.layers, cfg.stack, layers))
    return dataclasses.replace(cfg, stack=stack.prefix(cfg.stack, layers)), {"decoder": tree}, kept


def check_tokens(tokens: Any, vocabulary: int, positions: Any = None, lengths: Any = None) -> None:
    """Raises:
      ValueError: for the first token id that is not 0 to vocabulary - 1 where there is a token (its position is not -1, its
        place within the row's length); names it and its place. Tracers are not checked: inside `jax.jit` such an id reads the
        nearest row.
    """
    if any(isinstance(array, jax.core.Tracer) for array in (tokens, positions, lengths)):
        return
    tokens = np.asarray(tokens)
    bad = (tokens < 0) | (tokens >= vocabulary)
    if positions is not None:
        bad &= np.asarray(positions) >= 0
    if lengths is not None:
        bad &= np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]
    bad = np.argwhere(bad)
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        raise ValueError(f"token id {int(tokens[place])} at {place} is out of range: the vocabulary has {vocabulary}, "
                         f"ids 0 to {vocabulary - 1}")


def forward(params: PyTree, cfg: config.Decoder, tokens: Int[Array, "B T"] | None = None, *,
            embeddings: Float[Array, "B T D"] | None = None, positions: Int[Array, "B T"] | None = None,
            lengths: Int[Array, "B"] | None = None, mask: Bool[Array, "B T T"] | None = None,
            segments: Int[Array, "B T"] | None = None, prefix: Int[Array, "B T"] | None = None, cache: Cache | None = None,
            context: Int[Array, "B"] | None = None, at: Int[Array, "B Q"] | None = None,
            hidden: Sequence[int] = (), logits: bool = True, dtype: Any = None, remat: Any = None) -> Output:
    """Logits of the tokens that follow each of the T given ones.

    Args:
      tokens: ids 0 to V - 1; what stands at a position of -1 does not matter. Or None with `embeddings`.
      embeddings: soft inputs in place of looked-up vectors, not scaled.
      positions: -1 for none. Default: from the cache's length (or 0) on, restarting in each segment;
        best left to that where they are so: long causal inputs then skip half of the scores.
      lengths: how many tokens of each row there are, padding behind them. Not together with positions.
      mask: True = may attend, among the T tokens, in place of the causal rule; the cache's committed slots stay visible
        and windows, segments and padding stay in force. [1, T, T] serves all rows.
      segments: packed documents, each in one piece: tokens attend within their own; 0 is padding. Not together with a cache.
      prefix: how many tokens from its segment's beginning every token of the segment may see, later ones only earlier ones;
        0 is causal. Not together with a cache.
      cache: committed keys and values; a key's position is its slot.
      context: tokens each row will hold when this text is complete, which dynamic NTK and LongRoPE scale by (a prompt's length
        when it comes in chunks). Default: up to the largest position given.
      at: which of the T tokens logits are wanted for; default all.
      hidden: 0 for the embeddings, i for the output of block i (before the final norm).
      logits: False skips the head.
      dtype: of the computation; default the embeddings' own (`params` in float32 may be computed in bfloat16).
      remat: see `jaxlm.stack.apply`.

    Raises:
      ValueError: for token ids out of range (outside `jax.jit`), when not exactly one of tokens and embeddings is given, for
        shapes that do not fit, layers that do not exist, or segments or prefix together with a cache.

    Example:
      >>> import jaxlm.params
      >>> block = config.Block(config.Attention(2, 1, 4), config.Dense(16), config.PreNorm(config.RmsNorm()))
      >>> cfg = config.Decoder(8, config.Embedding(11), config.stack_of([block] * 2), config.RmsNorm(), config.Head(True), 32)
      >>> weights = jaxlm.params.init(spec(cfg), jax.random.key(0))
      >>> forward(weights, cfg, jnp.array([[1, 2, 3]])).logits.shape
      (1, 3, 11)
    """
    params = params["decoder"]
    if (tokens is None) == (embeddings is None):
        raise ValueError("forward takes either tokens or embeddings")
    given = jnp.asarray(tokens if embeddings is None else embeddings)
    if embeddings is None:
        tokens = given
    if given.ndim != (2 if embeddings is None else 3):
        raise ValueError(f"tokens must be [B, T] and embeddings [B, T, {cfg.width}], got shape {given.shape}")
    batch, width = given.shape[:2]
    if width == 0 or batch == 0:
        raise ValueError(f"forward needs at least one row and one token, got shape {given.shape}")
    if embeddings is not None and embeddings.shape[2:] != (cfg.width,):
        raise ValueError(f"embeddings must be [B, T, {cfg.width}], got {embeddings.shape}")
    for name, array in (("segments", segments), ("prefix", prefix)):
        if array is not None and cache is not None:
            raise ValueError(f"{name}: for packed training batches, not together with a cache")
    if lengths is not None and positions is not None:
        raise ValueError("forward takes positions or lengths, not both")
    for name, array, shape in (("positions", positions, (batch, width)), ("segments", segments, (batch, width)),
                               ("prefix", prefix, (batch, width)),
                               ("lengths", lengths, (batch,))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {array.shape}")
    if mask is not None and (mask.shape not in ((batch, width, width), (1, width, width)) or mask.dtype != bool):
        raise ValueError(f"mask must be bool [{batch} or 1, {width}, {width}], got {mask.dtype} {mask.shape}")
    if embeddings is None:
        check_tokens(tokens, cfg.embedding.vocabulary, positions, lengths)
    learned = cfg.embedding.position
    if learned is not None and positions is not None and not isinstance(positions, jax.core.Tracer):
        if np.max(positions) >= learned.length - learned.offset:
            raise ValueError(f"position {int(np.max(positions))} is beyond the {learned.length - learned.offset} learned ones")
    wrong = [tap for tap in hidden if not 0 <= tap <= cfg.stack.layers]
    if wrong:
        raise ValueError(f"hidden layer {wrong[0]} does not exist: 0 (embeddings) to {cfg.stack.layers}")
    for name, array, rank in (("context", context, 1), ("at", at, 2)):
        if array is not None and (array.ndim != rank or array.shape[0] != batch):
            raise ValueError(f"{name} must be of rank {rank} with {batch} rows, got shape {array.shape}")
    if cache is not None and cache.length.shape != (batch,):
        raise ValueError(f"the cache holds {cache.length.shape[0]} rows, the input {batch}")

    known = describe((one.attention for group in cfg.stack.groups for one in group.pattern), batch, width, positions,
                     segments, mask, None if cache is None else cache.length, context, lengths, prefix)
    if dtype is None:
        dtype = params["embedding"]["tokens"].dtype
    x = embed.apply(params["embedding"], cfg.embedding, tokens, embeddings, known.positions, dtype)
    x = sharding.constrain(x, sharding.ACTIVATIONS)
    x, kv, taps = stack.apply(params["blocks"], cfg.stack, x, known, None if cache is None else cache.layers,
                              hidden, remat)
    if cfg.norm is not None:
        x = norm.apply(params["norm"], cfg.norm, x)
    out = None
    if logits:
        chosen = x if at is None else jnp.take_along_axis(x, at[:, :, None], axis=1, mode="clip")
        out = embed.logits(params.get("head", {}), params["embedding"]["tokens"], cfg.head, chosen)
    return Output(out, taps, x, kv)


def logits(params: PyTree, cfg: config.Decoder, last: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits from `Output.last`."""
    params = params["decoder"]
    return embed.logits(params.get("head", {}), params["embedding"]["tokens"], cfg.head, last)


@dataclasses.dataclass(frozen=True)
class Model:
    """A config, its weights and, where there is one, the tokenizer: what `jaxlm.load` gives and programs pass around."""

    config: config.Decoder
    params: PyTree
    tokenizer: Any = None

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that the weights are split over; None on one device."""
        placement = getattr(jax.tree.leaves(self.params)[0], "sharding", None)
        return placement.mesh if isinstance(placement, jax.sharding.NamedSharding) and placement.mesh.size > 1 else None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Makes `mesh` current, where there is one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @functools.cached_property
    def ready(self) -> PyTree:
        """The weights as generation wants them: layer by layer (the same memory) on one CPU device, else as they are."""
        weights = jax.tree.map(jnp.asarray, self.params)  # NumPy arrays may stand in for weights
        devices = jax.tree.leaves(weights)[0].devices()
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            return unstack(weights, self.config)
        return weights

    @functools.cached_property
    def compiled(self) -> set[Any]:
        """What generation has compiled for this model: see `jaxlm.decoding.generate`."""
        return set()

    @functools.cached_property
    def costs(self) -> dict[Any, tuple[float, ...]]:
        """What calls were measured to take: see `jaxlm.decoding.speculative.cost`."""
        return {}

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        return (f"Model({type(self.config).__name__} of {self.config.stack.layers} layers, width {self.config.width}, "
                f"{sum(leaf.size for leaf in leaves):,} weights in {leaves[0].dtype}, {self.tokenizer!r})")

"""Models as compositions of the stack: decoders, encoders, and a decoder on what an encoder made of a source.

`forward` is the one call: training, prefill, one token, k tokens, a tree, soft inputs are the same function of explicit
positions, mask, segments and cache. It writes nothing: the new tokens' keys and values come out beside the logits. An
encoder-decoder is `encode` and then `forward`; its tree holds an encoder's and a decoder's, and either works alone.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm import config, sharding, stack
from jaxlm.cache import Cache, Memory
from jaxlm.layers import attention, embed, moe, norm, position
from jaxlm.layers.mask import Context, describe
from jaxlm.params import Param, Spec, matrix_size, zeros
from jaxlm.weight import einsum


@flax.struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      logits: what the head gives, float32: [B, T, V], or [B, Q, V] where `at` chose Q of the T tokens; of an encoder's other
        heads [B, labels], [B, T, labels] or [B, W]. None without a head or where it was not asked for.
      hidden: an array [B, T, D] for each layer asked for.
      last: [B, T, D], what the head reads: the stack's output after the final norm.
      kv: the T tokens' keys and values of every layer, for `cache.append` and `cache.commit`.
      routing: what the routers of mixtures of experts did: see `jaxlm.stack.Result`.
    """

    logits: Float[Array, "B T V"] | None
    hidden: tuple[Float[Array, "B T D"], ...]
    last: Float[Array, "B T D"]
    kv: PyTree
    routing: PyTree = None


Side = config.Decoder | config.Encoder


def _name(cfg: Side) -> str:
    return "decoder" if isinstance(cfg, config.Decoder) else "encoder"


def _shared_bias(cfg: config.Stack) -> config.Attention | None:
    """The attention whose relative bias all layers of a stack share."""
    return next((block.attention for block in cfg.blocks() if isinstance(block.attention.position, config.RelativeBias)
                 and block.attention.position.shared), None)


def _side_spec(cfg: Side) -> Spec:
    tree: dict[str, Any] = {"embedding": embed.spec(cfg.embedding, cfg.width), "blocks": stack.spec(cfg.stack, cfg.width)}
    bias = _shared_bias(cfg.stack)
    if bias is not None:
        tree["relative_bias"] = position.relative_spec(bias.position, bias.heads)
    routing = stack.shared_spec(cfg.stack)
    if routing:
        tree["routing"] = routing
    if cfg.norm is not None:
        tree["norm"] = norm.spec(cfg.norm, cfg.width)
    head = None if cfg.head is None else embed.head_spec(cfg.head, cfg.embedding, cfg.width)
    return tree | {"head": head} if head else tree


def spec(cfg: config.Config) -> Spec:
    """The tree of Params of a model: under "decoder", "encoder" or both, where the decoder holds the table of tokens that they
    share; "projection" is the product between them."""
    if not isinstance(cfg, config.EncoderDecoder):
        return {_name(cfg): _side_spec(cfg)}
    tree = {"encoder": _side_spec(cfg.encoder), "decoder": _side_spec(cfg.decoder)}
    if cfg.shared:
        del tree["encoder"]["embedding"]["tokens"]
    if cfg.projection:
        tree["projection"] = {"product": Param((cfg.encoder.width, cfg.source), ("embed", None), inputs=(0,)),
                              "bias": Param((cfg.source,), (None,), zeros)}
    return tree


def encoder(cfg: config.EncoderDecoder, params: PyTree) -> tuple[config.Encoder, PyTree]:
    """The encoder of an encoder-decoder as a model of its own. Nothing is copied."""
    tree = dict(params["encoder"])
    if cfg.shared:
        tree["embedding"] = tree["embedding"] | {"tokens": params["decoder"]["embedding"]["tokens"]}
    return cfg.encoder, {"encoder": tree}


def products(cfg: Side) -> int:
    """How many weights take part in the products of a token: all matrices, the table of tokens where the head is tied to it; of
    a mixture's experts as many as a token goes to."""
    tree = _side_spec(cfg)
    tied = isinstance(cfg.head, config.Head) and cfg.head.tied
    read = {"tokens": tied, "projection": True}
    shared = stack.shared_spec(cfg.stack)
    matrices = dict(tree) | {"embedding": {name: param for name, param in tree["embedding"].items() if read.get(name)},
                             "routing": {}}
    count = matrix_size(matrices)
    for block in cfg.stack.blocks():
        if isinstance(block.feedforward, config.Moe):
            count += moe.products(block.feedforward, cfg.width) - matrix_size(moe.spec(block.feedforward, cfg.width))
            if isinstance(block.feedforward.router, config.Recurrent):
                count += matrix_size(shared)
    return count


def cast(params: PyTree, cfg: config.Config, dtype: Any) -> PyTree:
    """The weights with those that take part in products in another dtype; split ones are then gathered in it."""
    def one(param: Param, weight: Any) -> Any:
        return weight.astype(dtype) if param.inputs and isinstance(weight, jax.Array) else weight
    known = spec(cfg)
    return params | jax.tree.map(one, known, {name: params[name] for name in known})


def unstack(params: PyTree, cfg: config.Config) -> PyTree:
    """The same weights laid out for unrolled layers: see `jaxlm.stack`. Made on every call; keep it."""
    sides = (cfg.encoder, cfg.decoder) if isinstance(cfg, config.EncoderDecoder) else (cfg,)
    trees = {_name(side): params[_name(side)] for side in sides}
    return params | {_name(side): trees[_name(side)] | {"blocks": stack.unstack(trees[_name(side)]["blocks"], side.stack)}
                     for side in sides}


def prefix(cfg: config.Decoder, params: PyTree, cache: Cache, layers: int) -> tuple[config.Decoder, PyTree, Cache]:
    """The model that is the first blocks of another, with the same embedding, final norm and head, and its part of a cache.

    Nothing is copied, but for the last blocks of a prefix that ends within a repeat of a group's pattern.

    Raises:
      ValueError: when there are not so many blocks.
    """
    tree = params["decoder"]
    tree = tree | {"blocks": stack.prefix_weights(tree["blocks"], cfg.stack, layers)}
    cut, memory = stack.prefix(cfg.stack, layers), cache.memory
    if all(block.cross is None for block in cut.blocks()):
        memory = None
    if memory is not None and memory.layers is not None:
        memory = memory.replace(layers=stack.prefix_cache(memory.layers, cfg.stack, layers))
    kept = cache.replace(layers=stack.prefix_cache(cache.layers, cfg.stack, layers), memory=memory)
    return dataclasses.replace(cfg, stack=cut), {"decoder": tree}, kept


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


def forward(params: PyTree, cfg: config.Config, tokens: Int[Array, "B T"] | None = None, *,
            embeddings: Float[Array, "B T D"] | None = None, positions: Int[Array, "B T"] | None = None,
            lengths: Int[Array, "B"] | None = None, mask: Bool[Array, "B T T"] | None = None,
            segments: Int[Array, "B T"] | None = None, prefix: Int[Array, "B T"] | Int[Array, "B"] | None = None,
            cache: Cache | None = None, context: Int[Array, "B"] | None = None, at: Int[Array, "B Q"] | None = None,
            hidden: Sequence[int] = (), logits: bool = True, dtype: Any = None, remat: Any = None,
            types: Int[Array, "B T"] | None = None, memory: Memory | None = None) -> Output:
    """Logits of the tokens that follow each of the T given ones; of encoders, what the head makes of the text.

    Args:
      cfg: of an encoder-decoder the decoder is run.
      tokens: ids 0 to V - 1; what stands at a position of -1 does not matter. Or None with `embeddings`.
      embeddings: soft inputs in place of looked-up vectors, not scaled.
      positions: -1 for none. Default: from the cache's length (or 0) on, restarting in each segment;
        best left to that where they are so: long causal inputs then skip half of the scores.
      lengths: how many tokens of each row there are, padding behind them. Not together with positions.
      mask: True = may attend, among the T tokens, in place of the causal rule; the cache's committed slots stay visible
        and windows, segments and padding stay in force. [1, T, T] serves all rows.
      segments: packed documents, each in one piece: tokens attend within their own; 0 is padding. Not together with a cache.
      prefix: how many tokens from its segment's beginning every token of the segment may see, later ones only earlier ones;
        0 is causal. [B] is one for all of a row's tokens. Not together with a cache: a prefix is read in one call.
      cache: committed keys and values; a key's position is its slot.
      context: tokens each row will hold when this text is complete, which dynamic NTK and LongRoPE scale by (a prompt's length
        when it comes in chunks). Default: up to the largest position given.
      at: which of the T tokens logits are wanted for; default all.
      hidden: 0 for the embeddings, i for the output of block i (before the final norm).
      logits: False skips the head.
      dtype: of the computation; default the embeddings' own (`params` in float32 may be computed in bfloat16).
      remat: see `jaxlm.stack.apply`.
      types: of an embedding that has some, 0 by default.
      memory: an encoded source, from `encode` or `remember`, where the cache does not hold one.

    Raises:
      ValueError: for token ids out of range (outside `jax.jit`), when not exactly one of tokens and embeddings is given, for
        shapes that do not fit, layers that do not exist, segments or prefix together with a cache, an encoder with a cache, a
        source that is missing or that nothing attends to, or types that the embedding does not have.

    Example:
      >>> import jaxlm.params
      >>> block = config.Block(config.Attention(2, 1, 4), config.Dense(16), config.PreNorm(config.RmsNorm()))
      >>> cfg = config.Decoder(8, config.Embedding(11), config.stack_of([block] * 2), config.RmsNorm(), config.Head(True), 32)
      >>> weights = jaxlm.params.init(spec(cfg), jax.random.key(0))
      >>> forward(weights, cfg, jnp.array([[1, 2, 3]])).logits.shape
      (1, 3, 11)
    """
    if isinstance(cfg, config.EncoderDecoder):
        cfg = cfg.decoder
    params = params[_name(cfg)]
    if (tokens is None) == (embeddings is None):
        raise ValueError("forward takes either tokens or embeddings")
    given = jnp.asarray(tokens if embeddings is None else embeddings)
    if embeddings is None:
        tokens = given
    own = cfg.embedding.width or cfg.width
    if given.ndim != (2 if embeddings is None else 3):
        raise ValueError(f"tokens must be [B, T] and embeddings [B, T, {own}], got shape {given.shape}")
    batch, width = given.shape[:2]
    if width == 0 or batch == 0:
        raise ValueError(f"forward needs at least one row and one token, got shape {given.shape}")
    if embeddings is not None and embeddings.shape[2:] != (own,):
        raise ValueError(f"embeddings must be [B, T, {own}], got {embeddings.shape}")
    if cache is not None and isinstance(cfg, config.Encoder):
        raise ValueError("an encoder reads whole texts: it has no use for a cache")
    if types is not None and cfg.embedding.types is None:
        raise ValueError("this model's embedding has no types: Embedding.types is None")
    if types is not None and not isinstance(types, jax.core.Tracer):
        wrong_types = np.asarray(types)[(np.asarray(types) < 0) | (np.asarray(types) >= cfg.embedding.types)]
        if len(wrong_types):
            raise ValueError(f"type {wrong_types[0]} is out of range: 0 to {cfg.embedding.types - 1}")
    memory = _memory(cfg, memory, cache, batch)
    if segments is not None and cache is not None:
        raise ValueError("segments: for packed training batches, not together with a cache")
    if prefix is not None and cache is not None:
        raise ValueError("prefix: not together with a cache, whose tokens would have had to see those that come now; give the "
                         "whole prefix in the call that begins the text, later calls see all of it without being told")
    if lengths is not None and positions is not None:
        raise ValueError("forward takes positions or lengths, not both")
    if prefix is not None and prefix.shape == (batch,):
        prefix = jnp.broadcast_to(prefix[:, None], (batch, width))
    for name, array, shape in (("positions", positions, (batch, width)), ("segments", segments, (batch, width)),
                               ("prefix", prefix, (batch, width)), ("types", types, (batch, width)),
                               ("lengths", lengths, (batch,))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {array.shape}")
    if mask is not None and (mask.shape not in ((batch, width, width), (1, width, width)) or mask.dtype != bool):
        raise ValueError(f"mask must be bool [{batch} or 1, {width}, {width}], got {mask.dtype} {mask.shape}")
    if embeddings is None:
        check_tokens(tokens, cfg.embedding.vocabulary, positions, lengths)
    learned = cfg.embedding.position
    if isinstance(learned, config.Learned) and positions is not None and not isinstance(positions, jax.core.Tracer):
        if np.max(positions) >= learned.length - learned.offset:
            raise ValueError(f"position {int(np.max(positions))} is beyond the {learned.length - learned.offset} learned ones")
    if isinstance(learned, config.Learned) and all(one is None for one in (positions, segments, cache)):
        reach = width if lengths is None else 0 if isinstance(lengths, jax.core.Tracer) else int(np.max(lengths))
        if reach > learned.length - learned.offset:
            raise ValueError(f"a row has {reach} tokens, and there are {learned.length - learned.offset} learned positions")
    wrong = [tap for tap in hidden if not 0 <= tap <= cfg.stack.layers]
    if wrong:
        raise ValueError(f"hidden layer {wrong[0]} does not exist: 0 (embeddings) to {cfg.stack.layers}")
    for name, array, rank in (("context", context, 1), ("at", at, 2)):
        if array is not None and (array.ndim != rank or array.shape[0] != batch):
            raise ValueError(f"{name} must be of rank {rank} with {batch} rows, got shape {array.shape}")
    if cache is not None and cache.length.shape != (batch,):
        raise ValueError(f"the cache holds {cache.length.shape[0]} rows, the input {batch}")

    patterns = [one for group in cfg.stack.groups for one in group.pattern]
    layers = [*(one.attention for one in patterns), *(one.cross for one in patterns if one.cross is not None)]
    known = describe(layers, batch, width, positions, segments, mask, None if cache is None else cache.length, context, lengths,
                     prefix)
    if dtype is None:
        dtype = params["embedding"]["tokens"].dtype
    shared = _shared_bias(cfg.stack)
    if shared is not None:
        slots = None if cache is None else cache.slots
        known = known.replace(bias=_bias(shared.position, params["relative_bias"], known, slots))
    if memory is not None:
        known = known.replace(source=memory.replace(layers=None, routing=None))
    known = known.replace(tokens=tokens, routing=params.get("routing"))
    x = embed.apply(params["embedding"], cfg.embedding, tokens, embeddings, known.positions, dtype, types)
    x = sharding.constrain(x, sharding.ACTIVATIONS)
    x, kv, taps, routing = stack.apply(params["blocks"], cfg.stack, x, known, None if cache is None else cache.layers,
                                       hidden, remat, None if memory is None else memory.layers)
    if cfg.norm is not None:
        x = norm.apply(params["norm"], cfg.norm, x)
    out = None
    if logits and isinstance(cfg.head, config.Classifier | config.Vector):
        if segments is not None and cfg.head.pooling is not None:
            raise ValueError(f"{type(cfg.head).__name__} makes one vector of a row: it takes no rows of several segments")
        if at is not None and cfg.head.pooling is not None:
            raise ValueError(f"{type(cfg.head).__name__} makes one vector of a row: it takes no `at`")
        chosen, valid = (x, known.positions >= 0) if at is None else (_at(x, at), jnp.ones(at.shape, bool))
        apply = embed.classify if isinstance(cfg.head, config.Classifier) else embed.vector
        out = apply(params.get("head", {}), cfg.head, chosen, valid)
    elif logits and cfg.head is not None:
        chosen = x if at is None else _at(x, at)
        out = embed.logits(params.get("head", {}), params["embedding"]["tokens"], cfg.head, chosen)
    return Output(out, taps, x, kv, routing)


def _at(x: Float[Array, "B T D"], at: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    return jnp.take_along_axis(x, at[:, :, None], axis=1, mode="clip")


def _memory(cfg: Side, memory: Memory | None, cache: Cache | None, batch: int) -> Memory | None:
    """The source that a call's tokens look at.

    Raises:
      ValueError: when it is missing, given twice or where nothing attends to it, or has another number of rows.
    """
    crossing = any(block.cross is not None for block in cfg.stack.blocks())
    kept = None if cache is None else cache.memory
    if memory is not None and kept is not None:
        raise ValueError("the cache holds a source already: give no memory beside it")
    memory = kept if memory is None else memory
    if crossing and memory is None:
        raise ValueError("this decoder attends to a source: give `memory`, from jaxlm.model.encode, or a cache that holds one")
    if memory is None:
        return None
    if not crossing:
        raise ValueError("no block of this model attends to a source (Block.cross): leave out `memory`")
    if memory.segments.shape[0] != batch:
        raise ValueError(f"the source has {memory.segments.shape[0]} rows, the tokens {batch}")
    return memory


def _bias(cfg: config.RelativeBias, table: Float[Array, "U N"], known: Context, slots: int | None) -> position.Shared:
    """The bias that all layers add: made here once where it is small."""
    positions = known.positions
    if positions.shape[1] > attention.QUERIES:
        return position.Shared(table)
    if known.counted:
        among = position.relative_bias_of_run(cfg, table, jnp.zeros((), jnp.int32), *positions.shape[1:] * 2)
    else:
        among = position.relative_bias(cfg, table, positions, positions)
    if slots is None:
        return position.Shared(table, among)
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    return position.Shared(table, among, position.relative_bias(cfg, table, positions, slot))


def encode(params: PyTree, cfg: config.EncoderDecoder, tokens: Int[Array, "B S"] | None = None, *,
           segments: Int[Array, "B S"] | None = None, lengths: Int[Array, "B"] | None = None,
           positions: Int[Array, "B S"] | None = None, **given: Any) -> Memory:
    """What the decoder of an encoder-decoder reads of a source: `Memory.hidden`.

    Args:
      segments: of packed sources: a segment of the decoder's sees that of the same number; 0 is padding.
      lengths: how many of the S tokens each row has; not together with segments.
      positions: -1 for no token.
      given: as `forward` takes it.

    Raises:
      ValueError: as `forward`, and for a model that is no encoder-decoder.
    """
    if not isinstance(cfg, config.EncoderDecoder):
        raise ValueError(f"encode is for the source of an EncoderDecoder; forward reads the text of a {type(cfg).__name__}")
    side, tree = encoder(cfg, params)
    if segments is not None and lengths is not None:
        raise ValueError("encode takes segments or lengths, not both")
    out = forward(tree, side, tokens, segments=segments, lengths=lengths, positions=positions, logits=False, **given)
    hidden = out.last
    if cfg.projection:
        projection = params["projection"]
        hidden = einsum("BSD,DW->BSW", hidden, projection["product"]) + projection["bias"].astype(hidden.dtype)[None, None]
    if segments is None:
        segments = jnp.ones(hidden.shape[:2], jnp.int32)
        if lengths is not None:
            segments = (jnp.arange(hidden.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
        if positions is not None:
            segments = (jnp.asarray(positions) >= 0).astype(jnp.int32)
    return Memory(hidden, None, segments, out.routing)


def remember(params: PyTree, cfg: config.EncoderDecoder | config.Decoder, memory: Memory) -> Memory:
    """The memory with every layer's keys and values in place of the encoder's vectors: for a source that is read many times.

    Raises:
      ValueError: for one that has them already.
    """
    side = cfg.decoder if isinstance(cfg, config.EncoderDecoder) else cfg
    if memory.hidden is None:
        raise ValueError("this memory holds keys and values already, and not the encoder's vectors that they are made of")
    layers = stack.remember(params["decoder"]["blocks"], side.stack, memory.hidden, memory.segments)
    return Memory(None, layers, memory.segments)


def logits(params: PyTree, cfg: config.Decoder | config.EncoderDecoder, last: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits from `Output.last`."""
    cfg = cfg.decoder if isinstance(cfg, config.EncoderDecoder) else cfg
    params = params["decoder"]
    return embed.logits(params.get("head", {}), params["embedding"]["tokens"], cfg.head, last)


@dataclasses.dataclass(frozen=True)
class Model:
    """A config, its weights and, where there is one, the tokenizer: what `jaxlm.load` gives and programs pass around."""

    config: config.Config
    params: PyTree
    tokenizer: Any = None

    @property
    def decoder(self) -> config.Decoder:
        """The config of what writes text.

        Raises:
          ValueError: for an encoder.
        """
        if isinstance(self.config, config.Encoder):
            raise ValueError("an encoder writes no text: this needs a decoder or an encoder-decoder")
        return self.config.decoder if isinstance(self.config, config.EncoderDecoder) else self.config

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
        leaves, cfg = jax.tree.leaves(self.params), self.config
        sides = (cfg.encoder, cfg.decoder) if isinstance(cfg, config.EncoderDecoder) else (cfg,)
        layers, widths = (" + ".join(str(value(side)) for side in sides)
                          for value in (lambda side: side.stack.layers, lambda side: side.width))
        return (f"Model({type(cfg).__name__} of {layers} layers, width {widths}, "
                f"{sum(leaf.size for leaf in leaves):,} weights in {leaves[0].dtype}, {self.tokenizer!r})")

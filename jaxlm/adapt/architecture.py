"""Decoders, encoders and encoder-decoders out of one another. Weights are copied only where a new model holds them twice, or
where layers that lay stacked together no longer do; all others are the given model's own arrays.

One stack can also be all three without being changed, as UniXcoder's is (https://arxiv.org/abs/2203.03850), whose texts begin
with the token of their mode: of a decoder, `jaxlm.forward` with `prefix` 0 is a decoder, with every text's own length an
encoder, and with that of its source an encoder-decoder. A stack read as an encoder becomes such a decoder by `to_decoder`.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxlm import block, config, params, sharding
from jaxlm import model as models
from jaxlm.layers import embed
from jaxlm.model import Model

CROSS = "cross_attention"


def to_encoder_decoder(model: Model, encoder: Model | None = None, *, start: Sequence[int] | None = None, shared: bool = False,
                       key: Key[Array, ""] | None = None) -> Model:
    """A decoder that learns to read: every layer attends to what an encoder makes of a source.

    The encoder is a copy of the decoder without the causal mask, or made so of another model. Cross-attention stands behind
    self-attention, has no positions and no window, and begins as a copy of it with its norms. Where the encoder is of another
    width it begins fresh, and is best trained alone first: see `but_cross_attention`.

    Args:
      model: a decoder.
      encoder: a decoder or an encoder, of any size; its head is left out. None: the decoder itself.
      start: the tokens that a text of the decoder's begins with; None is the tokenizer's first one (BOS, or else the end).
      shared: both sides read the decoder's table of tokens. Else the encoder keeps its own, as T5Gemma's does.
      key: for fresh weights.

    Raises:
      ValueError: for a model that is no decoder by itself, for fresh weights without a key, and for what
        `jaxlm.config.EncoderDecoder` refuses.

    Reference: Zhang et al. 2025, https://arxiv.org/abs/2504.06225
    """
    cfg = _single(model, "to_encoder_decoder", config.Decoder)
    if start is None:
        ids = () if model.tokenizer is None else (model.tokenizer.bos_id, model.tokenizer.eos_id)
        start = [token for token in ids if token is not None][:1]
        if not start:
            raise ValueError("the model has no tokenizer that says what a text begins with: give `start`")
    encoder = model if encoder is None else encoder
    reader, tree = _single(encoder, "to_encoder_decoder's encoder", config.Decoder, config.Encoder), encoder.params
    if isinstance(reader, config.Decoder):
        reader, tree = _as_encoder(reader, tree)
    reader, read = dataclasses.replace(reader, head=None), _without(tree["encoder"], "head")
    if shared:
        read = read | {"embedding": _without(read["embedding"], "tokens")}
    held = {id(leaf) for leaf in jax.tree.leaves(model.params)}
    read = jax.tree.map(lambda leaf: _copy(leaf) if id(leaf) in held else leaf, read)

    def crossing(one: config.Block) -> config.Block:
        if isinstance(one.attention, config.LatentAttention):
            raise ValueError("to_encoder_decoder makes cross-attention of the decoder's self-attention, which must be an "
                             "Attention, not a LatentAttention")
        cross = dataclasses.replace(one.attention, position=None, causal=False, window=None, source=reader.width)
        return dataclasses.replace(one, cross=cross)

    stack = config.Stack(tuple(dataclasses.replace(group, pattern=tuple(map(crossing, group.pattern)))
                               for group in cfg.stack.groups))
    whole = config.EncoderDecoder(reader, dataclasses.replace(cfg, stack=stack), tuple(start), shared)
    fresh = None
    if reader.width != cfg.width:
        if key is None:
            raise ValueError(f"the encoder is {reader.width} wide and the decoder {cfg.width}: cross-attention begins fresh "
                             "and needs a key")
        fresh = {"decoder": {"blocks": {g: {p: _crossing(tree) for p, tree in places.items()}
                                        for g, places in models.spec(whole)["decoder"]["blocks"].items()}}}
        fresh = init(model, fresh, key)["decoder"]["blocks"]

    def place(g: int, p: int, one: config.Block) -> PyTree:
        tree = model.params["decoder"]["blocks"][str(g)][str(p)]
        if fresh is not None:
            return tree | fresh[str(g)][str(p)]
        made = _crossing(block.spec(one, cfg.width))
        names = {name: name.replace(CROSS, "attention") for name in made}
        copied = {name: _without(tree[theirs], "relative_bias") for name, theirs in names.items() if theirs in tree}
        # A block whose attention reads the stream without a norm has none to copy: ones (and zeros) it begins with.
        bare = {name: spec for name, spec in made.items() if names[name] not in tree}
        bare = jax.tree.map(lambda param, n=stack.groups[g].repeats: param.stacked(n), bare)
        fresh_norms = init(model, {"norms": bare}, jax.random.key(0))["norms"] if bare else {}
        return tree | jax.tree.map(_copy, copied) | fresh_norms

    blocks = {str(g): {str(p): place(g, p, one) for p, one in enumerate(group.pattern)} for g, group in enumerate(stack.groups)}
    return Model(whole, {"encoder": read, "decoder": model.params["decoder"] | {"blocks": blocks}}, model.tokenizer)


def but_cross_attention(cfg: config.EncoderDecoder) -> tuple[str, ...]:
    """The paths of all weights but cross-attention's, its norms' and the product's between encoder and decoder: what is frozen
    (`jaxlm.training.optimizer.Freeze`) while fresh cross-attention warms up."""
    return tuple(path for path in params.paths(models.spec(cfg)) if CROSS not in path and not path.startswith("projection/"))


def to_encoder(model: Model, layers: str | Sequence[int] = "all", head: str | Any = None, *,
               key: Key[Array, ""] | None = None) -> Model:
    """A decoder whose tokens see both sides: first step of LLM2Vec, and of training a decoder on as a masked language model.

    A window stays one, and then reaches as far to the right. Causal buckets of a relative bias count all that follows as
    distance 0.

    Args:
      model: a decoder, or an encoder, of which layers and head are then chosen.
      layers: "all", or the numbers of those that see both sides: the others are causal.
      head: None for hidden states; "masked" keeps the one that gave logits, for masked language models; or a
        `jaxlm.config.Head`, `Classifier` or `Vector`.
      key: for the weights of a new head that has some.

    Raises:
      ValueError: for a model that attends to a source or is two, layers that are no numbers or do not exist, "masked" of a
        model without logits, and a new head without a key.

    Reference: BehnamGhader et al. 2024, https://arxiv.org/abs/2404.05961; Gisserot-Boukhlef et al. 2025,
    https://arxiv.org/abs/2507.00994
    """
    cfg = _single(model, "to_encoder", config.Decoder, config.Encoder)
    count = cfg.stack.layers
    try:
        chosen = range(count) if isinstance(layers, str) and layers == "all" else [operator.index(one) for one in layers]
    except TypeError:
        raise ValueError(f'layers must be "all" or numbers of layers, got {layers!r:.80}') from None
    wrong = [layer for layer in chosen if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"layer {wrong[0]} does not exist: 0 to {count - 1}")
    if isinstance(head, str):
        if head != "masked" or not isinstance(cfg.head, config.Head):
            raise ValueError(f'head must be None, "masked" of a model that gives logits, or a config of one, got {head!r} of '
                             f"{type(cfg.head).__name__}")
        head = cfg.head
    made, tree = _as_encoder(cfg, model.params, frozenset(chosen))
    if head != made.head:
        weights = {} if head is None else embed.head_spec(head, made.embedding, made.width)
        if weights and key is None:
            raise ValueError(f"the weights of a new {type(head).__name__} need a key")
        made, side = dataclasses.replace(made, head=head), _without(tree["encoder"], "head")
        tree = {"encoder": side | init(model, {"encoder": {"head": weights}}, key)["encoder"] if weights else side}
    return Model(made, tree, model.tokenizer)


def to_decoder(model: Model, head: config.Head | None = None, *, key: Key[Array, ""] | None = None) -> Model:
    """An encoder whose tokens see only what stands before them, to be trained on as a causal language model.

    Args:
      model: an encoder.
      head: None keeps a masked language model's; in place of any other the logits are those of the table of tokens.
      key: for the weights of a new head that has some.

    Raises:
      ValueError: for a model that is no encoder by itself, one without such a head and with a table of another width, and for
        a new head without a key.
    """
    cfg = _single(model, "to_decoder", config.Encoder)
    blocks = [_causal(one, True) for one in cfg.stack.blocks()]
    stack, tree = rebuilt(model.params["encoder"], cfg.stack, blocks)
    if head is None and isinstance(cfg.head, config.Head):
        head = cfg.head
    if head is None or head != cfg.head:
        head, tree = head or config.Head(tied=True), _without(tree, "head")
        weights = embed.head_spec(head, cfg.embedding, cfg.width)
        if weights and key is None:
            raise ValueError("the weights of a new Head need a key")
        tree = tree | (init(model, {"head": weights}, key) if weights else {})
    made = config.Decoder(cfg.width, cfg.embedding, stack, cfg.norm, head, cfg.length)
    return Model(made, {"decoder": tree}, model.tokenizer)


def encoder_of(model: Model) -> Model:
    """The encoder of an encoder-decoder, alone and without a head.

    Raises:
      ValueError: for another model.
    """
    if not isinstance(model.config, config.EncoderDecoder):
        raise ValueError(f"encoder_of takes an encoder-decoder, got a {type(model.config).__name__}")
    return Model(*models.encoder(model.config, model.params), model.tokenizer)


def decoder_of(model: Model) -> Model:
    """The decoder of an encoder-decoder, alone and without its attention to a source: CodeT5+'s decoder-only mode.

    Raises:
      ValueError: for an encoder.
    """
    cfg = model.decoder
    stack, tree = rebuilt(model.params["decoder"], cfg.stack,
                           [dataclasses.replace(one, cross=None) for one in cfg.stack.blocks()])
    blocks = {g: {p: {name: leaf for name, leaf in place.items() if not name.startswith(CROSS)} for p, place in places.items()}
              for g, places in tree["blocks"].items()}
    return Model(dataclasses.replace(cfg, stack=stack), {"decoder": tree | {"blocks": blocks}}, model.tokenizer)


def _single(model: Model, name: str, *kinds: type) -> Any:
    """The model's config, when it is one side that attends to no source."""
    if not isinstance(model.config, kinds):
        raise ValueError(f"{name} takes the model of a config {' or '.join(kind.__name__ for kind in kinds)}, got "
                         f"{type(model.config).__name__}; encoder_of and decoder_of take an EncoderDecoder apart")
    if any(one.cross is not None for one in model.config.stack.blocks()):
        raise ValueError(f"{name} takes a model that attends to no source: decoder_of leaves that out")
    return model.config


def _without(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: leaf for key, leaf in tree.items() if key != name}


def _copy(leaf: Any) -> Any:
    return leaf.copy()


def _crossing(tree: dict[str, Any]) -> dict[str, Any]:
    """What of a block's tree belongs to cross-attention."""
    return {name: leaf for name, leaf in tree.items() if name.startswith(CROSS)}


def _causal(one: config.Block, causal: bool) -> config.Block:
    return dataclasses.replace(one, attention=dataclasses.replace(one.attention, causal=causal))


def _as_encoder(cfg: config.Decoder | config.Encoder, tree: PyTree,
                chosen: frozenset[int] | None = None) -> tuple[config.Encoder, PyTree]:
    """The encoder of which only the chosen layers see both sides, and its weights."""
    blocks = [_causal(one, chosen is not None and layer not in chosen) for layer, one in enumerate(cfg.stack.blocks())]
    stack, side = rebuilt(tree["decoder" if isinstance(cfg, config.Decoder) else "encoder"], cfg.stack, blocks)
    return config.Encoder(cfg.width, cfg.embedding, stack, cfg.norm, cfg.head, cfg.length), {"encoder": side}


def rebuilt(side: dict[str, Any], old: config.Stack, blocks: Sequence[config.Block]) -> tuple[config.Stack, dict[str, Any]]:
    """The stack of these blocks, in place of the old ones, and the side's tree with the weights where they then lie. A group
    whose repeats are no longer alike is split, and its weights copied."""
    groups, trees, first = [], [], 0
    for g, group in enumerate(old.groups):
        places, width = side["blocks"][str(g)], len(group.pattern)
        mine = tuple(blocks[first:first + width * group.repeats])
        first += len(mine)
        if mine == mine[:width] * group.repeats:
            groups.append(config.Group(mine[:width], group.repeats))
            trees.append(places)
            continue
        layer = 0
        for part in config.stack_of(mine).groups:
            size = len(part.pattern)
            trees.append({str(p): _stacked([(places[str(i % width)], i // width) for i in range(
                layer + p, layer + size * part.repeats, size)]) for p in range(size)})
            groups.append(part)
            layer += size * part.repeats
    return config.Stack(tuple(groups)), side | {"blocks": {str(g): tree for g, tree in enumerate(trees)}}


def _stacked(layers: list[tuple[PyTree, int]]) -> PyTree:
    """The weights of these layers, each a repeat of a place, along a leading axis."""
    trees, repeats = zip(*layers, strict=True)
    return jax.tree.map(lambda *leaves: jnp.stack([leaf[r] for leaf, r in zip(leaves, repeats, strict=True)]), *trees)


def init(model: Model, spec: PyTree, key: Key[Array, ""]) -> PyTree:
    """Fresh weights in the model's dtype, split over its mesh."""
    side = "encoder" if isinstance(model.config, config.Encoder) else "decoder"
    dtype = model.params[side]["embedding"]["tokens"].dtype
    if model.mesh is None:
        return params.init(spec, key, dtype)
    return jax.jit(lambda key: params.init(spec, key, dtype), out_shardings=sharding.shardings(spec, model.mesh))(key)

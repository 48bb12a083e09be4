"""T5, mT5, umT5 and Switch Transformers, whole or their encoders alone: a relative bias in place of positions, scores that are
not scaled.

In a Switch some layers have experts, of which a token goes to one; past `expert_capacity` tokens of a row an expert drops the
others, as in transformers 5 and the paper (https://arxiv.org/abs/2101.03961): nothing is added to them. Padding takes no room.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.io.families.fields import ACTIVATIONS, Family, Fields, write_activation
from jaxlm.io.names import VECTOR, Row, of_encoder
from jaxlm.io.source import Source

# Nothing in a T5 ends a text: all distances beyond the last bucket count alike. n_positions is what T5 1.0 was trained with;
# Flan-T5 is used far beyond it. Longer texts than this are refused as mistakes.
UNBOUNDED = 2**15

HEAD, EMBEDDINGS = "lm_head.weight", ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _read(fields: Fields, feedforwards: Callable[[Fields, str, int], list[config.FeedForward]] | None = None,
          ) -> config.EncoderDecoder | config.Encoder:
    """`feedforwards`: those of a side's layers, from its name and how many it has; None is the same in all."""
    width, heads, layers = (fields.integer(key) for key in ("d_model", "num_heads", "num_layers"))
    embedding = config.Embedding(fields.integer("vocab_size"))
    norm = config.RmsNorm(fields.number("layer_norm_epsilon"))
    lengths = [fields.integer(f"max_{side}_position_embeddings") for side in ("encoder", "decoder")]
    decoders = layers if fields.get("num_decoder_layers") is None else fields.integer("num_decoder_layers")
    self_attention = partial(config.Attention, heads, heads, fields.integer("d_kv"), scale=1.0)
    bias = partial(config.RelativeBias, fields.integer("relative_attention_num_buckets"),
                   fields.integer("relative_attention_max_distance"), shared=fields.family != "umt5")
    block = partial(config.Block, residual=config.PreNorm(norm))
    if feedforwards is None:
        dense = _feedforward(fields)
        sides = [dense] * layers, [dense] * decoders
    else:
        sides = feedforwards(fields, "encoder", layers), feedforwards(fields, "decoder", decoders)
    reading = [block(self_attention(bias(bidirectional=True), causal=False), feedforward) for feedforward in sides[0]]
    writing = [block(self_attention(bias()), feedforward, cross=self_attention(None, causal=False, source=width))
               for feedforward in sides[1]]
    # Whoever scales the logits does so because the head was tied. Version 5 of transformers writes that every T5 is tied and
    # says beside it whether to scale, scales every umT5, which is wrong for the released ones, and no mT5.
    tied, scaled = fields.flag("tie_word_embeddings"), fields.get("scale_decoder_outputs")
    scaled = fields.family != "mt5" and (tied if scaled is None else fields.flag("scale_decoder_outputs"))
    first, pad, forced = (fields.get(key) for key in ("decoder_start_token_id", "pad_token_id", "forced_bos_token_id"))
    start = tuple(token for token in (pad if first is None else first, forced) if token is not None)
    fields.get("is_encoder_decoder")  # transformers writes false for an encoder taken out of a T5 and true for one by itself
    encoder = config.Encoder(width, embedding, config.stack_of(reading), norm, None, lengths[0])
    if any("EncoderModel" in name for name in fields.get("architectures") or ()):
        return encoder
    if pad is None and first is None:
        raise ValueError(f"config.json lacks decoder_start_token_id, which {fields.family} needs")
    head = config.Head(tied, scale=width**-0.5 if scaled else 1.0)
    decoder = config.Decoder(width, embedding, config.stack_of(writing), norm, head, lengths[1])
    return config.EncoderDecoder(encoder, decoder, start)


def _feedforward(fields: Fields) -> config.Dense:
    """A non-linearity, or one after "gated-"; the two fields that transformers makes of it come before it."""
    name = fields.get("feed_forward_proj")
    gate, _, kind = name.rpartition("-") if isinstance(name, str) else ("", "", None)
    kind = "gelu_new" if name == "gated-gelu" else kind
    if gate not in ("", "gated") or kind not in ACTIVATIONS:
        raise fields.wrong("feed_forward_proj", f"there is {', '.join(ACTIVATIONS)}, and each of them after gated-")
    gated = gate == "gated" if fields.get("is_gated_act") is None else fields.flag("is_gated_act")
    activation = ACTIVATIONS[kind] if fields.get("dense_act_fn") is None else fields.activation("dense_act_fn")
    return config.Dense(fields.integer("d_ff"), activation, gated)


def _some_sparse(fields: Fields, side: str, layers: int) -> list[config.FeedForward]:
    """A Switch's: every so many layers, beginning with the second, has experts."""
    for key, value in (("router_dtype", "float32"), ("num_selected_experts", 1), ("batch_prioritized_routing", False),
                       ("is_gated_act", False)):
        fields.expect(key, value)
    expert = config.Dense(fields.integer("d_ff"), fields.activation("dense_act_fn"), gated=False)
    moe = config.Moe(fields.integer("num_experts"), expert, config.TopK(1, bias=fields.flag("router_bias")),
                     capacity=config.CapacityTokens(fields.integer("expert_capacity")))
    count, step = (fields.count(key) for key in (f"num_sparse_{side}_layers", f"{side}_sparse_step"))
    if step is None:
        step = layers // count if count else layers  # transformers: with no sparse layer the second is sparse all the same
    return [moe if step == 1 or step > 1 and i % step == 1 else expert for i in range(layers)]


def _write_switch(cfg: config.EncoderDecoder | config.Encoder) -> dict[str, Any]:
    sides = {"encoder": cfg} if isinstance(cfg, config.Encoder) else {"encoder": cfg.encoder, "decoder": cfg.decoder}
    found = {side: [block.feedforward for block in one.stack.blocks()] for side, one in sides.items()}
    moe = next((one for side in found.values() for one in side if isinstance(one, config.Moe)), None)
    if moe is None:
        raise ValueError("no layer is a mixture of experts")
    if not isinstance(moe.router, config.TopK):
        raise ValueError(f"its router is a {type(moe.router).__name__}, and must be a TopK")
    if not isinstance(moe.capacity, config.CapacityTokens):
        raise ValueError(f"its experts' capacity is {moe.capacity}, and must be CapacityTokens")
    values = _write("SwitchTransformers", cfg)
    values |= {"dense_act_fn": values.pop("feed_forward_proj"), "num_experts": moe.experts, "router_bias": moe.router.bias,
               "expert_capacity": moe.capacity.tokens}
    values.pop("scale_decoder_outputs", None)
    for side, feedforwards in found.items():
        sparse = [i for i, one in enumerate(feedforwards) if isinstance(one, config.Moe)]
        step = 1 if 0 in sparse else len(feedforwards) if len(sparse) == 1 else sparse[1] - sparse[0] if sparse else 0
        values |= {f"num_sparse_{side}_layers": len(sparse), f"{side}_sparse_step": step}
    return values


def _write(title: str, cfg: config.EncoderDecoder | config.Encoder) -> dict[str, Any]:
    encoder = cfg if isinstance(cfg, config.Encoder) else cfg.encoder
    block = encoder.stack.blocks()[0]
    attention, feedforward, bias = block.attention, block.feedforward, block.attention.position
    feedforward = feedforward.expert if isinstance(feedforward, config.Moe) else feedforward
    if not isinstance(bias, config.RelativeBias):
        raise ValueError("the first layer has no relative bias")
    names = {(config.Activation.GELU_TANH, True): "gelu", (config.Activation.GELU_TANH, False): "gelu_new",
             (config.Activation.GELU, True): "gelu_python"}
    kind = names.get((feedforward.activation, feedforward.gated)) or write_activation(feedforward.activation)
    values = {"architectures": [f"{title}EncoderModel"], "vocab_size": encoder.embedding.vocabulary, "d_model": encoder.width,
              "d_kv": attention.head_width, "d_ff": feedforward.width, "num_heads": attention.heads,
              "num_layers": encoder.stack.layers, "relative_attention_num_buckets": bias.buckets,
              "relative_attention_max_distance": bias.distance, "layer_norm_epsilon": block.residual.norm.eps,
              "feed_forward_proj": f"gated-{kind}" if feedforward.gated else kind, "is_encoder_decoder": encoder is not cfg}
    lengths = {"encoder": encoder.length}
    if encoder is not cfg:
        decoder = cfg.decoder
        values |= {"architectures": [f"{title}ForConditionalGeneration"], "num_decoder_layers": decoder.stack.layers,
                   "tie_word_embeddings": decoder.head.tied, "scale_decoder_outputs": decoder.head.scale != 1.0,
                   "decoder_start_token_id": cfg.start[0],
                   "forced_bos_token_id": cfg.start[1] if len(cfg.start) > 1 else None}
        lengths["decoder"] = decoder.length
    return values | {f"max_{side}_position_embeddings": length for side, length in lengths.items() if length != UNBOUNDED}


def _settle(cfg: config.Config, source: Source) -> config.Config:
    """Version 5 of transformers writes tie_word_embeddings true for every T5, and unties those that have two matrices."""
    if not isinstance(cfg, config.EncoderDecoder) or not cfg.decoder.head.tied:
        return cfg
    names = source.names()
    words = next((name for name in EMBEDDINGS if name in names), None)
    if HEAD not in names or words is None or np.array_equal(source.read(HEAD), source.read(words)):
        return cfg
    return dataclasses.replace(cfg, decoder=dataclasses.replace(
        cfg.decoder, head=dataclasses.replace(cfg.decoder.head, tied=False)))


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return tuple(Row((f"{{block}}/{ours}/{name}",), f"{theirs}.{name}.weight") for name in "qkvo")


def _side(side: str, feedforward: int, dense: str) -> tuple[Row, ...]:
    """What both sides have, under a decoder's names for our weights; `feedforward`: which of a block's layers that is, `dense`:
    what it is called there."""
    layer = f"{side}.block.{{i}}.layer"
    dense = f"{layer}.{feedforward}.{dense}"
    bias = "0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(("decoder/relative_bias",), f"{side}.block.0.layer.{bias}", plain=True),
        Row(("{block}/attention/relative_bias",), f"{layer}.{bias}", plain=True),
        *_attention("attention", f"{layer}.0.SelfAttention"),
        Row(("{block}/attention_norm/scale",), f"{layer}.0.layer_norm.weight"),
        Row(("{block}/feedforward/up",), f"{dense}.wi.weight", when=_is_plain),
        Row(("{block}/feedforward/gate",), f"{dense}.wi_0.weight"),
        Row(("{block}/feedforward/up",), f"{dense}.wi_1.weight", when=_is_gated),
        Row(("{block}/feedforward/down",), f"{dense}.wo.weight"),
        Row(("{block}/feedforward_norm/scale",), f"{layer}.{feedforward}.layer_norm.weight"),
        Row(("decoder/norm/scale",), f"{side}.final_layer_norm.weight"),
    )


def _experts(side: str, feedforward: int) -> tuple[Row, ...]:
    layer = f"{side}.block.{{i}}.layer.{feedforward}.mlp"
    return (Row(("{block}/feedforward/router/product",), f"{layer}.router.classifier.weight"),
            Row(("{block}/feedforward/router/bias",), f"{layer}.router.classifier.bias"),
            *(Row((f"{{block}}/feedforward/experts/{ours}",), f"{layer}.experts.expert_{{e}}.{theirs}.weight")
              for ours, theirs in (("up", "wi"), ("down", "wo"))))


def _is_gated(block: config.Block) -> bool:
    return block.feedforward.gated


def _is_plain(block: config.Block) -> bool:
    return not block.feedforward.gated


def _is_tied(cfg: config.EncoderDecoder | config.Encoder) -> bool:
    return isinstance(cfg, config.Encoder) or cfg.decoder.head.tied


def _is_untied(cfg: config.EncoderDecoder | config.Encoder) -> bool:
    return not _is_tied(cfg)


_WORDS = Row(("decoder/embedding/tokens",), EMBEDDINGS[0], also=EMBEDDINGS[1:], twins=(HEAD,))
_BEYOND = (
    *_attention("cross_attention", "decoder.block.{i}.layer.1.EncDecAttention"),
    Row(("{block}/cross_attention_norm/scale",), "decoder.block.{i}.layer.1.layer_norm.weight"),
    Row(("decoder/head/out",), HEAD),
    *VECTOR,
)
_TABLE = (_WORDS, *of_encoder(_WORDS, *_side("encoder", 1, "DenseReluDense")), *_side("decoder", 2, "DenseReluDense"), *_BEYOND)
# Version 5 of transformers gives a Switch whose head is not tied three tables of tokens, and reads all of them.
_SWITCH = (dataclasses.replace(_WORDS, when=_is_tied), dataclasses.replace(_WORDS, when=_is_untied, copied=True),
           *of_encoder(_WORDS, *_side("encoder", 1, "mlp"), *_experts("encoder", 1)), *_side("decoder", 2, "mlp"),
           *_experts("decoder", 2), *_BEYOND)

_DEFAULTS = {"d_model": 512, "d_kv": 64, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32,
             "relative_attention_max_distance": 128, "tie_word_embeddings": True, "pad_token_id": 0,
             **{f"max_{side}_position_embeddings": UNBOUNDED for side in ("encoder", "decoder")}}
_SMALL = {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"}
_MULTILINGUAL = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
                 "decoder_start_token_id": 0}

_SPARSE = {"vocab_size": 32128, "d_model": 768, "d_ff": 2048, "expert_capacity": 64, "num_experts": 8, "num_layers": 12,
           "num_decoder_layers": 12, "num_heads": 12, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3,
           "router_bias": False, "router_dtype": "float32", "dense_act_fn": "relu"}
_IGNORED = frozenset({"dropout_rate", "initializer_factor", "n_positions", "output_past", "scalable_attention"})
# Noise and losses of training, and what no class of transformers reads.
_IGNORED_SPARSE = _IGNORED | {"add_router_probs", "feed_forward_proj", "output_router_logits", "router_aux_loss_coef",
                              "router_ignore_padding_tokens", "router_jitter_noise", "router_type", "router_z_loss_coef"}

_family = partial(
    Family, kinds=(config.EncoderDecoder, config.Encoder), bases=("",), settle=_settle,
    aliases={"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
             "head_dim": "d_kv"},
    # The first T5s have a table there that nothing reads.
    leftover=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",))

FAMILIES = (*(
    _family(name, models, f"{title}ForConditionalGeneration", _TABLE, _read, partial(_write, title), defaults=_DEFAULTS | usual,
            ignored=_IGNORED)
    for name, title, models, usual in (
        ("t5", "T5", "T5, T5 1.1, Flan-T5, UL2, ByT5, CodeT5, CodeT5+ 220M and 770M", _SMALL),
        ("mt5", "MT5", "mT5", _MULTILINGUAL),
        ("umt5", "UMT5", "umT5, Pile-T5", _MULTILINGUAL))),
    _family("switch_transformers", "Switch Transformers", "SwitchTransformersForConditionalGeneration", _SWITCH,
            partial(_read, feedforwards=_some_sparse), _write_switch, mixtures=True, defaults=_DEFAULTS | _SPARSE,
            ignored=_IGNORED_SPARSE))

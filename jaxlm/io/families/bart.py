"""BART, mBART, Marian, M2M-100, NLLB and NLLB-MoE: encoder-decoders with layer norms, biases everywhere and one width.

What a text of the decoder begins with is `decoder_start_token_id` and, where there is one, `forced_bos_token_id`.

In an NLLB-MoE (https://arxiv.org/abs/2207.04672) some layers have experts, of which a token goes to two. At inference an expert
has room for a fraction of the tokens: of its row's here, of the whole batch's, padding included, in transformers. Released
models leave room for all. Outputs are scaled by what training kept of them, 1 - `moe_token_dropout`. Version 5 of transformers
sends tokens to the first two experts whatever the router says: this is what the paper, fairseq and version 4 do.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import Family, Fields, write_activation
from jaxlm.io.families.gpt import split_width
from jaxlm.io.names import Row, head, linear, norm, of_encoder

SIDES = ("encoder", "decoder")

# Before the tokens' positions fairseq counts so many places, those up to its padding.
OFFSET = 2


def _sinusoids(fields: Fields, width: int, length: int) -> config.Sinusoidal:
    if width % 2:
        raise fields.wrong("d_model", "Marian's positions need an even width")
    return config.Sinusoidal()


def _fairseq_sinusoids(fields: Fields, width: int, length: int) -> config.Sinusoidal:
    """Their places before the first token are those up to padding, whichever token that is."""
    return config.Sinusoidal(offset=int(fields.number("pad_token_id")) + 1, reaching=True)


def _learned(fields: Fields, width: int, length: int) -> config.Learned:
    return config.Learned(length + OFFSET, OFFSET)


def _vocabularies(fields: Fields, family: str) -> tuple[tuple[int, int], bool, bool]:
    """The two sides', whether they share a table, and whether the decoder shares its with the head."""
    size, tied, shared = fields.integer("vocab_size"), fields.flag("tie_word_embeddings"), True
    sizes = (size, size)
    if family == "marian":
        shared = fields.flag("share_encoder_decoder_embeddings")
        if fields.get("decoder_vocab_size") is not None:
            sizes = (size, fields.integer("decoder_vocab_size"))
    if shared and sizes[0] != sizes[1]:
        raise fields.wrong("decoder_vocab_size", f"the sides share a table: it must be vocab_size, {size}")
    if shared and not tied:
        raise fields.wrong("tie_word_embeddings", "the head must share the table that the encoder and the decoder share")
    return sizes, shared, tied


def _start(fields: Fields, size: int) -> tuple[int, ...]:
    first = fields.get("decoder_start_token_id")
    if first is None:  # as in generation by transformers
        first = fields.get("bos_token_id")
    start = tuple(token for token in (first, fields.get("forced_bos_token_id")) if token is not None)
    if first is None or not all(isinstance(token, int) and 0 <= token < size for token in start):
        raise fields.wrong("decoder_start_token_id", f"it and forced_bos_token_id must be ids below {size}")
    return start


def _same(fields: Fields, side: str, dense: config.Dense, layers: int) -> list[config.FeedForward]:
    return [dense] * layers


def _some_sparse(fields: Fields, side: str, dense: config.Dense, layers: int) -> list[config.FeedForward]:
    """NLLB-MoE's: the last of every so many layers has experts."""
    fields.expect("router_dtype", "float32")
    fields.expect("second_expert_policy", "all")
    fraction, dropout = fields.number("moe_eval_capacity_token_fraction"), fields.number("moe_token_dropout")
    before, prioritized = fields.flag("normalize_router_prob_before_dropping"), fields.flag("batch_prioritized_routing")
    if fraction <= 0:
        raise fields.wrong("moe_eval_capacity_token_fraction", "it must be above 0: with the capacity of training what is "
                           "dropped would depend on the batch")
    if not 0 <= dropout < 1:
        raise fields.wrong("moe_token_dropout", "a number from 0 to below 1 is needed")
    capacity = None if fraction >= 1 else config.CapacityFraction(fraction, not before, prioritized)
    router = config.TopK(2, normalize=True, scale=1 - dropout, bias=fields.flag("router_bias"))
    moe = config.Moe(fields.integer("num_experts"), dense, router, capacity=capacity)
    step = fields.count(f"{side}_sparse_step")
    return [moe if step and (i + 1) % step == 0 else dense for i in range(layers)]


def _read(fields: Fields, *, position: Callable[[Fields, int, int], Any], pre: bool, embedding_norm: bool, bias: bool,
          feedforwards: Callable[[Fields, str, config.Dense, int], list[config.FeedForward]] = _same) -> config.EncoderDecoder:
    named = fields.get("architectures")
    family = next(one for one in FAMILIES if one.name == fields.family)
    base = family.architecture.replace("ForConditionalGeneration", "Model").replace("MTModel", "Model")
    if named and not {family.architecture, base} & set(named):
        raise fields.wrong("architectures", f"there is {family.architecture} and {base}")
    for key, value in (("is_encoder_decoder", True), ("normalize_before", pre), ("add_final_layer_norm", pre),
                       ("normalize_embedding", embedding_norm),
                       ("static_position_embeddings", position is not _learned)):
        fields.expect(key, value)
    sizes, shared, tied = _vocabularies(fields, family.name)
    length, layer_norm = fields.integer("max_position_embeddings"), config.LayerNorm()
    activation = fields.activation("activation_function")
    width = fields.integer("d_model")
    embedding = {"scale": math.sqrt(width) if fields.flag("scale_embedding") else None,
                 "position": position(fields, width, length), "norm": layer_norm if embedding_norm else None}
    stacks = []
    for side in SIDES:
        _, heads, head_width = split_width(fields, "d_model", f"{side}_attention_heads")
        attention, cross = (config.Attention(heads, heads, head_width, None, causal, bias=True, out_bias=True, source=source)
                            for causal, source in ((side == "decoder", None), (False, width)))
        dense = config.Dense(fields.integer(f"{side}_ffn_dim"), activation, False, True)
        block = partial(config.Block, attention, residual=(config.PreNorm if pre else config.PostNorm)(layer_norm),
                        cross=cross if side == "decoder" else None)
        stacks.append(config.stack_of([block(feedforward=one) for one in feedforwards(
            fields, side, dense, fields.integer(f"{side}_layers"))]))
    last = layer_norm if pre else None
    # A base model alone comes without the bias.
    head = config.Head(tied, bias=bias and (not named or family.architecture in named))
    return config.EncoderDecoder(
        config.Encoder(width, config.Embedding(sizes[0], **embedding), stacks[0], last, None, length),
        config.Decoder(width, config.Embedding(sizes[1], **embedding), stacks[1], last, head, length),
        _start(fields, sizes[1]), shared)


def _dense(block: config.Block) -> config.Dense:
    return block.feedforward.expert if isinstance(block.feedforward, config.Moe) else block.feedforward


def _write(cfg: config.EncoderDecoder) -> dict[str, Any]:
    values: dict[str, Any] = {
        "is_encoder_decoder": True, "vocab_size": cfg.encoder.embedding.vocabulary, "d_model": cfg.decoder.width,
        "max_position_embeddings": cfg.decoder.length, "scale_embedding": cfg.decoder.embedding.scale is not None,
        "activation_function": write_activation(_dense(cfg.decoder.stack.blocks()[0]).activation),
        "tie_word_embeddings": cfg.decoder.head.tied, "decoder_start_token_id": cfg.start[0],
        "forced_bos_token_id": cfg.start[1] if len(cfg.start) > 1 else None}
    for side, one in zip(SIDES, (cfg.encoder, cfg.decoder), strict=True):
        block = one.stack.blocks()[0]
        values |= {f"{side}_layers": one.stack.layers, f"{side}_attention_heads": block.attention.heads,
                   f"{side}_ffn_dim": _dense(block).width}
    return values


def _write_with_bias(cfg: config.EncoderDecoder, base: str) -> dict[str, Any]:
    return _write(cfg) | ({} if cfg.decoder.head.bias else {"architectures": [base]})


def _write_marian(cfg: config.EncoderDecoder) -> dict[str, Any]:
    return _write_with_bias(cfg, "MarianModel") | {"decoder_vocab_size": cfg.decoder.embedding.vocabulary,
                                                   "share_encoder_decoder_embeddings": cfg.shared}


def _write_m2m(cfg: config.EncoderDecoder) -> dict[str, Any]:
    position = cfg.decoder.embedding.position
    return _write(cfg) | {"pad_token_id": position.offset - 1 if isinstance(position, config.Sinusoidal) else None}


def _write_nllb_moe(cfg: config.EncoderDecoder) -> dict[str, Any]:
    found = {side: [block.feedforward for block in one.stack.blocks()]
             for side, one in zip(SIDES, (cfg.encoder, cfg.decoder), strict=True)}
    moe = next((one for side in found.values() for one in side if isinstance(one, config.Moe)), None)
    if moe is None:
        raise ValueError("no layer is a mixture of experts")
    if not isinstance(moe.router, config.TopK):
        raise ValueError(f"its router is a {type(moe.router).__name__}, and must be a TopK")
    if not isinstance(moe.capacity, config.CapacityFraction | None):
        raise ValueError(f"its experts' capacity is {moe.capacity}, and must be CapacityFraction or None")
    values = _write_m2m(cfg) | {"num_experts": moe.experts, "router_bias": moe.router.bias, "second_expert_policy": "all",
                                "moe_token_dropout": 1 - moe.router.scale, "moe_eval_capacity_token_fraction": 1.0}
    if moe.capacity is not None:
        values |= {"moe_eval_capacity_token_fraction": moe.capacity.fraction,
                   "normalize_router_prob_before_dropping": not moe.capacity.rescale,
                   "batch_prioritized_routing": moe.capacity.prioritized}
    for side, feedforwards in found.items():
        values[f"{side}_sparse_step"] = next(
            (i + 1 for i, one in enumerate(feedforwards) if isinstance(one, config.Moe)), 0)
    return values


def _side(side: str, cross: str = "encoder_attn", dense: str = "", last: str = "final") -> tuple[Row, ...]:
    """What both sides have, under a decoder's names for our weights; the rest is what theirs are called."""
    layer = f"{{base}}{side}.layers.{{i}}"
    rows = [Row(("decoder/embedding/positions",), f"{{base}}{side}.embed_positions.weight"),
            *norm("decoder/embedding/norm", f"{{base}}{side}.layernorm_embedding"),
            *norm("decoder/norm", f"{{base}}{side}.layer_norm"),
            *linear("{block}/feedforward/up", f"{layer}.{dense}fc1"),
            *linear("{block}/feedforward/down", f"{layer}.{dense}fc2")]
    for ours, theirs in (("attention", "self_attn"), ("cross_attention", cross)):
        for mine in "qkv":
            rows += linear(f"{{block}}/{ours}/{mine}", f"{layer}.{theirs}.{mine}_proj")
        rows += linear(f"{{block}}/{ours}/o", f"{layer}.{theirs}.out_proj")
    for ours, theirs in (("attention", "self_attn"), ("cross_attention", cross), ("feedforward", last)):
        for end in ("", "_out"):
            rows += norm(f"{{block}}/{ours}_norm{end}", f"{layer}.{theirs}_layer_norm")
    return tuple(rows)


_TOKENS = "{base}%s.embed_tokens.weight"

def _sparse_side(side: str) -> tuple[Row, ...]:
    layer = f"{{base}}{side}.layers.{{i}}.ffn"
    rows = [*_side(side, "cross_attention", "ffn.", "ff"),
            Row(("{block}/feedforward/router/product",), f"{layer}.router.classifier.weight"),
            Row(("{block}/feedforward/router/bias",), f"{layer}.router.classifier.bias")]
    for ours, theirs in (("up", "fc1"), ("down", "fc2")):
        rows += linear(f"{{block}}/feedforward/experts/{ours}", f"{layer}.experts.expert_{{e}}.{theirs}")
    return tuple(rows)


_ENDS = (
    Row(("decoder/embedding/tokens",), "{base}shared.weight", also=tuple(_TOKENS % side for side in SIDES),
        twins=("lm_head.weight",), when=lambda cfg: cfg.shared),
    Row(("decoder/embedding/tokens",), _TOKENS % "decoder", twins=("lm_head.weight",), when=lambda cfg: not cfg.shared),
    *of_encoder(Row(("decoder/embedding/tokens",), _TOKENS % "encoder")),
    head("lm_head")[0],
    Row(("decoder/head/bias",), "final_logits_bias", out_axis=1),
)
_TABLE = (*_ENDS, *of_encoder(*_side("encoder")), *_side("decoder"))
_SPARSE_TABLE = (*_ENDS, *of_encoder(*_sparse_side("encoder")), *_sparse_side("decoder"))

_DEFAULTS = {"max_position_embeddings": 1024, "d_model": 1024, "scale_embedding": False, "tie_word_embeddings": True,
             "activation_function": "gelu", "bos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2} | {
    f"{side}_{key}": value for side in SIDES for key, value in (("layers", 12), ("ffn_dim", 4096), ("attention_heads", 16))}
_SPELLINGS = {"num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model", "num_hidden_layers": "encoder_layers"}
# Dropout, initialisation, and what older versions of transformers and fairseq wrote and never read for these models.
_IGNORED = frozenset("""
    _num_labels activation_dropout add_bias_logits classif_dropout decoder_layerdrop do_blenderbot_90_layernorm dropout
    encoder_layerdrop extra_pos_embeddings force_bos_token_to_be_generated init_std layerdrop output_past replacing_rate
    save_step student_decoder_layers student_encoder_layers
""".split())
_BUFFERS = (r".*coder\.version", r".*\.embed_positions\._float_tensor")
_SINUSOIDS = (*_BUFFERS, r".*\.embed_positions\.weights?")

_MANY = _DEFAULTS | {"vocab_size": 128112, "activation_function": "relu", "scale_embedding": True}
_SPARSE = _MANY | {"num_experts": 128, "encoder_sparse_step": 4, "decoder_sparse_step": 4, "moe_token_dropout": 0.2,
                   "moe_eval_capacity_token_fraction": 1.0, "router_dtype": "float32"}
# Losses of training, what it has room for, and what padding does: here it goes to no expert.
_IGNORED_SPARSE = _IGNORED | {"expert_capacity", "output_router_logits", "router_aux_loss_coef", "router_ignore_padding_tokens",
                              "router_z_loss_coef"}

_family = partial(Family, table=_TABLE, kinds=(config.EncoderDecoder,), bases=("model.", ""), aliases=_SPELLINGS,
                  ignored=_IGNORED)

FAMILIES = (
    _family("bart", "BART", "BartForConditionalGeneration", leftover=_BUFFERS, defaults=_DEFAULTS | {"vocab_size": 50265},
            read=partial(_read, position=_learned, pre=False, embedding_norm=True, bias=True),
            write=partial(_write_with_bias, base="BartModel")),
    _family("mbart", "mBART, mBART-50", "MBartForConditionalGeneration", leftover=_BUFFERS,
            defaults=_DEFAULTS | {"vocab_size": 50265, "decoder_start_token_id": None},
            read=partial(_read, position=_learned, pre=True, embedding_norm=True, bias=True),
            write=partial(_write_with_bias, base="MBartModel")),
    _family("marian", "Marian (opus-mt)", "MarianMTModel", leftover=_SINUSOIDS,
            defaults=_DEFAULTS | {"vocab_size": 58101, "decoder_start_token_id": 58100, "pad_token_id": 58100,
                                  "bos_token_id": None, "share_encoder_decoder_embeddings": True},
            read=partial(_read, position=_sinusoids, pre=False, embedding_norm=False, bias=True), write=_write_marian),
    _family("m2m_100", "M2M-100, NLLB", "M2M100ForConditionalGeneration", leftover=_SINUSOIDS,
            defaults=_MANY, write=_write_m2m,
            read=partial(_read, position=_fairseq_sinusoids, pre=True, embedding_norm=False, bias=False)),
    _family("nllb-moe", "NLLB-MoE 54B", "NllbMoeForConditionalGeneration", table=_SPARSE_TABLE, leftover=_SINUSOIDS,
            defaults=_SPARSE, write=_write_nllb_moe, mixtures=True, ignored=_IGNORED_SPARSE,
            read=partial(_read, position=_fairseq_sinusoids, pre=True, embedding_norm=False, bias=False,
                         feedforwards=_some_sparse)),
)

"""BLOOM, MPT and Falcon: layer norms and ALiBi; most Falcons have rotary positions in its place."""

import math
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm import config
from jaxlm.io.families.fields import Family, Fields, decoder, rope, write_activation, write_rope
from jaxlm.io.families.gpt import QKV, split_width
from jaxlm.io.names import Row, head, linear, norm
from jaxlm.layers.position import alibi_slopes

H = "{base}h.{i}"
BLOCK = "{base}blocks.{i}"


def _read_bloom(fields: Fields) -> config.Decoder:
    width, heads, head_width = split_width(fields, "hidden_size", "n_head")
    layer_norm = config.LayerNorm(fields.number("layer_norm_epsilon"))
    fields.expect("apply_residual_connection_post_layernorm", False)
    attention = config.Attention(heads, heads, head_width, config.Alibi(alibi_slopes(heads)), bias=True, out_bias=True)
    block = config.Block(attention, config.Dense(4 * width, config.Activation.GELU_TANH, False, True),
                         config.PreNorm(layer_norm))
    return decoder(fields, width, [block] * fields.integer("n_layer"), layer_norm, fields.integer("seq_length"),
                   embedding={"norm": layer_norm})


def _write_bloom(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    return {"vocab_size": cfg.embedding.vocabulary, "hidden_size": cfg.width, "n_layer": cfg.stack.layers,
            "n_head": block.attention.heads, "layer_norm_epsilon": block.residual.norm.eps, "seq_length": cfg.length,
            "tie_word_embeddings": cfg.head.tied}


def _read_mpt(fields: Fields) -> config.Decoder:
    width, heads, head_width = split_width(fields, "d_model", "n_heads")
    inner = fields.inner("attn_config", fields.get("attn_config"))
    # transformers always takes 8 and so computes something else than MosaicML's own code for MPT-7B-StoryWriter, with 16.
    top = inner.optional("alibi_bias_max")
    for key, value in (("attn_type", "multihead_attention"), ("alibi", True), ("attn_uses_sequence_id", False),
                       ("prefix_lm", False), ("qk_ln", False)):
        inner.expect(key, value)
    scale, clip = inner.optional("softmax_scale"), inner.optional("clip_qkv")
    inner.finish(frozenset({"attn_impl", "attn_pdrop"}))
    for key, value in (("expansion_ratio", 4), ("no_bias", True), ("logit_scale", None)):
        fields.expect(key, value)
    fields.expect("norm_type", "low_precision_layernorm", "layernorm")
    layer_norm = config.LayerNorm(fields.number("layer_norm_epsilon"), bias=False)
    attention = config.Attention(heads, heads, head_width, config.Alibi(alibi_slopes(heads, 8.0 if top is None else top)),
                                 scale=scale, clip=clip)
    block = config.Block(attention, config.Dense(4 * width, config.Activation.GELU, False), config.PreNorm(layer_norm))
    return decoder(fields, width, [block] * fields.integer("n_layers"), layer_norm, fields.integer("max_seq_len"))


def _write_mpt(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    attention = block.attention
    top = 8
    if isinstance(attention.position, config.Alibi):
        # The first slope is 2 ** (-top / n), n the power of two up to the number of heads.
        top = round(-math.log2(attention.position.slopes[0]) * 2 ** math.floor(math.log2(attention.heads)))
    return {"vocab_size": cfg.embedding.vocabulary, "d_model": cfg.width, "n_layers": cfg.stack.layers,
            "n_heads": attention.heads, "expansion_ratio": 4, "max_seq_len": cfg.length, "no_bias": True,
            "learned_pos_emb": False, "layer_norm_epsilon": block.residual.norm.eps, "tie_word_embeddings": cfg.head.tied,
            "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": top,
                            "softmax_scale": attention.scale, "clip_qkv": attention.clip}}


def _two_norms(block: config.Block) -> bool:
    return isinstance(block.residual, config.ParallelNorm) and not block.residual.shared


def _falcon_alibi(fields: Fields, heads: int, head_width: int) -> config.Alibi:
    """Its bias is rounded to bfloat16 and then divided by the root of the head's width: the same, for powers of two, as
    rounding what was divided before."""
    root = math.sqrt(head_width)
    if math.frexp(root)[0] != 0.5:
        raise fields.wrong("alibi", f"heads of width {head_width}; with ALiBi it must be 4, 16, 64 or 256")
    slopes = np.asarray(alibi_slopes(heads), np.float32).astype(ml_dtypes.bfloat16)
    return config.Alibi(tuple(float(slope) / root for slope in slopes), rounded=True)


def _read_falcon(fields: Fields) -> config.Decoder:
    width, heads, head_width = split_width(fields, "hidden_size", "num_attention_heads")
    new, parallel, bias = (fields.flag(key) for key in ("new_decoder_architecture", "parallel_attn", "bias"))
    multi_query = fields.flag("multi_query")
    given = heads if fields.get("num_kv_heads") is None else fields.integer("num_kv_heads")
    kv_heads = given if new else 1 if multi_query else heads
    norms = fields.get("num_ln_in_parallel_attn")
    if new and not parallel:
        raise fields.wrong("parallel_attn", "new_decoder_architecture has it true")
    if norms not in ((None, 1, 2) if new else (None, 1)):
        raise fields.wrong("num_ln_in_parallel_attn", "1, or 2 with new_decoder_architecture")
    if fields.flag("alibi"):
        position, length = _falcon_alibi(fields, heads, head_width), fields.integer("max_position_embeddings")
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            fields.get(key)
    else:
        position, length = rope(fields, head_width)
    fields.expect("apply_residual_connection_post_layernorm", False)
    layer_norm = config.LayerNorm(fields.number("layer_norm_epsilon"))
    residual = (config.ParallelNorm(layer_norm, shared=not new or norms == 1) if parallel else config.PreNorm(layer_norm))
    inner = 4 * width if fields.get("ffn_hidden_size") is None else fields.integer("ffn_hidden_size")
    block = config.Block(config.Attention(heads, kv_heads, head_width, position, bias=bias, out_bias=bias),
                         config.Dense(inner, fields.activation("activation"), False, bias), residual)
    return decoder(fields, width, [block] * fields.integer("num_hidden_layers"), layer_norm, length)


def _write_falcon(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    attention, residual = block.attention, block.residual
    alibi = isinstance(attention.position, config.Alibi)
    two_norms = _two_norms(block)
    new = two_norms or attention.kv_heads not in (1, attention.heads)
    return ({"max_position_embeddings": cfg.length} if alibi else write_rope(cfg)) | {
        "vocab_size": cfg.embedding.vocabulary, "hidden_size": cfg.width, "num_hidden_layers": cfg.stack.layers,
        "num_attention_heads": attention.heads, "num_kv_heads": attention.kv_heads, "alibi": alibi,
        "new_decoder_architecture": new, "multi_query": attention.kv_heads == 1,
        "parallel_attn": isinstance(residual, config.ParallelNorm),
        "num_ln_in_parallel_attn": 2 if two_norms else 1, "bias": attention.bias,
        "ffn_hidden_size": block.feedforward.width, "activation": write_activation(block.feedforward.activation),
        "layer_norm_epsilon": residual.norm.eps, "tie_word_embeddings": cfg.head.tied}


_INTERLEAVED = (
    *linear(QKV, f"{H}.self_attention.query_key_value", blocks=None),
    *linear("{block}/attention/o", f"{H}.self_attention.dense"),
    *linear("{block}/feedforward/up", f"{H}.mlp.dense_h_to_4h"),
    *linear("{block}/feedforward/down", f"{H}.mlp.dense_4h_to_h"),
    Row(("decoder/embedding/tokens",), "{base}word_embeddings.weight", twins=("lm_head.weight",)),
    *norm("decoder/norm", "{base}ln_f"),
    *head("lm_head"),
)

FAMILIES = (
    Family("falcon", "Falcon 7B, 40B, 180B, RW; Falcon 2 11B", "FalconForCausalLM", (
        *_INTERLEAVED,
        *norm("{block}/attention_norm", f"{H}.input_layernorm", lambda block: not _two_norms(block)),
        *norm("{block}/feedforward_norm", f"{H}.post_attention_layernorm", lambda block: not _two_norms(block)),
        *norm("{block}/attention_norm", f"{H}.ln_attn", _two_norms),
        *norm("{block}/feedforward_norm", f"{H}.ln_mlp", _two_norms),
    ), _read_falcon, _write_falcon, bases=("transformer.", ""),
        defaults={"new_decoder_architecture": False, "parallel_attn": True, "bias": False, "multi_query": True, "alibi": False,
                  "max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "activation": "gelu",
                  "tie_word_embeddings": True}),
    Family("mpt", "MPT", "MptForCausalLM", (
        Row(("decoder/embedding/tokens",), "{base}wte.weight", twins=("lm_head.weight",)),
        *norm("decoder/norm", "{base}norm_f"),
        *head("lm_head"),
        *norm("{block}/attention_norm", f"{BLOCK}.norm_1"),
        *linear(QKV, f"{BLOCK}.attn.Wqkv"),
        *linear("{block}/attention/o", f"{BLOCK}.attn.out_proj"),
        *norm("{block}/feedforward_norm", f"{BLOCK}.norm_2"),
        *linear("{block}/feedforward/up", f"{BLOCK}.ffn.up_proj"),
        *linear("{block}/feedforward/down", f"{BLOCK}.ffn.down_proj"),
    ), _read_mpt, _write_mpt, bases=("transformer.", ""),
        defaults={"max_seq_len": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        aliases={"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
        ignored=frozenset({"embedding_fraction", "init_config", "init_device", "learned_pos_emb", "verbose"})),
    Family("bloom", "BLOOM, BLOOMZ", "BloomForCausalLM", (
        *_INTERLEAVED,
        *norm("decoder/embedding/norm", "{base}word_embeddings_layernorm"),
        *norm("{block}/attention_norm", f"{H}.input_layernorm"),
        *norm("{block}/feedforward_norm", f"{H}.post_attention_layernorm"),
    ), _read_bloom, _write_bloom, bases=("transformer.", ""),
        # No key says how long a context it was made for; all releases were made for 2048 tokens.
        defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "seq_length": 2048},
        aliases={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"},
        ignored=frozenset({"offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact"})),
)

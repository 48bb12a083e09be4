"""Gemma: scaled embeddings, norms that store scale - 1, local and global layers, soft caps."""

from typing import Any

from jaxlm import config
from jaxlm.io.families import llama
from jaxlm.io.families.fields import KINDS, Family, Fields, decoder, rope, windows, write_rope, write_scaling, write_windows
from jaxlm.io.names import norm

SANDWICH_NORMS = (
    *norm("{block}/attention_norm", f"{llama.LAYER}.input_layernorm"),
    *norm("{block}/attention_norm_out", f"{llama.LAYER}.post_attention_layernorm"),
    *norm("{block}/feedforward_norm", f"{llama.LAYER}.pre_feedforward_layernorm"),
    *norm("{block}/feedforward_norm_out", f"{llama.LAYER}.post_feedforward_layernorm"),
)


def _rms(fields: Fields) -> config.RmsNorm:
    return config.RmsNorm(fields.number("rms_norm_eps"), offset=1.0)


def _whole(fields: Fields, attentions: list[config.Attention], activation: config.Activation,
           residual: config.Residual, length: int, softcap: float | None = None) -> config.Decoder:
    width = fields.integer("hidden_size")
    fields.expect("use_bidirectional_attention", False)
    feedforward = config.Dense(fields.integer("intermediate_size"), activation)
    blocks = [config.Block(attention, feedforward, residual) for attention in attentions]
    return decoder(fields, width, blocks, residual.norm, length, embedding={"scale": width**0.5}, head={"softcap": softcap})


def _write_whole(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    values = llama.write_sizes(cfg)
    return values | {"head_dim": block.attention.head_width, "attention_bias": block.attention.bias,
                     "rms_norm_eps": block.residual.norm.eps, "hidden_activation": values["hidden_act"]}


def _read_gemma(fields: Fields) -> config.Decoder:
    _, heads, kv_heads, head_width = llama.sizes(fields)
    position, length = rope(fields, head_width)
    bias = fields.flag("attention_bias")
    # The first releases say "gelu" and mean the tanh approximation, as transformers knows.
    legacy = fields.get("hidden_act") == "gelu"
    activation = config.Activation.GELU_TANH if legacy else fields.activation("hidden_act")
    if fields.get("hidden_activation") is not None and fields.activation("hidden_activation") != activation:
        raise fields.wrong("hidden_activation", f"hidden_act says {fields.get('hidden_act')!r}")
    attention = config.Attention(heads, kv_heads, head_width, position, bias=bias, out_bias=bias)
    return _whole(fields, [attention] * fields.integer("num_hidden_layers"), activation, config.PreNorm(_rms(fields)), length)


def _write_gemma(cfg: config.Decoder) -> dict[str, Any]:
    return _write_whole(cfg) | write_rope(cfg)


def _attention(fields: Fields) -> dict[str, Any]:
    """What the layers of a Gemma 2 or 3 have in common."""
    _, heads, kv_heads, head_width = llama.sizes(fields)
    bias, scalar = fields.flag("attention_bias"), fields.number("query_pre_attn_scalar")
    return {"heads": heads, "kv_heads": kv_heads, "head_width": head_width, "bias": bias, "out_bias": bias,
            "scale": None if scalar == head_width else scalar**-0.5,
            "softcap": fields.optional("attn_logit_softcapping")}


def _local(fields: Fields, period: int) -> list[int | None]:
    """Each layer's window; without `layer_types`, every layer but each `period`-th has one."""
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    fields.expect("sliding_window_size", window)
    if fields.get("hidden_act") is not None and fields.activation("hidden_act") != fields.activation("hidden_activation"):
        raise fields.wrong("hidden_act", f"hidden_activation says {fields.get('hidden_activation')!r}")
    return windows(fields, fields.integer("num_hidden_layers"), window, lambda i: (i + 1) % period != 0)


def _write_local(cfg: config.Decoder) -> dict[str, Any]:
    attention, (window, types) = cfg.stack.blocks()[0].attention, write_windows(cfg)
    scalar = attention.head_width if attention.scale is None else round(attention.scale**-2)
    values = _write_whole(cfg) | {"sliding_window": window, "layer_types": types, "query_pre_attn_scalar": scalar,
                                  "attn_logit_softcapping": attention.softcap, "final_logit_softcapping": cfg.head.softcap}
    del values["hidden_act"]
    return values


def _read_gemma2(fields: Fields) -> config.Decoder:
    common = _attention(fields)
    position, length = rope(fields, common["head_width"])
    attentions = [config.Attention(**common, position=position, window=window) for window in _local(fields, 2)]
    return _whole(fields, attentions, fields.activation("hidden_activation"), config.SandwichNorm(_rms(fields)), length,
                  fields.optional("final_logit_softcapping"))


def _write_gemma2(cfg: config.Decoder) -> dict[str, Any]:
    return _write_local(cfg) | write_rope(cfg)


def _read_gemma3(fields: Fields) -> config.Decoder:
    fields.expect("attn_logit_softcapping")  # none was released with one, and transformers pays no attention to it
    common, rms = _attention(fields), _rms(fields)
    far, length = rope(fields, common["head_width"], base=1e6, kind="full_attention")
    near, _ = rope(fields, common["head_width"], theta="rope_local_base_freq", kind="sliding_attention")
    patterns = [fields.get(key) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
    attentions = [config.Attention(**common, position=far if window is None else near, window=window,
                                   qk_norm=config.QkNorm(rms))
                  for window in _local(fields, next((one for one in patterns if one is not None), 6))]
    return _whole(fields, attentions, fields.activation("hidden_activation"), config.SandwichNorm(rms), length,
                  fields.optional("final_logit_softcapping"))


def _write_gemma3(cfg: config.Decoder) -> dict[str, Any]:
    blocks = [block.attention for block in cfg.stack.blocks() if isinstance(block.attention.position, config.Rope)]
    far = next((one.position for one in blocks if one.window is None), config.Rope(1e6))
    near = next((one.position for one in blocks if one.window is not None), config.Rope())
    values = _write_local(cfg)
    if near.scaling is None:
        scaling = far.scaling
        longest = scaling.length if isinstance(scaling, config.DynamicNtkScaling) else cfg.length
        return values | {"max_position_embeddings": longest, "rope_theta": far.base, "rope_local_base_freq": near.base,
                         "rope_scaling": write_scaling(scaling)}
    return values | {"max_position_embeddings": cfg.length, "rope_parameters": {
        kind: {"rope_theta": one.base, "rope_type": "default"} | (write_scaling(one.scaling) or {})
        for kind, one in zip(KINDS, (far, near), strict=True)}}


def _read_multimodal(fields: Fields) -> config.Decoder:
    text = fields.inner("text_config", fields.get("text_config"), _GEMMA3)
    fields.expect("tie_word_embeddings", True)
    text.expect("tie_word_embeddings", True)
    cfg = _read_gemma3(text)
    text.finish()
    return cfg


def _write_multimodal(cfg: config.Decoder) -> dict[str, Any]:
    raise ValueError("the vision part is not there; what was its text part is saved as gemma3_text")


DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "head_dim": 256}
_CAPPED = DEFAULTS | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
# transformers' own sizes are the 4B model's, whose config.json leaves most of them out.
_GEMMA3 = _CAPPED | {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                     "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}
_TABLE = llama.ENDS + llama.ATTENTION + llama.FEEDFORWARD + SANDWICH_NORMS

FAMILIES = (
    Family("gemma", "Gemma 1, 1.1; CodeGemma", "GemmaForCausalLM", llama.TABLE, _read_gemma, _write_gemma,
           defaults=DEFAULTS | {"hidden_act": "gelu_pytorch_tanh"}),
    Family("gemma2", "Gemma 2", "Gemma2ForCausalLM", _TABLE, _read_gemma2, _write_gemma2,
           defaults=_CAPPED | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    Family("gemma3_text", "Gemma 3 270M, 1B", "Gemma3ForCausalLM", _TABLE, _read_gemma3, _write_gemma3, defaults=_GEMMA3),
    Family("gemma3", "Gemma 3 4B, 12B, 27B: their text part", "Gemma3ForConditionalGeneration", _TABLE, _read_multimodal,
           _write_multimodal, bases=("model.language_model.", "language_model.model."),
           ignored=frozenset("boi_token_index eoi_token_index image_token_index mm_tokens_per_image vision_config".split()),
           leftover=(r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")),
)

"""Llama and its relatives: RMS norms and gated feed-forward layers; StarCoder2 has layer norms and plain ones."""

from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import (
    Family,
    Fields,
    decoder,
    long_magnitude,
    rope,
    windows,
    write_activation,
    write_rope,
    write_windows,
)
from jaxlm.io.names import Row, head, linear, norm

LAYER = "{base}layers.{i}"

ENDS = (
    Row(("decoder/embedding/tokens",), "{base}embed_tokens.weight", twins=("lm_head.weight", "language_model.lm_head.weight")),
    *norm("decoder/norm", "{base}norm"),
    *head("lm_head"),
)
ATTENTION = (
    *linear("{block}/attention/q", f"{LAYER}.self_attn.q_proj"),
    *linear("{block}/attention/k", f"{LAYER}.self_attn.k_proj"),
    *linear("{block}/attention/v", f"{LAYER}.self_attn.v_proj"),
    *linear("{block}/attention/o", f"{LAYER}.self_attn.o_proj"),
    *norm("{block}/attention/q_norm", f"{LAYER}.self_attn.q_norm"),
    *norm("{block}/attention/k_norm", f"{LAYER}.self_attn.k_norm"),
)
FEEDFORWARD = (
    *linear("{block}/feedforward/gate", f"{LAYER}.mlp.gate_proj"),
    *linear("{block}/feedforward/up", f"{LAYER}.mlp.up_proj"),
    *linear("{block}/feedforward/down", f"{LAYER}.mlp.down_proj"),
)
NORMS = (
    *norm("{block}/attention_norm", f"{LAYER}.input_layernorm"),
    *norm("{block}/feedforward_norm", f"{LAYER}.post_attention_layernorm"),
)
TABLE = ENDS + ATTENTION + FEEDFORWARD + NORMS
OUTPUT_NORMS = (
    *norm("{block}/attention_norm_out", f"{LAYER}.post_attention_layernorm"),
    *norm("{block}/feedforward_norm_out", f"{LAYER}.post_feedforward_layernorm"),
)

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_BIASED = DEFAULTS | {"attention_bias": False}


def sizes(fields: Fields) -> tuple[int, int, int, int]:
    """Width, query heads, key-value heads and the width of a head."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = heads if fields.get("num_key_value_heads") is None else fields.integer("num_key_value_heads")
    return width, heads, kv_heads, width // heads if fields.get("head_dim") is None else fields.integer("head_dim")


def write_sizes(cfg: config.Decoder, feedforward: config.Dense | None = None) -> dict[str, Any]:
    """What Llama's relatives all write; `feedforward` is the first block's, or another where that is a mixture."""
    block = cfg.stack.blocks()[0]
    feedforward = feedforward or block.feedforward
    return {"vocab_size": cfg.embedding.vocabulary, "hidden_size": cfg.width, "intermediate_size": feedforward.width,
            "num_hidden_layers": cfg.stack.layers, "num_attention_heads": block.attention.heads,
            "num_key_value_heads": block.attention.kv_heads, "tie_word_embeddings": cfg.head.tied,
            "hidden_act": write_activation(feedforward.activation)}


def _eps(cfg: config.Decoder) -> dict[str, Any]:
    return {"rms_norm_eps": cfg.stack.blocks()[0].residual.norm.eps}


def _blocks(fields: Fields, attentions: list[config.Attention], residual: config.Residual, *,
            bias: bool = False) -> list[config.Block]:
    feedforward = config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_act"), True, bias)
    return [config.Block(attention, feedforward, residual) for attention in attentions]


def _read_llama(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    attention = config.Attention(heads, kv_heads, head_width, position, bias=bias, out_bias=bias)
    blocks = _blocks(fields, [attention] * fields.integer("num_hidden_layers"), config.PreNorm(rms),
                     bias=fields.flag("mlp_bias"))
    return decoder(fields, width, blocks, rms, length)


def _write_llama(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    return write_sizes(cfg) | write_rope(cfg) | _eps(cfg) | {
        "head_dim": block.attention.head_width, "attention_bias": block.attention.bias, "mlp_bias": block.feedforward.bias}


def _read_mistral(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    layers = fields.integer("num_hidden_layers")
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    rms = config.RmsNorm(fields.number("rms_norm_eps"))
    attentions = [config.Attention(heads, kv_heads, head_width, position, window=one)
                  for one in windows(fields, layers, window, lambda i: True)]
    if any(attention.window != window for attention in attentions):
        raise fields.wrong("layer_types", "all layers of a Mistral have the same window")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    return decoder(fields, width, _blocks(fields, attentions, config.PreNorm(rms)), rms, length)


def _write_mistral(cfg: config.Decoder) -> dict[str, Any]:
    return write_sizes(cfg) | write_rope(cfg) | _eps(cfg) | {
        "head_dim": cfg.stack.blocks()[0].attention.head_width, "sliding_window": write_windows(cfg)[0]}


def _read_smollm3(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width, base=2000000.0)
    layers, interval = fields.integer("num_hidden_layers"), fields.integer("no_rope_layer_interval")
    turned = fields.get("no_rope_layers")
    if turned is None:
        turned = [int((i + 1) % interval != 0) for i in range(layers)]
    if len(turned) < layers or not set(turned) <= {0, 1}:
        raise fields.wrong("no_rope_layers", f"a list of {layers} of 1 (rotary) and 0 (no position) is needed")
    window = fields.integer("sliding_window") if fields.flag("use_sliding_window") and fields.get("sliding_window") else None
    fields.get("sliding_window")
    fields.get("max_window_layers")  # Qwen's, left in the released configs; transformers' SmolLM3 has no use for it
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    attentions = [config.Attention(heads, kv_heads, head_width, position if turns else None, window=one, bias=bias,
                                   out_bias=bias)
                  for turns, one in zip(turned, windows(fields, layers, window, lambda i: not turned[i]), strict=False)]
    blocks = _blocks(fields, attentions, config.PreNorm(rms), bias=fields.flag("mlp_bias"))
    return decoder(fields, width, blocks, rms, length)


def _write_smollm3(cfg: config.Decoder) -> dict[str, Any]:
    blocks, (window, types) = cfg.stack.blocks(), write_windows(cfg)
    return write_sizes(cfg) | write_rope(cfg) | _eps(cfg) | {
        "attention_bias": blocks[0].attention.bias, "mlp_bias": blocks[0].feedforward.bias,
        "head_dim": blocks[0].attention.head_width, "use_sliding_window": window is not None, "sliding_window": window,
        "layer_types": types, "no_rope_layers": [int(block.attention.position is not None) for block in blocks]}


def _qwen_windows(fields: Fields, layers: int) -> list[int | None]:
    window = fields.integer("sliding_window") if fields.flag("use_sliding_window") and fields.get("sliding_window") else None
    fields.get("sliding_window")
    first = fields.get("max_window_layers") or 0
    return windows(fields, layers, window, lambda i: i >= first)


def _write_qwen_windows(cfg: config.Decoder) -> dict[str, Any]:
    window, types = write_windows(cfg)
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types,
            "max_window_layers": cfg.stack.layers if window is None else types.index("sliding_attention")}


def _read_qwen2(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    rms = config.RmsNorm(fields.number("rms_norm_eps"))
    attentions = [config.Attention(heads, kv_heads, head_width, position, window=one, bias=True)
                  for one in _qwen_windows(fields, fields.integer("num_hidden_layers"))]
    fields.expect("attention_bias", True)
    return decoder(fields, width, _blocks(fields, attentions, config.PreNorm(rms)), rms, length)


def _write_qwen2(cfg: config.Decoder) -> dict[str, Any]:
    return write_sizes(cfg) | write_rope(cfg) | _eps(cfg) | _write_qwen_windows(cfg) | {
        "head_dim": cfg.stack.blocks()[0].attention.head_width}


def _read_qwen3(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    attentions = [config.Attention(heads, kv_heads, head_width, position, window=one, bias=bias, out_bias=bias,
                                   qk_norm=config.QkNorm(rms))
                  for one in _qwen_windows(fields, fields.integer("num_hidden_layers"))]
    return decoder(fields, width, _blocks(fields, attentions, config.PreNorm(rms)), rms, length)


def _write_qwen3(cfg: config.Decoder) -> dict[str, Any]:
    attention = cfg.stack.blocks()[0].attention
    return write_sizes(cfg) | write_rope(cfg) | _eps(cfg) | _write_qwen_windows(cfg) | {
        "head_dim": attention.head_width, "attention_bias": attention.bias}


def _read_olmo2(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    attention = config.Attention(heads, kv_heads, head_width, position, bias=bias, out_bias=bias,
                                 qk_norm=config.QkNorm(rms, per_head=False))
    blocks = _blocks(fields, [attention] * fields.integer("num_hidden_layers"), config.OutputNorm(rms))
    return decoder(fields, width, blocks, rms, length)


def _write_olmo2(cfg: config.Decoder) -> dict[str, Any]:
    attention = cfg.stack.blocks()[0].attention
    return write_sizes(cfg) | write_rope(cfg) | _eps(cfg) | {
        "head_dim": attention.head_width, "attention_bias": attention.bias}


def _read_phi3(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width, partial=1.0)
    if not isinstance(position.scaling, config.LongRopeScaling | None):
        raise fields.wrong("rope_scaling" if fields.get("rope_scaling") else "rope_parameters", "its type must be longrope")
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.expect(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        fields.expect(key, 1)
    rms = config.RmsNorm(fields.number("rms_norm_eps"))
    attention = config.Attention(heads, kv_heads, head_width, position, window=window)
    blocks = _blocks(fields, [attention] * fields.integer("num_hidden_layers"), config.PreNorm(rms))
    return decoder(fields, width, blocks, rms, length)


def _write_phi3(cfg: config.Decoder) -> dict[str, Any]:
    attention = cfg.stack.blocks()[0].attention
    values = {"original_max_position_embeddings": cfg.length} | write_sizes(cfg) | write_rope(cfg) | _eps(cfg)
    scaling = getattr(attention.position, "scaling", None)
    if isinstance(scaling, config.LongRopeScaling):
        # Before version 5 transformers takes these three keys and no other.
        values["rope_scaling"] = {"type": "longrope", "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        if scaling.magnitude != long_magnitude(cfg.length / scaling.length, scaling.length):
            values["rope_scaling"]["attention_factor"] = scaling.magnitude
    return values | {"head_dim": attention.head_width, "sliding_window": attention.window,
                     "partial_rotary_factor": attention.rotated / attention.head_width}


def _read_starcoder2(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    bias, layer_norm = fields.flag("use_bias"), config.LayerNorm(fields.number("norm_epsilon"))
    fields.expect("norm_type", "layer_norm")
    fields.expect("mlp_type", "default")
    fields.expect("scale_attn_weights", True)
    fields.expect("layer_norm_epsilon", layer_norm.eps)
    fields.expect("activation_function", fields.get("hidden_act"))
    attention = config.Attention(heads, kv_heads, head_width, position, window=window, bias=bias, out_bias=bias)
    feedforward = config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_act"), False, bias)
    block = config.Block(attention, feedforward, config.PreNorm(layer_norm))
    return decoder(fields, width, [block] * fields.integer("num_hidden_layers"), layer_norm, length)


def _write_starcoder2(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    return write_sizes(cfg) | write_rope(cfg) | {
        "norm_epsilon": block.residual.norm.eps, "use_bias": block.attention.bias, "sliding_window": block.attention.window,
        "head_dim": block.attention.head_width}


_QWEN = DEFAULTS | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES = (
    Family("llama", "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM, SmolLM2; TinyLlama", "LlamaForCausalLM", TABLE, _read_llama,
           _write_llama, defaults=_BIASED | {"mlp_bias": False}),
    Family("mistral", "Mistral 7B", "MistralForCausalLM", TABLE, _read_mistral, _write_mistral,
           defaults=DEFAULTS | {"sliding_window": 4096}),
    Family("qwen2", "Qwen 2, 2.5; Qwen2.5-Coder", "Qwen2ForCausalLM", TABLE, _read_qwen2, _write_qwen2, defaults=_QWEN),
    Family("qwen3", "Qwen 3", "Qwen3ForCausalLM", TABLE, _read_qwen3, _write_qwen3,
           defaults=_QWEN | {"head_dim": 128, "attention_bias": False}),
    Family("smollm3", "SmolLM3", "SmolLM3ForCausalLM", TABLE, _read_smollm3, _write_smollm3,
           defaults=_BIASED | {"tie_word_embeddings": True, "no_rope_layer_interval": 4, "mlp_bias": False,
                                "use_sliding_window": False}),
    Family("olmo2", "OLMo 2", "Olmo2ForCausalLM", ENDS + ATTENTION + FEEDFORWARD + OUTPUT_NORMS, _read_olmo2, _write_olmo2,
           defaults=_BIASED | {"rms_norm_eps": 1e-5}),
    Family("phi3", "Phi-3, Phi-3.5 mini; Phi-4, Phi-4 mini", "Phi3ForCausalLM", (
        *ENDS, *NORMS,
        *linear(("{block}/attention/q", "{block}/attention/k", "{block}/attention/v"), f"{LAYER}.self_attn.qkv_proj"),
        *linear("{block}/attention/o", f"{LAYER}.self_attn.o_proj"),
        *linear(("{block}/feedforward/gate", "{block}/feedforward/up"), f"{LAYER}.mlp.gate_up_proj"),
        *linear("{block}/feedforward/down", f"{LAYER}.mlp.down_proj"),
    ), _read_phi3, _write_phi3, defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}),
    Family("starcoder2", "StarCoder2", "Starcoder2ForCausalLM", (
        *ENDS, *ATTENTION, *NORMS,
        *linear("{block}/feedforward/up", f"{LAYER}.mlp.c_fc"),
        *linear("{block}/feedforward/down", f"{LAYER}.mlp.c_proj"),
    ), _read_starcoder2, _write_starcoder2,
        defaults={"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True}),
)

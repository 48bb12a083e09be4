"""Decoders with mixtures of experts: Mixtral, Qwen's, OLMoE, Granite's and GPT-OSS.

Released files hold a tensor per expert and matrix, or (Granite, GPT-OSS) one of all experts; transformers 5 can also write the
former as the latter. Both are read, and what is written is laid out as the released files are.
"""

from collections.abc import Sequence
from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import Family, Fields, decoder, rope, windows, write_rope, write_windows
from jaxlm.io.families.llama import (
    ATTENTION,
    DEFAULTS,
    ENDS,
    FEEDFORWARD,
    LAYER,
    NORMS,
    sizes,
    write_sizes,
)
from jaxlm.io.names import ALTERNATING, Row, linear

MIXTURE = "{block}/feedforward"
GATE_UP = (f"{MIXTURE}/experts/gate", f"{MIXTURE}/experts/up")
DOWN = (f"{MIXTURE}/experts/down",)
LLAMA = ENDS + ATTENTION + NORMS

# GPT-OSS's rotary scaling, where a config.json has none.
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}


def _router(theirs: str, *also: str) -> Row:
    return Row((f"{MIXTURE}/router/product",), f"{LAYER}.{theirs}", also=tuple(f"{LAYER}.{name}" for name in also))


def _each(theirs: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A tensor per expert and matrix."""
    ours = zip((*GATE_UP, *DOWN), (gate, up, down), strict=True)
    return tuple(Row((path,), f"{LAYER}.{theirs}.{{e}}.{name}.weight") for path, name in ours)


# Gates and ups of all experts in one tensor, and downs in another: what transformers 5 works with.
TOGETHER = (Row(GATE_UP, f"{LAYER}.mlp.experts.gate_up_proj"), Row(DOWN, f"{LAYER}.mlp.experts.down_proj"))

SHARED = (
    *linear(f"{MIXTURE}/shared/gate", f"{LAYER}.mlp.shared_expert.gate_proj"),
    *linear(f"{MIXTURE}/shared/up", f"{LAYER}.mlp.shared_expert.up_proj"),
    *linear(f"{MIXTURE}/shared/down", f"{LAYER}.mlp.shared_expert.down_proj"),
    Row((f"{MIXTURE}/shared_gate",), f"{LAYER}.mlp.shared_expert_gate.weight"),
)
MIXTRAL = (*LLAMA, _router("block_sparse_moe.gate.weight"), *_each("block_sparse_moe.experts", "w1", "w3", "w2"))
QWEN = (*LLAMA, *FEEDFORWARD, *SHARED, _router("mlp.gate.weight"))
NAMED = _each("mlp.experts", "gate_proj", "up_proj", "down_proj")
GRANITE = (
    *LLAMA, _router("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    Row(GATE_UP, f"{LAYER}.block_sparse_moe.input_linear.weight", also=(f"{LAYER}.block_sparse_moe.experts.gate_up_proj",)),
    Row(DOWN, f"{LAYER}.block_sparse_moe.output_linear.weight", also=(f"{LAYER}.block_sparse_moe.experts.down_proj",)),
    Row((f"{MIXTURE}/shared/gate", f"{MIXTURE}/shared/up"), f"{LAYER}.shared_mlp.input_linear.weight"),
    Row((f"{MIXTURE}/shared/down",), f"{LAYER}.shared_mlp.output_linear.weight"),
)
GPT_OSS = (
    *LLAMA, Row(("{block}/attention/sinks",), f"{LAYER}.self_attn.sinks"),
    _router("mlp.router.weight"), Row((f"{MIXTURE}/router/bias",), f"{LAYER}.mlp.router.bias"),
    Row(tuple(f"{path}_bias" for path in GATE_UP), f"{LAYER}.mlp.experts.gate_up_proj_bias", blocks=ALTERNATING),
    Row((f"{MIXTURE}/experts/down_bias",), f"{LAYER}.mlp.experts.down_proj_bias"),
)
GPT_OSS_WHOLE = (Row(GATE_UP, f"{LAYER}.mlp.experts.gate_up_proj", 1, ALTERNATING),
                 Row(DOWN, f"{LAYER}.mlp.experts.down_proj", 1))
# As `jaxlm.io.mxfp4` names and lays out what it unpacks.
GPT_OSS_PACKED = (Row(GATE_UP, f"{LAYER}.mlp.experts.gate_up_proj.{{e}}", 0, ALTERNATING),
                  Row(DOWN, f"{LAYER}.mlp.experts.down_proj.{{e}}"))
# As `jaxlm.io.gguf` names what llama.cpp keeps apart.
GRANITE_APART = (*LLAMA, _router("block_sparse_moe.router.layer.weight"),
                 *_each("block_sparse_moe.experts", "w1", "w3", "w2"), *SHARED)
GPT_OSS_APART = (
    *LLAMA, Row(("{block}/attention/sinks",), f"{LAYER}.self_attn.sinks.weight"),
    _router("mlp.router.weight"), Row((f"{MIXTURE}/router/bias",), f"{LAYER}.mlp.router.bias"), *NAMED,
    *(Row((f"{path}_bias",), f"{LAYER}.mlp.experts.{{e}}.{name}_proj.bias")
      for path, name in zip((*GATE_UP, *DOWN), ("gate", "up", "down"), strict=True)))


def _mixture(cfg: config.Decoder) -> config.Moe:
    """The mixture that the blocks have.

    Raises:
      ValueError: when none has one, or its router chooses in a way that no family here has.
    """
    found = next((block.feedforward for block in cfg.stack.blocks() if isinstance(block.feedforward, config.Moe)), None)
    if found is None:
        raise ValueError("no layer is a mixture of experts")
    if not isinstance(found.router, config.TopK):
        raise ValueError(f"its router is a {type(found.router).__name__}, and must be a TopK")
    return found


def _write(cfg: config.Decoder, feedforward: config.Dense, experts: str = "num_experts") -> dict[str, Any]:
    """What all of them write; `feedforward` is what intermediate_size is about."""
    block, moe = cfg.stack.blocks()[0], _mixture(cfg)
    return write_sizes(cfg, feedforward) | write_rope(cfg) | {
        "rms_norm_eps": block.residual.norm.eps, "head_dim": block.attention.head_width, experts: moe.experts,
        "num_experts_per_tok": moe.router.k}


def _read_mixtral(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width, base=1000000.0)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    rms = config.RmsNorm(fields.number("rms_norm_eps"))
    fields.expect("attention_bias", False)
    moe = config.Moe(fields.integer("num_local_experts"),
                     config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_act")),
                     config.TopK(fields.integer("num_experts_per_tok"), normalize=True))
    block = config.Block(config.Attention(heads, kv_heads, head_width, position, window=window), moe, config.PreNorm(rms))
    return decoder(fields, width, [block] * fields.integer("num_hidden_layers"), rms, length)


def _write_mixtral(cfg: config.Decoder) -> dict[str, Any]:
    return _write(cfg, _mixture(cfg).expert, "num_local_experts") | {
        "sliding_window": cfg.stack.blocks()[0].attention.window}


def _qwen(fields: Fields, attentions: Sequence[config.Attention], shared: bool) -> list[config.Block]:
    """The blocks: every `decoder_sparse_step`-th has a mixture, but for those that are listed."""
    layers, step, listed = len(attentions), fields.integer("decoder_sparse_step"), fields.get("mlp_only_layers") or []
    if not isinstance(listed, Sequence) or not set(listed) <= set(range(layers)):
        raise fields.wrong("mlp_only_layers", f"a list of layers from 0 to {layers - 1} is needed")
    sparse = [(i + 1) % step == 0 and i not in listed for i in range(layers)]
    activation, beside = fields.activation("hidden_act"), None
    if shared:
        beside = config.Dense(fields.integer("shared_expert_intermediate_size"), activation)
    router = config.TopK(fields.integer("num_experts_per_tok"), normalize=fields.flag("norm_topk_prob"))
    moe = config.Moe(fields.integer("num_experts"), config.Dense(fields.integer("moe_intermediate_size"), activation),
                     router, beside, shared)
    dense = None if all(sparse) and not fields.get("intermediate_size") else config.Dense(
        fields.integer("intermediate_size"), activation)
    rms = config.RmsNorm(fields.number("rms_norm_eps"))
    return [config.Block(attention, moe if chosen else dense, config.PreNorm(rms))
            for attention, chosen in zip(attentions, sparse, strict=True)]


def _write_qwen(cfg: config.Decoder) -> dict[str, Any]:
    blocks, moe = cfg.stack.blocks(), _mixture(cfg)
    dense = [i for i, block in enumerate(blocks) if not isinstance(block.feedforward, config.Moe)]
    # Where no layer is dense the width of such means nothing.
    return _write(cfg, blocks[dense[0]].feedforward if dense else moe.expert) | {
        "moe_intermediate_size": moe.expert.width, "norm_topk_prob": moe.router.normalize, "decoder_sparse_step": 1,
        "mlp_only_layers": dense}


def _read_qwen2_moe(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    layers, bias = fields.integer("num_hidden_layers"), fields.flag("qkv_bias")
    window = fields.integer("sliding_window") if fields.flag("use_sliding_window") and fields.get("sliding_window") else None
    fields.get("sliding_window")
    last = fields.get("max_window_layers") or 0
    attentions = [config.Attention(heads, kv_heads, head_width, position, window=one, bias=bias)
                  for one in windows(fields, layers, window, lambda i: i % 2 == 0 and i < last)]
    blocks = _qwen(fields, attentions, True)
    return decoder(fields, width, blocks, blocks[0].residual.norm, length)


def _write_qwen2_moe(cfg: config.Decoder) -> dict[str, Any]:
    window, types = write_windows(cfg)
    moe = _mixture(cfg)
    if moe.shared is None:
        raise ValueError("its mixtures have no shared layer")
    return _write_qwen(cfg) | {
        "use_sliding_window": window is not None, "sliding_window": window, "layer_types": types,
        "qkv_bias": cfg.stack.blocks()[0].attention.bias, "shared_expert_intermediate_size": moe.shared.width}


def _read_qwen3_moe(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    window = fields.integer("sliding_window") if fields.flag("use_sliding_window") and fields.get("sliding_window") else None
    fields.get("sliding_window")
    fields.get("max_window_layers")  # in the released configs; all layers have the window, or none
    attention = config.Attention(heads, kv_heads, head_width, position, window=window, bias=bias, out_bias=bias,
                                 qk_norm=config.QkNorm(rms))
    return decoder(fields, width, _qwen(fields, [attention] * fields.integer("num_hidden_layers"), False), rms, length)


def _write_qwen3_moe(cfg: config.Decoder) -> dict[str, Any]:
    attention = cfg.stack.blocks()[0].attention
    return _write_qwen(cfg) | {"attention_bias": attention.bias, "use_sliding_window": attention.window is not None,
                               "sliding_window": attention.window}


def _read_olmoe(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    if head_width * heads != width:
        raise fields.wrong("head_dim", f"it must be hidden_size / num_attention_heads, {width / heads:g}")
    if fields.get("clip_qkv") is not None:
        raise fields.wrong("clip_qkv", "it must be null: queries and keys would be clipped after their norm, here before")
    moe = config.Moe(fields.integer("num_experts"),
                     config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_act")),
                     config.TopK(fields.integer("num_experts_per_tok"), normalize=fields.flag("norm_topk_prob")))
    attention = config.Attention(heads, kv_heads, head_width, position, bias=bias, out_bias=bias,
                                 qk_norm=config.QkNorm(rms, per_head=False))
    block = config.Block(attention, moe, config.PreNorm(rms))
    return decoder(fields, width, [block] * fields.integer("num_hidden_layers"), rms, length)


def _write_olmoe(cfg: config.Decoder) -> dict[str, Any]:
    moe = _mixture(cfg)
    return _write(cfg, moe.expert) | {"norm_topk_prob": moe.router.normalize,
                                      "attention_bias": cfg.stack.blocks()[0].attention.bias}


def _read_granitemoe(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width)
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    activation, beside = fields.activation("hidden_act"), None
    if fields.get("shared_intermediate_size"):
        beside = config.Dense(fields.integer("shared_intermediate_size"), activation)
    moe = config.Moe(fields.integer("num_local_experts"), config.Dense(fields.integer("intermediate_size"), activation),
                     config.TopK(fields.integer("num_experts_per_tok"), normalize=True), beside)
    scale = fields.number("attention_multiplier")
    attention = config.Attention(heads, kv_heads, head_width, position, scale=None if scale == head_width**-0.5 else scale,
                                 bias=bias, out_bias=bias)
    block = config.Block(attention, moe, config.PreNorm(rms), fields.number("residual_multiplier"))
    multiplier, divisor = fields.number("embedding_multiplier"), fields.number("logits_scaling")
    if divisor == 0:
        raise fields.wrong("logits_scaling", "logits are divided by it")
    return decoder(fields, width, [block] * fields.integer("num_hidden_layers"), rms, length,
                   embedding={"scale": None if multiplier == 1 else multiplier}, head={"scale": 1 / divisor})


def _write_granitemoe(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    scale = block.attention.head_width**-0.5 if block.attention.scale is None else block.attention.scale
    return _write(cfg, _mixture(cfg).expert, "num_local_experts") | {
        "attention_bias": block.attention.bias, "attention_multiplier": scale, "residual_multiplier": block.multiplier,
        "embedding_multiplier": 1.0 if cfg.embedding.scale is None else cfg.embedding.scale,
        "logits_scaling": 1 / cfg.head.scale}


def _write_granitemoeshared(cfg: config.Decoder) -> dict[str, Any]:
    shared = _mixture(cfg).shared
    return _write_granitemoe(cfg) | {"shared_intermediate_size": 0 if shared is None else shared.width}


def _read_gpt_oss(fields: Fields) -> config.Decoder:
    width, heads, kv_heads, head_width = sizes(fields)
    position, length = rope(fields, head_width, base=150000.0, scaling=YARN)
    layers, k = fields.integer("num_hidden_layers"), fields.integer("num_experts_per_tok")
    bias, rms = fields.flag("attention_bias"), config.RmsNorm(fields.number("rms_norm_eps"))
    fields.expect("hidden_act", "silu")
    fields.expect("swiglu_alpha", 1.702)
    fields.expect("experts_per_token", k)
    expert = config.Dense(fields.integer("intermediate_size"), config.Activation.QUICK_GELU, bias=True,
                          clip=fields.number("swiglu_limit"), offset=1.0)
    moe = config.Moe(fields.integer("num_local_experts"), expert, config.TopK(k, normalize=True, bias=True))
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    blocks = [config.Block(config.Attention(heads, kv_heads, head_width, position, window=one, bias=bias, out_bias=bias,
                                            sinks=True), moe, config.PreNorm(rms))
              for one in windows(fields, layers, window, lambda i: i % 2 == 0)]
    return decoder(fields, width, blocks, rms, length)


def _write_gpt_oss(cfg: config.Decoder) -> dict[str, Any]:
    block, moe, (window, types) = cfg.stack.blocks()[0], _mixture(cfg), write_windows(cfg)
    if moe.expert.clip is None:
        raise ValueError("its experts are not clipped")
    values = _write(cfg, moe.expert, "num_local_experts")
    return values | {
        "hidden_act": "silu", "attention_bias": block.attention.bias, "sliding_window": window, "layer_types": types,
        "swiglu_limit": moe.expert.clip, "rope_scaling": values["rope_scaling"] or {"rope_type": "default"}}


# Losses of training, and noise in it.
_IGNORED = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
_QWEN = DEFAULTS | {"decoder_sparse_step": 1, "norm_topk_prob": False, "use_sliding_window": False, "sliding_window": 4096}
_GRANITE = DEFAULTS | {"attention_bias": False, "num_local_experts": 8, "num_experts_per_tok": 2} | dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)

FAMILIES = (
    Family("mixtral", "Mixtral 8x7B, 8x22B", "MixtralForCausalLM", MIXTRAL, _read_mixtral, _write_mixtral,
           others=((*LLAMA, _router("mlp.gate.weight"), *TOGETHER),), mixtures=True, ignored=_IGNORED,
           defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2}),
    Family("qwen2_moe", "Qwen1.5-MoE; Qwen2-57B-A14B", "Qwen2MoeForCausalLM", QWEN + NAMED, _read_qwen2_moe,
           _write_qwen2_moe, others=(QWEN + TOGETHER,), mixtures=True, ignored=_IGNORED,
           defaults=_QWEN | {"qkv_bias": True, "max_window_layers": 28}),
    Family("qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B; Qwen3-Coder", "Qwen3MoeForCausalLM", QWEN + NAMED, _read_qwen3_moe,
           _write_qwen3_moe, others=(QWEN + TOGETHER,), mixtures=True, ignored=_IGNORED,
           defaults=_QWEN | {"attention_bias": False}, aliases={"num_local_experts": "num_experts"}),
    Family("olmoe", "OLMoE", "OlmoeForCausalLM", QWEN + NAMED, _read_olmoe, _write_olmoe, others=(QWEN + TOGETHER,),
           mixtures=True, ignored=_IGNORED, aliases={"num_local_experts": "num_experts"},
           defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "attention_bias": False}),
    Family("granitemoe", "Granite 3.0, 3.1 MoE (1B-A400M, 3B-A800M)", "GraniteMoeForCausalLM", GRANITE, _read_granitemoe,
           _write_granitemoe, others=(GRANITE_APART,), mixtures=True, ignored=_IGNORED, defaults=_GRANITE),
    Family("granitemoeshared", "Granite MoE with a shared expert", "GraniteMoeSharedForCausalLM", GRANITE,
           _read_granitemoe, _write_granitemoeshared, others=(GRANITE_APART,), mixtures=True, ignored=_IGNORED,
           defaults=_GRANITE),
    Family("gpt_oss", "GPT-OSS 20B, 120B", "GptOssForCausalLM", GPT_OSS + GPT_OSS_WHOLE, _read_gpt_oss, _write_gpt_oss,
           others=(GPT_OSS + GPT_OSS_PACKED, GPT_OSS_APART), mixtures=True,
           ignored=_IGNORED | {"initial_context_length"},  # what the rotary scaling says too
           defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "head_dim": 64, "attention_bias": True, "swiglu_limit": 7.0,
                                "sliding_window": 128}),
)

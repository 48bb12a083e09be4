"""DeepSeek-V2 and V3: latent attention, and mixtures of experts with shared ones in all but the first layers.

What a released file of V3 holds to predict several tokens at once, layers behind the last, is left out, as transformers does.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import Family, Fields, decoder, rope, write_rope
from jaxlm.io.families.llama import DEFAULTS, ENDS, FEEDFORWARD, LAYER, NORMS, write_sizes
from jaxlm.io.families.moe import MIXTURE, NAMED, TOGETHER
from jaxlm.io.names import Row, linear, norm

ATTENTION = "{block}/attention"

# The norms of the short vectors have an epsilon of their own, whatever rms_norm_eps says.
SHORT = config.RmsNorm(1e-6)


def _short_queries(block: config.Block) -> bool:
    return block.attention.query_latent is not None


TABLE = (
    *ENDS, *NORMS, *FEEDFORWARD,
    *linear(f"{ATTENTION}/q_latent", f"{LAYER}.self_attn.q_a_proj"),
    *norm(f"{ATTENTION}/q_latent_norm", f"{LAYER}.self_attn.q_a_layernorm"),
    Row((f"{ATTENTION}/q",), f"{LAYER}.self_attn.q_b_proj.weight", when=_short_queries),
    Row((f"{ATTENTION}/q",), f"{LAYER}.self_attn.q_proj.weight", when=lambda block: not _short_queries(block)),
    *linear(f"{ATTENTION}/latent", f"{LAYER}.self_attn.kv_a_proj_with_mqa"),
    *norm(f"{ATTENTION}/latent_norm", f"{LAYER}.self_attn.kv_a_layernorm"),
    Row((f"{ATTENTION}/k", f"{ATTENTION}/v"), f"{LAYER}.self_attn.kv_b_proj.weight", blocks=None),
    *linear(f"{ATTENTION}/o", f"{LAYER}.self_attn.o_proj"),
    Row((f"{MIXTURE}/router/product",), f"{LAYER}.mlp.gate.weight"),
    Row((f"{MIXTURE}/router/correction",), f"{LAYER}.mlp.gate.e_score_correction_bias"),
    *(Row((f"{MIXTURE}/shared/{ours}",), f"{LAYER}.mlp.shared_experts.{ours}_proj.weight") for ours in ("gate", "up", "down")),
)


def _stretch(given: Mapping[str, Any], scaling: config.YarnScaling) -> float:
    """What YaRN's `mscale_all_dim` multiplies queries, and keys, by."""
    share = given.get("mscale_all_dim") or 0.0
    return 0.1 * share * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _attention(fields: Fields, interleaved: bool) -> tuple[config.LatentAttention, int]:
    """The attention of all layers, and the longest context."""
    heads, turned, plain = (fields.integer(key) for key in ("num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim"))
    fields.expect("num_key_value_heads", heads)
    fields.expect("head_dim", turned)
    fields.expect("qk_head_dim", plain + turned)
    position, length = rope(fields, turned)
    scale = None
    if isinstance(position.scaling, config.YarnScaling):
        stretch = _stretch(fields.get("rope_scaling") or fields.get("rope_parameters"), position.scaling)
        scale = None if stretch == 1 else (plain + turned)**-0.5 * stretch * stretch
    bias = fields.flag("attention_bias")
    short = None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank")
    position = config.Rope(position.base, interleaved=interleaved, scaling=position.scaling)
    return config.LatentAttention(heads, fields.integer("kv_lora_rank"), plain, turned, fields.integer("v_head_dim"), short,
                                  position, SHORT, scale=scale, bias=bias, out_bias=bias), length


def _groups(fields: Fields, best: int) -> config.ExpertGroups | None:
    """Of experts; None where there is one."""
    count, chosen = fields.integer("n_group"), fields.integer("topk_group")
    return None if count == chosen == 1 else config.ExpertGroups(count, chosen, best)


def _decoder(fields: Fields, attention: config.LatentAttention, length: int, router: config.TopK) -> config.Decoder:
    """The first layers are dense, and of those behind every `moe_layer_freq`-th has a mixture."""
    activation, rms = fields.activation("hidden_act"), config.RmsNorm(fields.number("rms_norm_eps"))
    width = fields.integer("moe_intermediate_size")
    shared = None if fields.get("n_shared_experts") is None else config.Dense(
        width * fields.integer("n_shared_experts"), activation)
    mixture = config.Moe(fields.integer("n_routed_experts"), config.Dense(width, activation), router, shared)
    dense, first = config.Dense(fields.integer("intermediate_size"), activation), fields.get("first_k_dense_replace")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise fields.wrong("first_k_dense_replace", "the number of layers before the first mixture is needed")
    every = fields.integer("moe_layer_freq")
    fields.expect("mlp_bias", False)
    blocks = [config.Block(attention, mixture if i >= first and i % every == 0 else dense, config.PreNorm(rms))
              for i in range(fields.integer("num_hidden_layers"))]
    return decoder(fields, fields.integer("hidden_size"), blocks, rms, length)


def _read_v2(fields: Fields) -> config.Decoder:
    attention, length = _attention(fields, True)
    fields.expect("scoring_func", "softmax")
    if fields.flag("norm_topk_prob"):
        raise fields.wrong("norm_topk_prob", "it must be false: DeepSeek's own code then divides the experts' weights by their "
                           "sum in place of routed_scaling_factor, and transformers does nothing of the kind")
    groups = None
    if fields.get("topk_method") == "group_limited_greedy":
        groups = _groups(fields, 1)
    else:
        fields.expect("topk_method", "greedy", "group_limited_greedy")
        fields.get("n_group"), fields.get("topk_group")
    router = config.TopK(fields.integer("num_experts_per_tok"), scale=fields.number("routed_scaling_factor"), groups=groups)
    return _decoder(fields, attention, length, router)


def _read_v3(fields: Fields) -> config.Decoder:
    attention, length = _attention(fields, fields.get("rope_interleave") is None or fields.flag("rope_interleave"))
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    router = config.TopK(fields.integer("num_experts_per_tok"), config.Score.SIGMOID, fields.flag("norm_topk_prob"),
                         fields.number("routed_scaling_factor"), _groups(fields, 2), correction=True)
    return _decoder(fields, attention, length, router)


def _write(cfg: config.Decoder) -> dict[str, Any]:
    """What both write.

    Raises:
      ValueError: for layers in an order that transformers does not have, or mixtures without a shared layer of a width that
        it can state.
    """
    blocks = cfg.stack.blocks()
    sparse = [isinstance(block.feedforward, config.Moe) for block in blocks]
    if True not in sparse:
        raise ValueError("no layer is a mixture of experts")
    first = sparse.index(True)
    if not all(sparse[first:]):
        raise ValueError("there are dense layers behind the first mixture of experts")
    one, moe = blocks[0].attention, blocks[first].feedforward
    if not isinstance(moe.router, config.TopK):
        raise ValueError(f"its router is a {type(moe.router).__name__}, and must be a TopK")
    if moe.shared is None or moe.shared.width % moe.expert.width:
        raise ValueError("its mixtures need a shared layer whose width is a multiple of an expert's")
    values = write_sizes(cfg, blocks[0].feedforward if first else moe.expert) | write_rope(cfg) | {
        "rms_norm_eps": blocks[0].residual.norm.eps, "kv_lora_rank": one.latent, "q_lora_rank": one.query_latent,
        "qk_nope_head_dim": one.key_width, "qk_rope_head_dim": one.rotated, "v_head_dim": one.value_width,
        "attention_bias": one.bias, "first_k_dense_replace": first, "moe_layer_freq": 1, "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared.width // moe.expert.width, "moe_intermediate_size": moe.expert.width,
        "num_experts_per_tok": moe.router.k, "routed_scaling_factor": moe.router.scale}
    if one.scale is not None and isinstance(one.position.scaling, config.YarnScaling) and one.position.scaling.factor > 1:
        # Rounded, it is the number that the scale was made of.
        share = (math.sqrt(one.scale * one.head_width**0.5) - 1) / (0.1 * math.log(one.position.scaling.factor))
        values["rope_scaling"] = values["rope_scaling"] | {"mscale_all_dim": round(share, 9)}
    return values


def _write_v2(cfg: config.Decoder) -> dict[str, Any]:
    values = _write(cfg)
    groups = cfg.stack.blocks()[-1].feedforward.router.groups
    if groups is None:
        return values | {"topk_method": "greedy", "n_group": None, "topk_group": None, "norm_topk_prob": False}
    return values | {"topk_method": "group_limited_greedy", "n_group": groups.count, "topk_group": groups.chosen,
                     "norm_topk_prob": False}


def _write_v3(cfg: config.Decoder) -> dict[str, Any]:
    values, router = _write(cfg), cfg.stack.blocks()[-1].feedforward.router
    count, chosen = (1, 1) if router.groups is None else (router.groups.count, router.groups.chosen)
    return values | {"n_group": count, "topk_group": chosen, "norm_topk_prob": router.normalize,
                     "rope_interleave": cfg.stack.blocks()[0].attention.position.interleaved, "num_nextn_predict_layers": 0}


# Losses of training, how experts were spread over devices, and what is left out.
_IGNORED = frozenset({"aux_loss_alpha", "ep_size", "num_mtp_layers", "num_nextn_predict_layers", "output_router_logits",
                      "router_aux_loss_coef", "seq_aux"})
_DEFAULTS = DEFAULTS | {"attention_bias": False, "moe_layer_freq": 1}
_V2 = {"first_k_dense_replace": 0, "n_shared_experts": 2, "q_lora_rank": 1536, "routed_scaling_factor": 1.0,
       "topk_method": "greedy"}
_V3 = {"first_k_dense_replace": 3, "n_shared_experts": 1, "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "n_group": 8,
       "topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": True}

_SAME = {"attention": config.LatentAttention, "mixtures": True, "others": (TABLE + TOGETHER,), "ignored": _IGNORED,
         "beyond": True, "exact": ("*/router/correction",)}

FAMILIES = (
    Family("deepseek_v2", "DeepSeek-V2, V2-Lite, V2.5; DeepSeek-Coder-V2", "DeepseekV2ForCausalLM", TABLE + NAMED, _read_v2,
           _write_v2, defaults=_DEFAULTS | _V2, **_SAME),
    Family("deepseek_v3", "DeepSeek-V3, V3.1, R1; Moonlight", "DeepseekV3ForCausalLM", TABLE + NAMED, _read_v3, _write_v3,
           defaults=_DEFAULTS | _V3, **_SAME),
)

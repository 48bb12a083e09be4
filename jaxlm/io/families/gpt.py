"""GPT-2, GPT-NeoX (Pythia) and CodeGen: layer norms, plain feed-forward layers with biases."""

from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import Family, Fields, decoder, rope, write_activation, write_rope
from jaxlm.io.names import Row, head, linear, norm

QKV = ("{block}/attention/q", "{block}/attention/k", "{block}/attention/v")
H = "{base}h.{i}"
LAYER = "{base}layers.{i}"
BUFFERS = (r".*\.attn\.bias", r".*\.attn\.masked_bias", r".*\.attn\.causal_mask", r".*\.attention\.bias",
           r".*\.attention\.masked_bias", r".*rotary_emb\.inv_freq", r".*\.embed_positions")
# Heads for other tasks, and two spellings of the context.
IGNORED = frozenset("n_ctx summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
                    "reorder_and_upcast_attn".split())


def split_width(fields: Fields, width: str, heads: str) -> tuple[int, int, int]:
    """Width, heads and the width of a head, which must come out whole."""
    whole, count = fields.integer(width), fields.integer(heads)
    if whole % count:
        raise fields.wrong(width, f"it must be a multiple of {heads}, {count}")
    return whole, count, whole // count


def _inner(fields: Fields, width: int) -> int:
    return 4 * width if fields.get("n_inner") is None else fields.integer("n_inner")


def _write(cfg: config.Decoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    return {"vocab_size": cfg.embedding.vocabulary, "n_embd": cfg.width, "n_layer": cfg.stack.layers,
            "n_head": block.attention.heads, "n_inner": block.feedforward.width, "n_positions": cfg.length,
            "activation_function": write_activation(block.feedforward.activation),
            "layer_norm_epsilon": block.residual.norm.eps, "tie_word_embeddings": cfg.head.tied}


def _read_gpt2(fields: Fields) -> config.Decoder:
    width, heads, head_width = split_width(fields, "n_embd", "n_head")
    length, layer_norm = fields.integer("n_positions"), config.LayerNorm(fields.number("layer_norm_epsilon"))
    scale = None if fields.flag("scale_attn_weights") else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx")
    feedforward = config.Dense(_inner(fields, width), fields.activation("activation_function"), False, True)
    blocks = []
    for i in range(fields.integer("n_layer")):
        mine = (head_width**-0.5 if scale is None else scale) / (i + 1) if by_layer and i else scale
        attention = config.Attention(heads, heads, head_width, None, scale=mine, bias=True, out_bias=True)
        blocks.append(config.Block(attention, feedforward, config.PreNorm(layer_norm)))
    return decoder(fields, width, blocks, layer_norm, length, embedding={"position": config.Learned(length)})


def _write_gpt2(cfg: config.Decoder) -> dict[str, Any]:
    scales = [block.attention.scale for block in cfg.stack.blocks()]
    return _write(cfg) | {"scale_attn_weights": scales[0] is None,
                          "scale_attn_by_inverse_layer_idx": len(set(scales)) > 1}


def _read_codegen(fields: Fields) -> config.Decoder:
    width, heads, head_width = split_width(fields, "n_embd", "n_head")
    if heads % 4:
        raise fields.wrong("n_head", "CodeGen's heads lie in four runs: it must be a multiple of 4")
    rotated = fields.integer("rotary_dim")
    position = config.Rope(10000.0, None if rotated == head_width else rotated, interleaved=True)
    layer_norm = config.LayerNorm(fields.number("layer_norm_epsilon"))
    fields.expect("scale_attn_weights", True)
    block = config.Block(config.Attention(heads, heads, head_width, position),
                         config.Dense(_inner(fields, width), fields.activation("activation_function"), False, True),
                         config.ParallelNorm(layer_norm, shared=True))
    return decoder(fields, width, [block] * fields.integer("n_layer"), layer_norm, fields.integer("n_positions"),
                   head={"bias": True})


def _write_codegen(cfg: config.Decoder) -> dict[str, Any]:
    return _write(cfg) | {"n_ctx": cfg.length, "rotary_dim": cfg.stack.blocks()[0].attention.rotated}


def _read_neox(fields: Fields) -> config.Decoder:
    width, heads, head_width = split_width(fields, "hidden_size", "num_attention_heads")
    share = fields.optional("rotary_pct")
    position, length = rope(fields, head_width, theta="rotary_emb_base", partial=0.25 if share is None else share)
    bias, layer_norm = fields.flag("attention_bias"), config.LayerNorm(fields.number("layer_norm_eps"))
    residual = (config.ParallelNorm(layer_norm, shared=False) if fields.flag("use_parallel_residual")
                else config.PreNorm(layer_norm))
    block = config.Block(config.Attention(heads, heads, head_width, position, bias=bias, out_bias=bias),
                         config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_act"), False, True),
                         residual)
    return decoder(fields, width, [block] * fields.integer("num_hidden_layers"), layer_norm, length)


def _write_neox(cfg: config.Decoder) -> dict[str, Any]:
    block, values = cfg.stack.blocks()[0], write_rope(cfg)
    return values | {
        "vocab_size": cfg.embedding.vocabulary, "hidden_size": cfg.width, "intermediate_size": block.feedforward.width,
        "num_hidden_layers": cfg.stack.layers, "num_attention_heads": block.attention.heads,
        "hidden_act": write_activation(block.feedforward.activation), "layer_norm_eps": block.residual.norm.eps,
        "tie_word_embeddings": cfg.head.tied, "attention_bias": block.attention.bias,
        "use_parallel_residual": isinstance(block.residual, config.ParallelNorm),
        "rotary_emb_base": values["rope_theta"], "rotary_pct": block.attention.rotated / block.attention.head_width}


_SPELLINGS = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
              "num_hidden_layers": "n_layer"}

FAMILIES = (
    Family("gpt2", "GPT-2, DistilGPT2", "GPT2LMHeadModel", (
        Row(("decoder/embedding/tokens",), "{base}wte.weight", twins=("lm_head.weight",)),
        Row(("decoder/embedding/positions",), "{base}wpe.weight"),
        *norm("decoder/norm", "{base}ln_f"),
        *head("lm_head"),
        *norm("{block}/attention_norm", f"{H}.ln_1"),
        *linear(QKV, f"{H}.attn.c_attn", out_axis=1),
        *linear("{block}/attention/o", f"{H}.attn.c_proj", out_axis=1),
        *norm("{block}/feedforward_norm", f"{H}.ln_2"),
        *linear("{block}/feedforward/up", f"{H}.mlp.c_fc", out_axis=1),
        *linear("{block}/feedforward/down", f"{H}.mlp.c_proj", out_axis=1),
    ), _read_gpt2, _write_gpt2, bases=("transformer.", ""),
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                  "tie_word_embeddings": True},
        aliases=_SPELLINGS, ignored=IGNORED, leftover=BUFFERS),
    Family("gpt_neox", "GPT-NeoX, Pythia", "GPTNeoXForCausalLM", (
        Row(("decoder/embedding/tokens",), "{base}embed_in.weight", twins=("embed_out.weight", "lm_head.weight")),
        *norm("decoder/norm", "{base}final_layer_norm"),
        *head("embed_out", "lm_head"),
        *norm("{block}/attention_norm", f"{LAYER}.input_layernorm"),
        *linear(QKV, f"{LAYER}.attention.query_key_value", blocks=None),
        *linear("{block}/attention/o", f"{LAYER}.attention.dense"),
        *norm("{block}/feedforward_norm", f"{LAYER}.post_attention_layernorm"),
        *linear("{block}/feedforward/up", f"{LAYER}.mlp.dense_h_to_4h"),
        *linear("{block}/feedforward/down", f"{LAYER}.mlp.dense_4h_to_h"),
    ), _read_neox, _write_neox, bases=("gpt_neox.", ""),
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True,
                  "attention_bias": True},
        aliases={"rope_theta": "rotary_emb_base"}, leftover=BUFFERS),
    Family("codegen", "CodeGen", "CodeGenForCausalLM", (
        Row(("decoder/embedding/tokens",), "{base}wte.weight", twins=("lm_head.weight",)),
        *norm("decoder/norm", "{base}ln_f"),
        *head("lm_head"),
        *norm("{block}/attention_norm", f"{H}.ln_1"),
        # Queries, values, keys, in each of four runs of heads: made for four TPU cores.
        *linear(("{block}/attention/q", "{block}/attention/v", "{block}/attention/k"), f"{H}.attn.qkv_proj", blocks=4),
        *linear("{block}/attention/o", f"{H}.attn.out_proj"),
        *linear("{block}/feedforward/up", f"{H}.mlp.fc_in"),
        *linear("{block}/feedforward/down", f"{H}.mlp.fc_out"),
    ), _read_codegen, _write_codegen, bases=("transformer.", ""),
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
                  "rotary_dim": 64},
        aliases=_SPELLINGS, ignored=IGNORED, leftover=BUFFERS),
)

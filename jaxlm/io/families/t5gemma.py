"""T5Gemma: two Gemma 2 stacks, of which the decoder's layers also attend to what the encoder made of the source."""

from typing import Any

from jaxlm import config
from jaxlm.io.families import llama
from jaxlm.io.families.fields import Family, Fields, rope, windows, write_activation, write_rope, write_windows
from jaxlm.io.names import Row, linear, norm, of_encoder

# A window of W lets the decoder see keys less than W positions away, and the encoder those W away as well.
REACH = {"decoder": 0, "encoder": 1}


def _side(fields: Fields, side: str, source: int | None) -> tuple[int, list[config.Block], config.Norm, int, config.Embedding]:
    """What both sides have: width, blocks, final norm, longest text and embedding. `source`: the encoder's width."""
    width, heads, kv_heads, head_width = llama.sizes(fields)
    position, length = rope(fields, head_width)
    bias, scalar = fields.flag("attention_bias"), fields.number("query_pre_attn_scalar")
    shape = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width, "bias": bias, "out_bias": bias,
             "scale": None if scalar == head_width else scalar**-0.5, "softcap": fields.optional("attn_logit_softcapping")}
    fields.expect("is_decoder", source is not None)
    fields.expect("cross_attention_hidden_size", *([] if source is None else [source]))
    residual = config.SandwichNorm(config.RmsNorm(fields.number("rms_norm_eps"), offset=1.0))
    feedforward = config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_activation"))
    cross = None if source is None else config.Attention(**shape, position=None, causal=False, source=source)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window") + REACH[side]
    blocks = [config.Block(config.Attention(**shape, position=position, causal=source is not None, window=one), feedforward,
                           residual, cross=cross)
              for one in windows(fields, fields.integer("num_hidden_layers"), window, lambda i: i % 2 == 0)]
    return width, blocks, residual.norm, length, config.Embedding(fields.integer("vocab_size"), scale=width**0.5)


def _read(fields: Fields) -> config.EncoderDecoder | config.Encoder:
    alone = any("EncoderModel" in name for name in fields.get("architectures") or ())
    fields.expect("is_encoder_decoder", not alone)
    values = {side: fields.inner(side, fields.get(side), _MODULE) for side in REACH}
    for inner in values.values():
        inner.get("final_logit_softcapping")  # the encoder's means nothing
    width, blocks, final, length, embedding = _side(values["encoder"], "encoder", None)
    values["encoder"].finish(_IGNORED)
    encoder = config.Encoder(width, embedding, config.stack_of(blocks), final, None, length)
    if alone:
        return encoder
    inner = values["decoder"]
    width, blocks, final, length, embedding = _side(inner, "decoder", width)
    inner.finish(_IGNORED)
    head = config.Head(fields.flag("tie_word_embeddings"), softcap=inner.optional("final_logit_softcapping"))
    starts = (fields.get("decoder_start_token_id"), fields.get("bos_token_id"), inner.get("bos_token_id"))
    start = next((one for one in starts if one is not None), None)
    if start is None:
        raise ValueError(f"config.json lacks decoder_start_token_id, which {fields.family} needs")
    return config.EncoderDecoder(
        encoder, config.Decoder(width, embedding, config.stack_of(blocks), final, head, length), (start,), shared=False)


def _write_side(cfg: config.Decoder | config.Encoder, side: str) -> dict[str, Any]:
    block, (window, types) = cfg.stack.blocks()[0], write_windows(cfg)
    attention = block.attention
    return write_rope(cfg) | {
        "model_type": "t5_gemma_module", "vocab_size": cfg.embedding.vocabulary, "hidden_size": cfg.width,
        "intermediate_size": block.feedforward.width, "num_hidden_layers": cfg.stack.layers,
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads, "head_dim": attention.head_width,
        "hidden_activation": write_activation(block.feedforward.activation), "rms_norm_eps": block.residual.norm.eps,
        "attention_bias": attention.bias, "attn_logit_softcapping": attention.softcap, "is_decoder": side == "decoder",
        "query_pre_attn_scalar": attention.head_width if attention.scale is None else round(attention.scale**-2),
        # transformers wants one even where no layer has it.
        "sliding_window": cfg.length if window is None else window - REACH[side], "layer_types": types}


def _write(cfg: config.EncoderDecoder | config.Encoder) -> dict[str, Any]:
    if isinstance(cfg, config.Encoder):
        return {"architectures": ["T5GemmaEncoderModel"], "is_encoder_decoder": False, "encoder": _write_side(cfg, "encoder")}
    decoder = cfg.decoder
    return {"is_encoder_decoder": True, "encoder": _write_side(cfg.encoder, "encoder"),
            "decoder": _write_side(decoder, "decoder") | {
                "final_logit_softcapping": decoder.head.softcap, "bos_token_id": cfg.start[0],
                "cross_attention_hidden_size": cfg.encoder.width},
            "tie_word_embeddings": decoder.head.tied, "vocab_size": decoder.embedding.vocabulary,
            "decoder_start_token_id": cfg.start[0]}


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return tuple(row for name in "qkvo" for row in linear(f"{{block}}/{ours}/{name}", f"{theirs}.{name}_proj"))


def _rows(side: str) -> tuple[Row, ...]:
    """What both sides have, under a decoder's names for our weights."""
    layer = f"{{base}}{side}.layers.{{i}}"
    return (
        *norm("decoder/norm", f"{{base}}{side}.norm"),
        *_attention("attention", f"{layer}.self_attn"),
        *norm("{block}/attention_norm", f"{layer}.pre_self_attn_layernorm"),
        *norm("{block}/attention_norm_out", f"{layer}.post_self_attn_layernorm"),
        *(row for name in ("gate", "up", "down")
          for row in linear(f"{{block}}/feedforward/{name}", f"{layer}.mlp.{name}_proj")),
        *norm("{block}/feedforward_norm", f"{layer}.pre_feedforward_layernorm"),
        *norm("{block}/feedforward_norm_out", f"{layer}.post_feedforward_layernorm"),
    )


HEAD = "lm_head.out_proj"
_CROSS = "{base}decoder.layers.{i}"
_TABLE = (
    *of_encoder(*_rows("encoder"), Row(("decoder/embedding/tokens",), "{base}encoder.embed_tokens.weight")),
    *_rows("decoder"),
    Row(("decoder/embedding/tokens",), "{base}decoder.embed_tokens.weight", twins=(f"{HEAD}.weight",)),
    *_attention("cross_attention", f"{_CROSS}.cross_attn"),
    *norm("{block}/cross_attention_norm", f"{_CROSS}.pre_cross_attn_layernorm"),
    *norm("{block}/cross_attention_norm_out", f"{_CROSS}.post_cross_attn_layernorm"),
    Row(("decoder/head/out",), f"{HEAD}.weight"),
)

# transformers' own, which are Gemma 2's of 2B.
_MODULE = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
           "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "attention_bias": False, "query_pre_attn_scalar": 256,
           "sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2}
# Of each side: the whole says whether the head is tied.
_IGNORED = frozenset({"dropout_rate", "tie_word_embeddings"})

FAMILIES = (
    Family("t5gemma", "T5Gemma", "T5GemmaForConditionalGeneration", _TABLE, _read, _write,
           kinds=(config.EncoderDecoder, config.Encoder), defaults={"tie_word_embeddings": True},
           ignored=frozenset({"classifier_dropout_rate", "dropout_rate", "tie_word_embeddings", "vocab_size"})),
)

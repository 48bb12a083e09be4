"""CodeT5+ of 2B to 16B (https://arxiv.org/abs/2305.07922): a small CodeGen that reads, a product to the decoder's width, and a
large CodeGen whose last layer also attends to the source.

As in the released code, cross-attention stands beside attention and feed-forward under their one norm, and its queries and keys
turn by their places in their own texts. That code has no cache when it generates; one that turned every new query as if it were
the first, as its attention would, gives other texts.
"""

from typing import Any

from jaxlm import config
from jaxlm.io.families import gpt
from jaxlm.io.families.fields import Family, Fields, write_activation
from jaxlm.io.names import Row, head, linear, norm, of_encoder


def _side(fields: Fields, source: int | None) -> tuple[int, list[config.Block], config.Norm, int, config.Embedding]:
    """What both sides have: width, blocks, final norm, longest text and embedding. `source`: the encoder's width."""
    width, heads, head_width = gpt.split_width(fields, "n_embd", "n_head")
    if heads % 4:
        raise fields.wrong("n_head", "CodeT5+'s heads lie in four runs: it must be a multiple of 4")
    writes = source is not None
    for key in ("is_decoder", "add_cross_attention"):
        if fields.flag(key) != writes:
            raise fields.wrong(key, f"it must be {writes}")
    fields.expect("cross_attention_hidden_size")
    rotated = fields.integer("rotary_dim")
    shape = {"heads": heads, "kv_heads": heads, "head_width": head_width,
             "position": config.Rope(10000.0, None if rotated == head_width else rotated, interleaved=True)}
    layer_norm = config.LayerNorm(fields.number("layer_norm_epsilon"))
    inner = 4 * width if fields.get("n_inner") is None else fields.integer("n_inner")
    feedforward = config.Dense(inner, fields.activation("activation_function"), False, True)
    cross = config.Attention(**shape, causal=False, source=width)
    block = config.Block(config.Attention(**shape, causal=writes), feedforward, config.ParallelNorm(layer_norm, shared=True))
    last = config.Block(block.attention, feedforward, block.residual, cross=cross if writes else None)
    blocks = [block] * (fields.integer("n_layer") - 1) + [last]
    return width, blocks, layer_norm, fields.integer("n_positions"), config.Embedding(fields.integer("vocab_size"))


def _read(fields: Fields) -> config.EncoderDecoder:
    fields.expect("is_encoder_decoder", True)
    fields.expect("tie_encoder_decoder", False)
    reader, writer = (fields.inner(side, fields.get(side), _MODULE) for side in ("encoder", "decoder"))
    source, blocks, final, length, embedding = _side(reader, None)
    encoder = config.Encoder(source, embedding, config.stack_of(blocks), final, None, length)
    width, blocks, final, length, embedding = _side(writer, source)
    output = config.Head(writer.flag("tie_word_embeddings"), bias=True)
    decoder = config.Decoder(width, embedding, config.stack_of(blocks), final, output, length)
    starts = [side.get(key) for key in ("decoder_start_token_id", "bos_token_id") for side in (fields, writer)]
    for side in (reader, writer):
        side.finish(_IGNORED)
    start = next((one for one in starts if one is not None), None)
    if start is None:
        raise ValueError(f"config.json lacks decoder_start_token_id, which {fields.family} needs")
    return config.EncoderDecoder(encoder, decoder, (start,), shared=False, projection=width != source)


def _write_side(cfg: config.Decoder | config.Encoder) -> dict[str, Any]:
    block, writes = cfg.stack.blocks()[0], isinstance(cfg, config.Decoder)
    return {"model_type": "codet5p_module", "vocab_size": cfg.embedding.vocabulary, "n_embd": cfg.width,
            "n_layer": cfg.stack.layers, "n_head": block.attention.heads, "n_inner": block.feedforward.width,
            "n_positions": cfg.length, "n_ctx": cfg.length, "rotary_dim": block.attention.rotated,
            "activation_function": write_activation(block.feedforward.activation),
            "layer_norm_epsilon": block.residual.norm.eps, "is_decoder": writes, "add_cross_attention": writes}


def _write(cfg: config.EncoderDecoder) -> dict[str, Any]:
    return {"is_encoder_decoder": True, "encoder": _write_side(cfg.encoder), "decoder_start_token_id": cfg.start[0],
            "decoder": _write_side(cfg.decoder) | {"tie_word_embeddings": cfg.decoder.head.tied},
            "auto_map": {name: f"Salesforce/codet5p-2b--{place}" for name, place in (
                ("AutoConfig", "configuration_codet5p.CodeT5pConfig"),
                ("AutoModelForSeq2SeqLM", "modeling_codet5p.CodeT5pEncoderDecoderModel"))}}


def _rows(base: str) -> tuple[Row, ...]:
    """What both sides have, under a decoder's names for our weights."""
    layer = f"{base}.h.{{i}}"
    return (
        Row(("decoder/embedding/tokens",), f"{base}.wte.weight", twins=("decoder.lm_head.weight",)),
        *norm("decoder/norm", f"{base}.ln_f"),
        *norm("{block}/attention_norm", f"{layer}.ln_1"),
        # Queries, values, keys, in each of four runs of heads, as CodeGen's.
        *linear(("{block}/attention/q", "{block}/attention/v", "{block}/attention/k"), f"{layer}.attn.qkv_proj", blocks=4),
        *linear("{block}/attention/o", f"{layer}.attn.out_proj"),
        *linear("{block}/feedforward/up", f"{layer}.mlp.fc_in"),
        *linear("{block}/feedforward/down", f"{layer}.mlp.fc_out"),
    )


WRITER = "decoder.transformer"
_CROSS = f"{WRITER}.h.{{i}}.crossattention"
_TABLE = (
    *of_encoder(*_rows("encoder")),
    *_rows(WRITER),
    *linear("{block}/cross_attention/q", f"{_CROSS}.q_attn"),
    *linear(("{block}/cross_attention/v", "{block}/cross_attention/k"), f"{_CROSS}.qkv_proj", blocks=4),
    *linear("{block}/cross_attention/o", f"{_CROSS}.out_proj"),
    *head("decoder.lm_head"),
    Row(("projection/product",), "enc_to_dec_proj.weight"),
    Row(("projection/bias",), "enc_to_dec_proj.bias"),
)

_MODULE = {"vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
           "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "bos_token_id": 50256}
# The released code scales its scores in any case.
_IGNORED = gpt.IGNORED | {"scale_attn_weights", "tie_word_embeddings"}

FAMILIES = (
    Family("codet5p", "CodeT5+ 2B, 6B, 16B; InstructCodeT5+", "CodeT5pEncoderDecoderModel", _TABLE, _read, _write,
           kinds=(config.EncoderDecoder,), bases=("",), leftover=(r".*\.causal_mask",)),
)

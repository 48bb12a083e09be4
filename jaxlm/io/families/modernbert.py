"""Encoders with rotary positions: ModernBERT and Ettin, of which there are decoders too, and Nomic BERT."""

from functools import partial
from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import (
    KINDS,
    Family,
    Fields,
    labels,
    rope,
    windows,
    write_activation,
    write_labels,
    write_rope,
    write_scaling,
    write_windows,
)
from jaxlm.io.families.gpt import split_width
from jaxlm.io.names import VECTOR, Row, linear, norm, of_encoder

LAYER = "{base}layers.{i}"
POOLING = {"cls": config.Pooling.FIRST, "mean": config.Pooling.MEAN}
# The base of the rotary position, and the key that older configs have it under, by kind of layer.
ROPES = dict(zip(KINDS, ((160000.0, "global_rope_theta"), (10000.0, "local_rope_theta")), strict=True))


def _words(side: Any) -> bool:
    return isinstance(side.head, config.Head)


def _labels(side: Any) -> bool:
    return isinstance(side.head, config.Classifier)


def _head(transform: str) -> tuple[Row, ...]:
    """The transform that every head has, and the product of language models."""
    return (Row(("decoder/head/transform/product",), f"{transform}.dense.weight"),
            Row(("decoder/head/transform/bias",), f"{transform}.dense.bias"),
            *norm("decoder/head/transform/norm", f"{transform}.norm"),
            Row(("decoder/head/out",), "decoder.weight", when=_words), Row(("decoder/head/bias",), "decoder.bias", when=_words))


TABLE = (
    Row(("decoder/embedding/tokens",), "{base}embeddings.tok_embeddings.weight", twins=("decoder.weight",)),
    *norm("decoder/embedding/norm", "{base}embeddings.norm"), *norm("decoder/norm", "{base}final_norm"),
    *norm("{block}/attention_norm", f"{LAYER}.attn_norm"), *norm("{block}/feedforward_norm", f"{LAYER}.mlp_norm"),
    *linear("{block}/attention/o", f"{LAYER}.attn.Wo"), *linear("{block}/feedforward/down", f"{LAYER}.mlp.Wo"),
    *linear(("{block}/feedforward/gate", "{block}/feedforward/up"), f"{LAYER}.mlp.Wi"),
)
ENCODER = of_encoder(
    *TABLE, *linear(tuple(f"{{block}}/attention/{name}" for name in "qkv"), f"{LAYER}.attn.Wqkv"), *_head("head"),
    Row(("decoder/head/out",), "classifier.weight", when=_labels),
    Row(("decoder/head/bias",), "classifier.bias", when=_labels)) + VECTOR
DECODER = (*TABLE, *_head("lm_head"),
           *(row for name in "qkv" for row in linear(f"{{block}}/attention/{name}", f"{LAYER}.attn.{name}_proj")))


def _encoder_head(fields: Fields, words: config.Head) -> config.Head | config.Classifier | None:
    """The head that "architectures" names, given that of masked language models."""
    pooling, named = fields.get("classifier_pooling"), (fields.get("architectures") or ["ModernBertModel"])[0]
    if pooling not in POOLING:
        raise fields.wrong("classifier_pooling", f"there is {', '.join(POOLING)}")
    count = labels(fields)
    heads = {"ModernBertModel": None, "ModernBertForMaskedLM": words,
             "ModernBertForSequenceClassification": config.Classifier(count, POOLING[pooling], words.transform),
             "ModernBertForTokenClassification": config.Classifier(count, None, words.transform)}
    if named not in heads:
        raise fields.wrong("architectures", f"there is {', '.join(heads)}")
    return heads[named]


def _read(fields: Fields, causal: bool) -> config.Encoder | config.Decoder:
    width, heads, head_width = split_width(fields, "hidden_size", "num_attention_heads")
    layer_norm = config.LayerNorm(fields.number("norm_eps"), fields.flag("norm_bias"))
    fields.expect("rope_scaling")  # transformers scales both kinds of layers by it, and none was released with one
    ropes = {kind: rope(fields, head_width, base=base, theta=theta, kind=kind) for kind, (base, theta) in ROPES.items()}
    # So many keys on either side of a query are seen, and of a decoder's the query's own is one of them.
    local = fields.integer("local_attention") // 2 + (0 if causal else 1)
    fields.expect("sliding_window", local)
    period = fields.integer("global_attn_every_n_layers")
    bias, layers = fields.flag("attention_bias"), fields.integer("num_hidden_layers")
    attentions = [config.Attention(heads, heads, head_width, ropes[KINDS[window is not None]][0], causal, window, bias=bias,
                                   out_bias=bias) for window in windows(fields, layers, local, lambda i: i % period != 0)]
    dense = config.Dense(fields.integer("intermediate_size"), fields.activation("hidden_activation"), True,
                         fields.flag("mlp_bias"))
    blocks = [config.Block(one, dense, config.PreNorm(layer_norm, attention=i > 0)) for i, one in enumerate(attentions)]
    transform = config.Transform(fields.activation("classifier_activation"), layer_norm, fields.flag("classifier_bias"))
    head = config.Head(fields.flag("tie_word_embeddings"), fields.flag("decoder_bias"), transform=transform)
    parts = (width, config.Embedding(fields.integer("vocab_size"), norm=layer_norm), config.stack_of(blocks), layer_norm)
    length = ropes["full_attention"][1]
    if not causal:
        return config.Encoder(*parts, _encoder_head(fields, head), length)
    fields.expect("architectures", ["ModernBertDecoderForCausalLM"])
    return config.Decoder(*parts, head, length)


def _write(cfg: config.Encoder | config.Decoder) -> dict[str, Any]:
    blocks, causal = cfg.stack.blocks(), isinstance(cfg, config.Decoder)
    block, (window, types) = blocks[0], write_windows(cfg)
    ropes = {kind: next((one.attention.position for one, its in zip(blocks, types, strict=True) if its == kind),
                        config.Rope(base)) for kind, (base, _) in ROPES.items()}
    if not all(isinstance(one, config.Rope) for one in ropes.values()):
        raise ValueError("every layer has a rotary position")
    values = {"vocab_size": cfg.embedding.vocabulary, "hidden_size": cfg.width, "num_hidden_layers": len(blocks),
              "num_attention_heads": block.attention.heads, "intermediate_size": block.feedforward.width,
              "hidden_activation": write_activation(block.feedforward.activation), "norm_eps": block.residual.norm.eps,
              "norm_bias": isinstance(block.residual.norm, config.LayerNorm) and block.residual.norm.bias,
              "attention_bias": block.attention.bias, "mlp_bias": block.feedforward.bias, "layer_types": types,
              "max_position_embeddings": cfg.length}
    if window is not None:
        values["local_attention"] = 2 * (window if causal else window - 1)
    if any(one.scaling for one in ropes.values()):
        values["rope_parameters"] = {kind: {"rope_theta": one.base, "rope_type": "default"}
                                     | (write_scaling(one.scaling) or {}) for kind, one in ropes.items()}
    else:
        values |= {ROPES[kind][1]: one.base for kind, one in ropes.items()}
    transform = getattr(cfg.head, "transform", None)
    if transform is not None:
        values |= {"classifier_activation": write_activation(transform.activation), "classifier_bias": transform.bias}
    match cfg.head:
        case config.Head(tied=tied, bias=bias):
            name, more = "ForCausalLM" if causal else "ForMaskedLM", {"tie_word_embeddings": tied, "decoder_bias": bias}
        case config.Classifier(labels=count, pooling=pooling):
            name = "ForTokenClassification" if pooling is None else "ForSequenceClassification"
            more = write_labels(count) | {
                "classifier_pooling": next((theirs for theirs, ours in POOLING.items() if ours is pooling), "cls")}
        case _:
            name, more = "Model", {}
    return values | more | {"architectures": [f"ModernBert{'Decoder' if causal else ''}{name}"]}


def _read_nomic(fields: Fields) -> config.Encoder:
    width, heads, head_width = split_width(fields, "hidden_size", "num_attention_heads")
    fields.expect("head_dim", head_width)
    for key in _NOMIC_OFF:
        fields.expect(key, False)
    for key in ("rotary_emb_scale_base", "rotary_scaling_factor"):
        fields.expect(key)
    fields.expect("rotary_emb_fraction", 1)
    # What it may read and was not trained on; transformers has no use for it.
    fields.get("n_positions")
    fields.expect("max_trained_positions", fields.integer("max_position_embeddings"))
    position, length = rope(fields, head_width, base=1000.0)
    layer_norm = config.LayerNorm(fields.number("layer_norm_eps"))
    fields.expect("activation_function", "swiglu")
    activation = fields.activation("hidden_act")
    attention = config.Attention(heads, heads, head_width, position, causal=False)
    block = config.Block(attention, config.Dense(fields.integer("intermediate_size"), activation),
                         config.PostNorm(layer_norm))
    heads_by_name = {"NomicBertModel": None,
                     "NomicBertForMaskedLM": config.Head(True, bias=True, transform=config.Transform(activation, layer_norm))}
    named = (fields.get("architectures") or ["NomicBertModel"])[0]
    if named not in heads_by_name:
        raise fields.wrong("architectures", f"there is {', '.join(heads_by_name)}")
    fields.expect("tie_word_embeddings", True)
    embedding = config.Embedding(fields.integer("vocab_size"), norm=layer_norm, types=fields.integer("type_vocab_size"))
    return config.Encoder(width, embedding, config.stack_of([block] * fields.integer("num_hidden_layers")), None,
                          heads_by_name[named], length)


def _write_nomic(cfg: config.Encoder) -> dict[str, Any]:
    block = cfg.stack.blocks()[0]
    return {"architectures": ["NomicBertModel" if cfg.head is None else "NomicBertForMaskedLM"],
            "vocab_size": cfg.embedding.vocabulary, "type_vocab_size": cfg.embedding.types, "hidden_size": cfg.width,
            "num_hidden_layers": cfg.stack.layers, "num_attention_heads": block.attention.heads,
            "intermediate_size": block.feedforward.width, "hidden_act": write_activation(block.feedforward.activation),
            "layer_norm_eps": block.residual.norm.eps, **write_rope(cfg)}


# As they were released; transformers has modules of other names and renames them when it loads and saves.
_NOMIC_LAYER = "{base}encoder.layers.{i}"
_NOMIC = of_encoder(
    Row(("decoder/embedding/tokens",), "{base}embeddings.word_embeddings.weight", twins=("cls.predictions.decoder.weight",)),
    Row(("decoder/embedding/types",), "{base}embeddings.token_type_embeddings.weight"),
    *norm("decoder/embedding/norm", "{base}emb_ln"),
    Row(tuple(f"{{block}}/attention/{name}" for name in "qkv"), f"{_NOMIC_LAYER}.attn.Wqkv.weight"),
    Row(("{block}/attention/o",), f"{_NOMIC_LAYER}.attn.out_proj.weight"),
    *norm("{block}/attention_norm_out", f"{_NOMIC_LAYER}.norm1"),
    *norm("{block}/feedforward_norm_out", f"{_NOMIC_LAYER}.norm2"),
    *(Row((f"{{block}}/feedforward/{ours}",), f"{_NOMIC_LAYER}.mlp.{theirs}.weight")
      for ours, theirs in (("up", "fc11"), ("gate", "fc12"), ("down", "fc2"))),
    Row(("decoder/head/transform/product",), "cls.predictions.transform.dense.weight"),
    Row(("decoder/head/transform/bias",), "cls.predictions.transform.dense.bias"),
    *norm("decoder/head/transform/norm", "cls.predictions.transform.layer_norm"),
    Row(("decoder/head/bias",), "cls.predictions.bias", also=("cls.predictions.decoder.bias",)),
) + VECTOR
_NOMIC_OFF = ("causal", "mlp_fc1_bias", "mlp_fc2_bias", "parallel_block", "parallel_block_tied_norm", "prenorm",
              "qkv_proj_bias", "rotary_emb_interleaved", "scale_attn_by_inverse_layer_idx", "use_rms_norm")

_DEFAULTS = {
    "hidden_activation": "gelu", "max_position_embeddings": 8192, "norm_eps": 1e-5, "local_attention": 128,
    "global_attn_every_n_layers": 3, "decoder_bias": True, "classifier_activation": "gelu", "tie_word_embeddings": True}
_IGNORED = frozenset("""
    deterministic_flash_attn initializer_cutoff_factor layer_norm_eps mask_token_id mlp_dropout position_embedding_type
    reference_compile repad_logits_with_grad sparse_pred_ignore_index sparse_prediction
""".split())

FAMILIES = (
    Family("modernbert", "ModernBERT, mmBERT, Ettin encoders", "ModernBertModel", ENCODER, partial(_read, causal=False), _write,
           kinds=(config.Encoder,), defaults=_DEFAULTS | {"classifier_pooling": "cls"}, ignored=_IGNORED),
    Family("modernbert-decoder", "Ettin decoders", "ModernBertDecoderForCausalLM", DECODER, partial(_read, causal=True), _write,
           defaults=_DEFAULTS, ignored=_IGNORED, special={"bos_token_id": 0, "pad_token_id": 0}),
    Family("nomic_bert", "nomic-embed-text", "NomicBertModel", _NOMIC, _read_nomic, _write_nomic, kinds=(config.Encoder,),
           bases=("nomic_bert.", "bert.", ""), special={"pad_token_id": 0}, aliases={
               "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_inner": "intermediate_size", "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta"},
           defaults={"hidden_act": "silu", "layer_norm_eps": 1e-12, "max_position_embeddings": 2048, "type_vocab_size": 2,
                     "tie_word_embeddings": True},
           ignored=frozenset("""
               attention_probs_dropout_prob dense_seq_output fused_bias_fc fused_dropout_add_ln hidden_dropout_prob
               pad_vocab_size_multiple reorder_and_upcast_attn scale_attn_weights summary_activation
               summary_first_dropout summary_proj_to_labels summary_type summary_use_proj use_flash_attn use_xentropy
           """.split())),
)

"""BERT and its relatives: encoders with norms after the sums, learned positions, and heads for words, tokens and texts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlm import config
from jaxlm.io.families.fields import Family, Fields, labels, write_activation, write_labels
from jaxlm.io.families.gpt import split_width
from jaxlm.io.names import VECTOR, Row, linear, of_encoder

LAYER = "{base}encoder.layer.{i}"

# MPNet's code has its buckets as constants.
MPNET = config.RelativeBias(32, 128, bidirectional=True)


def _norm(ours: str, theirs: str, when: Callable[[Any], bool] | None = None) -> tuple[Row, Row]:
    """A norm's scale and its bias, which TensorFlow's releases called gamma and beta."""
    return (Row((f"{ours}/scale",), f"{theirs}.weight", also=(f"{theirs}.gamma",), when=when),
            Row((f"{ours}/bias",), f"{theirs}.bias", also=(f"{theirs}.beta",), when=when))


def _product(ours: str, theirs: str, when: Callable[[Any], bool]) -> tuple[Row, Row]:
    return (Row((f"decoder/{ours}",), f"{theirs}.weight", when=when),
            Row((f"decoder/{ours.rpartition('/')[0]}/bias",), f"{theirs}.bias", when=when))


def _words(side: Any) -> bool:
    return isinstance(side.head, config.Head)


def _texts(side: Any) -> bool:
    return isinstance(side.head, config.Classifier) and side.head.pooling is not None


def _tokens(side: Any) -> bool:
    return isinstance(side.head, config.Classifier) and side.head.pooling is None


def _masked(dense: str, norm: str, out: str, bias: str | None = None) -> tuple[Row, ...]:
    """A masked language model's head; `bias` is that of a product tied to the embedding, where it has a name of its own."""
    return (*_product("head/transform/product", dense, _words), *_norm("decoder/head/transform/norm", norm, _words),
            Row(("decoder/head/out",), f"{out}.weight", when=_words),
            Row(("decoder/head/bias",), bias or f"{out}.bias", also=(f"{out}.bias",) if bias else (), when=_words))


def _embedding(head: str, types: bool = True) -> tuple[Row, ...]:
    """The embedding, whose words the `head` may share."""
    names = ("tokens", "word"), ("positions", "position"), *([("types", "token_type")] if types else [])
    return (*(Row((f"decoder/embedding/{ours}",), f"{{base}}embeddings.{theirs}_embeddings.weight",
                  twins=(f"{head}.weight",) if ours == "tokens" else ()) for ours, theirs in names),
            *_norm("decoder/embedding/norm", "{base}embeddings.LayerNorm"))


def _layer(attention: str, names: tuple[str, str, str, str], attention_norm: str, up: str, down: str, norm: str,
           layer: str = LAYER) -> tuple[Row, ...]:
    projections = (linear(f"{{block}}/attention/{ours}", f"{layer}.{attention}{theirs}")
                   for ours, theirs in zip("qkvo", names, strict=True))
    return (*(row for rows in projections for row in rows),
            *_norm("{block}/attention_norm_out", f"{layer}.{attention_norm}"),
            *linear("{block}/feedforward/up", f"{layer}.{up}"), *linear("{block}/feedforward/down", f"{layer}.{down}"),
            *_norm("{block}/feedforward_norm_out", f"{layer}.{norm}"))


BERT_LAYER = _layer("attention.", ("self.query", "self.key", "self.value", "output.dense"), "attention.output.LayerNorm",
                    "intermediate.dense", "output.dense", "output.LayerNorm")
TOKENS = _product("head/out", "classifier", _tokens)
TEXTS = (*_product("head/transform/product", "classifier.dense", _texts), *_product("head/out", "classifier.out_proj", _texts))
ROBERTA = (*_embedding("lm_head.decoder"), *BERT_LAYER, *TOKENS, *TEXTS,
           *_masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"))


def _head(fields: Fields, cls: str, norm: config.LayerNorm, words: config.Activation, texts: config.Activation,
          tokens: config.Activation) -> config.Head | config.Classifier | None:
    """The head that "architectures" names, with the activations of masked language models', texts' and ELECTRA's."""
    named = (fields.get("architectures") or [f"{cls}Model"])[0]
    tied = fields.flag("tie_word_embeddings")
    count = labels(fields)
    masked = config.Head(tied, bias=True, transform=config.Transform(words, norm))
    heads = {"Model": None, "ForMaskedLM": masked,
             "ForSequenceClassification": config.Classifier(count, config.Pooling.FIRST, config.Transform(texts)),
             "ForTokenClassification": config.Classifier(count, None)}
    if cls in ("Bert", "Electra"):
        heads["ForPreTraining"] = masked if cls == "Bert" else config.Classifier(1, None, config.Transform(tokens))
    if named.removeprefix(cls) not in heads:
        raise fields.wrong("architectures", f"there is {', '.join(cls + end for end in heads)}")
    head = heads[named.removeprefix(cls)]
    if isinstance(head, config.Head) and not tied and cls not in ("Electra", "DistilBert"):
        raise fields.wrong("tie_word_embeddings", "of a masked language model it must be true")
    return head


def _architecture(head: Any) -> str:
    match head:
        case config.Head():
            return "ForMaskedLM"
        case config.Classifier(pooling=None, transform=None):
            return "ForTokenClassification"
        case config.Classifier(pooling=None):
            return "ForPreTraining"
        case config.Classifier():
            return "ForSequenceClassification"
        case _:
            return "Model"


def _read(fields: Fields, cls: str, texts: config.Activation = config.Activation.TANH) -> config.Encoder:
    """The config of any of them.

    Args:
      cls: what its classes in transformers are called before "Model".
      texts: the activation of the head that classifies texts.
    """
    width, heads, head_width = split_width(fields, "hidden_size", "num_attention_heads")
    fields.expect("is_decoder", False)
    fields.expect("position_embedding_type", "absolute")
    activation, layer_norm = fields.activation("hidden_act"), config.LayerNorm(fields.number("layer_norm_eps"))
    rows, offset = fields.integer("max_position_embeddings"), 0
    if "Roberta" in cls:  # counts positions from behind the id of padding on
        offset = int(fields.number("pad_token_id")) + 1
    elif cls == "MPNet":
        fields.expect("relative_attention_num_buckets", MPNET.buckets)
        offset = 2
    own = fields.get("embedding_size") and fields.integer("embedding_size")
    embedding = config.Embedding(fields.integer("vocab_size"), position=config.Learned(rows, offset), norm=layer_norm,
                                 types=None if cls in ("MPNet", "DistilBert") else fields.integer("type_vocab_size"),
                                 width=None if own in (None, width) else own)
    attention = config.Attention(heads, heads, head_width, MPNET if cls == "MPNet" else None, causal=False, bias=True,
                                 out_bias=True)
    block = config.Block(attention, config.Dense(fields.integer("intermediate_size"), activation, False, True),
                         config.PostNorm(layer_norm))
    words = activation if cls in ("Bert", "DistilBert") else config.Activation.GELU
    return config.Encoder(width, embedding, config.stack_of([block] * fields.integer("num_hidden_layers")), None,
                          _head(fields, cls, layer_norm, words, texts, activation), rows - offset)


def _write(cfg: config.Encoder, cls: str) -> dict[str, Any]:
    block, position = cfg.stack.blocks()[0], cfg.embedding.position
    if not isinstance(position, config.Learned):
        raise ValueError("it has learned positions")
    values = {"architectures": [f"{cls}{_architecture(cfg.head)}"], "vocab_size": cfg.embedding.vocabulary,
              "hidden_size": cfg.width, "num_hidden_layers": cfg.stack.layers, "num_attention_heads": block.attention.heads,
              "intermediate_size": block.feedforward.width, "hidden_act": write_activation(block.feedforward.activation),
              "layer_norm_eps": block.residual.norm.eps, "max_position_embeddings": position.length,
              "tie_word_embeddings": not isinstance(cfg.head, config.Head) or cfg.head.tied}
    if cls not in ("MPNet", "DistilBert"):
        values["type_vocab_size"] = cfg.embedding.types
    if cls == "Electra":
        values["embedding_size"] = cfg.embedding.width or cfg.width
    if "Roberta" in cls or cls == "MPNet":
        values["pad_token_id"] = position.offset - 1
    if isinstance(cfg.head, config.Classifier):
        values |= write_labels(cfg.head.labels)
    return values


def _write_distilbert(cfg: config.Encoder) -> dict[str, Any]:
    return {_DISTILBERT.get(key, key): value for key, value in _write(cfg, "DistilBert").items() if key != "layer_norm_eps"}


_DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
               "intermediate_size": "hidden_dim", "hidden_act": "activation"}
_IGNORED = frozenset("""
    attention_probs_dropout_prob directionality dropout hidden_dropout_prob output_past pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type qa_dropout seq_classif_dropout
    sinusoidal_pos_embds summary_activation summary_last_dropout summary_type summary_use_proj tie_weights_
""".split())
# Positions as a buffer; the pooler, and the head for the next sentence, which only some heads have a use for.
_LEFTOVER = (r"(\w+\.)?embeddings\.(position_ids|token_type_ids)", r"(\w+\.)?pooler\.dense\.(weight|bias)",
             r"cls\.seq_relationship\.(weight|bias)")
_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "tie_word_embeddings": True}
_TYPED = _DEFAULTS | {"type_vocab_size": 2}


def _family(name: str, title: str, cls: str, table: tuple[Row, ...], defaults: dict[str, Any], *,
            texts: config.Activation = config.Activation.TANH, base: str | None = None, **given: Any) -> Family:
    return Family(name, title, f"{cls}Model", of_encoder(*table) + VECTOR, partial(_read, cls=cls, texts=texts),
                  **({"write": partial(_write, cls=cls)} | given), kinds=(config.Encoder,),
                  bases=(f"{base or name}.", ""), defaults=defaults, ignored=_IGNORED, leftover=_LEFTOVER)


FAMILIES = (
    _family("bert", "BERT, MiniLM, BGE, E5 and other encoders of BERT's layout", "Bert", (
        *_embedding("cls.predictions.decoder"), *BERT_LAYER, *TOKENS,
        *_masked("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder",
                 "cls.predictions.bias"),
        *_product("head/transform/product", "{base}pooler.dense", _texts), *_product("head/out", "classifier", _texts),
    ), _TYPED),
    _family("roberta", "RoBERTa, CodeBERT, GraphCodeBERT, UniXcoder", "Roberta", ROBERTA, _TYPED | {"pad_token_id": 1}),
    _family("xlm-roberta", "XLM-RoBERTa, multilingual E5, BGE-M3", "XLMRoberta", ROBERTA, _TYPED | {"pad_token_id": 1},
            base="roberta"),
    _family("electra", "ELECTRA, generators and discriminators", "Electra", (
        *_embedding("generator_lm_head"), *BERT_LAYER, *TEXTS,
        Row(("decoder/embedding/projection",), "{base}embeddings_project.weight"),
        Row(("decoder/embedding/projection_bias",), "{base}embeddings_project.bias"),
        *_masked("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
        *_product("head/out", "classifier", lambda side: _tokens(side) and side.head.transform is None),
        *_product("head/transform/product", "discriminator_predictions.dense", _tokens),
        *_product("head/out", "discriminator_predictions.dense_prediction",
                  lambda side: _tokens(side) and side.head.transform is not None),
    ), _TYPED | {"embedding_size": 128}, texts=config.Activation.GELU),
    _family("mpnet", "MPNet, all-mpnet-base-v2", "MPNet", (
        *_embedding("lm_head.decoder", types=False), *TOKENS, *TEXTS,
        *_layer("attention.attn.", ("q", "k", "v", "o"), "attention.LayerNorm", "intermediate.dense", "output.dense",
                "output.LayerNorm"),
        Row(("decoder/relative_bias",), "{base}encoder.relative_attention_bias.weight", plain=True),
        *_masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    ), _DEFAULTS),
    _family("distilbert", "DistilBERT", "DistilBert", (
        *_embedding("vocab_projector", types=False), *TOKENS,
        *_layer("attention.", ("q_lin", "k_lin", "v_lin", "out_lin"), "sa_layer_norm", "ffn.lin1", "ffn.lin2",
                "output_layer_norm", "{base}transformer.layer.{i}"),
        *_masked("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        *_product("head/transform/product", "pre_classifier", _texts), *_product("head/out", "classifier", _texts),
    ), _DEFAULTS, texts=config.Activation.RELU, write=_write_distilbert,
        aliases={theirs: ours for ours, theirs in _DISTILBERT.items()}),
)

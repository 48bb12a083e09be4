"""Reading and writing a config.json: `Fields`, and what several families have in common.

A key that jaxlm does not know is an error, for it may change the model; those known to change nothing at inference are
listed here. Keys are those of transformers, old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxlm import config
from jaxlm.io.names import Row
from jaxlm.io.source import Source

# Dropout, initialisation, precision, bookkeeping, generation defaults, heads for other tasks: none changes the logits.
IGNORED = frozenset("""
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    _experts_implementation_internal architectures attention_dropout attention_softmax_in_fp32 attn_implementation attn_pdrop
    auto_map bad_words_ids begin_suppress_tokens bias_dropout_fusion bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping emb_pdrop embd_pdrop embedding_dropout encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout id2label initializer_range is_decoder is_llama_config label2id length_penalty masked_softmax_fusion
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop residual_dropout return_dict return_dict_in_generate
    scale_attention_softmax_in_fp32 sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class tokenizer_name top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
""".split())

# Keys that would change the model, at the values at which they do not.
OFF: Mapping[str, Any] = {"add_cross_attention": False, "is_encoder_decoder": False, "rope_interleaved": False,
                          "use_mrope": False}

KINDS = ("full_attention", "sliding_attention")

ACTIVATIONS = {
    "silu": config.Activation.SILU, "swish": config.Activation.SILU,
    "gelu": config.Activation.GELU, "gelu_python": config.Activation.GELU,
    "gelu_pytorch_tanh": config.Activation.GELU_TANH, "gelu_new": config.Activation.GELU_TANH,
    "gelu_fast": config.Activation.GELU_TANH,
    "relu": config.Activation.RELU, "relu2": config.Activation.SQUARED_RELU, "tanh": config.Activation.TANH,
    "quick_gelu": config.Activation.QUICK_GELU,
}


class Fields:
    """A config.json's values while they are read; every key must be asked for, or be known to change nothing.

    Args:
      family: for messages.
      defaults: values of missing keys, transformers' own.
      aliases: other spellings of keys.
    """

    def __init__(self, values: Mapping[str, Any], family: str, defaults: Mapping[str, Any], aliases: Mapping[str, str]):
        self.family = family
        self._values = dict(defaults)
        for key, value in values.items():
            name = aliases.get(key, key)
            if name in values and name != key and values[name] != value:
                raise ValueError(f"config.json: {key} = {value!r} contradicts {name} = {values[name]!r}")
            self._values[name] = value
        self._seen: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, None where there is none."""
        self._seen.add(key)
        return self._values.get(key)

    def wrong(self, key: str, wanted: str) -> ValueError:
        """The error for a value that will not do."""
        text = repr(self._values.get(key))
        return ValueError(f"config.json: {key} = {text if len(text) < 200 else text[:200] + ' ...'} is not supported for "
                          f"{self.family}: {wanted}")

    def integer(self, key: str) -> int:
        """A positive whole number that must be there."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"config.json lacks {key}, which {self.family} needs")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive whole number is needed")
        return value

    def count(self, key: str) -> int | None:
        """A whole number, 0 or more, or None where there is none."""
        return None if self.get(key) is None else 0 if self.get(key) == 0 else self.integer(key)

    def number(self, key: str) -> float:
        """A number that must be there."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, "a number is needed")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A number, or None where there is none."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """A boolean; None counts as False."""
        value = self.get(key)
        if value not in (None, True, False):
            raise self.wrong(key, "true or false is needed")
        return bool(value)

    def expect(self, key: str, *allowed: Any) -> None:
        """A key that may be missing, or have only these values."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self.wrong(key, f"it must be {' or '.join(repr(one) for one in allowed) or 'null'}")

    def activation(self, key: str) -> config.Activation:
        """A non-linearity by its name."""
        name = self.get(key)
        if name not in ACTIVATIONS:
            raise self.wrong(key, f"there is {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def inner(self, key: str, values: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None) -> "Fields":
        """A nested object, read in the same way; `finish` it as well."""
        if values is not None and not isinstance(values, Mapping):
            raise self.wrong(key, "an object is needed")
        return Fields(values or {}, f"{self.family} ({key})", defaults or {}, {})

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """Called when all is read; `ignored` are more keys that change nothing.

        Raises:
          ValueError: for the first key that nobody asked for; names it and its value.
        """
        for key in OFF.keys() - self._seen:
            self.expect(key, OFF[key])
        for key, value in self._values.items():
            if key not in self._seen | IGNORED | ignored and value is not None:
                raise self.wrong(key, "jaxlm does not know this key; remove it if it does not change the model's output")


@dataclass(frozen=True)
class Family:
    """An architecture: its name table and how its config reads.

    Attributes:
      name: `model_type` in config.json.
      title: the models it serves, for people.
      architecture: the class of transformers that a saved model names, where `write` gives no "architectures".
      table: its tensors.
      read: config from the fields of a config.json.
      write: the fields from a config; need not check that they can express it, `jaxlm.io.families.write` does.
      kinds: of configs that it may express.
      attention: of its blocks.
      bases: what "{base}" in the table may stand for; the first is written.
      others: tables that checkpoints also go by; whichever fits best is read, and none of these is written.
      mixtures: whether its feed-forward layers may be mixtures of experts.
      defaults: transformers' values of keys that a config.json may leave out.
      aliases: other spellings of keys.
      ignored: more keys that change nothing.
      leftover: patterns (`re.fullmatch`) of tensors that may be there and are not needed: buffers and the like.
      beyond: whether there may be layers behind the last, which are not needed.
      exact: patterns (`fnmatch`) of our weights that stay in float32 whatever dtype the model is given.
      settle: the config where the tensors say what config.json does not.
      special: ids of tokens that transformers' class cannot do without, for models whose tokenizer has none such.
    """

    name: str
    title: str
    architecture: str
    table: tuple[Row, ...]
    read: Callable[[Fields], config.Config]
    write: Callable[[config.Config], dict[str, Any]]
    kinds: tuple[type, ...] = (config.Decoder,)
    attention: type = config.Attention
    bases: tuple[str, ...] = ("model.", "")
    others: tuple[tuple[Row, ...], ...] = ()
    mixtures: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    leftover: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    beyond: bool = False
    exact: tuple[str, ...] = ()
    settle: Callable[[config.Config, Source], config.Config] = lambda cfg, source: cfg
    special: Mapping[str, int] = field(default_factory=dict)


def rope(fields: Fields, width: int, *, base: float = 10000.0, partial: float | None = None, theta: str = "rope_theta",
         kind: str | None = None, scaling: Mapping[str, Any] | None = None) -> tuple[config.Rope, int]:
    """The rotary position of heads of this width, and the longest context it serves.

    Args:
      base: where the config does not say.
      partial: the share of a head's width that turns, where the config does not say; None for families that turn all of it.
      theta: the key of the base, where the scaling's object does not have it.
      kind: "full_attention" or "sliding_attention" where these differ: `rope_parameters` then has an object for each, and
        `rope_scaling` is about the first.
      scaling: where the config does not say.

    Raises:
      ValueError: for an unknown scaling, or a parameter that it does not have; names it.
    """
    longest = fields.integer("max_position_embeddings")
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    if old and new and old != new:
        raise fields.wrong("rope_scaling", "rope_parameters says something else")
    key, values = ("rope_scaling", old) if old else ("rope_parameters", new or scaling)
    if kind is not None and not old:
        fields.inner(key, new).finish(frozenset(KINDS))
        values = (new or {}).get(kind)
    elif kind == "sliding_attention":
        values = None
    given = fields.inner(key, values)
    base = next(one for one in (given.optional("rope_theta"), fields.optional(theta), base) if one is not None)
    rotated = width
    if partial is None:
        for one in (given, fields):
            one.expect("partial_rotary_factor", 1)
    else:
        shares = given.optional("partial_rotary_factor"), fields.optional("partial_rotary_factor"), partial
        rotated = int(width * next(share for share in shares if share is not None))
    scaled, longest = _scaling(fields, given, rotated, longest)
    given.finish(frozenset({"finetuned"}))
    return config.Rope(base, None if rotated == width else rotated, scaling=scaled), longest


def _scaling(fields: Fields, given: Fields, width: int, longest: int) -> tuple[config.RopeScaling | None, int]:
    """The scaling, and the longest context with it."""
    types = given.get("rope_type"), given.get("type")
    name = types[0] or types[1] or "default"
    outer, inner = fields.get("original_max_position_embeddings"), given.get("original_max_position_embeddings")
    if outer is not None and inner is not None and outer != inner:
        raise fields.wrong("original_max_position_embeddings", f"the scaling's own says {inner}")
    length = next((x for x in (outer, inner) if x is not None), longest)
    factor = given.optional("factor")
    if factor is None:
        factor = longest / length
    match name:
        case "default":
            return None, longest
        case "linear":
            return config.LinearScaling(given.number("factor")), longest
        case "dynamic":
            if length != longest:
                raise fields.wrong("original_max_position_embeddings",
                                   f"dynamic scaling starts at max_position_embeddings, {longest}")
            return config.DynamicNtkScaling(given.number("factor"), longest), int(longest * given.number("factor"))
        case "llama3":
            return config.Llama3Scaling(given.number("factor"), given.number("low_freq_factor"),
                                        given.number("high_freq_factor"), length), longest
        case "yarn":
            ramp = [given.number(end) if given.get(end) else usual for end, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))]
            truncate = given.get("truncate") is None or given.flag("truncate")
            return (config.YarnScaling(factor, length, _yarn_magnitude(given, factor), *ramp, truncate),
                    max(longest, int(length * factor)))
        case "longrope" | "su":
            magnitude = given.optional("attention_factor")
            if magnitude is None:
                magnitude = long_magnitude(factor, length)
            divisors = []
            for end in ("short_factor", "long_factor"):
                listed = given.get(end)
                if not isinstance(listed, Sequence) or len(listed) != width // 2:
                    raise given.wrong(end, f"a list of {width // 2} numbers is needed")
                divisors.append(tuple(float(x) for x in listed))
            return config.LongRopeScaling(*divisors, length, magnitude), longest
        case _:
            raise given.wrong("rope_type" if types[0] else "type",
                              "there is default, linear, dynamic, yarn, llama3, longrope")


def long_magnitude(factor: float, length: int) -> float:
    """LongRoPE's factor on cosine and sine where the config has none."""
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0


def _yarn_magnitude(given: Fields, factor: float) -> float:
    """The factor on cosine and sine, as transformers works it out."""
    named, scale, scale_all = (given.optional(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if named is not None:
        return named

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)


def write_scaling(scaling: config.RopeScaling | None) -> dict[str, Any] | None:
    """What `rope_scaling` says."""
    match scaling:
        case None:
            return None
        case config.LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case config.DynamicNtkScaling(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case config.Llama3Scaling(factor, low, high, length):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": length}
        case config.YarnScaling() as yarn:
            return {"rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.length,
                    "attention_factor": yarn.magnitude, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
                    "truncate": yarn.truncate}
        case config.LongRopeScaling() as long:
            return {"rope_type": "longrope", "short_factor": list(long.short), "long_factor": list(long.long),
                    "factor": 1.0, "attention_factor": long.magnitude, "original_max_position_embeddings": long.length}


def write_rope(cfg: config.Decoder) -> dict[str, Any]:
    """The keys of the first rotary position in the stack, and of the longest context.

    Raises:
      ValueError: when there is none.
    """
    position = next((block.attention.position for block in cfg.stack.blocks()
                     if isinstance(block.attention.position, config.Rope)), None)
    if position is None:
        raise ValueError("no layer has a rotary position")
    scaling = position.scaling
    longest = scaling.length if isinstance(scaling, config.DynamicNtkScaling) else cfg.length
    values = {"max_position_embeddings": longest, "rope_theta": position.base, "rope_scaling": write_scaling(scaling)}
    if isinstance(scaling, config.LongRopeScaling):  # before version 5 transformers looks for its length here alone
        values["original_max_position_embeddings"] = scaling.length
    return values


def windows(fields: Fields, layers: int, window: int | None, usual: Callable[[int], bool]) -> list[int | None]:
    """Each layer's window, from `layer_types` or else from `usual`, which says whether layer i has one."""
    types = fields.get("layer_types")
    if types is None:
        return [window if usual(i) else None for i in range(layers)]
    known = dict(zip(KINDS, (None, window), strict=True))
    if len(types) != layers or not set(types) <= known.keys():
        raise fields.wrong("layer_types", f"a list of {layers} of {' and '.join(known)} is needed")
    if "sliding_attention" in types and window is None:
        raise fields.wrong("layer_types", "there is no sliding_window")
    return [known[one] for one in types]


def write_windows(cfg: config.Decoder) -> tuple[int | None, list[str]]:
    """The window and `layer_types`."""
    sizes = [block.attention.window for block in cfg.stack.blocks()]
    return (next((size for size in sizes if size is not None), None),
            ["full_attention" if size is None else "sliding_attention" for size in sizes])


def write_activation(activation: config.Activation) -> str:
    """The name that transformers and its older versions know."""
    names = {config.Activation.SILU: "silu", config.Activation.GELU: "gelu", config.Activation.RELU: "relu",
             config.Activation.GELU_TANH: "gelu_pytorch_tanh", config.Activation.SQUARED_RELU: "relu2",
             config.Activation.TANH: "tanh", config.Activation.QUICK_GELU: "quick_gelu"}
    return names[activation]


def labels(fields: Fields) -> int:
    """How many a classifier tells apart: transformers' default is 2."""
    named = fields.get("id2label")
    return len(named) if named else 2 if fields.get("num_labels") is None else fields.integer("num_labels")


def write_labels(count: int) -> dict[str, Any]:
    """The keys of so many labels, under the names that transformers gives those without."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}


def decoder(fields: Fields, width: int, blocks: Sequence[config.Block], norm: config.Norm, length: int, *,
            embedding: Mapping[str, Any] | None = None, head: Mapping[str, Any] | None = None) -> config.Decoder:
    """The config around the blocks."""
    return config.Decoder(width, config.Embedding(fields.integer("vocab_size"), **(embedding or {})), config.stack_of(blocks),
                          norm, config.Head(tied=fields.flag("tie_word_embeddings"), **(head or {})), length)

"""GGUF files read as what they were made from: tensors under Hugging Face names with the checkpoint's shapes and
values, and a config.json rebuilt from the metadata.

llama.cpp's converter renames tensors and, for some architectures, rearranges them (`ARCHITECTURES` says how);
here that is undone. What a GGUF file does not record is taken as llama.cpp takes it: the windows of Mistral and
StarCoder2 count as none, Gemma's score scale follows from the model's size.

The `gguf` package knows names and quantisations. The header is read here: the package's reader makes an array
per token and needs 5 to 8 seconds and 500 MB for 150,000 to 260,000 of them, this one a few tenths of a second.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.config import Pooling, Vector

VERSIONS = (2, 3)

# Value types of the metadata, by their number in the file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# `<architecture>.pooling_type`, of which 0 is none. llama.cpp makes vectors of length 1.
POOLING = {1: Pooling.MEAN, 2: Pooling.FIRST, 3: Pooling.LAST}

PARALLEL = 1 << 20  # numbers; a tensor with fewer is dequantised in one go

# Metadata that changes what a model computes, and the values that change nothing. An architecture that does
# not read one of these must not have it set otherwise.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}

# Tensors that become part of the config.
FACTORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


def _package() -> types.ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'jaxlm[gguf]'") from error
    return gguf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. `kind` is a GGMLQuantizationType; `shape` has the slowest dimension first."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Cursor:
    """Takes values off the header one after the other."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def take(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        self.at += layout.size
        return layout.unpack_from(self.data, self.at - layout.size)

    def text(self) -> str:
        size, = self.take("Q")
        self.at += size
        if self.at > len(self.data):
            raise struct.error
        return str(self.data[self.at - size:self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.take("IQ")
            if item == STRING:
                return [self.text() for _ in range(count)]
            if item in SCALARS and count * struct.calcsize(SCALARS[item]) <= len(self.data):
                return list(self.take(SCALARS[item], count))
            raise struct.error if item in SCALARS else ValueError(f"an array of unknown type {item}")
        if kind not in SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        number, = self.take(SCALARS[kind])
        return _shortest(number) if SCALARS[kind] == "f" else number


def _shortest(number: float | np.float32) -> float:
    """The shortest decimal that rounds to this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(number)))


def _open(path: str | os.PathLike[str]) -> mmap.mmap:
    """The file in memory, once its magic and version are known to be right."""
    with open(path, "rb") as file:
        start = file.read(8)
        if start[:4] != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it starts with {start[:4]!r} instead of b'GGUF'")
        if len(start) < 8:
            raise ValueError(f"{path} is truncated: it ends after {len(start)} bytes")
        version, = struct.unpack("<I", start[4:])
        if version not in VERSIONS:
            swapped = ", or a big-endian file" if version & 0xFFFF == 0 else ""
            raise ValueError(f"{path} is GGUF version {version}{swapped}; supported are versions "
                             f"{' and '.join(map(str, VERSIONS))}, little-endian")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _header(path: str | os.PathLike[str], data: mmap.mmap) -> tuple[dict[str, Any], list[tuple], int]:
    """Metadata, (name, shape, type number, offset) of each tensor, and where the offsets count from."""
    cursor = _Cursor(data, 8)
    try:
        tensors, pairs = cursor.take("Q", 2)
        fields = {}
        for _ in range(pairs):
            key = cursor.text()
            fields[key] = cursor.value(*cursor.take("I"))
        infos = []
        for _ in range(tensors):
            name = cursor.text()
            dims = cursor.take("Q", *cursor.take("I"))
            infos.append((name, tuple(reversed(dims)), *cursor.take("I"), *cursor.take("Q")))
    except struct.error:
        raise ValueError(f"{path} is truncated: its {len(data)} bytes end within the header") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: at byte {cursor.at} of the header: {error}") from error
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path} is damaged: general.alignment is {alignment!r}")
    return fields, infos, -(-cursor.at // alignment) * alignment


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All key-value pairs of a GGUF file as plain Python values, whatever it holds beside them.

    Raises:
      ValueError: as `GgufSource` for what is no GGUF file.
    """
    with _open(path) as data:
        return _header(path, data)[0]


class Metadata:
    """What configs are built from: fields and tensors; `read` has the names of those that were asked for."""

    def __init__(self, path: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor],
                 array: Callable[[Tensor], np.ndarray]):
        self.path, self.fields, self.tensors, self._array = path, fields, tensors, array
        self.architecture = fields["general.architecture"]
        self.read: set[str] = set()

    def array(self, name: str) -> np.ndarray:
        """A tensor that becomes part of the config."""
        self.read.add(name)
        return self._array(self.tensors[name])

    def get(self, key: str, default: Any = None) -> Any:
        """The field `<architecture>.<key>`."""
        self.read.add(key)
        return self.fields.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """Raises:
          ValueError: when there is no such field.
        """
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} lacks the metadata {self.architecture}.{key}")
        return value

    def same(self, key: str, default: Any = None) -> Any:
        """A field that may be a list over layers, all alike."""
        value = self.get(key, default) if default is not None else self.need(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.unsupported(f"{self.architecture}.{key} differs between layers: {value}")
            return value[0]
        return value

    def unsupported(self, what: str) -> ValueError:
        """An error to raise."""
        return ValueError(f"{self.path}: {what}: not supported for {self.architecture}")

    @property
    def head_width(self) -> int:
        """A head's width."""
        width = self.get("attention.key_length")
        if width is None:
            width = self.need("embedding_length") // self.same("attention.head_count")
        if self.get("attention.value_length", width) != width:
            raise self.unsupported("values and keys have different widths")
        return width

    def rows(self, name: str) -> int:
        """The first dimension of a tensor.

        Raises:
          ValueError: when there is no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}: it holds {len(self.tensors)} tensors")
        return self.tensors[name].shape[0]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.rows("token_embd.weight")

    @property
    def tied(self) -> bool:
        """Whether there is no output matrix."""
        return "output.weight" not in self.tensors


Undo = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]


def _half_rotation(heads: str, weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows of each head from neighbouring pairs (GGUF's llama) to first and second halves."""
    pairs = weight.reshape(config[heads], -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _by_head(heads: str, weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows from all q, all k, all v to q, k, v of each head in turn."""
    parts = weight.reshape(3, config[heads], -1, *weight.shape[1:])
    return parts.swapaxes(0, 1).reshape(weight.shape)


def _by_group(weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows from all q, all k, all v to each key-value head's queries, key and value in turn (Falcon)."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    parts = weight.reshape(heads + 2 * groups, -1, *weight.shape[1:])
    q, k, v = np.split(parts, (heads, heads + groups))
    grouped = [part.reshape(groups, -1, *parts.shape[1:]) for part in (q, k, v)]
    return np.concatenate(grouped, axis=1).reshape(weight.shape)


def _transpose(weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """[out, in] to GPT-2's [in, out]."""
    return weight.T


def _row(weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """[in] to [1, in]."""
    return weight.reshape(1, -1)


def _less_one(weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Gemma's checkpoints hold scale - 1."""
    return weight.astype(np.float32) - np.float32(1)


def _shape(m: Metadata) -> dict[str, Any]:
    """The sizes that most configs name alike."""
    heads = m.same("attention.head_count")
    return {
        "hidden_size": m.need("embedding_length"),
        "intermediate_size": m.same("feed_forward_length"),
        "num_hidden_layers": m.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.same("attention.head_count_kv", heads),
        "max_position_embeddings": m.need("context_length"),
        "vocab_size": m.vocabulary,
        "tie_word_embeddings": m.tied,
    }


def _rope(m: Metadata, part: bool = False) -> dict[str, Any]:
    """Base and scaling. Divisors of the frequencies are recognised as Llama 3's scaling, or else given as a
    LongRoPE that is the same at every length.

    Args:
      part: whether the architecture can rotate a part of each head.
    """
    width = m.get("rope.dimension_count", m.head_width)
    if width != m.head_width and not part:
        raise m.unsupported(f"only {width} of a head's {m.head_width} dimensions turn")
    base, kind = m.get("rope.freq_base", 10000.0), m.get("rope.scaling.type", "linear")
    factor = m.get("rope.scaling.factor", m.get("rope.scale_linear", 1.0))
    scaling = None
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor,
                   "original_max_position_embeddings": m.need("rope.scaling.original_context_length")}
        for ours, theirs in (("yarn_attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast"),
                             ("yarn_beta_slow", "beta_slow")):
            value = m.get(f"rope.scaling.{ours}")
            scaling |= {} if value is None else {theirs: value}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor} if factor not in (0, 1) else None
    elif kind != "none":
        raise m.unsupported(f"rope scaling of type {kind!r}")
    if FACTORS in m.tensors:
        if scaling is not None:
            raise m.unsupported(f"{FACTORS} beside rope scaling of type {kind!r}")
        scaling = _divisors(m, m.array(FACTORS), base)
    return {"rope_theta": base, "rope_scaling": scaling}


def _divisors(m: Metadata, factors: np.ndarray, base: float) -> dict[str, Any] | None:
    """The scaling whose frequencies are the plain ones over `factors`."""
    factor, width = float(factors.max()), 2 * factors.size
    if factor == 1 and factors.min() == 1:
        return None
    # Llama 3.1 to 3.3 keep what turns more than 4 times in 8192 tokens and divide what turns less than once.
    original, low, high = m.get("rope.scaling.original_context_length", 8192), 1.0, 4.0
    turns = original / (2 * math.pi) * base ** -(np.arange(0, width, 2) / width)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original}
    listed = [_shortest(number) for number in factors]
    return {"rope_type": "longrope", "short_factor": listed, "long_factor": listed, "attention_factor": 1.0,
            "factor": 1.0, "original_max_position_embeddings": m.need("context_length")}


def _gated(m: Metadata, kind: str, model: str) -> dict[str, Any]:
    """What the descendants of Llama share."""
    return {"model_type": kind, "architectures": [f"{model}ForCausalLM"], **_shape(m), **_rope(m),
            "hidden_act": "silu", "rms_norm_eps": m.need("attention.layer_norm_rms_epsilon")}


def _biases(m: Metadata) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in m.tensors, "mlp_bias": "blk.0.ffn_up.bias" in m.tensors}


def _experts(m: Metadata, count: str = "num_experts") -> dict[str, Any]:
    return {count: m.need("expert_count"), "num_experts_per_tok": m.need("expert_used_count")}


def _expert_width(m: Metadata) -> int:
    m.rows("blk.0.ffn_down_exps.weight")  # that there is one
    return m.tensors["blk.0.ffn_down_exps.weight"].shape[-1]


def _llama(m: Metadata) -> dict[str, Any]:
    window = m.get("attention.sliding_window", 0)
    if m.get("expert_count", 0):
        return _gated(m, "mixtral", "Mixtral") | _experts(m, "num_local_experts") | {
            "head_dim": m.head_width, "intermediate_size": _expert_width(m), "sliding_window": window or None}
    if window:
        return _gated(m, "mistral", "Mistral") | {"head_dim": m.head_width, "sliding_window": window}
    return _gated(m, "llama", "Llama") | _biases(m) | {"head_dim": m.head_width}


def _smollm3(m: Metadata) -> dict[str, Any]:
    layers = range(1, m.need("block_count") + 1)
    return _gated(m, "smollm3", "SmolLM3") | _biases(m) | {
        "no_rope_layer_interval": 4, "no_rope_layers": [int(layer % 4 != 0) for layer in layers],
        "use_sliding_window": False}


def _qwen2(m: Metadata) -> dict[str, Any]:
    return _gated(m, "qwen2", "Qwen2") | {"use_sliding_window": False}


def _qwen3(m: Metadata) -> dict[str, Any]:
    return _gated(m, "qwen3", "Qwen3") | {
        "head_dim": m.head_width, "attention_bias": _biases(m)["attention_bias"], "use_sliding_window": False}


def _qwen2_moe(m: Metadata) -> dict[str, Any]:
    return _gated(m, "qwen2_moe", "Qwen2Moe") | _experts(m) | {
        "moe_intermediate_size": _expert_width(m), "norm_topk_prob": m.get("expert_weights_norm", False),
        "shared_expert_intermediate_size": m.rows("blk.0.ffn_gate_shexp.weight"), "qkv_bias": _biases(m)["attention_bias"],
        "use_sliding_window": False}


def _qwen3_moe(m: Metadata) -> dict[str, Any]:
    return _gated(m, "qwen3_moe", "Qwen3Moe") | _experts(m) | {
        "head_dim": m.head_width, "moe_intermediate_size": _expert_width(m), "use_sliding_window": False,
        "norm_topk_prob": m.get("expert_weights_norm", True), "attention_bias": _biases(m)["attention_bias"]}


def _olmoe(m: Metadata) -> dict[str, Any]:
    return _gated(m, "olmoe", "Olmoe") | _experts(m) | {
        "intermediate_size": _expert_width(m), "norm_topk_prob": m.get("expert_weights_norm", False),
        "attention_bias": _biases(m)["attention_bias"]}


def _granitemoe(m: Metadata) -> dict[str, Any]:
    if not m.get("rope.scaling.finetuned", True):
        raise m.unsupported("no rotary position")
    width, shared = m.head_width, "blk.0.ffn_gate_shexp.weight"
    beside = {"shared_intermediate_size": m.rows(shared)} if shared in m.tensors else {}
    kind = ("granitemoeshared", "GraniteMoeShared") if beside else ("granitemoe", "GraniteMoe")
    return _gated(m, *kind) | _experts(m, "num_local_experts") | beside | {
        "head_dim": width, "intermediate_size": _expert_width(m), "attention_bias": _biases(m)["attention_bias"],
        "attention_multiplier": m.get("attention.scale") or width**-0.5, "logits_scaling": m.need("logit_scale") or 1.0,
        "embedding_multiplier": m.get("embedding_scale") or 1.0, "residual_multiplier": m.get("residual_scale") or 1.0}


def _gpt_oss(m: Metadata) -> dict[str, Any]:
    if m.get("expert_gating_func", 3) not in (1, 3):  # a softmax over all or over the chosen, the same once they are divided
        raise m.unsupported(f"experts chosen by function {m.get('expert_gating_func')}")
    cfg = _gated(m, "gpt_oss", "GptOss")
    scaling = cfg["rope_scaling"] or {"rope_type": "default"}
    window = m.need("attention.sliding_window")
    return cfg | _experts(m, "num_local_experts") | {
        "head_dim": m.head_width, "intermediate_size": _expert_width(m), "attention_bias": _biases(m)["attention_bias"],
        "swiglu_limit": 7.0, "sliding_window": window, "layer_types": _layer_types(m, 2),
        "rope_scaling": scaling | {"truncate": False} if scaling["rope_type"] == "yarn" else scaling}


def _gemma(m: Metadata, kind: str = "gemma", model: str = "Gemma") -> dict[str, Any]:
    return _gated(m, kind, model) | {"head_dim": m.head_width, "hidden_act": "gelu_pytorch_tanh",
                                     "hidden_activation": "gelu_pytorch_tanh"}


def _layer_types(m: Metadata, period: int) -> list[str]:
    """Which layers have a window: what the metadata lists, or all but the last of each period."""
    pattern = m.get("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        pattern = [layer % pattern != pattern - 1 for layer in range(m.need("block_count"))]
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _score_scale(m: Metadata, biggest: int) -> int:
    """The 27B models, known by their layers, scale by width over heads, the others by the width of a head."""
    if m.need("block_count") == biggest:
        return m.need("embedding_length") // m.same("attention.head_count")
    return m.head_width


def _gemma2(m: Metadata) -> dict[str, Any]:
    return _gemma(m, "gemma2", "Gemma2") | {
        "query_pre_attn_scalar": _score_scale(m, 46), "layer_types": _layer_types(m, 2),
        "attn_logit_softcapping": m.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.get("final_logit_softcapping", 30.0),
        "sliding_window": m.get("attention.sliding_window", 4096)}


def _gemma3(m: Metadata) -> dict[str, Any]:
    window = m.get("attention.sliding_window") or None
    return _gemma(m, "gemma3_text", "Gemma3") | {
        "query_pre_attn_scalar": _score_scale(m, 62), "layer_types": _layer_types(m, 6 if window else 1),
        "attn_logit_softcapping": None, "final_logit_softcapping": m.get("final_logit_softcapping") or None,
        "sliding_window": window, "rope_theta": m.get("rope.freq_base", 1e6),
        "rope_local_base_freq": m.get("rope.freq_base_swa", 10000.0)}


def _phi3(m: Metadata) -> dict[str, Any]:
    cfg = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_shape(m), **_rope(m, part=True),
           "hidden_act": "silu", "rms_norm_eps": m.need("attention.layer_norm_rms_epsilon"),
           "partial_rotary_factor": m.get("rope.dimension_count", m.head_width) / m.head_width,
           "sliding_window": m.get("attention.sliding_window") or None}
    longest = cfg["max_position_embeddings"]
    original = m.get("rope.scaling.original_context_length", longest)
    cfg["original_max_position_embeddings"] = original
    if LONG not in m.tensors or SHORT not in m.tensors:
        return cfg
    short, long = ([_shortest(number) for number in m.array(name)] for name in (SHORT, LONG))
    cfg["rope_scaling"] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    usual = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
    magnitude = m.get("rope.scaling.attn_factor", usual)
    if not math.isclose(magnitude, usual, rel_tol=1e-5):
        cfg["rope_scaling"]["attention_factor"] = magnitude
    return cfg


def _olmo2(m: Metadata) -> dict[str, Any]:
    return _gated(m, "olmo2", "Olmo2") | {"attention_bias": _biases(m)["attention_bias"]}


def _starcoder2(m: Metadata) -> dict[str, Any]:
    return {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"], **_shape(m), **_rope(m),
            "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": m.need("attention.layer_norm_epsilon"),
            "use_bias": _biases(m)["mlp_bias"], "sliding_window": None}


def _gpt2(m: Metadata) -> dict[str, Any]:
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": m.need("embedding_length"),
            "n_layer": m.need("block_count"), "n_head": m.same("attention.head_count"),
            "n_inner": m.rows("blk.0.ffn_up.weight"), "n_positions": m.rows("position_embd.weight"),
            "vocab_size": m.vocabulary, "tie_word_embeddings": m.tied, "activation_function": "gelu_new",
            "layer_norm_epsilon": m.need("attention.layer_norm_epsilon")}


def _gptneox(m: Metadata) -> dict[str, Any]:
    cfg, rope = _shape(m), _rope(m, part=True)
    del cfg["num_key_value_heads"]
    return cfg | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu",
                  "layer_norm_eps": m.need("attention.layer_norm_epsilon"),
                  "rotary_pct": m.get("rope.dimension_count", m.head_width) / m.head_width,
                  "rotary_emb_base": rope["rope_theta"], "rope_scaling": rope["rope_scaling"],
                  "use_parallel_residual": m.get("use_parallel_residual", True),
                  "attention_bias": "blk.0.attn_qkv.bias" in m.tensors}


def _falcon(m: Metadata) -> dict[str, Any]:
    layout = m.get("tensor_data_layout", "jploski")
    if layout != "jploski":
        raise m.unsupported(f"tensor data layout {layout!r}")
    groups = m.same("attention.head_count_kv", 1)
    two_norms = "blk.0.attn_norm_2.weight" in m.tensors
    return {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"],
        "hidden_size": m.need("embedding_length"), "num_hidden_layers": m.need("block_count"),
        "num_attention_heads": m.same("attention.head_count"),
        "num_kv_heads": groups, "ffn_hidden_size": m.rows("blk.0.ffn_up.weight"), "vocab_size": m.vocabulary,
        "tie_word_embeddings": m.tied, "max_position_embeddings": m.need("context_length"), **_rope(m),
        "activation": "gelu", "layer_norm_epsilon": m.need("attention.layer_norm_epsilon"), "bias": False,
        "alibi": False, "new_decoder_architecture": two_norms or groups > 1, "multi_query": True,
        "parallel_attn": True, "num_ln_in_parallel_attn": 2 if two_norms else 1}


def _mpt(m: Metadata) -> dict[str, Any]:
    width, heads = m.need("embedding_length"), m.same("attention.head_count")
    top = m.get("attention.max_alibi_bias", 0)
    if top == 0 or "position_embd.weight" in m.tensors:
        raise m.unsupported("positions other than ALiBi")
    if top != int(top):
        raise m.unsupported(f"an ALiBi maximum of {top}")
    if m.same("attention.head_count_kv", heads) != heads:
        raise m.unsupported("fewer key-value heads than query heads")
    return {
        "model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": width, "n_heads": heads,
        "n_layers": m.need("block_count"), "expansion_ratio": m.rows("blk.0.ffn_up.weight") // width,
        "max_seq_len": m.need("context_length"), "vocab_size": m.vocabulary, "no_bias": True,
        "learned_pos_emb": False, "layer_norm_epsilon": m.need("attention.layer_norm_epsilon"),
        "tie_word_embeddings": m.tied, "attn_config": {
            "attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": int(top), "prefix_lm": False,
            "clip_qkv": m.get("attention.clamp_kqv") or None, "qk_ln": False, "softmax_scale": None}}


def _bloom(m: Metadata) -> dict[str, Any]:
    return {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": m.vocabulary,
        "hidden_size": m.need("embedding_length"), "n_layer": m.need("block_count"),
        "n_head": m.same("attention.head_count"),
        "layer_norm_epsilon": m.need("attention.layer_norm_epsilon"),
        "seq_length": m.need("context_length"), "tie_word_embeddings": m.tied}


def _encoder(m: Metadata) -> dict[str, Any]:
    """What BERT and Nomic BERT share."""
    if m.get("attention.causal", False):
        raise m.unsupported(f"{m.architecture}.attention.causal is True")
    cfg = _shape(m)
    if cfg.pop("num_key_value_heads") != cfg["num_attention_heads"]:
        raise m.unsupported("fewer key-value heads than query heads")
    return cfg | {"tie_word_embeddings": True, "type_vocab_size": m.rows("token_types.weight"),
                  "layer_norm_eps": m.need("attention.layer_norm_epsilon")}


def _bert(m: Metadata) -> dict[str, Any]:
    return _encoder(m) | {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu",
                          "max_position_embeddings": m.rows("position_embd.weight")}


def _nomic_bert(m: Metadata) -> dict[str, Any]:
    return _encoder(m) | _rope(m) | {"model_type": "nomic_bert", "architectures": ["NomicBertModel"], "hidden_act": "silu"}


def _vector(m: Metadata) -> Vector | None:
    """What an encoder's pooling type says."""
    kind = m.get("pooling_type", 0)
    if kind and kind not in POOLING:
        raise m.unsupported(f"pooling of type {kind}")
    return Vector(POOLING[kind]) if kind else None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures becomes a Hugging Face one.

    Attributes:
      config: makes the config.json.
      modules: the checkpoint's modules that may have a weight or a bias, by their Hugging Face names; {i} is a
        layer, {e} an expert. May depend on the config.
      undo: what to do to the tensors of a module whose name ends so, to have them as the checkpoint has them.
      encoder: whether it reads whole texts, and makes vectors of them if the metadata says how.
    """

    config: Callable[[Metadata], dict[str, Any]]
    modules: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]
    undo: Mapping[str, Undo] = dataclasses.field(default_factory=dict)
    encoder: bool = False


_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_QKV = tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkvo")
_GATED = tuple(f"model.layers.{{i}}.mlp.{part}_proj" for part in ("gate", "up", "down"))
_QK_NORM = ("model.layers.{i}.self_attn.q_norm", "model.layers.{i}.self_attn.k_norm")
_BEFORE = ("model.layers.{i}.input_layernorm", "model.layers.{i}.post_attention_layernorm")
_AFTER = ("model.layers.{i}.post_attention_layernorm", "model.layers.{i}.post_feedforward_layernorm")
_SANDWICH = ("model.layers.{i}.input_layernorm", "model.layers.{i}.pre_feedforward_layernorm", *_AFTER)
_LLAMA = (*_OUTER, *_BEFORE, *_QKV, *_GATED)
_HALVES = {"q_proj": partial(_half_rotation, "num_attention_heads"),
           "k_proj": partial(_half_rotation, "num_key_value_heads")}
_W = tuple(f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.w{part}" for part in (1, 2, 3))
_EXPERTS = tuple(f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down"))
_SHARED = tuple(f"model.layers.{{i}}.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down"))
_SPARSE = (*_OUTER, *_BEFORE, *_QKV, "model.layers.{i}.mlp.gate", *_EXPERTS)
_BLOOM = ("transformer.word_embeddings", "transformer.ln_f", "lm_head", *(
    f"transformer.h.{{i}}.{part}" for part in (
        "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")))


def _falcon_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """GGUF has one name for the norm that feeds both branches and for the one that feeds the second."""
    norms = ("ln_attn", "ln_mlp") if config["num_ln_in_parallel_attn"] == 2 else ("input_layernorm",)
    return (*_BLOOM, *(f"transformer.h.{{i}}.{norm}" for norm in norms))


def _llama_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Mixtral goes by Llama's name."""
    if config["model_type"] != "mixtral":
        return _LLAMA
    return (*_OUTER, *_BEFORE, *_QKV, "model.layers.{i}.block_sparse_moe.gate", *_W)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama, _llama_modules, _HALVES),
    "smollm3": Architecture(_smollm3, _LLAMA, _HALVES),
    "qwen2": Architecture(_qwen2, _LLAMA),
    "qwen3": Architecture(_qwen3, (*_LLAMA, *_QK_NORM)),
    "qwen2moe": Architecture(_qwen2_moe, (*_SPARSE, *_SHARED, "model.layers.{i}.mlp.shared_expert_gate"),
                             {"shared_expert_gate": _row}),
    "qwen3moe": Architecture(_qwen3_moe, (*_SPARSE, *_QK_NORM)),
    "olmoe": Architecture(_olmoe, (*_SPARSE, *_QK_NORM)),
    "granitemoe": Architecture(_granitemoe, (
        *_OUTER, *_BEFORE, *_QKV, "model.layers.{i}.block_sparse_moe.router.layer", *_W, *_SHARED), _HALVES),
    "gpt-oss": Architecture(_gpt_oss, (
        *_OUTER, *_BEFORE, *_QKV, "model.layers.{i}.self_attn.sinks", "model.layers.{i}.mlp.router", *_EXPERTS)),
    "gemma": Architecture(_gemma, _LLAMA, {"norm": _less_one}),
    "gemma2": Architecture(_gemma2, (*_OUTER, *_SANDWICH, *_QKV, *_GATED), {"norm": _less_one}),
    "gemma3": Architecture(_gemma3, (*_OUTER, *_SANDWICH, *_QKV, *_QK_NORM, *_GATED), {"norm": _less_one}),
    "phi3": Architecture(_phi3, (
        *_OUTER, *_BEFORE, "model.layers.{i}.self_attn.qkv_proj", "model.layers.{i}.self_attn.o_proj",
        "model.layers.{i}.mlp.gate_up_proj", "model.layers.{i}.mlp.down_proj")),
    "olmo2": Architecture(_olmo2, (*_OUTER, *_AFTER, *_QKV, *_QK_NORM, *_GATED)),
    "starcoder2": Architecture(_starcoder2, (
        *_OUTER, *_BEFORE, *_QKV, "model.layers.{i}.mlp.c_fc", "model.layers.{i}.mlp.c_proj")),
    "gpt2": Architecture(_gpt2, (
        "transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head",
        *(f"transformer.h.{{i}}.{part}" for part in (
            "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"))),
        {"c_attn": _transpose, "c_proj": _transpose, "c_fc": _transpose}),
    "gptneox": Architecture(_gptneox, (
        "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out",
        *(f"gpt_neox.layers.{{i}}.{part}" for part in (
            "input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm",
            "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))),
        {"query_key_value": partial(_by_head, "num_attention_heads")}),
    "falcon": Architecture(_falcon, _falcon_modules, {"query_key_value": _by_group}),
    "mpt": Architecture(_mpt, (
        "transformer.wte", "transformer.norm_f", "lm_head",
        *(f"transformer.blocks.{{i}}.{part}" for part in (
            "norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj")))),
    "bloom": Architecture(_bloom, (
        *_BLOOM, "transformer.word_embeddings_layernorm", "transformer.h.{i}.input_layernorm",
        "transformer.h.{i}.post_attention_layernorm"),
        {"query_key_value": partial(_by_head, "n_head")}),
    "bert": Architecture(_bert, (
        "embeddings.word_embeddings", "embeddings.token_type_embeddings", "embeddings.position_embeddings",
        "embeddings.LayerNorm", *(f"encoder.layer.{{i}}.{part}" for part in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"))), encoder=True),
    "nomic-bert": Architecture(_nomic_bert, (
        "embeddings.word_embeddings", "embeddings.token_type_embeddings", "emb_ln", *(
            f"encoder.layers.{{i}}.{part}" for part in (
                "attn.Wqkv", "attn.out_proj", "norm1", "mlp.fc11", "mlp.fc12", "mlp.fc2", "norm2"))), encoder=True),
}


def _by_expert(tensor: Tensor, name: str) -> dict[str, Tensor]:
    """A tensor of all experts as one of each, so that they are dequantised one by one."""
    count, *shape = tensor.shape
    size = tensor.nbytes // count
    return {name.replace("{e}", str(e)): dataclasses.replace(
        tensor, shape=tuple(shape), start=tensor.start + e * size, nbytes=size) for e in range(count)}


class GgufSource:
    """A GGUF file as a checkpoint: a `jaxlm.io.source.Source`.

    Attributes:
      config: what the checkpoint's config.json said, as far as the file records it.
      vector: how an encoder makes a vector of a text; None where the file does not say.
      tokenizer_fields: what `jaxlm.data.tokenizer.Tokenizer.from_gguf` reads.

    Raises:
      ImportError: without the gguf package.
      ValueError: for what is no GGUF file, a truncated one, another version, or an architecture,
        quantisation, tensor or field that is not supported; names it.
    """

    config: dict[str, Any]
    vector: Vector | None
    tokenizer_fields: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._package = _package()
        self._data = _open(path)
        fields, infos, start = _header(path, self._data)
        name = fields.get("general.architecture")
        if name not in ARCHITECTURES:
            raise ValueError(f"{path} holds the architecture {name!r}; supported in GGUF files are "
                             f"{', '.join(ARCHITECTURES)}")
        if fields.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one of {fields['split.count']} parts: merge them with "
                             "llama-gguf-split --merge")
        architecture = ARCHITECTURES[name]
        tensors = self._place(infos, start)
        m = Metadata(self.path, fields, tensors, self._array)
        self.config = architecture.config(m)
        self.vector = _vector(m) if architecture.encoder else None
        for key, neutral in NEUTRAL.items():
            value = fields.get(f"{name}.{key}", neutral[0])
            if key not in m.read and value not in neutral:
                raise m.unsupported(f"{name}.{key} is {value}")
        for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
            self.config[key.replace("padding", "pad")] = fields.get(f"tokenizer.ggml.{key}")
        # With the architecture: Phi-3's tokenizer differs in what only its name says.
        self.tokenizer_fields = {key: value for key, value in fields.items()
                                 if key.startswith("tokenizer.") or key == "general.architecture"}
        self._tensors, self._undo = self._rename(m, architecture)

    def _place(self, infos: list[tuple], start: int) -> dict[str, Tensor]:
        """Checks that every tensor lies within the file and is of a kind that can be read."""
        kinds = {int(kind): kind for kind in self._package.GGMLQuantizationType}
        tensors, readable = {}, set()
        for name, shape, number, offset in infos:
            if number not in kinds:
                raise ValueError(f"{self.path}: tensor {name} is of the unknown type {number}")
            kind = kinds[number]
            numbers, size = self._package.GGML_QUANT_SIZES[kind]
            if kind not in readable and not self._decodes(kind):
                raise ValueError(f"{self.path}: tensor {name} is {kind.name}, which the gguf package cannot "
                                 "dequantise")
            readable.add(kind)
            if not shape or 0 in shape or shape[-1] % numbers:
                raise ValueError(f"{self.path}: tensor {name} of shape {shape} cannot be {kind.name}, which "
                                 f"comes in blocks of {numbers}")
            tensors[name] = Tensor(name, kind, shape, start + offset, math.prod(shape) // numbers * size)
            end = tensors[name].start + tensors[name].nbytes
            if end > len(self._data):
                raise ValueError(f"{self.path} is truncated: tensor {name} ends at byte {end}, the file at "
                                 f"{len(self._data)}")
        return tensors

    def _decodes(self, kind: Any) -> bool:
        block = np.zeros((1, self._package.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            self._package.quants.dequantize(block, kind)
        except NotImplementedError:
            return False
        return True

    def _rename(self, m: Metadata, architecture: Architecture) -> tuple[dict[str, Tensor], dict[str, Undo]]:
        """Tensors, and what to undo where there is something, by Hugging Face name."""
        layers, modules = m.need("block_count"), architecture.modules
        number = next(key for key, name in self._package.MODEL_ARCH_NAMES.items() if name == m.architecture)
        table = self._package.get_tensor_name_map(number, layers)
        found, undo = {}, {}
        for template in modules(self.config) if callable(modules) else modules:
            changes = [change for end, change in architecture.undo.items() if template.endswith(end)]
            for layer in range(layers if "{i}" in template else 1):
                named = template.replace("{i}", str(layer))
                module = named.replace(".{e}", "")
                # Not every table has the head, and BLOOM's leaves out a prefix that its checkpoints have.
                theirs = "output" if module in ("lm_head", "embed_out") else (
                    table.get_name(module) or table.get_name(module.removeprefix("transformer.")))
                for part in ("weight", "bias"):
                    if f"{theirs}.{part}" in m.tensors:
                        tensor = m.tensors[f"{theirs}.{part}"]
                        found |= _by_expert(tensor, f"{named}.{part}") if "{e}" in named else {f"{module}.{part}": tensor}
                        undo |= {f"{module}.{part}": change for change in changes}
        left = sorted(m.tensors.keys() - {tensor.name for tensor in found.values()} - m.read)
        if left:
            raise m.unsupported(f"{len(left)} tensors without a place: {', '.join(left[:5])}"
                                f"{' ...' if len(left) > 5 else ''}")
        return found, undo

    def _array(self, tensor: Tensor) -> np.ndarray:
        """The numbers as the file has them, quantised ones as float32."""
        kinds = self._package.GGMLQuantizationType
        plain = {kinds.F32: np.float32, kinds.F16: np.float16, kinds.BF16: ml_dtypes.bfloat16}
        count, width = math.prod(tensor.shape), tensor.shape[-1]
        if tensor.kind in plain:
            return np.frombuffer(self._data, plain[tensor.kind], count, tensor.start).reshape(tensor.shape)
        packed = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.start).reshape(count // width, -1)
        if count < PARALLEL:
            return self._package.quants.dequantize(packed, tensor.kind).reshape(tensor.shape)
        out = np.empty((count // width, width), np.float32)
        step = max(1, PARALLEL // 4 // width)

        def decode(row: int) -> None:
            out[row:row + step] = self._package.quants.dequantize(packed[row:row + step], tensor.kind)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode, range(0, len(packed), step)))
        return out.reshape(tensor.shape)

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            some = ", ".join(list(self._tensors)[:5])
            raise ValueError(f"{self.path} has no tensor {name}; it has {some} ...")
        return self._tensors[name]

    def names(self) -> set[str]:
        """Hugging Face names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the checkpoint had it."""
        shape, undo = self._find(name).shape, self._undo.get(name)
        return (1, math.prod(shape)) if undo is _row else shape[::-1] if undo is _transpose else shape

    def read(self, name: str) -> np.ndarray:
        """The values: float32 where the file is quantised, else as it has them, float32, float16 or bfloat16."""
        array = self._array(self._find(name))
        return self._undo[name](array, self.config) if name in self._undo else array

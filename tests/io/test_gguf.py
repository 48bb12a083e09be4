"""jaxlm.io.gguf against files written here with llama.cpp's names and orders, and against real ones."""

import math
import os
import pathlib
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from infer import assets
from jaxlm import generate
from jaxlm.config import Encoder, Pooling, Vector
from jaxlm.io import load
from jaxlm.io.gguf import ARCHITECTURES, GgufSource, metadata

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType

V, D, F, N, K, H, L = 11, 32, 48, 4, 2, 8, 2


def write(path: pathlib.Path, architecture: str, fields: Mapping[str, Any],
          tensors: Mapping[str, np.ndarray], kinds: Mapping[str, Any] | None = None) -> pathlib.Path:
    """A GGUF file. Bytes of tensors that `kinds` names are taken as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        key = key if key.split(".")[0] in ("general", "tokenizer", "split") else f"{architecture}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]
        add(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What llama.cpp's conversion does to some tensors, heads as in these tests.


def pairs(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Llama's rows so that the two dimensions that turn together are neighbours."""
    return lambda w: np.stack(np.split(w.reshape(heads, -1, *w.shape[1:]), 2, axis=1), axis=2).reshape(w.shape)


def parts(w: np.ndarray) -> np.ndarray:
    """q, k, v of head 0, of head 1 ...: all q, all k, all v."""
    heads = np.split(w, N)
    return np.concatenate([np.split(head, 3)[part] for part in range(3) for head in heads])


def falcon(w: np.ndarray) -> np.ndarray:
    """Each group's queries, key, value: all queries, all keys, all values."""
    groups = [np.split(group, N // K + 2) for group in np.split(w, K)]
    return np.concatenate([row for group in groups for row in group[:-2]] + [group[-2] for group in groups]
                          + [group[-1] for group in groups])


def turned(w: np.ndarray) -> np.ndarray:
    """GPT-2's matrices lie the other way round."""
    return np.ascontiguousarray(w.T)


def plus_one(w: np.ndarray) -> np.ndarray:
    """Gemma's norms."""
    return w + np.float32(1)


@dataclass(frozen=True)
class Tensor:
    """Checkpoint's name (blocks: {i}), GGUF's name, the checkpoint's shape and what conversion does."""

    theirs: str
    name: str
    shape: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray] = np.asarray


@dataclass(frozen=True)
class Case:
    """A tiny model of an architecture: metadata, tensors and the config.json that must come out."""

    architecture: str
    fields: dict[str, Any]
    tensors: tuple[Tensor, ...]
    config: dict[str, Any]
    layers: int = L
    exact: bool = field(default=True)

    def checkpoint(self) -> dict[str, tuple[Tensor, str, np.ndarray]]:
        """Name in the checkpoint: the row, GGUF's name, the values."""
        draw, out = np.random.default_rng(0), {}
        for tensor in self.tensors:
            for i in range(self.layers if "{i}" in tensor.theirs else 1):
                values = draw.standard_normal(tensor.shape, np.float32)
                out[tensor.theirs.replace("{i}", str(i))] = tensor, tensor.name.replace("{i}", str(i)), values
        return out

    def write(self, path: pathlib.Path, **fields: Any) -> pathlib.Path:
        """The GGUF file, with other fields than `self.fields` where given; None leaves one out."""
        fields = {key: value for key, value in (self.fields | fields).items() if value is not None}
        tensors = {name: tensor.change(values) for tensor, name, values in self.checkpoint().values()}
        return write(path, self.architecture, fields, tensors)


LAYER = "model.layers.{i}"
EMBEDDING = Tensor("model.embed_tokens.weight", "token_embd.weight", (V, D))
HEAD = Tensor("lm_head.weight", "output.weight", (V, D))


def norm(theirs: str, name: str, change: Callable = np.asarray, bias: bool = False, width: int = D) -> list[Tensor]:
    return [Tensor(f"{theirs}.{part}", f"{name}.{part}", (width,), change)
            for part in (("weight", "bias") if bias else ("weight",))]


def linear(theirs: str, name: str, outputs: int, inputs: int, bias: bool = False,
           change: Callable = np.asarray) -> list[Tensor]:
    weight = Tensor(f"{theirs}.weight", f"{name}.weight", (outputs, inputs), change)
    return [weight, Tensor(f"{theirs}.bias", f"{name}.bias", (outputs,), change)] if bias else [weight]


def qkvo(head: int = H, bias: bool = False, out_bias: bool = False, turn: bool = False) -> list[Tensor]:
    q, k = (pairs(N), pairs(K)) if turn else (np.asarray, np.asarray)
    return [*linear(f"{LAYER}.self_attn.q_proj", "blk.{i}.attn_q", N * head, D, bias, q),
            *linear(f"{LAYER}.self_attn.k_proj", "blk.{i}.attn_k", K * head, D, bias, k),
            *linear(f"{LAYER}.self_attn.v_proj", "blk.{i}.attn_v", K * head, D, bias),
            *linear(f"{LAYER}.self_attn.o_proj", "blk.{i}.attn_output", D, N * head, out_bias)]


def gated(bias: bool = False) -> list[Tensor]:
    return [*linear(f"{LAYER}.mlp.gate_proj", "blk.{i}.ffn_gate", F, D, bias),
            *linear(f"{LAYER}.mlp.up_proj", "blk.{i}.ffn_up", F, D, bias),
            *linear(f"{LAYER}.mlp.down_proj", "blk.{i}.ffn_down", D, F, bias)]


def before(change: Callable = np.asarray, bias: bool = False) -> list[Tensor]:
    return [*norm("model.norm", "output_norm", change, bias),
            *norm(f"{LAYER}.input_layernorm", "blk.{i}.attn_norm", change, bias),
            *norm(f"{LAYER}.post_attention_layernorm", "blk.{i}.ffn_norm", change, bias)]


def after(change: Callable = np.asarray) -> list[Tensor]:
    return [*norm("model.norm", "output_norm", change),
            *norm(f"{LAYER}.post_attention_layernorm", "blk.{i}.post_attention_norm", change),
            *norm(f"{LAYER}.post_feedforward_layernorm", "blk.{i}.post_ffw_norm", change)]


def sandwich() -> list[Tensor]:
    return [*after(plus_one), *norm(f"{LAYER}.input_layernorm", "blk.{i}.attn_norm", plus_one),
            *norm(f"{LAYER}.pre_feedforward_layernorm", "blk.{i}.ffn_norm", plus_one)]


def qk_norm(q: int, k: int, change: Callable = np.asarray) -> list[Tensor]:
    return [*norm(f"{LAYER}.self_attn.q_norm", "blk.{i}.attn_q_norm", change, width=q),
            *norm(f"{LAYER}.self_attn.k_norm", "blk.{i}.attn_k_norm", change, width=k)]


def bloomlike(before: str, qkv: list[Tensor], bias: bool) -> list[Tensor]:
    return [*qkv, *linear(f"{before}.dense", "blk.{i}.attn_output", D, D, bias),
            *linear("transformer.h.{i}.mlp.dense_h_to_4h", "blk.{i}.ffn_up", 4 * D, D, bias),
            *linear("transformer.h.{i}.mlp.dense_4h_to_h", "blk.{i}.ffn_down", D, 4 * D, bias),
            *norm("transformer.ln_f", "output_norm", bias=True),
            Tensor("transformer.word_embeddings.weight", "token_embd.weight", (V, D))]


FIELDS = {"block_count": L, "context_length": 64, "embedding_length": D, "feed_forward_length": F,
          "attention.head_count": N}
GROUPED = FIELDS | {"attention.head_count_kv": K}
RMS = GROUPED | {"attention.layer_norm_rms_epsilon": 1e-6}
STANDARD = FIELDS | {"attention.layer_norm_epsilon": 1e-5}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N, "vocab_size": V,
         "intermediate_size": F, "num_key_value_heads": K, "max_position_embeddings": 64} | TOKENS
ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
SILU = SIZES | ROPE | {"hidden_act": "silu", "rms_norm_eps": 1e-6}
GEMMA = SILU | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16,
                "tie_word_embeddings": True}
FALCON = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N, "vocab_size": V,
          "ffn_hidden_size": 4 * D, "max_position_embeddings": 64, "activation": "gelu", "layer_norm_epsilon": 1e-5,
          "bias": False, "alibi": False, "multi_query": True, "parallel_attn": True, "model_type": "falcon",
          "architectures": ["FalconForCausalLM"]} | ROPE | TOKENS


BERT, NOMIC = "encoder.layer.{i}", "encoder.layers.{i}"
ENCODER = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {
    "layer_norm_eps": 1e-5, "type_vocab_size": 2, "tie_word_embeddings": True}


def encoder(embedding_norm: str) -> list[Tensor]:
    return [Tensor("embeddings.word_embeddings.weight", "token_embd.weight", (V, D)),
            Tensor("embeddings.token_type_embeddings.weight", "token_types.weight", (2, D)),
            *norm(embedding_norm, "token_embd_norm", bias=True)]


def falcon_qkv(kv_heads: int) -> list[Tensor]:
    change = falcon if kv_heads == K else np.asarray  # with one group the order is the same
    return linear("transformer.h.{i}.self_attention.query_key_value", "blk.{i}.attn_qkv", (N + 2 * kv_heads) * H, D,
                  change=change)


CASES = {
    "llama": Case("llama", RMS | {"rope.freq_base": 5e5, "rope.dimension_count": H},
                  (EMBEDDING, HEAD, *before(), *qkvo(turn=True), *gated()),
                  SILU | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 5e5,
                          "head_dim": H, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}),
    "llama with biases, wide heads, tied": Case(
        "llama", RMS | {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16},
        (EMBEDDING, *before(), *qkvo(16, bias=True, out_bias=True, turn=True), *gated(bias=True)),
        SILU | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 16,
                "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama with a window": Case("llama", RMS | {"attention.sliding_window": 7},
                                (EMBEDDING, HEAD, *before(), *qkvo(turn=True), *gated()),
                                SILU | {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                                        "head_dim": H, "sliding_window": 7, "tie_word_embeddings": False}),
    "smollm3": Case("smollm3", RMS | {"block_count": 5}, (EMBEDDING, *before(), *qkvo(turn=True), *gated()),
                    SILU | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5,
                            "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1], "attention_bias": False,
                            "mlp_bias": False, "use_sliding_window": False, "tie_word_embeddings": True}, layers=5),
    "qwen2": Case("qwen2", RMS | {"rope.freq_base": 1e6},
                  (EMBEDDING, HEAD, *before(), *qkvo(bias=True), *gated()),
                  SILU | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6,
                          "use_sliding_window": False, "tie_word_embeddings": False}),
    "qwen3": Case("qwen3", RMS | {"attention.key_length": 16},
                  (EMBEDDING, *before(), *qkvo(16), *qk_norm(16, 16), *gated()),
                  SILU | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16,
                          "attention_bias": False, "use_sliding_window": False, "tie_word_embeddings": True}),
    "gemma": Case("gemma", RMS | {"attention.key_length": 16},
                  (EMBEDDING, *before(plus_one), *qkvo(16), *gated()),
                  GEMMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, exact=False),
    "gemma2": Case("gemma2", RMS | {"attention.key_length": 16, "attention.sliding_window": 5,
                                    "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
                   (EMBEDDING, *sandwich(), *qkvo(16), *gated()),
                   GEMMA | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 5,
                            "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0,
                            "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
                   exact=False),
    "gemma3": Case("gemma3", RMS | {"block_count": 7, "attention.key_length": 16, "attention.sliding_window": 5,
                                    "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
                   (EMBEDDING, *sandwich(), *qkvo(16), *qk_norm(16, 16, plus_one), *gated()),
                   GEMMA | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
                            "num_hidden_layers": 7, "sliding_window": 5, "attn_logit_softcapping": None,
                            "final_logit_softcapping": None, "query_pre_attn_scalar": 16, "rope_theta": 1e6,
                            "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]},
                   layers=7, exact=False),
    "phi3": Case("phi3", RMS | {"attention.sliding_window": 9, "rope.scaling.original_context_length": 64,
                                "rope.dimension_count": 4},
                 (EMBEDDING, HEAD, *before(),
                  *linear(f"{LAYER}.self_attn.qkv_proj", "blk.{i}.attn_qkv", (N + 2 * K) * H, D),
                  *linear(f"{LAYER}.self_attn.o_proj", "blk.{i}.attn_output", D, D),
                  *linear(f"{LAYER}.mlp.gate_up_proj", "blk.{i}.ffn_up", 2 * F, D),
                  *linear(f"{LAYER}.mlp.down_proj", "blk.{i}.ffn_down", D, F)),
                 SILU | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5,
                         "sliding_window": 9, "original_max_position_embeddings": 64,
                         "tie_word_embeddings": False}),
    "olmo2": Case("olmo2", RMS, (EMBEDDING, HEAD, *after(), *qkvo(), *qk_norm(N * H, K * H), *gated()),
                  SILU | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False,
                          "tie_word_embeddings": False}),
    "starcoder2": Case("starcoder2", STANDARD | {"attention.head_count_kv": K},
                       (EMBEDDING, *before(bias=True), *qkvo(bias=True, out_bias=True),
                        *linear(f"{LAYER}.mlp.c_fc", "blk.{i}.ffn_up", F, D, True),
                        *linear(f"{LAYER}.mlp.c_proj", "blk.{i}.ffn_down", D, F, True)),
                       SIZES | ROPE | {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"],
                                       "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True,
                                       "sliding_window": None, "tie_word_embeddings": True}),
    "gpt2": Case("gpt2", STANDARD | {"feed_forward_length": 4 * D},
                 (Tensor("transformer.wte.weight", "token_embd.weight", (V, D)),
                  Tensor("transformer.wpe.weight", "position_embd.weight", (64, D)),
                  *norm("transformer.ln_f", "output_norm", bias=True),
                  *norm("transformer.h.{i}.ln_1", "blk.{i}.attn_norm", bias=True),
                  *norm("transformer.h.{i}.ln_2", "blk.{i}.ffn_norm", bias=True),
                  *[Tensor(f"transformer.h.{{i}}.{theirs}.weight", f"blk.{{i}}.{name}.weight", shape, turned)
                    for theirs, name, shape in (("attn.c_attn", "attn_qkv", (D, 3 * D)),
                                                ("attn.c_proj", "attn_output", (D, D)),
                                                ("mlp.c_fc", "ffn_up", (D, 4 * D)),
                                                ("mlp.c_proj", "ffn_down", (4 * D, D)))],
                  *[Tensor(f"transformer.h.{{i}}.{theirs}.bias", f"blk.{{i}}.{name}.bias", (width,))
                    for theirs, name, width in (("attn.c_attn", "attn_qkv", 3 * D), ("attn.c_proj", "attn_output", D),
                                                ("mlp.c_fc", "ffn_up", 4 * D), ("mlp.c_proj", "ffn_down", D))]),
                 {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": D, "n_layer": L, "n_head": N,
                  "n_inner": 4 * D, "n_positions": 64, "vocab_size": V, "layer_norm_epsilon": 1e-5,
                  "activation_function": "gelu_new", "tie_word_embeddings": True} | TOKENS),
    "gptneox": Case("gptneox", STANDARD | {"rope.dimension_count": 2, "use_parallel_residual": False},
                    (Tensor("gpt_neox.embed_in.weight", "token_embd.weight", (V, D)),
                     Tensor("embed_out.weight", "output.weight", (V, D)),
                     *norm("gpt_neox.final_layer_norm", "output_norm", bias=True),
                     *norm("gpt_neox.layers.{i}.input_layernorm", "blk.{i}.attn_norm", bias=True),
                     *norm("gpt_neox.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm", bias=True),
                     *linear("gpt_neox.layers.{i}.attention.query_key_value", "blk.{i}.attn_qkv", 3 * D, D, True,
                             parts),
                     *linear("gpt_neox.layers.{i}.attention.dense", "blk.{i}.attn_output", D, D, True),
                     *linear("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "blk.{i}.ffn_up", F, D, True),
                     *linear("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "blk.{i}.ffn_down", D, F, True)),
                    {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} |
                    {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu",
                     "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000.0, "rope_scaling": None,
                     "use_parallel_residual": False, "attention_bias": True, "tie_word_embeddings": False}),
    "falcon with one key-value head": Case(
        "falcon", STANDARD | {"attention.head_count_kv": 1, "tensor_data_layout": "jploski"},
        (*bloomlike("transformer.h.{i}.self_attention", falcon_qkv(1), False),
         *norm("transformer.h.{i}.input_layernorm", "blk.{i}.attn_norm", bias=True)),
        FALCON | {"num_kv_heads": 1, "new_decoder_architecture": False, "num_ln_in_parallel_attn": 1,
                  "tie_word_embeddings": True}),
    "falcon with two norms": Case(
        "falcon", STANDARD | {"attention.head_count_kv": K, "tensor_data_layout": "jploski"},
        (*bloomlike("transformer.h.{i}.self_attention", falcon_qkv(K), False), HEAD,
         *norm("transformer.h.{i}.ln_attn", "blk.{i}.attn_norm_2", bias=True),
         *norm("transformer.h.{i}.ln_mlp", "blk.{i}.attn_norm", bias=True)),
        FALCON | {"num_kv_heads": K, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2,
                  "tie_word_embeddings": False}),
    "mpt": Case("mpt", STANDARD | {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 6.0},
                (Tensor("transformer.wte.weight", "token_embd.weight", (V, D)),
                 *norm("transformer.norm_f", "output_norm"),
                 *norm("transformer.blocks.{i}.norm_1", "blk.{i}.attn_norm"),
                 *norm("transformer.blocks.{i}.norm_2", "blk.{i}.ffn_norm"),
                 *linear("transformer.blocks.{i}.attn.Wqkv", "blk.{i}.attn_qkv", 3 * D, D),
                 *linear("transformer.blocks.{i}.attn.out_proj", "blk.{i}.attn_output", D, D),
                 *linear("transformer.blocks.{i}.ffn.up_proj", "blk.{i}.ffn_up", 4 * D, D),
                 *linear("transformer.blocks.{i}.ffn.down_proj", "blk.{i}.ffn_down", D, 4 * D)),
                {"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": D, "n_heads": N, "n_layers": L,
                 "expansion_ratio": 4, "max_seq_len": 64, "vocab_size": V, "no_bias": True, "learned_pos_emb": False,
                 "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                 "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8,
                                 "clip_qkv": 6.0, "qk_ln": False, "prefix_lm": False, "softmax_scale": None}}
                | TOKENS),
    "bloom": Case("bloom", STANDARD | {"attention.head_count_kv": N},
                  (*bloomlike("transformer.h.{i}.self_attention", linear(
                      "transformer.h.{i}.self_attention.query_key_value", "blk.{i}.attn_qkv", 3 * D, D, True, parts),
                      True),
                   *norm("transformer.word_embeddings_layernorm", "token_embd_norm", bias=True),
                   *norm("transformer.h.{i}.input_layernorm", "blk.{i}.attn_norm", bias=True),
                   *norm("transformer.h.{i}.post_attention_layernorm", "blk.{i}.ffn_norm", bias=True)),
                  {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": D, "n_layer": L,
                   "n_head": N, "vocab_size": V, "layer_norm_epsilon": 1e-5, "seq_length": 64,
                   "tie_word_embeddings": True} | TOKENS),
    "bert": Case("bert", STANDARD | {"attention.causal": False, "pooling_type": 2, "context_length": 99},
                 (*encoder("embeddings.LayerNorm"),
                  Tensor("embeddings.position_embeddings.weight", "position_embd.weight", (64, D)),
                  *[one for theirs, name in (("self.query", "q"), ("self.key", "k"), ("self.value", "v"),
                                             ("output.dense", "output"))
                    for one in linear(f"{BERT}.attention.{theirs}", f"blk.{{i}}.attn_{name}", D, D, True)],
                  *linear(f"{BERT}.intermediate.dense", "blk.{i}.ffn_up", F, D, True),
                  *linear(f"{BERT}.output.dense", "blk.{i}.ffn_down", D, F, True),
                  *norm(f"{BERT}.attention.output.LayerNorm", "blk.{i}.attn_output_norm", bias=True),
                  *norm(f"{BERT}.output.LayerNorm", "blk.{i}.layer_output_norm", bias=True)),
                 ENCODER | {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu"}),
    "nomic-bert": Case("nomic-bert", STANDARD | {"attention.causal": False, "pooling_type": 1, "rope.freq_base": 1000.0},
                       (*encoder("emb_ln"), *linear(f"{NOMIC}.attn.Wqkv", "blk.{i}.attn_qkv", 3 * D, D),
                        *linear(f"{NOMIC}.attn.out_proj", "blk.{i}.attn_output", D, D),
                        *linear(f"{NOMIC}.mlp.fc11", "blk.{i}.ffn_up", F, D),
                        *linear(f"{NOMIC}.mlp.fc12", "blk.{i}.ffn_gate", F, D),
                        *linear(f"{NOMIC}.mlp.fc2", "blk.{i}.ffn_down", D, F),
                        *norm(f"{NOMIC}.norm1", "blk.{i}.attn_output_norm", bias=True),
                        *norm(f"{NOMIC}.norm2", "blk.{i}.layer_output_norm", bias=True)),
                       ENCODER | ROPE | {"model_type": "nomic_bert", "architectures": ["NomicBertModel"], "hidden_act": "silu",
                                         "rope_theta": 1000.0}),
}
LLAMA = CASES["llama"]


def test_every_architecture_has_a_case():
    from tests.io.test_moe import FILES  # mixtures of experts

    assert {case.architecture for case in CASES.values()} | {name for name, _ in FILES.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_the_checkpoint_s(tmp_path: pathlib.Path, name: str):
    source, checkpoint = GgufSource(CASES[name].write(tmp_path / "m.gguf")), CASES[name].checkpoint()
    assert source.names() == checkpoint.keys()
    for tensor, (_, _, values) in checkpoint.items():
        assert source.shape(tensor) == values.shape
        read = source.read(tensor)
        assert read.shape == values.shape and read.dtype == np.float32
        # Adding one and taking it off again rounds.
        np.testing.assert_allclose(read, values, rtol=0, atol=0 if CASES[name].exact else 2.5e-7)


@pytest.mark.parametrize("name", CASES)
def test_config_is_the_checkpoint_s(tmp_path: pathlib.Path, name: str):
    assert GgufSource(CASES[name].write(tmp_path / "m.gguf")).config == CASES[name].config


@pytest.mark.parametrize("name, kind, head", [
    ("bert", 2, Vector(Pooling.FIRST)), ("nomic-bert", 1, Vector(Pooling.MEAN)), ("nomic-bert", 3, Vector(Pooling.LAST)),
    ("bert", 0, None), ("bert", None, None)])
def test_an_encoder_pools_as_the_metadata_says(tmp_path: pathlib.Path, name: str, kind: int | None, head: Vector | None):
    lm = load(CASES[name].write(tmp_path / "m.gguf", pooling_type=kind))
    assert isinstance(lm.config, Encoder) and lm.config.head == head
    assert not any(block.attention.causal for block in lm.config.stack.blocks())
    table = next(values for tensor, _, values in CASES[name].checkpoint().values() if tensor.name == "token_types.weight")
    np.testing.assert_array_equal(lm.params["encoder"]["embedding"]["types"], table)


def test_gemma_s_big_models_scale_scores_by_width_over_heads(tmp_path: pathlib.Path):
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        path = CASES[name].write(tmp_path / "m.gguf", block_count=layers)
        assert GgufSource(path).config["query_pre_attn_scalar"] == D // N


def test_gemma3_s_windows_as_the_metadata_has_them(tmp_path: pathlib.Path):
    case = CASES["gemma3"]
    none = GgufSource(case.write(tmp_path / "m.gguf", **{"attention.sliding_window": None}))
    assert none.config["sliding_window"] is None and set(none.config["layer_types"]) == {"full_attention"}
    every_other = GgufSource(case.write(tmp_path / "m.gguf", **{"attention.sliding_window_pattern": 2}))
    assert every_other.config["layer_types"] == (["sliding_attention", "full_attention"] * 4)[:7]
    listed = [True, False, False, True, False, False, True]
    source = GgufSource(case.write(tmp_path / "m.gguf", **{"attention.sliding_window_pattern": listed,
                                                           "rope.freq_base_swa": 2e4}))
    assert [one == "sliding_attention" for one in source.config["layer_types"]] == listed
    assert source.config["rope_local_base_freq"] == 2e4


# Rotary scalings.


def llama3_divisors(base: float, width: int, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """As llama.cpp's conversion works them out, one by one."""
    divisors = []
    for i in range(width // 2):
        wavelength = 2 * math.pi * base ** (2 * i / width)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def with_divisors(path: pathlib.Path, divisors: np.ndarray, **fields: Any) -> pathlib.Path:
    tensors = {name: tensor.change(values) for tensor, name, values in LLAMA.checkpoint().values()}
    return write(path, "llama", LLAMA.fields | fields, tensors | {"rope_freqs.weight": divisors})


def test_llama3_s_divisors_are_recognised(tmp_path: pathlib.Path):
    fields = {"attention.key_length": 64, "rope.dimension_count": 64, "rope.freq_base": 5e5}
    source = GgufSource(with_divisors(tmp_path / "m.gguf", llama3_divisors(5e5, 64, 32.0, 1.0, 4.0, 8192), **fields))
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
    assert "rope_freqs.weight" not in source.names()


def test_other_divisors_are_kept(tmp_path: pathlib.Path):
    divisors = np.array([1.0, 1.25, 3.7, 5.0], np.float32)
    scaling = GgufSource(with_divisors(tmp_path / "m.gguf", divisors)).config["rope_scaling"]
    assert scaling == {"rope_type": "longrope", "short_factor": [1.0, 1.25, 3.7, 5.0],
                       "long_factor": [1.0, 1.25, 3.7, 5.0], "attention_factor": 1.0, "factor": 1.0,
                       "original_max_position_embeddings": 64}


def test_divisors_of_one_scale_nothing(tmp_path: pathlib.Path):
    assert GgufSource(with_divisors(tmp_path / "m.gguf", np.ones(4, np.float32))).config["rope_scaling"] is None


@pytest.mark.parametrize("fields, expected", [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
      "rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_beta_fast": 24.0, "rope.scaling.yarn_beta_slow": 2.0},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5,
      "beta_fast": 24.0, "beta_slow": 2.0}),
])
def test_scalings_in_the_metadata(tmp_path: pathlib.Path, fields: dict, expected: dict | None):
    assert GgufSource(LLAMA.write(tmp_path / "m.gguf", **fields)).config["rope_scaling"] == expected


@pytest.mark.parametrize("magnitude", [None, 1.25])
def test_phi3_s_factors(tmp_path: pathlib.Path, magnitude: float | None):
    case = CASES["phi3"]
    tensors = {name: tensor.change(values) for tensor, name, values in case.checkpoint().values()}
    tensors |= {"rope_factors_short.weight": np.array([1.0, 1.1], np.float32),
                "rope_factors_long.weight": np.array([1.5, 2.5], np.float32)}
    usual = math.sqrt(1 + math.log(4) / math.log(64))
    fields = case.fields | {"context_length": 256, "rope.scaling.attn_factor": magnitude or usual}
    source = GgufSource(write(tmp_path / "m.gguf", "phi3", fields, tensors))
    expected = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 2.5]}
    assert source.config["rope_scaling"] == expected | ({"attention_factor": 1.25} if magnitude else {})
    assert source.names() == case.checkpoint().keys()


# Kinds of tensors.


def one_tensor(path: pathlib.Path, packed: np.ndarray, kind: Any) -> GgufSource:
    """A model whose embedding is this, read."""
    tensors = {name: tensor.change(values) for tensor, name, values in LLAMA.checkpoint().values()}
    return GgufSource(write(path, "llama", LLAMA.fields, tensors | {"token_embd.weight": packed},
                            {"token_embd.weight": kind}))


@pytest.mark.parametrize("kind, error", [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 0.02), ("Q5_0", 0.15),
                                         ("Q5_1", 0.15), ("Q4_0", 0.3), ("Q4_1", 0.3)])
def test_values_after_quantisation(tmp_path: pathlib.Path, kind: str, error: float):
    values = np.clip(np.random.default_rng(1).standard_normal((V, 64), np.float32), -2, 2)
    source = one_tensor(tmp_path / "m.gguf", gguf.quants.quantize(values, Kind[kind]), Kind[kind])
    read = source.read("model.embed_tokens.weight")
    assert read.shape == source.shape("model.embed_tokens.weight") == (V, 64)
    expected = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    assert read.dtype == expected
    np.testing.assert_allclose(read.astype(np.float32), values, rtol=0, atol=error)
    if error:
        assert np.abs(read.astype(np.float32) - values).max() > 0  # it was quantised


def test_a_block_of_q4_k_by_hand(tmp_path: pathlib.Path):
    """256 numbers: eight runs of 32, each d * scale * (0 to 15) - dmin * least, scales of six bits packed in twelve bytes."""
    draw = np.random.default_rng(2)
    scales, least, quants = draw.integers(64, size=8), draw.integers(64, size=8), draw.integers(16, size=(8, 32))
    packed = [int(s) | (int(scales[4 + i]) >> 4 << 6) for i, s in enumerate(scales[:4])]
    packed += [int(m) | (int(least[4 + i]) >> 4 << 6) for i, m in enumerate(least[:4])]
    packed += [int(scales[4 + i]) & 15 | (int(least[4 + i]) & 15) << 4 for i in range(4)]
    nibbles = [quants[2 * i] | quants[2 * i + 1] << 4 for i in range(4)]
    block = struct.pack("<2e", 0.5, 0.25) + bytes(packed) + np.concatenate(nibbles).astype(np.uint8).tobytes()
    rows = np.frombuffer(block * V, np.uint8).reshape(V, -1)
    read = one_tensor(tmp_path / "m.gguf", rows, Kind.Q4_K).read("model.embed_tokens.weight")
    expected = 0.5 * scales[:, None] * quants - 0.25 * least[:, None]
    np.testing.assert_array_equal(read, np.tile(expected.reshape(1, 256), (V, 1)))


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_every_kind_is_read_or_refused_by_name(tmp_path: pathlib.Path, kind: Any):
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.zeros((V, max(1, 64 // numbers) * size), np.uint8)
    try:
        gguf.quants.dequantize(rows, kind)
    except NotImplementedError:
        with pytest.raises(ValueError, match=rf"token_embd.weight is {kind.name}, which the gguf package cannot"):
            one_tensor(tmp_path / "m.gguf", rows, kind)
    else:
        read = one_tensor(tmp_path / "m.gguf", rows, kind).read("model.embed_tokens.weight")
        assert read.shape == (V, max(1, 64 // numbers) * numbers) and not np.any(read)


def test_large_tensors_are_dequantised_in_parts(tmp_path: pathlib.Path):
    values = np.random.default_rng(3).standard_normal((5003, 256), np.float32)
    packed = gguf.quants.quantize(values, Kind.Q8_0)
    source = one_tensor(tmp_path / "m.gguf", packed, Kind.Q8_0)
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight"), gguf.quants.dequantize(packed, Kind.Q8_0))


def test_an_unquantised_tensor_is_not_copied(tmp_path: pathlib.Path):
    read = GgufSource(LLAMA.write(tmp_path / "m.gguf")).read("model.embed_tokens.weight")
    assert not read.flags.owndata and not read.flags.writeable


def test_a_tensor_that_is_not_there(tmp_path: pathlib.Path):
    source = GgufSource(LLAMA.write(tmp_path / "m.gguf"))
    for ask in (source.read, source.shape):
        with pytest.raises(ValueError, match=r"no tensor token_embd.weight; it has model.embed_tokens.weight"):
            ask("token_embd.weight")


# Metadata.


def test_metadata_as_python_values(tmp_path: pathlib.Path):
    fields = {"general.name": "ä ▁ 🦙", "tokenizer.ggml.tokens": ["a", "", "ĠÂ"], "tokenizer.ggml.scores": [0.5, -1.0],
              "tokenizer.ggml.token_type": [1, 3, 6], "tokenizer.ggml.bos_token_id": 1,
              "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
              "tokenizer.chat_template": "{{ messages }}"}
    source = GgufSource(LLAMA.write(tmp_path / "m.gguf", **fields))
    found = metadata(tmp_path / "m.gguf")
    assert found.items() >= fields.items()
    assert found["general.architecture"] == "llama" and found["llama.attention.layer_norm_rms_epsilon"] == 1e-6
    wanted = {key: value for key, value in fields.items() if "tokenizer" in key}
    assert source.tokenizer_fields == wanted | {"general.architecture": "llama"}
    assert {key: source.config[key] for key in TOKENS} == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def test_metadata_of_a_file_that_holds_no_model(tmp_path: pathlib.Path):
    path = write(tmp_path / "m.gguf", "llama", {"tokenizer.ggml.model": "llama"}, {})
    assert metadata(path)["tokenizer.ggml.model"] == "llama"
    with pytest.raises(ValueError, match="lacks the metadata llama"):
        GgufSource(path)
    with pytest.raises(ValueError, match="lacks the tensor token_embd.weight"):
        GgufSource(write(tmp_path / "m.gguf", "llama", LLAMA.fields, {}))


# Bad files.


def test_what_is_no_gguf_file(tmp_path: pathlib.Path):
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\3\4" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m.gguf is no GGUF file: it starts with b'"):
            GgufSource(path)
    with pytest.raises(FileNotFoundError):
        GgufSource(tmp_path / "absent.gguf")


@pytest.mark.parametrize("version, match", [(1, "version 1; supported are versions 2 and 3"), (4, "version 4"),
                                            (3 << 24, "a big-endian file")])
def test_other_versions(tmp_path: pathlib.Path, version: int, match: str):
    path = LLAMA.write(tmp_path / "m.gguf")
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=match):
        GgufSource(path)


def test_a_file_cut_off_anywhere(tmp_path: pathlib.Path):
    path = LLAMA.write(tmp_path / "m.gguf", **{"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [1.0] * 9})
    whole = path.read_bytes()
    for size in [*range(4, 2000, 7), *range(2000, len(whole), 1009), len(whole) - 32]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m.gguf is truncated"):
            GgufSource(path)


def test_a_cut_tensor_is_named(tmp_path: pathlib.Path):
    path = LLAMA.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(ValueError, match=r"truncated: tensor blk.1.ffn_down.weight ends at byte"):
        GgufSource(path)


def test_a_damaged_header(tmp_path: pathlib.Path):
    path = LLAMA.write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    key = b"general.architecture"
    at = whole.index(key) + len(key)
    path.write_bytes(whole[:at] + struct.pack("<I", 99) + whole[at + 4:])
    with pytest.raises(ValueError, match=r"m.gguf is damaged: .*unknown type 99"):
        GgufSource(path)
    path.write_bytes(whole.replace(key, b"\xff" * len(key)))
    with pytest.raises(ValueError, match=r"m.gguf is damaged: .*utf-8"):
        GgufSource(path)


def test_a_tensor_of_unknown_type(tmp_path: pathlib.Path):
    path = LLAMA.write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    path.write_bytes(whole[:at] + struct.pack("<I", 999) + whole[at + 4:])
    with pytest.raises(ValueError, match="tensor token_embd.weight is of the unknown type 999"):
        GgufSource(path)


def test_an_architecture_that_is_not_supported(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"architecture 'rwkv7'; supported in GGUF files are llama, .*bloom"):
        GgufSource(write(tmp_path / "m.gguf", "rwkv7", {}, {}))


def test_a_tensor_without_a_place(tmp_path: pathlib.Path):
    tensors = {name: values for _, name, values in LLAMA.checkpoint().values()}
    tensors["blk.0.attn_sinks.weight"] = np.zeros(N, np.float32)
    with pytest.raises(ValueError, match=r"1 tensors without a place: blk.0.attn_sinks.weight: not supported for llama"):
        GgufSource(write(tmp_path / "m.gguf", "llama", LLAMA.fields, tensors))


@pytest.mark.parametrize("name, fields, match", [
    ("llama", {"expert_count": 8}, "lacks the metadata llama.expert_used_count"),
    ("qwen2", {"expert_count": 8}, "qwen2.expert_count is 8"),
    ("qwen2", {"attention.sliding_window": 100}, "qwen2.attention.sliding_window is 100"),
    ("llama", {"attention.causal": False}, "llama.attention.causal is False"),
    ("llama", {"rope.dimension_count": 4}, "only 4 of a head's 8 dimensions turn"),
    ("llama", {"rope.scaling.type": "longrope"}, "rope scaling of type 'longrope'"),
    ("llama", {"rope.scaling.type": "yarn"}, "lacks the metadata llama.rope.scaling.original_context_length"),
    ("llama", {"attention.head_count_kv": [2, 4]}, "llama.attention.head_count_kv differs between layers"),
    ("llama", {"attention.value_length": 4}, "values and keys have different widths"),
    ("llama", {"attention.layer_norm_rms_epsilon": None}, "lacks the metadata llama.attention.layer_norm_rms_epsilon"),
    ("llama", {"split.count": 3}, "one of 3 parts: merge them"),
    ("falcon with two norms", {"tensor_data_layout": "other"}, "tensor data layout 'other'"),
    ("mpt", {"attention.max_alibi_bias": 0.0}, "positions other than ALiBi"),
    ("mpt", {"attention.head_count_kv": 2}, "fewer key-value heads"),
    ("bert", {"attention.head_count_kv": 2}, "fewer key-value heads"),
    ("bert", {"pooling_type": 4}, "pooling of type 4"),
    ("nomic-bert", {"attention.causal": True}, "nomic-bert.attention.causal is True"),
])
def test_metadata_that_is_not_supported(tmp_path: pathlib.Path, name: str, fields: dict, match: str):
    with pytest.raises(ValueError, match=match):
        GgufSource(CASES[name].write(tmp_path / "m.gguf", **fields))


def test_metadata_that_is_neutral_or_alike_in_all_layers(tmp_path: pathlib.Path):
    fields = {"expert_count": 0, "attention.causal": True, "attention.head_count_kv": [2, 2], "logit_scale": 1.0}
    assert GgufSource(LLAMA.write(tmp_path / "m.gguf", **fields)).config == LLAMA.config


def test_without_the_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    path = LLAMA.write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[gguf\]'"):
        GgufSource(path)


# Beside transformers: its models take the tensors, and its own reader of GGUF files finds the same.


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_transformers_expects_these_tensors(tmp_path: pathlib.Path, name: str):
    transformers = pytest.importorskip("transformers")
    source = GgufSource(CASES[name].write(tmp_path / "m.gguf"))
    special = {} if source.vector is None else {"pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(transformers, source.config["architectures"][0])
        theirs = cls(transformers.AutoConfig.for_model(**source.config | special))
    if source.vector is not None:  # it renames Nomic BERT's when it saves, and BERT has a pooler
        theirs.save_pretrained(tmp_path / "theirs")
        saved = safetensors.numpy.load_file(tmp_path / "theirs" / "model.safetensors")
        assert {key: source.shape(key) for key in source.names()} == {
            key: value.shape for key, value in saved.items() if "pooler" not in key}
        return
    # GPT-NeoX's checkpoints say embed_out where the module says lm_head.
    expected = {key.replace("lm_head", "embed_out") if "neox" in name else key: tuple(value.shape)
                for key, value in theirs.state_dict().items()
                if not (source.config["tie_word_embeddings"] and key == "lm_head.weight")}
    assert {key: source.shape(key) for key in source.names()} == expected


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "llama with biases, wide heads, tied", "qwen2", "qwen3", "gemma2", "gemma3",
                                  "phi3", "starcoder2", "gpt2", "bloom"])
def test_transformers_reads_the_same(tmp_path: pathlib.Path, name: str):
    transformers = pytest.importorskip("transformers")
    # What transformers reads from vocabularies only.
    path = CASES[name].write(tmp_path / "m.gguf", vocab_size=V)
    source = GgufSource(path)
    config = transformers.AutoConfig.for_model(**source.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config)
    state = theirs.state_dict()
    for key in source.names():
        np.testing.assert_array_equal(source.read(key), state[key].float().numpy(), err_msg=key)


# Real files.


def real(pattern: str) -> pathlib.Path:
    """A file below $JAXLM_TEST_WEIGHTS."""
    folder = os.environ.get("JAXLM_TEST_WEIGHTS")
    if not folder:
        pytest.skip("JAXLM_TEST_WEIGHTS names no folder with qwen-0.5b/, qwen-1.5b/ and gemma-270m/")
    found = sorted(pathlib.Path(folder).glob(pattern))
    if not found:
        pytest.skip(f"{folder} has no {pattern}")
    return found[0]


# Greedy continuations that transformers gives with the same dequantised weights in float32.
PARIS = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
         "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
REVERSE = ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
           "<|im_start|>user\nWrite a Python function that reverses a string.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.real
@pytest.mark.parametrize("pattern, prompt, expected", [
    ("smollm2/**/*.gguf", PARIS, "The capital of France is Paris."),
    ("qwen-0.5b/*.gguf", REVERSE, "Here's a simple Python function to reverse a string:\n\n```python\n"
                                  "def reverse_string(s):\n    # Initialize an empty string"),
    ("qwen-1.5b/*.gguf", REVERSE, '```python\ndef reverse_string(s):\n    """\n    Reverses the given string.'),
    ("gemma-270m/*.gguf", "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is",
     " Rome. The capital of the United States is Washington.\n\nThe capital of the United Kingdom is London."),
], ids=["smollm2", "qwen-0.5b", "qwen-1.5b", "gemma-270m"])
def test_a_real_model_speaks(pattern: str, prompt: str, expected: str):
    loaded = load(assets.smollm2() if pattern.startswith("smollm2") else real(pattern))
    steps = len(loaded.tokenizer.encode(expected, add_special=False))
    # The last token may reach beyond the text expected, as in ".\n".
    assert generate(loaded, prompt, steps).text[0].startswith(expected)

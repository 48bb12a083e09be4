"""Makes moe.npz: what transformers computes for tiny mixtures of experts; see make_goldens.py.

    .venv/bin/python -m tests.io.goldens.make_moe

Tensors are named and shaped as in released files, and transformers' own loader makes its model of them.
"""

import copy
import json
import math
import pathlib
import tempfile
import zlib

import numpy as np

from tests.io.goldens.make_goldens import greedy, logits

PATH = pathlib.Path(__file__).with_name("moe.npz")

VOCABULARY, NEW = 64, 64  # NEW is that of `greedy`
TEXT = [3, 17, 42, 5, 60, 11, 29, 8, 33, 50, 2, 21, 44, 9]

BASE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0, "num_experts_per_tok": 2}
LOCAL = BASE | {"num_local_experts": 8}
MIXTRAL = LOCAL | {"model_type": "mixtral"}
QWEN2_MOE = BASE | {"model_type": "qwen2_moe", "num_experts": 8, "moe_intermediate_size": 12,
                    "shared_expert_intermediate_size": 20}
QWEN3_MOE = BASE | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 12, "head_dim": 8}
OLMOE = BASE | {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3}
GRANITE = LOCAL | {"model_type": "granitemoe", "attention_multiplier": 0.7, "embedding_multiplier": 1.5, "logits_scaling": 0.5,
                   "residual_multiplier": 0.6, "tie_word_embeddings": True}
GPT_OSS = LOCAL | {"model_type": "gpt_oss", "head_dim": 8, "sliding_window": 5, "swiglu_limit": 7.0, "num_experts_per_tok": 4,
                   "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                    "truncate": False, "original_max_position_embeddings": 16}}
LATENT = BASE | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_routed_experts": 8,
                 "num_experts_per_tok": 3, "moe_intermediate_size": 12, "kv_lora_rank": 10, "q_lora_rank": 14,
                 "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "rope_theta": 100.0}
STRETCHED = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
             "original_max_position_embeddings": 16}
DEEPSEEK_V2 = LATENT | {"model_type": "deepseek_v2", "topk_method": "greedy", "n_shared_experts": 2}
DEEPSEEK_V3 = LATENT | {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}

CASES = {
    "mixtral": MIXTRAL,
    "mixtral window, three experts": MIXTRAL | {"sliding_window": 6, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe every second layer, windows": QWEN2_MOE | {
        "num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": True, "use_sliding_window": True,
        "sliding_window": 5, "max_window_layers": 3, "qkv_bias": False},
    "qwen3_moe": QWEN3_MOE | {"norm_topk_prob": True},
    "qwen3_moe some layers dense": QWEN3_MOE | {
        "num_hidden_layers": 3, "mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 6},
    "olmoe": OLMOE,
    "olmoe normalized, biases": OLMOE | {"norm_topk_prob": True, "attention_bias": True},
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE | {"model_type": "granitemoeshared", "shared_intermediate_size": 20,
                                   "tie_word_embeddings": False, "attention_bias": True},
    "gpt_oss": GPT_OSS,
    "gpt_oss clipped, plain": GPT_OSS | {
        "num_hidden_layers": 3, "swiglu_limit": 0.5, "attention_bias": False, "rope_scaling": {"rope_type": "default"},
        "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "deepseek_v2 lite": DEEPSEEK_V2 | {"q_lora_rank": None,
                                       "rope_scaling": STRETCHED | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v2": DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                                  "routed_scaling_factor": 4.0, "rms_norm_eps": 1e-5, "attention_bias": True},
    "deepseek_v3": DEEPSEEK_V3 | {"rope_scaling": STRETCHED},
    "deepseek_v3 one group, halves": DEEPSEEK_V3 | {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
        "rope_interleave": False, "attention_bias": True, "first_k_dense_replace": 0, "num_hidden_layers": 2,
        "n_shared_experts": 2, "tie_word_embeddings": True,
        "rope_scaling": STRETCHED | {"mscale": 0.8, "mscale_all_dim": 0.5}},
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name: norms' scales around 1, biases around 0, matrices that keep activations' size."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("bias"):
        return values * np.float32(0.1)
    if len(shape) > 1:
        return values * np.float32(1.5 / math.sqrt(max(shape[-2:])))
    return values * np.float32(0.3) + np.float32(1)


def load(path: pathlib.Path):
    """transformers' model of a directory, of which it must leave nothing out and miss nothing."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def build(config: dict):
    """transformers' model of a config.json, with these weights."""
    import safetensors.numpy
    import torch
    import transformers

    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    made = transformers.AutoConfig.for_model(**copy.deepcopy(config) | special)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(path)
        file = path / "model.safetensors"
        tensors = {name: weight(name, one.shape) for name, one in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        return load(path), {name: list(one.shape) for name, one in tensors.items()}


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model, tensors = build(config)
        tokens, margin = greedy(model, TEXT)
        cases[name] = {"config": config, "written": json.loads(model.config.to_json_string()), "greedy": tokens,
                       "margin": margin, "tensors": tensors}
        arrays[name] = logits(model, TEXT)
        print(f"{name}: spread {arrays[name].std():.2f}, {len(set(tokens))} different tokens, margin {margin:.4f}")
    text = json.dumps({"text": TEXT, "cases": cases}).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **{f"logits {name}": x for name, x in arrays.items()})
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

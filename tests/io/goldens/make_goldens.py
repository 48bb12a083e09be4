"""Makes goldens.npz: what transformers computes for tiny models of every family, with every option switched on somewhere.

Run from the repository's root where transformers and torch are installed (`make test-parity` installs them):

    .venv/bin/python tests/io/goldens/make_goldens.py

Weights come from `weight`, by name, so the file holds no weights: only the configs, the tensors' names and shapes, the
logits of a text and the greedy continuation of its beginning.
"""

import copy
import json
import math
import pathlib
import zlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("goldens.npz")

VOCABULARY, NEW = 64, 64
TEXT = [3, 17, 42, 5, 60, 11, 29, 8, 33, 50, 2, 21, 44, 9]

LLAMA = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0}
MISTRAL = LLAMA | {"model_type": "mistral"}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 4}
OLMO2 = LLAMA | {"model_type": "olmo2"}
PHI3 = LLAMA | {"model_type": "phi3", "original_max_position_embeddings": 128}
STARCODER2 = LLAMA | {"model_type": "starcoder2"}
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 16}
GEMMA2 = GEMMA | {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 5}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 5, "rope_theta": 1000000.0,
                  "rope_local_base_freq": 10000.0, "sliding_window_pattern": 3}
GPT2 = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
CODEGEN = GPT2 | {"model_type": "codegen", "n_head": 8, "n_embd": 64, "n_layer": 2, "rotary_dim": 4}
NEOX = {"model_type": "gpt_neox", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
FALCON = {"model_type": "falcon", "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "ffn_hidden_size": 48}
MPT = {"model_type": "mpt", "vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}
BLOOM = {"model_type": "bloom", "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.5, 9.0]}

CASES = {
    "llama": LLAMA,
    "llama tied, biases, one key-value head": LLAMA | {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 12},
    "llama linear": LLAMA | {"num_key_value_heads": 4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama dynamic": LLAMA | {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama 3": LLAMA | {"rope_theta": 500.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "llama yarn": LLAMA | {"rope_theta": 100.0, "rope_scaling": YARN | {"beta_fast": 4.0, "truncate": False}},
    "llama yarn, magnitudes": LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "llama longrope": LLAMA | {"rope_scaling": LONG | {"original_max_position_embeddings": 16, "factor": 8.0}},
    "mistral": MISTRAL | {"sliding_window": 5},
    "mistral whole, wide heads": MISTRAL | {"sliding_window": None, "head_dim": 16, "hidden_act": "relu2"},
    "qwen2": QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "qwen2 tied, windows": QWEN2 | {
        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": QWEN3,
    "qwen3 tied, biases, windows": QWEN3 | {
        "tie_word_embeddings": True, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": SMOLLM3,
    "smollm3 windows, biases": SMOLLM3 | {
        "use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 1, 0], "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": False},
    "olmo2": OLMO2,
    "olmo2 tied, biases": OLMO2 | {"tie_word_embeddings": True, "attention_bias": True, "rope_theta": 500000.0},
    "phi3": PHI3 | {"sliding_window": 7},
    "phi3 longrope": PHI3 | {"original_max_position_embeddings": 24, "rope_scaling": LONG},
    "phi3 longrope, partial": PHI3 | {
        "original_max_position_embeddings": 8, "tie_word_embeddings": True, "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.2, 5.0],
                         "attention_factor": 1.3}},
    "starcoder2": STARCODER2 | {"sliding_window": 6},
    "starcoder2 plain": STARCODER2 | {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "relu"},
    "gemma": GEMMA | {"hidden_act": "gelu", "num_key_value_heads": 1},
    "gemma untied, biases": GEMMA | {"tie_word_embeddings": False, "attention_bias": True},
    "gemma2": GEMMA2 | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma2 uncapped": GEMMA2 | {
        "query_pre_attn_scalar": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    "gemma3": GEMMA3 | {"query_pre_attn_scalar": 16},
    "gemma3 linear, capped": GEMMA3 | {
        "query_pre_attn_scalar": 20, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 4.0},
    "gemma3 by kind of layer": {key: value for key, value in GEMMA3.items() if not key.startswith("rope")} | {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
            "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            "full_attention": YARN | {"rope_theta": 20000.0}}},
    "gemma3 with a vision part": {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 8, "patch_size": 4}},
    "gpt2": GPT2,
    "gpt2 scaled by layer, narrow": GPT2 | {
        "scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "activation_function": "relu",
        "tie_word_embeddings": False},
    "gpt2 unscaled": GPT2 | {"scale_attn_weights": False, "activation_function": "gelu"},
    "codegen": CODEGEN,
    "codegen tied, whole rotation": CODEGEN | {"tie_word_embeddings": True, "rotary_dim": 8, "n_inner": 40},
    "pythia": NEOX | {"rotary_pct": 0.25},
    "gpt-neox sequential": NEOX | {
        "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 1000,
        "tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_act": "gelu_fast"},
    "falcon": FALCON,
    "falcon rw": FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon rw, twelve heads": FALCON | {
        "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "hidden_size": 48,
        "num_attention_heads": 12},
    "falcon new": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "rope_theta": 500.0},
    "falcon new, one norm": FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "falcon many heads, rotary": FALCON | {
        "multi_query": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    "mpt": MPT,
    "mpt six heads, clipped": MPT | {
        "d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.5}},
    "mpt untied": MPT | {"tie_word_embeddings": False, "n_layers": 2},
    "bloom": BLOOM,
    "bloom six heads, untied": BLOOM | {"hidden_size": 48, "n_head": 6, "tie_word_embeddings": False},
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name: norms' scales around 1, biases around 0, matrices that keep activations' size."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("Attention.q.weight"):  # T5's, whose scores are not scaled: softmaxes this hot would magnify rounding
        return values * np.float32(0.5 / math.sqrt(min(shape)))
    if len(shape) > 1:
        return values * np.float32(1.3 / math.sqrt(min(shape)))
    return values * np.float32(0.1) if name.endswith("bias") else values * np.float32(0.3) + np.float32(1)


def build(config: dict):
    """transformers' model of a config.json, with these weights."""
    import torch
    import transformers

    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the defaults are beyond the vocabulary
    made = transformers.AutoConfig.for_model(**copy.deepcopy(config) | special)  # it changes rope_scaling in place
    # transformers 5 adds Falcon's ALiBi twice in its eager attention.
    made._attn_implementation = "sdpa" if config.get("alibi") else "eager"
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def logits(model, tokens: list[int]) -> np.ndarray:
    """float32 [T, V], without a cache."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def greedy(model, tokens: list[int]) -> tuple[list[int], float]:
    """The NEW tokens that follow, and the least distance between the best logit and the second."""
    tokens, margin = list(tokens), math.inf
    for _ in range(NEW):
        last = logits(model, tokens)[-1]
        second, first = np.argsort(last)[-2:]
        margin = min(margin, float(last[first] - last[second]))
        tokens.append(int(first))
    return tokens[-NEW:], margin


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model = build(config)
        tokens, margin = greedy(model, TEXT)
        written = {key: value for key, value in model.config.to_diff_dict().items() if key != "transformers_version"}
        cases[name] = {"config": config, "written": written, "greedy": tokens, "margin": margin,
                       "tensors": {name: list(one.shape) for name, one in model.named_parameters()}}
        arrays[name] = logits(model, TEXT)
        print(f"{name}: spread {arrays[name].std():.2f}, {len(set(tokens))} different tokens, margin {margin:.4f}")
    text = json.dumps({"text": TEXT, "cases": cases}, default=str).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **{f"logits {name}": x for name, x in arrays.items()})
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

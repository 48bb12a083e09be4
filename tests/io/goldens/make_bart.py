"""Makes bart.npz: what transformers computes for tiny models of BART's kind. As make_goldens.py; run it likewise.

Every source is computed alone, without padding.
"""

import copy
import json
import math
import pathlib

import numpy as np

from tests.io.goldens import make_goldens

PATH = pathlib.Path(__file__).with_name("bart.npz")

NEW = 12
SOURCES = [[7, 12, 33, 5, 41, 28, 9, 16, 30, 2], [19, 6, 45, 2], [23, 2]]
TEXTS = [[11, 24, 8, 39, 17, 46], [31, 5, 14], [9, 27, 42, 10]]

SHAPE = {"vocab_size": 48, "d_model": 32, "max_position_embeddings": 40, "encoder_layers": 2, "decoder_layers": 3,
         "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
BART = SHAPE | {"model_type": "bart"}
MBART = SHAPE | {"model_type": "mbart"}
MARIAN = SHAPE | {"model_type": "marian", "decoder_start_token_id": 47, "pad_token_id": 47}
APART = MARIAN | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 52}
M2M = SHAPE | {"model_type": "m2m_100"}

CASES = {
    "bart": BART | {"forced_bos_token_id": 0, "normalize_embedding": True, "normalize_before": False},
    "bart base model, scaled": BART | {"architectures": ["BartModel"], "scale_embedding": True, "activation_function": "relu"},
    "mbart": MBART | {"scale_embedding": True, "decoder_start_token_id": 4},
    "mbart unscaled": MBART | {"activation_function": "gelu_new", "bos_token_id": 6},
    "marian": MARIAN | {"scale_embedding": True, "activation_function": "swish", "static_position_embeddings": True},
    "marian two tables": APART | {"architectures": ["MarianMTModel"]},
    "marian three tables": APART | {"tie_word_embeddings": False},
    "m2m_100": M2M | {"forced_bos_token_id": 3},
    "m2m_100 unscaled, padding elsewhere": M2M | {"scale_embedding": False, "pad_token_id": 4, "activation_function": "gelu"},
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name: large matrices beside embeddings and the last bias, else a text repeats one token."""
    scales = {"shared": 1.0, "embed_tokens": 1.0, "lm_head": 1.0, "embed_positions": 3.0, "final_logits_bias": 0.05}
    scale = next((size for part, size in scales.items() if part in name), 2.0 if len(shape) > 1 else 1.0)
    return make_goldens.weight(name, shape) * np.float32(scale)


def names(config: dict, model) -> dict:
    """A checkpoint's tensors under their names: parameters and the one buffer that is no table of sines."""
    found = dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name == "final_logits_bias"}
    if config["model_type"] == "marian":
        found = {name: one for name, one in found.items() if "embed_positions" not in name}
    if "BartModel" in config.get("architectures", ()):
        found = {name.removeprefix("model."): one for name, one in found.items() if name.startswith("model.")}
    return found


def build(config: dict):
    """transformers' model of a config.json, with weights that follow from the tensors' names."""
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**copy.deepcopy(config))).eval()
    with torch.no_grad():
        for name, tensor in names(config, model).items():
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
    return model


def logits(model, source: list[int], text: list[int]) -> np.ndarray:
    """float32 [T, V]."""
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([text]), use_cache=False)
    return out.logits[0].numpy()


def greedy(model, source: list[int], start: list[int]) -> tuple[list[int], list[float], float]:
    """The NEW tokens that follow `start`, their log-probabilities, and the least distance between the two best logits."""
    tokens, logprobs, margin = list(start), [], math.inf
    for _ in range(NEW):
        last = logits(model, source, tokens)[-1]
        second, first = np.argsort(last)[-2:]
        margin = min(margin, float(last[first] - last[second]))
        logprobs.append(float(last[first] - np.logaddexp.reduce(last)))
        tokens.append(int(first))
    return tokens[len(start):], logprobs, margin


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model = build(config)
        first = model.config.decoder_start_token_id
        start = [model.config.bos_token_id if first is None else first]
        start += [config["forced_bos_token_id"]] if "forced_bos_token_id" in config else []
        answers = [greedy(model, source, start) for source in SOURCES]
        cases[name] = {"config": config, "written": json.loads(model.config.to_json_string(use_diff=True)), "start": start,
                       "greedy": [tokens for tokens, _, _ in answers], "margin": min(margin for _, _, margin in answers),
                       "tensors": {name: list(one.shape) for name, one in names(config, model).items()}}
        arrays[f"logprobs {name}"] = np.array([logprobs for _, logprobs, _ in answers], np.float32)
        for i, (source, text) in enumerate(zip(SOURCES, TEXTS, strict=True)):
            arrays[f"{i} {name}"] = logits(model, source, text)
        print(f"{name}: start {start}, {[len(set(tokens)) for tokens, _, _ in answers]} different tokens, "
              f"margin {cases[name]['margin']:.4f}")
    np.savez_compressed(PATH, cases=np.frombuffer(json.dumps(cases).encode(), np.uint8), **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

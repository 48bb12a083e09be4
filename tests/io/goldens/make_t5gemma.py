"""Makes t5gemma.npz: what transformers computes for tiny T5Gemmas; see make_goldens.py.

    PYTHONPATH=. .venv/bin/python tests/io/goldens/make_t5gemma.py
"""

import copy
import json
import math
import pathlib

import numpy as np

from tests.io.goldens.make_goldens import weight

PATH = pathlib.Path(__file__).with_name("t5gemma.npz")

VOCABULARY, NEW = 32, 10
RNG = np.random.default_rng(11)
# Longer than the windows.
SOURCES = [[int(i) for i in RNG.integers(0, VOCABULARY, length)] for length in (4, 17, 9)]
TARGETS = [[2] + [int(i) for i in RNG.integers(0, VOCABULARY, 13)] for _ in SOURCES]

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4,
         "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
LARGE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 32, "sliding_window": 5,
         "query_pre_attn_scalar": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
         "hidden_activation": "gelu", "layer_types": ["full_attention", "sliding_attention"],
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
CASES = {
    "t5gemma": {"model_type": "t5gemma", "encoder": SMALL, "decoder": SMALL},
    "t5gemma, sides that differ, untied": {
        "model_type": "t5gemma", "encoder": LARGE, "decoder": SMALL | {"num_hidden_layers": 2, "vocab_size": 40},
        "tie_word_embeddings": False, "bos_token_id": 3},
    "t5gemma, the small one reads": {
        "model_type": "t5gemma", "encoder": SMALL | {"num_hidden_layers": 1}, "decoder": LARGE | {"bos_token_id": 4}},
    "t5gemma encoder": {"model_type": "t5gemma", "encoder": SMALL, "is_encoder_decoder": False,
                        "architectures": ["T5GemmaEncoderModel"]},
}


def build(config: dict):
    """transformers' model of a config.json, with the goldens' weights."""
    import torch
    import transformers

    sides = {side: {"pad_token_id": None, "eos_token_id": None} | config[side] for side in ("encoder", "decoder")
             if side in config}
    small = {} if "decoder" in config else {"decoder": {"vocab_size": 8, "num_hidden_layers": 1}}
    made = transformers.AutoConfig.for_model(**copy.deepcopy(config | sides | small))
    made._attn_implementation = "eager"
    model = getattr(transformers, config.get("architectures", ["T5GemmaForConditionalGeneration"])[0])(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def writes(model) -> bool:
    """Whether it has a decoder."""
    return hasattr(model, "lm_head")


def run(model, source: list[int], target: list[int]) -> np.ndarray:
    """float32 [T, V], or an encoder's hidden states [S, D]."""
    import torch

    given = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source), dtype=torch.long)}
    with torch.no_grad():
        if writes(model):
            mask = torch.ones(1, len(target), dtype=torch.long)
            return model(**given, decoder_input_ids=torch.tensor([target]), decoder_attention_mask=mask,
                         use_cache=False).logits[0].numpy()
        return model(**given).last_hidden_state[0].numpy()


def greedy(model, source: list[int], start: int) -> tuple[list[int], float]:
    """The NEW tokens that are written, and the least distance between the best logit and the second."""
    tokens, margin = [start], math.inf
    for _ in range(NEW):
        last = run(model, source, tokens)[-1]
        second, first = np.argsort(last)[-2:]
        margin = min(margin, float(last[first] - last[second]))
        tokens.append(int(first))
    return tokens[1:], margin


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model = build(config)
        cases[name] = {"config": config, "written": json.loads(model.config.to_json_string(use_diff=False)),
                       "tensors": {name: list(one.shape) for name, one in model.named_parameters()}}
        outputs = [run(model, source, target) for source, target in zip(SOURCES, TARGETS, strict=True)]
        for i, output in enumerate(outputs):
            arrays[f"{i} {name}"] = output
        if writes(model):
            texts = [greedy(model, source, model.config.bos_token_id) for source in SOURCES]
            cases[name] |= {"greedy": [text for text, _ in texts], "margin": min(margin for _, margin in texts)}
            print(f"{name}: {texts}")
        print(f"{name}: spread {outputs[1].std():.2f}")
    text = json.dumps(cases).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

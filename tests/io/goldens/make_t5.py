"""Makes t5.npz: what transformers computes for tiny models of the T5 family; see make_goldens.py.

    .venv/bin/python tests/io/goldens/make_t5.py
"""

import copy
import json
import math
import pathlib

import numpy as np

from tests.io.goldens.make_goldens import weight

PATH = pathlib.Path(__file__).with_name("t5.npz")

VOCABULARY, NEW = 32, 12
RNG = np.random.default_rng(5)
# Longer than the farthest distance that has a bucket of its own.
SOURCES = [[int(i) for i in RNG.integers(2, VOCABULARY, length)] for length in (5, 27, 14)]
TARGETS = [[0] + [int(i) for i in RNG.integers(2, VOCABULARY, 22)] for _ in SOURCES]

T5 = {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 3, "num_layers": 3,
      "num_decoder_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
      "pad_token_id": 0, "decoder_start_token_id": 0}
CASES = {
    "t5": T5 | {"num_decoder_layers": None, "layer_norm_epsilon": 1e-3},
    "t5 1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "n_positions": 512, "output_past": True},
    "t5 tied, unscaled": T5 | {"feed_forward_proj": "gated-silu", "scale_decoder_outputs": False, "decoder_start_token_id": 3},
    "mt5": T5 | {"model_type": "mt5", "feed_forward_proj": "gated-gelu"},
    "umt5": T5 | {"model_type": "umt5", "feed_forward_proj": "gated-gelu"},
    "t5 encoder": T5 | {"architectures": ["T5EncoderModel"]},
    "umt5 encoder": T5 | {"model_type": "umt5", "feed_forward_proj": "gelu", "architectures": ["UMT5EncoderModel"]},
}

TEXTS = ("t5 tied, unscaled", "umt5")  # whose greedy texts are kept


def build(config: dict):
    """transformers' model of a config.json, with the goldens' weights."""
    import torch
    import transformers

    made = transformers.AutoConfig.for_model(**copy.deepcopy(config) | {"eos_token_id": None})
    named = config.get("architectures", [f"{config['model_type'].upper()}ForConditionalGeneration"])[0]
    made._attn_implementation = "eager"
    model = getattr(transformers, named)(made).eval()
    if config.get("tie_word_embeddings") is False:  # version 5 ties it all the same, until it loads one that differs
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        del model.all_tied_weights_keys["lm_head.weight"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def run(model, source: list[int], target: list[int]) -> np.ndarray:
    """float32 [T, V], or an encoder's hidden states [S, D]."""
    import torch

    with torch.no_grad():
        if hasattr(model, "lm_head"):
            return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0].numpy()
        return model(input_ids=torch.tensor([source])).last_hidden_state[0].numpy()


def greedy(model, source: list[int]) -> tuple[list[int], float]:
    """The NEW tokens that are written, and the least distance between the best logit and the second."""
    tokens, margin = [model.config.decoder_start_token_id], math.inf
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
        if name in TEXTS:
            texts = [greedy(model, source) for source in SOURCES]
            cases[name] |= {"greedy": [text for text, _ in texts], "margin": min(margin for _, margin in texts)}
            print(f"{name}: {texts}")
        print(f"{name}: spread {outputs[1].std():.2f}")
    text = json.dumps(cases).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

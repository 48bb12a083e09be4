"""Makes modernbert.npz: what transformers computes for tiny encoders and decoders of ModernBERT's kind; see make_bert.py.

    PYTHONPATH=. .venv/bin/python tests/io/goldens/make_modernbert.py
"""

import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy

from tests.io.goldens.make_bert import LABELS, TEXTS, TYPES, output
from tests.io.goldens.make_goldens import weight

PATH = pathlib.Path(__file__).with_name("modernbert.npz")

NEW = 8
# Two of the texts are longer than the windows: 3 keys on either side.
MODERN = {"model_type": "modernbert", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
          "num_attention_heads": 4, "max_position_embeddings": 40, "local_attention": 6, "pad_token_id": 0,
          "bos_token_id": None, "eos_token_id": None, "cls_token_id": 1, "sep_token_id": 2}
DECODER = MODERN | {"model_type": "modernbert-decoder", "bos_token_id": 1, "architectures": ["ModernBertDecoderForCausalLM"]}
BASES = {"global_rope_theta": 300.0, "local_rope_theta": 20.0}
KINDS = {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False}
ROPES = {"rope_parameters": {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}
NOMIC = {"model_type": "nomic_bert", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 40}

CASES = {
    "modernbert": MODERN | {"architectures": ["ModernBertModel"]} | BIASES | KINDS | ROPES | {"hidden_activation": "silu"},
    "modernbert words": MODERN | {"architectures": ["ModernBertForMaskedLM"], "norm_eps": 1e-3} | BASES,
    "modernbert words, untied, biases": MODERN | {
        "architectures": ["ModernBertForMaskedLM"], "tie_word_embeddings": False, "classifier_activation": "relu",
        "global_attn_every_n_layers": 2} | BIASES,
    "modernbert texts": MODERN | LABELS | {
        "architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "mean"},
    "modernbert texts by their first token": MODERN | {"architectures": ["ModernBertForSequenceClassification"]},
    "modernbert tokens": MODERN | {"architectures": ["ModernBertForTokenClassification"], "norm_bias": True} | LABELS,
    "decoder": DECODER | BASES,
    "decoder, untied, biases": DECODER | BIASES | KINDS | ROPES | {"tie_word_embeddings": False, "local_attention": 9},
    "nomic": NOMIC | {"architectures": ["NomicBertModel"], "layer_norm_eps": 1e-3},
    "nomic words": NOMIC | {"architectures": ["NomicBertForMaskedLM"], "rope_parameters": {
        "rope_type": "default", "rope_theta": 50.0}},
}
# Those whose outputs are stored; the others are compared live alone.
STORED = ("modernbert", "modernbert words", "modernbert texts", "modernbert tokens", "decoder", "decoder, untied, biases",
          "nomic words")


def build(config: dict):
    """transformers' model of a config.json with these weights, and shapes of tensors by the names that it saves them under."""
    import torch
    import transformers

    made = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    cls = getattr(transformers, config["architectures"][0])
    with tempfile.TemporaryDirectory() as directory:
        cls(made).save_pretrained(directory)
        file = pathlib.Path(directory) / "model.safetensors"
        shapes = {name: tensor.shape for name, tensor in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file({name: weight(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
        model = cls.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), shapes


def typed(config: dict) -> bool:
    """Whether token types are told apart."""
    return config["model_type"] == "nomic_bert"


def greedy(model, tokens: list[int]) -> list[int]:
    """The tokens that follow."""
    import torch

    out = model.generate(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long), do_sample=False,
                         max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    return out[0, len(tokens):].tolist()


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model, shapes = build(config)
        written = {key: value for key, value in model.config.to_dict().items()
                   if key not in ("transformers_version", "_name_or_path")}
        cases[name] = {"config": config, "written": written | {"architectures": config["architectures"]},
                       "tensors": {name: list(shape) for name, shape in shapes.items()}}
        if name in STORED:
            for i, (text, types) in enumerate(zip(TEXTS, TYPES, strict=True)):
                arrays[f"{name} {i}"] = output(model, text, types if typed(config) else None)
        if name == "decoder":
            cases[name]["greedy"] = [greedy(model, text) for text in TEXTS]
    text = json.dumps(cases, default=str).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

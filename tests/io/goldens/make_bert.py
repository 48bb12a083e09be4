"""Makes bert.npz: what transformers computes for tiny encoders of BERT's layout, with every head and option somewhere.

Run from the repository's root where transformers and torch are installed (`make test-parity` installs them):

    PYTHONPATH=. .venv/bin/python tests/io/goldens/make_bert.py

Weights come from `make_goldens.weight`, by name; each text goes through the model alone.
"""

import json
import pathlib

import numpy as np

from tests.io.goldens.make_goldens import weight

PATH = pathlib.Path(__file__).with_name("bert.npz")

TEXTS = [[7, 17, 42, 5, 60, 11, 29, 8, 33, 50, 12, 21, 44, 9], [8, 33, 50, 12, 21], [9]]
TYPES = [[0] * 5 + [1] * 9, [1, 1, 0, 1, 0], [1]]
# UniXcoder's encoder-decoder mode: so many tokens of the first text are the source, which all its tokens see.
SOURCE = 8

BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 20}
ROBERTA = BERT | {"model_type": "roberta", "type_vocab_size": 1}
ELECTRA = BERT | {"model_type": "electra", "embedding_size": 12}
MPNET = BERT | {"model_type": "mpnet"}
DISTILBERT = {"model_type": "distilbert", "vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4,
              "max_position_embeddings": 20}
LABELS = {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
          "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}}

CASES = {
    "bert": BERT | {"architectures": ["BertModel"], "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "bert words": BERT | {"architectures": ["BertForMaskedLM"], "hidden_act": "relu", "type_vocab_size": 3},
    "bert words and sentences": BERT | {"architectures": ["BertForPreTraining"]},
    "bert texts": BERT | {"architectures": ["BertForSequenceClassification"]} | LABELS,
    "bert tokens": BERT | {"architectures": ["BertForTokenClassification"], "tie_word_embeddings": False} | LABELS,
    "roberta": ROBERTA | {"architectures": ["RobertaModel"]},
    "roberta words": ROBERTA | {"architectures": ["RobertaForMaskedLM"], "hidden_act": "relu", "pad_token_id": 3},
    "roberta texts": ROBERTA | {"architectures": ["RobertaForSequenceClassification"]},
    "roberta tokens": ROBERTA | {"architectures": ["RobertaForTokenClassification"]} | LABELS,
    "xlm-roberta words": ROBERTA | {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]},
    "electra": ELECTRA | {"architectures": ["ElectraModel"], "embedding_size": 16},
    "electra words": ELECTRA | {"architectures": ["ElectraForMaskedLM"], "hidden_act": "relu"},
    "electra words, untied": ELECTRA | {"architectures": ["ElectraForMaskedLM"], "tie_word_embeddings": False},
    "electra replaced tokens": ELECTRA | {"architectures": ["ElectraForPreTraining"], "hidden_act": "relu"},
    "electra texts": ELECTRA | {"architectures": ["ElectraForSequenceClassification"], "hidden_act": "relu"} | LABELS,
    "electra tokens": ELECTRA | {"architectures": ["ElectraForTokenClassification"]},
    "mpnet": MPNET | {"architectures": ["MPNetModel"]},
    "mpnet words": MPNET | {"architectures": ["MPNetForMaskedLM"], "hidden_act": "relu"},
    "mpnet texts": MPNET | {"architectures": ["MPNetForSequenceClassification"]},
    "mpnet tokens": MPNET | {"architectures": ["MPNetForTokenClassification"]},
    "distilbert": DISTILBERT | {"architectures": ["DistilBertModel"]},
    "distilbert words": DISTILBERT | {"architectures": ["DistilBertForMaskedLM"], "activation": "relu",
                                      "tie_word_embeddings": False},
    "distilbert texts": DISTILBERT | {"architectures": ["DistilBertForSequenceClassification"]} | LABELS,
    "distilbert tokens": DISTILBERT | {"architectures": ["DistilBertForTokenClassification"]},
}
# Those whose outputs are stored; the others differ from them in what is compared live alone.
STORED = ("bert words", "bert texts", "roberta words", "electra words", "electra replaced tokens", "electra texts",
          "mpnet words", "distilbert words", "distilbert texts")


def build(config: dict):
    """transformers' model of a config.json, with these weights."""
    import torch
    import transformers

    made = transformers.AutoConfig.for_model(**config)
    made._attn_implementation = "eager"
    model = getattr(transformers, config["architectures"][0])(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def output(model, tokens: list[int], types: list[int] | None = None) -> np.ndarray:
    """Float32 logits, or the last hidden states, of one text."""
    import torch

    given = {} if types is None else {"token_type_ids": torch.tensor([types])}
    with torch.no_grad():
        out = model(torch.tensor([tokens]), **given)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if name in out:
            return out[name][0].numpy()
    raise ValueError(f"the model gives none of these: {list(out)}")


def typed(config: dict) -> bool:
    """Whether token types are told apart."""
    return config["model_type"] in ("bert", "electra")


def masked(model, mask: np.ndarray) -> np.ndarray:
    """The last hidden states of the first text where token i sees j if mask[i, j]."""
    import torch

    allowed = torch.where(torch.from_numpy(mask), 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return model(torch.tensor(TEXTS[:1]), attention_mask=allowed).last_hidden_state[0].numpy()


def modes() -> dict[str, np.ndarray]:
    """Who sees whom in UniXcoder's modes: in its code a mask beside one stack."""
    length = len(TEXTS[0])
    causal = np.tril(np.ones((length, length), bool))
    source = causal.copy()
    source[:SOURCE, :SOURCE] = True
    return {"encoder": np.ones_like(causal), "decoder": causal, "encoder-decoder": source}


def main() -> None:
    arrays, cases = {}, {}
    for name, config in CASES.items():
        model = build(config)
        written = {key: value for key, value in model.config.to_diff_dict().items() if key != "transformers_version"}
        cases[name] = {"config": config, "written": written | {"architectures": config["architectures"]},
                       "tensors": {name: list(one.shape) for name, one in model.named_parameters()}}
        if name in STORED:
            for i, (text, types) in enumerate(zip(TEXTS, TYPES, strict=True)):
                arrays[f"{name} {i}"] = output(model, text, types if typed(config) else None)
    for mode, mask in modes().items():
        arrays[f"mode {mode}"] = masked(build(CASES["roberta"]), mask)
    text = json.dumps(cases, default=str).encode()
    np.savez_compressed(PATH, cases=np.frombuffer(text, np.uint8), **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()

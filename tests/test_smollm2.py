"""A real model says what transformers says: SmolLM2-135M-Instruct, out of its wheel."""

import json

import pytest
from rich.console import Console

import jaxlm
from infer import assets

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PROMPTS = [
    {"prompt": "Name three rivers in Europe.", "chat": True},
    {"prompt": "Write a haiku about rain on a tin roof.", "chat": True},
    {"prompt": "for i in range(10):\n    print(", "chat": False},
    {"prompt": "La capitale de l'Italie est", "chat": False},
    {"prompt": "1, 1, 2, 3, 5, 8,", "chat": False},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    import torch
    import transformers

    model, folder = jaxlm.load(assets.smollm2()), tmp_path_factory.mktemp("smollm2") / "saved"
    jaxlm.save(model, folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("batch", [1, 5])
def test_greedy_tokens(pair, tmp_path, batch):
    from benchmarks import equality

    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    assert equality.compare_tokens(*pair, equality.Arguments(prompts=path, new_tokens=64, batch=batch), Console())


def test_perplexity(pair, tmp_path):
    from benchmarks import equality

    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
                    "foolishness, it was the epoch of belief, it was the epoch of incredulity. " * 12)
    assert equality.compare_perplexity(*pair, equality.Arguments(text=path, window=256, windows=2), Console())

import re

import numpy as np
import pytest

from jaxlm.data.source import Lines, ParallelLines
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import BytePairs
from jaxlm.objectives import SourceTarget
from jaxlm.objectives.base import told

LINES = ["un chat", "", "deux\x0bchats", "trois"], ["a cat", "nothing", "two cats", "three"]


@pytest.fixture
def files(tmp_path):
    for name, lines in zip(("fr", "en"), LINES, strict=True):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return str(tmp_path / "fr"), str(tmp_path / "en")


@pytest.fixture
def tokenizer(files, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path))
    return Tokenizer.from_directory(BytePairs(Lines(files), 280).directory())


def test_lines_side_by_side(files):
    documents = ParallelLines(*files).open()
    assert list(documents) == [f"{a}\x1e{b}" for a, b in zip(*LINES, strict=True)]
    assert list(ParallelLines(*files, between=" = ", start=2, stop=3).open()) == ["deux\x0bchats = two cats"]
    assert list(Lines(files[0], stop=3).open()) == ["un chat", "deux\x0bchats"]  # no blank ones
    with pytest.raises(ValueError, match=r"line 1 of .*en holds ' ca'"):
        ParallelLines(*files, between=" ca").open()
    with pytest.raises(ValueError, match="holds no documents"):
        ParallelLines(*files, start=9).open()
    with open(files[1], "a") as file:
        file.write("four\n")
    with pytest.raises(ValueError, match="has 4 lines and .* 5"):
        ParallelLines(*files).open()


def test_source_and_target_end_as_documents_do(files, tokenizer):
    end = tokenizer.eos_id
    objective = told(SourceTarget(), (end,), tokenizer)
    for source, target in zip(*LINES, strict=True):
        tokens = [*tokenizer.encode(f"{source}\x1e{target}"), end]
        made = objective.example(np.array(tokens), np.random.default_rng(0))
        for part, text in zip(made, (source, target), strict=True):
            assert part[-1] == end and tokenizer.decode(part[:-1]) == text and part.dtype == np.int32


@pytest.mark.parametrize(("text", "says"), [
    ("no target", "has 0 of the second"), ("one\x1etwo\x1ethree", "has 2 of the second"), ("cut\x1ehe", "and no end")])
def test_documents_that_are_no_pairs(tokenizer, text, says):
    objective = told(SourceTarget(), (tokenizer.eos_id,), tokenizer)
    tokens = tokenizer.encode(text) + ([] if "no end" in says else [tokenizer.eos_id])
    with pytest.raises(ValueError, match=re.escape(says)):
        objective.example(np.array(tokens), np.random.default_rng(0))


def test_what_stands_between_is_one_token(tokenizer):
    with pytest.raises(ValueError, match="makes 3 tokens of"):
        SourceTarget("===", (), tokenizer).example(np.array([1, 2]), np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs the documents' tokenizer"):
        SourceTarget().example(np.array([1, 2]), np.random.default_rng(0))

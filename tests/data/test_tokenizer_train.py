"""Training tokenizers: nothing is lost, sizes are kept, what is saved can be loaded, and one is trained once."""

import dataclasses
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import tokenizer_train
from jaxlm.data.source import Source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import BYTES, END, BytePairs, save, train

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(50)]


@dataclasses.dataclass(frozen=True)
class Texts(Source):
    count: int = 50

    def open(self):
        return TEXTS[:self.count]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers") / "new" / "one"
    save(train(TEXTS, 300, (END, "<|pad|>")), directory)
    return Tokenizer.from_directory(directory)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids


def test_the_vocabulary_is_as_large_as_asked(tokenizer):
    assert tokenizer.size == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert train(TEXTS, BYTES + 1).get_vocab_size() == BYTES + 1
    assert train([], 1000).get_vocab_size() == BYTES + 1  # nothing to merge


def test_special_tokens_end_documents_and_are_no_text(tokenizer):
    assert tokenizer.eos_id == 0 and tokenizer.eos_ids == (0,)
    assert tokenizer.encode(f"x{END}", parse_special=True)[-1] == 0
    assert 0 not in tokenizer.encode(f"x{END}<|pad|>", parse_special=False)


@pytest.mark.parametrize(("vocabulary", "special", "said"), [
    (256, (END,), "a vocabulary of 256 has no room for 256 bytes and 1 special"), (1000, (), "at least one"),
    (1000, ("<a>", "<a>"), "different"), (1000, ("a",), "no bytes"), (1000, ("<a>", ""), "not empty")])
def test_what_cannot_be_trained(vocabulary, special, said):
    with pytest.raises(ValueError, match=said):
        train(TEXTS, vocabulary, special)


def test_saving_replaces_what_is_there_and_leaves_nothing_else(tmp_path):
    directory = tmp_path / "one"
    save(train(TEXTS, 280), directory)
    save(train(TEXTS, 290, ("<end>",)), directory, "<end>")
    found = Tokenizer.from_directory(directory)
    assert found.size == 290 and found.names["eos_token"] == "<end>"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert sorted(path.name for path in directory.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(directory.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)  # others may read it too


def test_it_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(tokenizer_train, "train", lambda *given: calls.append(given[1:]) or train(*given))
    one = BytePairs(Texts(), 300, documents=10)
    assert one.directory() == one.directory() and len(calls) == 1
    assert one.directory().is_relative_to(tmp_path) and Tokenizer.from_directory(one.directory()).size == 300
    others = [dataclasses.replace(one, **change) for change in ({"vocabulary": 310}, {"documents": 11}, {"source": Texts(20)},
                                                                {"special": ("<end>",)})]
    assert len({one.directory(), *(other.directory() for other in others)}) == 5 and len(calls) == 5


def test_only_as_many_documents_are_read_as_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path))
    read = []
    monkeypatch.setattr(tokenizer_train, "train", lambda texts, *given: read.extend(texts) or train(read, *given))
    BytePairs(Texts(), 260, documents=7).directory()
    assert len(set(read)) == 7 and read != TEXTS[:7]


def test_trainings_at_once_do_not_break_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path))
    together = threading.Barrier(4, timeout=60)

    def slow(*given):
        found = train(*given)
        together.wait()
        return found

    monkeypatch.setattr(tokenizer_train, "train", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: BytePairs(Texts(), 300).directory(), range(4)))
    assert len(set(found)) == 1 and Tokenizer.from_directory(found[0]).eos_id == 0
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == [found[0].name]

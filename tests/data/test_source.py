"""Every kind of source: what is read, in what order, and what is said when it cannot be."""

import json
import pickle
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.code import Code
from jaxlm.data.source import ArrayRecords, Files, HuggingFace, JsonLines, Parquet, Tfds, home


def lines(path, *whole: bytes):
    path.write_bytes(b"".join(whole))
    return str(path)


def records(path, *whole: bytes):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in whole:
        writer.write(record)
    writer.close()
    return str(path)


def test_home_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("JAXLM_HOME", "")
    assert home().name == "jaxlm" and home().is_absolute()


def test_a_document_per_file_in_order_of_names_each_once(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "b.txt").write_text("zwei ü", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"one \xff")
    (tmp_path / "in" / "c.txt").write_text("three")
    monkeypatch.chdir(tmp_path)
    found = Files(("**/*.txt", str(tmp_path / "a.txt"), "./b.txt")).open()
    monkeypatch.chdir("/")
    assert list(found) == ["one �", "zwei ü", "three"]
    assert list(pickle.loads(pickle.dumps(found))) == list(found)


@pytest.mark.parametrize("kind", [Files, JsonLines, Parquet, ArrayRecords])
def test_a_pattern_that_matches_nothing_is_named(tmp_path, kind):
    (tmp_path / "here.txt").write_text("x")
    (tmp_path / "folder.none").mkdir()
    with pytest.raises(ValueError, match=r"no file matches '.*\*\.none'"):
        kind((str(tmp_path / "*.txt"), str(tmp_path / "*.none"))).open()


def test_lines_of_several_files_however_they_end(tmp_path):
    lines(tmp_path / "a.jsonl", b'{"text": "one"}\r\n', b"\r\n", b'{"n": 1, "text": "zw\xc3\xb6lf \\u00fc"}\n', b"  \t\n",
          b"\n", b'{"text": ""}\n')
    lines(tmp_path / "b.jsonl")
    lines(tmp_path / "c.jsonl", b'{"text": "last"}')
    found = JsonLines(str(tmp_path / "*.jsonl")).open()
    assert list(found) == ["one", "zwölf ü", "", "last"]
    assert list(pickle.loads(pickle.dumps(found))) == list(found)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), ascii=st.booleans(),
       end=st.sampled_from(["\n", "\r\n"]))
def test_any_text_comes_back_from_a_line(tmp_path_factory, texts, ascii, end):
    path = tmp_path_factory.mktemp("lines") / "x"
    path.write_bytes(end.join(json.dumps({"text": text}, ensure_ascii=ascii) for text in texts).encode())
    assert list(JsonLines(str(path)).open()) == texts


def test_a_line_may_be_the_text_and_halves_of_characters_are_replaced(tmp_path):
    path = lines(tmp_path / "x", b'"plain"\n', b'"half \\ud83d."\n', b'"whole \\ud83d\\ude00"\n', b'""')
    assert list(JsonLines(path, field=None).open()) == ["plain", "half �.", "whole \U0001f600", ""]


@pytest.mark.parametrize(("line", "said"), [
    (b'{"body": "x", "id": 3}', "has no field 'text'; it has 'body', 'id'"), (b'["x"]', "no object with fields"),
    (b'{"text": 3}', "should be text, got int: '3'"), (b'{"text": ', "is no JSON"), (b'{"text": "\xff"}', "is no JSON")])
def test_a_bad_line_is_named_by_file_and_byte(tmp_path, line, said):
    path = lines(tmp_path / "some.jsonl", b'{"text": "x"}\n', line)
    found = JsonLines(path).open()
    assert found[0] == "x"
    with pytest.raises(ValueError, match=rf"some\.jsonl, the line at byte 14, .*{said}"):
        found[1]


def test_files_without_a_line_hold_no_documents(tmp_path):
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no documents"):
        JsonLines(lines(tmp_path / "empty.jsonl", b"\n\r\n")).open()


def tables(folder):
    for name, first in (("a", 0), ("b", 25)):
        texts = [f"document {i}" for i in range(first, first + 25)]
        pq.write_table(pa.table({"body": texts, "id": list(range(25))}), folder / f"{name}.parquet", row_group_size=4)
    return Parquet(str(folder / "*.parquet"), "body")


def test_rows_of_several_tables_and_groups(tmp_path):
    found = tables(tmp_path).open()
    assert list(found) == [f"document {i}" for i in range(50)]
    assert len(found.kept) == found.KEPT
    again = pickle.loads(pickle.dumps(found))
    assert [again[i] for i in (49, 0, 24, 25)] == [f"document {i}" for i in (49, 0, 24, 25)]


def test_threads_read_the_same_rows(tmp_path):
    found = tables(tmp_path).open()
    order = [(7 * i) % 50 for i in range(400)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(found.__getitem__, order)) == [f"document {i}" for i in order]


def test_columns_and_rows_that_are_no_text_are_named(tmp_path):
    tables(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; it has body, id"):
        Parquet(str(tmp_path / "*.parquet")).open()
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 of group 1, should be text, got int"):
        Parquet(str(tmp_path / "*.parquet"), "id").open()[5]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none")
    with pytest.raises(ValueError, match="none holds no documents"):
        Parquet(str(tmp_path / "none")).open()


def test_array_records_are_texts_or_json(tmp_path):
    one = records(tmp_path / "a.array_record", "ü".encode(), b"two")
    two = records(tmp_path / "b.array_record", b'{"body": "three"}', b'{"text": "four"}', b"five")
    found = ArrayRecords((one, two)).open()
    assert list(found) == ["ü", "two", '{"body": "three"}', '{"text": "four"}', "five"]
    assert pickle.loads(pickle.dumps(found))[1] == "two"
    found = ArrayRecords(two, "text").open()
    assert found[1] == "four"
    with pytest.raises(ValueError, match=r"b\.array_record, record 0, has no field 'text'; it has 'body'"):
        found[0]
    with pytest.raises(ValueError, match=r"b\.array_record, record 2, is no JSON"):
        found[2]
    with pytest.raises(ValueError, match="holds no documents"):
        ArrayRecords(records(tmp_path / "none")).open()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset of TensorFlow Datasets: its directory and name."""
    folder, directory = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("datasets")
    for i in range(60):
        (folder / f"f{i}.py").write_text(f"x = {i}\n")
    Code(folder=str(folder), directory=str(directory)).open()
    name, = (path.name for path in (directory / "source_code").iterdir())
    return str(directory), f"source_code/{name}"


def test_a_prepared_dataset_by_split_and_field(prepared):
    directory, name = prepared
    whole = Tfds(name, directory=directory).open()
    half = Tfds(name, "train[:50%]", "path", directory).open()
    assert len(half) == round(len(whole) / 2) and whole[0].startswith("x = ")
    assert half[0].endswith(".py") and pickle.loads(pickle.dumps(half))[0] == half[0]
    with pytest.raises(ValueError, match=r"record 0, has no field 'body'; it has 'path', 'text'"):
        Tfds(name, field="body", directory=directory).open()[0]


@pytest.mark.parametrize(("name", "split"), [(None, "dev"), (None, "train[:"), ("no_such_dataset", "train"),
                                             ("source_code/no_such_folder", "train")])
def test_an_unknown_name_or_split_is_named(prepared, name, split):
    directory, known = prepared
    with pytest.raises(ValueError, match=rf"the dataset '{name or known}' \({split.replace('[', '.')}\) cannot be read from "):
        Tfds(name or known, split, directory=directory).open()


def test_hugging_faces_package_has_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="'some/where' is read with .* pip install datasets"):
        HuggingFace("some/where").open()


def test_hugging_faces_datasets_from_hub_and_disk(monkeypatch, tmp_path):
    fake, asked = types.ModuleType("datasets"), []
    fake.DatasetDict = type("DatasetDict", (dict,), {})

    def load(name, subset, split):
        asked.append((name, subset, split))
        if split == "dev":
            raise ValueError('Unknown split "dev"')
        return [{"body": "one"}, {"body": "two"}] if split == "train" else []

    fake.load_dataset = load
    fake.load_from_disk = lambda name: fake.DatasetDict(train=[{"text": "saved"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(HuggingFace("some/where", field="body", subset="en").open()) == ["one", "two"]
    assert asked == [("some/where", "en", "train")]
    assert list(HuggingFace(str(tmp_path)).open()) == ["saved"]
    with pytest.raises(ValueError, match=r"'some/where' \(dev\) cannot be read: Unknown split"):
        HuggingFace("some/where", "dev").open()
    with pytest.raises(ValueError, match=r"\(test\) cannot be read"):
        HuggingFace(str(tmp_path), "test").open()
    with pytest.raises(ValueError, match=r"some/where \(none\) holds no documents"):
        HuggingFace("some/where", "none").open()
    with pytest.raises(ValueError, match="record 0, has no field 'text'; it has 'body'"):
        HuggingFace("some/where").open()[0]

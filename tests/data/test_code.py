"""The dataset of source code: which files, which split, when it is made."""

import os
import platform
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from jaxlm.data import code
from jaxlm.data.code import Code, Functions, SourceCode, files, split_of


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds; `good` names those that should be found."""
    root = tmp_path / "some code"
    for i in range(120):
        path = root / f"p{i % 7}" / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# ü\nvalue = {i}\n", encoding="utf-8")
    for place in ("tests", "p0/site-packages/x", "p1/__pycache__"):
        (root / place).mkdir(parents=True)
        (root / place / "no.py").write_text(f"skipped = {place!r}\n")
    (root / "z_copy.py").write_text("# ü\nvalue = 1\n", encoding="utf-8")
    (root / "giant.py").write_text("x = 1\n" * 40_000)
    (root / "latin.py").write_bytes(b"# \xfc\n")
    (root / "empty.py").write_text(" \n")
    (root / "notes.txt").write_text("notes")
    (root / "folder.py").mkdir()
    return root


def good(folder):
    return {path.relative_to(folder).as_posix() for path in folder.glob("p*/m*.py")}


def built(directory):
    return sorted(path.name for path in (directory / "source_code").iterdir())


def test_which_files_are_found(folder):
    found = dict(files(folder, (".py",)))
    assert set(found) == good(folder) and list(found)[0] == "p0/m0.py"
    assert found["p0/m0.py"] == "# ü\nvalue = 0\n"
    assert dict(files(folder, (".txt",))) == {"notes.txt": "notes"}
    assert len(dict(files(folder, (".py", ".txt")))) == len(found) + 1


def test_a_path_alone_decides_the_split():
    paths = [f"a/b{i}.py" for i in range(20_000)]
    found = {split: sum(split_of(path) == split for path in paths) / len(paths) for split in ("train", *code.SHARES)}
    assert found == pytest.approx({"train": 0.94, "validation": 0.03, "test": 0.03}, abs=0.005)
    assert split_of("json/decoder.py") == split_of("json/decoder.py")


def test_the_splits_are_all_files_and_any_program_can_read_them(folder, tmp_path):
    directory = tmp_path / "datasets"
    found = {split: list(Code(split, str(folder), directory=str(directory)).open()) for split in ("train", *code.SHARES)}
    texts = dict(files(folder, (".py",)))
    for split, documents in found.items():
        assert sorted(documents) == sorted(text for path, text in texts.items() if split_of(path) == split), split
    assert min(len(documents) for documents in found.values()) > 0
    name, = built(directory)
    plain = tfds.data_source(f"source_code/{name}", split="validation", data_dir=str(directory), download=False)
    assert {(one["path"].decode(), one["text"].decode()) for one in plain} == {
        (path, text) for path, text in texts.items() if split_of(path) == "validation"}


def test_it_is_built_once_and_again_when_a_file_changes(folder, tmp_path, monkeypatch):
    directory, builds = tmp_path / "datasets", []
    prepare = SourceCode.download_and_prepare
    monkeypatch.setattr(SourceCode, "download_and_prepare", lambda self: builds.append(self.name) or prepare(self))
    source = Code("train", str(folder), directory=str(directory))
    first = sorted(source.open())
    assert sorted(source.open()) == first and len(Code("test", str(folder), directory=str(directory)).open()) > 0
    assert len(builds) == 1
    (folder / "notes.txt").write_text("others")  # of another kind
    source.open()
    assert len(builds) == 1
    path = next(path for path in sorted(good(folder)) if split_of(path) == "train")
    (folder / path).write_text("# changed\n")
    assert "# changed\n" in list(source.open()) and len(builds) == 2
    stat = (folder / path).stat()
    (folder / path).write_text("# CHANGED\n")  # of the same size
    os.utime(folder / path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "# CHANGED\n" in list(source.open()) and len(builds) == 3 == len(built(directory))


def test_who_finishes_second_reads_what_the_first_built(folder, tmp_path, monkeypatch):
    directory, found = tmp_path / "datasets", []
    source, generators = Code("train", str(folder), directory=str(directory)), SourceCode._split_generators

    def overtaken(self, manager):
        monkeypatch.setattr(SourceCode, "_split_generators", generators)
        found.append(source.open())
        return generators(self, manager)

    monkeypatch.setattr(SourceCode, "_split_generators", overtaken)
    assert list(source.open()) == list(found[0])
    assert len(built(directory)) == 1


def test_endings_of_the_standard_library(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for i in range(9):
        for ending in ("py", "pyi"):
            (library / f"m{i}.{ending}").write_text(f"# {ending} {i}\n")
    monkeypatch.setattr(code.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    for endings in ((".py",), (".pyi",), (".py", ".pyi")):
        found = [text for split in ("train", "validation", "test") if any(split_of(f"m{i}{ending}") == split for i in range(9)
                 for ending in endings) for text in Code(split, endings=endings, directory=str(tmp_path / "d")).open()]
        assert sorted(found) == [f"# {ending[1:]} {i}\n" for ending in endings for i in range(9)]
    assert f"python_{platform.python_version()}" in built(tmp_path / "d")


def test_functions_of_files(folder, tmp_path):
    function = "def f{}():\n    'Says.'\n    return 1\n"
    for name in range(20):
        (folder / f"f{name}.py").write_text(f"import a\n{function.format(name)}{function.format('')}")
    source = Code("train", str(folder), directory=str(tmp_path / "d"))
    want = {function.format(name) for name in range(20) if split_of(f"f{name}.py") == "train"} | {function.format("")}
    found = Functions(source).open()
    assert set(found) == want and len(found) == len(want) > 10  # the one that is everywhere comes once
    for path in folder.glob("f[0-9]*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="Code.*has no Python functions with docstrings"):
        Functions(source).open()


def test_nothing_needs_tensorflow(folder, tmp_path):
    program = ("import sys; from jaxlm.data.code import Code\n"
               "print(len(Code('train', sys.argv[1], directory=sys.argv[2]).open()), 'tensorflow' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(tmp_path / "d")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    expected = sum(split_of(path) == "train" for path in good(folder))
    assert done.stdout == f"{expected} False\n"


def test_a_split_without_files_is_named(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    names = [name for name in (f"{i}.py" for i in range(20)) if split_of(name) == "train"][:2]
    for name in names:
        (folder / name).write_text(f"# {name}\n")
    assert sorted(Code("train", str(folder), directory=str(tmp_path / "d")).open()) == sorted(f"# {name}\n" for name in names)
    with pytest.raises(ValueError, match=r"\(validation\)"):
        Code("validation", str(folder), directory=str(tmp_path / "d")).open()
    with pytest.raises(ValueError, match=r"\(dev\)"):
        Code("dev", str(folder), directory=str(tmp_path / "d")).open()


def test_folders_that_are_missing_or_have_nothing(tmp_path):
    with pytest.raises(ValueError, match="there is no folder '.*nowhere'"):
        Code(folder=str(tmp_path / "nowhere"), directory=str(tmp_path / "d")).open()
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"has no files that end in \.py or \.pyi"):
        Code(folder=str(tmp_path), endings=(".py", ".pyi"), directory=str(tmp_path / "d")).open()

"""Where documents come from: frozen descriptions that `open` turns into sequences of texts with random access.

Random access is what makes the order of training a function of a seed: the shuffle is a permutation of indices. Nothing is read
before a document is asked for, but for what finding it needs (offsets of lines, row counts).
"""

import dataclasses
import glob
import json
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def home() -> pathlib.Path:
    """The folder for what is fetched or made once: `$JAXLM_HOME`, or ~/.cache/jaxlm. It need not exist yet."""
    return pathlib.Path(os.environ.get("JAXLM_HOME") or "~/.cache/jaxlm").expanduser().absolute()


class Source:
    """The base: what is read, not yet opened."""

    def open(self) -> Sequence[str]:
        """The documents.

        Raises:
          ValueError: for missing files, unknown names, no documents, records without the field; names what there is.
        """
        raise NotImplementedError


def _found(paths: str | Sequence[str]) -> list[pathlib.Path]:
    """The files that shell-style patterns (`**` for any folders) match, each once, in order of their names."""
    patterns = [paths] if isinstance(paths, str) else list(paths)
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name)]
        if not matched:
            raise ValueError(f"no file matches {pattern!r} (from {os.getcwd()})")
        found |= {os.path.abspath(name) for name in matched}
    return [pathlib.Path(name) for name in sorted(found)]


def _text(record: Any, field: str | None, where: str) -> str:
    """The text of a record: itself, or one of its fields."""
    if field is not None:
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} is no object with fields, so it has no {field!r}")
        if field not in record:
            raise ValueError(f"{where} has no field {field!r}; it has {', '.join(map(repr, record))}")
        record = record[field]
    if isinstance(record, bytes):
        return record.decode("utf-8", errors="replace")
    if not isinstance(record, str):
        raise ValueError(f"{where} should be text, got {type(record).__name__}: {str(record)[:60]!r}")
    try:
        record.encode()
    except UnicodeEncodeError:  # JSON can write halves of characters, which no tokenizer takes
        record = record.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
    return record


def _some(documents: Sequence[str], what: str) -> Sequence[str]:
    if not len(documents):
        raise ValueError(f"{what} holds no documents")
    return documents


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """A document per file.

    Attributes:
      paths: shell-style patterns; malformed UTF-8 is replaced.
    """

    paths: str | tuple[str, ...]

    def open(self) -> Sequence[str]:
        """Read when asked for."""
        return _Files(_found(self.paths))


class _Files(Sequence[str]):
    def __init__(self, paths: list[pathlib.Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> str:
        return self.paths[index].read_text(encoding="utf-8", errors="replace")


def _lines(path: pathlib.Path) -> list[str]:
    # Not splitlines, which cuts at a dozen other characters too.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines if lines[-1] else lines[:-1]


@dataclasses.dataclass(frozen=True)
class Lines(Source):
    """A document per line of text.

    Attributes:
      paths: shell-style patterns; all lines are kept in memory.
      start, stop: the lines taken, as of a list.
    """

    paths: str | tuple[str, ...]
    start: int | None = None
    stop: int | None = None

    def open(self) -> Sequence[str]:
        """Without the spaces around them; blank ones are left out."""
        lines = [line for path in _found(self.paths) for line in _lines(path)][self.start:self.stop]
        return _some([line.strip() for line in lines if line.strip()], f"{self.paths}")


@dataclasses.dataclass(frozen=True)
class ParallelLines(Source):
    """Line i of one file and line i of another as a document: a sentence and its translation, a program and its repair.

    Attributes:
      sources, targets: shell-style patterns of files with as many lines, kept in memory.
      between: what stands between the two; nothing that occurs in them. See `jaxlm.objectives.SourceTarget`. A tokenizer of
        their own is trained on `Lines`: it then has no longer tokens with this in them.
      start, stop: the lines taken, as of a list.
    """

    sources: str
    targets: str
    between: str = "\x1e"
    start: int | None = None
    stop: int | None = None

    def open(self) -> Sequence[str]:
        """
        Raises:
          ValueError: for files of different lengths, or a line that holds what stands between; names it.
        """
        sides = [[line for path in _found(paths) for line in _lines(path)] for paths in (self.sources, self.targets)]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{self.sources} has {len(sides[0])} lines and {self.targets} {len(sides[1])}: they need as many")
        for path, side in zip((self.sources, self.targets), sides, strict=True):
            wrong = next((number for number, line in enumerate(side, 1) if self.between in line), None)
            if wrong is not None:
                raise ValueError(f"line {wrong} of {path} holds {self.between!r}, which is to stand between source and target")
        pairs = [f"{source.strip()}{self.between}{target.strip()}" for source, target in zip(*sides, strict=True)]
        return _some(pairs[self.start:self.stop], f"lines {self.start or 0} to {self.stop or 'the end'} of {self.sources}")


@dataclasses.dataclass(frozen=True)
class JsonLines(Source):
    """A document per line of JSON.

    Attributes:
      paths: shell-style patterns. Where lines begin is found once, by reading every file through.
      field: of the object that holds the text; None where the line is the text.
    """

    paths: str | tuple[str, ...]
    field: str | None = "text"

    def open(self) -> Sequence[str]:
        """Lines are read where they stand."""
        return _some(_JsonLines(_found(self.paths), self.field), f"{self.paths}")


class _JsonLines(Sequence[str]):
    def __init__(self, paths: list[pathlib.Path], field: str | None) -> None:
        self.paths, self.field = paths, field
        places = []  # of every line: file, begin, end
        for number, path in enumerate(paths):
            with path.open("rb") as file:
                sizes = np.fromiter((-len(line) if line.isspace() else len(line) for line in file), np.int64)
            ends = np.cumsum(np.abs(sizes))
            whole = np.stack([np.full(len(ends), number), ends - np.abs(sizes), ends], axis=1)
            places.append(whole[sizes > 0])  # without blank ones
        self.places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> str:
        number, begin, end = self.places[index].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(begin)
            line = file.read(end - begin)
        where = f"{self.paths[number]}, the line at byte {begin},"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        return _text(record, self.field, where)


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
    """A document per row of a column.

    Attributes:
      paths: shell-style patterns.
      field: the column.
    """

    paths: str | tuple[str, ...]
    field: str = "text"

    def open(self) -> Sequence[str]:
        """A document costs the reading of its group of rows; the last few groups are kept."""
        return _some(_Parquet(_found(self.paths), self.field), f"{self.paths}")


class _Parquet(Sequence[str]):
    KEPT = 4  # groups of rows

    def __init__(self, paths: list[pathlib.Path], field: str) -> None:
        import pyarrow.parquet

        self.paths, self.field = paths, field
        self.groups: list[tuple[pathlib.Path, int]] = []
        sizes = []
        for path in paths:
            meta = pyarrow.parquet.read_metadata(path)
            names = [meta.schema.column(i).path for i in range(meta.num_columns)]
            if field not in names:
                raise ValueError(f"{path} has no column {field!r}; it has {', '.join(names)}")
            for group in range(meta.num_row_groups):
                self.groups.append((path, group))
                sizes.append(meta.row_group(group).num_rows)
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self.kept: dict[int, Any] = {}
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"} | {"kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: Any) -> str:
        import pyarrow.parquet

        if not 0 <= index < len(self):
            raise IndexError(f"{len(self.paths)} tables have {len(self)} rows, got index {index}")
        group = int(np.searchsorted(self.ends, index, side="right"))
        path, number = self.groups[group]
        with self.lock:
            rows = self.kept.pop(group, None)
            if rows is None:
                with pyarrow.parquet.ParquetFile(path) as file:
                    rows = file.read_row_group(number, columns=[self.field]).column(0)
            self.kept[group] = rows  # the latest last
            while len(self.kept) > self.KEPT:
                self.kept.pop(next(iter(self.kept)))
        row = int(index) - (int(self.ends[group - 1]) if group else 0)
        return _text(rows[row].as_py(), None, f"{path}, row {row} of group {number},")


@dataclasses.dataclass(frozen=True)
class ArrayRecords(Source):
    """A document per record of ArrayRecord files.

    Attributes:
      paths: shell-style patterns.
      field: records are JSON objects, and this field of them is the text; None where a record is the text, in UTF-8.
    """

    paths: str | tuple[str, ...]
    field: str | None = None

    def open(self) -> Sequence[str]:
        """Read by the package array_record, which comes with grain."""
        import grain

        records = grain.sources.ArrayRecordDataSource([os.fspath(path) for path in _found(self.paths)])
        return _some(_Records(records, self.field, str(self.paths)), f"{self.paths}")


class _Records(Sequence[str]):
    """The texts in something with random access to records."""

    def __init__(self, records: Any, field: str | None, name: str) -> None:
        self.records, self.field, self.name = records, field, name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} documents, got index {index}")
        record, where = self.records[index], f"{self.name}, record {index},"
        if self.field is not None and isinstance(record, bytes):
            try:
                record = json.loads(record)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}") from error
        return _text(record, self.field, where)


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """A dataset of TensorFlow Datasets, in a form with random access (array_record); TensorFlow itself is not needed.

    Attributes:
      name: as `tfds.data_source` takes it: "lm1b", "source_code/stdlib:1.0.0".
      split: "train", "train[:5%]" ...
      field: of the features.
      directory: where datasets are; None is the package's own place (`TFDS_DATA_DIR` or ~/tensorflow_datasets).
    """

    name: str
    split: str = "train"
    field: str = "text"
    directory: str | None = None

    def open(self) -> Sequence[str]:
        """Prepared before: nothing is downloaded here."""
        import tensorflow_datasets as tfds

        directory = None if self.directory is None else os.path.expanduser(self.directory)
        try:
            records = tfds.data_source(self.name, split=self.split, data_dir=directory, download=False)
        except (tfds.core.DatasetNotFoundError, AssertionError, NotImplementedError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"the dataset {self.name!r} ({self.split}) cannot be read from "
                             f"{directory or 'the default directory'}: {reason}") from error
        return _some(_Records(records, self.field, self.name), f"{self.name} ({self.split})")


@dataclasses.dataclass(frozen=True)
class HuggingFace(Source):
    """A dataset of Hugging Face's package datasets, which has to be installed.

    Attributes:
      name: on the hub, or the directory of one saved with `save_to_disk`.
      split: one of its splits.
      field: the column.
      subset: the configuration, None for the only one.
    """

    name: str
    split: str = "train"
    field: str = "text"
    subset: str | None = None

    def open(self) -> Sequence[str]:
        """Downloaded where it has to be."""
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{self.name!r} is read with Hugging Face's package datasets: pip install datasets") from error
        try:
            if os.path.isdir(self.name):
                found = datasets.load_from_disk(self.name)
                found = found[self.split] if isinstance(found, datasets.DatasetDict) else found
            else:
                found = datasets.load_dataset(self.name, self.subset, split=self.split)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"the dataset {self.name!r} ({self.split}) cannot be read: {error}") from error
        return _some(_Records(found, self.field, self.name), f"{self.name} ({self.split})")

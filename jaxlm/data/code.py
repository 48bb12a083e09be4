"""A dataset of source code out of any folder, as TensorFlow Datasets knows them; by default of Python's own standard library.

Importing this module makes the dataset "source_code" known to `tfds.builder`. Building and reading need no TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from jaxlm.data.identifiers import functions
from jaxlm.data.source import Source, Tfds, home

SHARES = {"validation": 0.03, "test": 0.03}  # of the files; the rest is for training
LARGEST = 200_000  # bytes of a file: longer ones are mostly tables
SKIPPED = ("site-packages", "test", "tests", "idle_test", "__pycache__")  # folders


@dataclasses.dataclass(eq=False)
class Folder(tfds.core.BuilderConfig):
    """What the dataset is made of: the files in a folder whose names end in one of the endings."""

    folder: str = ""
    endings: tuple[str, ...] = (".py",)


class SourceCode(tfds.core.GeneratorBasedBuilder):
    """A file is an example of "text" and "path"; which split it is in depends on its path alone."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[tuple[str, dict[str, str]]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for path, text in files(self.builder_config.folder, self.builder_config.endings):
            found.setdefault(split_of(path), []).append((path, text))
        return {name: self._generate_examples(some) for name, some in found.items()}  # none without files

    def _generate_examples(self, found: Sequence[tuple[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
        for path, text in found:
            yield path, {"text": text, "path": path}


def paths(folder: str | os.PathLike[str], endings: Sequence[str]) -> list[pathlib.Path]:
    """The files with one of the endings, sorted; without those of tests and installed packages."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [pathlib.Path(place, name) for name in names if name.endswith(tuple(endings))]
    return sorted(path for path in found if path.is_file())


def files(folder: str | os.PathLike[str], endings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Path within the folder and text of every one of the `paths`; without copies, giants and what is empty or no UTF-8."""
    seen = set()
    for path in paths(folder, endings):
        content = path.read_bytes()
        digest = hashlib.blake2b(content).digest()
        if not content.strip() or len(content) > LARGEST or digest in seen:
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        yield path.relative_to(folder).as_posix(), text


def split_of(path: str) -> str:
    """The split that a file belongs to."""
    place = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest()) / 2**64
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "train"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without talk of downloads, bars for what takes a second, and warnings of configurations that are not built in."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class Code(Source):
    """Source code: a document per file. The dataset is made when it is first asked for, and again when files of the folder have
    changed, which takes a few seconds.

    Attributes:
      split: "train", "validation" or "test".
      folder: None for Python's standard library.
      endings: of the files' names.
      directory: where datasets are kept; None for `home()`/datasets.
    """

    split: str = "train"
    folder: str | None = None
    endings: tuple[str, ...] = (".py",)
    directory: str | None = None

    def open(self) -> Sequence[str]:
        """Made, then read as TensorFlow Datasets reads it."""
        if self.folder is None:
            folder, name = sysconfig.get_paths()["stdlib"], f"python_{platform.python_version()}"
            if self.endings != (".py",):
                name += "_" + hashlib.blake2b(repr(self.endings).encode(), digest_size=8).hexdigest()
        else:
            folder = os.path.abspath(os.path.expanduser(self.folder))
            if not os.path.isdir(folder):
                raise ValueError(f"there is no folder {self.folder!r}")
            stats = [(os.fspath(path), path.stat()) for path in paths(folder, self.endings)]
            state = folder, self.endings, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
            digest = hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()
            name = re.sub(r"\W+", "_", os.path.basename(folder)) + "_" + digest
        if next(files(folder, self.endings), None) is None:
            raise ValueError(f"{folder} has no files that end in {' or '.join(self.endings)}")
        directory = self.directory or str(home() / "datasets")
        with _quiet():
            builder = SourceCode(config=Folder(name=name, folder=folder, endings=self.endings), data_dir=directory,
                                 file_format="array_record")
            if not builder.is_prepared():
                try:
                    builder.download_and_prepare()
                except OSError:
                    if not builder.is_prepared():  # by another process, meanwhile
                        raise
        return Tfds(f"source_code/{name}:{SourceCode.VERSION}", self.split, "text", directory).open()


@dataclasses.dataclass(frozen=True)
class Functions(Source):
    """A document per Python function with a docstring, see `jaxlm.data.identifiers.functions`; the same text comes once.

    Attributes:
      source: of Python files. They are all read when it is opened (the standard library's in a few seconds), and the functions
        are kept in memory.
    """

    source: Source = Code()

    def open(self) -> Sequence[str]:
        """In the order of the files.

        Raises:
          ValueError: where there are none.
        """
        found = list(dict.fromkeys(one.text for document in self.source.open() for one in functions(document)))
        if not found:
            raise ValueError(f"{self.source} has no Python functions with docstrings")
        return found

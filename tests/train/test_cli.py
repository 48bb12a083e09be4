"""What `python -m train` makes of its command line and of a folder that is there already."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import cloudpickle
import jax
import pytest

from jaxlm import config, sharding
from jaxlm.data.source import JsonLines
from jaxlm.data.stream import Batches, Phase, Plan
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import save, train
from jaxlm.objectives import AsText, CausalLM, PrefixLM
from jaxlm.recipe import Recipe, Run, identity
from jaxlm.training.optimizer import AdamW, Lion, Optimizer
from jaxlm.training.schedule import Constant
from tests import tiny
from train.__main__ import Arguments, Distributed, connect, locked, read, read_mesh, run

TEXTS = [" ".join(f"{n} plums" for n in range(start, start + 30)) for start in range(60)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Documents, and two tokenizers of the same size."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::-1]))
    for name, documents in (("tokenizer", TEXTS), ("other", ["wholly other words"] * 30)):
        save(train(documents, 262), folder / name)
    return folder


def recipe(files, **fields):
    phase = Phase(((JsonLines(str(files / "text.jsonl")), 1.0),))
    model = tiny.decoder([tiny.block()], embedding=config.Embedding(300))
    given = {"model": model, "tokenizer": str(files / "tokenizer"), "phases": (phase,), "objective": CausalLM(),
             "optimizer": Optimizer(AdamW(), Constant(1e-3)), "rows": 8, "length": 16, "steps": 2}
    return Recipe(**(given | fields))


def go(files, out, arguments=(), **fields):
    """The steps that were done."""
    return run(recipe(files, **fields), out, Arguments("any", **dict(arguments)), quiet=True)[1].step


def test_going_on(files, tmp_path, monkeypatch):
    """With the same tokenizer only; with other data when that is meant; with other rates at any time."""
    (tmp_path / "tokenizer").mkdir()  # as one that was killed early may leave it
    (tmp_path / "tokenizer.partial").mkdir()
    (tmp_path / "tokenizer.partial" / "tokenizer.json").write_text("{")
    assert go(files, tmp_path) == 2
    ours = identity(Tokenizer.from_directory(files / "tokenizer"))
    assert identity(Tokenizer.from_directory(tmp_path / "tokenizer")) == ours
    assert not (tmp_path / "tokenizer.partial").exists()
    other = identity(Tokenizer.from_directory(files / "other"))
    data = (Phase(((JsonLines(str(files / "more.jsonl")), 1.0),)),)
    for fields, says in (({"tokenizer": str(files / "other")}, f"its tokenizer is '{ours}', here it is '{other}'$"),
                         ({"objective": AsText(PrefixLM())}, r"its objective is 'CausalLM\(\)', .*; --changed-data goes on"),
                         ({"phases": data}, "its phases.0.sources.0.0 is .*text.jsonl.*more.jsonl.*; --changed-data goes on"),
                         ({"phases": data, "seed": 3}, "its seed is 0, here it is 3$"),
                         ({"phases": (dataclasses.replace(data[0], steps=1), *data)}, "number of phases is 1, here it is 2"),
                         ({"optimizer": Optimizer(Lion(), Constant(1e-3))}, "its optimizer.kind is 'AdamW', here it is 'Lion'"),
                         ({"optimizer": Optimizer(AdamW(), Constant(1e-3), clip=None)}, "its optimizer.clip is True")):
        with pytest.raises(ValueError, match=says):
            go(files, tmp_path, **fields)
    with pytest.raises(ValueError, match="its tokenizer is"):
        go(files, tmp_path, {"changed_data": True}, tokenizer=str(files / "other"))
    seen = []
    monkeypatch.setattr(Run, "batches", lambda *given, batches=Run.batches: seen.append(given[1]) or batches(*given))
    assert go(files, tmp_path, {"changed_data": True}, phases=data, steps=3,
              optimizer=Optimizer(AdamW(weight_decay=0.2), Constant(1e-4))) == 3
    assert not seen[0].any()  # they were within their first documents, which are others now
    with pytest.raises(ValueError, match="its phases"):  # it has become one of the new data
        go(files, tmp_path, steps=4)
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes((files / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=rf"another tokenizer \({other}\) than this run's \({ours}\)"):
        go(files, tmp_path, phases=data, steps=4)


@pytest.mark.parametrize(("arguments", "fields", "says"), [
    ({}, {"held_out": Phase(((JsonLines("nowhere"), 1.0),))}, "no file matches 'nowhere'"),
    ({}, {"phases": (Phase(((JsonLines("nowhere"), 1.0),)),)}, "no file matches 'nowhere'"),
    ({"workers": -1}, {}, "--workers and --keep-best are at least 0, .* got -1"),
    ({"keep_last": 0}, {}, "--keep-last at least 1"), ({"skip": -1}, {}, "skip at least 0"),
    ({}, {"checkpoint_every": 0}, "at least 1")])
def test_what_is_wrong_is_said_before_anything_is_written(files, tmp_path, arguments, fields, says):
    with pytest.raises(ValueError, match=says):
        go(files, tmp_path / "out", arguments, **fields)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_trained_by_one_process(files, tmp_path):
    with locked(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path} is being trained by another process"):
            go(files, tmp_path)
        assert not (tmp_path / "checkpoints").exists()
    with locked(tmp_path):  # again, once the other has gone
        pass


@pytest.mark.parametrize("parts", [{"processes": 2, "index": 1}, {"coordinator": "localhost:1"}, {"index": 0},
                                   {"coordinator": "localhost:1", "processes": 2}])
def test_a_part_of_what_several_processes_need(parts):
    with pytest.raises(ValueError, match="coordinator, --distributed.processes and --distributed.index go together, got"):
        connect(Distributed(**parts))


def test_processes_that_cannot_be():
    with pytest.raises(ValueError, match="index is from 0 to 1 of 2 processes, got 2"):
        connect(Distributed("localhost:1", 2, 2))
    with pytest.raises(ValueError, match="exclude each other"):
        connect(Distributed("localhost:1", pod=True))
    connect(Distributed())
    assert jax.process_count() == 1


CONFIGURATION = """
from __future__ import annotations
import dataclasses
from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, stack_of
from jaxlm.data.source import Source
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Constant

@dataclasses.dataclass(frozen=True)
class Numbers(Source):
    count: int = 3

    def open(self):
        return [f"number {i}" for i in range(self.count)]

def config():
    block = Block(Attention(4, 2, 8), Dense(64), PreNorm(RmsNorm()))
    model = Decoder(32, Embedding(320), stack_of([block]), RmsNorm(), Head(tied=True), length=64)
    return Recipe(model, "nowhere", (Phase(((Numbers(), 1.0),)),), CausalLM(), Optimizer(AdamW(), Constant(1e-3)), 8, 16, 2)
"""


def test_a_configuration_with_its_own_source(tmp_path):
    """Whose annotations are strings, and whose file is called as some module is."""
    before = dict(sys.modules)
    (tmp_path / "json.py").write_text(CONFIGURATION)
    source = read(str(tmp_path / "json.py")).phases[0].sources[0][0]
    assert repr(source) == "Numbers(count=3)" and sys.modules["json"] is json
    assert sys.modules.keys() == before.keys()
    # It reaches workers, which cannot import where it comes from.
    sent = [sys.executable, "-c", "import pickle, sys; print(*pickle.load(sys.stdin.buffer).open())"]
    done = subprocess.run(sent, input=cloudpickle.dumps(source), capture_output=True)
    assert done.stdout.decode().strip() == "number 0 number 1 number 2", done.stderr.decode()


def test_what_is_no_configuration(tmp_path):
    (tmp_path / "README.md").write_text("# Read me")
    with pytest.raises(ValueError, match="README.md is no Python file"):
        read(str(tmp_path / "README.md"))


def test_an_axis_twice(files):
    with pytest.raises(ValueError, match="names an axis twice: data=1 data=7"):
        recipe(files, mesh=read_mesh(("data=1", "data=7")))


@pytest.mark.parametrize(("asked", "sizes"), [
    (("dp",), {"data": 8}), (("fsdp",), {"fsdp": 8}), (("tp",), {"model": 8}), (("fsdp", "model=2"), {"fsdp": 4, "model": 2}),
    (("data=2", "tp"), {"data": 2, "model": 4})])
def test_presets_of_meshes(asked, sizes):
    found = sharding.mesh(**dict(read_mesh(asked)))
    assert {axis: size for axis, size in found.shape.items() if size > 1} == sizes


def letters(text):
    return [ord(letter) for letter in text]


def causal(step):
    return CausalLM()


def test_workers_do_not_hear_ctrl_c(files):
    """A terminal sends it to all processes; the one that waits for the others ends them."""
    plan = Plan((Phase(((JsonLines(str(files / "text.jsonl")), 1.0),)),), letters, causal, 2, 16)
    with Batches(plan, ahead=0) as batches:
        want = [next(batches)["tokens"].tolist() for _ in range(6)]
    with Batches(plan, workers=1, ahead=1) as batches:
        found = [next(batches)["tokens"].tolist()]
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
        found += [next(batches)["tokens"].tolist() for _ in range(5)]
    assert found == want

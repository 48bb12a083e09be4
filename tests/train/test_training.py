"""`python -m train` as users run it: killed, interrupted, resumed, by one process and by two."""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxlm
from infer import session
from jaxlm.data.tokenizer import Tokenizer
from train import __main__ as main
from train import export, tokenizer

ROOT = pathlib.Path(__file__).parents[2]

CONFIG = '''
from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, stack_of
from jaxlm.data.source import JsonLines
from jaxlm.data.stream import Phase
from jaxlm.data.tokenizer_train import BytePairs
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine

def config():
    text = JsonLines({path!r})
    block = Block(Attention(4, 2, 8), Dense(64), PreNorm(RmsNorm()))
    model = Decoder(32, Embedding(320), stack_of([block] * 2), RmsNorm(), Head(tied=True), length=64)
    phase = Phase(((text, 1.0),))
    return Recipe(model, BytePairs(text, 300), (phase,), CausalLM(), Optimizer(AdamW(), Cosine(1e-2, 3, 40)), rows=8, length=64,
                  steps=24, held_out=phase, evaluation_batches=1, checkpoint_every=4, evaluate_every=12)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration and its data."""
    found = tmp_path_factory.mktemp("training")
    numbers = np.random.default_rng(0)
    texts = [" ".join(f"{n} pears" for n in range(start, start + 30)) for start in numbers.integers(0, 99, 120)]
    (found / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (found / "small.py").write_text(CONFIG.format(path=str(found / "text.jsonl")))
    return found


def start(folder, out, *arguments, devices=1):
    """The program, with as many simulated devices."""
    environment = os.environ | {"JAXLM_HOME": str(folder / "home"), "JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "train", str(folder / "small.py"), "--out", str(folder / out), "--json", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def finish(process):
    """What it printed as JSON, once it ended well; of several processes the first prints it."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return next((json.loads(line) for line in out.splitlines() if line.startswith("{")), None)


def records(folder, out, name="metrics"):
    path = folder / out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(folder, out):
    found = records(folder, out)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


@pytest.fixture(scope="module")
def whole(folder):
    """The losses of a run that nobody disturbs."""
    result = finish(start(folder, "whole"))
    assert result["step"] == 24 and result["stopped"] is None and 0 < result["goodput"] < 1
    return losses(folder, "whole")


def test_a_run(folder, whole):
    assert len(whole) == 24 and whole[-1] < 0.5 * whole[0]
    out = folder / "whole"
    assert (out / "loss.png").stat().st_size > 5000 and (out / "config.json").exists() and any((out / "tensorboard").iterdir())
    held_out = records(folder, "whole", "evaluations")
    assert [record["step"] for record in held_out] == [12, 24] and held_out[1]["bits_per_byte"] < held_out[0]["bits_per_byte"]
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == [20, 24]


def test_workers_change_nothing_and_a_profile_is_written(folder, whole):
    finish(start(folder, "profiled", "--workers", "2", "--profile", "--steps", "10"))
    assert losses(folder, "profiled") == whole[:10]
    assert any((folder / "profiled" / "profile").rglob("*.xplane.pb"))


def test_a_run_becomes_a_hugging_face_directory(folder, whole, capsys):
    for step, name in ((None, "newest"), (20, "older")):
        export.main(export.Arguments(folder / "whole", folder / name, step=step, json=True))
        assert json.loads(capsys.readouterr().out)["step"] == (step or 24)
    newest, older = jaxlm.load(folder / "newest"), jaxlm.load(folder / "older")
    _, kept = export.load(folder / "whole")
    assert newest.config.width == 32 and newest.tokenizer.encode("7 pears") == kept.tokenizer.encode("7 pears")
    for one, other in zip(jax.tree.leaves(newest.params), jax.tree.leaves(kept.params), strict=True):
        np.testing.assert_array_equal(one, other)
    text = " ".join(f"{n} pears" for n in range(20, 30))
    found = [float(jaxlm.score(lm, [text])[0].mean()) for lm in (newest, older)]
    assert found[0] > -3.5 and found[0] != found[1]


@pytest.mark.parametrize(("fields", "says"), [
    ({"step": 3}, "no checkpoint of step 3 .* there are 20, 24"), ({"average": True}, "kept no average"),
    ({"run": pathlib.Path("nowhere")}, "there is no checkpoint in .*nowhere")])
def test_what_cannot_be_exported(folder, whole, fields, says):
    with pytest.raises(ValueError, match=says):
        export.main(export.Arguments(**({"run": folder / "whole", "out": folder / "never"} | fields)))
    assert not (folder / "never").exists()


def test_a_tokenizer(folder, capsys):
    tokenizer.main(tokenizer.Arguments(folder / "made", 300, (str(folder / "text.jsonl"),), json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["vocabulary"] == 300 and found["bytes_per_token"] > 1.5
    assert Tokenizer.from_directory(folder / "made").size == 300


ENDLESS = ("--steps", "1000000", "--evaluate-every", "1000000")


def wait_for(folder, out, step, process):
    """Until the record of a step is there, while the program runs."""
    while len(records(folder, out)) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def newest(folder, out):
    """The step of a run's newest checkpoint; one that is not whole has another kind of name."""
    return max((int(path.name) for path in (folder / out / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def killed(folder, out, more, every):
    """Lets a run go on from its newest checkpoint for so many steps at least, kills it, returns that checkpoint's step."""
    begun, told = newest(folder, out), folder / out / "metrics.jsonl"
    before = told.stat().st_ino if told.exists() else None
    process = start(folder, out, *ENDLESS, "--checkpoint-every", str(every))
    while not told.exists() or told.stat().st_ino == before:  # what is there may be of steps that this run has yet to do again
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    wait_for(folder, out, begun + more, process)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL and (f", from step {begun}\n" in said) == (begun > 0), said
    return begun


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_step_it_goes_on_as_if_nothing_had_been(folder, whole, times):
    out, dice, every, begun = f"killed{times}", random.Random(times), 3, []
    for _ in range(times):
        # A second checkpoint is begun when the first is whole, so the first run leaves one.
        begun.append(killed(folder, out, dice.randint(1 if begun else 2 * every + 1, 5 * every), every))
    begun.append(newest(folder, out))
    print(f"runs began at steps {begun}")
    assert begun[0] == 0 and begun == sorted(begun) and min(begun[1:]) >= every
    steps = max(begun[-1] + 3, 24)
    if steps > 24:
        finish(start(folder, f"{out}not", "--steps", str(steps)))
        whole = losses(folder, f"{out}not")
    assert finish(start(folder, out, "--steps", str(steps)))["step"] == steps
    assert losses(folder, out) == whole


def test_sigterm_saves_and_ends_well(folder, whole):
    """To all processes of a run, as schedulers and `timeout` send it."""
    process = start(folder, "terminated", *ENDLESS, "--checkpoint-every", "1000000", "--workers", "2")
    wait_for(folder, "terminated", 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    result = finish(process)
    assert result["stopped"] == "SIGTERM" and result["step"] >= 5
    assert [int(path.name) for path in (folder / "terminated" / "checkpoints").iterdir()] == [result["step"]]
    steps = max(result["step"] + 3, 24)
    assert finish(start(folder, "terminated", "--steps", str(steps)))["step"] == steps
    assert losses(folder, "terminated")[:24] == whole


def two(folder, out, *arguments):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = ("--distributed.coordinator", address, "--distributed.processes", "2", *arguments)
    return [start(folder, out, *shared, "--distributed.index", str(index), devices=2) for index in range(2)]


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop(folder, whole):
    both = two(folder, "told", "--steps", "2000", "--checkpoint-every", "1000", "--evaluate-every", "1000")
    wait_for(folder, "told", 5, both[0])
    both[1].send_signal(signal.SIGTERM)
    first, _ = map(finish, both)
    assert first["stopped"] == "SIGTERM" and 5 <= first["step"] < 2000
    found = losses(folder, "told")
    assert len(found) == first["step"]
    np.testing.assert_allclose(found[:24], whole[:len(found)], rtol=1e-4)
    assert [int(path.name) for path in (folder / "told" / "checkpoints").iterdir()] == [first["step"]]


def test_two_processes_train_and_one_goes_on(folder, whole):
    """The same data in the same order, the same losses."""
    for process in two(folder, "both", "--steps", "10"):
        finish(process)
    np.testing.assert_allclose(losses(folder, "both"), whole[:10], rtol=1e-5)
    result = finish(start(folder, "both"))
    assert result["step"] == 24
    np.testing.assert_allclose(losses(folder, "both"), whole, rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_with_one_line(folder, monkeypatch, tmp_path):
    """That names what was read."""
    monkeypatch.setenv("JAXLM_HOME", str(folder / "home"))
    monkeypatch.setattr(session, "cache_compilations", lambda: None)
    (tmp_path / "far.py").write_text((folder / "small.py").read_text().replace("Cosine(1e-2", "Cosine(1e36"))
    with pytest.raises(SystemExit) as ended, session.errors():
        main.main(main.Arguments(str(tmp_path / "far.py"), tmp_path / "out", steps=3))
    assert re.match(r"error: step 1: loss [\d.]+, gradient norm [\d.]+, but the new weights are not finite; there is no "
                    r"checkpoint; documents as phase/source/number, from 0, of row 0: 0/0/\d+.*, row 7: 0/0/\d+$",
                    ended.value.code)
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize(("arguments", "says"), [
    (("--mesh", "data=3"), "mesh sizes"), (("--mesh", "data"), "axes with their sizes"), (("--rows", "0"), "at least 1"),
    (("--length", "65"), "longer than the model's context of 64")])
def test_bad_arguments(folder, arguments, says):
    process = start(folder, "bad", *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: " in errors and says in errors and "Traceback" not in errors


def test_a_checkpoint_of_another_configuration(folder, whole):
    process = start(folder, "whole", "--rows", "16")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "its rows is 8, here it is 16" in errors and "Traceback" not in errors

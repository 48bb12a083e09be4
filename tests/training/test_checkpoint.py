"""Checkpoints: whole or not there, the same bit for bit, on any mesh; errors that say what to do."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import sharding
from jaxlm.params import Param
from jaxlm.training.checkpoint import CheckpointError, Checkpoints, OtherRun, difference
from jaxlm.training.optimizer import Adafactor, AdamW, Muon, Optimizer
from jaxlm.training.schedule import Constant, Cosine
from jaxlm.training.step import State, begin

ABOUT = {"model": {"width": 8}, "optimizer": "adam"}
ROWS = np.arange(8, dtype=np.int32).reshape(4, 2)
SPEC = {"embedding": {"tokens": Param((8, 4), ("vocab", "embed"), inputs=(1,))},
        "blocks": {"w": Param((2, 128, 256), ("layers", "embed", "mlp"), inputs=(1,)),  # large enough to be factored
                   "scale": Param((2, 4), ("layers", None))}}


def state_of(kind, average=False, frozen=()):
    weights = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.shape[-1]), p.shape), SPEC)
    transform = Optimizer(kind, Constant(0.01), frozen=frozen).transform(SPEC)

    @jax.jit
    def update(weights, moments):
        updates, moments = transform.update(weights, moments, weights)
        return optax.apply_updates(weights, updates), moments

    with jax.numpy_dtype_promotion("standard"):
        state = begin(weights, transform, jax.random.key(7), average)
        params, moments = update(state.params, state.moments)
    return state.replace(params=params, moments=moments, step=state.step + 1)


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def plain(leaf):
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == two.dtype and one.sharding == two.sharding
        assert plain(one).tobytes() == plain(two).tobytes()


SMALL = {"w": jnp.arange(6.0), "key": jax.random.key(1)}


def saved(directory, *steps, about=ABOUT, **options):
    with Checkpoints(directory, about, **options) as kept:
        for step in steps:
            kept.save(step, SMALL, ROWS)


@pytest.mark.parametrize(("kind", "average", "frozen"), [
    (AdamW(), True, ()), (AdamW(), False, ("embedding/*",)), (Adafactor(), False, ()), (Muon(), True, ("blocks/scale",))])
def test_all_optimizers_come_back_bit_for_bit(tmp_path, kind, average, frozen):
    state = state_of(kind, average, frozen)
    with Checkpoints(tmp_path, ABOUT) as kept:
        kept.save(3, state, ROWS)
    with Checkpoints(tmp_path, ABOUT) as kept:
        found = kept.restore(abstract(state), ROWS)
    assert found.step == 3 and isinstance(found.state, State)
    same(found.state, state)
    np.testing.assert_array_equal(found.rows, ROWS)
    assert jax.random.bits(found.state.key) == jax.random.bits(state.key)


def test_keys_keep_their_kind(tmp_path):
    state = {"key": jax.random.key(5, impl="rbg")}
    with Checkpoints(tmp_path, ABOUT) as kept:
        kept.save(1, state, ROWS)
        assert jax.random.key_impl(kept.restore(state, ROWS).state["key"]) == jax.random.key_impl(state["key"])


def placed(tree, mesh, *axes):
    def over(leaf):
        fits = leaf.ndim > 1 and leaf.shape[-1] % 8 == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), axes) if fits else PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(leaf, over(leaf)), tree)


def test_onto_another_mesh_and_onto_one_device(tmp_path):
    state = state_of(AdamW())
    wide = placed(state, sharding.mesh(data=8), "data")
    other = placed(state, sharding.mesh(data=2, fsdp=4), "fsdp")
    assert len(wide.params["blocks"]["w"].sharding.device_set) == 8
    assert wide.params["blocks"]["w"].sharding.shard_shape((2, 128, 256)) == (2, 128, 32)
    with Checkpoints(tmp_path, ABOUT) as kept:
        kept.save(1, wide, ROWS)
        same(kept.restore(abstract(other), ROWS).state, other)
        same(kept.restore(abstract(state), ROWS).state, state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"w": jnp.full((2000, 1000), 1.0, jnp.float32)}
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    compiled = overwrite.lower(state).compile()
    with Checkpoints(tmp_path, ABOUT, last=3) as kept:
        for step in (1, 2, 3):
            kept.save(step, state, ROWS)
            state = jax.block_until_ready(compiled(state))
            kept.wait()
            want = 1.0 if step == 1 else -1.0
            assert bool((kept.restore(state, ROWS, step).state["w"] == want).all())


def test_the_last_and_the_best_stay_also_when_the_run_goes_on_later(tmp_path):
    found = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None}
    with Checkpoints(tmp_path, ABOUT, last=2, best=1) as kept:
        for step, value in found.items():
            kept.save(step, SMALL, ROWS, None if value is None else {"bits_per_byte": value, "loss": 0.0})
        assert kept.latest == 5
    assert sorted(os.listdir(tmp_path)) == ["2", "4", "5"]
    with Checkpoints(tmp_path, ABOUT, last=2, best=1) as kept:
        kept.save(6, SMALL, ROWS, {"loss": 0.0})
        kept.save(7, SMALL, ROWS, {"bits_per_byte": 1.5})
    assert sorted(os.listdir(tmp_path)) == ["2", "6", "7"]
    saved(tmp_path, 8, 9, last=1, best=0)
    assert os.listdir(tmp_path) == ["9"]


WRITE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxlm.training.checkpoint import Checkpoints
kept = Checkpoints(sys.argv[1], {"a": 1})
state = {"w": jax.random.normal(jax.random.key(0), (4000, 2000))}
rows = np.zeros((4, 2), np.int32)
if kept.latest is None:
    kept.save(1, state, rows)
    kept.wait()
print("whole", flush=True)
kept.save(int(sys.argv[2]), state, rows)
print("begun", flush=True)
kept.wait()
"""


def test_what_a_killed_run_left_unfinished_is_not_there(tmp_path):
    cut = 0
    for step, delay in ((2, 0.0), (3, 0.02)):
        with subprocess.Popen([sys.executable, "-c", WRITE, tmp_path, str(step)], stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout.readline() == "whole\n"
            assert program.stdout.readline() == "begun\n"
            time.sleep(delay)
            program.send_signal(signal.SIGKILL)
        cut += not (tmp_path / str(step)).exists()
        state = {"w": jax.ShapeDtypeStruct((4000, 2000), jnp.float32, sharding=jnp.zeros(1).sharding)}
        with Checkpoints(tmp_path, {"a": 1}) as kept:
            found = kept.restore(state, ROWS)
            assert (found.step == step) == (tmp_path / str(step)).exists()
            assert float(found.state["w"].std()) == pytest.approx(1, abs=0.01)
    assert cut, "none was killed in time: the test shows nothing"
    saved(tmp_path, 2, 3, about={"a": 1})
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_half_copies_are_not_there_and_not_in_the_way(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "7.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "1", tmp_path / "8")
    shutil.rmtree(tmp_path / "8" / "state")
    (tmp_path / "9").mkdir()
    with Checkpoints(tmp_path, ABOUT) as kept:
        assert kept.latest == 1 and kept.restore(SMALL, ROWS).step == 1
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 .* whole ones of step 1$"):
            kept.restore(SMALL, ROWS, 8)
        for step in (7, 8, 9):
            kept.save(step, SMALL, ROWS)
        same(kept.restore(SMALL, ROWS).state, SMALL)
    assert sorted(os.listdir(tmp_path)) == ["8", "9"]


def test_one_of_another_run_says_what_differs(tmp_path):
    saved(tmp_path, 4)
    with Checkpoints(tmp_path, ABOUT | {"model": {"width": 16}}) as kept:
        with pytest.raises(CheckpointError, match="step 4 in .* of another run: its model.width is 8, here it is 16"):
            kept.restore(SMALL, ROWS)


def test_what_may_differ_is_told_and_may_be_let_go(tmp_path):
    saved(tmp_path, 4, about=ABOUT | {"data": ["a"], "seed": 0})
    with Checkpoints(tmp_path, ABOUT | {"data": ["b"], "seed": 0}) as kept:
        with pytest.raises(OtherRun, match=r"its data.0 is 'a', here it is 'b'") as error:
            kept.restore(SMALL, ROWS)
        assert error.value.names == {"data"}
        assert kept.restore(SMALL, ROWS, free=("data",)).step == 4
        with pytest.raises(OtherRun) as error:
            kept.restore(SMALL, ROWS[:, :1], free=("data",))
        assert error.value.names == {"shapes"}
    with Checkpoints(tmp_path, {"optimizer": "adam", "data": ["b"], "seed": 1, "more": 1}) as kept:
        with pytest.raises(OtherRun) as error:
            kept.restore(SMALL, ROWS, free=("data",))
        assert error.value.names == {"model", "seed", "more"}


@pytest.mark.parametrize(("before", "after", "says"), [
    (Optimizer(AdamW(), Constant(0.1)), Optimizer(AdamW(weight_decay=0.01), Cosine(0.1, 1, 9), clip=3.0), None),
    (Optimizer(AdamW(), Constant(0.1)), Optimizer(AdamW(), Constant(0.1), clip=None), "inner_state/0/count"),
    (Optimizer(AdamW(), Constant(0.1)), Optimizer(AdamW(), Constant(0.1), multipliers=(("blocks/*", 2.0),)), "inner_state/2"),
    (Optimizer(AdamW(), Constant(0.1)), Optimizer(AdamW(), Constant(0.1), frozen=("embedding/*",)), "mu/embedding"),
    (Optimizer(Adafactor(), Constant(0.1)), Optimizer(Adafactor(relative=False), Constant(0.1)), "inner_state/1/2")],
    ids=["rates", "clip", "multipliers", "frozen", "relative"])
def test_a_state_of_another_form_is_not_damaged(tmp_path, before, after, says):
    """It is told apart before orbax trips over it, parts without any numbers too."""
    weights = jax.tree.map(lambda p: jnp.zeros(p.shape), SPEC)
    old, new = (begin(weights, one.transform(SPEC), jax.random.key(0)) for one in (before, after))
    with Checkpoints(tmp_path, ABOUT) as kept:
        kept.save(1, old, ROWS)
        if says is None:
            same(kept.restore(abstract(new), ROWS).state, old)
        else:
            with pytest.raises(OtherRun, match=f"shapes.state/moments/.*{says}"):
                kept.restore(abstract(new), ROWS)


@pytest.mark.parametrize(("found", "wanted", "says"), [
    ({"a": 1}, {"a": 1}, None), ({"a": [1, 2]}, {"a": (1, 2)}, None), ([], (), None),
    ({"a": 1}, {}, "it has a, here there is none"), ({}, {"a": 1}, "it has no a, here there is one"),
    ({"a": [1, {"b": 2}]}, {"a": (1, {"b": 3})}, "its a.1.b is 2, here it is 3"),
    ({"a": [1]}, {"a": [1, 2]}, "its a is [1], here it is [1, 2]"),
    ({"b": 1, "a": 1}, {"a": 2, "b": 2}, "its a is 1, here it is 2")])
def test_differences(found, wanted, says):
    assert difference(found, wanted) == says


def test_none_and_unknown_steps(tmp_path):
    with Checkpoints(tmp_path / "new", ABOUT) as kept:
        assert kept.latest is None
        with pytest.raises(CheckpointError, match="no checkpoint in .*new; there are no whole ones"):
            kept.restore(SMALL, ROWS)
    saved(tmp_path, 3, 5)
    with Checkpoints(tmp_path, ABOUT) as kept:
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 .* whole ones of step 3, 5$"):
            kept.restore(SMALL, ROWS, 4)
        assert kept.restore(SMALL, ROWS, 3).step == 3


DAMAGE = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jaxlm.training.checkpoint import CheckpointError, Checkpoints
directory, rows = pathlib.Path(sys.argv[1]), np.zeros((4, 2), np.int32)
state = {"w": jax.random.normal(jax.random.key(0), (100, 100))}
with Checkpoints(directory, {}) as kept:
    kept.save(1, state, rows)
    kept.save(2, state, rows)
said = {}
def read(name, state):
    with Checkpoints(directory, {}) as kept:
        try:
            kept.restore(state, rows)
        except CheckpointError as error:
            said[name] = str(error)
        assert kept.restore({"w": jnp.zeros((100, 100))}, rows, 1).step == 1
for part in sys.argv[2:]:
    before = {file: file.read_bytes() for file in (directory / "2").glob(part)}
    for file, content in before.items():
        file.write_bytes(content[:len(content) // 2])
    read(part, state)
    for file, content in before.items():
        file.write_bytes(content)
read("shape", {"w": jnp.zeros((101, 100))})
read("nothing", state)
print(json.dumps(said))
"""


def test_a_damaged_file_is_told_with_the_step(tmp_path):
    """In a program of its own: orbax forgets what else it was reading, which Python complains of later, anywhere."""
    parts = ["about/metadata", "state/manifest.ocdbt", "state/_METADATA", "state/d/*", "state/ocdbt.process_0/d/*", "rows/d/*"]
    program = subprocess.run([sys.executable, "-c", DAMAGE, tmp_path, *parts], capture_output=True, text=True)
    assert not program.returncode, program.stderr
    said = json.loads(program.stdout)
    assert set(said) == {*parts, "shape"}
    shape = said.pop("shape")
    assert shape.endswith("is of another run: its shapes.state/w is 'float32[100, 100]', here it is 'float32[101, 100]'")
    for message in said.values():
        assert re.search(r"step 2 in .* cannot be read .* remove its folder .* of step 1, 2$", message)
        assert len(message) < 900


@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_a_full_disk(tmp_path, pause, capfd):
    """Writes fail as they do there, with another number; the error comes whether one waits for it or it has been for long."""
    large = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, ABOUT) as kept:
        kept.save(1, large, ROWS)
        kept.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        try:
            kept.save(2, large, ROWS)
            time.sleep(pause)
            with pytest.raises(CheckpointError, match=rf"{tmp_path} \(.*File too large\): there are whole ones of step 1$"):
                kept.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
        assert kept.latest == 1
        same(kept.restore(large, ROWS).state, large)
        kept.save(3, large, ROWS)
    assert capfd.readouterr() == ("", "")  # all has been said by the error
    with Checkpoints(tmp_path, ABOUT) as kept:
        assert kept.restore(large, ROWS).step == 3


def test_directories_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "in", "/proc/checkpoints"):
        with pytest.raises(CheckpointError, match=f"cannot be kept in {directory}: "):
            Checkpoints(directory, ABOUT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*Permission denied"):
        with Checkpoints(tmp_path, ABOUT) as kept:
            kept.save(1, SMALL, ROWS)


def test_saving_over_an_old_one_is_an_error_that_names_it(tmp_path):
    with Checkpoints(tmp_path, ABOUT) as kept:
        kept.save(1, SMALL, ROWS)
        with pytest.raises(CheckpointError, match="step 1 already exists"):
            kept.save(1, SMALL, ROWS)

"""The step of training through real TPU compilers, without a TPU: it fits, computes what it should, sends what shards need."""

import contextlib
import io
import json
import pathlib

import pytest
import tyro
from rich.console import Console

from infer import compile as slices
from jaxlm import sharding
from train import compile as program
from train.__main__ import read

pytest.importorskip("libtpu", reason="the TPU compiler comes for Linux on x86-64 only")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CONFIG = """
from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, stack_of
from jaxlm.data.source import Files
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Constant

def config():
    block = Block(Attention(heads=4, kv_heads=2, head_width=128), Dense(1024), PreNorm(RmsNorm()))
    model = Decoder(512, Embedding(4096), stack_of([block] * 4), RmsNorm(), Head(tied=False), 2048)
    return Recipe(model, "none", (Phase(((Files("none"), 1.0),)),), CausalLM(), Optimizer(AdamW(), Constant(1e-3)), rows=16,
                  length=512, steps=1, mesh=(("fsdp", -1),), dtype="bfloat16")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("configs") / "small.py"
    found.write_text(CONFIG)
    return found


def run(path, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        program.main(tyro.cli(program.Arguments, args=[str(path), *arguments, "--json"]))
    return json.loads(out.getvalue().splitlines()[-1]), err.getvalue()


def test_fully_sharded(path):
    found, table = run(path, "--topology", "v5e:2x2", "--remat", "none")
    assert found["fits"] and found["host_callbacks"] == 0 and found["mesh"] == {"fsdp": 4}
    assert found["weight_bytes"] == pytest.approx(4 * found["parameters"] / 4, rel=0.01)
    assert found["moment_bytes"] == pytest.approx(2 * found["weight_bytes"], rel=0.01)
    # Scores of causal queries are cut at their run's end, not at their own: a little more than the model's half.
    assert 1.0 <= found["flops_ratio"] < 1.1, found["flops_ratio"]
    # Every weight is gathered for the forward and the backward pass, in bfloat16, and its gradient is scattered once.
    weights = found["parameters"]
    assert found["collectives"]["all-gather"]["bytes"] < 1.2 * 2 * 2 * weights
    assert "fits" in table and "products" in table


@pytest.mark.parametrize(("usable", "rows", "remat"), [(100, 96, "full"), (15, 12, "full"), (3, 4, "full")])
def test_search(path, monkeypatch, usable, rows, remat):
    def facts(recipe, topology, count):
        needed = recipe.rows * {"none": 4, "products": 2, "full": 1}[recipe.remat]
        tried.append((recipe.rows, recipe.remat))
        return {"rows": recipe.rows, "remat": recipe.remat, "needed_bytes": needed, "fits": needed <= usable}

    tried = []
    monkeypatch.setattr(program, "facts", facts)
    found = program.search(read(str(path)), "v5e:2x2", 1, Console(file=io.StringIO()))
    assert (found["rows"], found["remat"], found["fits"]) == (rows, remat, usable > 3)
    assert len(set(tried)) == len(tried) < 12 and all(rows % 4 == 0 for rows, _ in tried)


def test_search_takes_the_remat_that_computes_least_again(path, monkeypatch):
    monkeypatch.setattr(program, "facts", lambda recipe, *_: {
        "rows": recipe.rows, "remat": recipe.remat, "needed_bytes": 0, "fits": recipe.rows <= 8 and recipe.remat != "none"})
    found = program.search(read(str(path)), "v5e:2x2", 1, Console(file=io.StringIO()))
    assert (found["rows"], found["remat"]) == (8, "products")


def test_slices_are_divided_by_the_outer_axis():
    chips = slices.devices("v5e:2x2", 2)
    mesh = sharding.mesh(devices=chips, data=2, model=-1)
    assert [{chip.slice_index for chip in part.flatten()} for part in mesh.devices] == [{0}, {1}]
    mesh = sharding.mesh(devices=chips, fsdp=-1)
    assert [chip.slice_index for chip in mesh.devices.flatten()] == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="of 2 slices: the size of data or fsdp must be a multiple"):
        sharding.mesh(devices=chips, model=-1)


@pytest.mark.slow
def test_remat(path):
    found, _ = run(path, "--topology", "v5e:2x2", "--remat", "none")
    again, _ = run(path, "--topology", "v5e:2x2", "--remat", "full")
    assert again["temporary_bytes"] < found["temporary_bytes"] and again["flops_ratio"] < 1.1 * 4 / 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [
    ("tiny", "v5e:1x1"), ("smollm2_135m", "v5e:2x2"), ("llama_1b", "v5e:4x4"), ("llama3_8b", "v5p:2x2x1"),
    ("llama3_70b", "v5p:8x8x4")])
def test_shipped_configurations_fit(name, topology):
    found, _ = run(CONFIGS / f"{name}.py", "--topology", topology)
    assert found["fits"] and found["host_callbacks"] == 0
    # Computed again with remat full: a third of what the model needs.
    assert 1.0 < found["flops_ratio"] < 1.1 * {"full": 4 / 3, "products": 1.1}[found["remat"]], found["flops_ratio"]

"""The compile check: real TPU compilers on this machine, without a TPU."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tyro

from infer import compile as program
from infer import hlo
from jaxlm import cache, config, model, params
from jaxlm.decoding.speculative import cost

pytest.importorskip("libtpu", reason="the TPU compiler comes for Linux on x86-64 only")

CONFIGS = pathlib.Path(program.__file__).parents[1] / "configs"

# Sizes of cache and weights all differ, so that copies cannot be mistaken for one another. At 4096 tokens the cache is too
# large to be worth moving to memory on the chip and back with every step, as compilers do with very small ones.
TINY = """
from jaxlm.config import *
def config():
    block = Block(Attention(heads=8, kv_heads=4, head_width={head}), Dense(640), PreNorm(RmsNorm()))
    return Decoder(384, Embedding(1280), stack_of([block] * 3), RmsNorm(), Head(tied=False), 8192)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    paths = {}
    for head in (64, 128):
        paths[head] = tmp_path_factory.mktemp("configs") / f"tiny{head}.py"
        paths[head].write_text(TINY.format(head=head))
    return paths


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        program.main(tyro.cli(program.Arguments, args=[str(one) for one in (*arguments, "--json")]))
    return json.loads(out.getvalue().splitlines()[-1]), err.getvalue()


def good(result):
    """What must hold of every model."""
    assert result["fits"]
    assert result["cache_in_place"]
    assert (result["cache_copies"], result["layer_copies"], result["host_callbacks"]) == (0, 0, 0)
    return True


@pytest.mark.parametrize("batch, head, weights", [(8, 128, "bfloat16"), (1, 64, "int8")])
def test_a_tiny_model_on_four_chips(tiny, batch, head, weights):
    result, table = run("--model", tiny[head], "--topology", "v5e:2x2", "--batch", batch, "--length", 4096, "--prompt", 120,
                        "--weights", weights)
    assert good(result)
    assert (result["chips"], result["mesh"], result["prompt"], result["length"]) == (4, {"model": 4}, 128, 4096)
    cfg = program.read_config(tiny[head])
    assert result["parameters"] == params.count(model.spec(cfg))
    assert result["cache_bytes"] == 3 * batch * 4 * 4096 * head * 2 * 2 // 4
    matrices = result["parameters"] - 7 * 384
    scales = 2 * (1280 + 3 * (16 * head + 640 * 2 + 384)) if weights == "int8" else 0
    split = matrices * (1 if weights == "int8" else 2)
    assert result["weight_bytes"] == pytest.approx(split / 4 + scales + 7 * 384 * 2, rel=0.05)
    # The compiler's own limit, and what it needs beside weights and cache.
    assert 15.5 * 2**30 < result["usable_bytes"] < 16 * 2**30
    assert 0 < result["usable_bytes"] - result["headroom_bytes"] < 2**28
    assert result["weight_bytes"] + result["cache_bytes"] < result["decode"]["needed_bytes"]
    # Two sums a layer, one for the embedding (of values and of scales) and two for the likeliest token.
    assert result["collectives"]["all-reduce"]["count"] == 3 * 2 + 3 + (weights == "int8")
    assert set(result["collectives"]) == {"all-reduce"}
    if batch == 8:  # a single row's products become sums, of which the compiler counts every conversion
        assert 1 <= result["flops_per_step"] / result["minimum_flops_per_step"] < 1.1
    assert "to spare" in table and "host callbacks" in table


def test_sampling_stays_split_over_the_vocabulary(tiny):
    result, _ = run("--model", tiny[128], "--length", 4096, "--prompt", 100, "--sample")
    assert good(result)
    sums = result["collectives"].pop("all-reduce")
    assert not result["collectives"]
    assert sums["bytes"] / sums["count"] < 8 * 384 * 2, "logits went over the wire"


@pytest.mark.parametrize("batch, arguments", [
    (8, ("recycling", "--tree", "chain:3")), pytest.param(1, ("lookup", "--tree", "8"), marks=pytest.mark.slow)])
def test_speculation_on_four_chips(tiny, batch, arguments):
    result, table = run("--model", tiny[128], "--topology", "v5e:2x2", "--batch", batch, "--length", 4096, "--prompt", 120,
                        "--drafter", *arguments)
    assert good(result)
    nodes = 4 if "recycling" in arguments else 8
    assert result["depth"] == nodes - 1
    assert result["length"] == 5120, "what is rejected is written behind the last token"
    [call] = result["calls"]
    assert call["nodes"] == nodes
    assert call["scratch_bytes"] == 3 * batch * 4 * nodes * 128 * 2 * 2 // 4
    # The cache is read as often as for one token.
    assert result["plain"]["bytes_per_step"] < call["bytes_per_step"] < 2 * result["plain"]["bytes_per_step"]
    if batch == 8:  # a single row's products become sums, of which the compiler counts every conversion
        assert 1 <= call["flops_per_step"] / call["minimum_flops_per_step"] < 1.1
        assert nodes <= call["flops_per_step"] / result["plain"]["flops_per_step"] < 1.25 * nodes
    gathered = call["collectives"].get("all-gather", {"bytes": 0})["bytes"]
    assert gathered < batch * nodes * 1280 // 4 * 4, "logits went over the wire"
    assert f"a call on {nodes} nodes" in table


@pytest.mark.slow
def test_every_size_of_tree_is_told_apart(tiny):
    result, table = run("--model", tiny[128], "--topology", "v5e:1x1", "--batch", 8, "--length", 4096, "--drafter", "auto",
                        "--tree", 4, "--prompt", 120)
    assert good(result)
    calls = result["calls"]
    assert [call["nodes"] for call in calls] == [1, 2, 4]
    for fewer, more in zip(calls, calls[1:], strict=False):
        assert fewer["scratch_bytes"] < more["scratch_bytes"]
        assert fewer["bytes_per_step"] < more["bytes_per_step"] < 1.5 * fewer["bytes_per_step"]
        assert fewer["roofline_s"] <= more["roofline_s"]
    # One node is plain decoding.
    assert calls[0]["bytes_per_step"] < 1.5 * result["plain"]["bytes_per_step"]
    assert "by the roofline, not measured" in table


def test_auto_counts_the_sources_keys_and_values(tmp_path):
    path = tmp_path / "both.py"
    path.write_text("""
from jaxlm.config import *
def config():
    inner = Block(Attention(8, 4, 64, causal=False), Dense(640), PreNorm(RmsNorm()))
    block = Block(Attention(8, 4, 64), Dense(640), PreNorm(RmsNorm()),
                  cross=Attention(8, 4, 64, position=None, causal=False, source=384))
    return EncoderDecoder(Encoder(384, Embedding(1280), stack_of([inner]), RmsNorm(), None, 4096),
                          Decoder(384, Embedding(1280), stack_of([block] * 3), RmsNorm(), Head(True), 4096), (0,))
""")
    short, long = (program.Check(program.Arguments(path, "v5e:1x1", 8, 256, source=source, drafter="auto")).seconds
                   for source in (512, 4096))
    read = 3 * 8 * 4 * (4096 - 512) * 64 * 2 * 2
    assert long[0] - short[0] == pytest.approx(read / cost.CHIPS["TPU v5 lite"].bandwidth, rel=1e-3)


def test_auto_counts_the_experts_that_a_tree_touches(tmp_path):
    path = tmp_path / "mixture.py"
    path.write_text("""
from jaxlm.config import *
def config():
    block = Block(Attention(8, 4, 64), Moe(64, Dense(640), TopK(4)), PreNorm(RmsNorm()))
    return Decoder(384, Embedding(1280), stack_of([block] * 3), RmsNorm(), Head(True), 4096)
""")
    check = program.Check(program.Arguments(path, "v5e:1x1", 1, 256, drafter="auto"))
    assert check.drafter.sizes == (1, 2, 4)
    # Of the second node's four experts the first has some already.
    read = 3 * 3 * 384 * 640 * 2 * (4 * 60 / 64)
    assert check.seconds[1] - check.seconds[0] == pytest.approx(read / cost.CHIPS["TPU v5 lite"].bandwidth)


@pytest.mark.parametrize("drafter", ["none", "recycling"])
def test_too_little_memory_is_a_result(tmp_path, drafter):
    path = tmp_path / "huge.py"
    path.write_text(TINY.format(head=128).replace("* 3", "* 3000").replace("Dense(640)", "Dense(65536)"))
    result, table = run("--model", path, "--topology", "v5e:1x1", "--length", 256, "--drafter", drafter)
    assert not result["fits"] and not result["prefill"]["fits"] and not result["decode"]["fits"]
    assert result["weight_bytes"] > 2**34
    assert result["headroom_bytes"] == pytest.approx(result["usable_bytes"] - result["weight_bytes"], rel=0.1)
    assert "too much" in table
    assert "cache_copies" not in result
    if drafter != "none":
        assert result["plain"] == {}
        assert [set(call) for call in result["calls"]] == [{"nodes", "scratch_bytes", "minimum_flops_per_step"}]


def test_a_loop_that_copies_its_cache_is_seen():
    """A cache that goes through the layer scan is written anew with every token."""
    mesh = program.make_mesh("v5e:1x1", "model=-1")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = (6, 8, 4, 256, 128)

    def step(carry):
        at, kv = carry

        def layer(x, kv):
            x = x + jnp.sum(kv[:, :, at].astype(jnp.float32))
            return x, jax.lax.dynamic_update_slice(kv, jnp.full((8, 4, 1, 128), x, kv.dtype), (0, 0, at, 0))
        return at + 1, jax.lax.scan(layer, jnp.float32(0), kv)[1]

    def loop(kv, end):
        return jax.lax.while_loop(lambda carry: carry[0] < end, step, (jnp.int32(0), kv))[1]

    arguments = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place), jax.ShapeDtypeStruct((), jnp.int32, sharding=place))
    module = hlo.Module(jax.jit(loop, donate_argnums=0).lower(*arguments).compile().as_text())
    whole, layer = 6 * 8 * 4 * 256 * 128, 8 * 4 * 256 * 128
    found = hlo.copies(module, module.loop(), {whole, layer})
    assert found[hlo.HBM] > 0
    assert hlo.traffic(module, module.loop()) > 2 * whole * 2


def test_callbacks_for_a_tpu_are_seen():
    mesh = program.make_mesh("v5e:1x1", "model=-1")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def loud(x):
        jax.debug.print("{}", x[0])
        return jax.pure_callback(lambda x: x, x, x)

    lowered = jax.jit(loud).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=place))
    assert hlo.host_transfers(lowered.as_text()) >= 2
    assert program.build(lowered).host_transfers >= 2


def test_the_cache_is_laid_out_with_least_padding():
    """`jaxlm.cache` tells the compiler the order that it takes by itself; another one would cost a copy."""
    mesh = program.make_mesh("v5e:1x1", "model=-1")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for slots, head in ((256, 64), (256, 128), (80, 80), (80, 64), (448, 96), (448, 112), (256, 160), (256, 256)):
        shape = jax.ShapeDtypeStruct((2, 1, 3, slots, head), jnp.bfloat16, sharding=place)
        layout = jax.jit(lambda x: -x).lower(shape).compile().input_formats[0][0].layout
        assert layout.major_to_minor == cache._order(shape.shape), (slots, head)


@pytest.mark.parametrize("message, limits", [
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
     "(20.50G) exceeds available HBM (15.75G). HLO module: jit__run.", (22011707392, 16911433728)),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.00M of 256.00M hbm. "
     "Exceeded hbm capacity by 256.00M.", (1 << 29, 1 << 28)),
    ("INTERNAL: something else (20.50G)", None),
])
def test_errors_of_memory_are_read(message, limits):
    assert program.out_of_memory(message) == limits


@pytest.mark.parametrize("arguments, message", [
    (("--batch", 0), "batch must be at least 1, got 0"),
    (("--length", 16384), r"length \(16384\) <= the model's context \(8192\)"),
    (("--length", 256, "--prompt", 256), r"1 <= prompt \(256\) < length \(256\)"),
    (("--length", 256, "--topology", "v5x:2x2"), "libtpu knows no slice 'v5x:2x2'"),
    (("--length", 256, "--mesh", "model"), "a mesh is given as data=2,model=-1, got 'model'"),
    (("--length", 256, "--mesh", "data=3"), "need 3 devices, there are 4"),
    (("--length", 256, "--drafter", "nonsense"), "there is no drafter 'nonsense'"),
    (("--length", 256, "--drafter", "recycling", "--tree", "wide"), "as a number of nodes or as chain:5, got 'wide'"),
    (("--length", 256, "--drafter", "auto", "--tree", "chain:3"), "in no fixed template"),
    (("--length", 256, "--drafter", "auto", "--topology", "tpu7x:2x2x1"), "auto needs the bandwidth and FLOP/s of 'TPU7x'"),
    (("--length", 256, "--tree", "8"), "a tree is for speculation"),
])
def test_bad_arguments_are_named(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("--model", tiny[128], *arguments)


def test_models_are_python_files_or_config_json(tiny, tmp_path):
    cfg = program.read_config(CONFIGS / "llama3_8b.py")
    assert params.count(model.spec(cfg)) == 8_030_261_248
    assert params.count(model.spec(program.read_config(CONFIGS / "smollm2_135m.py"))) == 134_515_008
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
              "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    read = program.read_config(tmp_path)
    assert read == program.read_config(tmp_path / "config.json")
    assert isinstance(read, config.Decoder) and read.width == 64
    (tmp_path / "other.py").write_text("config = 3")
    for path, message in ((tmp_path / "other.py", "has no function config"), (tmp_path / "gone.py", "is neither a Python file"),
                          (tmp_path / "weights.gguf", "is neither a Python file")):
        with pytest.raises(ValueError, match=message):
            program.read_config(path)


def test_a_missing_compiler_is_named(tiny, monkeypatch):
    def version(name):
        raise program.importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(program.importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[tpu\]'"):
        run("--model", tiny[128], "--length", 256)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    ("--topology", "v5e:2x2", "--batch", 8),
    ("--topology", "v5e:2x2", "--batch", 1),
    ("--topology", "v6e:1x1", "--batch", 8, "--weights", "int8"),
    ("--topology", "v6e:1x1", "--batch", 1, "--weights", "int8"),
    ("--topology", "v5e:2x2", "--batch", 8, "--mesh", "data=2,model=2"),
    ("--topology", "v5e:2x2", "--batch", 8, "--sample"),
], ids=lambda arguments: " ".join(str(one).removeprefix("--") for one in arguments))
def test_llama_3_8b_fits_and_copies_nothing(arguments):
    result, _ = run("--model", CONFIGS / "llama3_8b.py", "--length", 4096, *arguments)
    assert good(result)
    assert result["headroom_bytes"] > 5 << 30
    assert result["bytes_per_step"] < 1.02 * result["minimum_bytes_per_step"]
    if result["batch"] > 1:
        assert result["flops_per_step"] < 1.1 * result["minimum_flops_per_step"]
    assert result["decode"]["temporary_bytes"] < 1 << 30
    sums = result["collectives"].get("all-reduce", {"count": 0, "bytes": 0})
    assert sums["bytes"] < 8 * 4096 * 2 * 80, "more is sent than two activations a layer"
    assert result["collectives"].get("all-gather", {"bytes": 0})["bytes"] < 1 << 16


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [("lookup", "--tree", 8), ("recycling", "--tree", 81), ("auto", "--tree", 16)],
                         ids=lambda drafter: drafter[0])
@pytest.mark.parametrize("arguments", [
    ("--topology", "v5e:2x2", "--batch", 8),
    ("--topology", "v5e:2x2", "--batch", 1),
    ("--topology", "v6e:1x1", "--batch", 8, "--weights", "int8"),
    ("--topology", "v6e:1x1", "--batch", 1, "--weights", "int8"),
], ids=lambda arguments: " ".join(str(one).removeprefix("--") for one in arguments))
def test_llama_3_8b_speculates_without_copies(arguments, drafter):
    result, _ = run("--model", CONFIGS / "llama3_8b.py", "--length", 4096, "--drafter", *drafter, *arguments)
    assert result["fits"] and result["cache_in_place"] and result["host_callbacks"] == 0
    assert result["headroom_bytes"] > 5 << 30
    for call in result["calls"]:
        assert call["cache_copies"] == 0
        assert call["collectives"].get("all-gather", {"bytes": 0})["bytes"] < 1 << 20, "logits went over the wire"
        if "flops_per_step" in call:
            assert call["flops_per_step"] < 1.1 * call["minimum_flops_per_step"]
        # Scores of a layer that do not fit on the chip are written and read again, more than everything else together.
        scores = result["batch"] * call["nodes"] * 32 * result["length"] * 4 // result["chips"]
        if scores < 110 << 20:
            assert call["layer_copies"] == 0
            # The cache has a quarter more slots than the plain loop's, and the logits are written, read and searched.
            logits = result["batch"] * call["nodes"] * 128256 * 4 // result["chips"]
            assert call["bytes_per_step"] < 1.25 * result["plain"]["bytes_per_step"] + 6 * logits


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_smollm2_fits_and_copies_nothing(batch):
    result, _ = run("--model", CONFIGS / "smollm2_135m.py", "--topology", "v5e:1x1", "--length", 4096, "--batch", batch)
    assert good(result)
    assert result["bytes_per_step"] < 1.02 * result["minimum_bytes_per_step"]


@pytest.mark.slow
def test_the_last_line_is_json_and_nothing_else_is_said(tiny):
    def start(*more):
        command = [sys.executable, "-m", "infer.compile", "--model", str(tiny[128]), "--length", "256", "--json", *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=CONFIGS.parent)

    done = start()
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["fits"]
    assert "TPU_ACCELERATOR_TYPE" not in done.stderr
    failed = start("--topology", "v5x:1x1")
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("error: libtpu knows no slice")

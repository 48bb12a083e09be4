"""Mixtures of experts: against what transformers gives, stored by goldens/make_moe.py and live, and what their files are."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxlm
import jaxlm.io
from jaxlm import config, sharding
from jaxlm.io import assemble, families, mxfp4
from jaxlm.io.assemble import disassemble
from jaxlm.model import Model
from tests.io import synthetic
from tests.io.goldens import make_moe

TEXT, NEW = make_moe.TEXT, make_moe.NEW
RNG = np.random.default_rng(3)
TEXTS = [[int(i) for i in RNG.integers(0, make_moe.VOCABULARY, length)] for length in (1, 40)]


@functools.cache
def goldens():
    with np.load(make_moe.PATH) as arrays:
        data = json.loads(arrays["cases"].tobytes())
        return {name: case | {"logits": arrays[f"logits {name}"]} for name, case in data["cases"].items()}


CASES = goldens()


class Source(synthetic.Synthetic):
    """Of these goldens' weights."""

    def read(self, name):
        self.reads.append(name)
        return make_moe.weight(name, self.tensors[name]).astype(self.dtype)


def source(name):
    return Source(CASES[name]["config"], CASES[name]["tensors"])


def load(source, mesh=None):
    cfg = families.read(source.config)
    return Model(cfg, assemble.assemble(cfg, families.find(source.config), source, jnp.float32, mesh))


def same(run, theirs, texts):
    for text in texts:
        np.testing.assert_allclose(run(text), make_moe.logits(theirs, text), rtol=0, atol=5e-5)


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in CASES.items()} == make_moe.CASES
    assert {case["config"]["model_type"] for case in CASES.values()} == {
        name for name, family in families.FAMILIES.items() if family.mixtures and family.kinds == (config.Decoder,)}


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_greedy_text_as_transformers(name):
    lm, case = load(source(name)), CASES[name]
    run = synthetic.runner(lm.params, lm.config, len(TEXT) + NEW)
    np.testing.assert_allclose(run(TEXT), case["logits"], rtol=0, atol=5e-5)
    assert case["margin"] > 2e-4  # else a difference in the text would not be one
    assert synthetic.greedy(run, TEXT, NEW) == case["greedy"]


def test_generation_gives_the_same_text_as_transformers():
    assert jaxlm.generate(load(source("gpt_oss")), [TEXT], NEW).tokens[0].tolist() == CASES["gpt_oss"]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_configs_there_and_back(name):
    case = CASES[name]
    cfg = families.read(case["config"])
    assert families.read(case["written"]) == cfg
    family, values = families.write(cfg)
    assert families.read(values) == cfg
    kind = case["config"]["model_type"]
    assert families.read(families.write(cfg, kind)[1]) == cfg
    assert family.name == kind
    with pytest.raises(ValueError, match="no family of transformers expresses this config. llama: has no mixtures of experts"):
        families.write(cfg, "llama")


@pytest.mark.parametrize("name", CASES)
def test_tensors_there_and_back_bit_for_bit(name):
    lm, given = load(source(name)), source(name)
    written = dict(disassemble(lm.params, lm.config, families.find(given.config)))
    assert {name: list(tensor.shape) for name, tensor in written.items()} == CASES[name]["tensors"]
    for tensor, values in written.items():
        np.testing.assert_array_equal(values, given.read(tensor), err_msg=tensor)


def test_every_tensor_is_read_once_and_none_that_no_device_here_holds():
    given = source("qwen3_moe")
    load(given)
    assert sorted(given.reads) == sorted(given.tensors)


def test_experts_are_split_over_a_mesh():
    whole = load(source("qwen3_moe"))
    split = load(source("qwen3_moe"), sharding.mesh(expert=4, model=2))
    gate = split.params["decoder"]["blocks"]["0"]["0"]["feedforward"]["experts"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 2, 16, 6)  # layers, experts, width, feed-forward width
    jax.tree.map(np.testing.assert_array_equal, whole.params, split.params)


def test_experts_that_other_processes_hold_are_not_read():
    given = source("mixtral")
    cfg = families.read(given.config)
    place = next(place for place in assemble.places(families.find(given.config).table, "model.", cfg)
                 if place.paths == ("decoder/blocks/0/0/feedforward/experts/down",))
    held = {((0, 2), (4, 8), (0, 24), (0, 16)): np.zeros((2, 4, 24, 16), np.float32)}
    for number, name in enumerate(place.names):
        assemble._fill(given, place, name, number, [held])
    assert given.reads == [f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight" for i in range(2) for e in range(4, 8)]
    whole = load(source("mixtral")).params["decoder"]["blocks"]["0"]["0"]["feedforward"]["experts"]["down"]
    np.testing.assert_array_equal(*held.values(), whole[:, 4:])


def test_no_layer_is_dense_by_chance():
    blocks = families.read(CASES["qwen2_moe every second layer, windows"]["config"]).stack.blocks()
    assert [type(block.feedforward) for block in blocks] == [config.Dense, config.Moe] * 2
    assert [block.attention.window for block in blocks] == [5, None, 5, None]
    blocks = families.read(CASES["qwen3_moe some layers dense"]["config"]).stack.blocks()
    assert [type(block.feedforward) for block in blocks] == [config.Moe, config.Dense, config.Moe]


@pytest.mark.parametrize("name, changes, message", [
    ("qwen3_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers = \[2\] is not supported for qwen3_moe: a list of layers from 0"),
    ("qwen3_moe", {"num_experts": None}, "lacks num_experts, which qwen3_moe needs"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported for olmoe: it must be null"),
    ("olmoe", {"head_dim": 8}, "head_dim = 8 is not supported for olmoe: it must be .*, 4"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0 is not supported for gpt_oss: it must be 1.702"),
    ("gpt_oss", {"experts_per_token": 1}, "experts_per_token = 1 is not supported"),
    ("granitemoe", {"logits_scaling": 0}, "logits_scaling = 0 is not supported for granitemoe: logits are divided by it"),
    ("mixtral", {"num_experts_per_tok": 9}, "cannot choose 9 of 8 experts"),
])
def test_errors(name, changes, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES[name]["config"] | changes)


def test_what_released_configs_say_beside_changes_nothing():
    cfg = families.read(CASES["gpt_oss"]["config"])
    assert families.read(CASES["gpt_oss"]["config"] | {
        "initial_context_length": 4096, "experts_per_token": 4, "router_aux_loss_coef": 0.9,
        "output_router_logits": False}) == cfg
    with pytest.raises(ValueError, match="initial_context_length"):
        families.read(CASES["mixtral"]["config"] | {"initial_context_length": 4096})
    plain = {key: value for key, value in CASES["gpt_oss"]["config"].items() if not key.startswith("rope")}
    position = families.read(plain).stack.blocks()[0].attention.position
    assert (position.base, position.scaling.factor, position.scaling.length) == (150000.0, 32.0, 4096)


def test_what_cannot_be_expressed_is_not_written():
    def changed(name, **changes):
        cfg = families.read(CASES[name]["config"])
        blocks = [dataclasses.replace(block, feedforward=dataclasses.replace(block.feedforward, **changes))
                  for block in cfg.stack.blocks()]
        return dataclasses.replace(cfg, stack=config.stack_of(blocks))

    with pytest.raises(ValueError, match="mixtral: its router is a Hash, and must be a TopK"):
        families.write(changed("mixtral", router=config.Hash(2)), "mixtral")
    with pytest.raises(ValueError, match="mixtral: .*score is .*SIGMOID.*, and would be|mixtral: .*score is .*SIGMOID"):
        families.write(changed("mixtral", router=config.TopK(2, config.Score.SIGMOID, True)))
    with pytest.raises(ValueError, match="capacity is CapacityTokens.*would be None"):
        families.write(changed("olmoe", capacity=config.CapacityTokens(3)), "olmoe")
    with pytest.raises(ValueError, match="qwen2_moe: its mixtures have no shared layer"):
        families.write(changed("qwen2_moe", shared=None, shared_gate=False), "qwen2_moe")
    with pytest.raises(ValueError, match="mixtral: no layer is a mixture of experts"):
        families.write(families.read(synthetic.case("llama").config), "mixtral")


def test_missing_experts_are_named():
    given = source("mixtral")
    del given.tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    with pytest.raises(ValueError, match="missing tensors: model.layers.1.block_sparse_moe.experts.5.w2.weight"):
        load(given)


# GPT-OSS as it is released: weights of 4 bits.

def packed(folder):
    """A directory with a tiny GPT-OSS of random blocks, and the tensors that they stand for."""
    hf = make_moe.GPT_OSS | {"hidden_size": 32, "intermediate_size": 64}
    cfg = families.read(hf)
    tensors = {name: make_moe.weight(name, place.shape)
               for place in assemble.places(families.FAMILIES["gpt_oss"].table, "model.", cfg) for name in place.names}
    held = {}
    for name, tensor in list(tensors.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            held[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = RNG.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = RNG.integers(118, 123, (experts, outputs, inputs // 32), np.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = mxfp4.unpack(blocks, scales).swapaxes(1, 2)
    folder.mkdir()
    safetensors.numpy.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}}))
    return cfg, tensors, held


def test_numbers_of_four_bits():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks, scales = RNG.integers(0, 256, (3, 2, 16), np.uint8), np.array([[127, 130], [0, 252], [126, 100]], np.uint8)
    expected = [[values[half] * 2.0 ** (int(scale) - 127) for byte in row for half in (byte & 15, byte >> 4)]
                for row, scale in zip(blocks.reshape(6, 16).tolist(), scales.ravel(), strict=True)]
    np.testing.assert_array_equal(mxfp4.unpack(blocks, scales), np.reshape(np.array(expected, np.float32), (3, 64)))
    assert np.isnan(mxfp4.unpack(blocks[:1, :1], np.array([[255]], np.uint8))).all()


def test_mxfp4_is_read_as_what_it_stands_for(tmp_path):
    cfg, tensors, held = packed(tmp_path / "packed")
    lm = jaxlm.load(tmp_path / "packed")
    assert lm.config == cfg
    for name, tensor in disassemble(lm.params, cfg, families.FAMILIES["gpt_oss"]):
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    half = jaxlm.load(tmp_path / "packed", dtype=jnp.bfloat16)  # 4 bits and a power of 2 lose nothing in 16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), lm.params, half.params)
    jaxlm.save(lm, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, jaxlm.load(tmp_path / "plain").params, lm.params)
    file, name = tmp_path / "packed" / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    for change, message in (
            ({f"{name}_scales": held[f"{name}_scales"][:, :, :1]}, f"tensor {name}_blocks has shape .* {name}_scales .*: need"),
            ({f"{name}_scales": held[f"{name}_scales"] | 255}, f"tensor {name}.. holds NaN")):
        safetensors.numpy.save_file(held | change, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            jaxlm.load(tmp_path / "packed")
    del held[f"{name}_scales"]
    safetensors.numpy.save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name}_blocks has no {name}_scales beside it"):
        jaxlm.load(tmp_path / "packed")


# GGUF files, written here with llama.cpp's names and orders.

SIZES = {"block_count": 2, "context_length": 128, "embedding_length": 16, "feed_forward_length": 24, "attention.head_count": 4,
         "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": 8, "expert_used_count": 2}
SMALL = SIZES | {"attention.layer_norm_rms_epsilon": 1e-6}
FILES = {
    "mixtral": ("llama", SIZES | {"rope.freq_base": 10000.0}),
    "mixtral window, three experts": ("llama", SIZES | {"attention.sliding_window": 6, "expert_used_count": 3}),
    "qwen2_moe": ("qwen2moe", SMALL | {"expert_feed_forward_length": 12, "expert_shared_feed_forward_length": 20}),
    "qwen3_moe": ("qwen3moe", SMALL | {"attention.key_length": 8, "attention.value_length": 8}),
    "olmoe": ("olmoe", SIZES | {"expert_used_count": 3}),
    "olmoe normalized, biases": ("olmoe", SIZES | {"expert_used_count": 3, "expert_weights_norm": True}),
    "granitemoe": ("granitemoe", SMALL | {"attention.scale": 0.7, "embedding_scale": 1.5, "logit_scale": 0.5,
                                          "residual_scale": 0.6}),
    "granitemoeshared": ("granitemoe", SMALL | {"attention.scale": 0.7, "embedding_scale": 1.5, "logit_scale": 0.5,
                                                "residual_scale": 0.6, "expert_shared_feed_forward_length": 20}),
    "gpt_oss": ("gpt-oss", SIZES | {
        "attention.key_length": 8, "attention.sliding_window": 5, "expert_used_count": 4, "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 16}),
}
OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
INNER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
         "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.router.layer": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp",
         "mlp.router": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
         "shared_mlp.output_linear": "ffn_down_shexp", "block_sparse_moe.output_linear": "ffn_down_exps",
         "self_attn.sinks": "attn_sinks"}
INNER |= {f"self_attn.{part}": f"attn_{part[0]}" for part in ("q_proj", "k_proj", "v_proj")}
INNER |= {f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"}
INNER |= {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
EACH = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def converted(architecture, tensors):
    """Released tensors as llama.cpp's conversion leaves them."""
    from tests.io.test_gguf import pairs

    out, stacks = {}, {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in OUTER:
            out[f"{OUTER[module]}.{part}"] = tensor
            continue
        _, _, i, inner = name.split(".", 3)
        if expert := re.search(r"experts\.(\d+)\.(\w+)\.weight", inner):
            stacks.setdefault(f"blk.{i}.ffn_{EACH[expert[2]]}_exps.weight", {})[int(expert[1])] = tensor
        elif "input_linear" in inner:
            end = "shexp" if "shared" in inner else "exps"
            gate, up = np.split(tensor, 2, axis=-2)
            out |= {f"blk.{i}.ffn_gate_{end}.weight": gate, f"blk.{i}.ffn_up_{end}.weight": up}
        elif "experts.gate_up_proj" in inner:
            end = "bias" if inner.endswith("bias") else "weight"
            for first, kind in enumerate(("gate", "up")):
                taken = tensor[..., first::2]
                out[f"blk.{i}.ffn_{kind}_exps.{end}"] = taken if end == "bias" else taken.swapaxes(1, 2)
        elif "experts.down_proj" in inner:
            bias = inner.endswith("bias")
            out[f"blk.{i}.ffn_down_exps.{'bias' if bias else 'weight'}"] = tensor if bias else tensor.swapaxes(1, 2)
        else:
            module, _, part = inner.rpartition(".") if not inner.endswith("sinks") else (inner, ".", "weight")
            if architecture in ("llama", "granitemoe") and module.endswith(("q_proj", "k_proj")):
                tensor = pairs(4 if "q_proj" in module else 2)(tensor)
            theirs = "post_attention_norm" if architecture == "gpt-oss" and "post_att" in module else INNER[module]
            out[f"blk.{i}.{theirs}.{part}"] = tensor.reshape(-1) if "shared_expert_gate" in module else tensor
    out |= {name: np.stack([stack[e] for e in range(len(stack))]) for name, stack in stacks.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


def written(path, name, **fields):
    from tests.io.test_gguf import write

    given, (architecture, usual) = source(name), FILES[name]
    tensors = {one: given.read(one) for one in given.tensors}
    return write(path, architecture, usual | fields, converted(architecture, tensors))


@pytest.mark.parametrize("name", FILES)
def test_gguf(name, tmp_path):
    pytest.importorskip("gguf")
    lm, whole = jaxlm.load(written(tmp_path / "m.gguf", name)), load(source(name))
    assert lm.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, lm.params, whole.params)


def test_gguf_experts_that_are_quantised(tmp_path):
    gguf = pytest.importorskip("gguf")
    from tests.io.test_gguf import write

    cfg, tensors, _ = packed(tmp_path / "packed")
    shapes = converted("gpt-oss", tensors)
    packs = {name: gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0) for name, tensor in shapes.items()
             if name.endswith("exps.weight")}
    fields = FILES["gpt_oss"][1] | {"embedding_length": 32, "feed_forward_length": 64}
    file = write(tmp_path / "m.gguf", "gpt-oss", fields, shapes | packs, dict.fromkeys(packs, gguf.GGMLQuantizationType.Q8_0))
    lm = jaxlm.load(file)
    assert lm.config == cfg
    experts = lm.params["decoder"]["blocks"]["0"]
    for i in ("0", "1"):
        for kind in ("gate", "up", "down"):
            values = gguf.quants.dequantize(packs[f"blk.{i}.ffn_{kind}_exps.weight"], gguf.GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(experts[i]["feedforward"]["experts"][kind][0], values.swapaxes(1, 2))


@pytest.mark.parametrize("name, fields, message", [
    ("mixtral", {"expert_gating_func": 2}, "llama.expert_gating_func is 2"),
    ("gpt_oss", {"expert_gating_func": 2}, "experts chosen by function 2: not supported for gpt-oss"),
    ("granitemoe", {"rope.scaling.finetuned": False}, "no rotary position"),
    ("qwen3_moe", {"expert_count": 9}, r"mlp.gate.weight has shape \(8, 16\); the config needs \(9, 16\)"),
])
def test_gguf_that_is_not_supported(name, fields, message, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=message):
        jaxlm.load(written(tmp_path / "m.gguf", name, **fields))


# Against transformers itself.

def parity(function):
    return pytest.mark.parity(pytest.mark.filterwarnings("ignore")(function))


@parity
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_with_transformers(name, tmp_path):
    theirs, tensors = make_moe.build(make_moe.CASES[name])
    assert tensors == CASES[name]["tensors"]
    np.testing.assert_allclose(make_moe.logits(theirs, TEXT), CASES[name]["logits"], rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "released")
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    lm = jaxlm.load(tmp_path / "released")
    assert lm.config == families.read(make_moe.CASES[name])
    together = jaxlm.load(tmp_path / "theirs")
    assert together.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, together.params, lm.params)
    run = synthetic.runner(lm.params, lm.config, 40)
    same(run, theirs, TEXTS)
    jaxlm.save(lm, tmp_path / "ours")
    back = make_moe.load(tmp_path / "ours")
    assert type(back) is type(theirs)
    same(run, back, TEXTS)
    import torch
    out = back.generate(torch.tensor([TEXT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[0, len(TEXT):].tolist() == CASES[name]["greedy"]


@parity
def test_transformers_writes_experts_together_where_it_is_told_to(tmp_path):
    """Else the test above would read the same files twice."""
    theirs, _ = make_moe.build(make_moe.MIXTRAL)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert names["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 48, 16)


@parity
def test_bfloat16_and_shards_both_ways(tmp_path):
    import torch

    theirs, _ = make_moe.build(make_moe.CASES["granitemoeshared"])
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    jaxlm.save(jaxlm.load(tmp_path / "theirs", dtype=jnp.bfloat16), tmp_path / "ours", shard_bytes=20000,
               family="granitemoeshared")
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    back = dict(make_moe.load(tmp_path / "ours").named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(back[name].to(torch.bfloat16), parameter), name


@parity
def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    import torch
    import transformers

    packed(tmp_path / "packed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True)).eval()
    lm = jaxlm.load(tmp_path / "packed")
    same(synthetic.runner(lm.params, lm.config, 40), theirs, TEXTS)


@parity
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_same_of_gguf_files(name, tmp_path):
    import torch
    import transformers

    path = written(tmp_path / "m.gguf", name, vocab_size=make_moe.VOCABULARY)
    made = transformers.AutoConfig.for_model(**make_moe.CASES[name])
    made._attn_implementation = made._experts_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=made, dtype=torch.float32)
    lm = jaxlm.load(path)
    same(synthetic.runner(lm.params, lm.config, 40), theirs.eval(), TEXTS)

"""load and save: directories whole and broken, dtypes, meshes, memory, and what is refused."""

import dataclasses
import json
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxlm.io
from jaxlm import model, params, sharding, weight
from jaxlm.io import assemble, families
from jaxlm.io.huggingface import HuggingFaceSource
from jaxlm.model import Model
from tests.io import synthetic

TEXT, CASES = synthetic.goldens()


def tensors(source):
    return {name: source.read(name) for name in source.names()}


def directory(path, source, arrays=None, files=1):
    """A checkpoint as transformers writes it, in so many files."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(source.config))
    arrays = tensors(source) if arrays is None else arrays
    names = sorted(arrays)
    if files == 1:
        safetensors.numpy.save_file(arrays, path / "model.safetensors")
        return path
    places = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        safetensors.numpy.save_file({name: arrays[name] for name in names if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def built(name, dtype=jnp.float32, mesh=None):
    source = synthetic.case(name)
    cfg = families.read(source.config)
    return Model(cfg, assemble.assemble(cfg, families.find(source.config), source, dtype, mesh))


def logits(loaded):
    return synthetic.runner(loaded.params, loaded.config, len(TEXT))(TEXT)


def equal(a, b):
    return a.config == b.config and jax.tree.all(jax.tree.map(
        lambda x, y: x.dtype == y.dtype and bool(jnp.array_equal(x, y)), a.params, b.params))


# What loads.

@pytest.mark.parametrize("files", [1, 3])
def test_a_directory_gives_what_transformers_gave(tmp_path, files):
    loaded = jaxlm.io.load(directory(tmp_path, synthetic.case("qwen3"), files=files))
    assert loaded.tokenizer is None
    np.testing.assert_allclose(logits(loaded), CASES["qwen3"]["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama tied, biases, one key-value head", "phi3", "gpt2", "pythia", "falcon new", "codegen"])
@pytest.mark.parametrize("shard_bytes", [2 << 30, 20000])
def test_saved_and_loaded_is_the_same(tmp_path, name, shard_bytes):
    first = built(name)
    jaxlm.io.save(first, tmp_path / "a" / "b", shard_bytes=shard_bytes)
    files = sorted(file.name for file in (tmp_path / "a" / "b").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes > 20000)
    assert len({file.stat().st_mode for file in (tmp_path / "a" / "b").iterdir()}) == 1
    assert equal(jaxlm.io.load(tmp_path / "a" / "b"), first)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_comes_back_as_it_was(name):
    source = synthetic.case(name)
    cfg, family = families.read(source.config), families.find(source.config)
    weights = assemble.assemble(cfg, family, source, np.float32)
    assert sorted(source.reads) == sorted(set(source.reads))  # each read once
    back = dict(assemble.disassemble(weights, cfg, family))
    renamed = {"embed_out.weight": "lm_head.weight"}  # transformers' own name for what it writes as embed_out
    dropped = {one for one in source.names() if "vision_tower" in one or "multi_modal" in one}
    assert {renamed.get(one, one) for one in back} == source.names() - dropped
    for one, tensor in back.items():
        assert tensor.flags.c_contiguous
        np.testing.assert_array_equal(tensor, source.read(renamed.get(one, one)))


def test_names_without_the_prefix_of_the_base_model(tmp_path):
    source = synthetic.case("gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    assert equal(jaxlm.io.load(directory(tmp_path, source, bare)), built("gpt2"))


def test_other_names_of_the_head_and_of_what_is_tied(tmp_path):
    source = synthetic.case("pythia")
    arrays = tensors(source)
    arrays["embed_out.weight"] = arrays.pop("lm_head.weight")
    assert equal(jaxlm.io.load(directory(tmp_path / "head", source, arrays)), built("pythia"))
    source = synthetic.case("olmo2 tied, biases")
    arrays = tensors(source)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    assert equal(jaxlm.io.load(directory(tmp_path / "both", source, arrays)), built("olmo2 tied, biases"))
    del arrays["model.embed_tokens.weight"]
    assert equal(jaxlm.io.load(directory(tmp_path / "one", source, arrays)), built("olmo2 tied, biases"))


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    for name, buffer in (("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.1.attn.bias"),
                         ("pythia", "gpt_neox.layers.0.attention.masked_bias")):
        source = synthetic.case(name)
        arrays = tensors(source) | {buffer: np.ones(3, np.float32)}
        assert equal(jaxlm.io.load(directory(tmp_path / name, source, arrays)), built(name))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, jnp.bfloat16, np.float16])
def test_dtypes(tmp_path, stored, wanted):
    stored = np.dtype(stored)
    loaded = jaxlm.io.load(directory(tmp_path, synthetic.case("mpt", stored)), dtype=wanted)
    leaves = params.paths(loaded.params)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32 if wanted is None else wanted)}
    here = synthetic.case("mpt", stored).read("transformer.blocks.1.attn.out_proj.weight").T.reshape(4, 8, 32)
    np.testing.assert_array_equal(leaves["decoder/blocks/0/0/attention/o"][1], here.astype(np.dtype(wanted or np.float32)))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "model": 2, "data": 2}, {"model": 4, "fsdp": 2}])
@pytest.mark.parametrize("name", ["llama", "falcon new", "phi3", "gpt2 scaled by layer, narrow", "bloom"])
def test_a_mesh(name, sizes):
    mesh = sharding.mesh(**sizes)
    spread, whole = built(name, mesh=mesh), built(name)
    wanted = params.paths(sharding.shardings(model.spec(spread.config), mesh))
    for path, leaf in params.paths(spread.params).items():
        assert leaf.sharding == wanted[path]
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(spread.params))
    assert held < params.count(whole.params) / 2
    assert equal(Model(whole.config, jax.device_get(spread.params)), Model(whole.config, jax.device_get(whole.params)))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(spread), CASES[name]["logits"], rtol=0, atol=1e-4)


def test_without_a_mesh_on_this_processs_first_device(monkeypatch):
    mine = jax.devices()[3]
    monkeypatch.setattr(jax, "local_devices", lambda: [mine])
    assert {leaf.device for leaf in jax.tree.leaves(built("qwen3").params)} == {mine}


def test_no_second_copy_of_the_model(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 2048}
    config = CASES["llama"]["config"] | sizes
    cfg = families.read(config)
    shapes = {name: place.shape for place in assemble.places(families.FAMILIES["llama"].table, "model.", cfg)
              for name in place.names}
    path = directory(tmp_path, synthetic.Synthetic(config, shapes, ml_dtypes.bfloat16))
    jaxlm.io.load(path)  # what is allocated once
    tracemalloc.start()
    loaded = jaxlm.io.load(path)
    jax.block_until_ready(loaded.params)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert kept > 0.98 * total  # the arrays are the very buffers that were filled
    assert peak < 1.05 * total


def test_transposed_copies():
    rng = np.random.default_rng(0)
    for shape, order in (((70, 33), (1, 0)), ((5, 40, 9), (2, 0, 1)), ((90, 6, 7), (1, 2, 0)), ((4, 5), (0, 1)),
                         ((1, 8), (1, 0)), ((3, 2, 130), (0, 2, 1)), ((6,), (0,)), ((0, 4), (1, 0))):
        from_ = rng.standard_normal(shape).astype(np.float32)
        for part in (from_, from_[:, ::2] if from_.ndim > 1 else from_[::2]):
            lying = part.transpose(order)
            to = np.zeros(lying.shape, ml_dtypes.bfloat16)
            assemble._copy(to, lying)
            np.testing.assert_array_equal(to, lying.astype(ml_dtypes.bfloat16))


def test_int8_weights_are_saved_as_what_they_stand_for(tmp_path):
    plain = built("llama")
    leaves = params.paths(model.spec(plain.config))
    small = jax.tree_util.tree_map_with_path(
        lambda path, leaf: weight.quantize(leaf, leaves[jax.tree_util.keystr(path, simple=True, separator="/")].inputs)
        if leaf.ndim > 2 else leaf, plain.params)
    jaxlm.io.save(Model(plain.config, small), tmp_path)
    dense = jax.tree.map(weight.dense, small, is_leaf=weight.is_weight)
    assert equal(jaxlm.io.load(tmp_path), Model(plain.config, dense))


# Where it looks.

def test_a_name_goes_to_the_hub(tmp_path, monkeypatch):
    path, asked = directory(tmp_path, synthetic.case("llama")), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(path))
    assert equal(jaxlm.io.load("some-org/some.model"), built("llama"))
    assert asked == ["some-org/some.model"]


def test_the_hub_is_out_of_reach():  # the tests run with HF_HUB_OFFLINE
    with pytest.raises(OSError, match=r"nobody/nothing is no local directory.*hf download nobody/nothing"):
        jaxlm.io.load("nobody/nothing")


@pytest.mark.parametrize("files, message", [
    ([], "no checkpoint: it has no config.json"),
    (["model.safetensors"], "no checkpoint: it has no config.json"),
    (["a.gguf", "b.gguf"], r"several models, a\.gguf, b\.gguf"),
    (["config.json"], "neither model.safetensors nor model.safetensors.index.json"),
    (["config.json", "pytorch_model.bin"], r"it has pytorch_model\.bin: `python -m infer\.convert --from .* --to NEW` makes"),
    (["config.json", "tf_model.h5"], r"it has tf_model\.h5: load these in transformers"),
    (["config.json", "x.safetensors", "y.safetensors"], r"x\.safetensors, y\.safetensors and no model\.safetensors\.index"),
])
def test_what_is_no_checkpoint(tmp_path, files, message):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        jaxlm.io.load(tmp_path)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a directory, a GGUF file"):
        jaxlm.io.load(tmp_path / "nothing" / "here")
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(ValueError, match="weights.bin is not a GGUF file"):
        jaxlm.io.load(tmp_path / "weights.bin")


@pytest.mark.parametrize("text, message", [("{", "config.json is not JSON"), ("[]", "does not hold an object")])
def test_a_config_that_is_none(tmp_path, text, message):
    path = directory(tmp_path, synthetic.case("llama"))
    (path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        jaxlm.io.load(path)


# Files that are broken.

@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(tmp_path, keep):
    file = directory(tmp_path, synthetic.case("llama")) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        jaxlm.io.load(tmp_path)


def test_a_missing_shard(tmp_path):
    directory(tmp_path, synthetic.case("llama"), files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors, which model\.safetensors\.index\.json"):
        jaxlm.io.load(tmp_path)


def test_an_index_that_is_wrong(tmp_path):
    directory(tmp_path, synthetic.case("llama"), files=2)
    file = tmp_path / "model.safetensors.index.json"
    places = json.loads(file.read_text())["weight_map"]
    file.write_text(json.dumps({"weight_map": places | {"ghost": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that ghost is in model-00001-of-00002\.safetensors, and it is not"):
        jaxlm.io.load(tmp_path)
    file.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        jaxlm.io.load(tmp_path)


# Tensors that do not fit.

Q = "model.layers.1.self_attn.q_proj.weight"


def altered(name, change):
    source = synthetic.case(name)
    arrays = tensors(source)
    change(arrays)
    return source, arrays


def load_altered(path, name, change):
    return jaxlm.io.load(directory(path, *altered(name, change)))


@pytest.mark.parametrize("name, change, message", [
    ("llama", lambda a: a.pop(Q), f"missing tensors: {Q}"),
    ("llama", lambda a: a.pop("lm_head.weight"), "missing tensors: lm_head.weight"),
    ("llama", lambda a: a.clear() or a.update(x=np.ones(1, np.float32)), "missing tensors: .* and 22 more"),
    ("llama", lambda a: a.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}),
     r"a llama of this config has no place for: model\.layers\.0\.self_attn\.q_proj\.bias"),
    ("llama", lambda a: a.update({"model.layers.3.input_layernorm.weight": np.ones(32, np.float32)}),
     r"no place for: model\.layers\.3\.input_layernorm\.weight"),
    ("llama", lambda a: a.update({Q: a[Q][:-1]}), rf"tensor {Q} has shape \(31, 32\); the config needs \(32, 32\)"),
    ("gpt2", lambda a: a.update({"transformer.h.0.attn.c_attn.weight": a["transformer.h.0.attn.c_attn.weight"].T.copy()}),
     r"c_attn.weight has shape \(96, 32\); the config needs \(32, 96\)"),
    ("llama", lambda a: np.put(a[Q], 77, np.nan), f"tensor {Q} holds NaN or infinity"),
    ("llama", lambda a: np.put(a["model.norm.weight"], 3, -np.inf), "tensor model.norm.weight holds NaN or infinity"),
    ("phi3", lambda a: np.put(a["model.layers.2.self_attn.qkv_proj.weight"], -1, np.nan), "layers.2.self_attn.qkv_proj.weight"),
    ("llama", lambda a: a.update({Q: a[Q].astype(np.int32)}), f"tensor {Q} is of type I32; there is F32, F16, BF16"),
    ("qwen2 tied, windows", lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"] + 1}),
     r"the config ties tensor lm_head\.weight to model\.embed_tokens\.weight, and they differ"),
])
def test_tensors_that_do_not_fit(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        load_altered(tmp_path, name, change)


def test_a_nan_is_found_on_a_mesh_and_in_bfloat16(tmp_path):
    source, arrays = altered("llama", lambda a: np.put(a[Q], -1, np.nan))
    path = directory(tmp_path, source, arrays)
    for options in ({"mesh": sharding.mesh(fsdp=4, model=2)}, {"dtype": jnp.bfloat16}):
        with pytest.raises(ValueError, match=f"tensor {Q} holds NaN"):
            jaxlm.io.load(path, **options)


def test_what_a_dtype_cannot_hold(tmp_path):
    source, arrays = altered("llama", lambda a: np.put(a[Q], 5, 1e6))
    path = directory(tmp_path, source, arrays)
    assert jaxlm.io.load(path).config.width == 32
    with pytest.raises(ValueError, match=rf"tensor {Q} holds NaN or infinity \(as float16\)"):
        jaxlm.io.load(path, dtype=np.float16)


# Configs that cannot be expressed.

def test_an_unknown_architecture_names_those_there_are():
    with pytest.raises(ValueError, match=r"'mamba', architectures \['MambaForCausalLM'\].*llama \(Llama 2, 3.*bloom \(BLOOM"):
        families.read({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    with pytest.raises(ValueError, match="config.json has no model_type"):
        families.read({})


@pytest.mark.parametrize("name, change, message", [
    ("llama", {"hidden_size": None}, "config.json lacks hidden_size, which llama needs"),
    ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 .* a positive whole number"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
    ("llama", {"attention_bias": "yes"}, "attention_bias = 'yes' .* true or false"),
    ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported for llama: there is silu"),
    ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} .* does not know this key"),
    ("llama", {"num_experts": 8}, "num_experts = 8 is not supported for llama: jaxlm does not know this key"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported for llama: it must be 1"),
    ("pythia", {"rotary_pct": 0.2}, "Rope.width must be a positive even number"),
    ("llama", {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1]}}, "rope_type = 'mrope' .* llama3, longrope"),
    ("llama", {"rope_scaling": {"type": "linear"}}, r"factor = None is not supported for llama \(rope_scaling\)"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast = 3"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling = 'linear' .* an object is needed"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
     "rope_parameters says something else"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention = "),
    ("llama", {"original_max_position_embeddings": 8, "rope_scaling": {
        "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}}, "the scaling's own says 16"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
     "dynamic scaling starts at max_position_embeddings"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "all layers of a Mistral"),
    ("qwen2", {"attention_bias": False}, "attention_bias = False"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "a list of 3 of full_attention and sliding_attention"),
    ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers = \[1, 2\]"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "its type must be longrope"),
    ("phi3 longrope", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "a list of 4 numbers"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm' .* starcoder2: it must be 'layer_norm'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma", {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_activation says"),
    ("gemma2", {"sliding_window_size": 9}, "sliding_window_size = 9"),
    ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0 .* it must be null"),
    ("gemma3", {"rope_parameters": {"rope_theta": 5.0}}, r"rope_theta = 5.0 is not supported for gemma3_text \(rope_par"),
    ("gemma3 with a vision part", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2", {"n_embd": 30}, "n_embd = 30 .* a multiple of n_head, 4"),
    ("gpt2", {"hidden_size": 64}, "hidden_size = 64 contradicts n_embd = 32"),
    ("codegen", {"n_head": 2}, "n_head = 2 .* a multiple of 4"),
    ("codegen", {"rotary_dim": None}, "lacks rotary_dim"),
    ("falcon new", {"parallel_attn": False}, "parallel_attn = False"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
    ("falcon rw", {"hidden_size": 128}, "heads of width 32; with ALiBi it must be 4, 16, 64 or 256"),
    ("mpt", {"attn_config": {"qk_ln": True}}, r"qk_ln = True is not supported for mpt \(attn_config\)"),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi = False"),
    ("mpt", {"logit_scale": 0.5}, "logit_scale = 0.5"),
    ("mpt", {"no_bias": False}, "no_bias = False"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
])
def test_configs_that_cannot_be_expressed(name, change, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES[name]["config"] | change)


def test_keys_that_change_nothing():
    for name, keys in (
        ("llama", {"attention_dropout": 0.1, "use_cache": False, "pretraining_tp": 2, "torch_dtype": "bfloat16",
                   "unknown": None, "rope_interleaved": False}),
        ("gpt2", {"summary_type": "cls_index", "n_ctx": 128, "task_specific_params": {"text-generation": {}}}),
        ("bloom", {"offset_alibi": 100, "skip_bias_add": True, "masked_softmax_fusion": True}),
        ("mpt", {"init_config": {"name": "kaiming_normal_"}, "attn_config": {"attn_impl": "torch", "attn_pdrop": 0}}),
        ("gemma2", {"sliding_window_size": 5, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
        ("gemma3", {"_sliding_window_pattern": 3}),
    ):
        assert families.read(CASES[name]["config"] | keys) == families.read(CASES[name]["config"])


@pytest.mark.parametrize("name, keys", [
    ("llama", {"hidden_act": "gelu"}), ("llama", {"rms_norm_eps": 1e-3}), ("llama", {"rope_theta": 1e5}),
    ("llama", {"max_position_embeddings": 256}), ("llama", {"tie_word_embeddings": True}), ("llama", {"mlp_bias": True}),
    ("mistral", {"sliding_window": 6}), ("smollm3", {"no_rope_layer_interval": 2}),
    ("qwen2 tied, windows", {"max_window_layers": 2}), ("gemma2", {"query_pre_attn_scalar": 9}),
    ("gemma3", {"sliding_window_pattern": 2}), ("gemma3", {"rope_local_base_freq": 5}),
    ("phi3", {"partial_rotary_factor": 0.5}), ("mpt", {"attn_config": {"alibi_bias_max": 4}}), ("bloom", {"seq_length": 99}),
    ("falcon", {"multi_query": False}), ("codegen", {"rotary_dim": 6}), ("gpt2", {"scale_attn_weights": False}),
])
def test_keys_that_change_the_config(name, keys):
    changed = families.read(CASES[name]["config"] | keys)
    assert changed != families.read(CASES[name]["config"])
    assert families.read(families.write(changed)[1]) == changed


# Saving.

def test_a_family_that_cannot_express_the_model(tmp_path):
    loaded = built("gemma2")
    with pytest.raises(ValueError, match=r"llama: config\.embedding\.scale is 5\.6.* and would be None"):
        jaxlm.io.save(loaded, tmp_path / "out", family="llama")
    with pytest.raises(ValueError, match="no family is called 'gpt3'; there is llama"):
        jaxlm.io.save(loaded, tmp_path / "out", family="gpt3")
    odd = dataclasses.replace(loaded.config, head=dataclasses.replace(loaded.config.head, scale=2.0))
    with pytest.raises(ValueError, match=r"no family of transformers expresses this.*gemma2: config\.head\.scale is 2\.0"):
        jaxlm.io.save(Model(odd, loaded.params), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_the_configs(tmp_path):
    loaded, other = built("llama"), built("mistral whole, wide heads")
    with pytest.raises(ValueError, match=r"attention/k is \(3, 32, 2, 16\), the config has \(3, 32, 2, 8\)"):
        jaxlm.io.save(Model(loaded.config, other.params), tmp_path / "out")
    with pytest.raises(ValueError, match="decoder/head/out is missing"):
        jaxlm.io.save(Model(loaded.config, {"decoder": {k: v for k, v in loaded.params["decoder"].items() if k != "head"}}),
                      tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_there_are_weights_none_are_written(tmp_path):
    loaded = built("bloom")
    jaxlm.io.save(loaded, tmp_path)
    with pytest.raises(ValueError, match=r"holds weights already: model\.safetensors"):
        jaxlm.io.save(loaded, tmp_path)
    with pytest.raises(ValueError, match="config.json is a file; a directory is needed"):
        jaxlm.io.save(loaded, tmp_path / "config.json")


def test_a_tensor_of_the_source(tmp_path):
    source = HuggingFaceSource(directory(tmp_path, synthetic.case("llama", ml_dtypes.bfloat16), files=2))
    assert source.names() == set(CASES["llama"]["tensors"])
    assert source.shape(Q) == (32, 32)
    np.testing.assert_array_equal(source.read(Q), synthetic.case("llama", ml_dtypes.bfloat16).read(Q))

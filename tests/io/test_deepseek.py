"""What is DeepSeek's own beside its goldens (test_moe.py): released configs, 8-bit files, layers that are left out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import cache, config, model, params
from jaxlm.io import families, fp8
from jaxlm.io.assemble import disassemble
from tests.io import synthetic
from tests.io.goldens import make_moe
from tests.io.test_moe import CASES, NEW, TEXT, load, parity, source

# What config.json says of the released models, but for what transformers needs alone.
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
BOTH = {"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "hidden_act": "silu", "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128}
V2_LITE = BOTH | {
    "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400}
V3 = BOTH | {
    "architectures": ["DeepseekV3ForCausalLM"], "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280}


@pytest.mark.parametrize("hf, weights, slot", [(V2_LITE, 15.706e9, 27 * 576), (V3, 671.026e9, 61 * 576)], ids=["v2 lite", "v3"])
def test_released_models_have_their_size(hf, weights, slot):
    cfg = families.read(hf)
    assert params.count(model.spec(cfg)) == pytest.approx(weights, rel=1e-4)
    kept = cache.spec(cfg.stack, 1, 7, jnp.bfloat16)
    assert params.count(kept.layers) == 7 * slot  # numbers that a token's cache holds
    first, last = cfg.stack.blocks()[0], cfg.stack.blocks()[-1]
    assert isinstance(first.feedforward, config.Dense) and isinstance(last.feedforward, config.Moe)
    share = hf["rope_scaling"]["mscale_all_dim"]
    assert last.attention.scale == pytest.approx(192**-0.5 * (0.1 * share * np.log(40) + 1) ** 2)
    assert last.attention.position.scaling.magnitude == 1.0 and last.attention.position.interleaved
    assert families.read(families.write(cfg)[1]) == cfg


@pytest.mark.parametrize("drafter", [None, "lookup", "layers:1"])
def test_generation_gives_the_same_text_as_transformers(drafter):
    lm = load(source("deepseek_v3"))
    result = jaxlm.generate(lm, [TEXT, TEXT[:5]], NEW, drafter=drafter, eos=())
    assert result.tokens[0].tolist() == CASES["deepseek_v3"]["greedy"]
    if drafter is not None:
        assert result.speculation.exact == "tokens" and len(result.speculation.sizes) > 0


def test_beams_and_scores_agree():
    """A beam's log-probability is what the forward pass says of its text."""
    lm = load(source("deepseek_v2"))
    found = jaxlm.beam_search(lm, [TEXT], 6, beams=3, eos=())
    scored = jaxlm.score(lm, [[*TEXT, *found.tokens[0].tolist()]])[0]
    np.testing.assert_allclose(found.scores[0], np.sum(scored[-6:]) / 6, atol=1e-4)


def test_layers_behind_the_last_are_left_out():
    given = source("deepseek_v3")
    want = load(source("deepseek_v3")).params
    given.config["num_nextn_predict_layers"] = 1
    given.tensors |= {"model.layers.3.eh_proj.weight": (16, 32), "model.layers.3.self_attn.o_proj.weight": (16, 20)}
    jax.tree.map(np.testing.assert_array_equal, load(given).params, want)
    assert not any("layers.3." in name for name in given.reads)
    given.tensors["model.layers.2.eh_proj.weight"] = (16, 32)
    with pytest.raises(ValueError, match="no place for: model.layers.2.eh_proj.weight"):
        load(given)


def test_the_correction_stays_in_float32(tmp_path):
    jaxlm.save(load(source("deepseek_v3")), tmp_path)
    half = jaxlm.load(tmp_path, dtype=jnp.bfloat16)
    router = half.params["decoder"]["blocks"]["1"]["0"]["feedforward"]["router"]
    assert router["correction"].dtype == jnp.float32 and router["product"].dtype == jnp.bfloat16
    want = make_moe.weight("model.layers.1.mlp.gate.e_score_correction_bias", (8,))
    np.testing.assert_array_equal(router["correction"][0], want)
    assert np.isfinite(model.forward(half.params, half.config, jnp.asarray([TEXT])).logits).all()


@pytest.mark.parametrize("name, changes, message", [
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported for deepseek_v2: it must be false"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' .* must be 'greedy' or 'group_limited_greedy'"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported for deepseek_v2"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True is not supported"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported for deepseek_v3: .*'noaux_tc'"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported for deepseek_v3: it must be 4"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1 is not supported"),
    ("deepseek_v3", {"kv_lora_rank": None}, "lacks kv_lora_rank, which deepseek_v3 needs"),
    ("deepseek_v3", {"topk_group": 9}, "ExpertGroups.chosen must be 1 to 4, got 9"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq.* is not supported"),
])
def test_errors(name, changes, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES[name]["config"] | changes)


def test_what_cannot_be_expressed_is_not_written():
    hf = CASES["deepseek_v3"]["config"]
    every_second = families.read(hf | {"moe_layer_freq": 2, "num_hidden_layers": 5})
    sparse = [isinstance(block.feedforward, config.Moe) for block in every_second.stack.blocks()]
    assert sparse == [False, False, True, False, True]
    for cfg, message in (
            (every_second, "deepseek_v3: there are dense layers behind the first mixture"),
            (families.read(hf | {"n_shared_experts": None}), "deepseek_v3: its mixtures need a shared layer"),
            (families.read(hf | {"first_k_dense_replace": 3}), "deepseek_v3: no layer is a mixture of experts"),
            (families.read(hf), "deepseek_v2: config.*score is .*SIGMOID")):
        with pytest.raises(ValueError, match=message):
            families.write(cfg, message.split(":")[0])
    with pytest.raises(ValueError, match="deepseek_v3: has only blocks of LatentAttention"):
        families.write(families.read(synthetic.case("llama").config), "deepseek_v3")


# Files of 8 bits.

def packed(folder, block=(8, 6)):
    """A directory with a tiny V3 whose matrices, but for router and tables, are random bytes; and what they stand for."""
    cfg = families.read(make_moe.DEEPSEEK_V3)
    tensors = dict(disassemble(params.init(model.spec(cfg), jax.random.key(0)), cfg, families.FAMILIES["deepseek_v3"]))
    random, held = np.random.default_rng(5), {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or any(part in name for part in ("gate.weight", "embed_tokens", "lm_head")):
            held[name] = tensor
            continue
        values = np.asarray(random.normal(size=tensor.shape), np.float32).astype(jnp.float8_e4m3fn)
        scale = random.uniform(0.1, 0.4, [-(-size // part) for size, part in zip(tensor.shape, block, strict=True)])
        held |= {name: values, f"{name}_scale_inv": scale.astype(np.float32)}
        whole = np.kron(scale.astype(np.float32), np.ones(block, np.float32))[:tensor.shape[0], :tensor.shape[1]]
        tensors[name] = values.astype(np.float32) * whole
    folder.mkdir()
    save(folder, held)
    (folder / "config.json").write_text(json.dumps(make_moe.DEEPSEEK_V3 | {"quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}}))
    return cfg, tensors, held


def save(folder, held):
    """The format by hand: safetensors has no 8-bit floating-point numbers for NumPy."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, one in held.items():
        kind = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}[one.dtype.name]
        header[name] = {"dtype": kind, "shape": one.shape, "data_offsets": [start, start + one.nbytes]}
        start += one.nbytes
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(one.tobytes() for one in held.values()))


def test_fp8_is_read_as_what_it_stands_for(tmp_path):
    cfg, tensors, held = packed(tmp_path / "packed")
    lm = jaxlm.load(tmp_path / "packed")
    assert lm.config == cfg
    for name, tensor in disassemble(lm.params, cfg, families.FAMILIES["deepseek_v3"]):
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    scale = held[f"{name}_scale_inv"]
    for change, message in (({f"{name}_scale_inv": scale[:1]}, f"tensor {name} has shape .* number for each"),
                            ({name: tensors[name]}, f"tensor {name} is of type F32 and has scales beside it"),
                            ({f"{name}_scale_inv": scale * np.nan}, f"tensor {name} holds NaN")):
        save(tmp_path / "packed", held | change)
        with pytest.raises(ValueError, match=message):
            jaxlm.load(tmp_path / "packed")
    del held[f"{name}_scale_inv"]
    save(tmp_path / "packed", held)
    with pytest.raises(ValueError, match=f"tensor {name} is of type F8_E4M3; there is F32"):
        jaxlm.load(tmp_path / "packed")


@pytest.mark.parametrize("changes, message", [
    ({"fmt": "e5m2"}, "fmt = 'e5m2' is not supported"),
    ({"weight_block_size": None}, "weight_block_size = None .* two sizes are needed"),
    ({"weight_block_size": [8, 0]}, r"weight_block_size = \[8, 0\] is not")])
def test_other_kinds_of_fp8_are_refused(tmp_path, changes, message):
    packed(tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    hf = json.loads(file.read_text())
    file.write_text(json.dumps(hf | {"quantization_config": hf["quantization_config"] | changes}))
    with pytest.raises(ValueError, match=message):
        jaxlm.load(tmp_path / "packed")


def test_every_byte_is_the_number_of_the_format():
    """A sign, four bits of exponent, three of mantissa; the largest two are no numbers."""
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
        got = fp8.unpack(np.full((1, 1), byte, np.uint8), np.ones((1, 1), np.float32), (1, 1))[0, 0]
        assert np.isnan(got) if byte & 127 == 127 else got == (-value if byte & 128 else value)


@parity
def test_fp8_is_what_transformers_makes_of_it(tmp_path):
    import torch
    import transformers

    packed(tmp_path / "packed", (2, 2))  # it takes only whole blocks
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        quantization_config=transformers.FineGrainedFP8Config(weight_block_size=(2, 2), dequantize=True)).eval()
    lm = jaxlm.load(tmp_path / "packed")
    run = synthetic.runner(lm.params, lm.config, len(TEXT))
    np.testing.assert_allclose(run(TEXT), make_moe.logits(theirs, TEXT), rtol=0, atol=5e-5)

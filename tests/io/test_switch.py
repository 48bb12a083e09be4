"""Switch Transformers and NLLB-MoE against what transformers gives, stored by goldens/make_switch.py, and live."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config, model
from jaxlm.decoding.generate import padded
from jaxlm.io import families
from jaxlm.io.assemble import assemble, disassemble
from tests.io import synthetic
from tests.io.goldens import make_switch

CASES = make_switch.CASES
SOURCES, TEXTS = make_switch.SOURCES, make_switch.TEXTS


class Source(synthetic.Synthetic):
    def read(self, name):
        self.reads.append(name)
        return make_switch.weight(name, self.tensors[name]).astype(self.dtype)


@functools.cache
def goldens():
    with np.load(make_switch.PATH) as arrays:
        return json.loads(arrays["cases"].tobytes()), {name: arrays[name] for name in arrays if name != "cases"}


def source(name):
    return Source(goldens()[0][name]["config"], goldens()[0][name]["tensors"])


@functools.cache
def loaded(name):
    given = source(name)
    family = families.find(given.config)
    cfg = family.settle(families.read(given.config), given)
    return jaxlm.Model(cfg, assemble(cfg, family, given, jnp.float32))


@functools.partial(jax.jit, static_argnames="cfg")
def run(params, cfg, source, source_lengths, tokens, lengths):
    """Logits, or an encoder's vectors."""
    if isinstance(cfg, config.Encoder):
        return model.forward(params, cfg, source, lengths=source_lengths).last
    memory = model.encode(params, cfg, source, lengths=source_lengths)
    return model.forward(params, cfg, tokens, lengths=lengths, memory=memory).logits


def outputs(lm, sources, texts):
    """Of each row [T, V], or of an encoder [S, D]; all rows in one padded batch."""
    arrays = [jnp.asarray(array) for rows in (sources, texts) for array in padded(rows, max(map(len, rows)))]
    found = np.asarray(run(lm.params, lm.config, *arrays))
    return [row[:len(one)] for row, one in zip(found, sources if isinstance(lm.config, config.Encoder) else texts, strict=True)]


def rows(name):
    """How many rows make a batch without padding, of which room for a fraction of the tokens depends; else all."""
    return 2 if CASES[name].get("moe_eval_capacity_token_fraction", 1.0) < 1 else 3


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in goldens()[0].items()} == CASES
    assert {config["model_type"] for config in CASES.values()} == {
        name for name, family in families.FAMILIES.items() if family.mixtures and config.EncoderDecoder in family.kinds}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_transformers(name):
    for i, found in enumerate(outputs(loaded(name), SOURCES[:rows(name)], TEXTS[:rows(name)])):
        np.testing.assert_allclose(found, goldens()[1][f"{i} {name}"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["switch full, untied", "nllb-moe full"])
def test_full_experts_drop_and_it_matters(name):
    lm = loaded(name)
    roomy = jaxlm.Model(config.dropless(lm.config), lm.params)
    assert np.abs(outputs(roomy, SOURCES[:2], TEXTS[:2])[0] - goldens()[1][f"0 {name}"]).max() > 1e-2


@pytest.mark.parametrize("name", make_switch.TEXTS_OF)
def test_generation_gives_the_same_text_as_transformers(name):
    case, lm = goldens()[0][name], loaded(name)
    assert list(lm.config.start) == case["start"] and case["margin"] > 2e-4  # else a difference would not be one
    out = jaxlm.generate(lm, SOURCES, make_switch.NEW + len(case["start"]) - 1, eos=())
    assert [row.tolist()[-make_switch.NEW:] for row in out.tokens] == case["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_configs_go_back_and_forth(name):
    case = goldens()[0][name]
    cfg, kind = families.read(case["config"]), case["config"]["model_type"]
    assert families.read(families.write(cfg, kind)[1]) == cfg
    assert families.write(cfg)[0].name == kind
    kept = {key: case["config"][key] for key in ("architectures", "forced_bos_token_id") if key in case["config"]}
    given = source(name)
    assert families.FAMILIES[kind].settle(families.read(case["written"] | kept), given) == cfg


@pytest.mark.parametrize("name", CASES)
def test_tensors_there_and_back_bit_for_bit(name):
    lm, given = loaded(name), source(name)
    written = dict(disassemble(lm.params, lm.config, families.find(given.config)))
    if "untied" in name:
        for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            assert written.pop(copy) is written["shared.weight"]
    assert {tensor: list(values.shape) for tensor, values in written.items()} == goldens()[0][name]["tensors"]
    for tensor, values in written.items():
        np.testing.assert_array_equal(values, given.read(tensor), err_msg=tensor)


def sparse(side):
    return [i for i, block in enumerate(side.stack.blocks()) if isinstance(block.feedforward, config.Moe)]


@pytest.mark.parametrize("changes, layers", [
    ({}, [1, 3]), ({"num_sparse_encoder_layers": 4}, [0, 1, 2, 3]), ({"num_sparse_encoder_layers": 1}, [1]),
    ({"num_sparse_encoder_layers": 0}, [1]), ({"num_sparse_encoder_layers": 5}, []), ({"encoder_sparse_step": 0}, []),
    ({"encoder_sparse_step": 3}, [1]), ({"encoder_sparse_step": 1}, [0, 1, 2, 3])])
def test_which_layers_of_a_switch_have_experts(changes, layers):
    """The step comes before the number of them, from which transformers makes one where it is not there."""
    cfg = families.read(CASES["switch"] | changes)
    assert sparse(cfg.encoder) == layers and sparse(cfg.decoder) == [1, 3]
    assert families.read(families.write(cfg, "switch_transformers")[1]) == cfg


@pytest.mark.parametrize("step, layers", [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (5, [])])
def test_which_layers_of_an_nllb_have_experts(step, layers):
    cfg = families.read(CASES["nllb-moe"] | {"decoder_sparse_step": step})
    assert sparse(cfg.decoder) == layers and sparse(cfg.encoder) == [1]
    assert families.read(families.write(cfg, "nllb-moe")[1]) == cfg


def test_what_released_configs_say():
    """As google/switch-base-8 and facebook/nllb-moe-54b are."""
    switch = families.read({
        "model_type": "switch_transformers", "add_router_probs": False, "batch_prioritized_routing": False, "d_ff": 3072,
        "decoder_sparse_step": 2, "decoder_start_token_id": 0, "dense_act_fn": "relu", "encoder_sparse_step": 2,
        "feed_forward_proj": "relu", "is_gated_act": False, "num_selected_experts": 1, "num_sparse_decoder_layers": 6,
        "num_sparse_encoder_layers": 6, "output_past": True, "router_ignore_padding_tokens": False, "router_jitter_noise": 0.01,
        "router_type": "tokens_masked", "router_z_loss_coef": 0.001, "router_aux_loss_coef": 0.001})
    assert sparse(switch.encoder) == sparse(switch.decoder) == [1, 3, 5, 7, 9, 11]
    moe = switch.encoder.stack.blocks()[1].feedforward
    assert moe == config.Moe(8, config.Dense(3072, config.Activation.RELU, gated=False), config.TopK(1),
                             capacity=config.CapacityTokens(64))
    nllb = families.read({
        "model_type": "nllb-moe", "d_model": 2048, "encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192,
        "decoder_ffn_dim": 8192, "expert_capacity": 64, "vocab_size": 256206, "router_z_loss_coef": 0.001,
        "router_aux_loss_coef": 0.001, "output_router_logits": False, "router_ignore_padding_tokens": False,
        "normalize_router_prob_before_dropping": False, "batch_prioritized_routing": False, "second_expert_policy": "all"})
    assert sparse(nllb.encoder) == sparse(nllb.decoder) == [3, 7, 11, 15, 19, 23]
    moe = nllb.decoder.stack.blocks()[3].feedforward
    assert moe == config.Moe(128, config.Dense(8192, config.Activation.RELU, gated=False, bias=True),
                             config.TopK(2, normalize=True, scale=0.8))


@pytest.mark.parametrize("name, changes, message", [
    ("switch", {"router_dtype": "bfloat16"}, "router_dtype = 'bfloat16' is not supported for switch_transformers: it must be"),
    ("switch", {"num_selected_experts": 2}, "num_selected_experts = 2 is not supported"),
    ("switch", {"encoder_sparse_step": -1}, "encoder_sparse_step = -1 is not supported.*: a positive whole number"),
    ("switch", {"expert_capacity": None}, "lacks expert_capacity"),
    ("switch", {"dense_act_fn": "gated-gelu"}, "dense_act_fn = 'gated-gelu' is not supported for switch_transformers"),
    ("nllb-moe", {"second_expert_policy": "random"}, "second_expert_policy = 'random' .* it must be 'all'"),
    ("nllb-moe", {"moe_eval_capacity_token_fraction": -1.0}, "moe_eval_capacity_token_fraction = -1.0 .* above 0"),
    ("nllb-moe", {"moe_token_dropout": 1.0}, "moe_token_dropout = 1.0 .* from 0 to below 1"),
    ("nllb-moe", {"num_experts": 1}, "cannot choose 2 of 1 experts"),
])
def test_errors(name, changes, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES[name] | changes)


def changed(name, **changes):
    cfg = families.read(CASES[name])
    blocks = [dataclasses.replace(block, feedforward=dataclasses.replace(block.feedforward, **changes))
              if isinstance(block.feedforward, config.Moe) else block for block in cfg.decoder.stack.blocks()]
    encoder = [cfg.encoder.stack.blocks()[0]] * cfg.encoder.stack.layers
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, stack=config.stack_of(blocks)),
                               encoder=dataclasses.replace(cfg.encoder, stack=config.stack_of(encoder)))


@pytest.mark.parametrize("name, changes, message", [
    ("switch", {"router": config.Hash(1)}, "switch_transformers: its router is a Hash, and must be a TopK"),
    ("switch", {"capacity": None}, "switch_transformers: its experts' capacity is None, and must be CapacityTokens"),
    ("switch", {"router": config.TopK(2)}, "router.k is 2 and would be 1"),
    ("nllb-moe", {"router": config.Hash(2)}, "nllb-moe: its router is a Hash, and must be a TopK"),
    ("nllb-moe", {"capacity": config.CapacityTokens(3)}, "nllb-moe: its experts' capacity is CapacityTokens.*must be"),
])
def test_what_cannot_be_expressed_is_not_written(name, changes, message):
    with pytest.raises(ValueError, match=message):
        families.write(changed(name, **changes), CASES[name]["model_type"])
    with pytest.raises(ValueError, match="no layer is a mixture of experts"):
        families.write(families.read(CASES[name] | {
            "encoder_sparse_step": 0, "decoder_sparse_step": 0}), CASES[name]["model_type"])


# Against transformers itself, with other texts.
RNG = np.random.default_rng(3)
MORE = [[[int(i) for i in RNG.integers(5, 40, length)] for length in lengths] for lengths in ((30, 30, 3), (25, 25, 9))]


def same(name, lm, reference):
    rest = [one[:rows(name)] for one in MORE]
    for found, source, text in zip(outputs(lm, *rest), *rest, strict=True):
        np.testing.assert_allclose(found, make_switch.run(reference, source, text), rtol=0, atol=5e-5)


def from_transformers(path):
    import torch
    import transformers

    make_switch.correct()
    named = json.loads((path / "config.json").read_text())["architectures"][0]
    reference, info = getattr(transformers, named).from_pretrained(path, dtype=torch.float32, attn_implementation="eager",
                                                                   output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, left over, or of another shape
    return reference.eval()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["switch", "switch full, untied", "nllb-moe", "nllb-moe full, the surest first"])
def test_there_and_back(name, tmp_path):
    reference = make_switch.build(CASES[name])
    reference.save_pretrained(tmp_path / "theirs")
    if "forced_bos_token_id" in CASES[name]:  # of a config it is not taken
        reference.generation_config.forced_bos_token_id = CASES[name]["forced_bos_token_id"]
        reference.generation_config.save_pretrained(tmp_path / "theirs")
    lm = jaxlm.load(tmp_path / "theirs")
    assert lm.config == families.read(CASES[name])
    same(name, lm, reference)
    jaxlm.save(lm, tmp_path / "ours")
    back = from_transformers(tmp_path / "ours")
    assert type(back) is type(reference)
    same(name, lm, back)
    again = jaxlm.load(tmp_path / "ours")
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    if name in make_switch.TEXTS_OF:
        start = list(lm.config.start)
        assert [make_switch.greedy(back, source, start)[0] for source in SOURCES] == goldens()[0][name]["greedy"]

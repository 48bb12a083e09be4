"""ModernBERT, Ettin and Nomic BERT against what transformers gave, stored by goldens/make_modernbert.py."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config, model
from jaxlm.io import families
from jaxlm.io.assemble import assemble
from jaxlm.model import Model
from tests import tiny
from tests.io import synthetic
from tests.io.goldens import make_modernbert
from tests.io.goldens.make_bert import TEXTS, TYPES

with np.load(make_modernbert.PATH) as arrays:
    CASES = json.loads(arrays["cases"].tobytes())
    STORED = {name: arrays[name] for name in arrays.files if name != "cases"}

LENGTHS = [len(text) for text in TEXTS]


def built(name):
    found = synthetic.Synthetic(CASES[name]["config"], CASES[name]["tensors"])
    cfg = families.read(found.config)
    return Model(cfg, assemble(cfg, families.find(found.config), found, jnp.float32))


def rows(lists, width=16):
    return jnp.asarray([row + [0] * (width - len(row)) for row in lists], jnp.int32)


def outputs(lm, texts, types=None):
    """Of texts side by side: each one's logits or hidden states."""
    lengths = [len(text) for text in texts]
    forward = tiny.jit(lambda params, tokens, lengths: model.forward(params, lm.config, tokens, lengths=lengths, types=types))
    out = forward(lm.params, rows(texts), jnp.asarray(lengths, jnp.int32))
    whole = np.asarray(out.last if lm.config.head is None else out.logits)
    return [one if one.ndim == 1 else one[:length] for one, length in zip(whole, lengths, strict=True)]


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in CASES.items()} == make_modernbert.CASES


@pytest.mark.parametrize("name", make_modernbert.STORED)
def test_padded_texts_give_what_transformers_gives_each_alone(name):
    types = rows(TYPES) if make_modernbert.typed(CASES[name]["config"]) else None
    for i, ours in enumerate(outputs(built(name), TEXTS, types)):
        np.testing.assert_allclose(ours, STORED[f"{name} {i}"], rtol=0, atol=1e-4)


def test_a_decoder_continues_as_in_transformers():
    out = jaxlm.generate(built("decoder"), TEXTS, make_modernbert.NEW, eos=())
    assert np.asarray(out.tokens).tolist() == CASES["decoder"]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_configs_read_the_same_from_what_transformers_and_jaxlm_write(name):
    cfg = families.read(CASES[name]["config"])
    assert families.read(CASES[name]["written"]) == cfg
    assert families.read(families.write(cfg, CASES[name]["config"]["model_type"])[1]) == cfg
    assert families.read(families.write(cfg)[1]) == cfg


def test_the_released_modernbert():
    cfg = families.read({"model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152,
                         "num_hidden_layers": 22, "num_attention_heads": 12, "position_embedding_type": "absolute",
                         "layer_norm_eps": 1e-5, "sparse_prediction": False, "reference_compile": None})
    first, second, third, fourth = cfg.stack.blocks()[:4]
    assert not first.residual.attention and fourth.residual == third.residual == config.PreNorm(config.LayerNorm(bias=False))
    assert [one.attention.window for one in (first, second, third, fourth)] == [None, 65, 65, None]
    assert [one.attention.position.base for one in (second, fourth)] == [10000, 160000]
    # One block to trace, and then seven times (local, local, global).
    assert [(len(group.pattern), group.repeats) for group in cfg.stack.groups] == [(1, 1), (3, 7)]


def test_nomic_s_own_keys():
    theirs = {"model_type": "nomic_bert", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24,
              "layer_norm_epsilon": 1e-3, "activation_function": "swiglu", "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
              "rotary_emb_interleaved": False, "rotary_scaling_factor": None, "prenorm": False, "qkv_proj_bias": False,
              "use_xentropy": True, "n_positions": 8192, "max_trained_positions": 40, "max_position_embeddings": 40}
    assert families.read(theirs) == families.read(CASES["nomic"]["config"])


@pytest.mark.parametrize("name, change, message", [
    ("modernbert", {"architectures": ["ModernBertForQuestionAnswering"]}, "there is ModernBertModel, ModernBertForMaskedLM"),
    ("modernbert", {"classifier_pooling": "max"}, "there is cls, mean"),
    ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("modernbert", {"sliding_window": 3}, "it must be 4"),
    ("decoder", {"architectures": ["ModernBertDecoderForSequenceClassification"]}, "ForCausalLM"),
    ("decoder", {"sliding_window": 4}, "it must be 3"),
    ("nomic", {"prenorm": True}, "prenorm = True"),
    ("nomic", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction = 0.5"),
    ("nomic", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor = 2.0"),
    ("nomic", {"moe_every_n_layers": 2}, "moe_every_n_layers = 2"),
])
def test_configs_that_cannot_be_expressed(name, change, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES[name]["config"] | change)


def test_a_bare_model_without_its_head():
    """Names without a prefix, as of a model saved on its own."""
    found = synthetic.Synthetic(CASES["modernbert"]["config"], CASES["modernbert"]["tensors"])
    assert not any(name.startswith("model.") for name in found.tensors)
    bare = synthetic.Synthetic(found.config, {f"model.{name}": shape for name, shape in found.tensors.items()})
    bare.read = lambda name: found.read(name.removeprefix("model."))
    cfg = families.read(found.config)
    first, second = (assemble(cfg, families.find(found.config), one, jnp.float32) for one in (found, bare))
    np.testing.assert_array_equal(first["encoder"]["embedding"]["tokens"], second["encoder"]["embedding"]["tokens"])


# Live.

LONGER = [[int(i) for i in np.random.default_rng(1).integers(4, 64, length)] for length in (16, 3, 11)]


def same(lm, reference):
    theirs = [make_modernbert.output(reference, text) for text in LONGER]
    for ours, other in zip(outputs(lm, LONGER), theirs, strict=True):
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_go_back_and_forth(name, tmp_path):
    import torch
    import transformers

    values = CASES[name]["config"]
    reference, _ = make_modernbert.build(values)
    for i in range(3 if name in make_modernbert.STORED else 0):
        types = TYPES[i] if make_modernbert.typed(values) else None
        np.testing.assert_allclose(make_modernbert.output(reference, TEXTS[i], types), STORED[f"{name} {i}"], atol=1e-5)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = jaxlm.load(tmp_path / "theirs")
    assert loaded.config == families.read(values)
    same(loaded, reference)
    jaxlm.io.save(loaded, tmp_path / "ours", family=values["model_type"])
    cls = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
    assert cls == values["architectures"]
    saved, info = getattr(transformers, cls[0]).from_pretrained(tmp_path / "ours", dtype=torch.float32,
                                                                attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    same(loaded, saved.eval())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_s_batch_continues_as_in_transformers():
    reference, _ = make_modernbert.build(CASES["decoder, untied, biases"]["config"])
    out = jaxlm.generate(built("decoder, untied, biases"), LONGER, make_modernbert.NEW, eos=())
    assert np.asarray(out.tokens).tolist() == [make_modernbert.greedy(reference, text) for text in LONGER]

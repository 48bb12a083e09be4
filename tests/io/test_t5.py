"""The T5 family: against what transformers gives, stored by goldens/make_t5.py and live."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
import jaxlm.io
from jaxlm import config, model
from jaxlm.io import families
from jaxlm.io.assemble import assemble
from jaxlm.io.families.fields import ACTIVATIONS
from jaxlm.model import Model
from tests.io.goldens import make_t5
from tests.io.goldens.make_goldens import weight
from tests.io.synthetic import Synthetic

RNG = np.random.default_rng(7)
SOURCES = [[int(i) for i in RNG.integers(2, make_t5.VOCABULARY, length)] for length in (40, 1, 9)]
TARGETS = [[int(i) for i in RNG.integers(2, make_t5.VOCABULARY, 35)] for _ in SOURCES]


@functools.cache
def goldens():
    with np.load(make_t5.PATH) as arrays:
        cases = json.loads(arrays["cases"].tobytes())
        return {name: case | {"outputs": [arrays[f"{i} {name}"] for i in range(len(make_t5.SOURCES))]}
                for name, case in cases.items()}


CASES = goldens()


def source(name, **changes):
    case = CASES[name]
    return Synthetic(case["config"] | changes, case["tensors"])


def load(source):
    family = families.find(source.config)
    cfg = family.settle(families.read(source.config), source)
    return Model(cfg, assemble(cfg, family, source, jnp.float32))


def batch(sources):
    lengths = jnp.asarray([len(one) for one in sources], jnp.int32)
    return jnp.asarray([one + [0] * (max(map(len, sources)) - len(one)) for one in sources], jnp.int32), lengths


def run(lm, sources, targets):
    """The outputs of all rows side by side, each without its padding."""
    tokens, lengths = batch(sources)
    if isinstance(lm.config, config.Encoder):
        hidden = jax.jit(lambda params: model.forward(params, lm.config, tokens, lengths=lengths).last)(lm.params)
        return [np.asarray(row[:len(one)]) for row, one in zip(hidden, sources, strict=True)]

    def both(params):
        memory = model.encode(params, lm.config, tokens, lengths=lengths)
        return model.forward(params, lm.config, jnp.asarray(targets, jnp.int32), memory=memory).logits
    return list(np.asarray(jax.jit(both)(lm.params)))


def same(ours, theirs):
    for mine, row in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, row, rtol=0, atol=1e-4)


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in CASES.items()} == make_t5.CASES
    assert {case["config"]["model_type"] for case in CASES.values()} == {"t5", "mt5", "umt5"}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_and_greedy_text_as_transformers(name):
    lm = load(source(name))
    same(run(lm, make_t5.SOURCES, make_t5.TARGETS), CASES[name]["outputs"])
    if name in make_t5.TEXTS:
        assert CASES[name]["margin"] > 2e-4  # else a difference in the text would not be one
        out = jaxlm.generate(lm, make_t5.SOURCES, make_t5.NEW, eos=())
        assert [row.tolist() for row in out.tokens] == CASES[name]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_reads_the_same(name):
    case, kind = CASES[name], CASES[name]["config"]["model_type"]
    cfg = families.read(case["config"])
    assert families.read(families.write(cfg, kind)[1]) == cfg
    # What transformers 5 writes calls every model tied: the tensors know.
    settled = families.FAMILIES[kind].settle(families.read(case["written"]), source(name))
    assert settled == cfg


@pytest.mark.parametrize("gated", [True, False])
def test_every_activation_is_written_as_it_is_read(gated):
    for activation in set(ACTIVATIONS.values()):
        cfg = families.read(make_t5.T5)
        feedforward = config.Dense(24, activation, gated)
        plain, wanted = (json.dumps(config.to_dict(one)) for one in (cfg.encoder.stack.blocks()[0].feedforward, feedforward))
        cfg = config.from_json(json.dumps(config.to_dict(cfg)).replace(plain, wanted))
        assert {block.feedforward for side in (cfg.encoder, cfg.decoder) for block in side.stack.blocks()} == {feedforward}
        assert families.read(families.write(cfg, "t5")[1]) == cfg


def test_the_fields_that_transformers_makes_of_the_feed_forwards_name_come_before_it():
    plain = families.read(make_t5.T5)
    assert families.read(make_t5.T5 | {"dense_act_fn": "relu", "is_gated_act": False}) == plain
    other = families.read(make_t5.T5 | {"feed_forward_proj": "gated-gelu", "dense_act_fn": "silu", "is_gated_act": False})
    assert other.decoder.stack.blocks()[0].feedforward == config.Dense(24, config.Activation.SILU, False)


def test_long_texts_are_not_refused():
    cfg = families.read(make_t5.T5 | {"n_positions": 512})
    assert min(cfg.encoder.length, cfg.decoder.length) >= 2**15
    short = families.read(make_t5.T5 | {"max_decoder_position_embeddings": 64})
    assert (short.encoder.length, short.decoder.length) == (2**15, 64)
    assert families.read(families.write(short, "t5")[1]) == short


@pytest.mark.parametrize("kind, tie, scaled, scale", [
    ("t5", True, None, 0.25), ("t5", False, None, 1.0), ("t5", True, False, 1.0), ("t5", False, True, 0.25),
    ("mt5", True, None, 1.0), ("mt5", False, None, 1.0), ("umt5", True, None, 0.25), ("umt5", False, None, 1.0)])
def test_who_scales_the_logits(kind, tie, scaled, scale):
    cfg = families.read(make_t5.T5 | {"model_type": kind, "tie_word_embeddings": tie, "scale_decoder_outputs": scaled})
    assert cfg.decoder.head == config.Head(tie, scale=scale)
    assert families.read(families.write(cfg, kind)[1]) == cfg


def test_a_second_matrix_unties_the_head_and_an_equal_one_does_not():
    class Twins(Synthetic):
        def read(self, name):
            return weight("shared.weight", self.shape(name)) if name in twins else super().read(name)

    tensors = CASES["t5"]["tensors"]
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": [8, 3]}
    whole = Twins(CASES["t5"]["config"], tensors | dict.fromkeys(names, tensors["shared.weight"]) | unread)
    twins = names
    assert load(whole).config.decoder.head.tied
    twins = names[:2]
    lm = load(whole)
    assert not lm.config.decoder.head.tied
    np.testing.assert_array_equal(lm.params["decoder"]["head"]["out"], whole.read("lm_head.weight"))
    twins = names[1:]
    with pytest.raises(ValueError, match="the config ties tensor encoder.embed_tokens.weight to shared.weight"):
        load(whole)
    twins = names
    del whole.tensors["shared.weight"]
    np.testing.assert_array_equal(load(whole).params["decoder"]["embedding"]["tokens"], weight("shared.weight", (32, 16)))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "longt5"}, "has model_type 'longt5'.*which jaxlm does not read"),
    ({"feed_forward_proj": "gated-softplus"}, "feed_forward_proj = 'gated-softplus' is not supported for t5: there is silu"),
    ({"feed_forward_proj": "odd-gelu"}, "feed_forward_proj = 'odd-gelu' is not supported"),
    ({"feed_forward_proj": 3}, "feed_forward_proj = 3 is not supported"),
    ({"decoder_start_token_id": None, "pad_token_id": None}, "lacks decoder_start_token_id, which t5 needs"),
    ({"num_decoder_layers": 0}, "num_decoder_layers = 0 is not supported for t5: a positive whole number"),
    ({"encoder_layerdrop": 0.1}, "encoder_layerdrop = 0.1 is not supported for t5: jaxlm does not know this key"),
])
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        families.read(make_t5.T5 | changes)


def test_what_cannot_be_expressed_is_not_written():
    ours = {kind: families.read(make_t5.T5 | {"model_type": kind}) for kind in ("t5", "mt5", "umt5")}
    with pytest.raises(ValueError, match="mt5: config.decoder.head.scale is 0.25 and would be 1.0"):
        families.write(ours["t5"], "mt5")
    with pytest.raises(ValueError, match="t5: .*position.shared is False and would be True"):
        families.write(ours["umt5"], "t5")
    text = config.to_json(ours["t5"].encoder).replace('"bidirectional": true', '"bidirectional": false')
    with pytest.raises(ValueError, match="bidirectional is False and would be True"):
        families.write(config.from_json(text), "t5")
    with pytest.raises(ValueError, match="t5: is no Decoder"):
        families.write(ours["t5"].decoder, "t5")


def test_what_a_text_begins_with_stands_in_the_generation_config_first(tmp_path):
    lm = load(source("t5 tied, unscaled"))
    jaxlm.io.save(lm, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["decoder_start_token_id"] == 3
    assert jaxlm.load(tmp_path).config == lm.config
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"decoder_start_token_id": 5, "temperature": 0.5}')
    assert jaxlm.load(tmp_path).config.start == (5,)
    (tmp_path / "config.json").write_text(json.dumps(written | {"forced_bos_token_id": 6}))
    assert jaxlm.load(tmp_path).config.start == (5,)  # transformers forces nothing that is not in that file
    generation.unlink()
    assert jaxlm.load(tmp_path).config.start == (3, 6)
    generation.write_text('{"decoder_start_token_id": 5}')
    for lacking in ({"decoder_start_token_id": None}, {}):
        rest = {key: value for key, value in written.items() if key != "decoder_start_token_id"} | {"pad_token_id": 4}
        (tmp_path / "config.json").write_text(json.dumps(rest | lacking))
        assert jaxlm.load(tmp_path).config.start == (5,)
    generation.write_text('{"forced_bos_token_id": 7}')
    assert (cfg := jaxlm.load(tmp_path).config).start == (4, 7)
    assert families.read(families.write(cfg)[1]) == cfg
    generation.write_text("[]")
    with pytest.raises(ValueError, match="generation_config.json does not hold an object"):
        jaxlm.load(tmp_path)


def test_an_encoder_is_the_encoder_of_the_whole(tmp_path):
    lm = load(source("t5"))
    alone = Model(*model.encoder(lm.config, lm.params))
    jaxlm.io.save(alone, tmp_path)
    again = jaxlm.load(tmp_path)
    assert again.config == alone.config
    jax.tree.map(np.testing.assert_array_equal, again.params, alone.params)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["T5EncoderModel"]


def test_an_encoder_of_vectors(tmp_path):
    lm = load(source("t5 encoder"))
    cfg = dataclasses.replace(lm.config, head=config.Vector(config.Pooling.MEAN, width=6))
    product = {"out": jnp.asarray(weight("linear.weight", (16, 6)))}
    jaxlm.io.save(Model(cfg, {"encoder": lm.params["encoder"] | {"head": product}}), tmp_path)
    again = jaxlm.load(tmp_path)
    assert again.config == cfg
    np.testing.assert_array_equal(again.params["encoder"]["head"]["out"], product["out"])


# Against transformers itself.

def parity(function):
    return pytest.mark.parity(pytest.mark.filterwarnings("ignore")(function))


def their_text(reference, sources):
    import torch

    tokens, lengths = batch(sources)
    mask = np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]
    out = reference.generate(input_ids=torch.tensor(np.asarray(tokens)), attention_mask=torch.tensor(mask).long(),
                             max_new_tokens=make_t5.NEW, do_sample=False)
    return out[:, 1:].tolist()


def from_transformers(path):
    import torch
    import transformers

    named = json.loads((path / "config.json").read_text())["architectures"][0]
    reference, info = getattr(transformers, named).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, left over, or of another shape
    return reference.eval()


@parity
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    reference = make_t5.build(CASES[name]["config"])
    numbers = [make_t5.run(reference, *pair) for pair in zip(make_t5.SOURCES, make_t5.TARGETS, strict=True)]
    same(numbers, CASES[name]["outputs"])
    reference.save_pretrained(tmp_path / "theirs")
    lm = jaxlm.load(tmp_path / "theirs")
    assert lm.config == families.read(CASES[name]["config"])
    ours = run(lm, SOURCES, TARGETS)
    same(ours, [make_t5.run(reference, *pair) for pair in zip(SOURCES, TARGETS, strict=True)])
    jaxlm.io.save(lm, tmp_path / "ours", family=CASES[name]["config"]["model_type"])
    back = from_transformers(tmp_path / "ours")
    assert type(back) is type(reference)
    same(ours, [make_t5.run(back, *pair) for pair in zip(SOURCES, TARGETS, strict=True)])
    again = jaxlm.load(tmp_path / "ours")
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    if isinstance(lm.config, config.EncoderDecoder):
        out = jaxlm.generate(lm, SOURCES, make_t5.NEW, eos=())
        assert [row.tolist() for row in out.tokens] == their_text(back, SOURCES)


@parity
def test_released_umt5s_are_not_scaled():
    """They say that the head is not tied, and were trained without the scale that transformers 5 gives every umT5."""
    changes = CASES["umt5"]["config"] | {"tie_word_embeddings": False}
    reference = make_t5.build(changes)
    lm = load(Synthetic(changes, {name: one.shape for name, one in reference.named_parameters()}))
    same(run(lm, SOURCES, TARGETS), [make_t5.run(reference, *pair) * 4 for pair in zip(SOURCES, TARGETS, strict=True)])


@parity
def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    import torch

    reference = make_t5.build(CASES["umt5"]["config"]).to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "theirs")
    jaxlm.io.save(jaxlm.io.load(tmp_path / "theirs", dtype=jnp.bfloat16), tmp_path / "ours", family="umt5")
    back = dict(from_transformers(tmp_path / "ours").named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(back[name].to(torch.bfloat16), parameter), name

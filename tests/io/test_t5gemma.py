"""T5Gemma: against what transformers gives, stored by goldens/make_t5gemma.py and live."""

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
from jaxlm.model import Model
from tests.io.goldens import make_t5gemma
from tests.io.synthetic import Synthetic

RNG = np.random.default_rng(7)
SOURCES = [[int(i) for i in RNG.integers(0, make_t5gemma.VOCABULARY, length)] for length in (21, 1, 8)]
TARGETS = [[int(i) for i in RNG.integers(0, make_t5gemma.VOCABULARY, 19)] for _ in SOURCES]


@functools.cache
def goldens():
    with np.load(make_t5gemma.PATH) as arrays:
        cases = json.loads(arrays["cases"].tobytes())
        return {name: case | {"outputs": [arrays[f"{i} {name}"] for i in range(len(make_t5gemma.SOURCES))]}
                for name, case in cases.items()}


CASES = goldens()
WRITERS = [name for name, case in CASES.items() if "greedy" in case]


def load(name):
    case = CASES[name]
    source = Synthetic(case["config"], case["tensors"])
    cfg = families.read(source.config)
    return Model(cfg, assemble(cfg, families.find(source.config), source, jnp.float32))


def run(lm, sources, targets):
    """The outputs of all rows side by side, each without its padding."""
    lengths, width = [len(one) for one in sources], max(map(len, sources))
    given = dict(tokens=jnp.asarray([one + [0] * (width - len(one)) for one in sources], jnp.int32),
                 lengths=jnp.asarray(lengths, jnp.int32))
    if isinstance(lm.config, config.Encoder):
        hidden = jax.jit(lambda params: model.forward(params, lm.config, **given).last)(lm.params)
        return [np.asarray(row[:length]) for row, length in zip(hidden, lengths, strict=True)]

    def both(params):
        memory = model.encode(params, lm.config, **given)
        return model.forward(params, lm.config, jnp.asarray(targets, jnp.int32), memory=memory).logits
    return list(np.asarray(jax.jit(both)(lm.params)))


def same(ours, theirs):
    for mine, row in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, row, rtol=0, atol=1e-4)


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in CASES.items()} == make_t5gemma.CASES


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_and_greedy_text_as_transformers(name):
    lm = load(name)
    same(run(lm, make_t5gemma.SOURCES, make_t5gemma.TARGETS), CASES[name]["outputs"])
    if name in WRITERS[:2]:
        assert CASES[name]["margin"] > 2e-4  # else a difference in the text would not be one
        out = jaxlm.generate(lm, make_t5gemma.SOURCES, make_t5gemma.NEW, eos=())
        assert [row.tolist() for row in out.tokens] == CASES[name]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_reads_the_same(name):
    case = CASES[name]
    cfg = families.read(case["config"])
    architectures = {"architectures": ["T5GemmaEncoderModel"]} if name not in WRITERS else {}
    assert families.read(families.write(cfg, "t5gemma")[1]) == cfg
    assert families.read(case["written"] | architectures) == cfg


def test_sides_and_windows():
    cfg = families.read(CASES["t5gemma"]["config"])
    windows = [[block.attention.window for block in side.stack.blocks()] for side in (cfg.encoder, cfg.decoder)]
    assert windows == [[5, None, 5], [4, None, 4]]  # the encoder's reach as far in both directions, their end included
    assert cfg.start == (2,) and not cfg.shared and cfg.decoder.head.tied
    assert families.read(CASES["t5gemma"]["config"] | {"decoder_start_token_id": 7}).start == (7,)
    big = families.read({"model_type": "t5gemma"})
    assert big.encoder.width == big.decoder.width == 2304 and big.decoder.stack.layers == 26


@pytest.mark.parametrize("changes, message", [
    ({"decoder": make_t5gemma.LARGE | {"cross_attention_hidden_size": 8}}, "cross_attention_hidden_size = 8 is not supported"),
    ({"encoder": make_t5gemma.SMALL | {"is_decoder": True}}, r"t5gemma \(encoder\): it must be False"),
    ({"encoder": make_t5gemma.SMALL | {"odd": 1}}, r"odd = 1 is not supported for t5gemma \(encoder\): jaxlm does not know"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder = False is not supported"),
    ({"decoder": make_t5gemma.SMALL | {"layer_types": ["full_attention"]}}, "a list of 3 of full_attention"),
    ({"decoder": make_t5gemma.SMALL | {"bos_token_id": None}}, "lacks decoder_start_token_id, which t5gemma needs"),
    ({"decoder": 5}, "decoder = 5 is not supported for t5gemma: an object is needed")])
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        families.read(make_t5gemma.CASES["t5gemma"] | changes)


def test_what_cannot_be_expressed_is_not_written():
    text = config.to_json(families.read(CASES["t5gemma"]["config"]))
    with pytest.raises(ValueError, match="t5gemma: config.shared is True and would be False"):
        families.write(config.from_json(text.replace('"shared": false', '"shared": true')), "t5gemma")


def theirs(name):
    return make_t5gemma.build(make_t5gemma.CASES[name])


def outputs(reference, sources=SOURCES, targets=TARGETS):
    return [make_t5gemma.run(reference, source, target) for source, target in zip(sources, targets, strict=True)]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_between_here_and_transformers(name, tmp_path):
    import torch
    import transformers

    reference = theirs(name)
    same(outputs(reference, make_t5gemma.SOURCES, make_t5gemma.TARGETS), CASES[name]["outputs"])
    want = outputs(reference)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = jaxlm.io.load(tmp_path / "theirs")
    assert loaded.config == families.read(CASES[name]["config"])
    same(run(loaded, SOURCES, TARGETS), want)
    jaxlm.io.save(loaded, tmp_path / "ours")
    named = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    again, info = getattr(transformers, named).from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, left over, or of another shape
    same(outputs(again.eval()), want)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_the_text_of_transformers_with_a_cache(name):
    import torch

    reference, lm = theirs(name), load(name)
    ours = jaxlm.generate(lm, SOURCES, 8, eos=()).tokens
    for source, text in zip(SOURCES, ours, strict=True):
        given = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source), dtype=torch.long)}
        out = reference.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                                 decoder_start_token_id=lm.config.start[0])
        assert text.tolist() == out[0, 1:].tolist()

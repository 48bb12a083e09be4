"""Logits and greedy text of every family against what transformers gave, stored by goldens/make_goldens.py."""

import dataclasses
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, generate
from jaxlm.io import families
from jaxlm.io.assemble import assemble
from jaxlm.model import Model
from tests import tiny
from tests.io import synthetic
from tests.io.goldens import make_goldens

TEXT, CASES = synthetic.goldens()


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in CASES.items()} == make_goldens.CASES
    assert TEXT == make_goldens.TEXT
    assert {case["config"]["model_type"] for case in CASES.values()} == {
        name for name, family in families.FAMILIES.items() if family.kinds == (config.Decoder,) and not family.mixtures} - {
            "modernbert-decoder"}


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_greedy_text_as_transformers(name):
    case, source = CASES[name], synthetic.case(name)
    cfg = families.read(source.config)
    params = assemble(cfg, families.find(source.config), source, jnp.float32)
    logits = synthetic.runner(params, cfg, len(TEXT) + make_goldens.NEW)
    np.testing.assert_allclose(logits(TEXT), case["logits"], rtol=0, atol=1e-4)
    assert case["margin"] > 2e-4  # else a difference in the text would not be one
    assert synthetic.greedy(logits, TEXT, make_goldens.NEW) == case["greedy"]


def turns_with_length(cfg):
    """Whether keys in a cache were turned for a shorter text than the whole text's would be."""
    scalings = (config.DynamicNtkScaling, config.LongRopeScaling)
    return any(isinstance(getattr(block.attention.position, "scaling", None), scalings) for block in cfg.stack.blocks())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not turns_with_length(families.read(case["config"]))])
def test_generation_gives_the_same_text_as_transformers(name):
    # The others are compared with transformers' own cache in test_parity.
    source = synthetic.case(name)
    cfg = families.read(source.config)
    lm = Model(cfg, assemble(cfg, families.find(source.config), source, jnp.float32))
    assert generate(lm, [TEXT], make_goldens.NEW).tokens[0].tolist() == CASES[name]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_writes_reads_the_same(name):
    # `written` has the keys of transformers 5 (rope_parameters, layer_types), `config` mostly those from before.
    assert families.read(CASES[name]["written"]) == families.read(CASES[name]["config"])


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_reads_the_same(name):
    cfg = families.read(CASES[name]["config"])
    kind = CASES[name]["config"]["model_type"]
    assert families.read(families.write(cfg, "gemma3_text" if kind == "gemma3" else kind)[1]) == cfg
    _, values = families.write(cfg)
    assert families.read(values) == cfg


def test_falcons_rounding_shows():
    case, source = CASES["falcon rw, twelve heads"], synthetic.case("falcon rw, twelve heads")
    cfg = families.read(source.config)
    params = assemble(cfg, families.find(source.config), source, jnp.float32)
    block = cfg.stack.blocks()[0]
    exact = dataclasses.replace(block.attention.position, rounded=False)
    block = dataclasses.replace(block, attention=dataclasses.replace(block.attention, position=exact))
    logits = synthetic.runner(params, dataclasses.replace(cfg, stack=config.stack_of([block] * cfg.stack.layers)), len(TEXT))
    assert np.max(np.abs(logits(TEXT) - case["logits"])) > 1e-3


def test_no_two_tensors_are_alike():
    """So that a swapped or misread tensor shows."""
    sums = [zlib.crc32(synthetic.case(name).read(tensor).tobytes()) for name in ("falcon new", "codegen")
            for tensor in CASES[name]["tensors"] if "weight" in tensor]
    assert len(set(sums)) > 0.9 * len(sums)


def test_a_family_expresses_a_config_or_says_why_not():
    configs = [families.read(case["config"]) for case in CASES.values()] + [*tiny.CAUSAL.values(), tiny.BIDIRECTIONAL]
    expressed = 0
    for cfg in configs:
        for name in families.FAMILIES:
            try:
                _, values = families.write(cfg, name)
            except ValueError as error:
                assert str(error).startswith(f"no family of transformers expresses this config. {name}: ")
            else:
                assert families.read(values).stack.blocks() == cfg.stack.blocks()
                expressed += 1
    assert expressed >= len(CASES)
    for cfg in tiny.CAUSAL.values():
        with pytest.raises(ValueError, match="no family of transformers expresses this config. llama: .*; bloom: "):
            families.write(cfg)


def test_blocks_may_be_grouped_in_any_way():
    cfg = families.read(CASES["llama"]["config"])
    block = cfg.stack.blocks()[0]
    other = dataclasses.replace(cfg, stack=config.Stack((config.Group((block, block), 1), config.Group((block,), 1))))
    assert families.write(other, "llama") == families.write(cfg, "llama")
    logits = []
    for one in (cfg, other):
        params = assemble(one, families.FAMILIES["llama"], synthetic.case("llama"), jnp.float32)
        logits.append(synthetic.runner(params, one, len(TEXT))(TEXT))
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)

"""The same as the goldens, live, and checkpoints that go back and forth between jaxlm and transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
import jaxlm.io
from jaxlm.io import families
from jaxlm.io.assemble import assemble
from jaxlm.model import Model
from tests.io import synthetic
from tests.io.goldens import make_goldens

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

# Other texts than the goldens', and longer.
RNG = np.random.default_rng(1)
TEXTS = [[int(i) for i in RNG.integers(0, make_goldens.VOCABULARY, length)] for length in (1, 7, 40)]


def theirs(name):
    return make_goldens.build(make_goldens.CASES[name])


def same(loaded, reference, texts=TEXTS):
    run = synthetic.runner(loaded.params, loaded.config, max(len(text) for text in texts))
    for text in texts:
        np.testing.assert_allclose(run(text), make_goldens.logits(reference, text), rtol=0, atol=1e-4)


def from_transformers(path):
    import torch
    import transformers

    attention = "sdpa" if json.loads((path / "config.json").read_text()).get("alibi") else "eager"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, left over, or of another shape
    return model.eval()


@pytest.mark.parametrize("name", make_goldens.CASES)
def test_the_goldens_are_what_transformers_gives(name):
    text, cases = synthetic.goldens()
    np.testing.assert_allclose(make_goldens.logits(theirs(name), text), cases[name]["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama dynamic", "llama longrope"])
def test_a_scaling_that_depends_on_the_length_gives_the_text_of_transformers_with_a_cache(name):
    import torch

    source, text = synthetic.case(name), synthetic.goldens()[0]
    cfg = families.read(source.config)
    lm = Model(cfg, assemble(cfg, families.find(source.config), source, jnp.float32))
    new = min(make_goldens.NEW, cfg.length - len(text))
    out = theirs(name).generate(torch.tensor([text]), max_new_tokens=new, do_sample=False, use_cache=True,
                                eos_token_id=None, pad_token_id=0)
    assert jaxlm.generate(lm, [text], new).tokens[0].tolist() == out[0, len(text):].tolist()


@pytest.mark.parametrize("name", make_goldens.CASES)
def test_what_transformers_saves_loads_here(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    loaded = jaxlm.io.load(tmp_path)
    assert loaded.config == families.read(make_goldens.CASES[name])
    same(loaded, reference)


@pytest.mark.parametrize("name", [name for name in make_goldens.CASES if "vision" not in name])
def test_what_is_saved_here_loads_in_transformers(name, tmp_path):
    source = synthetic.case(name)
    cfg = families.read(source.config)
    family = families.find(source.config)
    first = Model(cfg, assemble(cfg, family, source, jnp.float32))
    jaxlm.io.save(first, tmp_path, family=family.name)
    reference = from_transformers(tmp_path)
    assert type(reference).__name__ == type(theirs(name)).__name__
    same(first, reference)
    again = jaxlm.io.load(tmp_path)
    assert again.config == cfg
    same(again, reference)


@pytest.mark.parametrize("name", ["qwen2 tied, windows", "phi3", "pythia", "gpt2", "falcon new"])
def test_shards_both_ways(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    loaded = jaxlm.io.load(tmp_path / "theirs")
    same(loaded, reference)
    jaxlm.io.save(loaded, tmp_path / "ours", shard_bytes=20000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    same(loaded, from_transformers(tmp_path / "ours"))


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    import torch

    reference = theirs("mistral").to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = jaxlm.io.load(tmp_path / "theirs", dtype=jnp.bfloat16)
    jaxlm.io.save(loaded, tmp_path / "ours", family="mistral")
    back = dict(from_transformers(tmp_path / "ours").named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(back[name].to(torch.bfloat16), parameter), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["falcon rw", "falcon rw, twelve heads"])
def test_falcons_rounded_bias_far_into_a_text(name, tmp_path):
    # Beyond 256 tokens bfloat16 cannot tell neighbouring positions apart.
    text = [int(i) for i in RNG.integers(0, make_goldens.VOCABULARY, 700)]
    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    same(jaxlm.io.load(tmp_path), reference, [text])


@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope", "falcon many heads, rotary"])
def test_scalings_by_the_length_of_the_text(name, tmp_path):
    """A text that grows past the original length, one token after the other, and one that starts beyond it."""
    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    text = [int(i) for i in RNG.integers(0, make_goldens.VOCABULARY, 60)]
    same(jaxlm.io.load(tmp_path), reference, [text[:length] for length in range(8, 60, 2)])

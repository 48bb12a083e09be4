"""What `infer.convert` makes of weights that PyTorch wrote."""

import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxlm
from infer import convert
from jaxlm import config
from jaxlm.config import Pooling
from tests.io.goldens import make_bart
from tests.io.test_bart import loaded
from tests.io.test_bert import encoder


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="bin is read with PyTorch: pip install torch"), convert.readable(str(tmp_path)):
        pass


def test_other_directories_are_read_where_they_are(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with convert.readable(str(tmp_path)) as source:
        assert source == str(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("files", [1, 2])
def test_weights_of_pytorch(files, tmp_path):
    import torch

    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir()
    name = "marian"
    reference = make_bart.build(make_bart.CASES[name])
    (source / "config.json").write_text(json.dumps(make_bart.CASES[name]))
    stale = source / "model.safetensors.index.json"
    stale.write_text("{}")
    tensors = list(reference.state_dict().items())  # the tied ones share their memory
    for i in range(files):
        suffix = "" if files == 1 else f"-{i + 1:05d}-of-{files:05d}"
        torch.save(dict(tensors[i::files]), source / f"pytorch_model{suffix}.bin")
    convert.main(str(source), target)
    lm = jaxlm.load(target)
    assert lm.config == loaded(name).config
    jax.tree.map(np.testing.assert_array_equal, lm.params, loaded(name).params)
    assert stale.read_text() == "{}"


@pytest.mark.parity
def test_a_product_of_pytorch_beside_other_weights(tmp_path):
    import torch

    first, source = encoder(config.Vector(Pooling.MEAN, width=5, bias=True)), tmp_path / "from"
    jaxlm.save(first, source)
    dense = source / "2_Dense"
    tensors = safetensors.numpy.load_file(dense / "model.safetensors")
    torch.save({name: torch.from_numpy(one) for name, one in tensors.items()}, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"infer.convert --from .* makes it of pytorch_model.bin"):
        jaxlm.load(source)
    convert.main(str(source), tmp_path / "one")
    whole = safetensors.numpy.load_file(source / "model.safetensors")
    torch.save({name: torch.from_numpy(one) for name, one in whole.items()}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it has pytorch_model.bin: `python -m infer.convert"):
        jaxlm.load(source)
    convert.main(str(source), tmp_path / "both")
    for name in ("one", "both"):
        again = jaxlm.load(tmp_path / name)
        assert again.config == first.config
        jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_settings_of_searches_are_kept(tmp_path):
    source, target = tmp_path / "from", tmp_path / "to"
    jaxlm.save(loaded("marian"), source)
    settings = {"bad_words_ids": [[47]], "num_beams": 4, "decoder_start_token_id": 9}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert.main(str(source), target)
    assert json.loads((target / "generation_config.json").read_text()) == settings
    assert jaxlm.load(target).config.start == (9,)
    (source / "generation_config.json").write_text('{"num_beams": 2}')
    convert.keep(str(target), source)  # what is written wins
    assert json.loads((source / "generation_config.json").read_text()) == settings | {"num_beams": 2}


@pytest.mark.parity
def test_a_pickle_of_anything_else_is_refused(tmp_path):
    import pickle

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(ValueError, match="does not read as PyTorch's weights"), convert.readable(str(tmp_path)):
        pass

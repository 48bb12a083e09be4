"""BERT's relatives against what transformers gave, stored by goldens/make_bert.py, and directories of sentence encoders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import jaxlm
from jaxlm import adapt, config, model
from jaxlm.config import Pooling
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.io import families, sentence
from jaxlm.io.assemble import assemble
from jaxlm.model import Model
from tests import tiny
from tests.io import synthetic
from tests.io.goldens import make_bert

with np.load(make_bert.PATH) as arrays:
    CASES = json.loads(arrays["cases"].tobytes())
    STORED = {name: arrays[name] for name in arrays.files if name != "cases"}

LENGTHS = [len(text) for text in make_bert.TEXTS]


def source(name):
    return synthetic.Synthetic(CASES[name]["config"], CASES[name]["tensors"])


def built(name):
    found = source(name)
    cfg = families.read(found.config)
    return Model(cfg, assemble(cfg, families.find(found.config), found, jnp.float32))


def rows(lists, width=16):
    return jnp.asarray([row + [0] * (width - len(row)) for row in lists], jnp.int32)


def outputs(lm):
    """Of the three texts side by side: each one's logits or hidden states."""
    types = rows(make_bert.TYPES) if lm.config.embedding.types not in (None, 1) else None
    forward = tiny.jit(lambda params, tokens, lengths: model.forward(params, lm.config, tokens, lengths=lengths, types=types))
    out = forward(lm.params, rows(make_bert.TEXTS), jnp.asarray(LENGTHS, jnp.int32))
    whole = np.asarray(out.last if lm.config.head is None else out.logits)
    return [one if one.ndim == 1 else one[:length] for one, length in zip(whole, LENGTHS, strict=True)]


def equal(ours, theirs, atol=1e-4):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=0, atol=atol)


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in CASES.items()} == make_bert.CASES


@pytest.mark.parametrize("name", make_bert.STORED)
def test_padded_texts_give_what_transformers_gives_each_alone(name):
    equal(outputs(built(name)), [STORED[f"{name} {i}"] for i in range(3)])


@pytest.mark.parametrize("name", CASES)
def test_configs_read_the_same_from_what_transformers_and_jaxlm_write(name):
    cfg = families.read(CASES[name]["config"])
    assert families.read(CASES[name]["written"]) == cfg
    assert families.read(families.write(cfg, CASES[name]["config"]["model_type"])[1]) == cfg
    assert families.read(families.write(cfg)[1]) == cfg


def test_old_names_leftovers_and_names_without_prefix():
    """A release of BERT has LayerNorm.gamma and .beta, a pooler, a head for the next sentence, and position_ids."""
    cfg, found = families.read(CASES["bert words"]["config"]), source("bert words")
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): name
               for name in found.tensors}
    extra = {"bert.pooler.dense.weight": (16, 16), "cls.seq_relationship.bias": (2,), "bert.embeddings.position_ids": (1, 20)}
    old = synthetic.Synthetic(found.config, {name: found.tensors[was] for name, was in renamed.items()} | extra)
    old.read = lambda name: found.read(renamed[name])
    family = families.find(found.config)
    first, second = (assemble(cfg, family, one, jnp.float32) for one in (found, old))
    bare = synthetic.Synthetic(found.config, {name.removeprefix("bert."): shape for name, shape in found.tensors.items()})
    bare.read = lambda name: found.read(name if name in found.tensors else f"bert.{name}")
    for other in (second, assemble(cfg, family, bare, jnp.float32)):
        assert jax.tree.all(jax.tree.map(np.array_equal, first, other))


@pytest.mark.parametrize("name, change, message", [
    ("bert", {"architectures": ["BertForQuestionAnswering"]}, "there is BertModel, BertForMaskedLM, BertForSequence"),
    ("bert", {"position_embedding_type": "relative_key"}, "it must be 'absolute'"),
    ("bert", {"is_decoder": True}, "is_decoder = True"),
    ("roberta words", {"tie_word_embeddings": False}, "of a masked language model it must be true"),
    ("roberta", {"pad_token_id": None}, "pad_token_id = None"),
    ("mpnet", {"relative_attention_num_buckets": 64}, "it must be 32"),
    ("electra", {"mystery": 3}, "mystery = 3"),
])
def test_configs_that_cannot_be_expressed(name, change, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES[name]["config"] | change)


# Sentence encoders.

def encoder(head):
    cfg = dataclasses.replace(families.read(CASES["mpnet"]["config"]), head=head)
    return Model(cfg, tiny.weights(model.spec(cfg)))


@pytest.mark.parametrize("head", [
    config.Vector(Pooling.FIRST, normalize=False), config.Vector(Pooling.LAST),
    config.Vector(Pooling.WEIGHTED_MEAN, normalize=False, width=5), config.Vector(Pooling.MAX, True, 7, bias=True)], ids=str)
def test_a_sentence_encoder_comes_back(head, tmp_path):
    first = encoder(head)
    jaxlm.save(first, tmp_path)
    second = jaxlm.load(tmp_path)
    assert second.config == first.config
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))
    kinds = ["Transformer", "Pooling"] + ["Dense"] * (head.width is not None) + ["Normalize"] * head.normalize
    listed = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"] for module in listed] == [f"sentence_transformers.models.{kind}" for kind in kinds]
    assert [module["path"] for module in listed] == ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    assert not any("linear" in name for name in safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    if head.width:
        product = safetensors.numpy.load_file(tmp_path / "2_Dense" / "model.safetensors")
        np.testing.assert_array_equal(product["linear.weight"], first.params["encoder"]["head"]["out"].T)
        assert set(product) == {"linear.weight", *(["linear.bias"] if head.bias else [])}


def cased():
    """A tokenizer that tells cases apart."""
    words = {word: i for i, word in enumerate(["[UNK]", "a", "A", "b"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend)


def test_as_many_tokens_as_sentence_transformers_reads(tmp_path):
    first = encoder(config.Vector(Pooling.MEAN))
    reading, whole = tmp_path / "sentence_bert_config.json", first.config.length
    jaxlm.save(first, tmp_path)
    assert json.loads(reading.read_text()) == {"max_seq_length": whole, "do_lower_case": False}
    for longest, length in ((7, 7), (whole + 1, whole), (None, whole)):
        reading.write_text(json.dumps({"max_seq_length": longest}))
        assert jaxlm.load(tmp_path).config == dataclasses.replace(first.config, length=length)
    reading.rename(tmp_path / "sentence_roberta_config.json").write_text('{"max_seq_length": 7}')
    short = jaxlm.load(tmp_path)
    jaxlm.save(short, tmp_path / "again")
    assert jaxlm.load(tmp_path / "again").config == short.config and short.config.length == 7
    files = [json.loads((place / "config.json").read_text()) for place in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]  # its table of positions is as long as it was
    (tmp_path / "sentence_roberta_config.json").write_text('{"max_seq_length": 0}')
    with pytest.raises(ValueError, match="max_seq_length = 0 is no positive whole number"):
        jaxlm.load(tmp_path)


def test_texts_in_lower_case(tmp_path):
    jaxlm.save(dataclasses.replace(encoder(config.Vector(Pooling.MEAN)), tokenizer=cased()), tmp_path)
    assert jaxlm.load(tmp_path).tokenizer.encode("A b B") == [2, 3, 0]
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    low = jaxlm.load(tmp_path)
    assert low.tokenizer.encode("A b B") == [1, 3, 3]
    jaxlm.save(low, tmp_path / "again")
    assert jaxlm.load(tmp_path / "again").tokenizer.encode("A b B") == [1, 3, 3]


def test_modules_take_the_place_of_the_head_that_the_config_names(tmp_path):
    jaxlm.save(encoder(config.Vector(Pooling.MEAN)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"architectures": ["MPNetForMaskedLM"]}))
    # As sentence-transformers 6 writes it.
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": "lasttoken"}))
    assert jaxlm.load(tmp_path).config.head == config.Vector(Pooling.LAST)


@pytest.mark.parametrize("file, change, message", [
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by mean and max: it must be one of cls, mean"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True}, "sqrt_len"),
    ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, "has the activation .*Tanh: it must"),
    ("2_Dense/config.json", None, "2_Dense/config.json, which modules.json names, is not there"),
    ("2_Dense/model.safetensors", None, "lacks 2_Dense/model.safetensors"),
    ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Dropout", "path": "1"}], "has Transformer, Dropout"),
])
def test_modules_that_cannot_be_expressed(file, change, message, tmp_path):
    jaxlm.save(encoder(config.Vector(Pooling.MEAN, width=5)), tmp_path)
    place = tmp_path / file
    if change is None:
        place.unlink()
    else:
        old = json.loads(place.read_text())
        place.write_text(json.dumps(change if isinstance(change, list) else old | change))
    with pytest.raises(ValueError, match=message):
        jaxlm.load(tmp_path)


def test_modules_beside_a_decoder(tmp_path):
    jaxlm.save(encoder(config.Vector(Pooling.MEAN)), tmp_path)
    with pytest.raises(ValueError, match="its model is no encoder but a Decoder"):
        sentence.read(tiny.decoder([tiny.block()]), tmp_path)


# UniXcoder: one stack, whose mode is a matter of who sees whom.

def test_unixcoders_three_modes():
    reads = built("roberta")
    writes = adapt.to_decoder(reads)
    modes, length = make_bert.modes(), LENGTHS[0]
    tokens = rows(make_bert.TEXTS[:1] * len(modes), length)
    masks = jnp.asarray(list(modes.values()))
    by_mask = tiny.jit(lambda p: model.forward(p, reads.config, tokens, mask=masks).last)(reads.params)
    # Of a decoder a prefix sees all of itself: the source, in decoder mode nothing, in encoder mode the whole text.
    sources = {"encoder": length, "decoder": 0, "encoder-decoder": make_bert.SOURCE}
    prefix = jnp.broadcast_to(jnp.asarray([sources[mode] for mode in modes], jnp.int32)[:, None], tokens.shape)
    out = tiny.jit(lambda p: model.forward(p, writes.config, tokens, prefix=prefix))(writes.params)
    theirs = np.stack([STORED[f"mode {mode}"] for mode in modes])
    for ours in (by_mask, out.last):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    words = np.asarray(writes.params["decoder"]["embedding"]["tokens"])
    np.testing.assert_allclose(out.logits, theirs @ words.T, rtol=0, atol=1e-3)


def written_by(reads, source, new):
    """The tokens that follow a source in encoder-decoder mode, by whole forward passes of the stack under a mask."""
    text, causal = list(source), np.tri(16, dtype=bool)
    mask = jnp.asarray(causal | ((np.arange(16) < len(source))[None] & (np.arange(16) < len(source))[:, None]))[None]
    words = np.asarray(reads.params["encoder"]["embedding"]["tokens"])
    run = tiny.jit(lambda params, tokens: model.forward(params, reads.config, tokens, mask=mask).last[0])
    for _ in range(new):
        text.append(int(np.argmax(np.asarray(run(reads.params, rows([text])))[len(text) - 1] @ words.T)))
    return text[len(source):]


def test_unixcoder_writes():
    """What it has read as a whole goes on from left to right, in the mode of an encoder-decoder."""
    reads = built("roberta")
    writes, sources = adapt.to_decoder(reads), [make_bert.TEXTS[1], make_bert.TEXTS[0][:9]]
    out = jaxlm.generate(writes, sources, 7, prefix=True, eos=(), logprobs=True)
    assert [row.tolist() for row in out.tokens] == [written_by(reads, source, 7) for source in sources]
    causal = jaxlm.generate(writes, sources, 7, eos=(), logprobs=True)
    assert abs(causal.logprobs[1][0] - out.logprobs[1][0]) > 1e-3


# Live.

LONGER = [[int(i) for i in np.random.default_rng(1).integers(4, 64, length)] for length in (16, 3, 11)]


def from_transformers(path, cls):
    import torch
    import transformers

    lm, info = getattr(transformers, cls).from_pretrained(path, dtype=torch.float32, attn_implementation="eager",
                                                          output_loading_info=True)
    # The pooler, which a model without head brings along and nothing of ours reads.
    assert set(info["missing_keys"]) <= ({"pooler.dense.weight", "pooler.dense.bias"} if cls.endswith("Model") else set()), info
    assert not any(value for key, value in info.items() if key != "missing_keys"), info
    return lm.eval()


def same(lm, reference):
    """In a padded batch of both."""
    import torch

    tokens, lengths = rows(LONGER), [len(row) for row in LONGER]
    forward = tiny.jit(lambda params, tokens, lengths: model.forward(params, lm.config, tokens, lengths=lengths))
    out = forward(lm.params, tokens, jnp.asarray(lengths, jnp.int32))
    ours = np.asarray(out.last if lm.config.head is None else out.logits)
    mask = (np.arange(16)[None] < np.asarray(lengths)[:, None])
    padding = reference.config.pad_token_id or 0
    with torch.no_grad():
        theirs = reference(torch.from_numpy(np.where(mask, np.asarray(tokens), padding)).long(),
                           attention_mask=torch.from_numpy(mask).long())
    theirs = next(theirs[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in theirs).numpy()
    chosen = np.arange(3) if ours.ndim == 2 else np.nonzero(mask)
    np.testing.assert_allclose(ours[chosen].reshape(theirs[chosen].shape), theirs[chosen], rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_go_back_and_forth(name, tmp_path):
    reference = make_bert.build(CASES[name]["config"])
    for i in range(3):
        types = make_bert.TYPES[i] if make_bert.typed(CASES[name]["config"]) else None
        if name in make_bert.STORED:
            equal([make_bert.output(reference, make_bert.TEXTS[i], types)], [STORED[f"{name} {i}"]], 1e-5)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = jaxlm.load(tmp_path / "theirs")
    assert loaded.config == families.read(CASES[name]["config"])
    same(loaded, reference)
    jaxlm.io.save(loaded, tmp_path / "ours", family=CASES[name]["config"]["model_type"])
    cls = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    assert cls == CASES[name]["config"]["architectures"][0].replace("BertForPreTraining", "BertForMaskedLM")
    same(loaded, from_transformers(tmp_path / "ours", cls))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
def test_unixcoder_writes_what_its_code_does(mode, tmp_path):
    """Its code: RobertaModel under a mask, and the table of words as the head."""
    import torch

    reference, sources, new = make_bert.build(CASES["roberta"]["config"]), make_bert.TEXTS[:2], 4
    reference.save_pretrained(tmp_path)
    lm = adapt.to_decoder(jaxlm.load(tmp_path))
    ours = jaxlm.generate(lm, sources, new, eos=(), prefix=mode == "encoder-decoder")
    for source, row in zip(sources, ours.tokens, strict=True):
        text = list(source)
        for _ in range(new):
            allowed = torch.ones(len(text), len(text)).tril()
            if mode == "encoder-decoder":
                allowed[:len(source), :len(source)] = 1
            bias = torch.where(allowed > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
            with torch.no_grad():
                last = reference(torch.tensor([text]), attention_mask=bias).last_hidden_state[0, -1]
                text.append(int(torch.argmax(reference.embeddings.word_embeddings.weight @ last)))
        assert row.tolist() == text[len(source):]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_sentence_encoder_in_transformers(tmp_path):
    import torch

    lm = encoder(config.Vector(Pooling.MEAN, True, 7, bias=True))
    jaxlm.save(lm, tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "2_Dense/model.safetensors")
    product = {name: torch.from_numpy(array) for name, array in stored.items()}
    reference = from_transformers(tmp_path, "MPNetModel")
    vectors = jaxlm.embed(lm, make_bert.TEXTS)
    for vector, text in zip(vectors, make_bert.TEXTS, strict=True):
        with torch.no_grad():
            hidden = reference(torch.tensor([text])).last_hidden_state[0].mean(0)
        theirs = torch.nn.functional.linear(hidden, product["linear.weight"], product["linear.bias"])
        np.testing.assert_allclose(vector, (theirs / theirs.norm()).numpy(), atol=1e-5)

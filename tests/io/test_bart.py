"""BART, mBART, Marian and M2M-100 against what transformers gave, stored by goldens/make_bart.py, and live."""

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
from jaxlm.io.assemble import assemble
from tests.io import synthetic
from tests.io.goldens import make_bart

CASES = make_bart.CASES
SOURCES, TEXTS = make_bart.SOURCES, make_bart.TEXTS


class Source(synthetic.Synthetic):
    def read(self, name):
        self.reads.append(name)
        return make_bart.weight(name, self.tensors[name]).astype(self.dtype)


@functools.cache
def goldens():
    with np.load(make_bart.PATH) as arrays:
        return json.loads(arrays["cases"].tobytes()), {name: arrays[name] for name in arrays if name != "cases"}


@functools.cache
def loaded(name):
    found = goldens()[0][name]
    cfg = families.read(found["config"])
    source = Source(found["config"], found["tensors"])
    return jaxlm.Model(cfg, assemble(cfg, families.find(source.config), source, jnp.float32))


@functools.partial(jax.jit, static_argnames="cfg")
def run(params, cfg, source, source_lengths, tokens, lengths):
    memory = model.encode(params, cfg, source, lengths=source_lengths)
    return model.forward(params, cfg, tokens, lengths=lengths, memory=memory).logits


def logits(lm, sources, texts):
    """[T, V] of each text; all rows in one padded batch."""
    arrays = [jnp.asarray(array) for rows in (sources, texts) for array in padded(rows, max(map(len, rows)))]
    found = np.asarray(run(lm.params, lm.config, *arrays))
    return [row[:len(text)] for row, text in zip(found, texts, strict=True)]


def test_the_goldens_are_those_of_the_cases():
    assert {name: case["config"] for name, case in goldens()[0].items()} == CASES
    assert {config["model_type"] for config in CASES.values()} == {"bart", "mbart", "marian", "m2m_100"}


@pytest.mark.parametrize("name", CASES)
def test_same_logits_as_transformers_for_rows_of_any_length(name):
    for i, found in enumerate(logits(loaded(name), SOURCES, TEXTS)):
        np.testing.assert_allclose(found, goldens()[1][f"{i} {name}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mbart", "marian two tables", "m2m_100"])
def test_generation_gives_the_same_text_as_transformers(name):
    case, lm = goldens()[0][name], loaded(name)
    assert list(lm.config.start) == case["start"] and case["margin"] > 2e-4
    out = jaxlm.generate(lm, SOURCES, make_bart.NEW + len(case["start"]) - 1, logprobs=True)
    assert [row.tolist() for row in out.tokens] == case["greedy"]
    np.testing.assert_allclose(np.stack(out.logprobs), goldens()[1][f"logprobs {name}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_configs_go_back_and_forth(name):
    case = goldens()[0][name]
    cfg = families.read(case["config"])
    kind = case["config"]["model_type"]
    assert families.read(families.write(cfg, kind)[1]) == cfg
    assert families.write(cfg)[0].name == kind  # no other family has this model
    # transformers moves forced_bos_token_id to a file of its own.
    kept = {key: case["config"][key] for key in ("architectures", "forced_bos_token_id") if key in case["config"]}
    assert families.read(case["written"] | kept) == cfg


def test_what_a_config_leaves_out_is_as_in_transformers():
    cfg = families.read({"model_type": "marian"})
    assert (cfg.decoder.embedding.vocabulary, cfg.start, cfg.decoder.width) == (58101, (58100,), 1024)
    assert families.read({"model_type": "m2m_100"}).decoder.embedding.scale == 32.0
    assert families.read({"model_type": "bart", "hidden_size": 512}).encoder.width == 512


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["BartForSequenceClassification"]}, "there is BartForConditionalGeneration and BartModel"),
    ({"normalize_before": True}, "normalize_before"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings .* must share the table"),
    ({"decoder_start_token_id": 48}, "must be ids below 48"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder"),
    ({"hidden_size": 64}, "contradicts d_model"),
    ({"encoder_attention_heads": 5}, "multiple of encoder_attention_heads"),
    ({"relative_positions": True}, "does not know this key"),
])
def test_a_config_that_will_not_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        families.read(CASES["bart"] | change)


def test_tables_of_two_sizes_are_not_shared():
    with pytest.raises(ValueError, match="decoder_vocab_size = 52 .* vocab_size, 48"):
        families.read(CASES["marian two tables"] | {"share_encoder_decoder_embeddings": True})


def test_names_of_tied_tables_and_of_what_is_not_needed():
    case = goldens()[0]["marian"]
    again = {"lm_head.weight": [48, 32], "model.encoder.embed_tokens.weight": [48, 32], "model.encoder.embed_positions.weight":
             [40, 32], "model.encoder.version": [1]}

    class Twins(Source):
        def read(self, name):
            shared = name.endswith(("lm_head.weight", "embed_tokens.weight"))
            return super().read("model.shared.weight" if shared else name)

    cfg = families.read(case["config"])
    params = assemble(cfg, families.FAMILIES["marian"], Twins(case["config"], case["tensors"] | again), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, loaded("marian").params)
    with pytest.raises(ValueError, match="no place for: model.encoder.embed_positions.weight$"):  # of BART it is a weight
        assemble(cfg, families.FAMILIES["bart"], Twins(case["config"], case["tensors"] | again), jnp.float32)
    with pytest.raises(ValueError, match="ties tensor model.encoder.embed_tokens.weight to model.shared.weight"):
        assemble(cfg, families.FAMILIES["marian"], Source(case["config"], case["tensors"] | again), jnp.float32)


def test_what_a_text_begins_with_reaches_the_files(tmp_path):
    lm = loaded("bart")
    jaxlm.save(lm, tmp_path / "out")
    given = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert given == {"decoder_start_token_id": 2, "forced_bos_token_id": 0}
    again = jaxlm.load(tmp_path / "out")
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    longer = jaxlm.Model(dataclasses.replace(lm.config, start=(2, 0, 5)), lm.params)
    with pytest.raises(ValueError, match=r"bart: config.start is \(2, 0, 5\) and would be \(2, 0\)"):
        jaxlm.save(longer, tmp_path / "longer")


def test_a_bias_lies_as_a_matrix_of_one_row():
    assert goldens()[0]["marian two tables"]["tensors"]["final_logits_bias"] == [1, 52]
    head = loaded("marian two tables").params["decoder"]["head"]
    np.testing.assert_array_equal(head["bias"], make_bart.weight("final_logits_bias", (1, 52))[0])
    assert loaded("bart base model, scaled").config.decoder.head == config.Head(tied=True)


# Other texts than the goldens'.
RNG = np.random.default_rng(3)
MORE = [[[int(i) for i in RNG.integers(5, 40, length)] for length in lengths] for lengths in ((30, 3, 11, 1), (2, 25, 1, 9))]


def same(lm, reference):
    for found, source, text in zip(logits(lm, *MORE), *MORE, strict=True):
        np.testing.assert_allclose(found, make_bart.logits(reference, source, text), rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_transformers_saves_loads_here(name, tmp_path):
    reference = make_bart.build(CASES[name])
    base = "BartModel" in CASES[name].get("architectures", ())
    (reference.model if base else reference).save_pretrained(tmp_path)
    reference.generation_config.forced_bos_token_id = CASES[name].get("forced_bos_token_id")  # of a config it is not taken
    reference.generation_config.save_pretrained(tmp_path)
    lm = jaxlm.load(tmp_path)
    assert lm.config == families.read(CASES[name])
    same(lm, reference)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_here_loads_in_transformers(name, tmp_path):
    import torch
    import transformers

    lm = loaded(name)
    jaxlm.save(lm, tmp_path)
    reference, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, left over, or of another shape
    same(lm, reference.eval())
    again = jaxlm.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    # The same text of all rows, which begins as it should.
    start, ours = list(lm.config.start), jaxlm.generate(lm, SOURCES, make_bart.NEW, eos=()).tokens
    for source, text in zip(SOURCES, ours, strict=True):
        out = reference.generate(torch.tensor([source]), max_new_tokens=make_bart.NEW, do_sample=False, num_beams=1,
                                 forced_eos_token_id=None, eos_token_id=None, pad_token_id=0)[0].tolist()
        assert out == start + text.tolist()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_generation_config_is_asked_first_as_in_transformers(tmp_path):
    import torch
    import transformers

    jaxlm.save(loaded("bart"), tmp_path)
    for given in ({"decoder_start_token_id": 5}, {"decoder_start_token_id": 6, "forced_bos_token_id": 8}):
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
        reference, lm = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path), jaxlm.load(tmp_path)
        assert lm.config.start == tuple(given.values())
        out = reference.generate(torch.tensor(SOURCES[:1]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
        assert out == [*lm.config.start, *jaxlm.generate(lm, SOURCES[:1], len(out) - 1).tokens[0].tolist()]

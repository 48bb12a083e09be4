"""Speculation where there is a source: it is searched and read once, by whoever drafts; nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import beam_search, config, generate, model, sharding
from jaxlm.decoding import generate as generating
from jaxlm.decoding.speculative import cost
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import ADED, Lookup, Recycling, Union, draft_model, first_layers
from jaxlm.decoding.speculative.drafters.grow import Static
from jaxlm.decoding.speculative.drafters.lookup import occurrences
from jaxlm.model import Model
from tests import tiny
from tests.decoding import stubs
from tests.decoding.speculative.scripted import chain_of
from tests.decoding.speculative.test_equality import VOCABULARY


def found(source, text, longest, count):
    """As `occurrences`, by trying everything; positions in the source count from -len(source)."""
    last, matches = len(text) - 1, []
    for name, other in (("source", source), ("text", text[:-1])):
        for at in range(len(other)):
            run = 0
            while run < min(longest, at + 1, last + 1) and other[at - run] == text[last - run]:
                run += 1
            if run:
                matches.append((-run, (0, abs(at - last), at) if name == "source" else (1, -at), name, at))
    return [(name, at, -run) for run, _, name, at in sorted(matches)][:count]


def test_source_and_text_are_searched_side_by_side():
    """Few ids, so that many places agree; the search never goes across the border, nor into what stands behind a text."""
    rng = np.random.default_rng(0)
    rows, width, slots = 60, 9, 11
    sizes = np.stack([rng.integers(1, width + 1, rows), rng.integers(1, slots + 1, rows)])
    source, text = (rng.integers(0, 3, (rows, size)) for size in (width, slots))
    for row in range(rows):
        source[row, sizes[0, row]:] = -1
    both = jnp.asarray(np.concatenate([source, text], axis=1), jnp.int32)
    match = jax.jit(occurrences, static_argnums=(2, 3, 4))(both, jnp.asarray(width + sizes[1] - 1, jnp.int32), 4, 5, width)
    for row in range(rows):
        want = found(source[row, :sizes[0, row]].tolist(), text[row, :sizes[1, row]].tolist(), 4, 5)
        got = [("source", at, run) if at < width else ("text", at - width, run)
               for at, run in zip(match.at[row].tolist(), match.length[row].tolist(), strict=True) if run]
        assert got == want


SCRIPT = list(b"the cat sat on that mat and the cat was fat")


@functools.cache
def scripted(vocabulary=VOCABULARY):
    """Writes the script behind its start token, whatever the source, of a vocabulary of its own, says."""
    lm = stubs.scripted(SCRIPT, 1, stubs.Bytes())
    block = lm.config.stack.groups[0].pattern[0]
    cross = config.Attention(1, 1, 2, position=None, causal=False, source=8)
    crossed = dataclasses.replace(lm.config, stack=config.stack_of([dataclasses.replace(block, cross=cross)]))
    inner = dataclasses.replace(block, attention=dataclasses.replace(block.attention, causal=False))
    cfg = config.EncoderDecoder(config.Encoder(8, config.Embedding(vocabulary), config.stack_of([inner]), None, None, 64),
                                crossed, (0,), shared=False)
    tree = jax.tree.map(lambda param: jnp.zeros(param.shape), model.spec(cfg))
    tree["decoder"] |= {name: lm.params["decoder"][name] for name in ("embedding", "head")}
    return Model(cfg, tree, stubs.Bytes())


COPIERS = {
    "lookup": Lookup(length=6, nodes=9),
    "aded": ADED(nodes=8, simulations=8, pairs=64),
    "sizes": Union((Lookup(length=6), Recycling(trees.branching(2))), (1, 9), jnp.asarray([1.0, 1.5])),
}


@pytest.mark.parametrize(("name", "least"), [("lookup", 5), ("aded", 3), ("sizes", 2.5)])
def test_what_stands_in_the_source_is_drafted(name, least, compilations):
    lm, asked = scripted(), {"eos": (), "drafter": COPIERS[name]}
    out = generate(lm, [SCRIPT, list(b"zyx")], len(SCRIPT), **asked)
    assert [row.tolist() for row in out.tokens] == [SCRIPT] * 2
    copied, alone = out.speculation.tokens_per_call
    assert copied > least and (copied > 2 * alone) == (name != "aded")  # whose table is all rows'
    with compilations() as names:  # texts and sources of any length within the buckets
        out = generate(lm, [SCRIPT[2:], [1]], [len(SCRIPT) - 2, 4], **asked)
    assert names == [] and [row.tolist() for row in out.tokens] == [SCRIPT[:-2], SCRIPT[:4]]


def test_ids_of_another_vocabulary_are_not_searched():
    out = generate(scripted(300), [SCRIPT], len(SCRIPT), eos=(), drafter=COPIERS["lookup"])
    assert out.tokens[0].tolist() == SCRIPT and out.speculation.tokens_per_call[0] < 3


def test_the_encoder_is_called_once(monkeypatch):
    """Once in the prefill's program; in the loop's its weights may be anything, and so may those that make keys and values of
    the source."""
    calls, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *args, **given: calls.append(1) or encode(*args, **given))
    lm, prompt = stubs.with_source("relative"), [list(b"abcdefghij")]
    plain = generate(lm, prompt, 21, eos=())
    assert len(calls) == 1
    drafter = chain_of([[0, *plain.tokens[0].tolist()]], VOCABULARY, 0)
    out = generate(lm, prompt, 21, eos=(), drafter=drafter)
    assert len(calls) == 2 and out.tokens[0].tolist() == plain.tokens[0].tolist()
    assert out.speculation.tokens_per_call.tolist() == [5.0]  # always right
    wrong = generate(lm, prompt, 21, eos=(), drafter=chain_of([[0, *plain.tokens[0].tolist()]], VOCABULARY, 1))
    assert len(calls) == 2 and wrong.speculation.tokens_per_call.tolist() == [1.0]

    spoiled = []

    def spoil(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("encoder/") or "cross_attention/k" in name or "cross_attention/v" in name:
            spoiled.append(name)
            return jnp.full_like(leaf, jnp.nan)
        return leaf

    run, ruined = generating._run, jax.tree_util.tree_map_with_path(spoil, lm.ready)
    assert sum("cross_attention" in name for name in spoiled) == 4  # of two layers
    monkeypatch.setattr(generating, "_run", lambda step, params, *rest: run(step, ruined, *rest))
    generating._run.lower = run.lower
    for given in (None, drafter):
        assert generate(lm, prompt, 21, eos=(), drafter=given).tokens[0].tolist() == plain.tokens[0].tolist()


def test_a_mesh_gives_the_same_tokens():
    lm, sources = stubs.with_source("relative"), [[5, 6, 7, 8], [9], list(range(20, 33)), [3, 3]]
    devices = sharding.mesh(devices=jax.devices()[:4], data=2, model=2)
    spread = Model(lm.config, jax.device_put(lm.params, sharding.shardings(model.spec(lm.config), devices)), lm.tokenizer)
    asked = {"max_new_tokens": 12, "temperature": [0.0, 0.3, 0.6, 0.0], "eos": (), "logprobs": True}
    want, out = generate(lm, sources, **asked), generate(spread, sources, drafter="lookup", tree=5, **asked)
    assert [row.tolist() for row in out.tokens] == [row.tolist() for row in want.tokens]
    np.testing.assert_allclose(out.logprobs, want.logprobs, atol=1e-4)


def test_a_start_that_leaves_no_room_is_named():
    lm = stubs.with_source("relative")
    with pytest.raises(ValueError, match="row 1: max_new_tokens counts the 59 tokens of start behind the.* least 60, got 9"):
        generate(lm, [[1, 2]] * 2, 9, start=[[0], [0] * 60])
    with pytest.raises(ValueError, match="start of row 0 has 1 token that does not count and 64 new ones were.*at most 63 fit"):
        generate(lm, [[1, 2]] * 2, 64, start=[[0, 7], [0]])


@pytest.mark.parametrize("drafter", [None, "lookup"])
def test_a_start_counts_as_new_tokens_but_for_its_first(drafter):
    """As in beam search, and as forced first tokens do in transformers."""
    lm, sources, starts = stubs.with_source("relative"), [[5, 6, 7, 8], [9], [20, 21]], [[0], [0, 7, 8], [3, 4]]
    out = generate(lm, sources, [8, 3, 8], start=starts, eos=(), drafter=drafter)
    assert [len(row) for row in out.tokens] == [8, 1, 7] and out.finish == ["length"] * 3
    found = beam_search(lm, sources, 8, start=starts, eos=(), beams=1)
    assert [row.tolist() for row in found.tokens][::2] == [row.tolist() for row in out.tokens][::2]
    assert len(found.tokens[1]) == 6


TARGET = config.EncoderDecoder(
    tiny.encoder([tiny.block(causal=False)]),
    tiny.decoder([tiny.block(window=3), tiny.block(position=config.RelativeBias(8, 6), cross=tiny.cross())]), (0,))
SOURCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]
ASKED = {"max_new_tokens": 16, "temperature": [0.0, 0.4, 1.0], "eos": ()}


@functools.cache
def target():
    return Model(TARGET, tiny.weights(model.spec(TARGET)))


def alone(lm):
    """The decoder of an encoder-decoder, which reads what another's encoder made."""
    return Model(lm.config.decoder, {"decoder": lm.params["decoder"]})


def decoder(blocks):
    cfg = tiny.decoder(blocks)
    return Model(cfg, tiny.weights(model.spec(cfg)))


@functools.cache
def like_the_target():
    random = np.random.default_rng(1)
    return Model(TARGET, jax.tree.map(lambda leaf: leaf * jnp.asarray(1 + 0.25 * random.normal(size=leaf.shape), jnp.float32),
                                      target().params))


@functools.cache
def plain():
    return [row.tolist() for row in generate(target(), SOURCES, **ASKED).tokens]


@pytest.mark.parametrize(("drafter", "most"), [
    pytest.param(lambda: draft_model(target()), True, id="itself"),
    pytest.param(lambda: draft_model(alone(target())), True, id="its decoder"),
    pytest.param(lambda: first_layers(target(), 2, Static(trees.best([[0.6, 0.2]], 7))), True, id="all layers",
                 marks=pytest.mark.slow),
    pytest.param(lambda: draft_model(like_the_target(), 7), False, id="another", marks=pytest.mark.slow),
    pytest.param(lambda: draft_model(decoder([tiny.block()])), False, id="a decoder", marks=pytest.mark.slow),
    pytest.param(lambda: first_layers(target(), 1), False, id="a layer that sees no source"),
])
def test_models_draft_from_the_source(drafter, most):
    """With an encoder of their own, from what the target's made, or without a source; the target itself is always right."""
    drafter = drafter()
    out = generate(target(), SOURCES, drafter=drafter, **ASKED)
    assert [row.tolist() for row in out.tokens] == plain()
    whole, rest = divmod(15, drafter.depth + 1)
    right = out.speculation.emitted[:, -1] == whole
    assert np.all(right & (out.speculation.calls == whole + (rest > 0))) == most


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["chain", "block", "multi_round", "k_seq", "without_replacement", "match"])
@pytest.mark.parametrize("draft", [lambda: target(), lambda: alone(target()), lambda: "layers:2"],
                         ids=["own", "memory", "layers"])
def test_every_rule_has_drafts_that_know_the_source(draft, rule):
    """Of drafts drawn from the target's own distribution none is rejected."""
    out = generate(target(), SOURCES, 16, temperature=0.7, eos=(), drafter=draft(), rule=rule)
    assert np.all(out.speculation.tokens_per_call > 3.5)


def test_costs_are_measured_with_a_source():
    first = cost.measure(target(), 2, (2,), turns=1)
    assert first[0] > 0 and np.isfinite(first).all()


def other(**fields):
    """The target with an encoder of its own table of tokens, which differs."""
    cfg = dataclasses.replace(TARGET, shared=False, encoder=dataclasses.replace(TARGET.encoder, **fields))
    return Model(cfg, tiny.weights(model.spec(cfg)))


NARROW = config.Attention(2, 1, 8, position=None, causal=False, source=8)


@pytest.mark.parametrize(("lm", "draft", "says"), [
    (target, lambda: other(embedding=config.Embedding(23)), "source vocabulary of 23 tokens, the target one of 19"),
    (target, lambda: decoder([tiny.block(cross=NARROW)]),
     r"vectors of width \[8\], the target's encoder makes some of width 16"),
    (lambda: decoder([tiny.block()]), target, "attends to a source, the target is a decoder"),
], ids=["vocabulary", "width", "decoder"])
def test_drafts_that_do_not_fit(lm, draft, says):
    with pytest.raises(ValueError, match=says):
        generate(lm(), [[1, 2, 3]], 4, drafter=draft())

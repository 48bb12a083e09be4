"""Costs of calls: the roofline's corners by hand, sizes of tree by batch, and a measurement made once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, model, params
from jaxlm.decoding.speculative import cost, drafters
from tests import tiny
from tests.decoding import stubs


def test_a_chip_is_bound_by_memory_up_to_its_ridge():
    one = cost.Chip(bandwidth=1e12, flops=2e14)
    assert one.ridge == 200
    # 1e9 bfloat16 numbers: 2 ms to read, 0.01 ms per token to compute with.
    seconds = cost.roofline(one, 2e9, 1e9, 2, (1, 100, 200))
    assert seconds.tolist() == pytest.approx([2e-3, 2e-3, 4e-3])
    assert cost.roofline(one, 2e9, 1e9, 2, (1, 200), chips=4).tolist() == pytest.approx([5e-4, 1e-3])
    read = {2: 2e9, 6: 5e9}.get  # by tokens of the call
    assert cost.roofline(one, read, 1e9, 2, (1, 3)).tolist() == pytest.approx([2e-3, 5e-3])


@pytest.mark.parametrize(("batch", "most", "sizes"), [
    (1, 64, (1, 4, 8, 16)), (2, 64, (1, 2, 4, 8)), (8, 64, (1, 2)), (64, 64, (1, 2)), (1, 8, (1, 2, 4, 8)), (1, 5, (1, 2, 5))])
def test_sizes_get_smaller_as_rows_get_more(batch, most, sizes):
    assert cost.budgets(jax.devices("cpu"), batch, most) == sizes


def test_chips_are_known_by_the_start_of_their_kind():
    assert cost.chip("NVIDIA H200 NVL") == cost.CHIPS["NVIDIA H200"] and cost.chip("cpu") is None


def test_is_measured_once():
    lm = stubs.random("rope")
    first = cost.measure(lm, 2, (1, 3), turns=1)
    assert len(first) == 2 and min(first) > 0 and np.isfinite(first).all()
    assert cost.measure(lm, 2, (1, 3), turns=1) is first


def abstract(layer):
    """A decoder of such layers behind a dense one, its weights as shapes."""
    cfg = stubs.decoder(tiny.block(), *[tiny.block(feedforward=layer)] * 3, head=config.Head(tied=False))
    return model.Model(cfg, params.abstract(model.spec(cfg), jnp.float32))


SPARSE = config.Moe(32, config.Dense(400), config.TopK(4))


def test_more_tokens_read_more_experts():
    lm, width = abstract(SPARSE), tiny.WIDTH
    expert = 3 * width * 400 * 4  # bytes
    assert cost.unread(lm.config, lm.params, 1) == pytest.approx(3 * 28 * expert)
    assert cost.unread(lm.config, lm.params, 2) == pytest.approx(3 * 24.5 * expert)
    rest = sum(4 * leaf.size for leaf in jax.tree.leaves(lm.params)) - 4 * 260 * width - 3 * 32 * expert
    assert cost.reads(lm, 1) == pytest.approx(rest + 3 * 4 * expert)
    assert cost.reads(lm, 1000) == pytest.approx(rest + 3 * 32 * expert)
    dense = abstract(config.Dense(1600))
    assert cost.reads(dense, 1) == cost.reads(dense, 16)


@pytest.mark.parametrize(("batch", "sizes"), [(1, (1, 2, 4)), (64, (1, 2))])
def test_trees_that_read_many_more_experts_are_not_offered(batch, sizes, monkeypatch):
    monkeypatch.setattr(cost, "measure", lambda target, batch, sizes, dtype: sizes)
    monkeypatch.setattr(model.Model, "ready", {"on": jnp.zeros(1)})
    assert drafters.make("auto", None, abstract(SPARSE), batch).sizes == sizes
    assert drafters.make("auto", None, abstract(config.Dense(1600)), 1).sizes == (1, 4, 8, 16)


def test_is_measured_on_tokens_that_differ(monkeypatch):
    """Equal tokens would all go to the same experts."""
    seen = []
    monkeypatch.setattr(cost, "_half_full", lambda *_: None)
    monkeypatch.setattr(cost, "_call", lambda cfg, params, tokens, *_: seen.append(np.asarray(tokens)))
    cost.measure(model.Model(stubs.DECODERS["rope"], stubs.random("rope").params), 2, (1, 8), turns=1)
    assert [tokens.shape for tokens in seen] == [(2, 1), (2, 8)] * 2
    assert len(np.unique(seen[1])) > 12 and (seen[1] == seen[3]).all() and (seen[0] == seen[1][:, :1]).all()
    assert seen[1].max() < stubs.VOCABULARY

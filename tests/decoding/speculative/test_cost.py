"""Costs of calls: the roofline's corners by hand, sizes of tree by batch, and a measurement made once."""

import jax
import numpy as np
import pytest

from jaxlm.decoding.speculative import cost
from tests.decoding import stubs


def test_a_chip_is_bound_by_memory_up_to_its_ridge():
    one = cost.Chip(bandwidth=1e12, flops=2e14)
    assert one.ridge == 200
    # 1e9 bfloat16 numbers: 2 ms to read, 0.01 ms per token to compute with.
    seconds = cost.roofline(one, 2e9, 1e9, 2, (1, 100, 200))
    assert seconds.tolist() == pytest.approx([2e-3, 2e-3, 4e-3])
    assert cost.roofline(one, 2e9, 1e9, 2, (1, 200), chips=4).tolist() == pytest.approx([5e-4, 1e-3])


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

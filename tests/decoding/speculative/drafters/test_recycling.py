"""The search for the largest logits, on one device and where the vocabulary is split."""

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.decoding.speculative.drafters.recycling import likeliest


@pytest.mark.parametrize("sizes", [{"data": 1}, {"model": 8}, {"data": 2, "model": 4}, {"data": 8}],
                         ids=lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items()))
@pytest.mark.parametrize("vocabulary, count", [(1000, 8), (24, 7), (331, 8)])
def test_the_largest_logits_are_found_wherever_they_lie(sizes, vocabulary, count):
    logits = jax.random.normal(jax.random.key(0), (8, 3, vocabulary))
    mesh = sharding.mesh(devices=jax.devices()[:int(np.prod(list(sizes.values())))], **sizes)
    place = jax.sharding.NamedSharding(mesh, sharding.partition(("batch", None, "vocab"), logits.shape, mesh.shape))
    with jax.set_mesh(mesh):
        found = jax.jit(likeliest, static_argnums=1)(jax.device_put(logits, place), count)
    values, ids = jax.lax.top_k(logits, count)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.logits, values)


def test_a_split_vocabulary_is_searched_where_it_lies():
    mesh = sharding.mesh(model=8)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    shape = jax.ShapeDtypeStruct((4, 5, 8 * 1002), np.float32, sharding=place)
    with jax.set_mesh(mesh):
        text = jax.jit(likeliest, static_argnums=1).lower(shape, 8).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    assert gathered and all("[4,5,64]" in line for line in gathered), "logits went from device to device"
    assert "all-to-all" not in text

"""Masks against grids drawn by hand: a row per query, x where it sees the key."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import mask
from tests import tiny


def grid(text):
    return np.array([[cell == "x" for cell in line] for line in text.split()])


def look(array):
    return " ".join("".join("x" if cell else "." for cell in row) for row in np.asarray(array))


def context(positions, **known):
    positions = jnp.array([positions], jnp.int32)
    return mask.describe((), *positions.shape, positions, **known)


@pytest.mark.parametrize("fields, positions, want", [
    ({}, [0, 1, 2, 3], "x... xx.. xxx. xxxx"),
    ({"causal": False}, [0, 1, 2, 3], "xxxx xxxx xxxx xxxx"),
    ({"window": 2}, [0, 1, 2, 3], "x... xx.. .xx. ..xx"),
    ({"window": 1}, [0, 1, 2, 3], "x... .x.. ..x. ...x"),
    ({"window": 9}, [0, 1, 2, 3], "x... xx.. xxx. xxxx"),
    ({"window": 2, "causal": False}, [0, 1, 2, 3], "xx.. xxx. .xxx ..xx"),
    ({}, [7, 8, -1, -1], "x... xx.. .... ...."),
    ({}, [-1, -1, 0, 1], ".... .... ..x. ..xx"),
    ({"causal": False}, [0, -1, 2, -1], "x.x. .... x.x. ...."),
    ({"window": 3}, [0, 4, 5, 9], "x... .x.. .xx. ...x"),  # distance in positions, not in places
    ({}, [3, 2, 1, 0], "xxxx .xxx ..xx ...x"),
])
def test_among(fields, positions, want):
    assert look(mask.among(tiny.attention(**fields), context(positions))[0]) == want


@pytest.mark.parametrize("fields, want", [
    ({}, "x... xx.. x.x. xx.x"),
    ({"causal": False}, "x... xx.. x.x. xx.x"),
    ({"window": 2}, "x... xx.. x.x. .x.x")])
def test_a_tree_takes_the_place_of_the_causal_rule(fields, want):
    """Nodes 1 and 2 are children of 0, node 3 of 1."""
    tree = jnp.asarray(grid("x... xx.. x.x. xx.x"))[None]
    assert look(mask.among(tiny.attention(**fields), context([4, 5, 5, 6], mask=tree))[0]) == want


def test_a_prefix_is_seen_from_everywhere():
    prefix = jnp.asarray(grid("xx.. xx.. xxx. xxxx"))[None]
    assert look(mask.among(tiny.attention(), context([0, 1, 2, 3], mask=prefix))[0]) == "xx.. xx.. xxx. xxxx"
    assert look(mask.among(tiny.attention(), context([0, 1, 2, -1], mask=prefix))[0]) == "xx.. xx.. xxx. ...."


def test_segments_have_prefixes_of_their_own():
    segments, prefix = jnp.array([[1, 1, 1, 2, 2, 2, 0]]), jnp.array([[2, 2, 2, 3, 3, 3, 0]])
    known = mask.describe((), 1, 7, segments=segments, prefix=prefix)
    assert look(mask.among(tiny.attention(), known)[0]) == "xx..... xx..... xxx.... ...xxx. ...xxx. ...xxx. ......."
    assert look(mask.among(tiny.attention(), known.until(5))[0]) == "xx... xx... xxx.. ...xx ...xx"
    assert look(mask.among(tiny.attention(window=2), known)[0]) == "xx..... xx..... .xx.... ...xx.. ...xxx. ....xx. ......."


def test_segments_see_only_themselves():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    known = mask.describe((), 1, 5, segments=segments)
    np.testing.assert_array_equal(known.positions, [[0, 1, 0, 1, -1]])
    assert look(mask.among(tiny.attention(), known)[0]) == "x.... xx... ..x.. ..xx. ....."
    assert look(mask.among(tiny.attention(causal=False), known)[0]) == "xx... xx... ..xx. ..xx. ....."


def test_one_segment_twice_in_a_row_is_one_document_and_padding_may_stand_anywhere():
    known = mask.describe((), 2, 6, segments=jnp.array([[0, 3, 3, 3, 0, 1], [1, 2, 2, 0, 0, 5]]))
    np.testing.assert_array_equal(known.positions, [[-1, 0, 1, 2, -1, 0], [0, 0, 1, -1, -1, 0]])


@pytest.mark.parametrize("fields, want", [({}, "xxx.. xxx.."), ({"window": 3}, ".xx.. ..x.."),
                                          ({"window": 1}, "..... ....."), ({"causal": False}, "xxx.. xxx..")])
def test_committed(fields, want):
    """3 of 5 slots count; the two new tokens stand at positions 3 and 4."""
    known = mask.describe((), 1, 2, length=jnp.array([3]))
    np.testing.assert_array_equal(known.positions, [[3, 4]])
    assert look(mask.committed(tiny.attention(**fields), known, 5)[0]) == want


def test_rows_have_lengths_of_their_own():
    known = mask.describe((), 2, 1, length=jnp.array([0, 2]))
    got = mask.committed(tiny.attention(), known, 3)
    assert look(got[:, 0]) == "... xx."
    np.testing.assert_array_equal(known.positions, [[0], [2]])

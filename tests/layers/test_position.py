import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (
    Alibi,
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)
from jaxlm.layers import position
from tests import oracle, tiny

SCALINGS = [
    None, LinearScaling(4.0), DynamicNtkScaling(2.0, 16), DynamicNtkScaling(1.0, 4),
    YarnScaling(4.0, 64, 1.1), YarnScaling(4.0, 64, 1.1, 4.0, 1.0, truncate=False), YarnScaling(16.0, 4096, 1.28),
    Llama3Scaling(8.0, 1.0, 4.0, 64), Llama3Scaling(2.0, 2.0, 3.0, 1000),
    LongRopeScaling((1.0, 1.5, 2.0, 2.5), (1.0, 3.0, 5.0, 9.0), 20, 1.2)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("base", [100.0, 500000.0])
def test_frequencies(scaling, base):
    """Both sides of every length at which a scaling changes: rows of 1, 16, 17, 20, 21 and 300 tokens."""
    cfg, totals = Rope(base, scaling=scaling), [1, 16, 17, 20, 21, 300]
    got, magnitude = position.frequencies(cfg, 8, jnp.array(totals)[:, None])
    got = np.broadcast_to(got, (len(totals), 1, 4))
    for row, total in enumerate(totals):
        for pair in range(4):
            want = oracle.frequency(cfg, 8, pair, total)
            np.testing.assert_allclose((got[row, 0, pair], magnitude), want, rtol=2e-6)


def test_llama3_by_hand():
    """Factor 8, wavelengths of 2 pi, 2 pi * 10 and 2 pi * 100 in an original length of 64 pi, low 1 and high 4."""
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 201)
    got, _ = position.frequencies(Rope(1000.0, scaling=scaling), 6, jnp.array([[1]]))
    smooth = (201 / (20 * np.pi) - 1) / 3
    np.testing.assert_allclose(got[0, 0], [1.0, (1 - smooth) * 0.1 / 8 + smooth * 0.1, 0.01 / 8], rtol=1e-5)


def test_dynamic_and_long_scalings_are_plain_within_their_length():
    for scaling in (DynamicNtkScaling(2.0, 16), LongRopeScaling((1.0,) * 4, (2.0,) * 4, 16, 1.0)):
        got, _ = position.frequencies(Rope(scaling=scaling), 8, jnp.array([[16, 17]]))
        plain, _ = position.frequencies(Rope(), 8, jnp.array([[1]]))
        np.testing.assert_allclose(got[0, 0], plain[0, 0], rtol=1e-6)
        assert np.all(np.asarray(got[0, 1, 1:]) < np.asarray(plain[0, 0, 1:]))


@pytest.mark.parametrize("cfg", [Rope(100.0), Rope(100.0, interleaved=True), Rope(100.0, width=4),
                                 Rope(100.0, width=6, interleaved=True, scaling=YarnScaling(4.0, 64, 1.1))], ids=str)
def test_rotate(cfg):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8))
    positions = np.array([[0, 1, 5], [40, 41, 1000]], np.int32)
    width = cfg.width or 8
    cos, sin = position.rotation(cfg, width, jnp.asarray(positions), jnp.asarray(positions) + 1)
    got = position.rotate(jnp.asarray(x, jnp.float32), cos, sin, cfg.interleaved)
    for b, t, n in np.ndindex(2, 3, 2):
        want = oracle.rotate(cfg, width, x[b, t, n], positions[b, t], positions[b, t] + 1)
        np.testing.assert_allclose(got[b, t, n], want, atol=2e-4)
    np.testing.assert_array_equal(got[..., width:], x[..., width:].astype(np.float32))


def test_far_positions_keep_their_angle():
    """A million tokens out, float32 angles are still good to 0.1 radians at the fastest frequency and exact below."""
    cos, _ = position.rotation(Rope(), 8, jnp.array([[999_999]]), jnp.array([[1_000_000]]))
    want = np.cos(999_999 * 10000.0 ** (-np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(cos[0, 0], want, atol=0.05)


def test_rotations_are_made_once_for_each_kind_and_in_order():
    """The order is the layers', whatever the process: programs of several hosts must be the same."""
    bases = [30.0, 10.0, 30.0, 20.0]
    layers = [tiny.attention(position=Rope(base)) for base in bases] + [tiny.attention(position=None)]
    made = position.rotations(layers, jnp.array([[0, 1]]), jnp.array([[2, 2]]))
    assert [rope.base for rope, _ in made] == [30.0, 10.0, 20.0]


@pytest.mark.parametrize("heads, want", [
    (1, [2**-8]), (8, [2.0**-n for n in range(1, 9)]), (4, [2**-2, 2**-4, 2**-6, 2**-8]),
    (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    (3, [2**-4, 2**-8, 2**-2])])
def test_alibi_slopes(heads, want):
    np.testing.assert_allclose(position.alibi_slopes(heads), want)


def test_alibi_bias():
    got = position.alibi_bias(Alibi((1.0, 0.5, 0.25, 0.1)), 2, jnp.array([[3, 4]]), jnp.array([[0, 3, 5]]))
    assert got.shape == (1, 2, 2, 2, 3)
    np.testing.assert_allclose(got[0, 0, 0], [[-3, 0, -2], [-4, -1, -1]])
    np.testing.assert_allclose(got[0, 1, 0], np.array([[-3, 0, -2], [-4, -1, -1]]) / 4)


def test_alibi_bias_rounded():
    """Of the key's position alone; 257 and 0.1 have no bfloat16 of their own."""
    got = position.alibi_bias(Alibi((0.1, 0.25), rounded=True), 1, jnp.array([[300, 301]]), jnp.array([[0, 3, 257]]))
    assert got.shape == (1, 1, 2, 1, 3)
    np.testing.assert_array_equal(got[0, 0, 0, 0], [0.0, 0.30078125, 25.625])
    np.testing.assert_array_equal(got[0, 0, 1, 0], [0.0, 0.75, 64.0])

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import model, params, weight
from tests import tiny


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


EQUATIONS = ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTD,VD->BTV", "BD,ND->NB", "D,DF->F", "BD,BDF->BF",
             "BD,FND->BNF"]


@pytest.mark.parametrize("rows", [1, 2, 8, 24, 25])
@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV"])
def test_products_of_few_rows_are_einsums(equation, rows):
    """Which a CPU computes in another way: with the rows as columns."""
    (x_letters, letters), out = equation.split("->")[0].split(","), equation.split("->")[1]
    sizes = dict(zip("BTDNHFV", (1, rows, 5, 3, 4, 5, 7), strict=True))
    x, w = draw([sizes[letter] for letter in x_letters], 0), draw([sizes[letter] for letter in letters], 1)
    got = jax.jit(lambda x, w: weight.einsum(equation, x, w))(x, w)
    assert got.shape == tuple(sizes[letter] for letter in out)
    np.testing.assert_allclose(got, np.einsum(equation, np.asarray(x, np.float64), np.asarray(w, np.float64)), atol=1e-5)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.sampled_from(EQUATIONS), st.data())
def test_int8_einsum_is_that_of_the_dense_weight(equation, data):
    """Whichever dimensions share a scale: summed ones, kept ones, all, none."""
    (x_letters, letters), out = equation.split("->")[0].split(","), equation.split("->")[1]
    sizes = dict(zip("BTDNHFV", (2, 3, 4, 3, 2, 5, 6), strict=True))
    shared = data.draw(st.sets(st.sampled_from(range(len(letters)))))
    x = draw([sizes[letter] for letter in x_letters], 0)
    w = weight.quantize(draw([sizes[letter] for letter in letters], 1), tuple(sorted(shared)))
    got = weight.einsum(equation, x, w)
    assert got.shape == tuple(sizes[letter] for letter in out)
    want = np.einsum(equation, np.asarray(x, np.float64), np.asarray(weight.dense(w), np.float64))
    np.testing.assert_allclose(got, want, atol=1e-5)


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.sampled_from([(), (0,), (1,), (0, 1)]), st.sampled_from([(1,), (3,), (1, 3), (2, 2), (1, 1)]),
                  st.sampled_from([1, 7]))
def test_int8_take_is_that_of_the_dense_weight(shared, shape, vocabulary):
    w = weight.quantize(draw((vocabulary, 4), 0), shared)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, shape))
    got = weight.take(w, ids, jnp.float32)
    np.testing.assert_allclose(got, np.asarray(weight.dense(w))[np.asarray(ids)], rtol=1e-6)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.sampled_from([(), (0,), (2,), (0, 1), (0, 1, 2)]), st.integers(0, 99))
def test_quantize_rounds_to_half_a_step(shared, seed):
    w = draw((3, 4, 5), seed)
    q = weight.quantize(w, shared)
    assert q.values.dtype == jnp.int8
    assert q.scale.shape == tuple(1 if axis in shared else size for axis, size in enumerate(w.shape))
    assert np.all(np.abs(weight.dense(q) - w) <= np.asarray(q.scale) * 0.5001)
    assert np.abs(np.asarray(q.values)).max() == 127


def test_quantize_keeps_zeros():
    np.testing.assert_array_equal(weight.dense(weight.quantize(jnp.zeros((2, 3)), (0,))), np.zeros((2, 3)))


@pytest.mark.parametrize("kind", ["array", "int8"])
def test_dtypes(kind):
    """Products in x's dtype, or as asked; the weight's own dtype never leaks."""
    w = draw((4, 6), 0)
    w = w if kind == "array" else weight.quantize(w, (0,))
    x = draw((2, 4), 1).astype(jnp.bfloat16)
    assert weight.einsum("BD,DF->BF", x, w).dtype == jnp.bfloat16
    wide = weight.einsum("BD,DF->BF", x, w, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    want = np.asarray(x, np.float64) @ np.asarray(weight.dense(w), np.float64)
    np.testing.assert_allclose(wide, want, rtol=0.02, atol=0.02)
    assert weight.take(w, jnp.array([0, 3]), jnp.bfloat16).dtype == jnp.bfloat16
    assert w.dtype == jnp.float32 and w.shape == (4, 6) and w.ndim == 2


def test_int8_goes_through_memory_as_8_bits():
    w = weight.quantize(draw((4, 6), 0), (0,))
    text = str(jax.make_jaxpr(lambda x, w: weight.einsum("BD,DF->BF", x, w))(draw((2, 4), 1), w))
    lines = text.splitlines()
    product = next(i for i, line in enumerate(lines) if "dot_general" in line)
    assert not any(" mul " in line for line in lines[:product]) and any(" mul " in line for line in lines[product:])


def test_a_leaf_of_a_tree():
    w = weight.quantize(draw((4, 6), 0), (0,))
    assert jax.tree.leaves({"a": w}, is_leaf=weight.is_weight) == [w]
    assert weight.dense(w).shape == (4, 6) and not weight.is_weight(draw((1,), 0))


@pytest.mark.parametrize("name, unrolled", [("local", False), ("learned", False), ("groups", False), ("groups", True)])
def test_every_layer_takes_int8(name, unrolled):
    cfg = tiny.CAUSAL[name]
    spec = model.spec(cfg)
    quantised = tiny.quantised(spec, tiny.weights(spec))
    assert {path for path, param in params.paths(spec).items() if param.inputs} == {
        path for path, leaf in params.paths(quantised, weight.is_weight).items() if isinstance(leaf, weight.Int8)}
    dense = tiny.jit(lambda tree: jax.tree.map(weight.dense, tree, is_leaf=weight.is_weight))(quantised)
    assert params.count(dense) == params.count(spec)
    tokens = tiny.tokens(1, 5)
    forward = tiny.jit(lambda p, t: model.forward(p, cfg, t).logits)
    want = forward(dense, tokens)
    got = forward(model.unstack(quantised, cfg) if unrolled else quantised, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)
    exact = forward(tiny.weights(spec), tokens)
    assert 0 < np.abs(got - exact).max() < 0.3 * np.std(exact)

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlm.decoding.logits import Settings, choose, distribution, noise, penalise, reaching, restrict
from tests.decoding import oracle

VOCABULARY, ROWS = 11, 3
NEAR = 1e-5  # float32 sums and logarithms, against float64: closer calls than this may go either way

fast = {fn: jax.jit(fn) for fn in (choose, distribution, penalise, reaching, restrict)}

# A grid of few values makes ties; -inf is what bans leave behind.
VALUES = st.one_of(st.integers(-8, 8).map(lambda n: n / 2), st.just(-np.inf),
                   st.floats(-30, 30, width=32, allow_subnormal=False))
LOGITS = hnp.arrays(np.float32, (ROWS, VOCABULARY), elements=VALUES).filter(lambda x: np.all(np.max(x, axis=1) > -np.inf))
SHARE = st.floats(0.0078125, 1.0, width=32)


def per_row(values):
    return hnp.arrays(np.float32, ROWS, elements=values)


def settings(**fields):
    return Settings(**{name: jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32)
                       for name, value in fields.items()})


def kept(logits, **fields):
    """Which tokens the filters leave, at temperature 1."""
    out = np.asarray(fast[restrict](jnp.asarray(logits), settings(temperature=np.ones(len(logits)), **fields)))
    left = np.isfinite(out)
    np.testing.assert_array_equal(out[left], np.asarray(logits)[left])
    return left


def check_reaching(kept, scores, mass, target, slack=0.0):
    """What is kept lies between the smallest sets for a slightly smaller and a slightly larger target."""
    least, most = oracle.smallest(scores, mass, target - slack), oracle.smallest(scores, mass, target + slack)
    assert np.all(kept[scores > least + slack]), "cut a token that is needed"
    assert not np.any(kept[scores < most - slack]), "kept a token that is not needed"


@given(LOGITS, hnp.arrays(np.int32, ROWS, elements=st.integers(1, VOCABULARY)))
def test_top_k(logits, k):
    for row, (left, wanted) in enumerate(zip(kept(logits, top_k=k), k, strict=True)):
        np.testing.assert_array_equal(left, np.isfinite(oracle.restrict(logits[row], 1.0, top_k=int(wanted))))


@given(LOGITS, per_row(SHARE))
def test_top_p(logits, p):
    for row, (left, target) in enumerate(zip(kept(logits, top_p=p), p, strict=True)):
        if target == 1:
            np.testing.assert_array_equal(left, np.isfinite(logits[row]))
        else:
            check_reaching(left, logits[row], oracle.softmax(logits[row].astype(float)), float(target), NEAR)


@given(LOGITS, per_row(st.one_of(SHARE, st.just(0.0))))
def test_min_p(logits, p):
    for row, (left, least) in enumerate(zip(kept(logits, min_p=p), p, strict=True)):
        relative = np.exp(logits[row].astype(float) - logits[row].max())
        assert np.all(left[relative > least * (1 + NEAR)])
        assert not np.any(left[relative < least * (1 - NEAR)])
        assert not np.any(left & np.isneginf(logits[row]))


@given(LOGITS, per_row(SHARE))
def test_typical_p(logits, p):
    for row, (left, target) in enumerate(zip(kept(logits, typical_p=p), p, strict=True)):
        scores = oracle.typicality(logits[row].astype(float))
        alive = np.isfinite(logits[row])
        assert not np.any(left[~alive])
        if target == 1:
            assert np.all(left[alive])
        else:
            check_reaching(left[alive], scores[alive], oracle.softmax(logits[row].astype(float))[alive], float(target), NEAR)


def test_typical_p_may_cut_the_likeliest_token():
    # Entropy 1.61 nats, so the tokens of 0.2 (surprise 1.61) are more typical than that of 0.4 (0.92).
    p = np.array([[0.4, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]])
    left = kept(np.log(p).astype(np.float32), typical_p=np.array([0.39]))
    np.testing.assert_array_equal(left, [[False, True, True, False, False, False, False]])


def test_at_temperature_zero_the_likeliest_token_need_not_be_typical():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]])).astype(np.float32)
    off = settings(temperature=np.zeros(1, np.float32), typical_p=np.array([0.39], np.float32))
    assert choose(jnp.asarray(logits), off, jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32)).tolist() == [0]


def check_restrict(logits, temperature, top_k, top_p, min_p, typical_p):
    """All filters in one row each, where no call is close."""
    out = np.asarray(fast[restrict](jnp.asarray(logits), settings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)))
    for row in range(len(logits)):
        if temperature[row] == 0:
            assert np.argmax(out[row]) == np.argmax(logits[row])
            continue

        def slow(slack, row=row):
            near = 1 + slack
            return oracle.restrict(logits[row], float(temperature[row]), int(top_k[row]),
                                   min(float(top_p[row]) * near, 1.0) if top_p[row] < 1 else 1.0,
                                   min(float(min_p[row]) * near, 1.0),
                                   min(float(typical_p[row]) * near, 1.0) if typical_p[row] < 1 else 1.0)

        if typical_p[row] < 1:  # of tokens that are next to equally typical either may come first
            before = oracle.restrict(logits[row], float(temperature[row]), int(top_k[row]), float(top_p[row]),
                                     float(min_p[row]))
            typical = np.sort(oracle.typicality(before)[np.isfinite(before)])
            assume(np.all(np.diff(typical) > NEAR))
        want = slow(0.0)
        assume(all(np.array_equal(np.isfinite(slow(slack)), np.isfinite(want)) for slack in (-NEAR, NEAR)))
        np.testing.assert_array_equal(np.isfinite(out[row]), np.isfinite(want))
        left = np.isfinite(want)
        np.testing.assert_allclose(out[row][left], want[left], rtol=1e-5)


@given(st.integers(0, 2**32 - 1), per_row(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
       hnp.arrays(np.int32, ROWS, elements=st.integers(1, VOCABULARY)), per_row(SHARE),
       per_row(st.one_of(SHARE, st.just(0.0))), per_row(SHARE))
def test_filters_apply_in_order(seed, temperature, top_k, top_p, min_p, typical_p):
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCABULARY), scale=3).astype(np.float32)
    check_restrict(logits, temperature, top_k, top_p, min_p, typical_p)


def test_the_order_of_filters_matters():
    # After top-k the two left share 0.6 and 0.4: 0.6 alone reaches top-p. Before it, 0.3 would not.
    logits = np.log([[0.3, 0.2, 0.19, 0.16, 0.15]]).astype(np.float32)
    left = np.isfinite(fast[restrict](jnp.asarray(logits), settings(temperature=[1.0], top_k=[2], top_p=[0.55])))
    np.testing.assert_array_equal(left, [[True, False, False, False, False]])
    # At temperature 0.1 the best token alone holds 0.98.
    left = np.isfinite(fast[restrict](jnp.asarray(logits), settings(temperature=[0.1], top_p=[0.95])))
    np.testing.assert_array_equal(left, [[True, False, False, False, False]])


COUNTS = hnp.arrays(np.int32, (ROWS, VOCABULARY), elements=st.integers(0, 3))
PROMPTED = hnp.arrays(bool, (ROWS, VOCABULARY))


@given(LOGITS, COUNTS, PROMPTED, per_row(st.floats(0.25, 4.0, width=32)), per_row(st.floats(-2, 2, width=32)),
       per_row(st.floats(-2, 2, width=32)), hnp.arrays(np.float32, (ROWS, VOCABULARY), elements=VALUES))
def test_penalise(logits, counts, prompted, repetition, presence, frequency, bias):
    out = np.asarray(fast[penalise](jnp.asarray(logits), settings(
        repetition=repetition, presence=presence, frequency=frequency, bias=bias), jnp.asarray(counts), jnp.asarray(prompted)))
    for row in range(ROWS):
        output = [token for token in range(VOCABULARY) for _ in range(counts[row, token])]
        want = oracle.penalise(logits[row], np.flatnonzero(prompted[row]), output, float(repetition[row]), float(presence[row]),
                               float(frequency[row]), dict(enumerate(bias[row].astype(float))))
        np.testing.assert_allclose(out[row], want, rtol=1e-5, atol=1e-4)


def test_presence_and_frequency_see_the_output_only():
    logits, nothing = jnp.ones((1, 4)), jnp.zeros((1, 4), jnp.int32)
    prompted = jnp.array([[True, True, False, False]])
    for name in ("presence", "frequency"):
        out = penalise(logits, settings(**{name: [0.5]}), nothing, prompted)
        np.testing.assert_array_equal(out, logits)
    np.testing.assert_array_equal(penalise(logits, settings(repetition=[2.0]), nothing, prompted), [[0.5, 0.5, 1, 1]])


MIXED = {"temperature": [0.0, 0.7, 1.5], "top_k": [VOCABULARY, 4, 7], "top_p": [0.3, 1.0, 0.8], "min_p": [0.5, 0.0, 0.05],
         "typical_p": [0.2, 0.9, 1.0], "repetition": [1.0, 1.3, 0.8], "presence": [0.4, 0.0, -0.3],
         "frequency": [0.0, 0.2, 0.1]}


def test_mixed_settings_equal_each_row_alone():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(ROWS, VOCABULARY), scale=2).astype(np.float32)
    bias = rng.normal(size=(ROWS, VOCABULARY))
    counts, prompted = rng.integers(0, 3, (ROWS, VOCABULARY)), rng.integers(0, 2, (ROWS, VOCABULARY)) > 0
    keys, places = jax.random.split(jax.random.key(3), ROWS), jnp.array([5, 900, 17])

    @jax.jit
    def both(logits, settings, counts, prompted, keys, places):
        scores = restrict(penalise(logits, settings, counts, prompted), settings)
        return scores, choose(penalise(logits, settings, counts, prompted), settings, keys, places)

    everything = (jnp.asarray(logits), settings(**MIXED, bias=bias), jnp.asarray(counts, jnp.int32), jnp.asarray(prompted),
                  keys, places)
    scores, tokens = both(*everything)
    for row in range(ROWS):
        alone = jax.tree.map(lambda x, row=row: x[row:row + 1], everything)
        one, token = both(*alone)
        np.testing.assert_allclose(one[0], scores[row], rtol=1e-6)
        assert token[0] == tokens[row]
        # And without the settings that this row has off.
        off = {"temperature": 0, "top_k": VOCABULARY, "top_p": 1, "min_p": 0, "typical_p": 1, "repetition": 1, "presence": 0,
               "frequency": 0}
        own = {name: values[row:row + 1] for name, values in MIXED.items() if values[row] != off[name]}
        assert len(own) < len(MIXED)
        lean = (alone[0], settings(**own, bias=bias[row:row + 1]), *alone[2:])
        assert both(*lean)[1][0] == tokens[row]


# Whole numbers, whose float32 sums are exact: no call is close.
SCORES = hnp.arrays(np.float32, (ROWS, VOCABULARY), elements=st.one_of(
    st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False, allow_subnormal=False), st.sampled_from([-0.0, 0.0])))
MASSES = hnp.arrays(np.float32, (ROWS, VOCABULARY), elements=st.integers(0, 20).map(float))


@given(SCORES, MASSES, per_row(st.integers(1, 250).map(float)))
def test_reaching(scores, mass, target):
    out = np.asarray(fast[reaching](jnp.asarray(scores), jnp.asarray(mass), jnp.asarray(target)))
    for row in range(ROWS):
        np.testing.assert_array_equal(out[row], scores[row] >= oracle.smallest(scores[row], mass[row], target[row]))


@pytest.mark.parametrize(("scores", "mass", "target", "want"), [
    ([3.0, 1.0, 2.0], [0.5, 0.25, 0.25], 0.0, [0, 0, 0]),
    ([3.0, 1.0, 2.0], [0.5, 0.25, 0.25], 0.5, [1, 0, 0]),
    ([3.0, 1.0, 2.0], [0.5, 0.25, 0.25], 0.625, [1, 0, 1]),
    ([3.0, 1.0, 2.0], [0.5, 0.25, 0.25], 1.0, [1, 1, 1]),
    ([3.0, 1.0, 2.0], [0.5, 0.25, 0.25], 1.5, [1, 1, 1]),
    ([2.0, 2.0, 2.0], [0.5, 0.25, 0.25], 0.125, [1, 1, 1]),
    ([-0.0, 0.0, -1.0], [0.5, 0.25, 0.25], 0.25, [1, 1, 0]),
    ([-np.inf, 1.0, -np.inf], [0.25, 0.5, 0.25], 0.5, [0, 1, 0]),
    ([-np.inf, 1.0, -np.inf], [0.25, 0.5, 0.25], 0.75, [1, 1, 1]),
    ([np.inf, 1.0, -1.0], [0.5, 0.25, 0.25], 0.5, [1, 0, 0]),
    ([1.0, np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(1), np.float32(0))], [0.25, 0.5, 0.25], 0.5,
     [0, 1, 0]),
    ([-1.0, np.nextafter(np.float32(-1), np.float32(-2)), -2.0], [0.25, 0.5, 0.25], 0.25, [1, 0, 0]),
], ids=lambda value: str(value))
def test_reaching_at_the_edges(scores, mass, target, want):
    out = fast[reaching](*(jnp.array([x], jnp.float32) for x in (scores, mass)), jnp.array([target], jnp.float32))
    np.testing.assert_array_equal(out[0], np.array(want, bool))


def test_greedy_takes_the_lowest_of_equal_tokens():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-np.inf, -3.0, -np.inf, -3.0]])
    keys, places = jax.random.split(jax.random.key(0), 3), jnp.zeros(3, jnp.int32)
    for given_settings in (Settings(), settings(temperature=[0.0] * 3, top_k=[2] * 3, top_p=[0.1] * 3)):
        assert fast[choose](logits, given_settings, keys, places).tolist() == [1, 0, 1]


def test_extreme_temperatures_keep_bans_and_order():
    logits = jnp.array([[9.0, 10.0, -np.inf, 10.0]] * 3)
    rows = settings(temperature=[1e-37, 1e30, 1e-3], top_p=[0.9] * 3, min_p=[0.01] * 3)
    for seed in range(8):
        token = fast[choose](logits, rows, jax.random.split(jax.random.key(seed), 3), jnp.zeros(3, jnp.int32)).tolist()
        assert token[0] in (1, 3) and token[1] != 2 and token[2] in (1, 3)


# The distribution of `choose`.

DRAWS = 20000
PEAKED = np.array([1.5, 0.0, -1.0, 0.7, 0.7, -np.inf, 2.0, -4.0], np.float32)


def chi_square(counts, p):
    """(statistic, the value that chance exceeds once in a million): Wilson and Hilferty's cube."""
    live = p > 0
    assert not counts[~live].any()
    freedom = live.sum() - 1
    expected = p[live] * counts.sum()
    level = freedom * (1 - 2 / (9 * freedom) + 4.7534 * np.sqrt(2 / (9 * freedom))) ** 3
    return float(((counts[live] - expected) ** 2 / expected).sum()), float(level)


@functools.cache
def drawn():
    """For four settings, DRAWS tokens by keys and DRAWS by positions."""
    cases = {"plain": {}, "cold": {"temperature": 0.6}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.8, "temperature": 1.4}}
    every = {"temperature": 1.0, "top_k": len(PEAKED), "top_p": 1.0}
    rows = [every | case for case in cases.values()]
    fields = {name: np.repeat([row[name] for row in rows], DRAWS) for name in every}
    logits = jnp.broadcast_to(jnp.asarray(PEAKED), (len(rows) * DRAWS, len(PEAKED)))
    many = jnp.tile(jax.random.split(jax.random.key(11), DRAWS), len(rows))
    one = jnp.broadcast_to(jax.random.key(12), (len(rows) * DRAWS,))
    by_key = fast[choose](logits, settings(**fields), many, jnp.zeros(len(rows) * DRAWS, jnp.int32))
    by_place = fast[choose](logits, settings(**fields), one, jnp.tile(jnp.arange(DRAWS), len(rows)))
    return {name: (case, *(np.asarray(x).reshape(len(rows), DRAWS)[i] for x in (by_key, by_place)))
            for i, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("name", ["plain", "cold", "top_k", "top_p"])
def test_choose_draws_from_the_softmax(name):
    case, *draws = drawn()[name]
    p = oracle.softmax(oracle.restrict(PEAKED, **({"temperature": 1.0} | case)))
    for source, tokens in zip(("keys", "positions"), draws, strict=True):
        counts = np.bincount(tokens, minlength=len(PEAKED))
        statistic, level = chi_square(counts, p)
        print(f"{name} over {source}: chi-square {statistic:.1f}, chance stays below {level:.1f}")
        assert statistic < level
        off = p**1.1 / np.sum(p**1.1)  # a control: the same draws are no sample of something a little more peaked
        assert chi_square(counts, off)[0] > level


def test_draws_at_neighbouring_positions_and_of_neighbouring_rows_are_independent():
    _, by_key, by_place = drawn()["plain"]
    p = oracle.softmax(PEAKED.astype(float))
    for tokens in (by_key, by_place):
        pairs = np.bincount(tokens[:-1:2] * len(p) + tokens[1::2], minlength=len(p) ** 2)
        both = np.outer(p, p).ravel()
        frequent = both * pairs.sum() >= 5
        counts = np.append(pairs[frequent], pairs[~frequent].sum())
        statistic, level = chi_square(counts, np.append(both[frequent], both[~frequent].sum()))
        print(f"pairs: chi-square {statistic:.1f}, chance stays below {level:.1f}")
        assert statistic < level
        # Control: each token beside itself.
        doubled = np.bincount(tokens[:-1:2] * (len(p) + 1), minlength=len(p) ** 2)
        counts = np.append(doubled[frequent], doubled[~frequent].sum())
        assert chi_square(counts, np.append(both[frequent], both[~frequent].sum()))[0] > level


def test_noise_is_a_function_of_key_and_position_alone():
    keys = jax.random.split(jax.random.key(5), 3)
    places = jnp.array([4, 4, 2**31 - 1])
    whole = noise(keys, places, 7)
    for row in range(3):
        np.testing.assert_array_equal(noise(keys[row:row + 1], places[row:row + 1], 7)[0], whole[row])
        np.testing.assert_array_equal(oracle.noise(keys[row], places[row], 7), whole[row])
    assert len(np.unique(whole)) == whole.size
    assert not np.array_equal(noise(keys, places + jnp.array([1, 0, -1]), 7)[0], whole[0])


@pytest.mark.parity
def test_processors_equal_transformers():
    """Whole chains, in transformers' own order, at every step of its own generation."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = 40
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=size, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6, bos_token_id=None,
        eos_token_id=None)).eval()
    prompt = torch.tensor([[3, 7, 7, 1], [20, 5, 6, 39]])
    for temperature, top_k, top_p, min_p, typical_p, repetition in [
            (1.0, 0, 1.0, None, 1.0, 1.0), (0.7, 12, 1.0, None, 1.0, 1.0), (1.3, 0, 0.83, None, 1.0, 1.2),
            (0.9, 0, 1.0, 0.07, 1.0, 0.8), (1.1, 0, 1.0, None, 0.61, 1.0), (0.8, 30, 0.93, 0.02, 0.87, 1.5)]:
        bias = {3: 2.5, 11: -1.5, 39: -float("inf"), 5: 4.0}
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=True, temperature=temperature,
            top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, repetition_penalty=repetition, pad_token_id=0,
            sequence_bias=[[[token], value] for token, value in bias.items()], output_logits=True, output_scores=True,
            return_dict_in_generate=True)
        full = np.zeros((2, size))
        for token, value in bias.items():
            full[:, token] = value
        chosen = settings(
            temperature=[temperature] * 2, top_k=[top_k or size] * 2, top_p=[top_p] * 2, min_p=[min_p or 0.0] * 2,
            typical_p=[typical_p] * 2, repetition=[repetition] * 2, bias=full)
        prompted = np.stack([np.bincount(row, minlength=size) > 0 for row in prompt.numpy()])
        for step, (logits, want) in enumerate(zip(out.logits, out.scores, strict=True)):
            output = out.sequences[:, 4:4 + step].numpy()
            counts = np.stack([np.bincount(row, minlength=size) for row in output]).astype(np.int32)
            scores = fast[penalise](jnp.asarray(logits.float().numpy()), chosen, jnp.asarray(counts), jnp.asarray(prompted))
            ours, theirs = np.asarray(fast[restrict](scores, chosen)), want.float().numpy()
            np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
            for mine, other in zip(ours, theirs, strict=True):
                live = np.isfinite(other)
                np.testing.assert_allclose(mine[live], other[live], rtol=1e-5, atol=1e-6)


def test_restrict_without_sampling_is_nothing():
    logits = jnp.array([[1.0, -np.inf, 3.0]])
    assert restrict(logits, settings(top_k=[1])) is logits


@pytest.mark.parametrize("present", [*itertools.product([False, True], repeat=3)])
def test_settings_know_whether_they_penalise(present):
    fields = dict(zip(("repetition", "presence", "frequency"), present, strict=True))
    assert settings(**{name: [1.5] for name, on in fields.items() if on}).penalised == any(present)


@given(LOGITS, per_row(st.sampled_from([0.0, 0.5, 1.0, 2.0])), per_row(SHARE))
def test_distribution_is_what_choose_draws_from(logits, temperature, p):
    found = np.asarray(fast[distribution](jnp.asarray(logits), settings(temperature=temperature, top_p=p)))
    filtered = np.asarray(fast[restrict](jnp.asarray(logits), settings(temperature=temperature, top_p=p)))
    for row in range(ROWS):
        if temperature[row] > 0:
            np.testing.assert_allclose(np.exp(found[row]), oracle.softmax(filtered[row].astype(np.float64)), atol=1e-6)
        else:
            np.testing.assert_array_equal(np.exp(found[row]), np.eye(VOCABULARY)[np.argmax(logits[row])])
    np.testing.assert_array_equal(fast[distribution](jnp.asarray(logits), Settings()),
                                  np.where(np.eye(VOCABULARY)[np.argmax(logits, axis=1)] > 0, 0.0, -np.inf))

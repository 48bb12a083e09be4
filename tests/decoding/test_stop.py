import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.decoding import stop
from tests.decoding import oracle

# Few letters, so that strings overlap, and characters that share their first bytes.
LETTERS = "abéè€‚😀"
STRINGS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.binary(max_size=4), max_size=12)


def run(automaton, row, tokens):
    """How many tokens until the automaton has found something; None if it never does."""
    step, found, state = np.asarray(automaton.step), np.asarray(automaton.found), int(automaton.start[row])
    assert not found[state]
    for i, token in enumerate(tokens):
        state = int(step[state, token])
        if found[state]:
            assert all(found[step[state, later]] for later in range(step.shape[1])), "forgets what it found"
            return i + 1
    return None


@st.composite
def spelled(draw):
    """Stop strings, and tokens: pieces of a text that is likely to hold one, cut anywhere, characters not spared."""
    stops = draw(STRINGS)
    text = "".join(draw(st.lists(st.one_of(st.sampled_from(stops), st.text(LETTERS, max_size=3)), max_size=4))).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return stops, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(spelled())
def test_finds_at_the_token_that_completes_a_string(case):
    stops, pieces = case
    vocabulary = sorted(set(pieces)) or [b""]
    automaton = stop.automaton([stops], vocabulary, len(vocabulary))
    assert run(automaton, 0, [vocabulary.index(piece) for piece in pieces]) == oracle.first_stop(pieces, stops)


@given(STRINGS, PIECES)
def test_finds_nothing_that_is_not_there(stops, pieces):
    automaton = stop.automaton([stops], pieces, len(pieces))
    assert run(automaton, 0, range(len(pieces))) == oracle.first_stop(pieces, stops)


@given(st.lists(STRINGS, min_size=2, max_size=4), spelled())
def test_rows_have_strings_of_their_own(lists, case):
    _, pieces = case
    lists = [[], *lists, lists[0]]
    automaton = stop.automaton(lists, pieces, len(pieces))
    for row, stops in enumerate(lists):
        assert run(automaton, row, range(len(pieces))) == oracle.first_stop(pieces, stops)


@pytest.mark.parametrize(("stops", "pieces", "count"), [
    (["END"], [b"xENDy", b"z"], 1),
    (["END"], [b"EN", b"", b"", b"D"], 4),
    (["END"], [b"E", b"N", b"x", b"D"], None),
    (["aab"], [b"a", b"a", b"a", b"b"], 4),
    (["abab", "bb"], [b"aba", b"abb", b"x"], 2),
    (["abcd", "bc"], [b"ab", b"c", b"d"], 2),
    (["€"], [b"\xe2", b"\x82", b"\xac"], 3),
    (["€"], [b"\xe2\x82", b"\xe2\x82\xac"], 2),
    (["é"], [b"\xc3", b"\xe2", b"\xa9"], None),
    (["\n\n"], [b".\n", b"\nA"], 2),
    (["a", "a"], [b"b", b"a"], 2),
    ([], [b"a"], None),
], ids=str)
def test_examples(stops, pieces, count):
    assert oracle.first_stop(pieces, stops) == count
    assert run(stop.automaton([stops], pieces, len(pieces)), 0, range(len(pieces))) == count


def test_ids_without_a_token_add_nothing():
    automaton = stop.automaton([["ab"]], [b"a", b"b"], 5)
    assert automaton.step.shape[1] == 5
    assert run(automaton, 0, [0, 4, 2, 1]) == 4
    narrow = stop.automaton([["ab"]], [b"b", b"a", b"ab"], 2)
    assert narrow.step.shape[1] == 2


def test_tables_have_few_shapes_and_one_part_per_list():
    same = stop.automaton([["ab"], ["c"], ["ab"]], [b"a", b"b"], 2)
    assert same.start.tolist() == [0, 3, 0]
    assert same.step.shape == (stop.STATES, 2) and same.found.shape == (stop.STATES,)
    assert stop.automaton([["a" * 40]], [b"a"], 1).step.shape[0] == 2 * stop.STATES
    assert same.step.dtype == same.start.dtype == jnp.int32


def test_an_empty_string_is_an_error():
    with pytest.raises(ValueError, match="stop string must not be empty"):
        stop.automaton([["ab"], ["c", ""]], [b"a"], 1)

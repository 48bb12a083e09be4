"""ADED: the table beside a dict, the search beside a plain one, and drafts of a tiny model."""

import functools
import math
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.decoding.generate import generate
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import ADED, Lookup, Start, Union, View, make
from jaxlm.decoding.speculative.drafters.aded import WAYS, Table, bucket, empty, learn, trigrams
from tests.decoding import stubs
from tests.decoding.speculative.test_equality import NEW, check, requests, target

TOKENS, SLOTS = 5, 48  # few, so that pairs return


class Plain:
    """The table as lists: for every bucket its pairs, each with its successors and their counts, in the order of the places."""

    def __init__(self, buckets, successors):
        self.buckets, self.successors = [[] for _ in range(buckets)], successors

    def learn(self, first, second, third):
        home = self.buckets[int(bucket(np.int32([first]), np.int32([second]), len(self.buckets))[0])]
        pair = next((entry for entry in home if entry[0] == (first, second)), None)
        if pair is None:
            pair = ((first, second), [], [])
            if len(home) < WAYS:
                home.append(pair)
            else:
                home[min(range(WAYS), key=lambda way: sum(home[way][2]))] = pair
        _, ids, counts = pair
        if third in ids:
            counts[ids.index(third)] += 1
        elif len(ids) < self.successors:
            ids.append(third)
            counts.append(1)
        else:
            place = counts.index(min(counts))
            ids[place], counts[place] = third, 1

    def as_table(self):
        table = Table(*(np.array(leaf) for leaf in empty(len(self.buckets) * WAYS, self.successors)))
        for home, pairs in enumerate(self.buckets):
            for way, (pair, ids, counts) in enumerate(pairs):
                table.keys[home, way] = pair
                table.ids[home, way, :len(ids)] = ids
                table.counts[home, way, :len(ids)] = counts
        return table

    def shares(self, first, second, smoothing):
        """In float32, as on the device: what equals there must equal here."""
        home = self.buckets[int(bucket(np.int32([first]), np.int32([second]), len(self.buckets))[0])]
        for pair, ids, counts in home:
            if pair == (first, second):
                return {i: np.float32(c) / np.float32(sum(counts) + smoothing) for i, c in zip(ids, counts, strict=True)}
        return {}


def same(table, oracle):
    for ours, theirs in zip(table, oracle, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


class TestTable:
    @settings(max_examples=50)
    @given(st.lists(st.tuples(*[st.integers(0, TOKENS)] * 3, st.booleans()), max_size=60))
    def test_is_that_of_a_dict_one_after_another(self, items):
        """Two buckets: pairs collide, push each other out and come again; successors too; all kinds of duplicates."""
        padded = np.zeros((60, 3), np.int32)
        padded[:len(items)] = np.reshape([item[:3] for item in items], (-1, 3))
        on = np.zeros(60, bool)
        on[:len(items)] = [item[3] for item in items]
        oracle = Plain(2, 3)
        for triple in padded[on]:
            oracle.learn(*map(int, triple))
        same(jax.jit(learn)(empty(8, 3), jnp.asarray(padded), jnp.asarray(on)), oracle.as_table())

    @given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=4))
    def test_a_corpus_keeps_the_most_frequent(self, texts):
        counts = Counter(tuple(text[i:i + 3]) for text in texts for i in range(len(text) - 2))
        totals = Counter()
        for (first, second, _), count in counts.items():
            totals[first, second] += count
        table = Table(*map(np.asarray, trigrams(texts, pairs=64, successors=2, most=3.0)))
        homes = {}
        for pair in totals:
            homes.setdefault(int(bucket(np.int32([pair[0]]), np.int32([pair[1]]), 16)[0]), []).append(pair)
        for home in range(16):
            kept = sorted(homes.get(home, []), key=lambda pair: (-totals[pair], pair))[:WAYS]
            assert [tuple(key) for key in table.keys[home].tolist() if key[0] >= 0] == kept
            for way, pair in enumerate(kept):
                after = sorted((-count, triple[2]) for triple, count in counts.items() if triple[:2] == pair)[:2]
                scale = min(1.0, 3.0 / totals[pair])
                assert table.ids[home, way, :len(after)].tolist() == [token for _, token in after]
                weights = [-count * scale for count, _ in after]
                np.testing.assert_allclose(table.counts[home, way, :len(after)], weights, rtol=1e-6)
                assert not table.counts[home, way, len(after):].any()

    def test_large_ids_find_their_buckets_on_both_sides(self):
        ids = np.random.default_rng(0).integers(0, 1 << 18, (2, 1000)).astype(np.int32)
        ours = jax.jit(bucket, static_argnums=2)(jnp.asarray(ids[0]), jnp.asarray(ids[1]), 1000)
        np.testing.assert_array_equal(ours, bucket(ids[0], ids[1], 1000))
        assert np.bincount(ours, minlength=1000).max() < 10  # spread: a random function has about 5


def state_of(text, drafter):
    """The table after a prompt."""
    tokens = np.zeros((1, SLOTS), np.int32)
    tokens[0, :len(text)] = text
    start = Start(jnp.asarray(tokens), jnp.asarray([len(text)], jnp.int32), None, SLOTS, TOKENS)
    return tokens, begun(drafter, start)


begun = jax.jit(lambda drafter, start: drafter.init(start, None))


@functools.partial(jax.jit, static_argnums=0)
def drafted(drafter, table, history, length):
    last = jnp.take_along_axis(history, length[:, None], axis=1)[:, 0]
    state = types.SimpleNamespace(cache=types.SimpleNamespace(length=length), last=last)
    return drafter.propose(table, View(history, state, None, None))[0]


def paths(tree, row=0):
    """Tokens from the root down of every node that is some, in the order of the nodes."""
    tokens, parents = np.asarray(tree.tokens[row]), np.asarray(tree.parents[row])
    found = {0: ()}
    for node in range(1, len(tokens)):
        if parents[node] >= 0:
            assert parents[node] < node and parents[node] in found
            found[node] = (*found[parents[node]], int(tokens[node]))
    assert len(set(found.values())) == len(found)
    return list(found.values())[1:]


def searched(oracle, before, last, drafter):
    """The same search, with dicts."""
    visits, worth, shares = {}, {}, {(): oracle.shares(before, last, drafter.smoothing)}

    def pair(path):
        return ((before, last, *path)[-2:])

    for _ in range(drafter.simulations):
        path = ()
        while shares.get(path) and len(path) < drafter.depth:
            passed = np.float32(1 + sum(visits.get((*path, token), 0) for token in shares[path]))
            bonus = drafter.exploration + math.log((passed + drafter.growth + 1) / drafter.growth)

            def score(token, path=path, passed=passed, bonus=bonus):
                n = visits.get((*path, token), 0)
                return worth.get((*path, token), 0.0) / max(n, 1) + bonus * shares[path][token] * math.sqrt(passed) / (1 + n)

            path = (*path, max(shares[path], key=score))
        if not path:
            break
        found = oracle.shares(*pair(path), drafter.smoothing)
        if len(path) < drafter.depth:
            shares[path] = found
        reward = sum(shares[path[:i]][path[i]] for i in range(len(path))) + max(found.values(), default=0.0)
        for i in range(1, len(path) + 1):
            visits[path[:i]] = visits.get(path[:i], 0) + 1
            worth[path[:i]] = worth.get(path[:i], 0.0) + reward

    def likely(path):
        return math.prod(shares[path[:i]][path[i]] for i in range(len(path)))

    nodes = [(*path, token) for path, found in shares.items() for token in found]
    return {path: visits.get(path) or likely(path) for path in nodes}


class TestSearch:
    drafter = ADED(nodes=9, length=4, simulations=12, successors=3, pairs=64)

    @settings(max_examples=60)
    @given(st.lists(st.integers(0, TOKENS - 1), min_size=4, max_size=SLOTS - 1))
    def test_is_the_plain_one(self, text):
        history, table = state_of(text, self.drafter)
        oracle = Plain(16, 3)
        for at in range(len(text) - 2):
            oracle.learn(*text[at:at + 3])
        ours = paths(drafted(self.drafter, table, jnp.asarray(history), jnp.asarray([len(text) - 1], jnp.int32)))
        weights = searched(oracle, *text[-2:], self.drafter)
        assert len(ours) == min(len(weights), self.drafter.nodes - 1)
        best = sorted(weights.values(), reverse=True)[:len(ours)]
        np.testing.assert_allclose([weights[path] for path in ours], best, rtol=1e-5)

    def test_proposes_nothing_but_trigrams_it_has_seen(self):
        """However many pairs share a bucket."""
        rng = np.random.default_rng(0)
        drafter = self.drafter.replace(pairs=WAYS)
        for _ in range(30):
            text = rng.integers(0, TOKENS, SLOTS - 1).tolist()
            history, table = state_of(text, drafter)
            seen = {tuple(text[at:at + 3]) for at in range(len(text) - 2)}
            for path in paths(drafted(drafter, table, jnp.asarray(history), jnp.asarray([len(text) - 1], jnp.int32))):
                assert (*text[-2:], *path)[-3:] in seen

    def test_exploration_spreads_what_would_be_a_chain(self):
        text = [0, 1, 2, 3, 4, 0, 1, 3, 2, 4, 0, 1, 2, 3, 4, 0, 1, 3, 0, 1]  # 0 1 -> 2, 3, 2, 3
        bold, timid = self.drafter, self.drafter.replace(exploration=0.0, growth=1e9, simulations=8)
        history, table = state_of(text, bold)
        at = jnp.asarray(history), jnp.asarray([len(text) - 1], jnp.int32)
        one, both = paths(drafted(timid, table, *at)), paths(drafted(bold, table, *at))
        assert one[:4] == [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 0)] and one.count((3,)) == 1
        assert [path[0] for path in both].count(3) >= 3 > [path[0] for path in one].count(3), (one, both)

    def test_the_classes_are_of_shares_and_depths(self):
        history, table = state_of([1, 2, 3, 1, 2, 3, 1, 2], self.drafter)
        tree = drafted(self.drafter, table, jnp.asarray(history), jnp.asarray([7], jnp.int32))
        # 1 2 -> 3 twice and 2 3 -> 1 twice: shares of 2/3; 3 1 -> 2 twice.
        assert paths(tree) == [(3,), (3, 1), (3, 1, 2), (3, 1, 2, 3)]
        assert tree.kinds[0, :5, 0].tolist() == [-1, 2, 10, 10, 10] and not (tree.kinds[0, 5:] >= 0).any()
        assert (np.diff(tree.scores[0]) <= 0).all()

    def test_rows_are_searched_for_themselves(self):
        """One of them knows nothing."""
        text = [1, 2, 3, 1, 2]
        history, table = state_of(text, self.drafter)
        both = jnp.concatenate([jnp.asarray(history), jnp.full_like(history, 4)])
        tree = drafted(self.drafter, table, both, jnp.asarray([4, 4], jnp.int32))
        assert paths(tree) == [(3,), (3, 1), (3, 1, 2), (3, 1, 2, 3)] and paths(tree, 1) == []


DRAFTERS = {"alone": ADED(nodes=8, length=4, simulations=8, pairs=64),
            "union": Union((Lookup(length=4, nodes=13), ADED(nodes=8, simulations=8, pairs=64)), (8,))}


@pytest.mark.parametrize("name", ["alone", pytest.param("union", marks=pytest.mark.slow)])
@settings(max_examples=5)
@given(requests())
def test_gives_the_tokens_of_plain_decoding(name, request_):
    check(target("rope"), *request_, DRAFTERS[name])


# Text that repeats itself, so that there is something to learn.
ASKED = {"max_new_tokens": NEW, "logit_bias": {97: 12.0, 98: 11.5, 99: 11.0}, "eos": ()}
DRAFTER = ADED(nodes=8, length=4, simulations=8, pairs=1024)


def test_learns_every_token_of_prompt_and_output():
    """All but the first that came out of the prefill with the two before it."""
    lm, prompts = target("rope"), [list(b"abcab"), list(b"xy")]
    did = generate(lm, prompts, drafter=DRAFTER, **ASKED)
    counts = Counter()
    for prompt, out in zip(prompts, did.tokens, strict=True):
        text = [*prompt, *out.tolist()]
        counts.update(tuple(text[at:at + 3]) for at in range(len(text) - 2) if at + 2 != len(prompt))
    table = jax.tree.map(np.asarray, did.speculation.state)
    held = {(*key, token): count for key, ids, numbers in zip(table.keys.reshape(-1, 2).tolist(), table.ids.reshape(-1, 8),
            table.counts.reshape(-1, 8), strict=True) for token, count in zip(ids, numbers, strict=True) if count}
    assert held == counts


def test_warm_tables_and_corpora_draft_better():
    lm, prompts = target("rope"), [list(b"abc"), list(b"hello")]
    did = generate(lm, prompts, drafter=DRAFTER, **ASKED)
    cold = did.speculation
    warm = generate(lm, prompts, drafter=DRAFTER, drafter_state=cold.state, **ASKED).speculation
    texts = [[*prompt, *out.tolist()] for prompt, out in zip(prompts, did.tokens, strict=True)]
    primed = generate(lm, prompts, drafter=DRAFTER.replace(corpus=trigrams(texts, pairs=1024)), **ASKED).speculation
    assert cold.calls.sum() < 2 * (NEW - 1)
    assert warm.calls.sum() < cold.calls.sum() and primed.calls.sum() < cold.calls.sum()


class TestByName:
    def test_has_the_nodes_asked_for(self):
        made = make("aded", 40, stubs.random("rope"), 1)
        assert isinstance(made, ADED) and made.nodes == 40 and make("lookup+aded", 12, stubs.random("rope"), 1).nodes == 12

    def test_beside_lookup_has_as_many_as_both_offer(self):
        lm, script = stubs.scripted(b"abcabcabcabd", 3), [list(b"abc")]
        out = generate(lm, script, 12, eos=(), drafter="lookup+aded")
        assert bytes(out.tokens[0].tolist()) == b"abcabcabcabd" and list(out.speculation.sizes) == [1 + 4 * 12 + 23]

    def test_has_no_template(self):
        with pytest.raises(ValueError, match="number of nodes"):
            make("aded", trees.chain(3), stubs.random("rope"), 1)


class TestRefusals:
    @pytest.mark.parametrize(("fields", "says"), [
        ({"nodes": 1}, "at least 2 nodes"), ({"length": 0}, "at least 2 nodes"), ({"pairs": 6}, "multiple of 4"),
        ({"pairs": 0}, "multiple of 4"), ({"smoothing": 0.0}, "must be positive"), ({"growth": 0.0}, "must be positive"),
        ({"nodes": 64, "simulations": 6}, "at most 57 nodes")])
    def test_says_what_is_wrong(self, fields, says):
        with pytest.raises(ValueError, match=says):
            ADED(**fields)

    def test_names_the_sizes_of_a_table_that_does_not_fit(self):
        with pytest.raises(ValueError, match="64 pairs and 8 successors of each, the drafter 128 and 8"):
            state_of([1, 2, 3], ADED(pairs=128, corpus=trigrams([[1, 2, 3]], pairs=64)))

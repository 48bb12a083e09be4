"""Token Recycling: its tables beside a dict, and the search for the largest logits where the vocabulary is split."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import Recycling, Seen, Start, View, make
from jaxlm.decoding.speculative.drafters.recycling import Successors, likeliest
from jaxlm.decoding.speculative.verify import Walk
from tests.decoding.speculative.test_equality import check, target

TOKENS, COUNT, SLOTS = 5, 3, 40  # few tokens, so that contexts return


class Remembered:
    """What a dict of contexts, the longest first, would propose; rows learn one after another."""

    def __init__(self, order):
        self.order, self.table = order, {}

    def learn(self, contexts, successors, rank):
        """`contexts` end with the token itself; of equal ones that of the highest rank counts, then the last."""
        best = {}
        for place in np.lexsort((np.arange(len(rank)), rank)):
            if rank[place] >= 0:
                for length in range(1, self.order + 1):
                    best[tuple(contexts[place][-length:]), length] = successors[place]
        self.table |= best

    def after(self, context):
        found = [self.table.get((tuple(context[-length:]), length)) for length in range(self.order, 0, -1)]
        return next((row for row in found if row is not None), None)


def padded(text):
    """The text behind what stands for "no token"."""
    return [-1, -1, *text]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_proposes_what_a_dict_of_contexts_would(order):
    """A prompt's logits, then five calls whose trees are accepted in part: every node learns, the longest context counts."""
    rng = np.random.default_rng(order)
    drafter = Recycling(trees.branching(2, 2, 1), count=COUNT, order=order)
    template, oracle = drafter.template, Remembered(order)

    def logits(*shape):
        ids = rng.permuted(np.broadcast_to(np.arange(TOKENS), (*shape, TOKENS)), axis=-1)[..., :COUNT]
        return Successors(jnp.asarray(ids, jnp.int32), jnp.asarray(-np.sort(-rng.normal(size=ids.shape)), jnp.float32))

    texts = [rng.integers(0, TOKENS, 12).tolist(), rng.integers(0, TOKENS, 7).tolist()]
    tokens = np.full((2, 14), 4, np.int32)
    for row, text in enumerate(texts):
        tokens[row, :len(text)] = text
    digest = logits(2, 14)
    state = jax.jit(drafter.init)(Start(jnp.asarray(tokens), jnp.array([12, 7]), digest, SLOTS, TOKENS), None)
    places = [(row, t) for row in range(2) for t in range(14)]
    oracle.learn([padded(tokens[row])[:t + 3] for row, t in places], [np.asarray(digest.ids)[place] for place in places],
                 [0 if t < len(texts[row]) else -1 for row, t in places])

    settings = types.SimpleNamespace(temperature=None)
    done = np.array([False, False])
    for call in range(5):
        def view():
            history = np.zeros((2, SLOTS), np.int32)
            for row, text in enumerate(texts):
                history[row, :len(text)] = text
            plain = types.SimpleNamespace(cache=types.SimpleNamespace(length=jnp.array([len(text) - 1 for text in texts])),
                                          last=jnp.array([text[-1] for text in texts]), done=jnp.asarray(done))
            return View(jnp.asarray(history), plain, types.SimpleNamespace(settings=settings), None)

        if call == 0:  # the first token, which no table has seen the successors of in place
            for text in texts:
                text.append(int(rng.integers(0, TOKENS)))
        tree, state = drafter.propose(state, view())
        for row, text in enumerate(texts):
            paths = [[text[-1]]]
            for node in range(1, template.nodes):
                above = paths[template.parents[node]]
                row_after = None if above is None else oracle.after([*padded(text[:-1]), *above])
                paths.append(None if row_after is None else [*above, int(row_after[template.ranks[node]])])
                assert bool(tree.valid()[row, node]) == (paths[node] is not None)
                if paths[node] is not None:
                    assert int(tree.tokens[row, node]) == paths[node][-1], (call, row, node)

        # The first child, and its first child, are accepted in row 0; nothing in row 1, which ends at the third call.
        valid = np.asarray(tree.valid())
        children = np.flatnonzero(valid[0] & (np.asarray(template.parents) == 0))
        first = int(children[0]) if len(children) else 0
        path = np.array([[0, first, 0, 0], [0, 0, 0, 0]])
        count = np.array([2 if first else 1, 0 if done[1] else 1])
        digest = logits(2, template.nodes)
        chosen = np.array([[int(tree.tokens[0, first]) if first else 3, 2, 0, 0], [1, 0, 0, 0]])
        before = [list(text) for text in texts]
        for row, text in enumerate(texts):
            text.extend(chosen[row, :count[row]].tolist())
        walk = Walk(jnp.asarray(path), jnp.asarray(chosen), jnp.asarray(count))
        state = drafter.observe(state, Seen(tree, digest, walk, view()))
        contexts, rows, ranks = [], [], []
        for row in range(2):
            spelled = {}
            for node in range(template.nodes):
                parent = template.parents[node]
                spelled[node] = [*(padded(before[row][:-1]) if node == 0 else spelled[parent]), int(tree.tokens[row, node])]
                contexts.append(spelled[node])
                rows.append(np.asarray(digest.ids)[row, node])
                on = valid[row, node] and count[row] > 0
                ranks.append(int(node in path[row, :count[row]]) if on else -1)
        oracle.learn(contexts, rows, ranks)
        done[1] = call >= 2


def test_contexts_that_share_a_place_push_each_other_out():
    """With a single slot for pairs, only the pair seen last is known; all others fall back to their last token."""
    drafter = Recycling(trees.branching(1), count=1, order=2, slots=1)
    digest = Successors(jnp.array([[[1], [2], [3], [4]]]), jnp.zeros((1, 4, 1)))
    state = drafter.init(Start(jnp.array([[0, 1, 0, 1]]), jnp.array([4]), digest, 8, 5), None)
    view = types.SimpleNamespace(request=types.SimpleNamespace(settings=types.SimpleNamespace(temperature=None)))
    for context, follows, length in (((1, 0), 4, 2), ((0, 1), 3, 1), ((1, 3), 4, 1), ((2, 0), -1, 1)):
        rows, known = drafter.successors(state, [jnp.array([[token]]) for token in context], view, 0)
        assert (int(rows.ids[0, 0, 0]), int(known[0, 0])) == (follows, length)


@pytest.mark.parametrize("wrong", [{"order": 0}, {"slots": 0}, {"count": 1}])
def test_refuses(wrong):
    with pytest.raises(ValueError, match="an order and slots of at least 1 and as many successors as its template is wide, 2"):
        Recycling(trees.branching(2), **wrong)


def test_by_name_it_takes_the_best_of_a_wide_template():
    lm = target("rope")
    wide, fixed = make("recycling", 20, lm, 1), make("recycling", trees.chain(3), lm, 1)
    assert wide.nodes == 20 and fixed.nodes == 4
    asked = {"max_new_tokens": 24, "logit_bias": {97: 9.0, 98: 8.5}, "eos": (), "logprobs": True}
    did = check(lm, [list(b"abcabc")], asked, wide)
    assert did.tokens_per_call[0] > 1.2


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

import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cache as caching
from jaxlm import config, generate, model
from jaxlm.decoding import loop
from jaxlm.decoding.generate import Forward, _prefill, _run, row_keys
from jaxlm.decoding.logits import Settings
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import grow
from jaxlm.decoding.speculative.drafters.base import Drafter, View
from jaxlm.decoding.speculative.drafters.grow import Dynamic, Scratch, Static, StochasticBeam
from jaxlm.decoding.speculative.drafters.layers import FirstLayers, first_layers
from jaxlm.decoding.speculative.drafters.model import DraftModel, draft_model
from jaxlm.decoding.speculative.verify import Match, Walk
from jaxlm.model import Model
from tests import tiny

# Two groups of layers, local and not.
TARGET = tiny.decoder(config.Stack((config.Group((tiny.block(window=3),), 1),
                                    config.Group((tiny.block(position=config.Rope(100.0)),), 1))))
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]
NEW = 16
MIXED = {"temperature": [0.0, 0.4, 1.0], "top_p": [0.5, 1.0, 0.9], "repetition_penalty": [1.0, 1.3, 1.0]}

STATIC = trees.best([[0.6, 0.2, 0.1]], 9)
SHAPES = {
    "chain": Static(trees.chain(4), threshold=0.9),
    "tree": Static(STATIC),
    "independent": Static(trees.chains(3, 3), "independent"),
    "distinct": Static(trees.branching(2, 2, 1), "distinct"),
    "beam": StochasticBeam(3, 3),
    "dynamic": Dynamic(9, 2, 3, 4),
}


@functools.cache
def target():
    return Model(TARGET, tiny.weights(model.spec(TARGET)))


@functools.cache
def like_the_target():
    """Agrees with it often, not always."""
    random = np.random.default_rng(1)
    return Model(TARGET, jax.tree.map(lambda leaf: leaf * jnp.asarray(1 + 0.25 * random.normal(size=leaf.shape), jnp.float32),
                                      target().params))


def request(rows):
    """As `generate` makes it of MIXED."""
    settings = {name: jnp.asarray([values[row] for row in rows], jnp.float32) for name, values in MIXED.items()}
    settings["repetition"] = settings.pop("repetition_penalty")
    prompted = jnp.asarray([[token in PROMPTS[row] for token in range(tiny.VOCABULARY)] for row in rows])
    return loop.Request(row_keys(0, len(PROMPTS))[np.asarray(rows)], jnp.full(len(rows), NEW, jnp.int32),
                        jnp.full(4, -1, jnp.int32), Settings(**settings), prompted, None)


@functools.cache
def programs(name, rows):
    """(state after some calls, drafter): prefill and loop in one program that is compiled without optimisation."""
    drafter, asked = DRAFTERS[name](), request(rows)
    lengths = np.array([len(PROMPTS[row]) for row in rows], np.int32)
    tokens = np.stack([np.pad(PROMPTS[row], (0, 12 - len(PROMPTS[row]))) for row in rows]).astype(np.int32)
    step = Forward(TARGET, None)

    @tiny.jit
    def program(params, drafter, calls):
        state = _prefill(step, params, jnp.asarray(tokens), jnp.asarray(lengths), asked, 40, NEW, False, drafter)
        return _run(step, params, state, asked, calls, drafter, Match())

    return lambda calls: program(target().ready, drafter, jnp.int32(calls)), drafter


@functools.cache
def plain(rows):
    settings = {name: [values[row] for row in rows] for name, values in MIXED.items()}
    keys = row_keys(0, len(PROMPTS))[np.asarray(rows)]
    return [row.tolist() for row in generate(target(), [PROMPTS[row] for row in rows], NEW, key=keys, **settings).tokens]


@flax.struct.dataclass
class Overruled(Drafter):
    """A draft model whose trees are never used: another's are."""

    model: DraftModel
    other: DraftModel

    nodes = property(lambda self: self.other.nodes)
    depth = property(lambda self: self.other.depth)

    def init(self, start, kept):
        return self.model.init(start, None), self.other.init(start, None)

    def propose(self, state, view):
        mine = self.model.propose(state[0], view)[1]
        tree, other = self.other.propose(state[1], view)
        return tree, (mine, other)

    def observe(self, state, seen):
        return self.model.observe(state[0], seen), self.other.observe(state[1], seen)


DRAFTERS = {name: lambda shape=shape: draft_model(like_the_target(), shape) for name, shape in SHAPES.items()}
DRAFTERS |= {
    "itself": lambda: draft_model(target()),
    "all layers": lambda: first_layers(target(), 2, Static(STATIC)),
    "first layer": lambda: first_layers(target(), 1, Dynamic(9, 2, 3, 4)),
    "overruled": lambda: Overruled(draft_model(like_the_target(), Static(trees.chain(2))), draft_model(target())),
}


def state_of(name, calls=NEW, rows=(0, 1, 2)):
    return programs(name, rows)[0](calls)


def texts(state):
    tokens, count = np.asarray(state.plain.tokens), np.asarray(state.plain.count)
    return [row[:end].tolist() for row, end in zip(tokens, count, strict=True)]


@functools.cache
def prefill_of(width):
    return tiny.jit(lambda params, tokens: model.forward(params, TARGET, tokens, logits=False).kv)


def check_cache(state, drafted, params):
    """The draft's cache against a prefill of the text, but for the last token and perhaps the one before."""
    length, known = np.asarray(state.plain.cache.length), np.asarray(drafted.cache.length)
    prefill = prefill_of(state.history.shape[1])(params, state.history)
    for got, right in zip(jax.tree.leaves(drafted.cache.layers), jax.tree.leaves(prefill), strict=True):
        for row in range(len(known)):
            np.testing.assert_allclose(got[row, :, :known[row]], right[row, :, :known[row]], atol=2e-5)
    return length - known


# The text is plain decoding's, the cache that of a prefill.

@pytest.mark.parametrize("name", SHAPES)
def test_the_text_is_plain_decodings(name):
    state = state_of(name)
    assert texts(state) == plain((0, 1, 2))
    emitted = np.asarray(state.emitted).sum(axis=0)
    assert emitted[0] > 0 and emitted[1:].sum() > 5  # some drafts are rejected, some accepted


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("calls", [1, 3, NEW])
def test_the_cache_is_that_of_a_prefill(name, calls):
    state = state_of(name, calls)
    behind = check_cache(state, state.drafter, like_the_target().ready)
    assert set(behind.tolist()) <= {0, 1}
    assert np.all(np.asarray(state.plain.count) > 1)


def test_what_others_drafted_is_caught_up_with():
    state = state_of("overruled", 2)
    behind = check_cache(state, state.drafter[0], like_the_target().ready)
    assert behind.max() > 1  # or there would be nothing to catch up with
    state = state_of("overruled")
    check_cache(state, state.drafter[0], like_the_target().ready)
    assert texts(state) == plain((0, 1, 2))


# A draft that is the target itself.

@pytest.mark.parametrize("name, rows", [("itself", (2,)), ("all layers", (0, 2))])
def test_the_target_itself_is_always_accepted(name, rows):
    """Under temperature too, with the target's own noise; but for penalties, which a draft takes as they are at the root."""
    state, drafter = state_of(name, rows=rows), programs(name, rows)[1]
    assert texts(state) == plain(rows)
    whole, rest = divmod(NEW - 1, drafter.depth + 1)
    for emitted in np.asarray(state.emitted):
        assert emitted[-1] == whole and emitted.sum() == whole + (rest > 0)


def test_the_first_layer_drafts():
    state = state_of("first layer")
    assert texts(state) == plain((0, 1, 2))
    assert np.asarray(state.emitted)[:, 1:].sum() > 5


# Shapes over a model that is a table: the logits after a token are its row.

TABLE = np.random.default_rng(2).normal(size=(5, 5), scale=1.2).astype(np.float32)
ROWS = 20_000


def viewed(rows, table=TABLE, last=0, length=3, **settings):
    history = jnp.zeros((rows, 8), jnp.int32)
    settings = {name: jnp.asarray(np.broadcast_to(value, rows), jnp.int32 if name == "top_k" else jnp.float32)
                for name, value in settings.items()}
    state = loop.State(
        caching.Cache((), jnp.full(rows, length, jnp.int32)), jnp.full(rows, last, jnp.int32), history, None,
        jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), None, None, jnp.ones(rows, bool))
    return View(history, state, loop.Request(jax.random.split(jax.random.key(0), rows), state.count, state.count[:1],
                                             Settings(**settings), None, None), None)


def grown(shape, view, table=TABLE):
    """(tree, how many times the model was run beside the root)."""
    table = jnp.asarray(table)

    @tiny.jit
    def run(view):
        return grow.grow(shape, view, table[view.state.last], jnp.int32(0),
                         lambda calls, fringe, tokens, depth: (calls + 1, table[tokens]))
    return run(view)


def softmax(logits):
    weights = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def shares(*columns):
    """How often each combination of tokens stands in these columns."""
    counts = np.zeros((5,) * len(columns))
    np.add.at(counts, tuple(np.asarray(column) for column in columns), 1)
    return counts / counts.sum()


def check_shares(got, right, rows=ROWS):
    """Within five standard errors, every one of them."""
    np.testing.assert_array_less(np.abs(got - right), 5 * np.sqrt(right * (1 - right) / rows) + 1e-9)


def test_independent_children_are_drawn_as_stated():
    heat, shape = 0.7, Static(trees.branching(2, 1), "independent")
    tree, _ = grown(shape, viewed(ROWS, temperature=heat, top_k=3))
    tokens = np.asarray(tree.tokens)
    logits = TABLE / heat
    logits = np.where(logits >= np.sort(logits, axis=1)[:, 2:3], logits, -np.inf)
    q = softmax(logits)
    check_shares(shares(tokens[:, 1], tokens[:, 2]), q[0][:, None] * q[0][None])
    check_shares(shares(tokens[:, 1], tokens[:, 3]), q[0][:, None] * q)
    check_shares(shares(tokens[:, 3], tokens[:, 4]),  # parents' tokens are independent, so are their children
                 (q[0] @ q)[:, None] * (q[0] @ q)[None])
    for node in range(3):
        np.testing.assert_allclose(softmax(np.asarray(tree.logits)[:, node]), q[tokens[:, node]], atol=1e-5)
    np.testing.assert_array_equal(tree.parents[0], [-1, 0, 0, 1, 2])


def without_replacement(q):
    """Chances of every ordered pair."""
    pairs = q[:, None] * q[None] / (1 - q[:, None])
    return pairs * (1 - np.eye(len(q)))


@pytest.mark.parametrize("shape", [Static(trees.branching(2, 1), "distinct"), StochasticBeam(2, 1)], ids=["static", "beam"])
def test_distinct_children_are_drawn_as_stated(shape):
    tree, _ = grown(shape, viewed(ROWS, temperature=0.7))
    tokens, q = np.asarray(tree.tokens), softmax(TABLE / 0.7)
    check_shares(shares(tokens[:, 1], tokens[:, 2]), without_replacement(q[0]))
    np.testing.assert_allclose(softmax(np.asarray(tree.logits)[:, 0]), q[tokens[:, 0]], atol=1e-5)
    if shape.depth > 1:
        check_shares(shares(tokens[:, 2], tokens[:, 4]), without_replacement(q[0]).sum(axis=0)[:, None] * q)


@pytest.mark.parametrize("shape", [Static(trees.branching(3, 2), draws) for draws in ("independent", "distinct")]
                         + [StochasticBeam(3, 2)], ids=["independent", "distinct", "beam"])
def test_greedy_rows_draw_one_child_for_certain(shape):
    tree, _ = grown(shape, viewed(3, temperature=[0.0, 1.0, 0.0], top_k=[2, 5, 1]))
    best = np.argmax(TABLE, axis=1)
    for row in (0, 2):
        valid = np.flatnonzero(np.asarray(tree.parents)[row] >= 0)
        assert np.asarray(tree.tokens)[row, valid].tolist() == [best[0], best[best[0]]]
        np.testing.assert_array_equal(tree.logits[row, 0], np.where(np.arange(5) == best[0], 0, -np.inf))
    assert np.sum(np.asarray(tree.parents)[1] >= 0) > 2


def test_a_stochastic_beam_draws_whole_continuations_without_replacement():
    tree, _ = grown(StochasticBeam(2, 3), viewed(ROWS, TABLE[:3, :3], temperature=1.0), TABLE[:3, :3])
    tokens, parents = np.asarray(tree.tokens), np.asarray(tree.parents)
    q, every = softmax(TABLE[:3, :3]), list(itertools.product(range(3), repeat=3))
    chances = np.array([q[0, a] * q[a, b] * q[b, c] for a, b, c in every])
    rows, drawn = np.arange(ROWS), []
    for leaf in (5, 6):
        above = parents[rows, leaf]
        drawn.append(tokens[rows, parents[rows, above]] * 9 + tokens[rows, above] * 3 + tokens[rows, leaf])
    pairs = np.zeros((27, 27))
    np.add.at(pairs, tuple(drawn), 1 / ROWS)
    check_shares(pairs, without_replacement(chances))
    np.testing.assert_allclose(softmax(np.asarray(tree.logits)[:, 3]), q[tokens[:, 3]], atol=1e-5)


def test_children_under_the_targets_noise_are_its_likeliest_choices():
    view = viewed(4, temperature=[0.0, 0.5, 1.0, 2.0])
    tree, _ = grown(Static(trees.branching(2, 2)), view)
    for row, heat in enumerate([0.0, 0.5, 1.0, 2.0]):
        for node, children, position in ((0, [1, 2], 4), (1, [3, 4], 5), (2, [5, 6], 5)):
            gumbel = jax.random.gumbel(jax.random.fold_in(view.request.keys[row], position), (5,))
            sums = TABLE[int(tree.tokens[row, node])] / (heat or 1.0) + np.asarray(gumbel) * (heat > 0)
            assert np.asarray(tree.tokens)[row, children].tolist() == np.argsort(-sums)[:2].tolist()
    assert tree.logits is None


def test_filtered_tokens_are_no_children():
    tree, _ = grown(Static(trees.branching(3, 1)), viewed(1, temperature=1.0, top_k=2))
    np.testing.assert_array_equal(tree.parents[0], [-1, 0, 0, -1, 1, 2, -1])


def test_rows_that_are_done_get_no_nodes():
    view = viewed(2)
    view = view.replace(state=view.state.replace(done=jnp.array([True, False])))
    for shape in (Static(trees.chain(2)), Dynamic(3, 2, 2, 2)):
        tree, _ = grown(shape, view)
        assert np.asarray(tree.valid()).sum(axis=1).tolist() == [1, 3]


def confident(*chances):
    """A table in which token i is followed by token i + 1 with these probabilities, and all others share the rest."""
    size = len(chances) + 1
    table = np.zeros((size, size), np.float32)
    for token, chance in enumerate(chances):
        table[token] = np.log((1 - chance) / (size - 1))
        table[token, token + 1] = np.log(chance)
    return table


@pytest.mark.parametrize("threshold, drafted, calls", [(0.3, 3, 2), (0.05, 1, 0), (0.65, 4, 3), (1.0, 5, 4)])
def test_an_unsure_chain_stops(threshold, drafted, calls):
    """Products are .9, .72, .36, .324: 1 - .72 is below .3, 1 - .36 is not. Levels that nobody needs are not run."""
    table = confident(0.9, 0.8, 0.5, 0.9, 0.9)
    tree, ran = grown(Static(trees.chain(5), threshold=threshold), viewed(2), table)
    assert (np.asarray(tree.parents) >= 0).sum(axis=1).tolist() == [drafted] * 2 and ran == calls
    assert np.asarray(tree.tokens)[0, :drafted + 1].tolist() == list(range(drafted + 1))


@pytest.mark.parametrize("heat", [0.0, 1.5])
def test_a_dynamic_tree_keeps_the_best_products(heat):
    width, children, depth, nodes = 2, 3, 3, 7
    view = viewed(3, temperature=heat)
    tree, _ = grown(Dynamic(nodes, width, children, depth), view)
    for row in range(3):
        level, every = [(1.0, (0,))], []
        for step in range(depth):
            gumbel = np.asarray(jax.random.gumbel(jax.random.fold_in(view.request.keys[row], 4 + step), (5,)))
            found = []
            for product, path in level:
                p = softmax(TABLE[path[-1]] + heat * gumbel)
                found += [(product * p[token], (*path, token)) for token in np.argsort(-p)[:children]]
            every += found
            level = sorted(found, reverse=True)[:width]
        best = sorted(every, reverse=True)[:nodes - 1]
        np.testing.assert_allclose(tree.scores[row], [1.0] + [product for product, _ in best], rtol=1e-4)
        for node, (_, path) in enumerate(best, 1):
            got = [node]
            while got[-1]:
                got.append(int(tree.parents[row, got[-1]]))
            assert tuple(int(tree.tokens[row, i]) for i in reversed(got)) == path


# What was run is found again by its tokens.

def test_accepted_tokens_are_followed_through_all_twins():
    """Slots 0 and 1 are twins, and the second one's child is the next accepted token; the token after it was not run."""
    tokens = jnp.array([[7, 7, 5, 6]] * 3)
    scratch = Scratch(tokens, jnp.array([[1, 1, 2, 2]] * 3), jnp.array([[-1, -1, 0, 1]] * 3), None)
    walk = Walk(jnp.zeros((3, 4), jnp.int32), jnp.array([[7, 6, 3, 1], [7, 5, 6, 1], [6, 6, 6, 6]]), jnp.array([4, 2, 4]))
    path, count = scratch.follow(walk)
    np.testing.assert_array_equal(count, [2, 1, 0])
    np.testing.assert_array_equal(path[0, :2], [0, 3])
    assert path[1, 0] == 0
    np.testing.assert_array_equal(scratch.clear().follow(walk)[1], [0, 0, 0])


# Mistakes.

def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'sorted'"):
        Static(trees.chain(2), "sorted")
    with pytest.raises(ValueError, match="root alone"):
        Static(trees.chain(0))
    with pytest.raises(ValueError, match="1.5"):
        Static(trees.chain(2), threshold=1.5)
    with pytest.raises(ValueError, match="got 0 and 2"):
        StochasticBeam(0, 2)
    with pytest.raises(ValueError, match="2 to 10 nodes, got 11"):
        Dynamic(11, 2, 3, 2)
    with pytest.raises(ValueError, match="at least 1, got 2, 0, 3"):
        Dynamic(4, 2, 0, 3)
    with pytest.raises(ValueError, match="'big'"):
        draft_model(target(), "big")
    with pytest.raises(ValueError, match="1 to 2, the target's, got 4"):
        first_layers(target(), 4)


@pytest.mark.parametrize("drafter", [
    lambda lm: draft_model(lm), lambda lm: FirstLayers(lm.config, 1, Static(grow.CHAIN))], ids=["model", "layers"])
def test_another_vocabulary_is_refused(drafter):
    cfg = dataclasses.replace(TARGET, embedding=config.Embedding(23))
    other = Model(cfg, tiny.weights(model.spec(cfg)))
    with pytest.raises(ValueError, match="23 tokens, the target one of 19"):
        generate(target(), [[1, 2]], 4, drafter=drafter(other))


def test_a_template_or_a_number_of_nodes_is_a_shape():
    assert draft_model(target(), trees.chain(3)).shape == Static(trees.chain(3))
    assert draft_model(target(), 12).shape == Dynamic(12)
    assert first_layers(target(), 1, SHAPES["beam"]).shape is SHAPES["beam"]

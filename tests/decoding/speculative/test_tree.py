"""Trees against loops over their nodes, builders against trees counted out one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.tree import Template, Tree

FALLING = st.lists(st.floats(0.05, 0.9), min_size=1, max_size=4).map(lambda level: sorted(level, reverse=True))


@st.composite
def parents(draw, most=12):
    nodes = draw(st.integers(1, most))
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes)))


def above(parents, node):
    """The node and everything over it."""
    on = [node]
    while parents[on[-1]] >= 0:
        on.append(parents[on[-1]])
    return on


def all_templates(nodes):
    """Every tree of so many nodes, as parents."""
    return itertools.product(*[[-1]] + [range(node) for node in range(1, nodes)])


class TestTemplate:
    @given(parents())
    def test_depths_ranks_levels(self, given):
        template = Template(given)
        assert template.depths.tolist() == [len(above(given, node)) - 1 for node in range(len(given))]
        assert template.ranks.tolist() == [0] + [given[:node].count(given[node]) for node in range(1, len(given))]
        assert template.width == max([given.count(node) for node in range(len(given))])
        assert sorted(np.concatenate(template.levels).tolist()) == list(range(len(given)))

    @given(parents())
    def test_sorted_is_the_same_tree_level_by_level(self, given):
        def spelled(template):
            return sorted(tuple(template.ranks[above(template.parents, node)][::-1]) for node in range(template.nodes))
        ordered = Template(given).sorted()
        assert list(ordered.depths) == sorted(ordered.depths)
        assert spelled(ordered) == spelled(Template(given))

    @pytest.mark.parametrize(("given", "says"), [
        ((), "node 0"), ((0,), "node 0"), ((-1, 1), "node 1 has parent 1"), ((-1, 0, 3, 0), "node 2 has parent 3"),
        ((-1, 0, -1), "node 2 has parent -1")])
    def test_refuses(self, given, says):
        with pytest.raises(ValueError, match=says):
            Template(given)


class TestBuilders:
    def test_shapes(self):
        assert trees.chain(0).parents == (-1,)
        assert trees.branching(2, 2).parents == (-1, 0, 0, 1, 1, 2, 2)
        assert trees.chains(2, 3).parents == (-1, 0, 0, 1, 2, 3, 4)

    @given(st.lists(FALLING, min_size=1, max_size=3), st.integers(1, 6))
    def test_best_is_best_of_all(self, accuracies, nodes):
        """Against every tree of so many nodes; a rank that has no accuracy is worth nothing."""
        values = [trees.expected(Template(given), accuracies) for given in all_templates(nodes)]
        found = trees.best(accuracies, nodes)
        assert found.nodes == nodes
        assert trees.expected(found, accuracies) == pytest.approx(max(values))

    @given(FALLING, st.integers(1, 6), st.integers(1, 4))
    def test_sequoia_is_best_of_its_depth(self, accuracies, nodes, depth):
        fitting = [template for template in map(Template, all_templates(nodes))
                   if template.depth <= depth and template.width <= len(accuracies)]
        if not fitting:
            with pytest.raises(ValueError, match=f"no tree of {nodes} nodes"):
                trees.sequoia(accuracies, nodes, depth)
            return
        found = trees.sequoia(accuracies, nodes, depth)
        assert found.nodes == nodes and found.depth <= depth
        assert trees.expected(found, [accuracies]) == pytest.approx(max(trees.expected(one, [accuracies]) for one in fitting))

    def test_sequoia_is_best_without_a_limit_too(self):
        accuracies = [0.6, 0.2, 0.1, 0.05]
        assert (trees.expected(trees.sequoia(accuracies, 24, 23), [accuracies])
                == pytest.approx(trees.expected(trees.best([accuracies], 24), [accuracies])))

    def test_expected_is_the_chain_formula(self):
        assert trees.expected(trees.chain(5), [[0.7]]) == pytest.approx((1 - 0.7**6) / (1 - 0.7))

    @pytest.mark.parametrize(("build", "says"), [
        (lambda: trees.chain(-1), "0 or more"), (lambda: trees.branching(2, 0), "at least one child"),
        (lambda: trees.best([[0.1, 0.2]], 3), "do not increase"), (lambda: trees.best([[1.5]], 3), "probabilities"),
        (lambda: trees.best([[0.0]], 2), "tree of 1 nodes at most, 2"), (lambda: trees.best([[0.5]], 0), "at least one node")])
    def test_refuses(self, build, says):
        with pytest.raises(ValueError, match=says):
            build()


@jax.jit
def look(shape):
    tree = Tree(jnp.zeros_like(shape), shape, 11, 1)
    return tree.ancestors(), tree.depths(), tree.valid()


class TestTree:
    @given(parents(), st.integers(0, 3))
    def test_ancestors_and_depths(self, given, none):
        """A node that is none is nobody's ancestor and has only itself."""
        cut = list(given) + [-1] * (12 - len(given))
        for node in range(1, 12):
            if node <= none or (cut[node] > 0 and cut[cut[node]] < 0):  # whatever hangs below a cut node is cut too
                cut[node] = -1
        on, depths, valid = look(jnp.asarray([cut]))
        assert [set(np.flatnonzero(row)) for row in np.asarray(on)[0]] == [set(above(cut, node)) for node in range(12)]
        assert depths[0].tolist() == [len(above(cut, node)) - 1 for node in range(12)]
        assert valid[0].tolist() == [node == 0 or parent >= 0 for node, parent in enumerate(cut)]

    def test_child_is_the_first_with_the_token(self):
        tree = Tree(jnp.asarray([[9, 5, 7, 5, 5], [9, 1, 2, 3, 4]]), jnp.asarray([[-1, 0, 0, 0, 2], [-1, 0, -1, 1, 0]]), 2, 3)
        assert tree.child(jnp.asarray([0, 0]), jnp.asarray([5, 4])).tolist() == [1, 4]
        assert tree.child(jnp.asarray([2, 1]), jnp.asarray([5, 3])).tolist() == [4, 3]
        assert tree.child(jnp.asarray([0, 0]), jnp.asarray([9, 2])).tolist() == [-1, -1]  # the root is no child, nor is none

    def test_a_missing_node_takes_its_descendants(self):
        valid = jnp.asarray([[True, False, True, True, True]])
        planted = trees.plant(trees.branching(2, 1), jnp.zeros((1, 5), jnp.int32), valid)
        assert planted.parents.tolist() == [[-1, -1, 0, -1, 2]]

    def test_prefix(self):
        whole = trees.plant(trees.branching(2, 1), jnp.arange(5)[None], scores=jnp.ones((1, 5)))
        part = whole.prefix(3)
        assert (part.tokens.tolist(), part.parents.tolist(), part.scores.shape) == ([[0, 1, 2]], [[-1, 0, 0]], (1, 3))


def spelled(tree, row):
    """{tokens from the root: the row's own index} of every node that is one; each path only once."""
    parents = np.broadcast_to(np.asarray(tree.parents), tree.tokens.shape)[row]
    tokens, found = np.asarray(tree.tokens)[row], {}
    for node in range(tree.nodes):
        if node == 0 or parents[node] >= 0:
            path = tuple(int(tokens[one]) for one in above(parents, node)[::-1])
            assert path not in found, "two nodes spell the same"
            found[path] = node
    return found


@st.composite
def drafts(draw, rows=2, nodes=10):
    shapes = [draw(parents(nodes)) for _ in range(rows)]
    shapes = [shape + (-1,) * (nodes - len(shape)) for shape in shapes]
    tokens = draw(st.lists(st.lists(st.integers(0, 2), min_size=nodes, max_size=nodes), min_size=rows, max_size=rows))
    kinds = np.arange(rows * nodes).reshape(rows, nodes, 1)
    return Tree(jnp.asarray(tokens), jnp.asarray(shapes), nodes - 1, nodes - 1, kinds=jnp.asarray(kinds, jnp.int32))


def paths(tree, row):
    """The same of a tree that may spell a path more than once: all its nodes."""
    parents, tokens, found = np.asarray(tree.parents)[row], np.asarray(tree.tokens)[row], {}
    for node in range(tree.nodes):
        if node == 0 or parents[node] >= 0:
            found.setdefault(tuple(int(tokens[one]) for one in above(parents, node)[::-1]), []).append(node)
    return found


merge = jax.jit(trees.merge)
prune = jax.jit(trees.prune, static_argnames="nodes")


class TestMerge:
    @given(drafts())
    def test_every_path_once(self, tree):
        merged = merge(tree)
        for row in range(2):
            before, after = paths(tree, row), spelled(merged, row)
            assert set(after) == set(before)
            for path, node in after.items():
                assert node == before[path][0]
                assert int(merged.kinds[row, node, 0]) == max(int(tree.kinds[row, one, 0]) for one in before[path])


class TestPrune:
    @given(drafts(), st.sampled_from([2, 5, 9]), st.integers(0, 2**31))
    def test_keeps_the_largest_products(self, tree, nodes, seed):
        merged = merge(tree)
        shares = np.random.default_rng(seed).uniform(0.1, 1.0, tree.tokens.shape).astype(np.float32)
        pruned = prune(merged, jnp.asarray(shares), nodes=nodes)
        for row in range(2):
            values = {path: np.prod([shares[row, one] for one in above(np.asarray(merged.parents)[row], node)[:-1]])
                      for path, node in spelled(merged, row).items()}
            kept = spelled(pruned, row)
            best = sorted(values.values(), reverse=True)[:nodes]
            assert sorted((values[path] for path in kept), reverse=True) == pytest.approx(best, rel=1e-4)
            scores = np.asarray(pruned.scores)[row]
            assert [scores[node] for node in kept.values()] == pytest.approx([values[path] for path in kept], rel=1e-4)
            assert np.all(np.diff(scores) <= 0)
            order = np.asarray(pruned.parents)[row]
            assert np.all(order < np.arange(nodes))

    def test_equal_shares_keep_parents_before_children(self):
        tree = trees.plant(trees.chain(6), jnp.arange(7)[None])
        assert trees.prune(tree, jnp.ones((1, 7)), 4).parents.tolist() == [[-1, 0, 1, 2]]

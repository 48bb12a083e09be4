"""Token trees: what a drafter proposes and a target verifies in one call.

Node 0 is the last committed token, whose keys and values the call computes anyway; every other node proposes a token to follow
its parent. A chain is a tree, and plain decoding is the tree of one node. Shapes are static: a `Template` is built offline in
NumPy, and a tree whose parents are chosen at run time has a fixed number of nodes, some of which may be none.
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True)
class Template:
    """The shape of a tree, known before anything runs.

    Attributes:
      parents: of every node; -1 for node 0, the root, and for no other. Parents come before their children.

    Raises:
      ValueError: when the first node is not a root, or a parent does not come before its child; names the node.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"node 0 is the root and has parent -1, got parents {self.parents[:4]}")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}: a parent comes before its child, so 0 to {node - 1}")

    @property
    def nodes(self) -> int:
        """P, the root among them."""
        return len(self.parents)

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """int [P], edges between each node and the root."""
        depths = np.zeros(self.nodes, np.int32)
        for node, parent in enumerate(self.parents[1:], 1):
            depths[node] = depths[parent] + 1
        return depths

    @property
    def depth(self) -> int:
        """D, edges of the longest path."""
        return int(self.depths.max())

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """int [P], how many earlier siblings each node has; 0 for the root."""
        seen: dict[int, int] = {}
        ranks = np.zeros(self.nodes, np.int32)
        for node, parent in enumerate(self.parents[1:], 1):
            ranks[node] = seen.get(parent, 0)
            seen[parent] = ranks[node] + 1
        return ranks

    @property
    def width(self) -> int:
        """The most children of a node; 0 for a root alone."""
        return int(self.ranks.max()) + 1 if self.nodes > 1 else 0

    @functools.cached_property
    def levels(self) -> tuple[np.ndarray, ...]:
        """The nodes of depth 0, 1, ... D."""
        return tuple(np.flatnonzero(self.depths == depth) for depth in range(self.depth + 1))

    def sorted(self) -> "Template":
        """The same tree with its nodes level by level."""
        order = np.argsort(self.depths, kind="stable")
        place = np.argsort(order)
        return Template(tuple(-1 if node == 0 else int(place[self.parents[node]]) for node in order))


def chain(length: int) -> Template:
    """`length` drafted tokens in a row.

    Example:
      >>> chain(3).parents
      (-1, 0, 1, 2)
    """
    if length < 0:
        raise ValueError(f"a chain has 0 or more drafted tokens, got {length}")
    return Template(tuple(range(-1, length)))


def branching(*children: int) -> Template:
    """A k-ary tree: every node of depth d has children[d] children.

    Example:
      >>> branching(2, 1).parents
      (-1, 0, 0, 1, 2)
    """
    if any(count < 1 for count in children):
        raise ValueError(f"every level needs at least one child per node, got {children}")
    parents, level = [-1], [0]
    for count in children:
        below = []
        for node in level:
            for _ in range(count):
                below.append(len(parents))
                parents.append(node)
        level = below
    return Template(tuple(parents)).sorted()


def chains(count: int, length: int) -> Template:
    """`count` chains that share nothing but the root."""
    return branching(count, *[1] * (length - 1))


def best(accuracies: Sequence[Sequence[float]], nodes: int) -> Template:
    """The tree of `nodes` nodes, the root among them, that accepts most: those with the largest products along their paths.

    Args:
      accuracies: accuracies[d][r] is the probability that the child of rank r (0 the likeliest) of an accepted node of depth d
        is accepted; not increasing in r. The last level serves all deeper ones.

    Raises:
      ValueError: for probabilities outside 0 to 1 or that increase with rank, or when too few are positive.

    Example:
      >>> best([[0.6, 0.3]], 5).parents
      (-1, 0, 0, 1, 3)
    """
    for level in accuracies:
        if not len(level) or not all(0 <= p <= 1 for p in level) or any(b > a for a, b in zip(level, level[1:], strict=False)):
            raise ValueError(f"accuracies must be probabilities that do not increase with rank, got {level}")
    if nodes < 1:
        raise ValueError(f"a tree has at least one node, got {nodes}")
    parents: list[int] = []
    waiting: list[tuple[float, int, int, int, int]] = [(-1.0, 0, -1, 0, 0)]  # -product, order, parent, depth, rank
    order = 1
    while len(parents) < nodes and waiting and waiting[0][0] < 0:
        product, _, parent, depth, rank = heapq.heappop(waiting)
        node = len(parents)
        parents.append(parent)
        here = accuracies[min(depth, len(accuracies) - 1)]
        heapq.heappush(waiting, (product * here[0], order, node, depth + 1, 0))
        above = accuracies[min(depth - 1, len(accuracies) - 1)]
        if node and rank + 1 < len(above):
            sibling = product / above[rank] * above[rank + 1]
            heapq.heappush(waiting, (sibling, order + 1, parent, depth, rank + 1))
        order += 2
    if len(parents) < nodes:
        raise ValueError(f"these accuracies make a tree of {len(parents)} nodes at most, {nodes} were asked for")
    return Template(tuple(parents)).sorted()


def sequoia(accuracies: Sequence[float], nodes: int, depth: int) -> Template:
    """The best tree of `nodes` nodes and at most `depth` edges when acceptance depends on rank alone, by dynamic programming.

    Args:
      accuracies: accuracies[r] is the probability that a node's child of rank r is accepted.

    Raises:
      ValueError: when no tree has so many nodes under this depth and rank.

    Reference: Chen et al. 2024, section 3.1, https://arxiv.org/abs/2402.12374
    """
    # value[d, m, b]: most expected tokens of a tree of m nodes, its root among them, at most d edges deep and whose root has
    # just b children; split[d, m, b]: nodes of the last child's tree where that is reached.
    most = len(accuracies)
    value = np.full((depth + 1, nodes + 1, most + 1), -np.inf)
    split = np.zeros((depth + 1, nodes + 1, most + 1), int)
    value[:, 1, 0] = 1.0
    for d in range(1, depth + 1):
        below = value[d - 1].max(axis=1)
        for m in range(2, nodes + 1):
            for b in range(1, min(most, m - 1) + 1):
                sizes = np.arange(1, m)
                options = value[d, m - sizes, b - 1] + accuracies[b - 1] * below[sizes]
                at = int(np.argmax(options))
                value[d, m, b], split[d, m, b] = options[at], sizes[at]
    if not np.isfinite(value[depth, nodes].max()):
        raise ValueError(f"no tree of {nodes} nodes has at most {depth} edges on a path and {most} children at a node")
    parents = [-1]

    def grow(node: int, d: int, m: int) -> None:
        b, sizes = int(np.argmax(value[d, m])), []
        while b:
            sizes.append(int(split[d, m, b]))
            m, b = m - sizes[-1], b - 1
        for size in reversed(sizes):  # the child of rank 0 was split off last
            parents.append(node)
            grow(len(parents) - 1, d - 1, size)

    grow(0, depth, nodes)
    return Template(tuple(parents)).sorted()


def expected(template: Template, accuracies: Sequence[Sequence[float]]) -> float:
    """Mean tokens per call: one and the probability of every drafted node to be accepted.

    Args:
      accuracies: as for `best`.

    Example:
      >>> expected(chain(2), [[0.5]])
      1.75
    """
    products = np.ones(template.nodes)
    for node, parent in enumerate(template.parents[1:], 1):
        level = accuracies[min(template.depths[parent], len(accuracies) - 1)]
        rank = template.ranks[node]
        products[node] = products[parent] * (level[rank] if rank < len(level) else 0.0)
    return float(products.sum())


@flax.struct.dataclass
class Tree:
    """Drafted tokens of every row.

    Attributes:
      tokens: int32 [B, P], node 0 the last committed token.
      parents: int32 [B or 1, P], -1 for node 0 and for nodes that are none. Parents come before their children.
      depth: D, edges that a path has at most.
      width: children that a node has at most.
      logits: float32 [B, P, V] or None: each node's children were drawn from their softmax (-inf: never), junk for leaves.
      kinds: int32 [B, P, n] or None: which of its classes a drafter counts each node in, -1 for none.
      scores: float32 [B, P] or None: estimated probability of each node to be accepted; nodes are sorted by it, so that the
        first n nodes are the best tree of n.
    """

    tokens: Int[Array, "B P"]
    parents: Int[Array, "B P"]
    depth: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)
    logits: Float[Array, "B P V"] | None = None
    kinds: Int[Array, "B P n"] | None = None
    scores: Float[Array, "B P"] | None = None

    @property
    def nodes(self) -> int:
        """P, the root among them."""
        return self.tokens.shape[1]

    def valid(self) -> Bool[Array, "B P"]:
        """The root and the nodes that are some."""
        return (self.parents >= 0) | (jnp.arange(self.nodes) == 0)[None]

    def depths(self) -> Int[Array, "B P"]:
        """Edges between each node and the root."""
        return jnp.sum(self.ancestors(), axis=-1, dtype=jnp.int32) - 1

    def ancestors(self) -> Bool[Array, "B P P"]:
        """Which nodes stand on each node's path from the root, itself among them: whom it may attend to."""
        index = jnp.arange(self.nodes, dtype=jnp.int32)
        up, on = self.parents, jnp.broadcast_to(jnp.eye(self.nodes, dtype=bool)[None], (*self.parents.shape, self.nodes))
        for _ in range(min(self.depth, self.nodes - 1)):
            on = on | (up[:, :, None] == index[None, None, :])
            up = jnp.where(up >= 0, jnp.take_along_axis(self.parents, jnp.maximum(up, 0), axis=1), -1)
        return on

    def child(self, node: Int[Array, "B"], token: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first child of each row's node that carries the token; -1 where there is none."""
        found = (self.parents == node[:, None]) & (self.tokens == token[:, None])
        first = jnp.min(jnp.where(found, jnp.arange(self.nodes, dtype=jnp.int32)[None], self.nodes), axis=1)
        return jnp.where(first < self.nodes, first, -1)

    def prefix(self, nodes: int) -> "Tree":
        """The first nodes alone."""
        def cut(leaf: Array | None) -> Array | None:
            return None if leaf is None else leaf[:, :nodes]
        return self.replace(tokens=cut(self.tokens), parents=cut(self.parents), logits=cut(self.logits),
                            kinds=cut(self.kinds), scores=cut(self.scores), depth=min(self.depth, nodes - 1))


def plant(template: Template, tokens: Int[Array, "B P"], valid: Bool[Array, "B P"] | None = None, **fields: Array) -> Tree:
    """A tree of a template's shape. A node that is none takes its descendants with it."""
    parents = jnp.asarray(template.parents, jnp.int32)[None]
    if valid is not None:
        valid = valid.at[:, 0].set(True)
        for level in template.levels[1:]:
            above = np.asarray(template.parents)[level]
            valid = valid.at[:, level].set(valid[:, level] & valid[:, above])
        parents = jnp.where(valid, parents, -1)
    return Tree(tokens, parents, template.depth, template.width, **fields)


def mixed(number: UInt32[Array, "..."], tokens: Int[Array, "..."]) -> UInt32[Array, "..."]:
    """The number of a sequence of tokens with one more at its end: very likely no other sequence's."""
    word = (tokens.astype(jnp.uint32) + 1) * jnp.uint32(2654435761)
    number = (number ^ (number >> 15)) * jnp.uint32(2246822519) + word
    return number ^ (number >> 13)


def _paths(tokens: Int[Array, "B P"], parents: Int[Array, "B P"], depth: int) -> UInt32[Array, "B P"]:
    """A number for every node that is the same for equal sequences of tokens from the root, and very likely for no others."""
    number = jnp.where(parents >= 0, jnp.uint32(0), jnp.uint32(97))
    for _ in range(depth):
        above = jnp.take_along_axis(number, jnp.maximum(parents, 0), axis=1)
        number = jnp.where(parents >= 0, mixed(above, tokens), number)
    return number


def merge(tree: Tree) -> Tree:
    """Makes one node of those that spell the same tokens from the root: the first stays, in every class that any was in.

    What is merged away is none. Two paths are taken for the same by a hash: where that errs, a draft is lost, nothing else.
    """
    index = jnp.arange(tree.nodes, dtype=jnp.int32)
    number, valid = _paths(tree.tokens, tree.parents, tree.depth), tree.valid()
    same = (number[:, :, None] == number[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    first = jnp.min(jnp.where(same, index[None, None, :], tree.nodes), axis=2)
    first = jnp.where(valid, first, index[None])
    above = jnp.take_along_axis(first, jnp.maximum(tree.parents, 0), axis=1)
    parents = jnp.where((tree.parents >= 0) & (first == index[None]), above, -1)
    kinds = tree.kinds
    if kinds is not None:
        kinds = jnp.max(jnp.where(same[..., None], kinds[:, None, :, :], -1), axis=2)
    return tree.replace(parents=parents, kinds=kinds)


def prune(tree: Tree, shares: Float[Array, "B P"], nodes: int) -> Tree:
    """The `nodes` nodes with the largest products of shares along their paths, sorted by them.

    Args:
      shares: probability of each node to be accepted where its parent is; at most 1.

    Raises:
      ValueError: when the tree has fewer nodes.
    """
    if nodes > tree.nodes:
        raise ValueError(f"a tree of {nodes} nodes was asked for, there are candidates for {tree.nodes} only")
    valid = tree.valid()
    products = jnp.where(valid, 1.0, 0.0)
    for _ in range(tree.depth):
        above = jnp.take_along_axis(products, jnp.maximum(tree.parents, 0), axis=1)
        products = jnp.where(tree.parents >= 0, above * shares, products)
    products = products.at[:, 0].set(2.0)  # before every other
    scores, keep = jax.lax.top_k(products, nodes)  # among equals the first, so parents come before children
    scores = scores.at[:, 0].set(1.0)

    def pick(leaf: Array) -> Array:
        leaf = jnp.broadcast_to(leaf, (tree.tokens.shape[0], *leaf.shape[1:]))
        return jnp.take_along_axis(leaf, keep.reshape(*keep.shape, *[1] * (leaf.ndim - 2)), axis=1)

    above = pick(tree.parents)
    found = above[:, :, None] == keep[:, None, :]
    parents = jnp.where(jnp.any(found, axis=2), jnp.argmax(found, axis=2).astype(jnp.int32), -1)
    parents = jnp.where((above >= 0) & (scores > 0), parents, -1)
    return Tree(pick(tree.tokens), parents, min(tree.depth, nodes - 1), tree.width,
                None if tree.logits is None else pick(tree.logits), None if tree.kinds is None else pick(tree.kinds), scores)

"""Trees grown by a model, level by level: which nodes get children and which tokens these are. Where logits come from is the
drafter's affair.

A `Shape` turns the logits after one level's nodes, the fringe, into the next level. Tables of node numbers are static, so that
all levels are one compiled loop body. Drawn children are keyed by the row's key, the absolute position of the token and a node
number, never by a step. The number tells the node's depth, so no two calls share a draw: rules that judge whole paths need it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm.decoding.logits import first_of_top, noise, penalise, restrict
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters.base import Drafter, View
from jaxlm.decoding.speculative.drafters.recycling import likeliest
from jaxlm.decoding.speculative.tree import Template, Tree
from jaxlm.decoding.speculative.verify import Walk, subkeys

Draws = Literal["fixed", "independent", "distinct"]
_INDEPENDENT, _DISTINCT = 1, 2  # purposes of keys


@flax.struct.dataclass
class Fringe:
    """The nodes that get children next.

    Attributes:
      node: int32 [B, W], in the tree.
      slot: int32 [B, W], among the nodes that the model was run on; -1 for the root.
      above: int32 [B, W], the parent's slot.
      valid: bool [B, W]; the rest is junk.
      score: float32 [B, W], logarithm of the model's confidence in the path.
      perturbed: float32 [B, W], the score with noise, of a stochastic beam search.
    """

    node: Int[Array, "B W"]
    slot: Int[Array, "B W"]
    above: Int[Array, "B W"]
    valid: Bool[Array, "B W"]
    score: Float[Array, "B W"]
    perturbed: Float[Array, "B W"]


@flax.struct.dataclass
class Grown:
    """A tree in the making; `shares` [B, P] are the model's confidences in each node where its parent is accepted."""

    tokens: Int[Array, "B P"]
    parents: Int[Array, "B P"]
    shares: Float[Array, "B P"]
    logits: Float[Array, "B P V"] | None


def processed(logits: Float[Array, "B n V"], view: View) -> Float[Array, "B n V"]:
    """The row's own bias, penalties, temperature and filters, as the target's logits get them; greedy rows: no filters.

    Penalties count the tokens before the root only.
    """
    batch, count, vocabulary = logits.shape

    def spread(leaf: Array) -> Array:
        return jnp.repeat(leaf, count, axis=0)

    settings = jax.tree.map(spread, view.request.settings)
    counts, prompted = jax.tree.map(spread, (view.state.counts, view.request.prompted))
    flat = penalise(logits.reshape(-1, vocabulary), settings, counts, prompted)
    if settings.temperature is not None:
        flat = jnp.where((settings.temperature > 0)[:, None], restrict(flat, settings), flat)
    return flat.reshape(logits.shape)


def _heat(view: View) -> Float[Array, "B 1 1"]:
    """Temperatures; 0 for greedy rows."""
    heat = view.request.settings.temperature
    return (jnp.zeros(view.length.shape, jnp.float32) if heat is None else heat)[:, None, None]


def sampled(logits: Float[Array, "B n V"], view: View) -> Float[Array, "B n V"]:
    """Logits of the distribution to draw from: greedy rows have all their mass on the likeliest token."""
    top = first_of_top(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape[:2])
    certain = jnp.where(jnp.arange(logits.shape[-1])[None, None] == top[..., None], 0.0, -jnp.inf)
    return jnp.where(_heat(view) > 0, logits, certain)


def _gumbel(view: View, depth: Int[Array, ""], kind: int, nodes: Int[Array, "B n"], vocabulary: int) -> Float[Array, "B n V"]:
    """Noise for tokens at the children's position, of its own for each node number."""
    def row(key: Array, nodes: Array) -> Array:
        return jax.vmap(lambda node: jax.random.gumbel(jax.random.fold_in(key, node), (vocabulary,), jnp.float32))(nodes)
    return jax.vmap(row)(subkeys(view.request.keys, view.length + depth + 1, kind), nodes)


def coupled(logits: Float[Array, "B n V"], view: View, depth: Int[Array, ""]) -> Float[Array, "B n V"]:
    """Logits with the very noise that the target will add; without for greedy rows."""
    if view.request.settings.temperature is None:
        return logits
    drawn = noise(view.request.keys, view.length + depth + 1, logits.shape[-1])[:, None]
    return logits + jnp.where(_heat(view) > 0, drawn, 0.0)


def _confidence(sums: Float[Array, "B n V"], view: View) -> Float[Array, "B n V"]:
    """Log-probabilities of being the target's choice, from `coupled` sums.

    The target's sums differ from these by the models' disagreement over the temperature. With a disagreement in logits of
    about one, whatever the temperature, the chances are softmax(temperature * sums); for greedy rows this is the model's own
    distribution.
    """
    heat = _heat(view)
    return jax.nn.log_softmax(jnp.where(heat > 0, heat, 1.0) * sums, axis=-1)


def _put(old: Array, nodes: Array, new: Array) -> Array:
    """Writes [B, n, ...] at node numbers [n] or [B, n]; numbers out of range are dropped."""
    rows = jnp.arange(old.shape[0])[:, None]
    nodes = jnp.broadcast_to(nodes if nodes.ndim == 2 else nodes[None], (old.shape[0], nodes.shape[-1]))
    return old.at[rows, nodes].set(new, mode="drop")


class Shape:
    """How a tree grows; subclasses are frozen dataclasses.

    Attributes:
      draws: see `Drafter.draws`.
      depth: D, at least 1.
      nodes: P of the tree proposed.
      width: W, most nodes of a fringe.
      room: nodes of the tree in the making.
      slots: int [D - 1, W], where the fringe of depth 1, 2, ... goes among the nodes that the model is run on; a number of
        `run` drops it.
      run: how many nodes the model is run on, beside the root.
    """

    draws: Draws
    depth: int
    nodes: int
    width: int
    room: int

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """A place of its own for every node of every fringe."""
        return np.arange((self.depth - 1) * self.width).reshape(self.depth - 1, self.width)

    @property
    def run(self) -> int:
        """All places."""
        return (self.depth - 1) * self.width

    @property
    def is_chain(self) -> bool:
        """Whether every fringe is one node, the child of the one before."""
        return False

    def expand(self, depth: Int[Array, ""], fringe: Fringe, logits: Float[Array, "B W V"], grown: Grown,
               view: View) -> tuple[Grown, Fringe]:
        """Gives the fringe of a depth its children, and says which of them get children next."""
        raise NotImplementedError

    def finish(self, grown: Grown) -> Tree:
        """The tree to propose."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Static(Shape):
    """A template, filled. A node of rank r gets its parent's r-th child.

    Attributes:
      template: chains, chains(k, n), branching(...) or any other; nodes are numbered level by level.
      draws: "fixed": the likeliest tokens, with temperature under the target's own noise. "independent": each child drawn from
        the model's distribution (SpecTr with `chains`). "distinct": drawn without replacement, in the order of the nodes
        (RSD-C with `branching`).
      threshold: a node gets no children once 1 - the product of confidences along its path exceeds it; 1 is off. Levels that
        no row needs are not run.

    Reference: the threshold is SpecDec++'s, Huang et al. 2024, section 3.1, https://arxiv.org/abs/2405.19715, with the model's
    own probabilities in place of a trained head's.
    """

    template: Template
    draws: Draws = "fixed"
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.draws not in ("fixed", "independent", "distinct"):
            raise ValueError(f'draws must be "fixed", "independent" or "distinct", got {self.draws!r}')
        if self.template.nodes < 2:
            raise ValueError("a model drafts at least one token, got a template of the root alone")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability, 0 to 1, got {self.threshold}")
        object.__setattr__(self, "template", self.template.sorted())

    @property
    def depth(self) -> int:
        """The template's."""
        return self.template.depth

    @property
    def nodes(self) -> int:
        """The template's."""
        return self.template.nodes

    room = nodes

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.template.width == 1

    @functools.cached_property
    def inner(self) -> tuple[np.ndarray, ...]:
        """The nodes of each depth below D that have children."""
        above = np.unique(self.template.parents)
        return tuple(level[np.isin(level, above)] for level in self.template.levels[:-1])

    @property
    def width(self) -> int:
        """The most nodes of one depth that have children."""
        return max(len(level) for level in self.inner)

    @property
    def run(self) -> int:
        """Nodes with children, but for the root."""
        return sum(len(level) for level in self.inner[1:])

    def _table(self, rows: list[Any], empty: int) -> np.ndarray:
        width = max(len(row) for row in rows)
        return np.array([[*row, *[empty] * (width - len(row))] for row in rows], np.int32)

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """Numbers in order, `run` where a fringe is narrower than the widest."""
        counts = np.cumsum([0, *(len(level) for level in self.inner[1:])])
        rows = [range(counts[i], counts[i + 1]) for i in range(self.depth - 1)]
        return self._table([*rows, range(self.width)], self.run)[:-1]

    @functools.cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For each depth: children's nodes, their parents' places in the fringe, their ranks; and the next fringe's places
        among them, -1 for none."""
        parents, levels = np.asarray(self.template.parents), self.template.levels[1:]
        place = [np.searchsorted(inner, parents[level]) for inner, level in zip(self.inner, levels, strict=True)]
        pick = [np.searchsorted(level, inner) for inner, level in zip(self.inner[1:], levels, strict=False)]
        ranks = [self.template.ranks[level] for level in levels]
        return (self._table(list(levels), self.nodes), self._table(place, 0), self._table(ranks, 0),
                self._table([*pick, [-1] * self.width], -1))

    def expand(self, depth: Int[Array, ""], fringe: Fringe, logits: Float[Array, "B W V"], grown: Grown,
               view: View) -> tuple[Grown, Fringe]:
        """One level of the template."""
        batch, _, vocabulary = logits.shape
        nodes, place, rank, pick = (jnp.asarray(table)[depth] for table in self.tables)
        logits = processed(logits, view)
        kept = grown.logits
        valid = fringe.valid[:, place] & (nodes < self.nodes)[None]
        if self.draws == "independent":
            drawn = sampled(logits, view)
            kept = _put(kept, jnp.where(fringe.valid, fringe.node, self.nodes), drawn)
            own = jnp.broadcast_to(nodes[None], (batch, nodes.shape[0]))
            sums = drawn[:, place] + _gumbel(view, depth, _INDEPENDENT, own, vocabulary)
            ids = first_of_top(sums.reshape(-1, vocabulary)).reshape(own.shape)
            valid = valid & ((rank == 0)[None] | (_heat(view)[..., 0] > 0))
        else:
            if self.draws == "distinct":
                drawn = sampled(logits, view)
                kept = _put(kept, jnp.where(fringe.valid, fringe.node, self.nodes), drawn)
                sums = drawn + _gumbel(view, depth, _DISTINCT, fringe.node, vocabulary)
            else:
                sums = logits = coupled(logits, view, depth)
            found = likeliest(sums, self.template.width)
            valid = valid & (found.logits[:, place, rank] > -jnp.inf)
            ids = jnp.where(valid, found.ids[:, place, rank], 0)
        score = fringe.score[:, place]
        if self.threshold < 1:
            sure = _confidence(logits, view) if self.draws == "fixed" else jax.nn.log_softmax(logits, axis=-1)
            score = score + jnp.take_along_axis(sure[:, place], ids[..., None], axis=2)[..., 0]
        above = jnp.where(valid, fringe.node[:, place], -1)
        grown = grown.replace(tokens=_put(grown.tokens, nodes, ids), parents=_put(grown.parents, nodes, above), logits=kept)
        on = (pick >= 0)[None] & valid[:, pick]
        if self.threshold < 1:
            on = on & (1 - jnp.exp(score[:, pick]) <= self.threshold)
        slot = jnp.broadcast_to(_slots(self, depth)[None], on.shape)
        node = jnp.broadcast_to(nodes[pick][None], on.shape)
        return grown, Fringe(node, slot, fringe.slot[:, place][:, pick], on, score[:, pick], fringe.perturbed)

    def finish(self, grown: Grown) -> Tree:
        """The template; nodes that are none have no children."""
        return Tree(grown.tokens, grown.parents, self.depth, self.template.width, grown.logits)


def _slots(shape: Shape, depth: Int[Array, ""]) -> Int[Array, "W"]:
    """Where the fringe of depth + 1 goes; anything at the last depth, which has none."""
    last = np.full((1, shape.width), shape.run, np.int32)
    return jnp.asarray(np.concatenate([shape.slots.astype(np.int32), last]))[depth]


@dataclasses.dataclass(frozen=True)
class StochasticBeam(Shape):
    """Whole continuations drawn without replacement (RSD-S): the W of each length with the largest perturbed log-probabilities.

    Reference: Kool et al. 2019, algorithm 1 and appendix B.3, https://arxiv.org/abs/1903.06059; as a draft, Jeon et al. 2024,
    section 3.2.2, https://arxiv.org/abs/2402.14160.
    """

    width: int = 4
    depth: int = 4
    draws: ClassVar[Draws] = "distinct"

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"a beam needs a width and a depth of at least 1, got {self.width} and {self.depth}")

    @property
    def nodes(self) -> int:
        """The root and W nodes of each depth."""
        return 1 + self.width * self.depth

    room = nodes

    def expand(self, depth: Int[Array, ""], fringe: Fringe, logits: Float[Array, "B W V"], grown: Grown,
               view: View) -> tuple[Grown, Fringe]:
        """The W best children of the whole fringe; a parent's stand in the order drawn."""
        batch, width, vocabulary = logits.shape
        drawn = sampled(processed(logits, view), view)
        kept = _put(grown.logits, jnp.where(fringe.valid, fringe.node, self.nodes), drawn)
        paths = fringe.score[..., None] + jax.nn.log_softmax(drawn, axis=-1)
        found = likeliest(paths + _gumbel(view, depth, _DISTINCT, fringe.node, vocabulary), width)
        perturbed = truncated(found.logits, fringe.perturbed[..., None])
        perturbed = jnp.where(fringe.valid[..., None] & (found.logits > -jnp.inf), perturbed, -jnp.inf)
        best, which = jax.lax.top_k(perturbed.reshape(batch, -1), width)
        place = which // width

        def of(values: Array) -> Array:
            return jnp.take_along_axis(values.reshape(batch, -1), which, axis=1)

        def up(values: Array) -> Array:
            return jnp.take_along_axis(values, place, axis=1)

        valid = best > -jnp.inf
        scores = jnp.take_along_axis(paths, jnp.minimum(found.ids, vocabulary - 1), axis=2)
        ids = jnp.where(valid, of(found.ids), 0)
        nodes = 1 + depth * width + jnp.arange(width, dtype=jnp.int32)
        above = jnp.where(valid, up(fringe.node), -1)
        grown = grown.replace(tokens=_put(grown.tokens, nodes, ids), parents=_put(grown.parents, nodes, above), logits=kept)
        slot = jnp.broadcast_to(_slots(self, depth)[None], ids.shape)
        return grown, Fringe(jnp.broadcast_to(nodes[None], ids.shape), slot, up(fringe.slot), valid, of(scores), best)

    def finish(self, grown: Grown) -> Tree:
        """All nodes."""
        return Tree(grown.tokens, grown.parents, self.depth, self.width, grown.logits)


def truncated(values: Float[Array, "*B n"], most: Float[Array, "*B 1"]) -> Float[Array, "*B n"]:
    """Gumbel values by falling size, given that their largest is `most` instead: the order stays.

    Example:
      >>> [f"{value:.3f}" for value in truncated(jnp.array([2.0, 1.0]), jnp.array([0.5]))]
      ['0.500', '0.175']
    """
    behind = values - values[..., :1]
    v = most - values + jnp.where(behind < 0, jnp.log(-jnp.expm1(behind)), -jnp.inf)
    return most - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


@dataclasses.dataclass(frozen=True)
class Dynamic(Shape):
    """Judges by products of confidence: the `width` best nodes of each level get children, the `nodes` best of all stay.

    Attributes:
      nodes: of the tree proposed, the root among them.
      width: nodes of a level that get children.
      children: of each of them.
      depth: most edges of a path.

    Reference: Li et al. 2024 (EAGLE-2), section 4, https://arxiv.org/abs/2406.16858; Xiong et al. 2024 (DySpec),
    https://arxiv.org/abs/2410.11744. Departs from both where there is a temperature: children are taken, and paths judged,
    under the noise that the target will add.
    """

    nodes: int = 16
    width: int = 4
    children: int = 4
    depth: int = 5
    draws: ClassVar[Draws] = "fixed"

    def __post_init__(self) -> None:
        if self.width < 1 or self.children < 1 or self.depth < 1:
            raise ValueError(f"width, children and depth must be at least 1, got {self.width}, {self.children}, {self.depth}")
        inner = sum(min(self.width, self.children ** depth) for depth in range(self.depth))
        if not 2 <= self.nodes <= 1 + self.children * inner:
            raise ValueError(f"a tree of this width and depth keeps 2 to {1 + self.children * inner} nodes, got {self.nodes}")

    @property
    def room(self) -> int:
        """The root and all candidates."""
        return 1 + self.depth * self.width * self.children

    def expand(self, depth: Int[Array, ""], fringe: Fringe, logits: Float[Array, "B W V"], grown: Grown,
               view: View) -> tuple[Grown, Fringe]:
        """All children of the fringe; the best of them come next."""
        batch, width = fringe.node.shape
        sums = coupled(processed(logits, view), view, depth)
        found = likeliest(sums, self.children)
        valid = (fringe.valid[..., None] & (found.logits > -jnp.inf)).reshape(batch, -1)
        ids = jnp.where(valid, found.ids.reshape(batch, -1), 0)
        sure = jnp.take_along_axis(_confidence(sums, view), ids.reshape(found.ids.shape), axis=2).reshape(batch, -1)
        nodes = 1 + depth * width * self.children + jnp.arange(width * self.children, dtype=jnp.int32)

        def down(values: Array) -> Array:
            return jnp.repeat(values, self.children, axis=1)

        grown = grown.replace(tokens=_put(grown.tokens, nodes, ids),
                              parents=_put(grown.parents, nodes, jnp.where(valid, down(fringe.node), -1)),
                              shares=_put(grown.shares, nodes, jnp.exp(sure)))
        score, pick = jax.lax.top_k(jnp.where(valid, down(fringe.score) + sure, -jnp.inf), width)
        slot = jnp.broadcast_to(_slots(self, depth)[None], pick.shape)
        return grown, Fringe(nodes[pick], slot, jnp.take_along_axis(down(fringe.slot), pick, axis=1), score > -jnp.inf, score,
                             fringe.perturbed)

    def finish(self, grown: Grown) -> Tree:
        """The best nodes."""
        tree = Tree(grown.tokens, grown.parents, self.depth, self.children)
        return trees.prune(tree, grown.shares, self.nodes)


CHAIN = trees.chain(4)


def of(shape: Any, draws: Draws = "fixed") -> Shape:
    """A shape as it is; a template, filled; of a number of nodes, the dynamic tree, or a chain where children are drawn.

    Args:
      draws: how children are drawn; a `Shape` says so itself.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(shape, Shape):
        return shape
    if isinstance(shape, Template):
        return Static(shape, draws)
    if isinstance(shape, int) and not isinstance(shape, bool):
        return Dynamic(nodes=shape) if draws == "fixed" else Static(trees.chain(shape - 1), draws)
    raise ValueError(f"a drafted tree's shape is a Shape, a Template or a number of nodes, got {shape!r}")


@flax.struct.dataclass
class Scratch:
    """The nodes that the model was run on.

    Attributes:
      tokens, depths: int32 [B, R].
      parents: int32 [B, R], slots; -1 for the root's children, -2 for none.
      kv: their keys and values; None where these wait in the cache already.
    """

    tokens: Int[Array, "B R"]
    depths: Int[Array, "B R"]
    parents: Int[Array, "B R"]
    kv: PyTree

    def clear(self) -> "Scratch":
        """No nodes."""
        return self.replace(parents=jnp.full_like(self.parents, -2))

    def add(self, fringe: Fringe, tokens: Int[Array, "B W"], depth: Int[Array, ""]) -> "Scratch":
        """With a fringe of this depth."""
        place = jnp.where(fringe.valid, fringe.slot, self.tokens.shape[1])
        return self.replace(tokens=_put(self.tokens, place, tokens), parents=_put(self.parents, place, fringe.above),
                            depths=_put(self.depths, place, jnp.broadcast_to(depth, tokens.shape)))

    def ancestors(self, depth: int) -> Bool[Array, "B R R"]:
        """Which nodes stand on each one's path, itself among them."""
        return Tree(self.tokens, self.parents, depth, 0).ancestors()

    def positions(self, root: Int[Array, "B"]) -> Int[Array, "B R"]:
        """-1 for none."""
        return jnp.where(self.parents > -2, root[:, None] + self.depths, -1)

    def follow(self, walk: Walk) -> tuple[Int[Array, "B n"], Int[Array, "B"]]:
        """Slots of the accepted tokens, and how many of them, from the first on, are here.

        Tokens are compared, not nodes: whoever drafted them, whatever became of the tree.
        """
        reached, path, count = jnp.ones(self.tokens.shape, bool), [], jnp.zeros(walk.count.shape, jnp.int32)
        for step in range(min(self.tokens.shape[1], walk.tokens.shape[1] - 1)):
            above = jnp.take_along_axis(reached, jnp.maximum(self.parents, 0), axis=1) & (self.parents >= 0)
            reached = (self.parents == -1 if step == 0 else above) & (self.tokens == walk.tokens[:, step][:, None])
            reached = reached & (step < walk.count - 1)[:, None]
            path.append(jnp.argmax(reached, axis=1).astype(jnp.int32))
            count = count + jnp.any(reached, axis=1).astype(jnp.int32)
        return jnp.stack(path, axis=1), count


Extend = Callable[[PyTree, Fringe, Int[Array, "B W"], Int[Array, ""]], tuple[PyTree, Float[Array, "B W V"]]]


def grow(shape: Shape, view: View, first: Float[Array, "B V"], memory: PyTree, extend: Extend) -> tuple[Tree, PyTree]:
    """The tree, and the memory after its last level.

    Args:
      first: logits after the root.
      extend: runs the model on a fringe: (memory, fringe, its tokens, its depth) -> (memory, logits after each).
    """
    batch, vocabulary = first.shape
    drawn = shape.draws != "fixed"
    tokens = jnp.zeros((batch, shape.room), jnp.int32).at[:, 0].set(view.state.last)
    grown = Grown(tokens, jnp.full(tokens.shape, -1, jnp.int32), jnp.zeros(tokens.shape, jnp.float32),
                  jnp.zeros((*tokens.shape, vocabulary), jnp.float32) if drawn else None)
    zeros = jnp.zeros((batch, shape.width), jnp.int32)
    alone = (jnp.arange(shape.width) == 0)[None] & ~view.state.done[:, None]
    fringe = Fringe(zeros, zeros - 1, zeros - 1, alone, zeros.astype(jnp.float32), zeros.astype(jnp.float32))
    root = jnp.broadcast_to(first[:, None], (batch, shape.width, vocabulary))

    def going(carry: tuple[Any, ...]) -> Bool[Array, ""]:
        depth, fringe = carry[:2]
        return (depth < shape.depth) & jnp.any(fringe.valid)

    def level(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        depth, fringe, grown, memory = carry
        tokens = jnp.take_along_axis(grown.tokens, fringe.node, axis=1, mode="clip")
        memory, logits = extend(memory, fringe, tokens, depth)
        grown, fringe = shape.expand(depth, fringe, logits, grown, view)
        return depth + 1, fringe, grown, memory

    grown, fringe = shape.expand(jnp.zeros((), jnp.int32), fringe, root, grown, view)
    if shape.depth > 1:
        *_, grown, memory = jax.lax.while_loop(going, level, (jnp.ones((), jnp.int32), fringe, grown, memory))
    return shape.finish(grown), memory


class Grower(Drafter):
    """The base of drafters whose trees have a `shape`."""

    shape: Shape

    @property
    def draws(self) -> str:
        """The shape's."""
        return self.shape.draws

    @property
    def nodes(self) -> int:
        """The shape's."""
        return self.shape.nodes

    @property
    def depth(self) -> int:
        """The shape's."""
        return self.shape.depth

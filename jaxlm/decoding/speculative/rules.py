"""Rules of acceptance beside `verify.Match`, and all of them by name.

Rules of rejection keep the target's distribution by trying a node's children in the order of the nodes: child x is accepted
with probability min(1, p(x) / q(x)), and a rejection leaves p the residual max(p - q, 0), normalised. They differ in what q is.
They want drafts that were drawn from `Tree.logits`, in that order, by randomness that nothing else uses: sorting, merging or
pruning children by what was drawn makes the text wrong. Where p is one token, at temperature 0, so is what comes out.

Lossy rules follow the longest path whose tokens pass a threshold.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.decoding.logits import Settings, choose, distribution, first_of_top, restrict
from jaxlm.decoding.speculative.drafters.base import Drafter
from jaxlm.decoding.speculative.tree import Tree
from jaxlm.decoding.speculative.verify import Exactness, Match, Place, Rule, subkeys

REMAINDER, ACCEPT, BLOCK = 16, 17, 18  # purposes of randomness

# A residual of less mass is rounding, and as unlikely to be needed as it is small.
_LEAST = 1e-12


def _last(mask: Bool[Array, "*B P"]) -> Int[Array, "*B"]:
    """Index of the last that is true, -1 where none is."""
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1], dtype=jnp.int32), -1), axis=-1)


def _children(tree: Tree, node: Int[Array, "B"]) -> Int[Array, "B W"]:
    """Each node's children in their order, -1 where there are fewer than the tree's width."""
    mine = tree.parents == node[:, None]
    rank = jnp.where(mine, jnp.cumsum(mine, axis=1, dtype=jnp.int32) - 1, -1)
    found = rank[:, None, :] == jnp.arange(tree.width, dtype=jnp.int32)[None, :, None]
    return _last(found)


def _at(x: Float[Array, "B n *V"], index: Int[Array, "B"]) -> Float[Array, "B *V"]:
    """x[b, index[b]] of every row; an index of -1 gives junk."""
    return x[jnp.arange(x.shape[0]), jnp.maximum(index, 0)]


def _softmax(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Zeros where every logit is -inf."""
    return jnp.where(jnp.max(logits, axis=-1, keepdims=True) > -jnp.inf, jax.nn.softmax(logits, axis=-1), 0.0)


def _normalise(mass: Float[Array, "B V"], otherwise: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Divides by the sum; where that is nothing, the other distribution."""
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.where(total > _LEAST, mass / jnp.maximum(total, _LEAST), otherwise)


def _uniform(keys: Key[Array, "B"], positions: Int[Array, "B"], purpose: int, count: int) -> Float[Array, "B n"]:
    """Numbers from 0 to below 1."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(subkeys(keys, positions, purpose))


def _continue(tree: Tree, place: Place, child: Int[Array, "B"],
              rest: Float[Array, "B V"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """The child's token, or one drawn from the probabilities `rest` where there is no child."""
    keys = subkeys(place.keys, place.position, REMAINDER)
    drawn = jax.vmap(lambda key: jax.random.gumbel(key, rest.shape[1:]))(keys)
    return jnp.where(child >= 0, _at(tree.tokens, child), first_of_top(jnp.log(rest) + drawn)), child


def _check(rule: Rule, tree: Tree, settings: Settings, narrow: bool = False) -> None:
    if narrow and tree.width > 1:
        raise ValueError(f"the rule {_name(rule)} is for chains, this tree has nodes of up to {tree.width} children; "
                         "multi_round, without_replacement and k_seq are for trees")
    if rule.draws is not None and tree.logits is None and settings.temperature is not None:
        raise ValueError(f"the rule {_name(rule)} needs to know what drafts were drawn from, this tree has no logits")


class _Rejection:
    """Tries the children of a node one after the other."""

    exact: ClassVar[Exactness] = "distribution"
    draws: ClassVar[frozenset[str] | None]
    narrow: ClassVar[bool] = False

    def drafted(self, logits: Float[Array, "B V"] | None, tried: Bool[Array, "B V"],
                token: Int[Array, "B"]) -> Float[Array, "B V"]:
        """q, the probabilities that the token was drawn by, after those tried before it."""
        return _softmax(logits)

    def plan(self, tree: Tree, everywhere: Callable[[], Array], keys: Array, settings: Settings, position: Array) -> None:
        """Nothing: a node is enough.

        Raises:
          ValueError: for a tree that the rule is not for.
        """
        _check(self, tree, settings, self.narrow)

    def visit(self, plan: None, tree: Tree, place: Place) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The first child accepted and its token, or -1 and a token of what the children left."""
        if place.settings.temperature is None:
            return Match().visit(None, tree, place)
        logits = None if tree.logits is None else _at(tree.logits, place.node)
        p = jnp.exp(distribution(place.logits, place.settings))
        ids = jnp.arange(p.shape[1], dtype=jnp.int32)[None]

        def attempt(carry: tuple[Array, ...], draw: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
            p, tried, taken = carry
            child, u = draw
            token = _at(tree.tokens, child)
            q = self.drafted(logits, tried, token)
            waiting = (taken < 0) & (child >= 0)
            # Not a quotient: q may be 0. Where p is 0 too, the child is refused.
            accepted = waiting & (u * _at(q, token) < _at(p, token))
            rejected = (waiting & ~accepted)[:, None]
            p = jnp.where(rejected, _normalise(jnp.maximum(p - q, 0.0), p), p)
            return (p, tried | (rejected & (ids == token[:, None])), jnp.where(accepted, child, taken)), None

        u = _uniform(place.keys, place.position, ACCEPT, tree.width)
        start = p, jnp.zeros(p.shape, bool), jnp.full(p.shape[:1], -1, jnp.int32)
        (p, _, taken), _ = jax.lax.scan(attempt, start, (_children(tree, place.node).T, u.T))
        return _continue(tree, place, taken, p)


@flax.struct.dataclass
class PointMass(_Rejection):
    """Child x is accepted with probability p(x), or else gets none of what is left: for drafts of any origin.

    In law this is sample and match, with randomness of its own.

    Reference: Leviathan et al. 2023, algorithm 1, https://arxiv.org/abs/2211.17192, with all of q on the child; EAGLE's trees
    are verified so, Li et al. 2024, https://arxiv.org/abs/2401.15077.
    """

    draws: ClassVar[frozenset[str] | None] = None

    def drafted(self, logits: Array | None, tried: Array, token: Int[Array, "B"]) -> Float[Array, "B V"]:
        """All on the token."""
        return jax.nn.one_hot(token, tried.shape[1])


@flax.struct.dataclass
class Chain(_Rejection):
    """Rejection sampling of one draft: accepts with probability 1 - TV(p, q), the most that one draft can have.

    Reference: Leviathan et al. 2023, algorithm 1, https://arxiv.org/abs/2211.17192; Chen et al. 2023, algorithm 2,
    https://arxiv.org/abs/2302.01318.
    """

    draws: ClassVar[frozenset[str] | None] = frozenset({"independent", "distinct"})  # one child: the same thing
    narrow: ClassVar[bool] = True


@flax.struct.dataclass
class MultiRound(_Rejection):
    """Rejection sampling of independent drafts in turn, repeated ones too: a token drawn twice is tried twice.

    Reference: Miao et al. 2024, algorithm 2, https://arxiv.org/abs/2305.09781. Departs from it: children are tried in the order
    they were drawn in, where it picks at random, which for independent drafts is the same.
    """

    draws: ClassVar[frozenset[str] | None] = frozenset({"independent"})


@flax.struct.dataclass
class WithoutReplacement(_Rejection):
    """Rejection sampling of drafts that differ: every rejection also takes the token out of q.

    Reference: recursive rejection sampling of Jeon et al. 2024 (RSD), https://arxiv.org/abs/2402.14160; Chen et al. 2024
    (Sequoia), https://arxiv.org/abs/2402.12374. Departs from them: a residual without mass leaves p as it is.
    """

    draws: ClassVar[frozenset[str] | None] = frozenset({"distinct"})

    def drafted(self, logits: Float[Array, "B V"], tried: Bool[Array, "B V"], token: Array) -> Float[Array, "B V"]:
        """The softmax over tokens not tried."""
        return _softmax(jnp.where(tried, -jnp.inf, logits))


@flax.struct.dataclass
class KSeq:
    """Accepts the first of k independent drafts x with u < p(x) / (rho q(x)), for the one rho that makes the residual smallest.

    Reference: k-SEQ of Sun et al. 2023 (SpecTr), https://arxiv.org/abs/2310.15141. Departs from it: k is the
    number of children that a node has, and rho is found to a few units of float32, on the side where the rule stays exact.
    """

    exact: ClassVar[Exactness] = "distribution"
    draws: ClassVar[frozenset[str] | None] = frozenset({"independent"})

    def plan(self, tree: Tree, everywhere: Callable[[], Array], keys: Array, settings: Settings, position: Array) -> None:
        """Nothing: a node is enough.

        Raises:
          ValueError: for a tree without logits.
        """
        _check(self, tree, settings)

    def visit(self, plan: None, tree: Tree, place: Place) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The first child accepted and its token, or -1 and a token of what the children left."""
        if place.settings.temperature is None:
            return Match().visit(None, tree, place)
        p, q = jnp.exp(distribution(place.logits, place.settings)), _softmax(_at(tree.logits, place.node))
        children = _children(tree, place.node)
        count = jnp.sum(children >= 0, axis=1).astype(jnp.float32)

        def shared(rho: Float[Array, "B"]) -> Float[Array, "B V"]:
            return jnp.minimum(q, p / rho[:, None])

        def any_of(beta: Float[Array, "B"]) -> Float[Array, "B"]:
            """1 - (1 - beta)^k"""
            return -jnp.expm1(count * jnp.log1p(-jnp.minimum(beta, 1.0)))

        def narrow(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2
            beta = jnp.sum(shared(middle), axis=1)
            above = any_of(beta) <= middle * beta
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        # At the root of this equation and above it the residual is nowhere negative, so the rule exact; below it is not.
        ones = jnp.ones_like(count)
        _, rho = jax.lax.fori_loop(0, 24, narrow, (ones, jnp.maximum(count, 1.0)))
        rho = jnp.where(count > 1, rho, 1.0)
        beta = jnp.sum(shared(rho), axis=1)
        share = jnp.where(beta > 0, any_of(beta) / jnp.where(beta > 0, beta, 1.0), 0.0)
        rest = _normalise(jnp.maximum(p - share[:, None] * shared(rho), 0.0), p)

        rows = jnp.arange(p.shape[0])[:, None]
        tokens = tree.tokens[rows, jnp.maximum(children, 0)]
        u = _uniform(place.keys, place.position, ACCEPT, tree.width)
        accepted = (children >= 0) & (u * rho[:, None] * q[rows, tokens] < p[rows, tokens])
        first = jnp.min(jnp.where(accepted, children, tree.nodes), axis=1)  # in the order of the nodes
        return _continue(tree, place, jnp.where(first < tree.nodes, first, -1), rest)


@flax.struct.dataclass
class Block:
    """Verifies a chain as a whole: never accepts fewer tokens on average than rejecting one by one.

    Where a call stops tells something of all its drafts, those behind the stop too, so the next call must draw anew: a
    drafter's randomness must not be a function of the drafted token's position alone, but of the root's too, as here.

    Reference: Sun et al. 2024, Block Verification, https://arxiv.org/abs/2403.10444.
    """

    exact: ClassVar[Exactness] = "distribution"
    draws: ClassVar[frozenset[str] | None] = Chain.draws

    def plan(self, tree: Tree, everywhere: Callable[[], Float[Array, "B P V"]], keys: Key[Array, "B"], settings: Settings,
             position: Int[Array, "B P"]) -> tuple[Int[Array, "B"], Float[Array, "B V"]] | None:
        """The last node accepted and the probabilities of the token after it.

        Raises:
          ValueError: for a tree that is no chain, or without logits.
        """
        _check(self, tree, settings, narrow=True)
        if settings.temperature is None:
            return None
        p = jnp.exp(_distributions(everywhere(), settings))
        u = _uniform(keys, position[:, 0], BLOCK, tree.depth + 1)

        def step(carry: tuple[Array, ...], u: Float[Array, "B"]) -> tuple[tuple[Array, ...], None]:
            node, weight, last, rest = carry
            here, q = _at(p, node), _softmax(_at(tree.logits, node))
            child = _last((tree.parents == node[:, None]) & (node >= 0)[:, None])
            excess = jnp.maximum(weight[:, None] * here - q, 0.0)
            over = jnp.sum(excess, axis=1)
            whole = over + 1.0 - weight
            keep = jnp.where(child < 0, weight, jnp.where(whole > 0, over / jnp.where(whole > 0, whole, 1.0), 1.0))
            taken = (node >= 0) & (u < keep)
            after = jnp.where((child < 0)[:, None], here, _normalise(excess, here))
            token = _at(tree.tokens, child)
            ours, theirs = weight * _at(here, token), _at(q, token)
            ratio = jnp.where(ours < theirs, ours / jnp.where(theirs > 0, theirs, 1.0), (ours > 0).astype(jnp.float32))
            return (child, ratio, jnp.where(taken, node, last), jnp.where(taken[:, None], after, rest)), None

        root = jnp.zeros(p.shape[:1], jnp.int32)
        start = root, jnp.ones(p.shape[:1]), root, p[:, 0]
        (_, _, last, rest), _ = jax.lax.scan(step, start, u.T)
        return last, rest

    def visit(self, plan: Any, tree: Tree, place: Place) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The only child and its token, or -1 and a token of what is left after the last node accepted."""
        if plan is None:
            return Match().visit(None, tree, place)
        last, rest = plan
        child = jnp.where(place.node == last, -1, _last(tree.parents == place.node[:, None]))
        return _continue(tree, place, child, rest)


def _distributions(logits: Float[Array, "B P V"], settings: Settings) -> Float[Array, "B P V"]:
    """Log-probabilities at every node."""
    return jax.vmap(lambda node: distribution(node, settings), in_axes=1, out_axes=1)(logits)


class _Longest:
    """Follows the longest path whose tokens all pass; among several of one length the likeliest."""

    exact: ClassVar[Exactness] = "lossy"
    draws: ClassVar[frozenset[str] | None] = None

    def judge(self, logits: Float[Array, "B P V"],
              settings: Settings) -> tuple[Float[Array, "B P V"], Float[Array, "B P"]]:
        """Log-probabilities at every node, and how large they must be for a child to pass."""
        raise NotImplementedError

    def plan(self, tree: Tree, everywhere: Callable[[], Float[Array, "B P V"]], keys: Array, settings: Settings,
             position: Array) -> Bool[Array, "B P"]:
        """Which nodes stand on the path."""
        logp, least = self.judge(everywhere(), settings)
        rows, parents = jnp.arange(tree.tokens.shape[0])[:, None], jnp.maximum(tree.parents, 0)
        mine = logp[rows, parents, tree.tokens].at[:, 0].set(0.0)
        passed = (mine >= least[rows, parents]).at[:, 0].set(True) & tree.valid()
        on = tree.ancestors()
        depths = jnp.sum(on, axis=2, dtype=jnp.int32)
        whole = jnp.sum(on & passed[:, None, :], axis=2, dtype=jnp.int32) == depths
        reached = jnp.where(whole, depths, 0)
        likelihood = jnp.sum(jnp.where(on, mine[:, None, :], 0.0), axis=2)
        longest = reached == jnp.max(reached, axis=1, keepdims=True)
        best = first_of_top(jnp.where(longest, likelihood, -jnp.inf))
        return _at(jnp.broadcast_to(on, (*tree.tokens.shape, tree.nodes)), best)

    def visit(self, plan: Bool[Array, "B P"], tree: Tree, place: Place) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The next node of the path, or -1 and the token of plain decoding."""
        child = _last(plan & (tree.parents == place.node[:, None]))
        token = choose(place.logits, place.settings, place.keys, place.position)
        return jnp.where(child >= 0, _at(tree.tokens, child), token), child


@flax.struct.dataclass
class Typical(_Longest):
    """Typical acceptance: a token passes when p(x) >= min(epsilon, delta exp(-H(p))), H the entropy in nats. LOSSY.

    At temperature 0 that is the target's own token alone.

    Attributes:
      epsilon: probability that is always enough, above 0 and at most 1.
      delta: share of exp(-H) that is enough, above 0 and at most 1.

    Raises:
      ValueError: for values outside.

    Reference: Cai et al. 2024 (Medusa), Typical Acceptance, https://arxiv.org/abs/2401.10774, with its program's defaults.
    Departs from it: p is what plain decoding draws from, penalties and filters included, and the token after the path is plain
    decoding's, not the likeliest.
    """

    epsilon: float = flax.struct.field(pytree_node=False, default=0.09)
    delta: float = flax.struct.field(pytree_node=False, default=0.3)

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.delta <= 1):
            raise ValueError(f"epsilon and delta are above 0 and at most 1, got {self.epsilon} and {self.delta}")

    def judge(self, logits: Float[Array, "B P V"],
              settings: Settings) -> tuple[Float[Array, "B P V"], Float[Array, "B P"]]:
        """What plain decoding draws from, and the threshold."""
        logp = _distributions(logits, settings)
        entropy = -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0), axis=-1)
        return logp, jnp.log(jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy)))


@flax.struct.dataclass
class Confidence(_Longest):
    """A token passes when the target gives it at least this probability. LOSSY.

    Rows of temperature 0 go by the probabilities of temperature 1: above one half, just their own token can pass.

    Attributes:
      threshold: above 0 and at most 1.

    Raises:
      ValueError: for another threshold.

    Reference: Sun et al. 2024 (Lexical Unit Decoding), https://arxiv.org/abs/2405.15208, whose units begin, as here, with a
    token of plain decoding: the one that ended the call before. Departs from it: drafts may come from anywhere, and the
    confidence is the target's, which has read the tokens before, not the drafter's.
    """

    threshold: float = flax.struct.field(pytree_node=False, default=0.9)

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the threshold is above 0 and at most 1, got {self.threshold}")

    def judge(self, logits: Float[Array, "B P V"],
              settings: Settings) -> tuple[Float[Array, "B P V"], Float[Array, "B P"]]:
        """The softmax after temperature and filters, and the threshold everywhere."""
        logp = jax.nn.log_softmax(jax.vmap(lambda node: restrict(node, settings), in_axes=1, out_axes=1)(logits), axis=-1)
        return logp, jnp.full(logits.shape[:2], jnp.log(self.threshold))


RULES: dict[str, Any] = {
    "match": Match, "point_mass": PointMass, "chain": Chain, "multi_round": MultiRound,
    "without_replacement": WithoutReplacement, "k_seq": KSeq, "block": Block, "lossy_typical": Typical,
    "lossy_confidence": Confidence}


def _name(rule: Rule) -> str:
    return next((name for name, kind in RULES.items() if type(rule) is kind), type(rule).__name__)


def find(rule: str | Rule | None) -> Rule:
    """The rule of this name, or the rule given; None is "match".

    Raises:
      ValueError: for a name that is none, and for what is no rule.
    """
    rule = "match" if rule is None else rule
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"there is no rule {rule!r}; there are {', '.join(RULES)}")
        rule = RULES[rule]()
    if not isinstance(rule, tuple(RULES.values())) and not (hasattr(rule, "visit") and not isinstance(rule, type)):
        raise ValueError(f"rule must be a name or a rule, like rules.Typical(), got {rule!r}")
    return rule


def needed(rule: Rule) -> str:
    """How drafts for a rule are best drawn: "fixed" where it takes them, else as it demands. See `Drafter.draws`."""
    if rule.draws is None or "fixed" in rule.draws:
        return "fixed"
    return "independent" if "independent" in rule.draws else "distinct"


def make(rule: str | Rule | None, drafter: Drafter) -> Rule:
    """What `find` gives, if it is right for the drafter.

    Raises:
      ValueError: also for a rule that is wrong for how the drafter draws; names those that are right.
    """
    rule = find(rule)
    if rule.draws is not None and drafter.draws not in rule.draws:
        right = [name for name, kind in RULES.items() if kind.draws is None or drafter.draws in kind.draws]
        raise ValueError(f"the rule {_name(rule)} is for drafts that are {' or '.join(sorted(rule.draws))}, those of "
                         f"{type(drafter).__name__} are {drafter.draws}: {', '.join(right)} are right for them")
    return rule

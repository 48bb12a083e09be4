"""Every rule against what it promises; rules of rejection by the distribution of three tokens in a row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding.logits import Settings, distribution
from jaxlm.decoding.speculative import rules
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.drafters import Drafter
from jaxlm.decoding.speculative.tree import Tree, branching, chain
from jaxlm.decoding.speculative.verify import Match, Place
from tests.decoding import oracle
from tests.decoding.speculative import sampled
from tests.decoding.speculative.sampled import DRAFT, START, TARGET, VOCABULARY

ROWS = 1 << 15
TREES = {"point_mass": "distinct", "multi_round": "independent", "without_replacement": "distinct", "k_seq": "independent"}
EXACT = {**TREES, "chain": "independent", "block": "independent"}
WIDE = branching(4, 1)
PENALTIES, FILTERS = {"repetition": 1.3, "frequency": 0.4}, {"top_p": 0.9, "top_k": 4}


def rows(seed, count=ROWS):
    return jax.random.split(jax.random.key(seed), count)


def sample(rule, template, kind, seed=0, count=ROWS, settings=None, **tables):
    settings = {"temperature": 1.0} if settings is None else settings
    tokens, first = sampled.sample(rules.RULES[rule](), template, kind, rows(seed, count),
                                   sampled.settings(count, **settings), **tables)
    return np.asarray(tokens), np.asarray(first)


def report(what, tokens, exact):
    distance, floor, tail = sampled.compare(tokens, exact)
    print(f"{what}: TV {distance:.4f}, of exact samples {floor:.4f}, tail of chi-square {tail:.1e}")
    return distance / floor, tail


def check_exact(what, tokens, exact):
    ratio, tail = report(what, tokens, exact)
    assert ratio < 1.4 and tail > 1e-4


def check_biased(what, tokens, exact):
    ratio, tail = report(what, tokens, exact)
    assert ratio > 1.6 and tail < 1e-9


@pytest.mark.parametrize("rule, template", [
    *itertools.product(TREES, [WIDE]), ("multi_round", branching(3, 2)), ("without_replacement", branching(3, 2))])
def test_distribution_of_trees(rule, template):
    check_exact(rule, sample(rule, template, TREES[rule])[0], sampled.joint(1.0, {}, {}))


@pytest.mark.parametrize("rule", ["chain", "block"])
def test_distribution_of_chains(rule):
    check_exact(rule, sample(rule, chain(3), "independent")[0], sampled.joint(1.0, {}, {}))


@pytest.mark.parametrize("rule", EXACT)
def test_distribution_with_penalties_and_filters(rule):
    template = branching(2, 2, 1) if rule in TREES else chain(3)
    tokens, _ = sample(rule, template, EXACT[rule], seed=1, settings={"temperature": 0.8, **PENALTIES, **FILTERS})
    check_exact(rule, tokens, sampled.joint(0.8, PENALTIES, FILTERS))


@pytest.mark.parametrize("rule, template, kind", [
    ("multi_round", WIDE, "sorted"), ("multi_round", WIDE, "unrepeated"), ("without_replacement", WIDE, "independent"),
    ("chain", chain(3), "likeliest"), ("chain", chain(3), "narrower")])
def test_the_check_sees_drafts_that_are_not_what_the_rule_needs(rule, template, kind):
    check_biased(f"{rule} {kind}", sample(rule, template, kind)[0], sampled.joint(1.0, {}, {}))


@pytest.mark.parametrize("rule, kind, check", [
    ("block", "independent", check_exact), ("chain", "again", check_exact), ("block", "again", check_biased)])
def test_only_block_needs_calls_to_draw_anew(rule, kind, check):
    """p = (1/3, 2/3) against q = (2/3, 1/3): block rejects all only where both drafts are token 0."""
    target, draft = np.full((2, VOCABULARY, VOCABULARY), -np.inf, np.float32)
    target[:, :2], draft[:, :2] = np.log([1 / 3, 2 / 3]), np.log([2 / 3, 1 / 3])
    tokens, first = sample(rule, chain(2), kind, target=target, draft=draft)
    check(f"{rule} {kind}", tokens, sampled.joint(1.0, {}, {}, target))
    # 20 / 9 tokens per call, token by token 19 / 9: the example that the paper on block verification begins with.
    assert np.mean(first) == pytest.approx({"block": 20 / 9, "chain": 19 / 9}[rule], abs=5 / np.sqrt(ROWS))


def shares():
    """p and q after the first token, float64."""
    return oracle.softmax(TARGET[START].astype(np.float64)), oracle.softmax(DRAFT[START].astype(np.float64))


def accepted(rule, template, kind):
    _, first = sample(rule, template, kind)
    return np.mean(first > 1)


def test_chain_accepts_all_but_the_total_variation():
    p, q = shares()
    assert accepted("chain", chain(3), "independent") == pytest.approx(np.minimum(p, q).sum(), abs=4 / 2 / np.sqrt(ROWS))


def test_k_seq_accepts_as_its_formula_says():
    p, q = shares()
    low, high = 1.0, 4.0
    for _ in range(50):
        rho = (low + high) / 2
        beta = np.minimum(q, p / rho).sum()
        low, high = (rho, high) if 1 - (1 - beta) ** 4 > rho * beta else (low, rho)
    assert accepted("k_seq", WIDE, "independent") == pytest.approx(1 - (1 - beta) ** 4, abs=4 / 2 / np.sqrt(ROWS))


def test_multi_round_and_without_replacement_accept_as_their_residuals_say():
    def reject(p, q, left, again):
        """Probability that `left` drafts in turn are all rejected."""
        if not left:
            return 1.0
        rest = np.maximum(p - q, 0)
        if rest.sum() < 1e-15:
            return 0.0
        if again:
            return rest.sum() * reject(rest / rest.sum(), q, left - 1, again)
        # After a rejection q depends on which token it was of: x with probability q(x) - min(p(x), q(x)).
        total = 0.0
        for x in range(len(q)):
            if q[x] > p[x]:
                other = np.where(np.arange(len(q)) == x, 0, q)
                total += (q[x] - p[x]) * reject(rest / rest.sum(), other / other.sum(), left - 1, again)
        return total

    p, q = shares()
    for rule, again in (("multi_round", True), ("without_replacement", False)):
        wanted = 1 - reject(p, q, 3, again)
        assert accepted(rule, branching(3, 2), TREES[rule]) == pytest.approx(wanted, abs=4 / 2 / np.sqrt(ROWS)), rule


def test_block_accepts_more_than_chain():
    block, single = (sample(rule, chain(3), "independent")[1] for rule in ("block", "chain"))
    error = np.hypot(np.std(block), np.std(single)) / np.sqrt(ROWS)
    assert np.mean(block) - np.mean(single) > 3 * error


def root(rows_, template=None, seed=5):
    """Random tokens, logits to draw from and the place of the root, for many rows."""
    template = WIDE if template is None else template
    random = np.random.default_rng(seed)
    logits = jnp.asarray(random.normal(size=(rows_, template.nodes, VOCABULARY)).astype(np.float32))
    tokens = jnp.asarray(random.integers(0, VOCABULARY, size=(rows_, template.nodes)).astype(np.int32))
    target = jnp.asarray(random.normal(size=(rows_, VOCABULARY)).astype(np.float32))
    place = Place(jnp.zeros(rows_, jnp.int32), target, sampled.settings(rows_, temperature=1.0), rows(seed, rows_),
                  jnp.ones(rows_, jnp.int32))
    return trees.plant(template, tokens, logits=logits), place


def test_on_a_chain_rules_for_trees_are_the_chain_rule():
    tree, place = root(512, chain(1))
    wanted, *others = jax.jit(lambda tree, place: [rules.RULES[name]().visit(None, tree, place) for name in (
        "chain", "multi_round", "without_replacement", "k_seq")])(tree, place)
    assert 100 < np.sum(wanted[1] == 1) < 412
    for other in others:
        for mine, chains in zip(other, wanted, strict=True):
            np.testing.assert_array_equal(mine, chains)


def test_without_a_row_that_samples_every_rule_is_sample_and_match():
    tree, place = root(64)
    place = place.replace(settings=Settings())
    wanted, *others = jax.jit(lambda tree, place: [rules.RULES[name]().visit(None, tree, place) for name in ("match", *EXACT)])(
        tree, place)
    assert 10 < np.sum(wanted[1] >= 0) < 64
    for other in others:
        for mine, matched in zip(other, wanted, strict=True):
            np.testing.assert_array_equal(mine, matched)


def greedy_tokens():
    token, out = START, []
    for _ in range(sampled.LENGTH):
        token = int(np.argmax(TARGET[token]))
        out.append(token)
    return out


@pytest.mark.parametrize("rule", [*EXACT, "lossy_typical", "lossy_confidence"])
def test_rows_greedy_or_not_do_not_depend_on_each_other(rule):
    """Greedy rows give the likeliest tokens and accept the drafts that match; turning the batch round turns the result."""
    template, kind = (branching(2, 2), TREES[rule]) if rule in TREES else (chain(2), "independent")
    heat = np.where(np.arange(64) % 2, 0.0, np.linspace(0.2, 2, 64)).astype(np.float32)

    def run(order, rule):
        tokens, first = sampled.sample(rules.RULES[rule](), template, kind, rows(7, 64)[order],
                                       sampled.settings(64, temperature=heat[order]))
        return np.asarray(tokens)[order], np.asarray(first)[order]

    tokens, first = run(np.arange(64), rule)
    for one, other in zip((tokens, first), run(np.arange(64)[::-1], rule), strict=True):
        np.testing.assert_array_equal(one, other)
    if rule != "lossy_confidence":
        greedy = heat == 0
        np.testing.assert_array_equal(tokens[greedy], np.broadcast_to(greedy_tokens(), (32, sampled.LENGTH)))
        np.testing.assert_array_equal(first[greedy], run(np.arange(64), "match")[1][greedy])
        assert len(set(first[greedy])) > 1, "nothing to compare"


EXTREME = np.array([-np.inf, -1e30, -200.0, -60.0, 0.0, 1.0, 60.0, 1e30], np.float32)


@pytest.mark.parametrize("rule", rules.RULES)
def test_no_forbidden_token_whatever_the_logits(rule):
    """Drafts and their logits may be anything: what comes out is a token that the target allows."""
    random, many = np.random.default_rng(5), 2000
    template = branching(3, 2) if rule not in ("chain", "block") else chain(2)
    logits = random.choice(EXTREME, size=(many, template.nodes, 6))
    logits[..., 0] = np.where(np.max(logits, axis=-1) == -np.inf, 0, logits[..., 0])
    drawn = random.choice(EXTREME, size=(many, template.nodes, 6))
    drawn[::7] = np.nan
    tokens = random.integers(0, 6, size=(many, template.nodes)).astype(np.int32)
    valid = jnp.asarray(random.random((many, template.nodes)) < 0.8)
    tree = trees.plant(template, jnp.asarray(tokens), valid, logits=jnp.asarray(drawn))
    heat = sampled.settings(many, temperature=random.choice([0.0, 0.5, 1.0], size=many), top_p=0.99)
    rule = rules.RULES[rule]()
    keys, position = rows(11, many), jnp.asarray(template.depths)[None] + jnp.arange(1, many + 1, dtype=jnp.int32)[:, None]

    @jax.jit
    def everywhere(keys, tree, logits, heat):
        plan = rule.plan(tree, lambda: logits, keys, heat, position)

        def visit(node):
            return rule.visit(plan, tree, Place(jnp.full(many, node), logits[:, node], heat, keys, position[:, node]))
        return jax.lax.map(visit, jnp.arange(template.nodes, dtype=jnp.int32))

    visited = zip(*everywhere(keys, tree, jnp.asarray(logits), heat), strict=True)
    reached = np.zeros((many, template.nodes), bool)
    reached[:, 0] = True
    parents = np.broadcast_to(np.asarray(tree.parents), reached.shape)
    followed = 0
    for node, (token, child) in enumerate(visited):
        token, child = np.asarray(token), np.asarray(child)
        allowed = np.asarray(distribution(jnp.asarray(logits[:, node]), heat)) > -np.inf
        if isinstance(rule, rules.Confidence):
            allowed = allowed | (np.asarray(heat.temperature) == 0)[:, None] & (logits[:, node] > -np.inf)
        here = np.flatnonzero(reached[:, node])
        assert np.all(allowed[here, token[here]])
        on = here[child[here] >= 0]
        assert np.all(parents[on, child[on]] == node) and np.all(tokens[on, child[on]] == token[on])
        reached[on, child[on]] = True
        followed += len(on)
    assert followed > 100


def test_a_residual_without_mass_leaves_the_target():
    """Child 0 has q = 1 and p = 0, the second no q left: both distributions are sure, and of different tokens."""
    sure = jnp.full((1, 3, 4), -jnp.inf)
    tree = Tree(jnp.array([[0, 1, 1]], jnp.int32), jnp.array([[-1, 0, 0]], jnp.int32), 1, 2, logits=sure.at[..., 1].set(0.0))
    heat = sampled.settings(1, temperature=1.0)
    place = Place(jnp.zeros(1, jnp.int32), sure[:, 0].at[:, 2].set(0.0), heat, rows(0, 1), jnp.ones(1, jnp.int32))
    visited = jax.jit(lambda tree, place: [rules.RULES[rule]().visit(None, tree, place) for rule in TREES])(tree, place)
    assert [(int(token[0]), int(child[0])) for token, child in visited] == [(2, -1)] * len(TREES)


def longest(passes, logp, parents, tokens):
    """The longest path all of whose tokens pass, of those the likeliest, as node numbers; by listing every path."""
    best = (0, 0.0, [0])
    for node in range(1, len(parents)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        if path[0] != 0:
            continue
        pairs = list(itertools.pairwise(path))
        if all(passes(above, tokens[below]) for above, below in pairs):
            found = (len(pairs), sum(logp[above][tokens[below]] for above, below in pairs), path)
            best = max(best, found, key=lambda x: x[:2])
    return best[2]


@pytest.mark.parametrize("rule", [rules.Typical(), rules.Typical(0.3, 0.7), rules.Confidence(0.3)],
                         ids=["typical", "typical-strict", "confidence"])
def test_lossy_rules_follow_the_longest_path_that_passes(rule):
    random, many = np.random.default_rng(9), 200
    template = branching(3, 2, 1)
    logits = random.normal(size=(many, template.nodes, VOCABULARY), scale=1.5).astype(np.float32)
    tokens = random.integers(0, VOCABULARY, size=(many, template.nodes)).astype(np.int32)
    valid = random.random((many, template.nodes)) < 0.9
    tree = trees.plant(template, jnp.asarray(tokens), jnp.asarray(valid))
    heat = random.choice([0.0, 0.7, 1.0], size=many).astype(np.float32)
    settings = sampled.settings(many, temperature=heat, top_p=0.95)
    keys, position = rows(2, many), jnp.broadcast_to(jnp.asarray(template.depths)[None] + 1, tokens.shape)
    plan = np.asarray(jax.jit(rule.plan, static_argnums=1)(tree, lambda: jnp.asarray(logits), keys, settings, position))
    lengths = []
    for row in range(many):
        def shares(node, row=row):
            filtered = oracle.restrict(logits[row, node], heat[row], top_p=0.95)
            if heat[row] == 0 and isinstance(rule, rules.Typical):
                return np.eye(VOCABULARY)[np.argmax(filtered)]
            return oracle.softmax(filtered)

        def passes(node, token, shares=shares):
            p = shares(node)
            if isinstance(rule, rules.Confidence):
                return p[token] >= rule.threshold
            entropy = -sum(x * np.log(x) for x in p if x > 0)
            return p[token] >= min(rule.epsilon, rule.delta * np.exp(-entropy))

        with np.errstate(divide="ignore"):
            logp = [np.log(shares(node)) for node in range(template.nodes)]
        path = longest(passes, logp, np.asarray(tree.parents)[row], tokens[row])
        assert np.flatnonzero(plan[row]).tolist() == path
        lengths.append(len(path) - 1)
    assert len(set(lengths)) >= 3


def test_where_nothing_passes_lossy_rules_give_the_text_of_plain_decoding():
    plain, _ = sample("match", WIDE, "distinct", count=64)
    tokens, first = sampled.sample(rules.Confidence(1.0), WIDE, "distinct", rows(0, 64), sampled.settings(64, temperature=1.0))
    assert np.all(first == 1)
    np.testing.assert_array_equal(tokens, plain)


def test_lossy_rules_at_their_defaults():
    assert (rules.Typical().epsilon, rules.Typical().delta, rules.Confidence().threshold) == (0.09, 0.3, 0.9)
    with pytest.raises(ValueError, match="epsilon and delta are above 0 and at most 1, got 0.0 and 0.3"):
        rules.Typical(epsilon=0.0)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 1.5"):
        rules.Confidence(1.5)


class Independent(Drafter):
    draws = "independent"


class Distinct(Drafter):
    draws = "distinct"


def test_make():
    assert rules.make(None, Drafter()) == Match() and rules.make("match", Distinct()) == Match()
    assert rules.make("lossy_typical", Drafter()) == rules.Typical()
    given = rules.Typical(0.2, 0.4)
    assert rules.make(given, Independent()) is given
    for name, kind in rules.RULES.items():
        for drafter in (Drafter(), Independent(), Distinct()):
            if kind.draws is None or drafter.draws in kind.draws:
                assert rules.make(name, drafter) == kind()
    assert hash(rules.make("k_seq", Independent())) == hash(rules.KSeq())


@pytest.mark.parametrize("rule, drafter, message", [
    ("none", Drafter(), "there is no rule 'none'; there are match, point_mass, chain, "),
    ("k_seq", Drafter(), "the rule k_seq is for drafts that are independent, those of Drafter are fixed: "
                         "match, point_mass, lossy_typical, lossy_confidence are right"),
    (rules.MultiRound(), Distinct(), "the rule multi_round is for drafts that are independent, those of Distinct are distinct: "
                                     "match, point_mass, chain, without_replacement, block, "),
    ("without_replacement", Independent(), "are distinct, those of Independent are independent: "
                                           "match, point_mass, chain, multi_round, k_seq, ")])
def test_make_names_what_would_be_right(rule, drafter, message):
    with pytest.raises(ValueError) as caught:
        rules.make(rule, drafter)
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["chain", "block"])
def test_rules_for_chains_refuse_trees(rule):
    with pytest.raises(ValueError, match=f"the rule {rule} is for chains, this tree has nodes of up to 4 children"):
        sample(rule, WIDE, "independent", count=4)


@pytest.mark.parametrize("rule", ["chain", "block", "k_seq", "multi_round"])
def test_rules_that_need_logits_say_so(rule):
    tree, position = trees.plant(chain(1), jnp.zeros((1, 2), jnp.int32)), jnp.ones((1, 2), jnp.int32)
    rule_ = rules.RULES[rule]()
    with pytest.raises(ValueError, match=f"the rule {rule} needs to know what drafts were drawn from"):
        rule_.plan(tree, lambda: None, rows(0, 1), sampled.settings(1, temperature=1.0), position)
    assert rule_.plan(tree, lambda: None, rows(0, 1), Settings(), position) is None


def test_a_tree_of_one_node_is_plain_decoding_with_other_noise():
    for rule in ("multi_round", "block"):
        tokens, first = sample(rule, chain(0), "independent")
        assert np.all(first == 1)
        check_exact(rule, tokens, sampled.joint(1.0, {}, {}))

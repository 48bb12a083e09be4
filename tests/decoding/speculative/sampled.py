"""Drafts drawn from a table, verified against another until a few tokens are out, for many rows at once.

A table [V, V] holds the logits after every last token. Some kinds of drafts break what rules rely on, on purpose.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jaxlm.cache import Cache
from jaxlm.decoding import loop
from jaxlm.decoding.logits import Settings
from jaxlm.decoding.speculative import tree as trees
from jaxlm.decoding.speculative.verify import subkeys, walk
from tests.decoding import oracle

VOCABULARY, START, LENGTH = 5, 2, 3

_random = np.random.default_rng(3)
TARGET = _random.normal(size=(VOCABULARY, VOCABULARY), scale=1.3).astype(np.float32)
DRAFT = (0.4 * TARGET + _random.normal(size=(VOCABULARY, VOCABULARY))).astype(np.float32)
DRAFT[np.arange(VOCABULARY), np.argmin(DRAFT, axis=1)] = -np.inf  # as a drafter's own filter does


def settings(rows, **fields):
    """The same for every row, or an array of values."""
    return Settings(**{name: jnp.broadcast_to(jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32), (rows,))
                       for name, value in fields.items()})


def drafted(kind, template, keys, root, last, table):
    """A tree whose children are drawn from the softmax of the table's rows.

    Kinds: "independent" and "distinct" are honest. Of independent children, "sorted" puts those of a node in the order of their
    probabilities, "unrepeated" drops those that occurred before, "again" draws as every call did for this position, "narrower"
    draws from fewer tokens than the logits say. "likeliest" are not drawn.
    """
    tokens = jnp.zeros((len(last), template.nodes), jnp.int32).at[:, 0].set(last)
    valid = jnp.ones(tokens.shape, bool)
    parents = np.asarray(template.parents)

    def draw(node, depth):
        keys_ = jax.vmap(partial(jax.random.fold_in, data=node))(subkeys(keys, root + depth + 1, 1))
        return jax.vmap(lambda key: jax.random.gumbel(key, (template.width, table.shape[1])))(keys_)

    node = jnp.arange(template.nodes)
    every = jax.vmap(draw, out_axes=1)(jnp.zeros_like(node) if kind == "again" else node, jnp.asarray(template.depths))
    for node in np.unique(parents[1:]):
        children = np.flatnonzero(parents == node)
        logits, noise = table[tokens[:, node]], every[:, node, :len(children)]
        if kind == "narrower":
            noise = jnp.where(logits >= jnp.sort(logits, axis=1)[:, -2:-1], 0.0, -jnp.inf)[:, None] + noise
        some = jnp.ones((len(last), len(children)), bool)
        if kind == "likeliest":
            ids = jnp.argmax(logits, axis=1)[:, None]
        elif kind == "distinct":
            sums, ids = jax.lax.top_k(logits + noise[:, 0], len(children))
            some = sums > -jnp.inf
        else:
            ids = jnp.argmax(logits[:, None] + noise, axis=2)
        if kind == "sorted":
            order = jnp.argsort(-jnp.take_along_axis(logits, ids, axis=1), axis=1)
            ids = jnp.take_along_axis(ids, order, axis=1)
        elif kind == "unrepeated":
            same = ids[:, :, None] == ids[:, None, :]
            some = ~jnp.any(same & jnp.tril(jnp.ones((len(children),) * 2, bool), -1)[None], axis=2)
        tokens, valid = tokens.at[:, children].set(ids.astype(jnp.int32)), valid.at[:, children].set(some)
    return trees.plant(template, tokens, valid, logits=table[tokens])


# Each program runs once or twice: compiling it well would take longer than running it badly.
@partial(jax.jit, static_argnames=("rule", "template", "kind"), compiler_options={"xla_backend_optimization_level": 0})
def sample(rule, template, kind, keys, settings, target=TARGET, draft=DRAFT):
    """Tokens [B, LENGTH], and how many the first call gave."""
    rows = len(keys)
    target, draft = jnp.asarray(target), jnp.asarray(draft)
    last = jnp.full(rows, START, jnp.int32)
    vocabulary = target.shape[1]
    state = loop.State(
        Cache((), jnp.zeros(rows, jnp.int32)), last, jnp.zeros((rows, LENGTH), jnp.int32), None, jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool), None, jnp.zeros((rows, vocabulary), jnp.int32) if settings.penalised else None,
        jnp.ones(rows, bool))
    prompted = None if settings.repetition is None else jnp.broadcast_to((jnp.arange(vocabulary) == START)[None],
                                                                         (rows, vocabulary))
    request = loop.Request(keys, jnp.full(rows, LENGTH), jnp.full(1, -1), settings, prompted, None)

    def call(state, _):
        root = state.cache.length
        tree = drafted(kind, template, keys, root, state.last, draft)
        state, walked = walk(rule, state, request, tree, target[tree.tokens])
        return state.replace(cache=Cache((), root + walked.count)), walked.count

    state, counts = jax.lax.scan(call, state, None, length=LENGTH)
    return state.tokens, counts[0]


def joint(temperature, penalties, filters, target=TARGET):
    """Exact probabilities [V, V, V] of three tokens."""
    out = np.ones((VOCABULARY,) * LENGTH)
    for path in itertools.product(range(VOCABULARY), repeat=LENGTH):
        for at, token in enumerate(path):
            logits = oracle.penalise(target[[START, *path][at]], [START], path[:at], **penalties)
            out[path] *= oracle.softmax(oracle.restrict(logits, temperature, **filters))[token]
    return out


def compare(tokens, exact):
    """Total variation between samples and the exact distribution, the same for exact samples, and the tail of chi-square."""
    def distance(counts):
        return np.abs(counts / len(tokens) - exact).sum() / 2

    seen = np.zeros(exact.shape)
    np.add.at(seen, tuple(np.asarray(tokens).T), 1)
    assert not np.any(seen[exact == 0]), "a token that a filter forbids"
    floor = [distance(counts.reshape(exact.shape))
             for counts in np.random.default_rng(0).multinomial(len(tokens), exact.ravel() / exact.sum(), size=20)]
    wanted = exact.ravel() * len(tokens)
    common = wanted >= 5
    found, wanted = ([*x[common], x[~common].sum()] for x in (seen.ravel(), wanted))
    if wanted[-1] < 5:
        found, wanted = found[:-1], wanted[:-1]
    statistic = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True))
    return distance(seen), np.mean(floor), scipy.stats.chi2.sf(statistic, len(wanted) - 1)

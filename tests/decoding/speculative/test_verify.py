import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache import Cache
from jaxlm.decoding import loop
from jaxlm.decoding.logits import noise
from jaxlm.decoding.speculative import verify
from jaxlm.decoding.speculative.tree import Tree
from tests.decoding import oracle
from tests.decoding.speculative import sampled

VOCABULARY = 6
PENALTIES = {"repetition": [1.3, 0.8, 1.0], "presence": [0.5, 0.0, -0.2], "frequency": [0.0, 0.25, 0.3]}
PARENTS = np.array([[-1, 0, 0, 1, 1, 3, 2], [-1, 0, 1, 2, 3, 4, 5], [-1, 0, 0, -1, 2, 4, 4]], np.int32)
TOKENS = np.array([[4, 1, 2, 1, 3, 1, 2], [0, 0, 5, 0, 0, 2, 0], [3, 3, 4, 5, 3, 3, 1]], np.int32)
PROMPTS, OUTPUTS = [[5], [1, 2], []], [[1, 4], [0], [2, 2, 3]]  # the root is the last token of the output


def test_penalties_at_every_node_are_for_its_own_path():
    rows, nodes = TOKENS.shape
    logits = np.random.default_rng(0).normal(size=(rows, nodes, VOCABULARY), scale=2).astype(np.float32)
    bias = np.random.default_rng(1).normal(size=(rows, VOCABULARY)).astype(np.float32)
    counts, prompted = np.zeros((2, rows, VOCABULARY), np.int32)
    for row in range(rows):
        np.add.at(counts[row], OUTPUTS[row], 1)
        prompted[row, PROMPTS[row]] = 1
    none = jnp.zeros(rows, jnp.int32)
    state = loop.State(Cache((), none), jnp.asarray(TOKENS[:, 0]), none[:, None], None, none, none > 0, None,
                       jnp.asarray(counts), none == 0)
    settings = sampled.settings(rows, **PENALTIES).replace(bias=jnp.asarray(bias))
    request = loop.Request(jax.random.split(jax.random.key(0), rows), none, jnp.full(1, -1), settings,
                           jnp.asarray(prompted > 0), None)
    tree = Tree(jnp.asarray(TOKENS), jnp.asarray(PARENTS), 6, 2)
    found = np.asarray(jax.jit(verify._everywhere)(state, request, tree, jnp.asarray(logits)))
    for row, node in itertools.product(range(rows), range(nodes)):
        path, above = [], node
        while above > 0:
            path, above = [TOKENS[row, above], *path], PARENTS[row, above]
        wanted = oracle.penalise(logits[row, node], PROMPTS[row], [*OUTPUTS[row], *path], bias=dict(enumerate(bias[row])),
                                 **{name: values[row] for name, values in PENALTIES.items()})
        np.testing.assert_allclose(found[row, node], wanted, rtol=1e-5, atol=1e-5)


def test_subkeys_depend_on_row_position_and_purpose_alone():
    keys, positions = jax.random.split(jax.random.key(0), 3), jnp.arange(3, dtype=jnp.int32)
    grids = [jax.random.key_data(verify.subkeys(keys, positions + shift, purpose))
             for shift, purpose in itertools.product((0, 1), (1, 16, 17))]
    every = np.concatenate([np.asarray(grid) for grid in grids])
    assert len(np.unique(every, axis=0)) == 2 * 3 * 3
    turned = jax.random.key_data(verify.subkeys(keys[::-1], positions[::-1], 16))
    np.testing.assert_array_equal(turned[::-1], grids[1])
    drawn = jax.vmap(lambda key: jax.random.gumbel(key, (VOCABULARY,)))(verify.subkeys(keys, positions, 16))
    assert not np.any(np.isclose(drawn, noise(keys, positions, VOCABULARY)))

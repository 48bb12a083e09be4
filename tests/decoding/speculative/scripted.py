"""A drafter that is told what to propose: right, wrong or both, in trees of any shape."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm.decoding.speculative.drafters.base import Drafter
from jaxlm.decoding.speculative.tree import Tree


@flax.struct.dataclass
class Scripted(Drafter):
    """Nodes carry the text that is to come, plus an offset where they are to be wrong; arrays, so that one program serves all.

    Attributes:
      text: [B, S], what plain decoding says at each absolute position.
      shapes: [n, P] parents; a call uses the shape at its root's position modulo n.
      offsets: [n, P], what is added to the token, modulo the vocabulary.
      vocabulary: V.
    """

    text: Int[Array, "B S"]
    shapes: Int[Array, "n P"]
    offsets: Int[Array, "n P"]
    vocabulary: int = flax.struct.field(pytree_node=False)

    @property
    def nodes(self):
        return self.shapes.shape[1]

    @property
    def depth(self):
        return self.nodes - 1

    def propose(self, state, view):
        which = view.length % self.shapes.shape[0]
        tree = Tree(jnp.zeros((view.length.shape[0], self.nodes), jnp.int32), self.shapes[which], self.depth, self.depth)
        place = view.length[:, None] + tree.depths()
        right = jnp.take_along_axis(self.text, jnp.minimum(place, self.text.shape[1] - 1), axis=1)
        tokens = (right + self.offsets[which]) % self.vocabulary
        return tree.replace(tokens=tokens.at[:, 0].set(view.state.last)), state


def parents(rng, nodes, width=None):
    """Random parents; some nodes are none, with everything below them."""
    above = np.array([-1, *(rng.integers(0, node) for node in range(1, nodes))])
    for node in range(1, nodes):
        if rng.random() < 0.15 or (above[node] > 0 and above[above[node]] < 0):
            above[node] = -1
    return above


def scripted(text, vocabulary, seed, right=0.6, nodes=9, shapes=7, slots=64):
    """Random trees whose nodes are each right with this probability; `text` is a list of rows, prompt and output."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(text), slots), np.int32)
    for row, tokens in enumerate(text):
        rows[row, :len(tokens)] = tokens
    offsets = np.where(rng.random((shapes, nodes)) < right, 0, rng.integers(1, vocabulary, (shapes, nodes)))
    grown = np.stack([parents(rng, nodes) for _ in range(shapes)])
    return Scripted(jnp.asarray(rows), jnp.asarray(grown, jnp.int32), jnp.asarray(offsets, jnp.int32), vocabulary)


def chain_of(text, vocabulary, offset, nodes=5, slots=64):
    """A chain: all right (offset 0) or all wrong."""
    made = scripted(text, vocabulary, 0, nodes=nodes, shapes=1, slots=slots)
    return made.replace(shapes=jnp.arange(-1, nodes - 1, dtype=jnp.int32)[None],
                        offsets=jnp.full((1, nodes), offset, jnp.int32))

"""The target's own first layers draft, with its final norm and head: no second set of weights, and no second cache.

Reference: early exit as in Elhoushi et al. 2024 (LayerSkip), section 4.3, https://arxiv.org/abs/2404.16710, without the
training that it recommends: of other models few drafts are accepted.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import model
from jaxlm.config import Decoder, dropless
from jaxlm.decoding.speculative.drafters import grow
from jaxlm.decoding.speculative.drafters.base import Start, View
from jaxlm.decoding.speculative.drafters.grow import Fringe, Grower, Scratch, Shape
from jaxlm.decoding.speculative.drafters.model import same_vocabulary
from jaxlm.decoding.speculative.tree import Template, Tree
from jaxlm.model import Model


@flax.struct.dataclass
class FirstLayers(Grower):
    """Drafts with the first layers of the target: see `first_layers`.

    Attributes:
      config: the target's, of an encoder-decoder its decoder's.
      layers: how many of its blocks, at least 1.
      shape: how trees grow.
      dtype: of the computation; None is that of the weights.
    """

    config: Decoder = flax.struct.field(pytree_node=False)
    layers: int = flax.struct.field(pytree_node=False)
    shape: Shape = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False, default=None)

    def init(self, start: Start, kept: tuple[()] | None) -> tuple[()]:
        """Nothing: all that is remembered is the target's."""
        same_vocabulary(self.config, start.vocabulary)
        return ()

    def propose(self, state: tuple[()], view: View) -> tuple[Tree, tuple[()]]:
        """A tree of the shape."""
        cfg, params, cache = model.prefix(self.config, view.target, view.state.cache, self.layers)
        root = view.length[:, None]

        def forward(tokens: Array, positions: Array, mask: Array | None, at: Array | None) -> Float[Array, "B n V"]:
            return model.forward(params, cfg, tokens, positions=positions, mask=mask, at=at, cache=cache,
                                 context=cache.length + 1, dtype=self.dtype).logits

        def rerun(scratch: Scratch, fringe: Fringe, tokens: Int[Array, "B W"],
                  depth: Int[Array, ""]) -> tuple[Scratch, Float[Array, "B W V"]]:
            # The root is not in the target's cache yet: it stands before the nodes.
            scratch = scratch.add(fringe, tokens, depth)
            on = jnp.pad(scratch.ancestors(self.depth - 2), ((0, 0), (1, 0), (1, 0))).at[:, :, 0].set(True)
            return scratch, forward(jnp.concatenate([view.state.last[:, None], scratch.tokens], axis=1),
                                    jnp.concatenate([root, scratch.positions(view.length)], axis=1), on,
                                    jnp.minimum(fringe.slot + 1, scratch.tokens.shape[1]))

        first = forward(view.state.last[:, None], root, None, None)[:, 0]
        none = jnp.zeros((root.shape[0], max(self.shape.run, 1)), jnp.int32)
        tree, _ = grow.grow(self.shape, view, first, Scratch(none, none, none - 2, None), rerun)
        return tree, state


def first_layers(target: Model, layers: int, shape: Shape | Template | int = grow.CHAIN, dtype: Any = None,
                 draws: grow.Draws = "fixed") -> FirstLayers:
    """A drafter from a target.

    Args:
      layers: how many of its blocks draft.
      shape, draws: as for `draft_model`.
      dtype: of the computation; default that of the weights.

    Raises:
      ValueError: when the target has not so many layers.
    """
    cfg = target.decoder
    if not 1 <= layers <= cfg.stack.layers:
        raise ValueError(f"layers must be 1 to {cfg.stack.layers}, the target's, got {layers}")
    return FirstLayers(dropless(cfg), layers, grow.of(shape, draws), dtype)

"""A second, smaller model of the same vocabulary that drafts.

It has a cache of its own, which holds what a prefill of the text would: nodes that the target accepts are committed as the
target's are, and what others drafted is caught up with. Of an encoder-decoder's source it has a memory of its own too: an
encoder-decoder reads the source with its own encoder, a decoder with cross-attention what the target's encoder made of it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxlm import cache as caching
from jaxlm import model
from jaxlm.cache import Cache, Memory
from jaxlm.config import Decoder, Encoder, EncoderDecoder, dropless
from jaxlm.decoding.speculative.drafters import grow
from jaxlm.decoding.speculative.drafters.base import Seen, Start, View
from jaxlm.decoding.speculative.drafters.grow import Fringe, Grower, Scratch, Shape
from jaxlm.decoding.speculative.tree import Template, Tree
from jaxlm.model import Model

_CATCH_UP = 2  # tokens per call: the last one, and the one before it where it was drafted and accepted but never read


def same_vocabulary(cfg: Decoder | Encoder, vocabulary: int, name: str = "vocabulary") -> None:
    """Raises:
      ValueError: when a draft model has not the target's vocabulary; names both sizes.
    """
    if cfg.embedding.vocabulary != vocabulary:
        raise ValueError(f"the draft model has a {name} of {cfg.embedding.vocabulary} tokens, the target one of "
                         f"{vocabulary}: they must be the same")


@flax.struct.dataclass
class State:
    """What a draft model knows of the text.

    Attributes:
      cache: of all tokens before `cache.length`, which is at most the last token's position.
      scratch: the nodes of the last draft that it was run on.
    """

    cache: Cache
    scratch: Scratch


def _after(cache: Cache, logits: Array) -> Cache:
    """The same cache, for a write that waits for all reads, so that it is made in place: see `jaxlm.decoding.loop.run`."""
    return cache.replace(length=cache.length + jnp.minimum(jnp.isfinite(logits[:, 0, 0]).astype(jnp.int32), 0))


@flax.struct.dataclass
class DraftModel(Grower):
    """Drafts with a decoder of its own: see `draft_model`.

    Attributes:
      params: as `Model.ready` gives them.
      config: the draft model's.
      shape: how trees grow.
      dtype: of the computation; None is that of the weights.
    """

    params: PyTree
    config: Decoder | EncoderDecoder = flax.struct.field(pytree_node=False)
    shape: Shape = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False, default=None)

    @property
    def decoder(self) -> Decoder:
        """What drafts."""
        return self.config.decoder if isinstance(self.config, EncoderDecoder) else self.config

    def _read(self, start: Start) -> Memory | None:
        """What this model's layers make of the source; None where none of them looks at one.

        Raises:
          ValueError: when the target reads no source, or one of another vocabulary, or its encoder's width is another.
        """
        widths = {block.cross.source for block in self.decoder.stack.blocks() if block.cross is not None}
        if not widths:
            return None
        if start.source is None:
            raise ValueError("the draft model attends to a source, the target is a decoder and has none")
        if isinstance(self.config, EncoderDecoder):
            same_vocabulary(self.config.encoder, start.source_vocabulary, "source vocabulary")
            memory = model.encode(self.params, self.config, start.source.tokens, lengths=start.source.lengths, dtype=self.dtype)
        else:
            memory = start.memory
            if widths != {memory.hidden.shape[2]}:
                raise ValueError(f"the draft model reads vectors of width {sorted(widths)}, the target's encoder makes some of "
                                 f"width {memory.hidden.shape[2]}: Attention.source must be that")
        memory = model.remember(self.params, self.config, memory)
        return memory.replace(layers=caching.constrained(memory.layers))

    def init(self, start: Start, kept: PyTree | None) -> State:
        """The prompt's keys and values and the source's; nothing is kept from earlier requests."""
        same_vocabulary(self.decoder, start.vocabulary)
        memory = self._read(start)
        out = model.forward(self.params, self.config, start.tokens, lengths=start.length, context=start.length, logits=False,
                            dtype=self.dtype, memory=memory, prefix=start.prefix)
        # A call writes at most a chain, or the last two tokens, behind the text.
        cache = caching.filled(out.kv, start.slots + self.depth + _CATCH_UP, start.length, memory)
        cache = cache.replace(layers=caching.constrained(cache.layers))
        run = max(self.shape.run, 1)
        none = jnp.zeros((start.tokens.shape[0], run), jnp.int32)
        kv = None
        if not self.shape.is_chain:
            kv = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-2], run, leaf.shape[-1]), leaf.dtype), out.kv)
        return State(cache, Scratch(none, none, none - 2, kv))

    def _forward(self, cache: Cache, tokens: Int[Array, "B T"], **given: Array) -> model.Output:
        return model.forward(self.params, self.config, tokens, cache=cache, context=cache.length + 1, dtype=self.dtype, **given)

    def _catch_up(self, cache: Cache, view: View) -> tuple[Cache, Float[Array, "B V"]]:
        """The cache with the last token, and the logits after it; rows that are done stay where they are."""
        def behind(carry: tuple[Cache, Array]) -> Array:
            return jnp.any((carry[0].length <= view.length) & ~view.state.done)

        def read(carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, logits = carry
            index = cache.length[:, None] + jnp.arange(_CATCH_UP, dtype=jnp.int32)[None]
            real = (index <= view.length[:, None]) & ~view.state.done[:, None]
            count = jnp.sum(real, axis=1, dtype=jnp.int32)
            tokens = jnp.take_along_axis(view.history, index, axis=1, mode="clip")
            out = self._forward(cache, tokens, positions=jnp.where(real, index, -1), at=jnp.maximum(count - 1, 0)[:, None])
            return (caching.append(_after(cache, out.logits), out.kv, count),
                    jnp.where((count > 0)[:, None], out.logits[:, 0], logits))

        logits = jnp.zeros((view.length.shape[0], self.decoder.embedding.vocabulary), jnp.float32)
        return jax.lax.while_loop(behind, read, (cache, logits))

    def propose(self, state: State, view: View) -> tuple[Tree, State]:
        """A tree of the shape."""
        cache, first = self._catch_up(state.cache, view)
        scratch = state.scratch.clear()

        def append(memory: tuple[Cache, Scratch], fringe: Fringe, tokens: Int[Array, "B W"],
                   depth: Int[Array, ""]) -> tuple[tuple[Cache, Scratch], Float[Array, "B W V"]]:
            cache, scratch = memory
            out = self._forward(cache, tokens, positions=jnp.where(fringe.valid, view.length[:, None] + depth, -1))
            cache = caching.append(_after(cache, out.logits), out.kv, fringe.valid[:, 0].astype(jnp.int32))
            return (cache, scratch.add(fringe, tokens, depth)), out.logits

        def rerun(memory: Scratch, fringe: Fringe, tokens: Int[Array, "B W"],
                  depth: Int[Array, ""]) -> tuple[Scratch, Float[Array, "B W V"]]:
            # The forward pass sees committed keys and a call's own, so a level's call has all earlier nodes too.
            scratch = memory.add(fringe, tokens, depth)
            out = self._forward(cache, scratch.tokens, positions=scratch.positions(view.length),
                                mask=scratch.ancestors(self.depth - 2),
                                at=jnp.minimum(fringe.slot, scratch.tokens.shape[1] - 1))
            return scratch.replace(kv=out.kv), out.logits

        if self.shape.is_chain:
            tree, (longer, scratch) = grow.grow(self.shape, view, first, (cache, scratch), append)
            cache = longer.replace(length=cache.length)
        else:
            tree, scratch = grow.grow(self.shape, view, first, scratch, rerun)
        return tree, State(cache, scratch)

    def observe(self, state: State, seen: Seen) -> State:
        """Commits the accepted nodes that were run; the text's other tokens are left for the next proposal."""
        path, count = state.scratch.follow(seen.walk)
        if self.shape.is_chain:
            cache = state.cache.replace(length=state.cache.length + count)
        else:
            cache = caching.commit(state.cache, state.scratch.kv, path, count)
        return State(cache, state.scratch.clear())


def draft_model(draft: Model, shape: Shape | Template | int = grow.CHAIN, dtype: Any = None,
                draws: grow.Draws = "fixed") -> DraftModel:
    """A drafter from a model.

    Args:
      shape: how its trees grow (`grow.Static`, `grow.StochasticBeam`, `grow.Dynamic`), a `Template` to fill, or how many nodes
        a dynamic tree is to have.
      dtype: of the computation; default that of the weights.
      draws: how a template's nodes are drawn, see `grow.Static`; for other than "fixed" a number of nodes makes a chain.
    """
    return DraftModel(draft.ready, dropless(draft.config), grow.of(shape, draws), dtype)

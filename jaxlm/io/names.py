"""What an architecture's tensors are called elsewhere and how they lie there: one table, as data, read in both directions.

A `Row` names one of their tensors and the weights of ours that it holds. Which way a matrix lies follows from our own
`Param`: theirs has its outputs first and ours its inputs first, except for an embedding, so loading is a reshape and a
transposition and saving is the same backwards.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm import config, model
from jaxlm.params import Param, paths

ALTERNATING = 0


@dataclass(frozen=True)
class Row:
    """One of their tensors: [out, in], or with `out_axis` 1 [in, out], or a vector [out], or with `out_axis` 1 [1, out].

    Attributes:
      ours: paths of the weights it holds; "{block}" stands for a place in the stack of `side`.
      theirs: its name; "{base}" stands for the prefix of all but the head, "{i}" for the layer, "{e}" for the expert. Without
        "{e}" a tensor of experts' weights holds all of them, along a dimension before the others.
      out_axis: the dimension of a matrix along which outputs lie.
      blocks: several weights follow one another along the outputs, and do so in this many equal runs: 1 is all of q, then k,
        then v; None is as many as there are key-value heads, ALTERNATING as many as each has outputs: they take turns.
      also: other names it goes by, looked for where the first is missing.
      twins: names it also goes by where the head is tied to the embedding.
      when: which blocks it is about, or outside the stack which models; None is all.
      plain: a table that lies there as it does here.
      side: "decoder" or "encoder", whose blocks these are.
      copied: it is written under the names in `also` as well, for a reader that does not share what the model shares.
    """

    ours: tuple[str, ...]
    theirs: str
    out_axis: int = 0
    blocks: int | None = 1
    also: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    when: Callable[[Any], bool] | None = None
    plain: bool = False
    side: str = "decoder"
    copied: bool = False


def of_encoder(*rows: Row) -> tuple[Row, ...]:
    """Rows of a decoder as an encoder's."""
    def turned(path: str) -> str:
        return re.sub("^decoder/", "encoder/", path)
    return tuple(dataclasses.replace(row, side="encoder", ours=tuple(map(turned, row.ours))) for row in rows)


def linear(ours: str | tuple[str, ...], theirs: str, *, out_axis: int = 0, blocks: int | None = 1,
           also: tuple[str, ...] = ()) -> tuple[Row, Row]:
    """A matrix and its bias."""
    ours = (ours,) if isinstance(ours, str) else ours
    biases = tuple(f"{path}_bias" for path in ours)
    return (Row(ours, f"{theirs}.weight", out_axis, blocks, tuple(f"{name}.weight" for name in also)),
            Row(biases, f"{theirs}.bias", 0, blocks, tuple(f"{name}.bias" for name in also)))


def norm(ours: str, theirs: str, when: Callable[[config.Block], bool] | None = None) -> tuple[Row, Row]:
    """A norm's scale and its bias."""
    return Row((f"{ours}/scale",), f"{theirs}.weight", when=when), Row((f"{ours}/bias",), f"{theirs}.bias", when=when)


def head(theirs: str, *also: str) -> tuple[Row, Row]:
    """The head's matrix and its bias."""
    return (Row(("decoder/head/out",), f"{theirs}.weight", also=tuple(f"{name}.weight" for name in also)),
            Row(("decoder/head/bias",), f"{theirs}.bias", also=tuple(f"{name}.bias" for name in also)))


def _product_of_vectors(side: Any) -> bool:
    return isinstance(side.head, config.Vector)


# The product of an encoder's `Vector`, a file of its own: see `jaxlm.io.sentence`.
VECTOR = (Row(("encoder/head/out",), "linear.weight", when=_product_of_vectors, side="encoder"),
          Row(("encoder/head/bias",), "linear.bias", when=_product_of_vectors, side="encoder"))


@dataclass(frozen=True)
class Place:
    """A row of the table at one place of a model: the leaves of ours, and a tensor of theirs for each repeat of the block, or
    for each of its experts.

    Attributes:
      paths: our leaves, whole paths.
      parts: each leaf's Param for one layer and one expert, without the leading axes "layers" and "experts".
      names: their tensors; a single one outside the stack.
      also: for each of `names` the other names it goes by.
      leading: the leading dimensions of our leaves that `names` run over, the last one fastest.
      experts: the leading dimension that their tensors and our leaves of one layer have in common: () or how many experts.
      out_axis, blocks, plain, copied: the row's.
    """

    paths: tuple[str, ...]
    parts: tuple[Param, ...]
    names: tuple[str, ...]
    also: tuple[tuple[str, ...], ...]
    leading: tuple[int, ...]
    experts: tuple[int, ...]
    out_axis: int
    blocks: int
    plain: bool
    copied: bool

    def index(self, number: int) -> tuple[int, ...]:
        """Where in the leading dimensions of our leaves the tensor of this number in `names` belongs."""
        return tuple(int(at) for at in np.unravel_index(number, self.leading)) if self.leading else ()

    def _sizes(self) -> tuple[int, list[int]]:
        """How many inputs the tensor has (1 for a vector), and how many outputs each part."""
        inputs = math.prod(self.parts[0].shape[axis] for axis in self.parts[0].inputs)
        return inputs, [math.prod(part.shape) // inputs for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        """What shape each of their tensors has."""
        if self.plain:
            return self.experts + self.parts[0].shape
        inputs, outputs = self._sizes()
        if not self.parts[0].inputs and self.out_axis == 0:
            return (*self.experts, sum(outputs))
        return self.experts + ((sum(outputs), inputs) if self.out_axis == 0 else (inputs, sum(outputs)))

    def _layout(self, part: Param) -> tuple[list[int], tuple[int, ...]]:
        """A part's dimensions in the order they have in their tensor, and where each of ours is found there."""
        outputs = [axis for axis in range(len(part.shape)) if axis not in part.inputs]
        order = [*outputs, *part.inputs] if self.out_axis == 0 else [*part.inputs, *outputs]
        first = len(self.experts)
        places = (*range(first), *(first + order.index(axis) for axis in range(len(order))))
        return [*self.experts, *(part.shape[axis] for axis in order)], places

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Our weights of one layer out of their tensor: views of it wherever NumPy can make one."""
        if self.plain:
            return [tensor]
        inputs, outputs = self._sizes()
        size = sum(outputs) // self.blocks
        run = (self.blocks, size, inputs) if self.out_axis == 0 else (inputs, self.blocks, size)
        runs = tensor.reshape(*self.experts, *run)
        start, weights = 0, []
        for part, size in zip(self.parts, outputs, strict=True):
            stop = start + size // self.blocks
            piece = runs[..., start:stop, :] if self.out_axis == 0 else runs[..., start:stop]
            shape, order = self._layout(part)
            weights.append(piece.reshape(shape).transpose(order))
            start = stop
        return weights

    def join(self, weights: list[np.ndarray]) -> np.ndarray:
        """Their tensor of one layer: what `split` undoes."""
        if self.plain:
            return weights[0]
        inputs, outputs = self._sizes()
        runs = []
        for part, weight, size in zip(self.parts, weights, outputs, strict=True):
            order = self._layout(part)[1]
            lying = weight.transpose(np.argsort(order))
            size //= self.blocks
            run = (self.blocks, size, inputs) if self.out_axis == 0 else (inputs, self.blocks, size)
            runs.append(lying.reshape(*self.experts, *run))
        tensor = runs[0] if len(runs) == 1 else np.concatenate(runs, axis=-2 if self.out_axis == 0 else -1)
        return np.ascontiguousarray(tensor.reshape(self.shape))


def places(table: tuple[Row, ...], base: str, cfg: config.Config) -> tuple[Place, ...]:
    """Where every weight of the model lies.

    Raises:
      ValueError: for a weight that the table does not name, or names only together with one that the model lacks.
    """
    leaves = paths(model.spec(cfg))
    found = tuple(place for row in table for place in _expand(row, base, cfg, leaves))
    named = [path for place in found for path in place.paths]
    unnamed = leaves.keys() - set(named)
    if unnamed or len(named) != len(set(named)):
        raise ValueError(f"no name for the weight {min(unnamed, default=named)}")
    return found


def _expand(row: Row, base: str, cfg: config.Config, leaves: Mapping[str, Param]) -> Iterator[Place]:
    sides = {"encoder": cfg.encoder, "decoder": cfg.decoder} if isinstance(cfg, config.EncoderDecoder) else {
        "decoder" if isinstance(cfg, config.Decoder) else "encoder": cfg}
    side = sides.get(row.side)
    if side is None:
        return
    if "{block}" not in row.ours[0]:
        if row.ours[0] in leaves and (row.when is None or row.when(cfg)):
            tied = isinstance(side.head, config.Head) and side.head.tied
            also = tuple(name.format(base=base) for name in row.also + (row.twins if tied else ()))
            yield Place(row.ours, tuple(leaves[path] for path in row.ours), (row.theirs.format(base=base),), (also,), (),
                        (), row.out_axis, row.blocks or 1, row.plain, row.copied)
        return
    layer = 0
    for g, group in enumerate(side.stack.groups):
        for p, block in enumerate(group.pattern):
            ours = tuple(path.format(block=f"{row.side}/blocks/{g}/{p}") for path in row.ours)
            if ours[0] in leaves and (row.when is None or row.when(block)):
                parts, leading, experts = tuple(_one(leaves[path]) for path in ours), (group.repeats,), ()
                if parts[0].axes[0] == "experts":
                    experts, parts = parts[0].shape[:1], tuple(map(_one, parts))
                    if "{e}" in row.theirs:
                        leading, experts = leading + experts, ()
                layers = range(layer + p, layer + group.repeats * len(group.pattern), len(group.pattern))
                keys = [{"base": base, "i": i, "e": e} for i in layers for e in range(math.prod(leading[1:]))]
                turns = math.prod(size for axis, size in enumerate(parts[0].shape) if axis not in parts[0].inputs)
                blocks = {None: block.attention.kv_heads, ALTERNATING: turns}.get(row.blocks, row.blocks)
                yield Place(ours, parts, tuple(row.theirs.format(**key) for key in keys),
                            tuple(tuple(name.format(**key) for name in row.also) for key in keys), leading, experts,
                            row.out_axis, blocks, row.plain, row.copied)
        layer += group.repeats * len(group.pattern)


def _one(stacked: Param) -> Param:
    """The Param of one layer, or of one expert: without the leading dimension."""
    return dataclasses.replace(stacked, shape=stacked.shape[1:], axes=stacked.axes[1:],
                               inputs=tuple(axis - 1 for axis in stacked.inputs))

"""The loss of predicted tokens, without ever holding all logits: a piece of every row at a time.

When it is differentiated, the gradients are taken piece by piece in the same pass, where the logits are at hand: nothing of the
vocabulary's size is kept for the backward pass but the head's gradient, and nothing is computed twice.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

Head = Callable[[PyTree, Float[Array, "B n D"]], Float[Array, "B n V"]]


class Loss(NamedTuple):
    """A sum of losses, and the weight to divide it by once all parts of a batch are summed.

    Attributes:
      aux: sums to be divided by `weight` too, for people to look at.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    aux: dict[str, Float[Array, ""]]


def cross_entropy(head: Head, params: PyTree, x: Float[Array, "B T D"], targets: Int[Array, "B T"],
                  weights: Float[Array, "B T"], *, piece: int = 256, smoothing: float = 0.0, z: float = 0.0) -> Loss:
    """The weighted sum of the tokens' negative log-probabilities, float32.

    Args:
      head: float32 logits from its own weights `params` and what the model ends in.
      targets: 0 to V - 1; where the weight is 0 it does not matter what they are.
      piece: tokens of each row whose logits exist at a time.
      smoothing: share of the target that is spread evenly over the vocabulary.
      z: factor of the squared logarithm of the softmax's denominator, which keeps logits from drifting.

    Returns:
      aux: "nll", the sum without smoothing and z; "correct", the weight of tokens that are the likeliest.

    Reference: smoothing, Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567; z, Chowdhery et al. 2022, section 5,
    https://arxiv.org/abs/2204.02311
    """
    batch, length = targets.shape
    count = -(-length // piece)
    pad = count * -(-length // count) - length

    def pieces(y: Array) -> Array:
        y = jnp.pad(y, ((0, 0), (0, pad), *[(0, 0)] * (y.ndim - 2)))
        return jnp.moveaxis(y.reshape(batch, count, -1, *y.shape[2:]), 1, 0)

    total, aux = _sums(partial(_piece, head, smoothing, z), params, *map(pieces, (x, targets, weights.astype(jnp.float32))))
    return Loss(total, jnp.sum(weights, dtype=jnp.float32), aux)


Piece = Callable[[PyTree, Array, Array, Array], tuple[Array, dict[str, Array]]]


def _piece(head: Head, smoothing: float, z: float, params: PyTree, x: Float[Array, "B n D"], targets: Int[Array, "B n"],
           weights: Float[Array, "B n"]) -> tuple[Array, dict[str, Array]]:
    logits = head(params, x).astype(jnp.float32)
    targets = jnp.clip(targets, 0, logits.shape[-1] - 1)
    normal = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = loss = normal - chosen
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (normal - jnp.mean(logits, axis=-1))
    if z:
        loss = loss + z * normal**2
    correct = (chosen >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return jnp.sum(loss * weights), {"nll": jnp.sum(nll * weights), "correct": jnp.sum(correct * weights)}


def _over_rows(function: Callable[..., PyTree], params: PyTree, x: Array, targets: Array, weights: Array) -> PyTree:
    """What a function makes, each device of the rows that it has: arrays whose second dimension is that of rows.

    What is summed over a device's rows counts as one row: all are to be added once. Left to the compiler, they would be added
    once for every piece.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = () if mesh.empty else tuple(axis for axis in ("data", "fsdp") if mesh.shape.get(axis, 1) > 1)
    if not over or targets.shape[1] % math.prod(mesh.shape[axis] for axis in over):
        return function(params, x, targets, weights)
    rows = PartitionSpec(None, over)
    return jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), rows, rows, rows), out_specs=rows,
                         axis_names=set(over), check_vma=False)(params, x, targets, weights)


def _whole(parts: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=(0, 1)), parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(piece: Piece, params: PyTree, x: Float[Array, "n B t D"], targets: Int[Array, "n B t"],
          weights: Float[Array, "n B t"]) -> tuple[Array, dict[str, Array]]:
    def mine(params: PyTree, *given: Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[:, None], jax.lax.map(lambda part: piece(params, *part), given))

    return _whole(_over_rows(mine, params, x, targets, weights))


def _forward(piece: Piece, params: PyTree, x: Array, targets: Array, weights: Array) -> tuple[Any, Any]:
    def mine(params: PyTree, *given: Array) -> PyTree:
        def once(gradient: PyTree, part: tuple[Array, Array, Array]) -> tuple[PyTree, Any]:
            (total, aux), (more, toward) = jax.value_and_grad(piece, argnums=(0, 1), has_aux=True)(params, *part)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradient, more), ((total, aux), toward)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        gradient, (sums, toward) = jax.lax.scan(once, zeros, given)
        return (jax.tree.map(lambda leaf: leaf[:, None], sums), jax.tree.map(lambda leaf: leaf[None, None], gradient), toward)

    sums, gradient, toward = _over_rows(mine, params, x, targets, weights)
    # Added in float32, and only then in the weights' own dtype.
    gradient = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), _whole(gradient), params)
    return _whole(sums), (gradient, toward, weights)


def _backward(piece: Piece, kept: Any, given: Any) -> tuple[Any, ...]:
    # Of the aux nothing flows back: it is for people to look at. Weights are data.
    (gradient, toward, weights), (factor, _) = kept, given
    scaled = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), (gradient, toward))
    return *scaled, None, jnp.zeros_like(weights)


_sums.defvjp(_forward, _backward)

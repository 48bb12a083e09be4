"""One step of training: gradients of a batch, however it is cut, and the update.

The loss gives a sum and a weight; gradients of sums are added up over the pieces of a batch and divided by the whole weight
once, so accumulation changes nothing but memory. Nothing here leaves the device.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree


class Loss(Protocol):
    """What a loss gives: see `jaxlm.objectives.Loss`."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    aux: Mapping[str, Float[Array, ""]]


# Of weights, batch, key and what it handed on before, to what it hands on.
LossFunction = Callable[[PyTree, PyTree, Key[Array, ""], PyTree], tuple[Loss, PyTree]]


@flax.struct.dataclass
class State:
    """What a checkpoint holds.

    Attributes:
      step: int32, updates made (or skipped) so far.
      params: the master weights.
      moments: the optimizer's.
      average: of the weights over the steps, or None.
      key: of whatever the loss draws; a step's own is made of it and the step.
      carry: what the loss hands on from step to step, without gradients.
    """

    step: Int[Array, ""]
    params: PyTree
    moments: PyTree
    average: PyTree | None
    key: Key[Array, ""]
    carry: PyTree = ()


@flax.struct.dataclass
class Metrics:
    """What a step tells, all float32 scalars.

    Attributes:
      loss: mean over the batch's weight.
      weight: of the batch: how many tokens are asked, each counted as often as its weight says.
      gradient_norm: before it is clipped, of all weights, frozen ones (`jaxlm.training.optimizer.Freeze`) too.
      finite: whether loss, gradient (of frozen weights too) and, of an update, the norm of the new weights are.
      aux: the loss's, divided by the weight.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    aux: dict[str, Float[Array, ""]]


def begin(params: PyTree, transform: optax.GradientTransformation, key: Key[Array, ""], average: bool = False,
          carry: PyTree = ()) -> State:
    """The state before the first step."""
    kept = jax.tree.map(jnp.array, params) if average else None
    return State(jnp.zeros((), jnp.int32), params, transform.init(params), kept, key, carry)


def gradients(loss: LossFunction, params: PyTree, batch: PyTree, key: Key[Array, ""], carry: PyTree = (),
              pieces: int = 1) -> tuple[PyTree, PyTree, Metrics]:
    """The gradient of the batch's mean loss, and what the loss hands on.

    Args:
      batch: arrays whose first dimension is that of examples.
      pieces: one after another, each with what the one before it handed on; they must divide the examples.

    Raises:
      ValueError: when they do not.
    """
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or next(iter(sizes)) % pieces:
        raise ValueError(f"a batch of {sorted(sizes)} examples cannot be taken in {pieces} pieces")

    def total(params: PyTree, piece: PyTree, key: Key[Array, ""], carry: PyTree) -> tuple[Array, tuple[Array, Any, PyTree]]:
        found, carry = loss(params, piece, key, carry)
        return found.sum, (found.weight, dict(found.aux), jax.lax.stop_gradient(carry))

    differentiate = jax.value_and_grad(total, has_aux=True)
    if pieces == 1:
        (value, (weight, aux, carry)), gradient = differentiate(params, batch, key, carry)
    else:
        def add(before: Any, given: tuple[PyTree, Array]) -> tuple[Any, None]:
            sums, carry = before
            (value, (weight, aux, carry)), gradient = differentiate(params, given[0], jax.random.fold_in(key, given[1]), carry)
            return (jax.tree.map(jnp.add, sums, (value, weight, aux, gradient)), carry), None

        # Strided, so that every device's part of a batch gives a part of every piece and nothing moves.
        split = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, pieces, *leaf.shape[1:]), 1, 0), batch)
        first = jax.tree.map(lambda leaf: leaf[0], split)
        (value, (weight, aux, _)), gradient = jax.eval_shape(lambda: differentiate(params, first, key, carry))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (value, weight, aux, gradient))
        ((value, weight, aux, gradient), carry), _ = jax.lax.scan(add, (zeros, carry), (split, jnp.arange(pieces)))
    share = 1 / jnp.maximum(weight, 1e-9)
    gradient = jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), gradient)
    norm = optax.tree.norm(gradient)
    mean = value * share
    return gradient, carry, Metrics(mean, weight, norm, jnp.isfinite(mean) & jnp.isfinite(norm),
                             {name: leaf * share for name, leaf in aux.items()})


def advance(loss: LossFunction, transform: optax.GradientTransformation, state: State, batch: PyTree, *, pieces: int = 1,
            keep: float | None = None, skip: bool = False) -> tuple[State, Metrics]:
    """One update.

    Args:
      keep: share of the old average at every step; None without one.
      skip: leave all as it is when loss, gradient or new weights are not finite; the schedule of the learning rate goes on all
        the same. Without it they become what they become, and `Metrics.finite` says so.

    Raises:
      ValueError: for an average without `keep` and the other way round.
    """
    if (state.average is None) != (keep is None):
        raise ValueError("keep is for a state with an average of the weights, and needed by it: see begin(average=True)")
    key = jax.random.fold_in(state.key, state.step)
    gradient, carry, metrics = gradients(loss, state.params, batch, key, state.carry, pieces)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a Python float to an int32 array
        updates, moments = transform.update(gradient, state.moments, state.params)
    params = optax.apply_updates(state.params, updates)
    # Of the weights: the compiler finds that while it writes them; of the updates it would make them twice.
    metrics = metrics.replace(finite=metrics.finite & jnp.isfinite(optax.tree.norm(params)))
    average = state.average
    if keep is not None:
        average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new.astype(old.dtype), average, params)
    new = (params, moments, average, carry)
    if skip:
        def choose(new: Any, old: Any) -> Any:
            return new if _is_schedule(new) else jnp.where(metrics.finite, new, old)

        old = (state.params, state.moments, state.average, state.carry)
        new = jax.tree.map(choose, new, old, is_leaf=_is_schedule)
    params, moments, average, carry = new
    return State(state.step + 1, params, moments, average, state.key, carry), metrics


def _is_schedule(node: Any) -> bool:
    """Whether it counts the steps of a schedule, not updates as a moment's correction does."""
    return isinstance(node, optax.ScaleByScheduleState)

"""Optimizers: optax's, put together from what a config says and what every weight's `Param` knows of it.

Weight decay, frozen parts and multipliers of the learning rate are chosen by path. A pattern that matches nothing is an error.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from optax import contrib

from jaxlm.params import Param, Spec, paths, select
from jaxlm.training.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101"""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Lion:
    """Chen et al. 2023, https://arxiv.org/abs/2302.06675"""

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235: second moments of matrices kept as a row and a column.

    Attributes:
      decay: exponent of the step by which old moments are forgotten.
      clip: largest root mean square of a weight's update.
      relative: scales updates by the root mean square of the weight.
    """

    decay: float = 0.8
    clip: float = 1.0
    relative: bool = True
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Muon:
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: orthogonalised momentum for matrices within blocks.

    All other weights (embeddings, head, norms, biases) are AdamW's, with the same learning rate: updates of matrices are scaled
    to the root mean square that Adam's usually have (Liu et al. 2025, https://arxiv.org/abs/2502.16982).

    Attributes:
      beta: of the momentum, Nesterov's.
      iterations: of Newton and Schulz.
      rms: root mean square of a matrix's update, before the learning rate.
    """

    beta: float = 0.95
    iterations: int = 5
    rms: float = 0.2
    weight_decay: float = 0.1
    others: AdamW = AdamW()


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Weights that stay as they are, to the bit, for a training's first steps, and are trained like all others from then on.

    It is one compiled step before and after, so steps before take as long. What is frozen counts nothing in the gradient's norm
    that `Optimizer.clip` looks at. Its moments are those of a first step when it is freed, their correction for that too: what
    gradients were before says little of weights that all others have meanwhile been fitted to. They are there from the first
    step, and computed at every one. A gradient of what is frozen that is not finite makes a step one that is not finite, as
    any other does: `jaxlm.training.step.Metrics` are of all gradients.

    Attributes:
      paths: patterns of the weights' paths, as `jaxlm.adapt.but_cross_attention` gives them.
      steps: how many of the first; counted like the schedule's, so that what is skipped counts too.
    """

    paths: tuple[str, ...]
    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.paths, tuple) or not all(isinstance(one, str) for one in self.paths):
            raise ValueError(f"Freeze.paths is a tuple of patterns, like (\"decoder/embedding/*\",), got {self.paths!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise ValueError(f"Freeze.steps is a whole number, got {self.steps!r}")
        if not self.paths or self.steps < 1:
            raise ValueError(f"what is frozen at first has paths, and at least 1 step, got {self}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What makes an update of a gradient.

    Attributes:
      schedule: of the learning rate.
      clip: largest global norm of the gradient; None for any.
      decayed: patterns of the paths that weight decay is for; None for every weight that takes part in products but embeddings.
      frozen: patterns of the paths that stay as they are, and need no memory for moments.
      multipliers: (pattern, factor of the learning rate, above 0); later ones overrule. Weight decay goes by the schedule
        alone, so all weights forget old updates at the same pace (Wang & Aitchison 2024, https://arxiv.org/abs/2405.13698).
      freeze: what stays as it is for the first steps only; None for nothing.
      correction: how far a router's corrections (`jaxlm.config.TopK.correction`) move in a step, towards an even load; in
        DeepSeek-V3 0.001, and 0 for the last of its tokens. They know no moments, decay or learning rate.
    """

    kind: AdamW | Lion | Adafactor | Muon
    schedule: Schedule
    clip: float | None = 1.0
    decayed: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    multipliers: tuple[tuple[str, float], ...] = ()
    freeze: Freeze | None = None
    correction: float = 1e-3

    def transform(self, spec: Spec) -> optax.GradientTransformation:
        """The optax transformation for weights of this spec.

        Raises:
          ValueError: for a pattern that matches no path, a factor that is not above 0, and when everything is frozen, for the
            first steps too.
        """
        if not self.correction >= 0:
            raise ValueError(f"correction is how far a router's corrections move in a step, at least 0, got {self.correction}")
        frozen = select(spec, *self.frozen) if self.frozen else {}
        if len(frozen) == len(paths(spec)):
            raise ValueError(f"all weights are frozen by {', '.join(self.frozen)}: there is nothing to train")
        held = {} if self.freeze is None else select(spec, *self.freeze.paths)
        if self.freeze is not None and len(frozen | held) == len(paths(spec)):
            raise ValueError(f"all weights are frozen for the first {self.freeze.steps} steps: there is nothing to train")
        factors = dict.fromkeys(paths(spec), 1.0)
        for pattern, factor in self.multipliers:
            if not factor > 0:
                raise ValueError(f"the multiplier of {pattern!r} has to be above 0, got {factor}; for what stays as it is "
                                 "there is frozen")
            factors |= dict.fromkeys(select(spec, pattern), factor)
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        if self.freeze is None:
            parts.append(self._precondition(spec))
        else:
            # Apart, since moments have one count for all weights, by which they are corrected.
            moments = {"first": self._precondition(spec), "later": _from(self.freeze.steps, self._precondition(spec))}
            when = {path: "later" if path in held else "first" for path in paths(spec)}
            parts.append(optax.multi_transform(moments, _tree(spec, when)))
        if self.multipliers:
            parts.append(_by_path(lambda path, update: update * factors[path]))
        if self.kind.weight_decay:
            parts.append(optax.add_decayed_weights(self.kind.weight_decay, _tree(spec, self._decays(spec))))
        parts.append(optax.scale_by_learning_rate(self.schedule))
        if self.freeze is not None:
            # Of the gradient, for the norm that is clipped; of the update, for the decay.
            stays = _zero_before(self.freeze.steps, set(held))
            parts = [stays, *parts, stays]
        kinds = {"trained": optax.chain(*parts), "frozen": optax.set_to_zero()}
        named = {path: "frozen" if path in frozen else "trained" for path in paths(spec)}
        corrections = [path for path in named if path.endswith("router/correction") and path not in frozen]
        if corrections:
            named |= dict.fromkeys(corrections, "correction")
            moved = optax.stateless(lambda gradient, _: jax.tree.map(lambda leaf: -self.correction * jnp.sign(leaf), gradient))
            waits = () if self.freeze is None else (_zero_before(self.freeze.steps, set(held)),)
            kinds["correction"] = optax.chain(moved, *waits)
        return optax.multi_transform(kinds, _tree(spec, named))

    def _decays(self, spec: Spec) -> dict[str, bool]:
        if self.decayed is not None:
            chosen = select(spec, *self.decayed)
            return {path: path in chosen for path in paths(spec)}
        return {path: bool(param.inputs) and not path.endswith("embedding/tokens") for path, param in paths(spec).items()}

    def _precondition(self, spec: Spec) -> optax.GradientTransformation:
        match self.kind:
            case AdamW(b1, b2, eps):
                return optax.scale_by_adam(b1, b2, eps)
            case Lion(b1, b2):
                return optax.scale_by_lion(b1, b2)
            case Adafactor(decay, clip, relative):
                parts = [optax.scale_by_factored_rms(decay_rate=decay), optax.clip_by_block_rms(clip)]
                return optax.chain(*parts, *([optax.scale_by_param_block_rms()] if relative else []))
            case Muon(beta, iterations, rms, _, others):
                axes = {path: _matrix(path, param) for path, param in paths(spec).items()}
                sides = {path: max(math.prod(param.shape[axis] for axis in side) for side in axes[path])
                         for path, param in paths(spec).items() if axes[path]}

                def numbers(updates: PyTree) -> PyTree:
                    return _map(lambda path, _: contrib.MuonDimensionNumbers(*axes[path]), updates)

                # An orthogonal matrix's root mean square is 1 / sqrt(its longer side).
                muon = optax.chain(contrib.scale_by_muon(ns_steps=iterations, beta=beta, weight_dimension_numbers=numbers),
                                   _by_path(lambda path, update: update * (rms * sides[path]**0.5)))
                labels = _tree(spec, {path: "muon" if found else "adam" for path, found in axes.items()})
                adam = optax.scale_by_adam(others.b1, others.b2, others.eps)
                return optax.multi_transform({"muon": muon, "adam": adam}, labels)


class _Waiting(NamedTuple):
    """A clock, which goes on over skipped steps as a schedule's does (`jaxlm.training.step.advance`), and what waits for it."""

    clock: optax.ScaleByScheduleState
    inner: Any


def _begun() -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))


def _passed(clock: optax.ScaleByScheduleState) -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(count=optax.safe_increment(clock.count))


def _from(steps: int, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation from a step on; until then it gives what it is given, and stays as it began."""
    def init(params: PyTree) -> _Waiting:
        return _Waiting(_begun(), inner.init(params))

    def update(updates: PyTree, state: _Waiting, params: PyTree | None = None) -> tuple[PyTree, _Waiting]:
        live = state.clock.count >= steps
        new = inner.update(updates, state.inner, params)
        updates, after = jax.tree.map(lambda new, old: jnp.where(live, new, old), new, (updates, state.inner))
        return updates, _Waiting(_passed(state.clock), after)

    return optax.GradientTransformation(init, update)


def _zero_before(steps: int, held: set[str]) -> optax.GradientTransformation:
    """Nothing for these paths until a step."""
    def update(updates: PyTree, clock: optax.ScaleByScheduleState,
               params: PyTree | None = None) -> tuple[PyTree, optax.ScaleByScheduleState]:
        live = clock.count >= steps
        updates = _map(lambda path, leaf: jnp.where(live, leaf, jnp.zeros_like(leaf)) if path in held else leaf, updates)
        return updates, _passed(clock)

    return optax.GradientTransformation(lambda params: _begun(), update)


def _matrix(path: str, param: Param) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Which dimensions are the inputs and the outputs of a matrix inside a block; layers and experts are neither."""
    if "/blocks/" not in f"/{path}" or not param.inputs:
        return None
    outputs = tuple(axis for axis, name in enumerate(param.axes)
                    if axis not in param.inputs and name not in ("layers", "experts"))
    return (param.inputs, outputs) if outputs else None


def _map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree)


def _tree(spec: Spec, values: dict[str, Any]) -> PyTree:
    """Values by path, as a tree like the spec."""
    return _map(lambda path, _: values[path], spec)


def _by_path(function: Callable[[str, Array], Array]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: _map(function, updates))

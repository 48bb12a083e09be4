"""Losses of routers, added to an objective's own, and what is told of them.

All are made of what a forward pass returns (`jaxlm.layers.moe.Routing`), and are means over the layers that have a router, so
that a coefficient means the same at every depth.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlm.layers.moe import Routing
from jaxlm.objectives.cross_entropy import Loss


@dataclasses.dataclass(frozen=True)
class RoutingLoss:
    """What is added to the mean loss of a token, each times its coefficient.

    Attributes:
      balance: experts times the sum over them of (share of the load) x (mean probability); 1 where the load is even
        (Fedus et al. 2021, equation 4, https://arxiv.org/abs/2101.03961). transformers' router_aux_loss_coef is for k times
        as much.
      z: the mean square of the log-sum-exp of a token's logits (Zoph et al. 2022, https://arxiv.org/abs/2202.08906).
      mutual: minus the mutual information, in nats, of tokens and experts: each token sure, all together even
        (Chen et al. 2022, https://arxiv.org/abs/2212.08066).
    """

    balance: float = 0.0
    z: float = 0.0
    mutual: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"RoutingLoss.{field.name} must not be negative, got {getattr(self, field.name)}")


def layers(routing: PyTree) -> list[Routing]:
    """The layers that have a router, each a `Routing` with a leading axis of its repeats.

    Args:
      routing: `jaxlm.model.Output.routing`, or a dict of it by side, "encoder" and "decoder".
    """
    return [one for one in jax.tree.leaves(routing, is_leaf=lambda node: isinstance(node, Routing)) if isinstance(one, Routing)]


def _entropy(shares: Float[Array, "L E"]) -> Float[Array, "L"]:
    return -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-30)), axis=-1)


def measures(one: Routing) -> dict[str, Float[Array, "L"]]:
    """The losses of some layers, each without its coefficient, and beside them

    - "load_entropy": of the load's shares, as a part of the most there can be: 1 is even;
    - "dropped": the share of pairs of token and expert that were dropped.
    """
    tokens = jnp.maximum(one.tokens, 1.0)[:, None]
    experts = one.load.shape[-1]
    probability = one.scores / tokens
    load = jax.lax.stop_gradient(one.load)
    shares = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    pairs = jnp.sum(load, axis=-1)
    return {"balance": experts * jnp.sum(shares * probability, axis=-1), "z": one.squares / tokens[:, 0],
            "mutual": one.entropy / tokens[:, 0] - _entropy(probability),
            "load_entropy": _entropy(shares) / math.log(experts) if experts > 1 else jnp.ones_like(pairs),
            "dropped": one.dropped / jnp.maximum(pairs, 1.0)}


def add(found: Loss, routing: PyTree, cfg: RoutingLoss | None, params: PyTree) -> Loss:
    """The loss with those of the routers, and with aux "load_entropy" and "dropped", "balance", "z_router" and "mutual" where
    they have a coefficient. Without a layer that has a router it is the loss itself.

    Corrections (`jaxlm.config.TopK.correction`) get a gradient of the sign that the optimizer goes by: above 0 for experts with
    more than an even share of the load. It adds nothing to the loss.

    Args:
      routing: by side, "encoder" and "decoder".
      cfg: None adds no loss.
      params: the weights, for the corrections.
    """
    routed = layers(routing)
    if not routed:
        return found
    every = [measures(one) for one in routed]
    mean = {name: jnp.mean(jnp.concatenate([one[name] for one in every])) for name in every[0]}
    total, told = found.sum, {name: mean[name] for name in ("load_entropy", "dropped")}
    for field in dataclasses.fields(RoutingLoss) if cfg is not None else ():
        if getattr(cfg, field.name):
            total = total + found.weight * getattr(cfg, field.name) * mean[field.name]
            told["z_router" if field.name == "z" else field.name] = mean[field.name]
    total = total + found.weight * _corrections(params, routing)
    return Loss(total, found.weight, found.aux | {name: value * found.weight for name, value in told.items()})


TINY = 1e-6  # of a correction's gradient: only its sign counts, and the norm of all gradients is not to notice


def _corrections(params: PyTree, routing: PyTree) -> Float[Array, ""]:
    """Zero, with gradients for the corrections."""
    def of(tree: Any, groups: Any) -> Array:
        value = jnp.zeros(())
        for g, places in enumerate(groups):
            for p, one in enumerate(places):
                own = tree[str(g)][str(p)]
                if not isinstance(one, Routing) or "correction" not in own["feedforward"].get("router", {}):
                    continue
                correction = own["feedforward"]["router"]["correction"]
                # Not its sign, which is taken of the sum over a batch's pieces.
                mean = jnp.mean(one.load, axis=-1, keepdims=True)
                over = (one.load - mean) / jnp.maximum(mean, 1.0)
                value = value + TINY * jnp.sum((correction - jax.lax.stop_gradient(correction)) * jax.lax.stop_gradient(over))
        return value

    return sum((of(params[side]["blocks"], groups) for side, groups in routing.items()), jnp.zeros(()))


"""A mixture of experts in the feed-forward slot: a router sends each token to some of the experts, whose outputs are summed.

Nothing is dropped unless the config has a capacity: pairs of a token and one of its experts are sorted by expert, and
`jaxlm.layers.grouped` multiplies each with its expert's matrices. On a mesh the pairs go to the devices that hold their
experts and come back (`jaxlm.layers.exchange`). Where experts choose, the tokens that they take lie in slots [B, E, C]
instead. `Routing` is what losses and statistics are made of.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm import config
from jaxlm.layers import exchange, feedforward, router
from jaxlm.layers.mask import Context
from jaxlm.params import Param, matrix_size
from jaxlm.weight import Weight, dense, einsum


@flax.struct.dataclass
class Routing:
    """What one layer's router did with the tokens there are (padding is left out).

    Attributes:
      tokens: how many there are.
      scores: [E], sums of the router's probabilities (of a `config.ReluNorm`: of its weights).
      load: [E], how many tokens chose each expert, those that it then dropped too.
      entropy: sum of the entropies of the tokens' probabilities, in nats (of a `config.ReluNorm`: of relu(x W) over its sum).
      squares: sum of squared log-sum-exps of the logits.
      dropped: how many pairs of token and expert were dropped.
      experts: int32 [B, T, k], where each token went; E where there is no token or the expert dropped it. None where experts
        choose or all take part.
      active: [B, T, E] in a `config.ReluNorm`: its weights, of which sparsity is measured; else None.
    """

    tokens: Float[Array, ""]
    scores: Float[Array, "E"]
    load: Float[Array, "E"]
    entropy: Float[Array, ""]
    squares: Float[Array, ""]
    dropped: Float[Array, ""]
    experts: Int[Array, "B T k"] | None
    active: Float[Array, "B T E"] | None


def spec(cfg: config.Moe, width: int) -> dict[str, Any]:
    """router; experts, the weights of one stacked along a leading "experts" axis; shared and shared_gate where configured."""
    def stacked(param: Param) -> Param:
        made = param.stacked(cfg.experts)
        axes = ("experts", *("expert_embed" if axis == "embed" else axis for axis in param.axes))
        return Param(made.shape, axes, made.init, made.inputs)

    tree: dict[str, Any] = {"experts": jax.tree.map(stacked, feedforward.spec(cfg.expert, width))}
    decides = router.spec(cfg, width)
    if decides:
        tree["router"] = decides
    if cfg.shared is not None:
        tree["shared"] = feedforward.spec(cfg.shared, width)
    if cfg.shared_gate:
        tree["shared_gate"] = Param((width, 1), ("embed", None), inputs=(0,))
    return tree


def chosen(cfg: config.Moe) -> int:
    """How many experts a token goes to (where experts choose: on average)."""
    match cfg.router.choice if isinstance(cfg.router, config.Recurrent) else cfg.router:
        case config.TopK(k=k) | config.Hash(k=k) | config.AverageKey(k=k):
            return k
        case config.ExpertChoice(capacity=capacity):
            return min(capacity, cfg.experts)
        case config.ReluNorm():
            return cfg.experts


def touched(routing: PyTree) -> Float[Array, ""]:
    """How many experts of a layer some token went to, the mean over the layers that have a router; 0 without one.

    Args:
      routing: as `jaxlm.stack.Result` has it.
    """
    layers = jax.tree.leaves(routing, is_leaf=lambda node: isinstance(node, Routing))
    counts = [jnp.sum(one.load > 0, axis=-1, dtype=jnp.float32) for one in layers]
    return jnp.mean(jnp.concatenate(counts)) if counts else jnp.zeros(())


def products(cfg: config.Moe, width: int) -> int:
    """How many weights take part in the products of a token: the router's, those of the experts that it goes to (where experts
    choose: on average), and those of the layer that all go through."""
    tree = spec(cfg, width)
    keys = width * cfg.experts if isinstance(cfg.router, config.AverageKey) else 0
    experts = tree.pop("experts")
    return matrix_size(tree) + keys + round(matrix_size(experts) * chosen(cfg) / cfg.experts)


def apply(params: dict[str, Any], cfg: config.Moe, x: Float[Array, "B T D"], context: Context,
          state: Float[Array, "B T P"] | None = None) -> tuple[Float[Array, "B T D"], Routing, Array | None]:
    """The layer's output, what the router did, and the state for the next layer's router (`config.Recurrent`)."""
    keys = _average_keys(params["experts"], cfg.expert) if isinstance(cfg.router, config.AverageKey) else None
    decision, state = router.apply(params.get("router", {}), cfg, x, context, state, keys)
    valid = context.positions >= 0
    kept = None
    if decision.experts is not None:
        experts = jnp.where(valid[..., None], decision.experts, cfg.experts)
        counted = jnp.sum(jax.nn.one_hot(experts, cfg.experts, dtype=jnp.float32), axis=(0, 1, 2))
        if cfg.capacity is not None:
            kept = _kept(cfg, experts, decision.scores)
            experts = jnp.where(kept, experts, cfg.experts)
            if isinstance(cfg.capacity, config.CapacityFraction) and cfg.capacity.rescale:
                decision = decision._replace(weights=_rescaled(decision.weights, kept))
        decision = decision._replace(experts=experts)
        out = exchange.apply(params["experts"], cfg, x, experts, decision.weights)
    elif isinstance(cfg.router, config.ExpertChoice):
        out, taken = _expert_choice(params["experts"], cfg, x, jnp.where(valid[..., None], decision.scores, -1.0))
        counted = jnp.sum(taken, axis=(0, 1))
    else:
        out = _all(params["experts"], cfg.expert, x, decision.scores)
        counted = jnp.sum((decision.logits > 0) & valid[..., None], axis=(0, 1)).astype(jnp.float32)
    if cfg.shared is not None:
        beside = feedforward.apply(params["shared"], cfg.shared, x)
        if cfg.shared_gate:
            beside = beside * jax.nn.sigmoid(einsum("BTD,DG->BTG", x, params["shared_gate"]))
        out = out + beside
    return out, _routing(cfg, decision, counted, valid, kept), state


def _routing(cfg: config.Moe, decision: router.Decision, load: Array, valid: Bool[Array, "B T"], kept: Array | None) -> Routing:
    weight = valid.astype(jnp.float32)
    relu, shares = isinstance(cfg.router, config.ReluNorm), decision.scores
    if relu:  # its weights are no probabilities: they may be negative, and their sum is anything
        active = jax.nn.relu(decision.logits)
        shares = active / jnp.maximum(jnp.sum(active, axis=-1, keepdims=True), 1e-30)
    logs = jnp.log(jnp.maximum(shares, 1e-30))
    squares = jax.nn.logsumexp(decision.logits, axis=-1) ** 2
    dropped = jnp.zeros(()) if kept is None else jnp.sum(~kept & valid[..., None]).astype(jnp.float32)
    return Routing(jnp.sum(weight), jnp.einsum("BTE,BT->E", decision.scores, weight), load,
                   -jnp.einsum("BTE,BTE,BT->", shares, logs, weight), jnp.sum(squares * weight), dropped,
                   decision.experts, decision.scores * weight[..., None] if relu else None)


def _average_keys(experts: dict[str, Weight], cfg: config.Dense) -> Float[Array, "D E"]:
    return jnp.mean(dense(experts["gate" if cfg.gated else "up"]), axis=2).T


def _kept(cfg: config.Moe, experts: Int[Array, "B T k"], scores: Float[Array, "B T E"] | None = None) -> Bool[Array, "B T k"]:
    """Which pairs an expert has room for: all first choices before all second ones, and tokens in order; where the capacity is
    prioritized, in that of their highest `scores`."""
    batch, length, k = experts.shape
    match cfg.capacity:
        case config.CapacityTokens(tokens):
            room = tokens
        case config.CapacityFactor(factor):
            room = math.ceil(factor * k * length / cfg.experts)
        case config.CapacityFraction(fraction):
            room = math.ceil(fraction * length)
    back = None
    if isinstance(cfg.capacity, config.CapacityFraction) and cfg.capacity.prioritized:
        order = jnp.argsort(-jnp.max(scores, axis=-1), axis=1)
        experts, back = jnp.take_along_axis(experts, order[..., None], axis=1), jnp.argsort(order, axis=1)
    ranked = experts.transpose(0, 2, 1).reshape(batch, k * length)
    chosen = jax.nn.one_hot(ranked, cfg.experts, dtype=jnp.int32)
    place = jnp.sum(jnp.cumsum(chosen, axis=1) * chosen, axis=-1)
    kept = ((place > 0) & (place <= room)).reshape(batch, k, length).transpose(0, 2, 1)
    return kept if back is None else jnp.take_along_axis(kept, back[..., None], axis=1)


def _rescaled(weights: Float[Array, "B T k"], kept: Bool[Array, "B T k"]) -> Float[Array, "B T k"]:
    """Weights of which those that are kept sum to what all did."""
    whole, rest = (jnp.sum(one, axis=-1, keepdims=True) for one in (weights, jnp.where(kept, weights, 0)))
    return weights * jnp.where(rest > 0, whole / jnp.where(rest > 0, rest, 1.0), 1.0)


def _expert_choice(experts: dict[str, Weight], cfg: config.Moe, x: Float[Array, "B T D"],
                   scores: Float[Array, "B T E"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
    """Every expert's best tokens of a row (those of negative score are none), and which they are."""
    length = x.shape[1]
    room = min(math.ceil(cfg.router.capacity * length / cfg.experts), length)
    best, where = jax.lax.top_k(scores.transpose(0, 2, 1), room)
    taken = jnp.where((best >= 0)[..., None], jax.nn.one_hot(where, length, dtype=jnp.float32), 0)
    slots = jnp.einsum("BECT,BTD->EBCD", taken.astype(x.dtype), x)
    flat = slots.reshape(cfg.experts, -1, x.shape[2])
    made = jax.vmap(lambda weights, rows: feedforward.apply(weights, cfg.expert, rows[None])[0])(experts, flat)
    back = taken * jnp.maximum(best, 0)[..., None]
    out = jnp.einsum("BECT,EBCD->BTD", back.astype(x.dtype), made.reshape(slots.shape))
    return out, jnp.sum(taken, axis=2).transpose(0, 2, 1)


def _all(experts: dict[str, Weight], cfg: config.Dense, x: Float[Array, "B T D"],
         weights: Float[Array, "B T E"]) -> Float[Array, "B T D"]:
    """All experts side by side, as the one wide layer that they are, each one's part weighed."""
    def project(name: str) -> Array:
        y = einsum("BTD,EDF->BTEF", x, experts[name])
        return y + experts[f"{name}_bias"].astype(y.dtype)[None, None] if cfg.bias else y

    hidden = feedforward.hidden(cfg, project("up"), project("gate") if cfg.gated else None)
    weights = weights.astype(x.dtype)
    out = einsum("BTEF,EFD->BTD", hidden * weights[..., None], experts["down"])
    return out + jnp.einsum("BTE,ED->BTD", weights, experts["down_bias"].astype(x.dtype)) if cfg.bias else out


def reference(params: dict[str, Any], cfg: config.Dense, x: Float[Array, "B T D"], experts: Int[Array, "B T k"],
              weights: Float[Array, "B T k"]) -> Float[Array, "B T D"]:
    """What `jaxlm.layers.exchange.apply` computes, with every expert for every token: the definition, for tests."""
    count = params["up"].shape[0]
    shares = jnp.sum(jax.nn.one_hot(experts, count) * weights[..., None], axis=2)
    return _all(params, cfg, x, shares)

"""Routers: which experts a token goes to, and with what weights.

`apply` gives a `Decision` for token choice: `experts` and `weights` of each token, sorted by nothing. `config.ExpertChoice` and
`config.ReluNorm` decide otherwise: `scores` is all they need (see `jaxlm.layers.moe`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.layers import norm
from jaxlm.layers.mask import Context
from jaxlm.params import Param, zeros
from jaxlm.weight import dense, einsum

EXACT = jax.lax.Precision.HIGHEST  # a TPU's float32 products are bfloat16's unless told otherwise


class Decision(NamedTuple):
    """What a router says.

    Attributes:
      experts: int32 [B, T, k], or None where experts choose or all take part.
      weights: float32 [B, T, k], those of `experts`; or None.
      scores: float32 [B, T, E]: probabilities where the router has some, of which losses and statistics are made.
      logits: float32 [B, T, E] before the softmax or sigmoid; zeros where there are none.
    """

    experts: Int[Array, "B T k"] | None
    weights: Float[Array, "B T k"] | None
    scores: Float[Array, "B T E"]
    logits: Float[Array, "B T E"]


def spec(cfg: config.Moe, width: int) -> dict[str, Any]:
    """The router's own weights: `product` [D, E] and what the kind needs beside; hashes and average keys have none."""
    match cfg.router:
        case config.TopK() as choice:
            return _linear(choice, width, cfg.experts)
        case config.Recurrent(width=state, choice=choice):
            return _linear(choice, state, cfg.experts) | {"projection": Param((width, state), ("embed", None), inputs=(0,))}
        case config.ReluNorm(norm=kind):
            return {"product": Param((width, cfg.experts), ("embed", None), inputs=(0,)), "norm": norm.spec(kind, cfg.experts)}
        case config.ExpertChoice():
            return {"product": Param((width, cfg.experts), ("embed", None), inputs=(0,))}
    return {}


def _linear(choice: config.TopK, width: int, experts: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"product": Param((width, experts), ("embed", None), inputs=(0,))}
    if choice.bias:
        tree["bias"] = Param((experts,), (None,), zeros)
    if choice.correction:
        tree["correction"] = Param((experts,), (None,), zeros)
    return tree


def shared_spec(cfg: config.Recurrent) -> dict[str, Param]:
    """The GRU that all layers of a stack share: `input` and `state` [P, 3, P] for its reset and update gates and its
    candidate, biases [3, P] each."""
    size = cfg.width
    tree = {name: Param((size, 3, size), (None, None, None), inputs=(0,)) for name in ("input", "state")}
    return tree | {f"{name}_bias": Param((3, size), (None, None), zeros) for name in ("input", "state")}


def gru(params: dict[str, Any], x: Float[Array, "B T P"], state: Float[Array, "B T P"]) -> Float[Array, "B T P"]:
    """One step of a gated recurrent unit, as PyTorch's GRUCell has it. https://arxiv.org/abs/1406.1078"""
    fed, kept = (einsum("BTP,PGQ->BTGQ", y, params[name]) + params[f"{name}_bias"].astype(y.dtype)[None, None]
                 for y, name in ((x, "input"), (state, "state")))
    reset, update = (jax.nn.sigmoid(fed[:, :, i] + kept[:, :, i]) for i in range(2))
    fresh = jnp.tanh(fed[:, :, 2] + reset * kept[:, :, 2])
    return (1 - update) * fresh + update * state


def apply(params: dict[str, Any], cfg: config.Moe, x: Float[Array, "B T D"], context: Context,
          state: Float[Array, "B T P"] | None, keys: Float[Array, "D E"] | None) -> tuple[Decision, Array | None]:
    """The decision for every token, and the state that the next layer's router reads.

    Args:
      state: of a `config.Recurrent` router.
      keys: of a `config.AverageKey` router, the mean of each expert's keys.

    Raises:
      ValueError: for a hash of tokens where the model was given embeddings, and a recurrent router outside of a stack.
    """
    match cfg.router:
        case config.TopK() as choice:
            return _choose(params, choice, _logits(params, x)), state
        case config.Recurrent(choice=choice):
            if state is None or context.routing is None:
                raise ValueError("a Recurrent router reads a state that layers hand on, with weights that they share: run its "
                                 "block as part of a stack")
            read = einsum("BTD,DP->BTP", x, params["projection"])
            state = gru(context.routing, read, state.astype(x.dtype))
            return _choose(params, choice, _logits(params, state)), state
        case config.ReluNorm(norm=kind):
            logits = _logits(params, x)
            return Decision(None, None, norm.apply(params["norm"], kind, jax.nn.relu(logits)), logits), state
        case config.ExpertChoice():
            logits = _logits(params, x)
            return Decision(None, None, jax.nn.softmax(logits, axis=-1), logits), state
        case config.AverageKey(k=k):
            logits = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), keys.astype(jnp.float32), precision=EXACT)
            experts = jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]
            return Decision(experts, jnp.ones(experts.shape, jnp.float32), jax.nn.softmax(logits, axis=-1), logits), state
        case config.Hash(k=k, seed=seed):
            if context.tokens is None:
                raise ValueError("a Hash router reads token ids, and this model was given embeddings")
            experts = _hashed(context.tokens, k, seed, cfg.experts)
            share = jnp.full(experts.shape, 1 / k, jnp.float32)
            scores = jnp.sum(jax.nn.one_hot(experts, cfg.experts) * share[..., None], axis=2)
            return Decision(experts, share, scores, jnp.zeros_like(scores)), state


def _logits(params: dict[str, Any], x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    """Float32, on TPUs too: a choice between near scores should not depend on how they were rounded."""
    logits = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), dense(params["product"]).astype(jnp.float32), precision=EXACT)
    return logits + params["bias"].astype(jnp.float32)[None, None] if "bias" in params else logits


def _choose(params: dict[str, Any], cfg: config.TopK, logits: Float[Array, "B T E"]) -> Decision:
    if cfg.score is config.Score.SIGMOID:
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
    else:
        scores = probabilities = jax.nn.softmax(logits, axis=-1)
    ranked = jax.lax.stop_gradient(scores)
    if cfg.correction:
        ranked = ranked + jax.lax.stop_gradient(params["correction"]).astype(jnp.float32)[None, None]
    if cfg.groups is not None:
        ranked = _within_groups(cfg.groups, ranked)
    experts = jax.lax.top_k(ranked, cfg.k)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if cfg.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Decision(experts, weights * cfg.scale, probabilities, logits)


def _within_groups(cfg: config.ExpertGroups, ranked: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Scores outside the best groups made the lowest."""
    groups = ranked.reshape(*ranked.shape[:2], cfg.count, -1)
    best = jnp.sum(jax.lax.top_k(groups, cfg.best)[0], axis=-1)
    chosen = jax.lax.top_k(best, cfg.chosen)[1]
    inside = jnp.any(jax.nn.one_hot(chosen, cfg.count, dtype=bool), axis=-2)
    return jnp.where(inside[..., None], groups, -jnp.inf).reshape(ranked.shape)


def _hashed(tokens: Int[Array, "B T"], k: int, seed: int, experts: int) -> Int[Array, "B T k"]:
    """`k` different experts by a token's id, evenly: murmur3's last steps over the id and the seed, then equal strides."""
    x = tokens.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x7F4A7C15) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    first = ((x ^ (x >> 16)) % jnp.uint32(experts)).astype(jnp.int32)
    strides = jnp.array([i * experts // k for i in range(k)], jnp.int32)
    return (first[..., None] + strides[None, None]) % experts

"""The experts' part of a mixture: tokens to their experts, through them, and back.

On one device: pairs of a token and an expert sorted by expert, products by group, outputs summed by token. On a mesh this runs
in `shard_map`. Experts are split over the axis "expert" and their widths over "model"; over "fsdp" they are gathered, as all
weights are. Where the tokens too are split over "expert", they travel to their experts' devices and back by all-to-all: in
rounds of a bounded number of rows to each device, further ones only while some device has rows left, so that nothing is dropped
however uneven the load is. Where they are not (a decoding batch that does not divide), every device computes what its
experts have to add, and the sums are added up.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm import config, sharding
from jaxlm.layers import feedforward, grouped
from jaxlm.weight import Weight

LATER_ROUNDS = "later_rounds"
FEW = 8  # pairs of a token and an expert that a CPU does not sort: for one token there is nothing to gain
SLACK = 1.5  # rows to a device in one round, in even shares: one round does unless a device gets half as many again


def apply(params: dict[str, Weight], cfg: config.Moe, x: Float[Array, "B T D"], experts: Int[Array, "B T k"],
          weights: Float[Array, "B T k"]) -> Float[Array, "B T D"]:
    """The weighed sum of every token's experts.

    Args:
      params: one expert's weights, stacked along a leading axis.
      experts: E or more for no expert.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local(params, cfg, x, experts, weights)
    rows = sharding.partition(sharding.ACTIVATIONS, x.shape, mesh.shape)
    parts = mesh.shape.get("expert", 1)
    if cfg.experts % parts:
        raise ValueError(f"{cfg.experts} experts cannot be split over an expert axis of {parts} devices")
    specs = {name: _weight_spec(name, leaf, cfg, mesh.shape) for name, leaf in params.items()}
    body = partial(_travelling if "expert" in sharding.names(rows) else _partial, cfg=cfg, parts=parts,
                   axes=tuple(sorted(sharding.names(rows))),
                   model=any("model" in sharding.names(spec) for spec in jax.tree.leaves(
                       specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))))
    return jax.shard_map(body, in_specs=(specs, rows, rows, rows), out_specs=rows, check_vma=False)(params, x, experts, weights)


def _weight_spec(name: str, leaf: Weight, cfg: config.Moe, sizes: Any) -> Any:
    """How a device holds an expert's weight while it computes: over "fsdp" it is gathered."""
    axes = {"up": ("experts", None, "mlp"), "gate": ("experts", None, "mlp"), "down": ("experts", "mlp", None),
            "up_bias": ("experts", "mlp"), "gate_bias": ("experts", "mlp"), "down_bias": ("experts", None)}[name]
    return jax.tree.map(lambda array: sharding.partition(axes, array.shape, sizes), leaf)


def _one(params: dict[str, Weight], cfg: config.Dense, rows: Float[Array, "R D"], first: Any) -> Float[Array, "R D"]:
    """Rows through one expert. `first`: whether this device adds the last product's bias."""
    if cfg.bias:
        params = params | {"down_bias": jnp.where(first, params["down_bias"], 0)}
    return feedforward.apply(params, cfg, rows[None])[0]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _mlp(params: dict[str, Weight], cfg: config.Dense, rows: Float[Array, "R D"], sizes: Int[Array, "E"],
         first: Any) -> Float[Array, "R D"]:
    """Each row through the expert of its group. A CPU that needs no gradient takes a tile of rows through all of an expert."""
    def looped(params: Any, rows: Array, sizes: Array, first: Array) -> Array:
        return grouped.each(lambda own, part, _: _one(own, cfg, part, first), params, rows, sizes)

    return jax.lax.platform_dependent(params, rows, sizes, first, cpu=looped,
                                      default=lambda params, *rest: _by_products(params, cfg, *rest))


def _mlp_forward(params: Any, cfg: config.Dense, rows: Array, sizes: Array, first: Array) -> Any:
    out, back = jax.vjp(lambda params, rows: _by_products(params, cfg, rows, sizes, first), params, rows)
    return out, (back, sizes)


def _mlp_backward(cfg: config.Dense, kept: Any, given: Array) -> Any:
    back, sizes = kept
    return (*back(given), np.zeros(sizes.shape, jax.dtypes.float0), np.zeros((), jax.dtypes.float0))


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _by_products(params: dict[str, Weight], cfg: config.Dense, rows: Float[Array, "R D"], sizes: Int[Array, "E"],
                 first: Any) -> Float[Array, "R D"]:
    """`_mlp` one product after the other."""
    group = grouped.groups_of(sizes, rows.shape[0]) if cfg.bias else None

    def project(rows: Array, name: str) -> Array:
        y = grouped.product(rows, params[name], sizes)
        if not cfg.bias:
            return y
        bias = params[f"{name}_bias"]
        if name == "down":
            bias = jnp.where(first, bias, 0)
        # In float32, for its gradient: that is a sum over rows.
        return y + jnp.take(bias.astype(jnp.float32), group, axis=0, mode="fill", fill_value=0).astype(y.dtype)

    hidden = feedforward.hidden(cfg, project(rows, "up"), project(rows, "gate") if cfg.gated else None)
    return project(hidden, "down")


def _local(params: dict[str, Weight], cfg: config.Moe, x: Array, experts: Array, weights: Array, start: Any = 0,
           first: Any = True) -> Array:
    """`apply` for the experts that this device holds, from number `start` on."""
    first = jnp.asarray(first)
    own = experts - start
    own = jnp.where((own >= 0) & (own < params["up"].shape[0]), own, params["up"].shape[0])
    if experts.size > FEW:
        return _sorted(params, cfg, x, own, weights, first)
    return _few(params, cfg, x, own, weights, first)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _few(params: dict[str, Weight], cfg: config.Moe, x: Array, experts: Array, weights: Array, first: Array) -> Array:
    """`_sorted`; a CPU that needs no gradient takes so few pairs one after the other as they come."""
    def paired(params: Any, x: Array, experts: Array, weights: Array, first: Array) -> Array:
        tokens, flat, shares = x.reshape(-1, x.shape[-1]), experts.reshape(-1), weights.reshape(-1).astype(x.dtype)

        def step(i: Array, out: Array) -> Array:
            token = i // experts.shape[-1]
            own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, flat[i], 0, keepdims=False), params)
            made = _one(own, cfg.expert, jax.lax.dynamic_slice_in_dim(tokens, token, 1), first)
            before = jax.lax.dynamic_slice_in_dim(out, token, 1)
            added = jnp.where(flat[i] < params["up"].shape[0], before + shares[i] * made, before)
            return jax.lax.dynamic_update_slice_in_dim(out, added, token, 0)

        return jax.lax.fori_loop(0, flat.shape[0], step, jnp.zeros_like(tokens)).reshape(x.shape)

    return jax.lax.platform_dependent(params, x, experts, weights, first, cpu=paired,
                                      default=lambda params, *rest: _sorted(params, cfg, *rest))


def _few_forward(params: Any, cfg: config.Moe, x: Array, experts: Array, weights: Array, first: Array) -> Any:
    out, back = jax.vjp(lambda params, x, weights: _sorted(params, cfg, x, experts, weights, first), params, x, weights)
    return out, (back, experts)


def _few_backward(cfg: config.Moe, kept: Any, given: Array) -> Any:
    back, experts = kept
    params, x, weights = back(given)
    return params, x, np.zeros(experts.shape, jax.dtypes.float0), weights, np.zeros((), jax.dtypes.float0)


_few.defvjp(_few_forward, _few_backward)


def _sorted(params: dict[str, Weight], cfg: config.Moe, x: Array, experts: Array, weights: Array, first: Array) -> Array:
    """Pairs of a token and an expert sorted by expert, through it, and summed by token."""
    k, count, flat = experts.shape[-1], params["up"].shape[0], experts.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=count).astype(jnp.int32)
    made = _mlp(params, cfg.expert, jnp.take(x.reshape(-1, x.shape[-1]), order // k, axis=0), sizes, first)
    # Rows of no expert are zero, so their weights do not matter.
    back = jnp.take(made, jnp.argsort(order), axis=0).reshape(*experts.shape, x.shape[-1])
    return jnp.einsum("BTKD,BTK->BTD", back, weights.astype(x.dtype))


def _partial(params: dict[str, Weight], x: Array, experts: Array, weights: Array, *, cfg: config.Moe, parts: int,
             model: bool, axes: tuple[str, ...]) -> Array:
    """Every device of the expert axis has the same tokens, and adds what its own experts make of them."""
    start = jax.lax.axis_index("expert") * (cfg.experts // parts) if parts > 1 else 0
    first = jax.lax.axis_index("model") == 0 if model else True
    out = _local(params, cfg, x, experts, weights, start, first)
    summed = (("expert",) if parts > 1 else ()) + (("model",) if model else ())
    return jax.lax.psum(out, summed) if summed else out


def _travelling(params: dict[str, Weight], x: Array, experts: Array, weights: Array, *, cfg: config.Moe, parts: int,
                model: bool, axes: tuple[str, ...]) -> Array:
    """Tokens are split over the expert axis: they go to their experts and come back."""
    k, width, own = experts.shape[-1], x.shape[-1], cfg.experts // parts
    tokens, flat = x.reshape(-1, width), experts.reshape(-1)
    pairs = flat.shape[0]
    order = jnp.argsort(flat)
    ranked = flat[order]
    there = jnp.minimum(ranked // own, parts)  # the device that holds it; `parts` where there is none
    counts = jnp.bincount(there, length=parts)
    place = jnp.arange(pairs) - (jnp.cumsum(counts) - counts)[jnp.minimum(there, parts - 1)]  # among those that go there
    room = min(pairs, max(math.ceil(SLACK * pairs / parts), 1))
    rounds = -(-pairs // room)
    first = jax.lax.axis_index("model") == 0 if model else jnp.asarray(True)

    def go(params: dict[str, Weight], tokens: Array, share: Array, routes: tuple[Array, ...], lap: Array) -> Array:
        """What one round adds to the tokens' outputs, float32."""
        flat, order, there, place, first = routes
        now = (place >= lap * room) & (place < (lap + 1) * room) & (there < parts)
        slot = jnp.where(now, there * room + place - lap * room, parts * room)
        pair = jnp.full(parts * room, pairs, order.dtype).at[slot].set(order, mode="drop")
        here = pair < pairs
        sent = jnp.where(here[:, None], jnp.take(tokens, pair // k, axis=0, mode="clip"), 0)
        wanted = jnp.where(here, jnp.take(flat, pair, mode="clip") % own, own)
        rows, wanted = (jax.lax.all_to_all(y, "expert", 0, 0, tiled=True) for y in (sent, wanted))
        sort = jnp.argsort(wanted)
        sizes = jnp.bincount(wanted, length=own).astype(jnp.int32)
        made = _mlp(params, cfg.expert, jnp.take(rows, sort, axis=0), sizes, first)
        made = jnp.take(made, jnp.argsort(sort), axis=0)
        if model:
            made = jax.lax.psum(made, "model")
        made = jax.lax.all_to_all(made, "expert", 0, 0, tiled=True).astype(jnp.float32)
        made = made * jnp.take(share.astype(jnp.float32), pair, mode="fill", fill_value=0)[:, None]
        return jnp.zeros(tokens.shape, jnp.float32).at[jnp.where(here, pair // k, tokens.shape[0])].add(made, mode="drop")

    routes, share = (flat, order, there, place, first), weights.reshape(-1)
    out = jax.checkpoint(go)(params, tokens, share, routes, jnp.zeros((), jnp.int32))
    if rounds > 1:
        most = jax.lax.pmax(jnp.max(counts[:parts]), axes)
        out = out + _later(go, params, tokens, share, routes, -(-most // room))
    return out.astype(x.dtype).reshape(x.shape)


Round = Callable[..., Array]  # see `go` above


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later(go: Round, params: dict[str, Weight], tokens: Array, share: Array, routes: tuple[Array, ...],
           rounds: Array) -> Array:
    """The sum of all rounds but the first. An even load has none: neither they nor their gradients then take any time, and
    nothing of them is kept."""
    with jax.named_scope(LATER_ROUNDS):  # `infer.hlo` knows them by it
        return jax.lax.fori_loop(1, rounds, lambda lap, out: out + go(params, tokens, share, routes, lap),
                                 jnp.zeros(tokens.shape, jnp.float32))


def _later_forward(go: Round, *given: Any) -> Any:
    return _later(go, *given), given


def _later_backward(go: Round, kept: Any, given: Array) -> Any:
    *learned, routes, rounds = kept
    leaves, tree = jax.tree.flatten(tuple(learned))
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]  # of 8-bit weights the scales

    def lap(number: Array, sums: list[Array]) -> list[Array]:
        def again(*some: Array) -> Array:
            every = list(leaves)
            for i, leaf in zip(floats, some, strict=True):
                every[i] = leaf
            return go(*jax.tree.unflatten(tree, every), routes, number)

        back = jax.vjp(again, *(leaves[i] for i in floats))[1]
        return [total + one for total, one in zip(sums, back(given), strict=True)]

    with jax.named_scope(LATER_ROUNDS):
        sums = jax.lax.fori_loop(1, rounds, lap, [jnp.zeros_like(leaves[i]) for i in floats])
    found = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    for i, total in zip(floats, sums, strict=True):
        found[i] = total
    # A constant among them may have become a number.
    nothing = jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), jax.dtypes.float0), (routes, rounds))
    return (*jax.tree.unflatten(tree, found), *nothing)


_later.defvjp(_later_forward, _later_backward)

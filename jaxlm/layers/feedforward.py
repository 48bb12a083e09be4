"""The dense feed-forward layer, gated or plain."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.params import Param, zeros
from jaxlm.weight import einsum

ACTIVATIONS = {
    config.Activation.SILU: jax.nn.silu,
    config.Activation.GELU: partial(jax.nn.gelu, approximate=False),
    config.Activation.GELU_TANH: partial(jax.nn.gelu, approximate=True),
    config.Activation.RELU: jax.nn.relu,
    config.Activation.SQUARED_RELU: lambda x: jnp.square(jax.nn.relu(x)),
    config.Activation.TANH: jnp.tanh,
    config.Activation.QUICK_GELU: lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def spec(cfg: config.Dense, width: int) -> dict[str, Param]:
    """up and, when gated, gate [D, F]; down [F, D]; their biases where configured."""
    names = ("gate", "up") if cfg.gated else ("up",)
    tree = {name: Param((width, cfg.width), ("embed", "mlp"), inputs=(0,)) for name in names}
    tree["down"] = Param((cfg.width, width), ("mlp", "embed"), inputs=(0,))
    if cfg.bias:
        tree |= {f"{name}_bias": Param((cfg.width,), ("mlp",), zeros) for name in names}
        tree["down_bias"] = Param((width,), (None,), zeros)
    return tree


def hidden(cfg: config.Dense, up: Float[Array, "..."], gate: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """What `down` reads, of the products with `up` and, when gated, `gate`."""
    activation = ACTIVATIONS[cfg.activation]
    if gate is None:
        return activation(up)
    if cfg.clip is not None:
        gate, up = jnp.minimum(gate, cfg.clip), jnp.clip(up, -cfg.clip, cfg.clip)
    if cfg.offset:
        up = up + jnp.asarray(cfg.offset, up.dtype)
    return activation(gate) * up


def apply(params: dict[str, Any], cfg: config.Dense, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""
    def project(equation: str, x: Array, name: str) -> Array:
        y = einsum(equation, x, params[name])
        return y + params[f"{name}_bias"].astype(y.dtype)[None, None] if cfg.bias else y

    up = project("BTD,DF->BTF", x, "up")
    gate = project("BTD,DF->BTF", x, "gate") if cfg.gated else None
    return project("BTF,FD->BTD", hidden(cfg, up, gate), "down")

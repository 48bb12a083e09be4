"""The decoder of benchmarks/train.py as a JAX user would write it by hand: no library but optax, layers unrolled.

What a training library must not be slower than. Reads the Hugging Face weights that the other engines read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from safetensors import numpy as safetensors

HEAD = 64  # width


def rms_norm(x: Array, scale: Array) -> Array:
    """Of the last dimension."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x: Array) -> Array:
    """Rotary positions of [B, T, N, H]."""
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** -(jnp.arange(HEAD // 2) * 2 / HEAD)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def forward(params: dict[str, Array], tokens: Array) -> Array:
    """Logits [B, T, V]; weights [out, in] by their Hugging Face names."""
    x = params["model.embed_tokens.weight"][tokens]
    layers = 1 + max(int(name.split(".")[2]) for name in params if ".layers." in name)
    for i in range(layers):
        w = {name.removeprefix(f"model.layers.{i}."): value for name, value in params.items()}
        y = rms_norm(x, w["input_layernorm.weight"])
        q, k, v = ((y @ w[f"self_attn.{name}_proj.weight"].T).reshape(*y.shape[:2], -1, HEAD) for name in "qkv")
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + y.reshape(x.shape) @ w["self_attn.o_proj.weight"].T
        y = rms_norm(x, w["post_attention_layernorm.weight"])
        y = jax.nn.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
    return rms_norm(x, params["model.norm.weight"]) @ params["model.embed_tokens.weight"].T


def trainer(folder: str, rate: float, decay: float, clip: float) -> tuple[Any, Callable[[Any, Array], tuple[Any, Array]]]:
    """The state of training, and its step: (state, tokens [B, T + 1]) to (state, loss)."""
    params = {name: jnp.asarray(value) for name, value in safetensors.load_file(f"{folder}/model.safetensors").items()}
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, b2=0.95, weight_decay=decay))

    def loss(params: dict[str, Array], tokens: Array) -> Array:
        logits = forward(params, tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(state: Any, tokens: Array) -> tuple[Any, Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return (params, optimizer.init(params)), jax.jit(step, donate_argnums=0)

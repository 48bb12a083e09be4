"""What a weight can be, and the only three things that layers do with one: `einsum`, `take`, `dense`.

A weight is a leaf: a plain array or `Int8`. Layers never ask which. Turning one kind into another is a function from
tree to tree, and new kinds are added here alone.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Int8:
    """An 8-bit weight: values * scale, where scale has size 1 along the dimensions that share it.

    Attributes:
      values: int8, the weight's own shape.
      scale: float, same rank, 1 along each dimension that products sum over.
    """

    values: Int[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The weight's own rank."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """What `dense` gives."""
        return self.scale.dtype


Weight = Array | Int8


def is_weight(leaf: Any) -> bool:
    """Whether a node of a parameter tree is one whole weight: for `jax.tree.map(..., is_leaf=is_weight)`."""
    return isinstance(leaf, Int8)


def quantize(w: Float[Array, "..."], inputs: tuple[int, ...]) -> Int8:
    """Rounds to 8 bits, symmetric, one scale for all numbers that differ only along `inputs`.

    Example:
      >>> q = quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), inputs=(0,))
      >>> q.scale.shape, float(jnp.max(jnp.abs(dense(q) - jnp.array([[1.0, -2.0], [0.5, 4.0]])))) < 0.02
      ((1, 2), True)
    """
    top = jnp.max(jnp.abs(w), axis=inputs, keepdims=True)
    scale = jnp.where(top > 0, top / 127, jnp.ones_like(top))
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale)


def dense(w: Weight) -> Float[Array, "..."]:
    """The weight as a plain array."""
    if isinstance(w, Int8):
        return w.values.astype(w.scale.dtype) * w.scale
    return w


# Products of so few rows XLA:CPU computes faster with them as columns, which sends it to another library: 30 layers of width
# 576 and ff 1536, in ms: 2 rows 13.8 -> 13.2, 4: 15.1 -> 13.4, 8: 16.1 -> 13.3, 16: 20.0 -> 14.7, 24: 24.3 -> 21.1, 32: no
# gain; its head of 49152: 2: 4.1 -> 3.2, 8: 4.7 -> 3.6, 16: 5.7 -> 4.3 (jax 0.10.2).
_THIN = 24


def _whole() -> bool:
    """Whether arrays lie on one device: reshaped, split ones could lose how they are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _product(equation: str, x: Float[Array, "..."], w: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """`jnp.einsum` as one dot_general with its sums in the weight's own order: einsum may sort them, and so copy the weight."""
    operands, out = equation.split("->")
    left, right = operands.split(",")
    summed = [letter for letter in right if letter in left and letter not in out]
    if "".join(c for c in left if c not in summed) + "".join(c for c in right if c not in summed) != out:
        return jnp.einsum(equation, x, w, preferred_element_type=dtype)
    where = (tuple(left.index(c) for c in summed), tuple(right.index(c) for c in summed))
    kept = [i for i in range(x.ndim) if i not in where[0]]
    shape = [x.shape[i] for i in kept] + [w.shape[i] for i in range(w.ndim) if i not in where[1]]
    rows = math.prod(x.shape[i] for i in kept)
    first, last = right.startswith("".join(summed)), right.endswith("".join(summed))

    def plain(x: Array, w: Array) -> Array:
        if first and left.endswith("".join(summed)) and rows > 1 and _whole():
            # Of two dimensions, so that the weight's gradient is: of three, XLA:CPU transposes the larger operand for it, with
            # all that makes that operand computed in the wrong order. Steps of 16 x 256 tokens: 1.4 to 1.7 times as fast.
            product = jax.lax.dot_general(x.reshape(rows, -1), w.reshape(x.size // rows, -1), (((1,), (0,)), ((), ())),
                                          preferred_element_type=dtype)
            return product.reshape(shape)
        return jax.lax.dot_general(x, w, (where, ((), ())), preferred_element_type=dtype)

    def turned(x: Array, w: Array) -> Array:
        # Only of two dimensions, and with a barrier on its way, is the product left as it is written.
        if first:
            x = jax.lax.optimization_barrier(x.transpose(*where[0], *kept).reshape(-1, rows))
            product = jax.lax.dot_general(x, w.reshape(x.shape[0], -1), (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        else:
            x = x.transpose(*kept, *where[0]).reshape(rows, -1)
            product = jax.lax.dot_general(w.reshape(-1, x.shape[1]), x, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
            product = jax.lax.optimization_barrier(product).T
        return product.reshape(shape)

    if x.dtype == jnp.float32 and 1 < rows <= _THIN and (first or last):
        return jax.lax.platform_dependent(x, w, cpu=turned, default=plain)
    return plain(x, w)


def einsum(equation: str, x: Float[Array, "..."], w: Weight, dtype: Any = None) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, w)` in x's dtype, the result (and what it is summed in) in `dtype` when given.

    Int8 scales are applied to the product, not to the weight, where no summed dimension has a scale of its own: the weight
    then goes through memory as 8 bits.
    """
    if not isinstance(w, Int8):
        return _product(equation, x, w.astype(x.dtype), dtype)
    letters, out = equation.split(",")[1].split("->")
    if any(w.scale.shape[i] != 1 for i, letter in enumerate(letters) if letter not in out):
        return _product(equation, x, dense(w).astype(x.dtype), dtype)
    product = _product(equation, x, w.values.astype(x.dtype), dtype)
    kept = [i for i, letter in enumerate(letters) if letter in out]
    kept.sort(key=lambda i: out.index(letters[i]))
    scale = w.scale.transpose(*kept, *(i for i in range(w.ndim) if i not in kept))
    sizes = {letters[i]: w.scale.shape[i] for i in kept}
    return product * scale.reshape([sizes.get(letter, 1) for letter in out]).astype(product.dtype)


def take(w: Weight, ids: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
    """Rows of an embedding [V, D], in `dtype`. Ids must be within range: see `jaxlm.model.check_tokens`."""
    if isinstance(w, Int8):
        # A single row would become a slice, for which TPU compilers copy the whole table into another layout, every time.
        flat = jnp.broadcast_to(ids.reshape(-1), (2,)) if ids.size == 1 else ids.reshape(-1)
        rows = jnp.take(w.values, flat, axis=0, mode="clip")[:ids.size].reshape(*ids.shape, w.shape[1]).astype(dtype)
        shared = w.scale.shape[0] == 1
        scale = w.scale.reshape((1,) * ids.ndim + w.scale.shape[1:]) if shared else jnp.take(w.scale, ids, axis=0, mode="clip")
        return rows * scale.astype(dtype)
    return jnp.take(w, ids, axis=0, mode="clip").astype(dtype)

"""Checkpoints with weights of 8 bits that share scales by blocks, as DeepSeek-V3 is released, read as what they stand for.

Beside a weight X, of 8-bit floating-point numbers (e4m3) [out, in], lies X_scale_inv, a number for each block of
`weight_block_size`, by which the block is multiplied.

Reference: section 3.3 of https://arxiv.org/abs/2412.19437
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.io.huggingface import HuggingFaceSource
from jaxlm.io.source import Source

SCALE = "_scale_inv"

VALUES = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)  # of every byte


def unpack(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 [out, in] of the weight's bytes, uint8 [out, in], and a scale for each block.

    Example:
      >>> unpack(np.array([[0x38, 0x40, 0x40]], np.uint8), np.array([[2.0, 10.0]], np.float32), (2, 2))
      array([[ 2.,  4., 20.]], dtype=float32)
    """
    rows, columns = block
    numbers = VALUES[weight]
    for i, factors in enumerate(scale.astype(np.float32)):
        numbers[i * rows:(i + 1) * rows] *= np.repeat(factors, columns)[:weight.shape[1]]
    return numbers


class Fp8Source:
    """`source` with what has scales beside it multiplied by them; implements `jaxlm.io.source.Source`.

    Raises:
      ValueError: for numbers of another kind than e4m3, scales that are not by blocks, or weights and scales whose shapes do
        not fit; names the key or the tensor.
    """

    def __init__(self, source: HuggingFaceSource):
        given = source.config["quantization_config"]
        if given.get("fmt", "e4m3") != "e4m3":
            raise ValueError(f"config.json: quantization_config.fmt = {given['fmt']!r} is not supported: it must be 'e4m3'")
        block = given.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
            raise ValueError(f"config.json: quantization_config.weight_block_size = {block!r} is not supported: two sizes are "
                             "needed, [128, 128] as DeepSeek-V3 has; save the model in bfloat16 with transformers instead")
        self.config: dict[str, Any] = {key: value for key, value in source.config.items() if key != "quantization_config"}
        self._block, self._source = (block[0], block[1]), source
        names = source.names()
        self._packed = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)} & names
        self._names = names - {name + SCALE for name in self._packed}
        for name in self._packed:
            shape, scales = source.shape(name), source.shape(name + SCALE)
            wanted = tuple(-(-size // part) for size, part in zip(shape, block, strict=False))
            if len(shape) != 2 or scales != wanted:
                raise ValueError(f"tensor {name} has shape {shape}, and {name + SCALE} {scales}: needed are [out, in] and a "
                                 f"number for each block of {block}")

    def names(self) -> set[str]:
        """The tensors' names."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._source.shape(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor, one with scales in float32."""
        if name not in self._packed:
            return self._source.read(name)
        return unpack(self._source.bytes(name), self._source.read(name + SCALE), self._block)


def unpacked(source: Source) -> Source:
    """The source, or what it stands for where its config.json says that it has such weights."""
    given = source.config.get("quantization_config")
    if isinstance(source, HuggingFaceSource) and isinstance(given, dict) and given.get("quant_method") == "fp8":
        return Fp8Source(source)
    return source

"""Checkpoints with MXFP4 weights, as GPT-OSS is released, read as what they stand for.

A weight X of all experts is two tensors: X_blocks, uint8 [E, out, in / 32, 16], with two numbers of 4 bits to a byte, the first
in the low bits; and X_scales, uint8 [E, out, in / 32], an exponent for every 32 numbers. Here each expert's matrix [out, in] is
a tensor of its own, "X.0" for the first, so that no more of them than are read at once are unpacked at a time.

Reference: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1;
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

import re
from typing import Any

import numpy as np

from jaxlm.io.huggingface import HuggingFaceSource

BLOCKS, SCALES = "_blocks", "_scales"

# A sign, two bits of exponent, one of mantissa.
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
VALUES = np.concatenate([VALUES, -VALUES])
# Both numbers of every byte.
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=-1)

# A scale is an exponent, of which the last is no number.
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [..., 32 * n] of uint8 blocks [..., n, 16] and scales [..., n].

    Example:
      >>> unpack(np.full((1, 16), 0x21, np.uint8), np.array([128], np.uint8))[:4]
      array([1., 2., 1., 2.], dtype=float32)
    """
    with np.errstate(over="ignore"):  # becomes infinity, which a reader refuses
        numbers = PAIRS[blocks].reshape(*scales.shape, -1) * POWERS[scales][..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


class Mxfp4Source:
    """`source` with what is packed in it unpacked; implements `jaxlm.io.source.Source`.

    Raises:
      ValueError: for blocks without scales, or of other shapes than these; names the tensor.
    """

    def __init__(self, source: HuggingFaceSource):
        self.config: dict[str, Any] = {key: value for key, value in source.config.items() if key != "quantization_config"}
        self._source = source
        names = source.names()
        self._packed = {name.removesuffix(BLOCKS) for name in names if name.endswith(BLOCKS)}
        self._plain = {name for name in names if name.removesuffix(BLOCKS).removesuffix(SCALES) not in self._packed}
        self._experts: dict[str, int] = {}
        for name in self._packed:
            if name + SCALES not in names:
                raise ValueError(f"tensor {name + BLOCKS} has no {name + SCALES} beside it")
            blocks, scales = source.shape(name + BLOCKS), source.shape(name + SCALES)
            if len(blocks) != 4 or blocks != (*scales, 16):
                raise ValueError(f"tensor {name + BLOCKS} has shape {blocks}, and {name + SCALES} {scales}: needed are "
                                 "[experts, out, in / 32, 16] and [experts, out, in / 32]")
            self._experts[name] = blocks[0]

    def names(self) -> set[str]:
        """The tensors' names."""
        return self._plain | {f"{name}.{e}" for name, count in self._experts.items() for e in range(count)}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        if name in self._plain:
            return self._source.shape(name)
        _, out, blocks = self._source.shape(self._split(name)[0] + SCALES)
        return out, 32 * blocks

    def read(self, name: str) -> np.ndarray:
        """A tensor, one that was packed in float32."""
        if name in self._plain:
            return self._source.read(name)
        packed, e = self._split(name)
        return unpack(self._source.row(packed + BLOCKS, e), self._source.row(packed + SCALES, e))

    def _split(self, name: str) -> tuple[str, int]:
        packed, e = re.fullmatch(r"(.+)\.(\d+)", name).groups()
        return packed, int(e)


def unpacked(source: HuggingFaceSource) -> HuggingFaceSource | Mxfp4Source:
    """The source, or what it stands for where its config.json says that it is packed as MXFP4."""
    given = source.config.get("quantization_config")
    if isinstance(given, dict) and given.get("quant_method") == "mxfp4":
        return Mxfp4Source(source)
    return source

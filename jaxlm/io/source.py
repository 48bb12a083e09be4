"""`Source`: anything that tensors and a config can be read from, under Hugging Face's names."""

from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """A checkpoint as `jaxlm.io.assemble` reads it. Its methods may be called from several threads at once.

    Attributes:
      config: what config.json holds, or would hold.
    """

    config: dict[str, Any]

    def names(self) -> set[str]:
        """The tensors' names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, float16 or bfloat16; it may be a view of a mapped file."""

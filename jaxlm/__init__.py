"""jaxlm: language models in JAX, as pure functions over a tree of weights."""

from jaxlm.decoding.generate import Generation, generate
from jaxlm.decoding.score import score
from jaxlm.io import load, save
from jaxlm.model import Model, forward

__all__ = ["Generation", "Model", "forward", "generate", "load", "save", "score"]

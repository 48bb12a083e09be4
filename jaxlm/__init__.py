"""jaxlm: language models in JAX, as pure functions over a tree of weights."""

from jaxlm.decoding.beam import Beams, beam_search
from jaxlm.decoding.generate import Generation, generate
from jaxlm.decoding.score import score
from jaxlm.encoding import embed
from jaxlm.io import load, save
from jaxlm.model import Model, forward

__all__ = ["Beams", "Generation", "Model", "beam_search", "embed", "forward", "generate", "load", "save", "score"]

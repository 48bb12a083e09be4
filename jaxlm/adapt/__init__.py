"""From a model to another: what its weights are used for, and as what."""

from jaxlm.adapt.architecture import (
    but_cross_attention,
    decoder_of,
    encoder_of,
    to_decoder,
    to_encoder,
    to_encoder_decoder,
)
from jaxlm.adapt.experts import split, upcycle

__all__ = ["but_cross_attention", "decoder_of", "encoder_of", "split", "to_decoder", "to_encoder", "to_encoder_decoder",
           "upcycle"]

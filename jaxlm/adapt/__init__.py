"""From a model to another: what its weights are used for, and as what."""

from jaxlm.adapt.architecture import (
    but_cross_attention,
    decoder_of,
    encoder_of,
    to_decoder,
    to_encoder,
    to_encoder_decoder,
)

__all__ = ["but_cross_attention", "decoder_of", "encoder_of", "to_decoder", "to_encoder", "to_encoder_decoder"]

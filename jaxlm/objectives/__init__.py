"""What a model is trained to do: from a document to an example, on the host, and from a batch to a loss, on the device."""

from jaxlm.objectives.base import AsPrefix, AsText, Example, Mixture, Mode, Objective, Pair, Schedule, Text, as_text, told
from jaxlm.objectives.causal import CausalLM, PrefixLM
from jaxlm.objectives.cross_entropy import Loss, cross_entropy
from jaxlm.objectives.infilling import CausalSpans, FillInTheMiddle
from jaxlm.objectives.masked import MaskedLM
from jaxlm.objectives.spans import SpanCorruption, ul2

__all__ = ["AsPrefix", "AsText", "CausalLM", "CausalSpans", "Example", "FillInTheMiddle", "Loss", "MaskedLM", "Mixture",
           "Mode", "Objective", "Pair", "PrefixLM", "Schedule", "SpanCorruption", "Text", "as_text", "cross_entropy",
           "told", "ul2"]

"""What a model is trained to do: from a document to an example, on the host, and from a batch to a loss, on the device."""

from jaxlm.objectives.base import (
    AsPrefix,
    AsText,
    Example,
    Mixture,
    Mode,
    Objective,
    Pair,
    Schedule,
    Text,
    as_text,
    sharing,
    told,
)
from jaxlm.objectives.causal import CausalLM, PrefixLM
from jaxlm.objectives.cloze import Cloze, classify
from jaxlm.objectives.contrastive import Contrastive, Momentum, Texts
from jaxlm.objectives.cross_entropy import Loss, cross_entropy
from jaxlm.objectives.dupmae import DupMae
from jaxlm.objectives.e2s2 import E2S2
from jaxlm.objectives.electra import Electra
from jaxlm.objectives.identifiers import DualGeneration, IdentifierTagging, MaskedIdentifiers
from jaxlm.objectives.infilling import CausalSpans, FillInTheMiddle
from jaxlm.objectives.joint import Joint, Reversed
from jaxlm.objectives.masked import MaskedLM
from jaxlm.objectives.matching import Matching
from jaxlm.objectives.routing import RoutingLoss
from jaxlm.objectives.source_target import SourceTarget
from jaxlm.objectives.spans import SpanCorruption, ul2

__all__ = ["AsPrefix", "AsText", "CausalLM", "CausalSpans", "Cloze", "Contrastive", "DualGeneration", "DupMae", "E2S2",
           "Electra", "Example", "FillInTheMiddle", "IdentifierTagging", "Joint", "Loss", "MaskedIdentifiers", "MaskedLM",
           "Matching", "Mixture", "Mode", "Momentum", "Objective", "Pair", "PrefixLM", "Reversed", "RoutingLoss", "Schedule",
           "SourceTarget", "SpanCorruption", "Text", "Texts", "as_text", "classify", "cross_entropy", "sharing", "told", "ul2"]

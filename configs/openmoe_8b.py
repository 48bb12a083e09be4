"""OpenMoE 8B/32E: every sixth of 24 layers has 32 experts, of which a token goes to two, and a layer that all go through.
https://arxiv.org/abs/2402.01739

  python -m train.compile configs/openmoe_8b.py --topology v5p:4x4x4

8.8 billion weights, of which 2.2 billion and the table of 256384 tokens take part in a token's products; the paper says 8.7 and
2.1. Sizes, losses of the routers, capacity and the shares of the denoisers are the released ones. Four things are not, and so
released weights do not fit: the shared layer stands beside the experts, where the released code has it after them, with a norm
of its own; feed-forward layers have the paper's SwiGLU, where the released code multiplies a third product into it, which makes
11.9 billion weights; scores are scaled by 1 / sqrt(128), where the released weights hold that scale; and what comes before a
denoiser's targets is read both ways, not causally. The data is an example: point `phases` and `tokenizer` at your own.
"""

from jaxlm.config import (
    Attention,
    Block,
    CapacityFactor,
    Decoder,
    Dense,
    Embedding,
    Head,
    Moe,
    PreNorm,
    RmsNorm,
    Rope,
    TopK,
    stack_of,
)
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import AsText, Mixture, PrefixLM, RoutingLoss, SpanCorruption
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """The published architecture with umT5's tokens and UL2's denoisers, half of them prefixes; experts split over 8 chips."""
    norm, dense = RmsNorm(1e-6), Dense(8192)
    attention = Attention(heads=24, kv_heads=24, head_width=128, position=Rope(1e4))
    # In training; at inference the released code leaves room for 2.0 times the mean.
    sparse = Moe(32, dense, TopK(2), shared=dense, capacity=CapacityFactor(1.25))
    blocks = [Block(attention, sparse if i % 6 == 5 else dense, PreNorm(norm)) for i in range(24)]
    decoder = Decoder(width=2048, embedding=Embedding(256384), stack=stack_of(blocks), norm=norm, head=Head(tied=True),
                      length=2048)
    sentinels = tuple(range(256099, 255999, -1))
    spans = tuple(SpanCorruption(sentinels, rate, mean, end=1) for rate, mean in (
        (0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.5, 64.0)))
    steps = 500_000
    optimizer = Optimizer(AdamW(), Cosine(peak=3e-4, warmup_steps=10_000, steps=steps, floor=0.1))
    return Recipe(model=decoder, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=AsText(Mixture((PrefixLM(), *spans), (0.5, 0.1, 0.1, 0.1, 0.1, 0.1))), optimizer=optimizer,
                  rows=1024, length=2048, steps=steps, mesh=(("fsdp", 8), ("expert", 8)),
                  routing=RoutingLoss(balance=1e-2, z=1e-4), dtype="bfloat16", remat="full", checkpoint_every=1000)

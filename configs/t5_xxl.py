"""T5 1.1 XXL: 11 billion weights, encoder and decoder of 24 layers, a relative bias shared by all layers of a side.
https://arxiv.org/abs/1910.10683

  python -m train.compile configs/t5_xxl.py --topology v5p:2x2x1
  python -m train.compile configs/t5_xxl.py --topology v5e:4x4

The compiler says: 42.6 of 95.7 GiB on four chips, 11.4 of 15.75 GiB on 16, 1.28 times the model's products
(remat computes a third of them again). The data is an example: point `phases` and `tokenizer` at your own.
"""

from jaxlm.config import (
    Activation,
    Attention,
    Block,
    Decoder,
    Dense,
    Embedding,
    Encoder,
    EncoderDecoder,
    Head,
    PreNorm,
    RelativeBias,
    RmsNorm,
    stack_of,
)
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import SpanCorruption
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """The published architecture, whose weights are loaded with `jaxlm.load`; weights and moments split over all chips."""
    width, heads, norm = 4096, 64, RmsNorm(1e-6)

    def block(bidirectional: bool, cross: Attention | None = None) -> Block:
        position = RelativeBias(buckets=32, distance=128, bidirectional=bidirectional)
        attention = Attention(heads, heads, head_width=64, position=position, causal=not bidirectional, scale=1.0)
        return Block(attention, Dense(10240, Activation.GELU_TANH), PreNorm(norm), cross=cross)

    cross = Attention(heads, heads, head_width=64, position=None, causal=False, scale=1.0, source=width)
    model = EncoderDecoder(
        Encoder(width, Embedding(32128), stack_of([block(True)] * 24), norm, None, length=4096),
        Decoder(width, Embedding(32128), stack_of([block(False, cross)] * 24), norm, Head(tied=False), length=4096), start=(0,))
    spans = SpanCorruption(sentinels=tuple(range(32099, 31999, -1)), end=1)
    steps = 100_000
    optimizer = Optimizer(AdamW(), Cosine(peak=2e-4, warmup_steps=2000, steps=steps, floor=0.1))
    return Recipe(model=model, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=spans, optimizer=optimizer, rows=64, length=128, inputs=512, steps=steps, mesh=(("fsdp", -1),),
                  dtype="bfloat16", remat="full", checkpoint_every=1000)

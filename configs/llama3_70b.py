"""Llama 3.1 70B, to be trained on 256 chips. https://arxiv.org/abs/2407.21783

  python -m train.compile configs/llama3_70b.py --topology v5p:8x8x4

The compiler says: 38.7 of 95.7 GiB, 1.26 times the model's products (remat computes a third of them again), weights gathered
twice. Split over all 256 chips (`--mesh fsdp`) weights take 25.5 GiB, but are gathered as sums of zero-padded parts, which is
twice the traffic: four groups of 64 instead. The data is an example: point `phases` and `tokenizer` at your own; on the slice
the command is

  python -m train configs/llama3_70b.py --distributed.pod
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, Llama3Scaling, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """The published architecture; weights and moments split over all chips, two rows of 4,096 tokens on each."""
    rope = Rope(500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, length=8192))
    attention = Attention(heads=64, kv_heads=8, head_width=128, position=rope)
    block = Block(attention, Dense(28672), PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width=8192, embedding=Embedding(128256), stack=stack_of([block] * 80), norm=RmsNorm(1e-5),
                      head=Head(tied=False), length=131072)
    steps = 100_000
    optimizer = Optimizer(AdamW(), Cosine(peak=1.5e-4, warmup_steps=2000, steps=steps, floor=0.1))
    return Recipe(model=decoder, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=CausalLM(), optimizer=optimizer, rows=512, length=4096, steps=steps,
                  mesh=(("data", 4), ("fsdp", 64)),
                  dtype="bfloat16", remat="full", checkpoint_every=500)

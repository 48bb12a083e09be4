"""Llama 3.1 8B: 32 layers, grouped-query attention, 128k tokens of context. https://arxiv.org/abs/2407.21783

Here to be compiled for TPUs on a machine that has none, decoding and training:

  python -m infer.compile --model configs/llama3_8b.py --topology v5e:2x2 --batch 8 --length 4096
  python -m infer.compile --model configs/llama3_8b.py --topology v6e:1x1 --batch 8 --length 4096 --weights int8
  python -m train.compile configs/llama3_8b.py --topology v5p:2x2x1

The first two fit, and the loop copies nothing of the cache. Of training, on four chips: 34.6 of 95.7 GiB, 1.26 times the
model's products (remat computes a third of them again), weights gathered twice and gradients scattered once a step, in
bfloat16. The data is an example: point `phases` and `tokenizer` at your own.
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, Llama3Scaling, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """The published architecture, whose weights are loaded with `jaxlm.load`; weights and moments split over all chips."""
    rope = Rope(500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, length=8192))
    attention = Attention(heads=32, kv_heads=8, head_width=128, position=rope)
    block = Block(attention, Dense(14336), PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width=4096, embedding=Embedding(128256), stack=stack_of([block] * 32), norm=RmsNorm(1e-5),
                      head=Head(tied=False), length=131072)
    steps = 100_000
    optimizer = Optimizer(AdamW(), Cosine(peak=3e-4, warmup_steps=2000, steps=steps, floor=0.1))
    return Recipe(model=decoder, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=CausalLM(), optimizer=optimizer, rows=8, length=4096, steps=steps, mesh=(("fsdp", -1),),
                  dtype="bfloat16", remat="full", checkpoint_every=1000)

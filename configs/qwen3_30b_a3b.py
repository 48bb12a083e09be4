"""Qwen3 30B-A3B: 128 experts, of which a token goes to 8. https://arxiv.org/abs/2505.09388

  python -m train.compile configs/qwen3_30b_a3b.py --topology v5p:4x4x4
  python -m infer.compile --model configs/qwen3_30b_a3b.py --topology v5e:2x4 --mesh expert=8 --weights int8 --batch 1

The compiler says of training: 15.5 of 95.7 GiB a chip; tokens travel to their experts and back by all-to-all, 108 GiB a step
and chip, experts are gathered over fsdp alone. FLOPs are 1.71 of the model's: remat computes a third of them again, and
kernels count the room that is kept for an uneven load, half as much again, though they compute nothing there. Of decoding with
8-bit experts: 5.2 of 15.75 GiB a chip, no copy of cache or layers, one all-reduce a layer. The data is an example: point
`phases` and `tokenizer` at your own; on the slice the command is

  python -m train configs/qwen3_30b_a3b.py --distributed.pod
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, Moe, PreNorm, QkNorm, RmsNorm, Rope, TopK, stack_of
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM, RoutingLoss
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """The published architecture; experts split over 8 chips, all weights and moments over 8 more."""
    attention = Attention(heads=32, kv_heads=4, head_width=128, position=Rope(1e6), qk_norm=QkNorm(RmsNorm(1e-6)))
    block = Block(attention, Moe(128, Dense(768), TopK(8, normalize=True)), PreNorm(RmsNorm(1e-6)))
    decoder = Decoder(width=2048, embedding=Embedding(151936), stack=stack_of([block] * 48), norm=RmsNorm(1e-6),
                      head=Head(tied=False), length=40960)
    steps = 100_000
    optimizer = Optimizer(AdamW(), Cosine(peak=4e-4, warmup_steps=2000, steps=steps, floor=0.1))
    return Recipe(model=decoder, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=CausalLM(), optimizer=optimizer, rows=128, length=4096, steps=steps,
                  mesh=(("fsdp", 8), ("expert", 8)), routing=RoutingLoss(balance=1e-3),
                  dtype="bfloat16", remat="full", checkpoint_every=500)

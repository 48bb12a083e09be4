"""Llama 3.1 8B: 32 layers, grouped-query attention, 128k tokens of context. https://arxiv.org/abs/2407.21783

Here to be compiled for TPUs on a machine that has none, which takes about a minute:

  python -m infer.compile --model configs/llama3_8b.py --topology v5e:2x2 --batch 8 --length 4096
  python -m infer.compile --model configs/llama3_8b.py --topology v6e:1x1 --batch 8 --length 4096 --weights int8

Both fit, and the loop copies nothing of the cache.
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, Llama3Scaling, PreNorm, RmsNorm, Rope, stack_of


def config() -> Decoder:
    """The published configuration; weights are loaded with `jaxlm.load`."""
    rope = Rope(500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, length=8192))
    attention = Attention(heads=32, kv_heads=8, head_width=128, position=rope)
    block = Block(attention, Dense(14336), PreNorm(RmsNorm(1e-5)))
    return Decoder(width=4096, embedding=Embedding(128256), stack=stack_of([block] * 32), norm=RmsNorm(1e-5),
                   head=Head(tied=False), length=131072)

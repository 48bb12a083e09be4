"""SmolLM2 135M: 30 layers of Llama's kind, 9 query heads on 3 key-value heads of width 64. https://arxiv.org/abs/2502.02737

Compiled for one TPU chip on a machine that has none, which takes about half a minute:

  python -m infer.compile --model configs/smollm2_135m.py --topology v5e:1x1 --batch 1 --length 4096

It fits many times over, and the loop copies nothing of the cache.
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, Rope, stack_of


def config() -> Decoder:
    """The published configuration, which the instruction-tuned model shares; `python -m infer.demo` runs that one."""
    block = Block(Attention(heads=9, kv_heads=3, head_width=64, position=Rope(100000.0)), Dense(1536), PreNorm(RmsNorm(1e-5)))
    return Decoder(width=576, embedding=Embedding(49152), stack=stack_of([block] * 30), norm=RmsNorm(1e-5),
                   head=Head(tied=True), length=8192)

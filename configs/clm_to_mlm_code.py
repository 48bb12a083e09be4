"""An encoder that was a decoder: configs/clm_code.py's weights read from both sides, and trained on to tell hidden tokens.

  WIDTH=192 python -m train configs/clm_code.py --out runs/clm_192
  python -m train.export runs/clm_192 --out clm_192
  DECODER=clm_192 python -m train configs/clm_to_mlm_code.py
  python -m train configs/clm_to_mlm_code.py --out runs/mlm_alone

Biphasic pretraining, of Gisserot-Boukhlef et al. 2025, https://arxiv.org/abs/2507.00994, who find it better than hidden tokens
alone for as many steps in all. Without DECODER the same encoder begins with random weights, and has the decoder's steps too.

60 steps took 4 minutes on two CPU cores that other programs used too: the first loss is 7.2, and held-out files take 2.33 bits
per byte, 16% of the hidden tokens found. Random weights begin at 8.4 and take 2.66 after 60 steps, but
2.09 after all 210: the paper's gain is not to be seen in so short a training.
"""

import functools
import os

from jaxlm import adapt
from jaxlm.config import Attention, Block, Dense, Embedding, Encoder, Head, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.code import Code
from jaxlm.data.stream import Phase
from jaxlm.data.tokenizer_train import END, BytePairs
from jaxlm.objectives import MaskedLM
from jaxlm.recipe import Pretrained, Recipe
from jaxlm.training.optimizer import Muon, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """The decoder's shape, of which no layer is causal; its head, tied to the table of tokens, asks for hidden ones. WIDTH is
    that of DECODER, a multiple of 64, by default 192."""
    width, decoder = int(os.environ.get("WIDTH", "192")), os.environ.get("DECODER")
    if width < 64 or width % 64:
        raise ValueError(f"WIDTH is a multiple of 64, the width of a head, got {width}")
    attention = Attention(heads=width // 64, kv_heads=1, head_width=64, position=Rope(10000.0), causal=False)
    block = Block(attention, Dense(width * 8 // 3), PreNorm(RmsNorm(1e-5)))
    model = Encoder(width, Embedding(4096), stack_of([block] * 4), RmsNorm(1e-5), Head(tied=True), length=512)
    steps = 60 if decoder else 150 + 60
    return Recipe(model=model, tokenizer=BytePairs(Code(), 4096, (END, "<|mask|>")), phases=(Phase(((Code(), 1.0),)),),
                  held_out=Phase(((Code("validation"), 1.0),)), objective=MaskedLM(mask=1, vocabulary=4096, rate=0.3),
                  optimizer=Optimizer(Muon(), Cosine(peak=6e-3, warmup_steps=10, steps=steps, floor=0.1)),
                  rows=16, length=256, steps=steps, checkpoint_every=30, evaluate_every=15, seed=1,
                  initial=Pretrained(decoder, functools.partial(adapt.to_encoder, head="masked")) if decoder else None)

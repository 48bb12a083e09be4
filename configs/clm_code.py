"""A decoder trained on the source code of Python's standard library, of any width, to be made something else of.

  WIDTH=128 python -m train configs/clm_code.py --out runs/clm_128
  WIDTH=192 python -m train configs/clm_code.py --out runs/clm_192
  python -m train.export runs/clm_128 --out clm_128
  python -m train.export runs/clm_192 --out clm_192

150 steps of 16 rows of 256 tokens took 4 minutes each on two CPU cores that other programs used too. Held-out files then take
2.06 bits per byte at width 128 (1.2 million weights) and 1.94 at 192 (2.4 million).

configs/clm_to_mlm_code.py makes an encoder of one, configs/adapted_code.py an encoder-decoder of both. Their tokenizer is that
of configs/mlm_code.py, with a mask that no text has.
"""

import os

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.code import Code
from jaxlm.data.stream import Phase
from jaxlm.data.tokenizer_train import END, BytePairs
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import Muon, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """Llama's kind; WIDTH is a multiple of 64, by default 192."""
    width = int(os.environ.get("WIDTH", "192"))
    if width < 64 or width % 64:
        raise ValueError(f"WIDTH is a multiple of 64, the width of a head, got {width}")
    block = Block(Attention(heads=width // 64, kv_heads=1, head_width=64, position=Rope(10000.0)), Dense(width * 8 // 3),
                  PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width, Embedding(4096), stack_of([block] * 4), RmsNorm(1e-5), Head(tied=True), length=512)
    steps = 150
    return Recipe(model=decoder, tokenizer=BytePairs(Code(), 4096, (END, "<|mask|>")), phases=(Phase(((Code(), 1.0),)),),
                  held_out=Phase(((Code("validation"), 1.0),)), objective=CausalLM(),
                  optimizer=Optimizer(Muon(), Cosine(peak=6e-3, warmup_steps=10, steps=steps, floor=0.1)),
                  rows=16, length=256, steps=steps, checkpoint_every=50, evaluate_every=50)

"""A decoder of 7 million weights, trained on the source code of Python's standard library.

  python -m train configs/tiny.py

Builds the dataset and a tokenizer of 4,096 tokens first, then trains for 300 steps of 16 rows of 256 tokens: ten minutes or so
on two CPU cores. A run that was interrupted goes on when the same command is given again.
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.code import Code
from jaxlm.data.stream import Phase
from jaxlm.data.tokenizer_train import BytePairs
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """A model of Llama's kind; every hyperparameter is here."""
    block = Block(Attention(heads=4, kv_heads=2, head_width=64, position=Rope(10000.0)), Dense(704), PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width=256, embedding=Embedding(4096), stack=stack_of([block] * 8), norm=RmsNorm(1e-5),
                      head=Head(tied=True), length=512)
    steps = 300
    return Recipe(model=decoder, tokenizer=BytePairs(Code(), 4096), phases=(Phase(((Code(), 1.0),)),),
                  held_out=Phase(((Code("validation"), 1.0),)), objective=CausalLM(),
                  optimizer=Optimizer(AdamW(), Cosine(peak=3e-3, warmup_steps=30, steps=steps, floor=0.1)),
                  rows=16, length=256, steps=steps, checkpoint_every=100, evaluate_every=100)

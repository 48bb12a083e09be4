"""A decoder of 11 million weights, trained on the source code of Python's standard library.

  python -m train configs/tiny.py

Builds the dataset and a tokenizer of 4,096 tokens first, then trains for 130 steps of 16 rows of 256 tokens: three minutes
on two CPU cores, in which it reads 2 of the 10 MB. `make demo` does that and has the model go on with code that it has not
seen. A run that was interrupted goes on when the same command is given again.

Muon, because a run as short as this learns far more with it than with AdamW. For one TPU chip
(`python -m train.compile configs/tiny.py --topology v5e:1x1`) the compiler says: 0.3 of 15.75 GiB, 1.39 times the model's
products, Muon's own among them.
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.code import Code
from jaxlm.data.stream import Phase
from jaxlm.data.tokenizer_train import BytePairs
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import Muon, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """A model of Llama's kind; every hyperparameter is here."""
    block = Block(Attention(heads=6, kv_heads=2, head_width=64, position=Rope(10000.0)), Dense(1024), PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width=384, embedding=Embedding(4096), stack=stack_of([block] * 6), norm=RmsNorm(1e-5),
                      head=Head(tied=True), length=512)
    steps = 130
    return Recipe(model=decoder, tokenizer=BytePairs(Code(), 4096), phases=(Phase(((Code(), 1.0),)),),
                  held_out=Phase(((Code("validation"), 1.0),)), objective=CausalLM(),
                  optimizer=Optimizer(Muon(), Cosine(peak=6e-3, warmup_steps=10, steps=steps, floor=0.1)),
                  rows=16, length=256, steps=steps, checkpoint_every=50, evaluate_every=26)

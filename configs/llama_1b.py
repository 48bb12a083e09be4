"""A decoder of 1.2 billion weights in the shape of Llama 3.2 1B, to be trained on a slice of 16 chips.

  python -m train.compile configs/llama_1b.py --topology v5e:4x4

The compiler says: 5.4 of 15.75 GiB, 1.25 times the model's products (remat computes a third of the layers' again), weights
gathered in part by permutes that go on beside the products. The data is an example: point `phases` and `tokenizer` at your
own; on the slice the command is

  python -m train configs/llama_1b.py --distributed.pod
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, Llama3Scaling, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import Cosine


def config() -> Recipe:
    """Weights and moments are split over all chips (fsdp), 64 rows of 4,096 tokens to a batch."""
    rope = Rope(500000.0, scaling=Llama3Scaling(factor=32.0, low=1.0, high=4.0, length=8192))
    block = Block(Attention(heads=32, kv_heads=8, head_width=64, position=rope), Dense(8192), PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width=2048, embedding=Embedding(128256), stack=stack_of([block] * 16), norm=RmsNorm(1e-5),
                      head=Head(tied=True), length=131072)
    steps = 100_000
    optimizer = Optimizer(AdamW(), Cosine(peak=3e-4, warmup_steps=2000, steps=steps, floor=0.1))
    return Recipe(model=decoder, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=CausalLM(), optimizer=optimizer, rows=64, length=4096, steps=steps, mesh=(("fsdp", -1),),
                  dtype="bfloat16", remat="full", z=1e-4, checkpoint_every=1000)

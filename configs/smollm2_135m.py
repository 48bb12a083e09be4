"""SmolLM2 135M: 30 layers of Llama's kind, 9 query heads on 3 key-value heads of width 64. https://arxiv.org/abs/2502.02737

Compiled for TPUs on a machine that has none, decoding on one chip and training on four, about a minute each:

  python -m infer.compile --model configs/smollm2_135m.py --topology v5e:1x1 --batch 1 --length 4096
  python -m train.compile configs/smollm2_135m.py --topology v5e:2x2

Decoding fits many times over, and the loop copies nothing of the cache. Of training, on four chips: 14.4 of 15.75 GiB, 1.18
times the model's products (remat computes attention's scores again), gradients summed once a step (0.3 GiB). `--search` finds
448 rows with remat "full". The data is an example: point `phases` and `tokenizer` at your own. The schedule is the paper's in
shape: warm-up, a constant rate, a linear fall over the last fifth.
"""

from jaxlm.config import Attention, Block, Decoder, Dense, Embedding, Head, PreNorm, RmsNorm, Rope, stack_of
from jaxlm.data.source import ArrayRecords
from jaxlm.data.stream import Phase
from jaxlm.objectives import CausalLM
from jaxlm.recipe import Recipe
from jaxlm.training.optimizer import AdamW, Optimizer
from jaxlm.training.schedule import WarmupStableDecay


def config() -> Recipe:
    """The published architecture, which the instruction-tuned model shares; `python -m infer.demo` runs that one."""
    block = Block(Attention(heads=9, kv_heads=3, head_width=64, position=Rope(100000.0)), Dense(1536), PreNorm(RmsNorm(1e-5)))
    decoder = Decoder(width=576, embedding=Embedding(49152), stack=stack_of([block] * 30), norm=RmsNorm(1e-5),
                      head=Head(tied=True), length=8192)
    steps = 100_000
    schedule = WarmupStableDecay(peak=3e-3, warmup_steps=2000, steps=steps, decay_steps=steps // 5)
    return Recipe(model=decoder, tokenizer="tokenizer", phases=(Phase(((ArrayRecords("data/*.array_record"), 1.0),)),),
                  objective=CausalLM(), optimizer=Optimizer(AdamW(weight_decay=0.01), schedule), rows=64, length=2048,
                  steps=steps, dtype="bfloat16", remat="products", checkpoint_every=1000)

"""Whether jaxlm says what transformers says: greedy tokens on a file of prompts, and perplexity on a text.

    .venv/bin/python benchmarks/equality.py --prompts prompts.jsonl --text text.txt

Both compute in float32 with the same weights (jaxlm saves what it loaded, transformers reads that). A difference is
excused only where the two likeliest tokens' logits are within 1e-4 of each other in transformers, and is listed. Needs the
extra `parity`.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

import jaxlm
from infer import assets, generate, session


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Whether jaxlm says what transformers says."""

    prompts: pathlib.Path | None = None
    """JSON lines with `prompt`, and `chat` (true: apply the chat template)."""
    text: pathlib.Path | None = None
    """A text for perplexity."""
    model: str | None = None
    """A GGUF file or Hugging Face directory; default SmolLM2-135M-Instruct, fetched."""
    new_tokens: int = 64
    """Tokens per answer."""
    batch: int = 1
    """Prompts that jaxlm answers together; transformers answers one by one."""
    window: int = 1024
    """Tokens of the text scored at once."""
    windows: int = 8
    """How many windows of the text are scored."""


def greedy(reference: Any, prompt: list[int], count: int, ends: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """transformers' greedy tokens up to the end of text, and how far the two likeliest logits are apart at each."""
    out = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                             max_new_tokens=count, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=0,
                             output_logits=True, return_dict_in_generate=True)
    tops = [torch.topk(logits[0], 2).values for logits in out.logits]
    return out.sequences[0, len(prompt):].tolist(), [float(top[0] - top[1]) for top in tops]


def compare_tokens(model: jaxlm.Model, reference: Any, arguments: Arguments, console: Console) -> bool:
    """The table of answers; true where every difference is a tie."""
    rows = [json.loads(line) for line in arguments.prompts.read_text().splitlines()]
    tokenizer = model.tokenizer
    prompts = [generate.ask(tokenizer, [{"role": "user", "content": row["prompt"]}]) if row["chat"]
               else tokenizer.encode(row["prompt"]) for row in rows]
    ours: list[Any] = []
    for first in range(0, len(prompts), arguments.batch):
        ours += jaxlm.generate(model, prompts[first:first + arguments.batch], arguments.new_tokens).tokens
    table = Table("prompt", "tokens", "result", "smallest margin", title="greedy tokens, jaxlm and transformers")
    good, equal = True, 0
    for row, prompt, mine in zip(rows, prompts, ours, strict=True):
        theirs, margins = greedy(reference, prompt, arguments.new_tokens, tokenizer.eos_ids)
        mine = mine.tolist()
        result = "equal"
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
            tie = at < len(margins) and margins[at] <= 1e-4
            result = f"{'excused' if tie else 'DIFFERENT'} at {at}, margin {margins[min(at, len(margins) - 1)]:.1e}"
            good &= tie
        equal += mine == theirs
        table.add_row(row["prompt"][:50].replace("\n", "\\n"), str(len(theirs)), result, f"{min(margins):.1e}")
    console.print(table)
    console.print(f"{equal} of {len(rows)} equal")
    return good


def compare_perplexity(model: jaxlm.Model, reference: Any, arguments: Arguments, console: Console) -> bool:
    """Both perplexities; true where they are within 1e-3."""
    tokens = model.tokenizer.encode(arguments.text.read_text(encoding="utf-8"), parse_special=False)
    ours, theirs, scored = 0.0, 0.0, 0
    for start in range(0, min(len(tokens) - 1, arguments.window * arguments.windows), arguments.window):
        some = tokens[start:start + arguments.window]
        ours -= float(np.sum(jaxlm.score(model, [some])[0], dtype=np.float64))
        with torch.inference_mode():
            logp = torch.log_softmax(reference(torch.tensor([some])).logits[0, :-1], dim=-1)
        theirs -= float(logp.gather(1, torch.tensor(some[1:])[:, None]).double().sum())
        scored += len(some) - 1
    mine, other = np.exp(ours / scored), np.exp(theirs / scored)
    console.print(f"perplexity over {scored} tokens: jaxlm {mine:.6f}, transformers {other:.6f}, "
                  f"apart by {abs(mine - other):.1e}")
    return bool(abs(mine - other) < 1e-3)


def main(arguments: Arguments) -> None:
    """Loads both, compares, and exits with 1 where they differ."""
    session.cache_compilations()
    console = Console(width=110)
    model = jaxlm.load(arguments.model or assets.smollm2())
    with tempfile.TemporaryDirectory() as folder:
        jaxlm.save(model, folder)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    good = True
    if arguments.prompts is not None:
        good &= compare_tokens(model, reference, arguments, console)
    if arguments.text is not None:
        good &= compare_perplexity(model, reference, arguments, console)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

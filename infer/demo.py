"""The demo: fetches SmolLM2-135M-Instruct, has it answer a question plainly and then by speculation, and compares the two.

python -m infer.demo
"""

import dataclasses
import time
from functools import partial

import numpy as np
import tyro
from rich.table import Table

import jaxlm
from infer import assets, generate, session


def main(prompt: str = "Why is the sky blue? Answer in three sentences.", max_new_tokens: int = 128,
         drafter: str = "auto", tree: int | None = None) -> None:
    """Fetches the model where it is not there yet, then streams the same answer twice, decoded in two ways.

    Args:
      prompt: the question.
      max_new_tokens: the most tokens to answer with.
      drafter: what drafts the second answer.
      tree: nodes of a drafted tree; None is the drafter's own.
    """
    session.cache_compilations()
    console = session.console(as_json=False)
    began = time.perf_counter()
    path = assets.smollm2()
    fetched = time.perf_counter()
    model = jaxlm.load(path)
    loaded = time.perf_counter()
    console.print(f"[dim]fetched in {fetched - began:.1f} s, loaded in {loaded - fetched:.1f} s: {path.name}[/dim]")
    console.print(prompt, style="bold", markup=False, emoji=False)
    tokens = generate.ask(model.tokenizer, [{"role": "user", "content": prompt}])
    plainly = generate.Arguments(model=str(path), max_new_tokens=max_new_tokens)
    speculating = dataclasses.replace(plainly, speculating=generate.Speculating(drafter, tree))
    answers = []
    for name, arguments in (("plain decoding", plainly), (f"speculation, drafter {drafter}", speculating)):
        console.print(f"\n[dim]{name}[/dim]")
        result = generate.answer(model, tokens, arguments, partial(session.show, console))
        console.print(f"\n[dim]{generate.statistics(result)}[/dim]")
        answers.append(result)
    console.print()
    console.print(comparison(*answers, drafter))


def comparison(plain: jaxlm.Generation, speculated: jaxlm.Generation, drafter: str) -> Table:
    """How fast the two were, and whether they say the same."""
    table = Table("", "plain", drafter)
    same = np.array_equal(plain.tokens[0], speculated.tokens[0])
    table.add_row("tokens per second", f"{plain.tokens_per_s:.1f}", f"{speculated.tokens_per_s:.1f}")
    table.add_row("tokens per call of the model", "1.00", f"{speculated.speculation.tokens_per_call[0]:.2f}")
    if plain.tokens_per_s:
        table.add_row("speed", "1.00x", f"{speculated.tokens_per_s / plain.tokens_per_s:.2f}x")
    table.add_row("the same tokens", "", "yes" if same else "no")
    return table


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main)

"""The demo: fetches SmolLM2-135M-Instruct, has it answer questions plainly and then by speculation, and compares the two.

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

# One whose answer nothing foretells, and one whose answer the question holds for the most part.
QUESTIONS = (
    "Why is the sky blue? Answer in three sentences.",
    "Correct the spelling of this text and answer with nothing but the text: The libary opens at nine in the "
    "morning and closes at six in the evening. On Sundays the libary is closed. Books may be borowed for four "
    "weeks, and they may be borowed again for another four weeks if nobody else has asked for them. Members of the "
    "libary pay nothing, visiters pay five pounds a year.",
)


def main(prompt: str | None = None, max_new_tokens: int = 128, drafter: str = "auto", tree: int | None = None) -> None:
    """Fetches the model where it is not there yet, then streams the same answer twice, decoded in two ways.

    Args:
      prompt: the question; default two, one after the other.
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
    plainly = generate.Arguments(model=str(path), max_new_tokens=max_new_tokens)
    speculating = dataclasses.replace(plainly, speculating=generate.Speculating(drafter, tree=tree))
    ways = (("plain decoding", plainly, None), (f"speculation, drafter {drafter}", speculating, drafter))
    for question in QUESTIONS if prompt is None else (prompt,):
        console.print()
        console.print(question, style="bold", markup=False, emoji=False)
        tokens = generate.ask(model.tokenizer, [{"role": "user", "content": question}])
        answers = []
        for name, arguments, by in ways:
            with console.status("compiling, and a first run for what programs set up in theirs"):
                generate.answer(model, tokens, arguments, by, lambda _: None)
            console.print(f"\n[dim]{name}[/dim]")
            result = generate.answer(model, tokens, arguments, by, partial(session.show, console))
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

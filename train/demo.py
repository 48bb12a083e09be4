"""The demo: trains a small decoder on the source code of Python's standard library, then has it go on with code that it has
not seen, plainly and by speculation.

python -m train.demo

Runs configs/tiny.py in runs/demo: the dataset and a tokenizer are made first. A second run finds the trained model and only
shows what it writes.
"""

import ast
import dataclasses
import importlib
import math
import pathlib
from functools import partial

import jax
import numpy as np
import tyro
from rich.table import Table

import jaxlm
from infer import generate, perplexity, session
from infer.demo import comparison
from jaxlm.data.code import Code
from jaxlm.data.tokenizer import Tokenizer
from train import baselines
from train.__main__ import Arguments, run


def prompts(texts: list[str], count: int, least: int = 8) -> list[str]:
    """Files up to the end of a function's docstring, of which more than `least` lines follow; at most one of each file."""
    found = []
    for text in texts:
        for node in ast.walk(_parsed(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                shown = node.body[0].end_lineno or 0
                if (node.end_lineno or 0) - shown > least:
                    found.append("".join(text.splitlines(keepends=True)[:shown]))
                    break
        if len(found) == count:
            break
    return found


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def last_lines(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    """The tokens of as many whole lines at a text's end as `most` tokens hold; its last tokens where a line is longer."""
    lines, kept = text.splitlines(keepends=True), []
    for start in reversed(range(len(lines))):
        tokens = tokenizer.encode("".join(lines[start:]))
        if len(tokens) > most:
            return kept or tokens[-most:]
        kept = tokens
    return kept


def measured(model: jaxlm.Model, window: int, read: int) -> Table:
    """Bits per byte of the held-out files, each by itself and whole, beside those of what the model has to beat.

    Args:
      window: tokens that the model reads at once; every other half of one is context only.
      read: tokens that it was trained on.
    """
    sources = Code("train").open(), Code("validation").open()
    train, held_out = ([source[i] for i in range(len(source))] for source in sources)
    texts = [model.tokenizer.encode(text, add_special=False, parse_special=False) for text in held_out]
    nats, scored = perplexity.score(model, texts, window, window // 2, batch=16)
    # The first token of a file, of which nothing is known, counts as much as the others do.
    bytes_per_token = sum(len(text.encode()) for text in held_out) / sum(map(len, texts))
    table = Table("held-out files", "bits per byte", "from")
    found = nats / scored / math.log(2) / bytes_per_token
    table.add_row("this model", f"{found:.3f}", f"{read * bytes_per_token / 1e6:.1f} MB read")
    train = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
    sizes = np.cumsum([len(text.encode()) for text in train])
    same = int(np.searchsorted(sizes, read * bytes_per_token)) + 1
    for count, note in ((same, "as much"), (len(train), "all there is")):
        table.add_row("5-grams of bytes, Kneser-Ney", f"{baselines.kneser_ney(train[:count], held_out):.3f}",
                      f"{sizes[min(count, len(train)) - 1] / 1e6:.1f} MB, {note}")
    for name, bits in baselines.compressors(held_out).items():
        table.add_row(name, f"{bits:.3f}", "every file by itself")
    return table


def main(out: pathlib.Path = pathlib.Path("runs/demo"), steps: int | None = None, max_new_tokens: int = 96,
         drafter: str = "auto") -> None:
    """Trains, then completes.

    Args:
      out: the run's folder.
      steps: of training; default the configuration's.
      max_new_tokens: of each completion.
      drafter: what drafts.
    """
    session.cache_compilations()
    console = session.console(as_json=False)
    recipe = importlib.import_module("configs.tiny").config()
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps)
    with console.status("the dataset and the tokenizer, where they are not there yet"):
        unseen = Code("test").open()
        recipe.tokenizer.directory()
    job, done = run(recipe, out, Arguments("configs/tiny.py"))
    if done.step < recipe.steps:
        console.print("stopped early: the same command goes on")
        return
    console.print(f"the curve is in {out / 'loss.png'}")
    model = jaxlm.Model(recipe.model, jax.device_get(done.state.params), job.tokenizer)
    console.print(measured(model, recipe.length, recipe.steps * recipe.rows * recipe.length))
    arguments = generate.Arguments(model=str(out), max_new_tokens=max_new_tokens)
    for prompt in prompts([unseen[i] for i in range(len(unseen))], 2):
        tokens = last_lines(model.tokenizer, prompt, recipe.length - max_new_tokens)
        console.print()
        session.show(console, model.tokenizer.decode(tokens))
        answers = []
        for by in (None, drafter):
            generate.answer(model, tokens, arguments, by, lambda _: None)  # compiles
            shown = partial(session.show, console) if by is None else lambda _: None
            answers.append(generate.answer(model, tokens, arguments, by, shown))
        console.print()
        console.print(comparison(*answers, drafter))


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main)

"""The demo: trains a small decoder on the source code of Python's standard library, then has it go on with code that it has
not seen, plainly and by speculation.

python -m train.demo

Runs configs/tiny.py in runs/demo: the dataset and a tokenizer are made first. A second run finds the trained model and only
shows what it writes.
"""

import ast
import dataclasses
import importlib
import lzma
import pathlib
from functools import partial

import jax
import tyro

import jaxlm
from infer import generate, session
from infer.demo import comparison
from jaxlm.data.code import Code
from train.__main__ import Arguments, run


def prompts(texts: list[str], count: int, most: int = 600) -> list[str]:
    """The ends of files up to a function's first line and docstring, from files with one that is long enough to go on with."""
    found = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for node in ast.walk(_parsed(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.end_lineno - node.body[0].end_lineno > 8:
                head = "".join(lines[:node.body[0].end_lineno])
                found.append(head[max(len(head) - most, 0):])
                break
        if len(found) == count:
            break
    return found


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def compressed(texts: list[str]) -> float:
    """Bits per byte of xz, the texts in one piece."""
    whole = "".join(texts).encode()
    return 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole)


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
        held_out = Code("validation").open()
        recipe.tokenizer.directory()
    job, done = run(recipe, out, Arguments("configs/tiny.py"))
    if done.evaluation is not None:
        texts = [held_out[i] for i in range(len(held_out))]
        console.print(f"held out: {done.evaluation['bits_per_byte']:.3f} bits per byte (xz on the same files: "
                      f"{compressed(texts):.3f}); curve in {out / 'loss.png'}")
    if done.step < recipe.steps:
        console.print("stopped early: the same command goes on")
        return
    model = jaxlm.Model(recipe.model, jax.device_get(done.state.params), job.tokenizer)
    arguments = generate.Arguments(model=str(out), max_new_tokens=max_new_tokens)
    unseen = Code("test").open()
    for prompt in prompts([unseen[i] for i in range(len(unseen))], 2):
        tokens = model.tokenizer.encode(prompt)[-(recipe.length - max_new_tokens):]
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

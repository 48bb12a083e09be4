"""The demo: fetches SmolLM2-135M-Instruct, has it answer a question, and says how fast it was.

python -m infer.demo
"""

import time
from functools import partial

import tyro

import jaxlm
from infer import assets, generate, session


def main(prompt: str = "Why is the sky blue? Answer in three sentences.", max_new_tokens: int = 128) -> None:
    """Fetches the model where it is not there yet, then streams an answer.

    Args:
      prompt: the question.
      max_new_tokens: the most tokens to answer with.
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
    arguments = generate.Arguments(model=str(path), max_new_tokens=max_new_tokens)
    tokens = generate.ask(model.tokenizer, [{"role": "user", "content": prompt}])
    result = generate.answer(model, tokens, arguments, partial(session.show, console))
    console.print(f"\n[dim]{generate.statistics(result)}[/dim]")


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main)

"""What every program does around its work: a compilation cache on disk, JSON as the last line, errors without a traceback."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from infer import assets


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Ends the program with one line on standard error, where the user's input was wrong."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # jax's own: a traceback helps more there
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def cache_compilations() -> None:
    """Keeps compiled programs in $JAXLM_HOME/xla (~/.cache/jaxlm/xla), unless JAX was told where already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(assets.home() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)


def console(as_json: bool) -> Console:
    """Where a program prints for people: standard output, or standard error when JSON has that."""
    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def show(console: Console, text: str) -> None:
    """Prints a piece of a model's text as it is: rich would replace emoji codes and tabs."""
    console.file.write(text)
    console.file.flush()


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The result as the last line of standard output, when asked for."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)

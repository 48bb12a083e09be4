"""Converts a checkpoint: reads a Hugging Face directory or a GGUF file, writes a Hugging Face directory.

python -m infer.convert --from model.gguf --to directory
"""

import pathlib
import time
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

import jaxlm
from infer import session
from jaxlm import params


def main(source: Annotated[str, tyro.conf.arg(name="from")], target: Annotated[pathlib.Path, tyro.conf.arg(name="to")],
         dtype: Literal["float32", "bfloat16", "float16"] = "float32", json: bool = False) -> None:
    """Reads a Hugging Face directory or a GGUF file, writes a Hugging Face directory.

    Args:
      source: what to read: a directory, a GGUF file, or the id of a model on the hub.
      target: the directory to write; it must not exist yet, or be empty.
      dtype: of the weights written.
      json: print one JSON object on the last line of standard output.
    """
    console = session.console(json)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new directory")
    began = time.perf_counter()
    with console.status(f"reading {source}"):
        model = jaxlm.load(source, dtype=jnp.dtype(dtype))
    with console.status(f"writing {target}"):
        jaxlm.save(model, target)
    count = params.count(model.params)
    console.print(f"{count:,} parameters in {dtype} written to {target} in {time.perf_counter() - began:.1f} s")
    session.finish({"parameters": count, "path": str(target), "seconds": time.perf_counter() - began}, json)


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main, description=__doc__)

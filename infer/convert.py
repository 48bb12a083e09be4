"""Converts a checkpoint: reads a Hugging Face directory or a GGUF file, writes a Hugging Face directory.

python -m infer.convert --from model.gguf --to directory

A directory may have its weights in pytorch_model.bin, or several such files: they are read with PyTorch, as weights only. What
its generation_config.json says beyond tokens is kept.
"""

import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

import jaxlm
from infer import session
from jaxlm import params
from jaxlm.io.huggingface import GENERATION, INDEX, WEIGHTS, read_json


@contextlib.contextmanager
def readable(source: str) -> Iterator[str | pathlib.Path]:
    """What `jaxlm.load` reads in place of a directory whose weights are PyTorch's: a copy with safetensors, while it lasts.

    Raises:
      ValueError: when such files are there and PyTorch is not, or one holds more than tensors.
    """
    root = pathlib.Path(source)
    # A sentence encoder's product has a file in a directory of its own.
    found = sorted([*root.glob("pytorch_model*.bin"), *root.glob("*_Dense/pytorch_model.bin")])
    files = [file for file in found if not any(file.parent.glob("*.safetensors"))]
    if not files:
        yield source
        return
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError(f"{files[0]} is read with PyTorch: pip install torch") from error
    with tempfile.TemporaryDirectory() as name:
        folder, places = pathlib.Path(name), {}
        for place in {root} | {file.parent for file in files}:
            (folder / place.relative_to(root)).mkdir(exist_ok=True)
            for entry in place.iterdir():
                if not any(file == entry or file.parent == entry for file in files):
                    (folder / entry.relative_to(root)).symlink_to(entry.resolve())
        for i, file in enumerate(files):
            try:
                # Cloned, as tied tensors share memory and safetensors wants each to have its own.
                held = torch.load(file, map_location="cpu", weights_only=True)
                tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in held.items()}
            except Exception as error:  # of many types, as the file may be anything
                raise ValueError(f"{file} does not read as PyTorch's weights: {error}") from error
            if file.parent != root:
                save_file(tensors, folder / file.parent.name / WEIGHTS)
                continue
            save_file(tensors, folder / f"{i}.safetensors")
            places |= dict.fromkeys(tensors, f"{i}.safetensors")
        if places:
            (folder / INDEX).unlink(missing_ok=True)  # a link, and not about these
            (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        yield folder


def keep(source: str, target: pathlib.Path) -> None:
    """What a directory's generation_config.json says and the one written does not: settings of searches and sampling."""
    given, written = pathlib.Path(source) / GENERATION, target / GENERATION
    if given.is_file():
        ours = read_json(written) if written.is_file() else {}
        written.write_text(json.dumps(read_json(given) | ours, indent=2) + "\n", encoding="utf-8")


def main(source: Annotated[str, tyro.conf.arg(name="from")], target: Annotated[pathlib.Path, tyro.conf.arg(name="to")],
         dtype: Literal["float32", "bfloat16", "float16"] = "float32", json: bool = False) -> None:
    """Reads a Hugging Face directory or a GGUF file, writes a Hugging Face directory.

    Args:
      source: what to read: a directory, a GGUF file, or the id of a model on the hub that has safetensors; for one with
        PyTorch's weights alone give the directory that `hf download` makes.
      target: the directory to write; it must not exist yet, or be empty.
      dtype: of the weights written.
      json: print one JSON object on the last line of standard output.
    """
    console = session.console(json)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new directory")
    began = time.perf_counter()
    with console.status(f"reading {source}"), readable(source) as directory:
        model = jaxlm.load(directory, dtype=jnp.dtype(dtype))
    with console.status(f"writing {target}"):
        jaxlm.save(model, target)
        keep(source, target)
    count = params.count(model.params)
    console.print(f"{count:,} parameters in {dtype} written to {target} in {time.perf_counter() - began:.1f} s")
    session.finish({"parameters": count, "path": str(target), "seconds": time.perf_counter() - began}, json)


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main, description=__doc__)

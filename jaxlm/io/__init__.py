"""Checkpoints: `load` reads a Hugging Face directory or a GGUF file into sharded arrays, `save` writes a directory.

    model = jaxlm.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    jaxlm.save(model, "out")

Which architectures: `jaxlm.io.families.families`.
"""

import dataclasses
import os
import pathlib
import re
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm import sharding
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.io import assemble, families, fp8, mxfp4, sentence
from jaxlm.io.gguf import GgufSource
from jaxlm.io.huggingface import CONFIG, HuggingFaceSource, save
from jaxlm.model import Model

__all__ = ["load", "save"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
HUB_FILES = ("*.json", "model*.safetensors", "*_Dense/model.safetensors", "*.model", "*.spm", "*.txt", "*.jinja")


def load(path: str | os.PathLike[str], dtype: Any = None, mesh: Mesh | None = None) -> Model:
    """A pretrained model: its config, its weights, and its tokenizer where there is one.

    Args:
      path: a directory with config.json and safetensors, a GGUF file or a directory with one, or the name of a repository
        of the Hugging Face Hub ("organisation/name"), which is downloaded.
      dtype: of the weights; None is float32 on CPUs and bfloat16 elsewhere.
      mesh: over which weights are split (`jaxlm.sharding.mesh`); None puts them on the first device.

    Raises:
      ValueError: for what is no checkpoint, an unknown architecture, a config that jaxlm cannot express, tensors that are
        missing, left over or of the wrong shape, a truncated file, NaN weights; names what was wrong.
      OSError: when a repository cannot be downloaded.

    Example:
      >>> load("checkpoints/smollm2").config.width  # doctest: +SKIP
      576
    """
    if mesh is not None:
        sharding.check(mesh)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point type like jnp.bfloat16, got {dtype!r}")
    found = _find(path)
    source = GgufSource(found) if found.is_file() else fp8.unpacked(mxfp4.unpacked(HuggingFaceSource(found)))
    family = families.find(source.config)
    cfg = family.settle(families.read(source.config), source)
    if not isinstance(source, GgufSource):
        cfg = sentence.read(cfg, found)
    elif source.vector is not None:
        cfg = dataclasses.replace(cfg, head=source.vector)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = assemble.assemble(cfg, family, source, dtype, mesh)
    if isinstance(source, GgufSource):
        there = "tokenizer.ggml.model" in source.tokenizer_fields
        tokenizer = Tokenizer.from_gguf(source.tokenizer_fields) if there else None
    else:
        there = any((found / file).is_file() for file in TOKENIZER_FILES) or _is_bytes(found)
        tokenizer = sentence.lower(Tokenizer.from_directory(found), found) if there else None
    return Model(cfg, params, tokenizer)


def _is_bytes(directory: pathlib.Path) -> bool:
    """Whether the tokenizer is ByT5's, which has no file but its configuration."""
    file = directory / "tokenizer_config.json"
    return file.is_file() and '"ByT5Tokenizer"' in file.read_text(encoding="utf-8")


def _find(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory, or the GGUF file."""
    place = pathlib.Path(path).expanduser()
    if place.is_file():
        if place.suffix != ".gguf":
            raise ValueError(f"{place} is not a GGUF file; give the directory that holds {CONFIG}, or a file named *.gguf")
        return place
    if place.is_dir():
        ggufs = sorted(place.glob("*.gguf"))
        if (place / CONFIG).is_file() or not ggufs:
            return place  # where neither is, the source says what it looked for
        if len(ggufs) > 1:
            raise ValueError(f"{place} holds several models, {', '.join(file.name for file in ggufs)}: give one's path")
        return ggufs[0]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return _download(str(path))
    raise ValueError(f"{place} does not exist: give a directory, a GGUF file or the name of a Hub repository, "
                     "organisation/name")


def _download(name: str) -> pathlib.Path:
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the Hub's client and what it stands on raise dozens of unrelated types
        raise OSError(f"{name} is no local directory, and the Hugging Face Hub did not give it "
                      f"({type(error).__name__}: {error}). Check the name and the network, log in with `hf auth login` if it "
                      f"is gated, or fetch it elsewhere with `hf download {name} --local-dir DIR` and give DIR") from error

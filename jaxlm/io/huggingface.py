"""Directories in the layout of Hugging Face: config.json, safetensors in one file or several with an index."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxlm.io import families, sentence
from jaxlm.io.assemble import disassemble
from jaxlm.io.names import VECTOR
from jaxlm.model import Model
from jaxlm.weight import is_weight

CONFIG = "config.json"
GENERATION = "generation_config.json"
# What an encoder-decoder's text begins with. Where there is a generation_config.json transformers asks it first, and it
# alone for the second.
STARTS = START, FORCED = "decoder_start_token_id", "forced_bos_token_id"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json(path: pathlib.Path) -> Any:
    """A JSON file.

    Raises:
      ValueError: when it is not JSON; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


class HuggingFaceSource:
    """A directory's tensors, read when asked for; implements `jaxlm.io.source.Source`.

    Raises:
      ValueError: when config.json or the weights are missing, a file that the index names is, or one is truncated.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        if not (self.directory / CONFIG).is_file():
            raise ValueError(f"{self.directory} is no checkpoint: it has no {CONFIG}")
        self.config: dict[str, Any] = read_json(self.directory / CONFIG)
        if not isinstance(self.config, dict):
            raise ValueError(f"{self.directory / CONFIG} does not hold an object")
        generation = self.directory / GENERATION
        if generation.is_file():
            given = read_json(generation)
            if not isinstance(given, dict):
                raise ValueError(f"{generation} does not hold an object")
            self.config = {key: value for key, value in self.config.items() if key != FORCED} | {
                key: given[key] for key in STARTS if given.get(key) is not None}
        places = self._places()
        product = sentence.modules(self.directory)[1]
        if product is not None:
            places |= self._names(product)
        self._files = {file: self._open(file) for file in sorted(set(places.values()))}
        held = {name: file for file, opened in self._files.items() for name in opened.keys()}
        lost = sorted(name for name in places if name not in held)
        if lost:
            raise ValueError(f"{INDEX} says that {lost[0]} is in {places[lost[0]]}, and it is not")
        self._held = held
        self._offsets: dict[str, dict[str, int]] = {}  # where tensors begin, of files that `bytes` was asked about
        self._slices = {name: self._files[file].get_slice(name) for name, file in held.items()}

    def _places(self) -> dict[str, str]:
        """Tensor name -> file, or just a file under no tensor's name where there is no index."""
        index = self.directory / INDEX
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ValueError(f"{index} has no weight_map")
            missing = sorted(file for file in set(places.values()) if not (self.directory / file).is_file())
            if missing:
                raise ValueError(f"{self.directory} lacks {', '.join(missing)}, which {INDEX} names")
            return places
        files = sorted(file.name for file in self.directory.glob("*.safetensors"))
        if WEIGHTS in files:
            files = [WEIGHTS]
        if len(files) == 1:
            return self._names(files[0])
        if files:
            raise ValueError(f"{self.directory} has {', '.join(files)} and no {INDEX} that says which belong together")
        other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5") for file in self.directory.glob(pattern))
        how = ("load these in transformers and save them anew, it then writes safetensors"
               if any(not file.startswith("pytorch_model") for file in other) else
               f"`python -m infer.convert --from {self.directory} --to NEW` makes safetensors of that")
        note = f"; it has {', '.join(other)}: {how}" if other else ""
        raise ValueError(f"{self.directory} has no weights: neither {WEIGHTS} nor {INDEX} is there{note}")

    def _names(self, file: str) -> dict[str, str]:
        return dict.fromkeys(self._open(file).keys(), file)

    def _open(self, file: str) -> Any:
        try:
            return safetensors.safe_open(self.directory / file, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{self.directory / file} is truncated or no safetensors file: {error}") from error

    def names(self) -> set[str]:
        """The tensors' names."""
        return set(self._held)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._slices[name].get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor.

        Raises:
          ValueError: when it is of another type than float32, float16 and bfloat16.
        """
        kind = self._slices[name].get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"tensor {name} is of type {kind}; there is {', '.join(DTYPES)}")
        return self._files[self._held[name]].get_tensor(name)

    def bytes(self, name: str) -> np.ndarray:
        """A tensor of 8-bit floating-point numbers as uint8, mapped: safetensors gives NumPy no such numbers.

        Raises:
          ValueError: when it is of another type than e4m3.
        """
        kind = self._slices[name].get_dtype()
        if kind != "F8_E4M3":
            raise ValueError(f"tensor {name} is of type {kind} and has scales beside it; F8_E4M3 is needed")
        file = self._held[name]
        if file not in self._offsets:
            with (self.directory / file).open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            self._offsets[file] = {key: 8 + size + one["data_offsets"][0] for key, one in header.items() if "dtype" in one}
        return np.memmap(self.directory / file, np.uint8, "r", self._offsets[file][name], self.shape(name))

    def row(self, name: str, index: int) -> np.ndarray:
        """A tensor at this place of its first dimension, of whatever type; no more than that is read."""
        return self._slices[name][index]


def save(model: Model, path: str | os.PathLike[str], *, family: str | None = None, shard_bytes: int = 2 << 30) -> None:
    """Writes a directory that transformers loads: config.json, safetensors in the weights' dtype, the tokenizer's files.

    Of an encoder whose head is a `config.Vector` it is one that sentence-transformers loads: see `jaxlm.io.sentence`. Of one
    without head there is no pooler: transformers lists BERT's, RoBERTa's or MPNet's as missing, starts it at random, and gives
    the hidden states all the same; `add_pooling_layer=False` leaves it out.

    Args:
      family: which architecture to save as (`jaxlm.io.families.families`); by default the first that can express the model.
        An mT5 whose head is not tied is a T5 1.1 but for its name, and saved as one unless "mt5" is asked for.
      shard_bytes: a file's size before another is begun; about that much is in memory beside the model.

    Raises:
      ValueError: when no family can express the model, or the directory holds weights already.

    Example:
      >>> save(model, "out")  # doctest: +SKIP
    """
    directory = pathlib.Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a directory is needed")
    held = sorted(file.name for file in directory.glob("*.safetensors*"))
    if held:
        raise ValueError(f"{directory} holds weights already: {', '.join(held)}")
    chosen, values = families.write(sentence.without(model.config), family)
    tensors = disassemble(model.params, model.config, chosen)
    directory.mkdir(parents=True, exist_ok=True)
    product = sentence.write(model.config, directory)
    _write_weights(directory, tensors, shard_bytes, product)
    # Always written: transformers' own defaults for a class would be some other vocabulary's.
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | chosen.special
    if model.tokenizer is not None:
        model.tokenizer.save(directory)
        ends = list(model.tokenizer.eos_ids)
        known = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
                 "pad_token_id": model.tokenizer.pad_id}
        special |= {key: value for key, value in known.items() if value is not None}
    dtype = str(jax.tree.leaves(model.params, is_leaf=is_weight)[0].dtype)
    starts = {key: values[key] for key in STARTS if values.get(key) is not None}
    if starts:  # where there is such a file, transformers looks in no other
        generation = directory / GENERATION
        given = read_json(generation) if generation.is_file() else {}
        given.pop(FORCED, None)
        generation.write_text(json.dumps(given | starts, indent=2) + "\n", encoding="utf-8")
    # Last, so that a directory that has it is whole.
    (directory / CONFIG).write_text(json.dumps(special | values | {"torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    for file in directory.glob("**/*.safetensors"):  # which the package makes readable for nobody else
        file.chmod((directory / CONFIG).stat().st_mode)


def _write_weights(directory: pathlib.Path, tensors: Any, shard_bytes: int, product: str | None) -> None:
    """One file, or numbered ones and their index; what `names.VECTOR` names goes to the file `product`."""
    vector = {row.theirs for row in VECTOR}
    apart: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        file = directory / f"model-{len(shards) + 1:05d}.safetensors"
        safetensors.numpy.save_file(pending, file, metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if product is not None and name in vector:
            apart[name] = tensor
            continue
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if product is not None:
        safetensors.numpy.save_file(apart, directory / product, metadata={"format": "pt"})
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / WEIGHTS)
        return
    places = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"model-{i:05d}.safetensors").rename(directory / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

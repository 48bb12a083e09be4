"""Sentence encoders: what sentence-transformers writes beside a model, read as `config.Vector` and written back.

modules.json lists a transformer, a pooling, perhaps a product (whose weights are a file of their own) and a normalisation.
sentence_bert_config.json says how many tokens of a text the transformer reads, `Encoder.length`, and whether in lower case.
"""

import dataclasses
import json
import pathlib
from typing import Any

import tokenizers

from jaxlm import config
from jaxlm.data.tokenizer import Tokenizer

MODULES = "modules.json"
READING = "sentence_bert_config.json"
POOLING = {"cls": config.Pooling.FIRST, "mean": config.Pooling.MEAN, "max": config.Pooling.MAX,
           "weightedmean": config.Pooling.WEIGHTED_MEAN, "lasttoken": config.Pooling.LAST}
# What the modes are called as switches, in order.
SWITCHES = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
            "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}
IDENTITY = "torch.nn.modules.linear.Identity"


def _json(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}, which {MODULES} names, is not there or no JSON: {error}") from error


def _pooling(file: pathlib.Path) -> config.Pooling:
    values = _json(file)
    modes = [values["pooling_mode"]] if isinstance(values.get("pooling_mode"), str) else [
        mode for mode, switch in SWITCHES.items() if values.get(f"pooling_mode_{switch}")]
    if len(modes) != 1 or modes[0] not in POOLING:
        raise ValueError(f"{file} pools by {' and '.join(modes) or 'nothing'}: it must be one of {', '.join(POOLING)}")
    return POOLING[modes[0]]


def modules(directory: pathlib.Path) -> tuple[config.Vector | None, str | None]:
    """The head that a directory's modules make, and the file of its product; None where there are none.

    Raises:
      ValueError: for modules that `config.Vector` cannot express, or a file that is missing; names it.
    """
    if not (directory / MODULES).is_file():
        return None, None
    found = [(module["type"].rpartition(".")[2], module["path"]) for module in _json(directory / MODULES)]
    kinds = [kind for kind, _ in found]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"]):
        raise ValueError(f"{directory / MODULES} has {', '.join(kinds)}: it must be Transformer, Pooling, perhaps Dense, "
                         "perhaps Normalize")
    width, bias, file = None, False, None
    if "Dense" in kinds:
        place = dict(found)["Dense"]
        values = _json(directory / place / "config.json")
        if values.get("activation_function") != IDENTITY:
            raise ValueError(f"{directory / place} has the activation {values.get('activation_function')}: it must be "
                             f"{IDENTITY}")
        width, bias, file = values["out_features"], values.get("bias", True), f"{place}/model.safetensors"
        if not (directory / file).is_file():
            old = (directory / file).with_name("pytorch_model.bin").is_file()
            note = f"; `python -m infer.convert --from {directory} --to NEW` makes it of pytorch_model.bin" if old else ""
            raise ValueError(f"{directory} lacks {file}, the weights of what {MODULES} names{note}")
    return config.Vector(_pooling(directory / found[1][1] / "config.json"), "Normalize" in kinds, width, bias), file


def _reading(directory: pathlib.Path) -> dict[str, Any]:
    """How texts are read; old files are named after other models than BERT."""
    file = next(iter(sorted(directory.glob("sentence_*_config.json"))), None)
    return _json(file) if file else {}


def read(cfg: config.Config, directory: pathlib.Path) -> config.Config:
    """The config with the head that the directory's modules make, where it has some, and as long as they read.

    Raises:
      ValueError: as `modules`, for modules beside what is no encoder, or a length that is no positive number.
    """
    vector = modules(directory)[0]
    if vector is None:
        return cfg
    if not isinstance(cfg, config.Encoder):
        raise ValueError(f"{directory} has {MODULES}, and its model is no encoder but a {type(cfg).__name__}")
    longest = _reading(directory).get("max_seq_length")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise ValueError(f"{directory}: max_seq_length = {longest!r} is no positive whole number")
    return dataclasses.replace(cfg, head=vector, length=min(cfg.length, longest or cfg.length))


def lower(tokenizer: Tokenizer, directory: pathlib.Path) -> Tokenizer:
    """The tokenizer, which writes texts in lower case first where the directory's modules do."""
    if not (directory / MODULES).is_file() or not _reading(directory).get("do_lower_case"):
        return tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    steps = [tokenizers.normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    return dataclasses.replace(tokenizer, backend=backend)


def without(cfg: config.Config) -> config.Config:
    """The config as config.json is to describe it, of all the positions that it has."""
    if not isinstance(getattr(cfg, "head", None), config.Vector):
        return cfg
    position = cfg.embedding.position
    length = position.length - position.offset if isinstance(position, config.Learned) else cfg.length
    return dataclasses.replace(cfg, head=None, length=length)


def write(cfg: config.Config, directory: pathlib.Path) -> str | None:
    """Writes the modules of a `Vector` head; returns the file that its product's weights belong in, None where it has none."""
    head = getattr(cfg, "head", None)
    if not isinstance(head, config.Vector):
        return None
    names = ["Transformer", "Pooling", *(["Dense"] if head.width else []), *(["Normalize"] if head.normalize else [])]
    listed = [{"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
              for i, name in enumerate(names)]
    for module in listed[1:]:
        (directory / module["path"]).mkdir(parents=True, exist_ok=True)
    mode = next(mode for mode, pooling in POOLING.items() if pooling is head.pooling)
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": cfg.width} | {
        f"pooling_mode_{switch}": name == mode for name, switch in SWITCHES.items()})
    if head.width:
        _write(directory / "2_Dense" / "config.json", {"in_features": cfg.width, "out_features": head.width, "bias": head.bias,
                                                       "activation_function": IDENTITY})
    # The tokenizer that is saved beside it writes in lower case by itself, if at all.
    _write(directory / READING, {"max_seq_length": cfg.length, "do_lower_case": False})
    _write(directory / MODULES, listed)
    return "2_Dense/model.safetensors" if head.width else None


def _write(file: pathlib.Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

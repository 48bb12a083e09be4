"""The architectures that jaxlm reads and writes: name tables and configs, each as data in one `Family`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm import config
from jaxlm.io.families import bart, bert, bloom, codet5p, deepseek, gemma, gpt, llama, modernbert, moe, t5, t5gemma
from jaxlm.io.families.fields import Family, Fields

# When a model is saved, the first family that can express it is taken.
FAMILIES: dict[str, Family] = {family.name: family for family in (
    *llama.FAMILIES, *moe.FAMILIES, *deepseek.FAMILIES, *gemma.FAMILIES, *gpt.FAMILIES, *bloom.FAMILIES, *t5.FAMILIES,
    *bart.FAMILIES, *t5gemma.FAMILIES, *codet5p.FAMILIES, *bert.FAMILIES, *modernbert.FAMILIES)}


def families() -> dict[str, str]:
    """What can be loaded: `model_type` in config.json -> the models that have it.

    Example:
      >>> families()["gpt_neox"]
      'GPT-NeoX, Pythia'
    """
    return {name: family.title for name, family in FAMILIES.items()}


def find(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: for an unknown architecture; names it and those there are.
    """
    name = hf.get("model_type")
    if name not in FAMILIES:
        stated = f"model_type {name!r}, architectures {hf.get('architectures')}" if name else "no model_type"
        known = "; ".join(f"{key} ({title})" for key, title in families().items())
        raise ValueError(f"config.json has {stated}, which jaxlm does not read. It reads: {known}")
    return FAMILIES[name]


def read(hf: Mapping[str, Any]) -> config.Config:
    """The config that a config.json describes.

    Raises:
      ValueError: for an unknown architecture, a missing key, or a key or value that jaxlm cannot express; names it.
    """
    family = find(hf)
    fields = Fields(hf, family.name, family.defaults, family.aliases)
    cfg = family.read(fields)
    fields.finish(family.ignored)
    return cfg


def write(cfg: config.Config, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """A family that can express the config, and the config.json that reads as it.

    Args:
      name: of the family; None tries all.

    Raises:
      ValueError: when the named one cannot, or none can; says for each what differs.
    """
    if name is not None and name not in FAMILIES:
        raise ValueError(f"no family is called {name!r}; there is {', '.join(FAMILIES)}")
    reasons = []
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        if not isinstance(cfg, family.kinds):
            reasons.append(f"{family.name}: is no {type(cfg).__name__}")
            continue
        if not family.mixtures and _has_mixtures(cfg):
            reasons.append(f"{family.name}: has no mixtures of experts")
            continue
        if any(not isinstance(block.attention, family.attention) for block in _blocks(cfg)):
            reasons.append(f"{family.name}: has only blocks of {family.attention.__name__}")
            continue
        reason = None
        try:
            values = family.write(cfg)
            values = {"architectures": [family.architecture], "model_type": family.name} | values
            reason = _difference(cfg, read(values))
        except ValueError as error:
            reason = str(error)
        if reason is None:
            return family, values
        reasons.append(f"{family.name}: {reason}")
    raise ValueError("no family of transformers expresses this config. " + "; ".join(reasons))


def _blocks(cfg: config.Config) -> list[config.Block]:
    sides = (cfg.encoder, cfg.decoder) if isinstance(cfg, config.EncoderDecoder) else (cfg,)
    return [block for side in sides for block in side.stack.blocks()]


def _has_mixtures(cfg: config.Config) -> bool:
    return any(isinstance(block.feedforward, config.Moe) for block in _blocks(cfg))


def _difference(ours: Any, theirs: Any, path: str = "config") -> str | None:
    """The first place where two configs differ, with both values; None where they are equal."""
    if isinstance(ours, config.Stack) and isinstance(theirs, config.Stack):
        # Blocks may be grouped in any way: that is how weights are stacked here, and changes nothing elsewhere.
        ours, theirs = ours.blocks(), theirs.blocks()
    if type(ours) is type(theirs) and dataclasses.is_dataclass(ours):
        pairs = [(field.name, getattr(ours, field.name), getattr(theirs, field.name)) for field in dataclasses.fields(ours)]
        found = (_difference(a, b, f"{path}.{name}") for name, a, b in pairs)
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        found = (_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    else:
        return None if ours == theirs else f"{path} is {ours!r} and would be {theirs!r}"
    return next((reason for reason in found if reason is not None), None)

"""Writes a run's weights as a Hugging Face directory, which jaxlm and transformers load.

python -m train.export runs/tiny --out tiny
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import PyTree

import jaxlm
from infer import session
from jaxlm import config, model
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.training.checkpoint import read_weights


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a run's weights as a Hugging Face directory."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """The folder that `python -m train` wrote to."""
    out: pathlib.Path
    """The folder to write."""
    step: int | None = None
    """Which checkpoint; default the newest."""
    average: bool = False
    """The average of the weights over the steps, where the run kept one."""
    family: str | None = None
    """The architecture to save as; default the first that can express the model."""
    json: bool = False
    """Print the results as one line of JSON."""


def load(run: pathlib.Path, step: int | None = None, average: bool = False) -> tuple[int, jaxlm.Model]:
    """A run's model at a checkpoint, on this machine's first device.

    Raises:
      ValueError: for a folder without checkpoints, and as `jaxlm.training.checkpoint.read_weights`.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shapes(about: Mapping[str, Any]) -> PyTree:
        spec = model.spec(config.from_dict(about["model"]))
        return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, jnp.float32, sharding=place), spec)

    step, about, weights = read_weights(run / "checkpoints", shapes, step=step, average=average)
    return step, jaxlm.Model(config.from_dict(about["model"]), weights, Tokenizer.from_directory(run / "tokenizer"))


def main(arguments: Arguments) -> None:
    """Reads a checkpoint and writes it."""
    step, found = load(arguments.run, arguments.step, arguments.average)
    jaxlm.save(found, arguments.out, family=arguments.family)
    session.console(arguments.json).print(f"step {step} of {arguments.run} in {arguments.out}: {found}")
    session.finish({"step": step, "out": str(arguments.out)}, arguments.json)


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

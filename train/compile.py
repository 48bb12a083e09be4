"""Compiles a configuration's step for TPUs on a machine that has none, and says what the compiler made of it.

python -m train.compile configs/llama_1b.py --topology v5e:4x4
python -m train.compile configs/llama3_8b.py --topology v5p:2x2x1 --search

The real TPU compiler (libtpu) runs anywhere; nothing is executed, no weights and no data are read. What is printed are its
facts: whether it fits, what the memory goes for, how many products a step takes beside those that the model needs, what it
sends from chip to chip. They are no measurement of speed.
"""

import dataclasses
import importlib.metadata
import math
from typing import Annotated, Any, Literal

import jax
import tyro
from jaxtyping import PyTree
from rich.table import Table

from infer import compile as slices  # it says to jax that no accelerator of this machine is meant, and reads what compilers say
from infer import hlo, session
from jaxlm import params, sharding
from jaxlm.recipe import Program, Recipe
from train.__main__ import changed, read


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles a configuration's step for TPUs on a machine that has none."""

    configuration: Annotated[str, tyro.conf.Positional]
    """A file with a function config() that returns a jaxlm.recipe.Recipe."""
    topology: str = "v5e:4x4"
    """Chip and slice: v5e:4x4, v5p:2x2x1, v5p:8x8x4, v6e:16x16 ..."""
    slices: int = 1
    """How many such slices; the axis data of the mesh, else fsdp, goes over them."""
    mesh: tuple[str, ...] = ()
    """Like fsdp=-1 or fsdp=64 model=4; default the configuration's."""
    rows: int | None = None
    """Sequences of a batch, over all chips."""
    length: int | None = None
    """Tokens of a sequence; of pairs, of its targets."""
    inputs: int | None = None
    """Of pairs, tokens of a sequence's inputs."""
    pieces: int | None = None
    """Parts of a batch that are taken one after another."""
    remat: Literal["none", "full", "products"] | None = None
    """What the backward pass computes again."""
    search: bool = False
    """Look for the largest batch that fits, and with it the remat that computes least again."""
    json: bool = False
    """Print one JSON object on the last line of standard output, and the table for people on standard error."""


def facts(recipe: Recipe, topology: str, count: int = 1) -> dict[str, Any]:
    """What the compiler says of the recipe's step on so many slices; bytes, FLOPs and collectives are those of one chip."""
    program = Program(recipe, slices.devices(topology, count))
    with jax.set_mesh(program.mesh):
        state, batch = program.abstract(), program.abstract_batch()
        built = slices.build(program.step().lower(state, batch))
    chips = program.mesh.size
    usable = slices.usable_bytes(program.mesh)
    wanted = program.flops_per_token * recipe.tokens / chips
    found = {
        "topology": topology, "slices": count, "device": program.mesh.devices.flat[0].device_kind, "chips": chips,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "parameters": params.count(program.spec), "rows": recipe.rows, "length": recipe.length, "inputs": recipe.inputs,
        "pieces": recipe.pieces, "remat": recipe.remat, "fits": built.compiled is not None, "needed_bytes": built.needed,
        "usable_bytes": usable,
        "weight_bytes": _bytes(state.params), "moment_bytes": _bytes(state.moments), "batch_bytes": _bytes(batch),
        "temporary_bytes": built.temporary, "model_flops": wanted, "host_callbacks": built.host_transfers,
        "compile_s": built.seconds, "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"),
    }
    if built.compiled is not None:
        module = hlo.Module(built.text)
        found |= {"flops": hlo.flops(module, module.entry), "collectives": hlo.collectives(module, module.entry)}
        found["flops_ratio"] = found["flops"] / wanted
    return found


def _bytes(tree: PyTree) -> int:
    """Bytes that abstract arrays take on each chip; keys of random numbers take next to none."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def search(recipe: Recipe, topology: str, count: int, console: Any) -> dict[str, Any]:
    """The largest batch that fits with everything computed again, then the remat that computes least again with that batch.

    Batches are multiples of the least that the mesh allows: doubled until one does not fit, then halved between the two until
    they are within an eighth.

    Returns:
      the facts of the best; those of the least batch where not even that fits.
    """
    shape = sharding.mesh(devices=slices.devices(topology, count), **dict(recipe.mesh)).shape
    ways = shape["data"] * shape["fsdp"] * recipe.pieces

    def attempt(times: int, remat: str) -> dict[str, Any]:
        found = facts(dataclasses.replace(recipe, rows=times * ways, remat=remat), topology, count)
        console.print(f"{found['rows']} rows, remat {remat}: {'fits' if found['fits'] else 'does not fit'}, "
                      f"{_gib(found['needed_bytes'])}")
        return found

    best, low, high = attempt(1, "full"), 1, None
    if not best["fits"]:
        return best
    while high is None or 8 * (high - low) > low and high - low > 1:
        times = 2 * low if high is None else (low + high) // 2
        found = attempt(times, "full")
        if found["fits"]:
            best, low = found, times
        else:
            high = times
    for remat in ("none", "products"):  # in the order of what they save
        found = attempt(low, remat)
        if found["fits"]:
            return found
    return best


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def show(found: dict[str, Any], console: Any) -> None:
    """The table."""
    table = Table("", "per chip")
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one chip"
    table.add_row("slice", f"{found['slices']} of {found['topology']}, {found['chips']} x {found['device']}; {mesh}")
    sides = f"{found['length']}" if found["inputs"] is None else f"{found['inputs']} and {found['length']}"
    table.add_row("batch", f"{found['rows']} rows of {sides} tokens over all chips, in {found['pieces']} piece(s)")
    table.add_row("weights", f"{found['parameters']:,} in all; {_gib(found['weight_bytes'])}, moments "
                             f"{_gib(found['moment_bytes'])}")
    table.add_row("needed", f"{_gib(found['needed_bytes'])} of {_gib(found['usable_bytes'])}: "
                            f"{'fits' if found['fits'] else 'DOES NOT FIT'}")
    if found["fits"]:
        table.add_row("temporary", _gib(found["temporary_bytes"]))
        table.add_row("products", f"{found['flops']:.4g} FLOPs, {found['flops_ratio']:.3f} of the model's "
                                  f"{found['model_flops']:.4g}; remat {found['remat']}")
        for kind, sums in found["collectives"].items():
            table.add_row(kind, f"{sums['count']} of {_gib(sums['bytes'])} in all")
    table.add_row("host callbacks", str(found["host_callbacks"]))
    table.add_row("compiler", f"libtpu {found['libtpu']}, jax {found['jax']}, {found['compile_s']:.0f} s")
    console.print(table)


def main(arguments: Arguments) -> dict[str, Any]:
    """Compiles, or searches, and prints."""
    recipe, console = changed(read(arguments.configuration), arguments), session.console(arguments.json)
    if arguments.search:
        found = search(recipe, arguments.topology, arguments.slices, console)
    else:
        found = facts(recipe, arguments.topology, arguments.slices)
    show(found, console)
    session.finish(found, arguments.json)
    return found


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

"""Trains what a configuration says, and goes on where it left off when the same command is given again.

python -m train configs/tiny.py --out runs/tiny
"""

import dataclasses
import importlib.util
import pathlib
from typing import Annotated, Literal

import jax
import tyro

from infer import session
from jaxlm import config
from jaxlm.decoding.speculative import cost
from jaxlm.params import count
from jaxlm.recipe import Recipe, Run
from jaxlm.training import report
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.loop import Fitted, Settings, fit


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Several processes that train one model."""

    coordinator: str | None = None
    """Address and port of the first process, with --distributed.processes and --distributed.index; TPU pods need none."""
    processes: int | None = None
    """How many there are."""
    index: int | None = None
    """Which of them this is, from 0."""
    pod: bool = False
    """Ask the TPU pod or cluster at hand for all of that."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains what a configuration says, and goes on where it left off when the same command is given again."""

    configuration: Annotated[str, tyro.conf.Positional]
    """A file with a function config() that returns a jaxlm.recipe.Recipe, like configs/tiny.py."""
    out: pathlib.Path | None = None
    """The run's folder; default runs/NAME."""
    steps: int | None = None
    """Updates; the learning rate keeps to the configuration's schedule."""
    rows: int | None = None
    """Sequences of a batch, over all devices."""
    length: int | None = None
    """Tokens of a sequence."""
    pieces: int | None = None
    """Parts of a batch that are taken one after another: less memory, the same result."""
    seed: int | None = None
    """Of weights, order and examples."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation."""
    remat: Literal["none", "full", "products"] | None = None
    """What the backward pass computes again: less memory, more work."""
    mesh: tuple[str, ...] = ()
    """Like data=2 fsdp=4; -1 is what the others leave."""
    checkpoint_every: int | None = None
    """Steps."""
    evaluate_every: int | None = None
    """Steps."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 1
    """How many of the best by held-out bits per byte stay beside them."""
    skip: int = 0
    """Up to how many steps in a row may be left out because their loss is not finite."""
    workers: int = 0
    """Processes that read and tokenise; 0 does it in a thread."""
    profile: bool = False
    """Write a trace of steps 5 to 8 to the run's folder."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    json: bool = False
    """Print the results as one line of JSON."""


def read(path: str) -> Recipe:
    """The recipe in a file.

    Raises:
      ValueError: when there is no such file, or it has none.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"there is no configuration {path!r}; configs/ has some")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ValueError(f"{path} has no function config()")
    recipe = module.config()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"config() of {path} gives a {type(recipe).__name__}; to be trained it has to give a "
                         "jaxlm.recipe.Recipe")
    return recipe


def read_mesh(axes: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Axes and their sizes, as a recipe has them.

    Raises:
      ValueError: for what is not like data=2.
    """
    parts = [axis.partition("=") for axis in axes]
    if not all(size.removeprefix("-").isdigit() for _, _, size in parts):
        raise ValueError(f"--mesh takes axes with their sizes, like data=2 fsdp=4, got {' '.join(axes)}")
    return tuple((name, int(size)) for name, _, size in parts)


def changed(recipe: Recipe, arguments: Arguments) -> Recipe:
    """The recipe with what the command line says otherwise."""
    names = ("steps", "rows", "length", "pieces", "seed", "dtype", "remat", "checkpoint_every", "evaluate_every")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.mesh:
        given["mesh"] = read_mesh(arguments.mesh)
    return dataclasses.replace(recipe, **given)


def run(recipe: Recipe, out: pathlib.Path, arguments: Arguments, quiet: bool = False) -> tuple[Run, Fitted]:
    """Trains, from the folder's newest checkpoint where there is one."""
    job = Run(recipe)
    first = jax.process_index() == 0
    console = session.console(arguments.json)
    with Checkpoints(out / "checkpoints", recipe.about(), arguments.keep_last, arguments.keep_best) as checkpoints:
        if checkpoints.latest is None:
            state, rows, start = job.begin(), None, 0
        else:
            found = checkpoints.restore(job.abstract(), job.abstract_rows())
            state, rows, start = found.state, found.rows, found.step
        reports: list[report.Report] = []
        if first:
            if not (out / "tokenizer").exists():
                job.tokenizer.save(out / "tokenizer")
            (out / "config.json").write_text(config.json.dumps(_resolved(recipe), indent=1) + "\n", encoding="utf-8")
            console.print(f"{count(job.spec):,} weights in {out}, {dict(job.mesh.shape)}"
                          + (f", from step {start}" if start else ""))
            reports = [report.Metrics(out, start)] + ([] if quiet else [report.Bar(recipe.steps, start, console)])
        settings = Settings(recipe.steps, recipe.checkpoint_every, recipe.evaluate_every, arguments.skip,
                            out / "profile" if arguments.profile else None)
        told = report.Both(*reports)
        try:
            with jax.set_mesh(job.mesh), job.batches(rows, start, arguments.workers) as batches:
                done = fit(job.step(arguments.skip > 0), state, batches, place=job.place, settings=settings, report=told,
                           checkpoints=checkpoints, evaluate=job.evaluation(), rate=recipe.optimizer.schedule, start=start,
                           flops_per_token=job.flops_per_token, peak=_peak(job))
        finally:
            told.close()
    if first:
        report.draw(out)
    return job, done


def _peak(job: Run) -> float | None:
    """Products per second of all chips together; None where they are not known."""
    chips = [cost.chip(device.device_kind) for device in job.mesh.devices.flat]
    return None if None in chips else sum(one.flops for one in chips if one is not None)


def _resolved(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain JSON, for people: what has no form of its own is written as Python shows it."""
    return {field.name: config.to_dict(recipe.model) if field.name == "model" else repr(getattr(recipe, field.name))
            for field in dataclasses.fields(recipe)}


def main(arguments: Arguments) -> None:
    """Reads the configuration, trains, tells what came of it."""
    given = arguments.distributed
    if given.coordinator is not None:
        jax.distributed.initialize(given.coordinator, given.processes, given.index)
    elif given.pod:
        jax.distributed.initialize()
    session.cache_compilations()
    recipe = changed(read(arguments.configuration), arguments)
    out = arguments.out or pathlib.Path("runs") / pathlib.Path(arguments.configuration).stem
    _, done = run(recipe, out, arguments)
    if jax.process_index() == 0:
        console = session.console(arguments.json)
        said = f"{done.step} of {recipe.steps} steps"
        if done.stopped:
            said += f"; stopped by {done.stopped}: the same command goes on from here"
        if done.evaluation:
            said += "; held out: " + ", ".join(f"{name} {value:.4f}" for name, value in done.evaluation.items())
        console.print(f"{said}; goodput {done.time.goodput:.0%} of {done.time.whole:.0f} s")
        session.finish({"out": str(out), "step": done.step, "stopped": done.stopped, "evaluation": done.evaluation,
                        "seconds": dataclasses.asdict(done.time), "goodput": done.time.goodput}, arguments.json)


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

"""Trains what a configuration says, and goes on where it left off when the same command is given again.

python -m train configs/tiny.py --out runs/tiny
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import tyro

from infer import session
from jaxlm import config, sharding
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decoding.speculative import cost
from jaxlm.params import count
from jaxlm.recipe import CHANGEABLE, Pretrained, Recipe, Run, identity, whole
from jaxlm.training import report
from jaxlm.training.checkpoint import Checkpoints, OtherRun
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
    """Tokens of a sequence; of pairs, of its targets."""
    inputs: int | None = None
    """Of pairs, tokens of a sequence's inputs."""
    pieces: int | None = None
    """Parts of a batch that are taken one after another: less memory, the same result."""
    initial: str | None = None
    """The model whose weights training begins with: a directory like those of train.export, or a name on the Hub. Where the
    configuration makes its model of another (Pretrained.adapt), it is made of this one."""
    seed: int | None = None
    """Of weights, order and examples."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation."""
    remat: Literal["none", "full", "products"] | None = None
    """What the backward pass computes again: less memory, more work."""
    mesh: tuple[str, ...] = ()
    """Like data=2 fsdp=4; -1 is what the others leave. dp, fsdp or tp alone is one axis over all that is left."""
    checkpoint_every: int | None = None
    """Steps."""
    evaluate_every: int | None = None
    """Steps."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 1
    """How many of the best by held-out bits per byte stay beside them; of checkpoints at steps that are evaluated too."""
    skip: int = 0
    """Up to how many steps in a row may be left out because their loss is not finite."""
    workers: int = 0
    """Processes that read and tokenise; 0 does it in a thread."""
    profile: bool = False
    """Write a trace of the 6th to 8th step from where this run begins to its folder."""
    changed_data: bool = False
    """Go on from a checkpoint of another objective, other data or another beginning too: as many documents of the new data are
    left out as it had read of the old."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    json: bool = False
    """Print the results as one line of JSON."""


def read(path: str) -> Recipe:
    """The recipe in a file.

    Raises:
      ValueError: when there is no such file, it is none of Python's, or it has none.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"there is no configuration {path!r}; configs/ has some")
    name = f"configuration_{file.stem}"  # a stem alone may be the name of another module
    module_spec = importlib.util.spec_from_file_location(name, file)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{path} is no Python file, as configurations are; configs/ has some")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # where dataclasses look for what their annotations name
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "config"):
            raise ValueError(f"{path} has no function config()")
        recipe = module.config()
    finally:
        del sys.modules[name]  # workers cannot import it: what it defines goes to them whole
    if not isinstance(recipe, Recipe):
        raise ValueError(f"config() of {path} gives a {type(recipe).__name__}; to be trained it has to give a "
                         "jaxlm.recipe.Recipe")
    return recipe


def read_mesh(axes: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Axes and their sizes, as a recipe has them; dp, fsdp and tp alone are axes over all devices that are left.

    Raises:
      ValueError: for what is not like data=2.
    """
    parts = [(f"{sharding.PRESETS[axis]}=-1" if axis in sharding.PRESETS else axis).partition("=") for axis in axes]
    if not all(size.removeprefix("-").isdigit() for _, _, size in parts):
        raise ValueError(f"--mesh takes axes with their sizes, like data=2 fsdp=4, or one of {', '.join(sharding.PRESETS)} for "
                         f"one over all devices, got {' '.join(axes)}")
    return tuple((name, int(size)) for name, _, size in parts)


def changed(recipe: Recipe, arguments: Any) -> Recipe:
    """The recipe with what the command line says otherwise, as far as a program's arguments name it.

    Raises:
      ValueError: for --initial where the configuration makes its model of several, and as `read_mesh` and `Recipe`.
    """
    names = ("steps", "rows", "length", "inputs", "pieces", "initial", "seed", "dtype", "remat", "checkpoint_every",
             "evaluate_every")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    if arguments.mesh:
        given["mesh"] = read_mesh(arguments.mesh)
    begun = recipe.initial
    if "initial" in given and isinstance(begun, Pretrained) and begun.adapt is not None:
        if len(begun.paths) != 1:
            raise ValueError(f"--initial names one model, and the configuration makes its own of {len(begun.paths)}, "
                             f"{', '.join(begun.paths)}: say others in the configuration")
        given["initial"] = dataclasses.replace(begun, paths=given["initial"])
    return dataclasses.replace(recipe, **given)


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from training in a folder, until this one ends, however it does.

    Raises:
      ValueError: when another one is.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being trained by another process") from None
        except OSError:  # a file system that knows no locks
            pass
        yield


def keep(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Writes a run's tokenizer, all or nothing, where it is not there yet.

    Raises:
      ValueError: when there is another one, or something that is none.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, and the run's tokenizer has to go there: remove it, or give another folder "
                         "with --out")
    if directory.is_dir() and any(directory.iterdir()):
        there, ours = identity(Tokenizer.from_directory(directory)), identity(tokenizer)
        if there != ours:
            raise ValueError(f"{directory} is another tokenizer ({there}) than this run's ({ours}): remove it, or give another "
                             "folder with --out")
        return
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.replace(directory)


def run(recipe: Recipe, out: pathlib.Path, arguments: Arguments, quiet: bool = False) -> tuple[Run, Fitted]:
    """Trains, from the folder's newest checkpoint where there is one."""
    if min(arguments.workers, arguments.keep_best) < 0 or arguments.keep_last < 1:
        raise ValueError("--workers and --keep-best are at least 0, --keep-last at least 1, got "
                         f"{arguments.workers}, {arguments.keep_best} and {arguments.keep_last}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, and {out} is a file")
    settings = Settings(recipe.steps, recipe.checkpoint_every, recipe.evaluate_every, arguments.skip,
                        out / "profile" if arguments.profile else None)
    # All that is read is opened before anything is written, and before the weights, which may take minutes.
    job = Run(recipe)
    evaluate = job.evaluation()
    first = jax.process_index() == 0
    console = session.console(arguments.json)
    with (locked(out) if first else contextlib.nullcontext(),
          Checkpoints(out / "checkpoints", job.about(), arguments.keep_last, arguments.keep_best) as checkpoints):
        if checkpoints.latest is None:
            state, rows, start = job.begin(), None, 0
        else:
            try:
                found = checkpoints.restore(job.abstract(), job.abstract_rows(),
                                            free=CHANGEABLE if arguments.changed_data else ())
            except OtherRun as error:
                if error.names <= set(CHANGEABLE):
                    raise ValueError(f"{error}; --changed-data goes on all the same") from error
                raise
            state, rows, start = found.state, whole(found.rows).copy(), found.step
            if "phases" in found.changed:
                rows[:, -1] = 0  # what was read of a document that is not there any more
        reports: list[report.Report] = []
        if first:
            keep(job.tokenizer, out / "tokenizer")
            (out / "config.json").write_text(config.json.dumps(_resolved(recipe), indent=1) + "\n", encoding="utf-8")
            console.print(f"{count(job.spec):,} weights in {out}, {dict(job.mesh.shape)}"
                          + (f", from step {start}" if start else ""))
            reports = [report.Metrics(out, start)] + ([] if quiet else [report.Bar(recipe.steps, start, console)])
        told = report.Both(*reports)
        try:
            with jax.set_mesh(job.mesh), job.batches(rows, start, arguments.workers) as batches:
                done = fit(job.step(arguments.skip > 0), state, batches, place=job.place, settings=settings, report=told,
                           checkpoints=checkpoints, evaluate=evaluate, rate=recipe.optimizer.schedule, start=start,
                           flops_per_token=job.flops_per_token, peak=_peak(job), documents=batches.documents)
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


def connect(given: Distributed) -> None:
    """Meets the other processes, where there are any.

    Raises:
      ValueError: for a part of what it takes.
    """
    parts = given.coordinator, given.processes, given.index
    if given.pod and parts != (None, None, None):
        raise ValueError("--distributed.pod asks the cluster for what the other --distributed options say: they exclude each "
                         "other")
    if given.pod:
        jax.distributed.initialize()
    elif parts != (None, None, None):
        if given.coordinator is None or given.processes is None or given.index is None:
            raise ValueError("--distributed.coordinator, --distributed.processes and --distributed.index go together, got "
                             f"{', '.join(map(str, parts))}")
        if not 0 <= given.index < given.processes:
            raise ValueError(f"--distributed.index is from 0 to {given.processes - 1} of {given.processes} processes, got "
                             f"{given.index}")
        jax.distributed.initialize(*parts)


def main(arguments: Arguments) -> None:
    """Reads the configuration, trains, tells what came of it."""
    connect(arguments.distributed)
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

"""What a run tells while it goes: a line per step in metrics.jsonl, TensorBoard, a bar in the terminal, a picture at its end.

Only the first process writes.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Report(Protocol):
    """Where records go."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Of a step: "step" (updates made), "loss" and so on."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Of an evaluation: "step" and its results."""

    def close(self) -> None:
        """Nothing comes any more."""


class Metrics:
    """metrics.jsonl and evaluations.jsonl: a JSON object per line, and TensorBoard's files beside them."""

    def __init__(self, directory: pathlib.Path, start: int = 0, tensorboard: bool = True) -> None:
        """
        Args:
          start: updates made before; what files hold of later ones, of a run that was cut short, is taken out.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for name in ("metrics", "evaluations"):
            path = directory / f"{name}.jsonl"
            before = [line for line in _lines(path) if line["step"] <= start]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(map(_line, before)), encoding="utf-8")
            partial.replace(path)
            self.files[name] = path.open("a", encoding="utf-8")
        self.board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        self.files[name].write(_line(record))
        self.files[name].flush()
        if self.board is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{'train' if name == 'metrics' else 'evaluation'}/{key}", value, record["step"])

    def step(self, record: Mapping[str, Any]) -> None:
        """A line."""
        self._write("metrics", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A line."""
        self._write("evaluations", record)

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()
        if self.board is not None:
            self.board.close()


def _line(record: Mapping[str, Any]) -> str:
    """JSON, which has no word for numbers that are not finite: they become null."""
    return json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                       for name, value in record.items()}) + "\n"


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file, but for a last line that was cut short."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


class Bar:
    """Progress in a terminal: loss, tokens per second, share of the chip's peak where it is known, time left."""

    def __init__(self, steps: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[says]}"),
                                 TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("steps", total=steps, completed=start, says="compiling")
        self.progress.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Moves on."""
        says = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s"
        if record.get("mfu") is not None:
            says += f"  MFU {record['mfu']:.1%}"
        self.progress.update(self.task, completed=record["step"], says=says)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A line above the bar."""
        found = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step")
        self.progress.console.print(f"step {record['step']}: {found}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.progress.stop()


class Both:
    """Several reports as one."""

    def __init__(self, *reports: Report) -> None:
        self.reports = reports

    def step(self, record: Mapping[str, Any]) -> None:
        """To all."""
        for report in self.reports:
            report.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """To all."""
        for report in self.reports:
            report.evaluation(record)

    def close(self) -> None:
        """All, also when one cannot be closed."""
        with contextlib.ExitStack() as stack:
            for report in reversed(self.reports):
                stack.callback(report.close)


def draw(directory: pathlib.Path) -> pathlib.Path | None:
    """loss.png from a run's records; None where there are none."""
    steps, found = _lines(directory / "metrics.jsonl"), _lines(directory / "evaluations.jsonl")
    if not steps:
        return None
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_curve(steps), color="0.7", label="training, nats per token")
    if found:
        axes.plot(*_curve(found), "o-", color="C0", markersize=3, label="held out, nats per token")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    path = directory / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def _curve(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [math.nan if line["loss"] is None else line["loss"] for line in lines]

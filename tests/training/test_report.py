"""What a run tells: files that go on where a run does, a bar, a picture."""

import io
import json
import math

import matplotlib.image
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from jaxlm.training.report import Bar, Both, Metrics, draw


def record(step, **more):
    return {"step": step, "loss": 1.0 / step, "tokens_per_s": 12345.6} | more


def lines(path):
    """As strict JSON: without NaN and Infinity, which it does not have."""
    def refuse(name):
        raise ValueError(name)
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def written(directory, steps, start=0, **options):
    metrics = Metrics(directory, start, **options)
    for step in steps:
        metrics.step(record(step))
        if step % 2 == 0:
            metrics.evaluation({"step": step, "loss": 2.0})
    metrics.close()


def events(directory):
    """(step, name, value) of TensorBoard's files: records of 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    found = []
    for path in sorted(directory.glob("tensorboard/events.*")):
        rest = path.read_bytes()
        while rest:
            size = int.from_bytes(rest[:8], "little")
            event = event_pb2.Event.FromString(rest[12:12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            rest = rest[16 + size:]
    return found


def test_lines_are_there_at_once(tmp_path):
    metrics = Metrics(tmp_path / "new" / "run", tensorboard=False)
    metrics.step(record(1))
    assert lines(tmp_path / "new" / "run" / "metrics.jsonl") == [record(1)]
    metrics.close()
    assert not (tmp_path / "new" / "run" / "tensorboard").exists()


def test_a_run_that_goes_on_takes_out_what_it_will_write_again(tmp_path):
    written(tmp_path, range(1, 8), tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the machine went off
    written(tmp_path, range(5, 7), start=4, tensorboard=False)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == [2, 4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluations.jsonl", "metrics.jsonl"]
    written(tmp_path, [1], tensorboard=False)
    assert lines(tmp_path / "metrics.jsonl") == [record(1)] and not lines(tmp_path / "evaluations.jsonl")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    metrics = Metrics(tmp_path)
    metrics.step(record(1, loss=value))
    metrics.step(record(2))
    metrics.close()
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [None, 0.5]
    assert draw(tmp_path).stat().st_size > 1000
    Metrics(tmp_path, start=1, tensorboard=False).close()
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [None]


def test_tensorboard_has_the_same_numbers(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.step({"step": 3, "loss": 0.5, "tokens": 8.0, "skipped": True})
    metrics.evaluation({"step": 3, "bits_per_byte": 0.25})
    metrics.close()
    assert events(tmp_path) == [(3, "train/loss", 0.5), (3, "train/tokens", 8.0), (3, "train/skipped", 1.0),
                                (3, "evaluation/bits_per_byte", 0.25)]


def shown(*records, width=120, evaluations=()):
    text = io.StringIO()
    bar = Bar(10, 2, Console(file=text, force_terminal=True, width=width, color_system=None))
    for one in records:
        bar.step(one)
    for one in evaluations:
        bar.evaluation(one)
    bar.progress.refresh()
    bar.close()
    return text.getvalue()


def test_the_bar():
    assert "2/10" in shown() and "compiling" in shown()
    text = shown(record(4, mfu=0.413), evaluations=[{"step": 4, "loss": 2.0, "bits_per_byte": 1.23456}])
    assert "4/10" in text and "loss 0.250" in text and "12,346 tokens/s" in text and "MFU 41.3%" in text
    assert "step 4: loss 2.0000  bits_per_byte 1.2346" in text
    assert "MFU" not in shown(record(4))
    assert "loss nan" in shown(record(4, loss=math.nan))


def test_a_bar_that_is_no_terminal_keeps_to_a_line():
    text = io.StringIO()
    bar = Bar(10, console=Console(file=text, width=120))
    for step in range(1, 11):
        bar.step(record(step))
    bar.close()
    assert text.getvalue().count("\n") <= 2 and "10/10" in text.getvalue()


class Heard:
    def __init__(self, fails=False):
        self.heard, self.fails = [], fails

    def step(self, record):
        self.heard.append(("step", record))

    def evaluation(self, record):
        self.heard.append(("evaluation", record))

    def close(self):
        self.heard.append("close")
        if self.fails:
            raise OSError("full")


def test_both_get_everything():
    reports = Heard(), Heard()
    both = Both(*reports)
    both.step(record(1))
    both.evaluation(record(2))
    both.close()
    assert reports[0].heard == reports[1].heard == [("step", record(1)), ("evaluation", record(2)), "close"]
    reports = Heard(fails=True), Heard()
    with pytest.raises(OSError, match="full"):
        Both(*reports).close()
    assert reports[1].heard == ["close"]
    Both().step(record(1))


def test_a_picture(tmp_path):
    assert draw(tmp_path) is None
    written(tmp_path, [1], tensorboard=False)
    assert draw(tmp_path) == tmp_path / "loss.png"
    alone = (tmp_path / "loss.png").read_bytes()
    written(tmp_path, range(1, 9), tensorboard=False)
    draw(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" != alone
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (600, 1050)

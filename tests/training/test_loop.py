"""The loop: every step told once, in order and late; stopping, going on, and errors lose nothing."""

import dataclasses
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training import loop
from jaxlm.training.checkpoint import CheckpointError, Checkpoints
from jaxlm.training.loop import AHEAD, END, NonFiniteLoss, Settings, Time, fit
from jaxlm.training.step import Metrics, State

LENGTH = 4
HANDLED = (signal.SIGTERM, signal.SIGINT)


def begin(average=False):
    weights = {"w": jnp.ones(3)}
    return State(jnp.zeros((), jnp.int32), weights, (jnp.zeros(3),), {"w": jnp.full(3, 5.0)} if average else None,
                 jax.random.key(0))


def stub(traces=None, skip=False):
    """A step whose loss is the batch's number; a number that is none reaches the weights, as in real life."""
    def advance(state, batch):
        if traces is not None:
            traces.append(1)
        number = jnp.mean(batch["x"])
        noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (3,))
        new = jax.tree.map(lambda leaf: leaf * 0.9 + number * noise, state.params)
        finite = jnp.isfinite(number)
        if skip:
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state.params)
        metrics = Metrics(number, jnp.float32(3.0), number * 2, finite, {"accuracy": number / 10})
        return state.replace(step=state.step + 1, params=new), metrics
    return jax.jit(advance, donate_argnums=0)


class Numbers:
    """Batches whose numbers are those of their steps (from 1); `bad` ones are not finite; `at` does things before a batch."""

    def __init__(self, start=0, bad=(), at=None, end=None):
        self.step, self.bad, self.at, self.end = start, bad, at or {}, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.step == self.end:
            raise StopIteration
        self.step += 1
        self.at.get(self.step, lambda: None)()
        number = np.nan if self.step in self.bad else self.step
        segments = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
        state = np.array([[10 * self.step, 5], [10 * self.step + 3, 6]], np.int32)
        return {"x": np.full((2, LENGTH), number, np.float32), "segments": segments, "state": state}


def documents(batch, step):
    """As `Batches.documents`: two of the first row, one of the second."""
    number = int(batch["state"][0, 0])
    return {4: [(0, 1, number), (0, 0, step)], 5: [(0, 1, number + 3)]}


class Heard:
    """A report that remembers."""

    def __init__(self):
        self.records, self.evaluations = [], []

    def step(self, record):
        self.records.append(dict(record))

    def evaluation(self, record):
        self.evaluations.append(dict(record))

    def close(self):
        pass


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Takes a step as optax counts them."""

    factor: float

    def __call__(self, step):
        return self.factor * jnp.asarray(step, jnp.float32)


def place(batch):
    return {name: jnp.asarray(batch[name]) for name in ("x", "state")}


def go(steps, *, numbers=None, state=None, report=None, advance=None, **options):
    settings = {name: options.pop(name) for name in ("checkpoint_every", "evaluate_every", "skip", "profile", "profiled")
                if name in options}
    report = Heard() if report is None else report
    numbers = Numbers(options.get("start", 0)) if numbers is None else numbers
    done = fit(stub() if advance is None else advance, begin() if state is None else state, numbers, place=place,
               settings=Settings(steps, **settings), report=report, **options)
    return done, report


@pytest.fixture
def handlers():
    """Those before are those after."""
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before


pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize(("start", "steps"), [(0, 1), (0, 2), (0, 7), (4, 9), (5, 5)])
def test_one_record_per_step_in_order(start, steps):
    done, heard = go(steps, start=start, rate=Schedule(0.5), flops_per_token=10.0, peak=100.0)
    assert [record["step"] for record in heard.records] == list(range(start + 1, steps + 1))
    for record in heard.records:
        number = record["step"]
        assert record["loss"] == number and record["gradient_norm"] == 2 * number
        assert (record["tokens"], record["weight"]) == (2 * LENGTH, 3.0)
        assert record["accuracy"] == pytest.approx(number / 10) and record["padding"] == 3 / 8
        assert record["learning_rate"] == 0.5 * (number - 1)
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] / 10) and record["tokens_per_s"] > 0
        assert "skipped" not in record
    assert (done.step, done.stopped, done.evaluation) == (steps, None, None)
    assert int(done.state.step) == steps - start


def test_it_is_compiled_once():
    traces = []
    go(6, advance=stub(traces), evaluate_every=2, evaluate=lambda weights, carry: {"loss": 1.0})
    assert len(traces) == 1


def test_the_host_does_not_wait_for_the_step_at_hand(monkeypatch):
    """When a batch is asked for, AHEAD steps before it have not been read; in the end all are."""
    read, asked = [], []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: read.append(get(tree)) or read[-1])
    steps = 7
    go(steps, numbers=Numbers(at={step: lambda: asked.append(len(read)) for step in range(1, steps + 1)}),
       rate=Schedule(1.0))
    assert asked == [max(step - 1 - AHEAD, 0) for step in range(1, steps + 1)]
    assert [float(metrics.loss) for metrics, _ in read] == list(range(1, steps + 1))


@pytest.mark.parametrize("bad", [3, 4, 5, 8])
@pytest.mark.parametrize("every", [1, 2, 4, 8])
def test_a_loss_that_is_not_finite_stops_before_it_is_kept(tmp_path, bad, every):
    heard = Heard()
    with Checkpoints(tmp_path, {}, last=100) as kept:
        last = (bad - 1) // every * every
        where = f"the last checkpoint is of step {last}" if last else "there is no checkpoint"
        read = f"documents as phase/source/number, from 0, of row 4: 0/1/{bad}0 0/0/{bad - 1}, row 5: 0/1/{bad}3$"
        with pytest.raises(NonFiniteLoss, match=f"^step {bad}: loss nan, gradient norm nan; {where}; {read}"):
            go(8, numbers=Numbers(bad=[bad]), report=heard, checkpoints=kept, checkpoint_every=every, documents=documents)
    assert sorted(map(int, os.listdir(tmp_path))) == list(range(every, bad, every))
    assert [record["step"] for record in heard.records] == list(range(1, bad))


def test_without_checkpoints_it_says_so():
    with pytest.raises(NonFiniteLoss, match="step 2: .*; there is no checkpoint$"):
        go(8, numbers=Numbers(bad=[2]))


def test_weights_that_are_not_finite_are_told_apart():
    def advance(state, batch):
        state, metrics = stub()(state, batch)
        return state, metrics.replace(finite=metrics.loss < 3)
    with pytest.raises(NonFiniteLoss, match="step 3: loss 3.0, gradient norm 6.0, but the new weights are not finite; there"):
        go(8, advance=jax.jit(advance))


def test_some_in_a_row_may_be_left_out():
    done, heard = go(9, numbers=Numbers(bad=[2, 3, 6, 7]), advance=stub(skip=True), skip=2, documents=documents)
    assert [record["step"] for record in heard.records] == list(range(1, 10))
    assert [record["step"] for record in heard.records if record.get("skipped")] == [2, 3, 6, 7]
    assert [record["documents"][-7:] for record in heard.records if "documents" in record] == [
        f" 0/1/{step}3" for step in (2, 3, 6, 7)]
    assert np.isfinite(done.state.params["w"]).all()
    with pytest.raises(NonFiniteLoss, match="step 5: "):
        go(9, numbers=Numbers(bad=[3, 4, 5]), advance=stub(skip=True), skip=2)


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def same(one, two):
    for left, right in zip(jax.tree.leaves(one.replace(key=0)), jax.tree.leaves(two.replace(key=0)), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("number", HANDLED)
@pytest.mark.parametrize("when", [1, 4, 9])
def test_told_to_stop_it_saves_and_goes_on_later(tmp_path, number, when):
    whole, all_of_it = go(9)
    with Checkpoints(tmp_path, {}) as kept:
        done, first = go(9, numbers=Numbers(at={when: kill(number)}), checkpoints=kept)
        assert done.step == when
        assert done.stopped == (None if when == 9 else number.name)
        assert kept.latest == when
        found = kept.restore(begin(), jnp.zeros((2, 2), jnp.int32))
    assert found.rows[0, 0] == 10 * when
    done, rest = go(9, numbers=Numbers(when), state=found.state, start=found.step)
    same(done.state, whole.state)
    told = [(record["step"], record["loss"]) for record in first.records + rest.records]
    assert told == [(record["step"], record["loss"]) for record in all_of_it.records]


def test_a_second_ctrl_c_does_not_wait():
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(9, numbers=Numbers(at={3: twice}))


def test_outside_the_main_thread_nobody_listens():
    found = []
    thread = threading.Thread(target=lambda: found.append(go(3)[0].step))
    thread.start()
    thread.join()
    assert found == [3]


def test_evaluations_at_their_steps_and_once_at_the_end(tmp_path):
    """Of the average where there is one; the best by them stays."""
    values = iter([3.0, 1.0, 2.0, 4.0])
    seen = []

    def evaluate(weights, carry):
        seen.append(weights["w"].tolist())
        return {"loss": 7.0, "bits_per_byte": next(values)}

    with Checkpoints(tmp_path, {}, last=1, best=1) as kept:
        done, heard = go(8, state=begin(average=True), evaluate=evaluate, evaluate_every=2, checkpoints=kept,
                         checkpoint_every=2)
    assert [record["step"] for record in heard.evaluations] == [2, 4, 6, 8]
    assert seen == [[5.0] * 3] * 4 and done.evaluation == {"loss": 7.0, "bits_per_byte": 4.0}
    assert sorted(os.listdir(tmp_path)) == ["4", "8"]


def test_an_evaluation_at_the_end_of_the_weights():
    calls = []
    done, heard = go(5, evaluate=lambda weights, carry: {"loss": calls.append(weights["w"]) or 2.0}, evaluate_every=2)
    assert [record["step"] for record in heard.evaluations] == [2, 4, 5]
    np.testing.assert_array_equal(calls[-1], done.state.params["w"])
    assert len(go(4, evaluate=lambda weights, carry: {"loss": 2.0}, evaluate_every=2)[1].evaluations) == 2
    assert go(4, start=4, evaluate=lambda weights, carry: {"loss": 2.0})[0].evaluation is None  # nothing has changed


def test_told_to_stop_it_does_not_evaluate():
    _, heard = go(5, numbers=Numbers(at={2: kill(signal.SIGTERM)}), evaluate=lambda weights, carry: {"loss": 2.0})
    assert not heard.evaluations


def test_batches_that_end(tmp_path):
    with Checkpoints(tmp_path, {}) as kept:
        done, heard = go(9, numbers=Numbers(end=4), checkpoints=kept, evaluate=lambda weights, carry: {"loss": 2.0})
        assert (done.step, done.stopped, kept.latest) == (4, END, 4)
    assert len(heard.records) == 4 and heard.evaluations == [{"step": 4, "loss": 2.0}]
    assert go(9, numbers=Numbers(end=0))[0].step == 0


def fails(*_):
    raise OSError("the disk went away")


def test_errors_come_through_and_what_was_done_is_told():
    heard = Heard()
    with pytest.raises(OSError, match="went away"):
        go(9, numbers=Numbers(at={5: fails}), report=heard)
    assert [record["step"] for record in heard.records] == [1, 2, 3, 4]
    with pytest.raises(OSError, match="went away"):
        go(9, evaluate=fails, evaluate_every=3, report=heard)
    assert [record["step"] for record in heard.records[4:]] == [1, 2, 3]
    with pytest.raises(OSError, match="went away"):  # the first error, though there is a second
        go(9, numbers=Numbers(bad=[3], at={5: fails}))


class Breaks(Heard):
    """A report whose disk goes away, once or from a step on."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def step(self, record):
        if record["step"] in self.steps:
            fails()
        super().step(record)


@pytest.mark.parametrize(("numbers", "report", "kept_step"), [
    (Numbers(at={8: fails}), Heard(), 7), (Numbers(), Breaks([5]), 7), (Numbers(), Breaks(range(5, 99)), 7)],
    ids=["batch", "record", "records"])
def test_an_error_in_the_middle_loses_nothing_that_was_done(tmp_path, numbers, report, kept_step):
    """Of a record too: steps under way when it could not be written are kept."""
    whole, _ = go(12)
    with Checkpoints(tmp_path, {}) as kept:
        with pytest.raises(OSError, match="went away"):
            go(12, numbers=numbers, report=report, checkpoints=kept, checkpoint_every=1000)
        assert kept.latest == kept_step
        found = kept.restore(begin(), jnp.zeros((2, 2), jnp.int32))
    assert found.rows[0, 0] == 10 * kept_step
    done, _ = go(12, numbers=Numbers(kept_step), state=found.state, start=found.step)
    same(done.state, whole.state)


@pytest.mark.parametrize("report", [Heard(), Breaks([5]), Breaks(range(4, 99))], ids=["told", "once", "never"])
def test_after_an_error_what_is_not_finite_is_not_kept(tmp_path, report):
    with Checkpoints(tmp_path, {}) as kept:
        with pytest.raises((OSError, NonFiniteLoss)):
            go(12, numbers=Numbers(bad=[6], at={8: fails}), report=report, checkpoints=kept)
        assert kept.latest is None


def test_a_checkpoint_that_cannot_be_written_is_an_error_not_a_loss():
    def save(*_):
        raise CheckpointError("full")
    heard = Heard()
    with pytest.raises(CheckpointError, match="full"):
        go(9, report=heard, checkpoints=types.SimpleNamespace(save=save), checkpoint_every=4)
    assert [record["step"] for record in heard.records] == [1, 2, 3, 4]


def test_a_checkpoint_that_failed_in_the_background_is_told_with_the_loss():
    class Failed:
        def save(self, *_):
            pass

        @property
        def latest(self):
            raise CheckpointError("there are whole ones of step 1")

    with pytest.raises(NonFiniteLoss, match="step 3: .*; there are whole ones of step 1"):
        go(9, numbers=Numbers(bad=[3]), checkpoints=Failed(), checkpoint_every=2)


def test_where_the_time_goes(monkeypatch):
    """With a clock that only batches, compilation, evaluations and checkpoints move on."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds, result=None):
        now[0] += seconds
        return result

    step = stub()

    class Slow:
        def lower(self, *given):
            takes(8.0)
            return types.SimpleNamespace(compile=lambda: lambda *given: takes(1.0, step(*given)))

    checkpoints = types.SimpleNamespace(save=lambda *_: takes(2.0), wait=lambda: takes(0.5))
    done, heard = go(4, advance=Slow(), evaluate=lambda *_: takes(3.0, {"loss": 1.0}), evaluate_every=2, checkpoint_every=2,
                     checkpoints=checkpoints, numbers=Numbers(at={1: lambda: takes(16.0)}))
    assert done.time == Time(whole=16.0 + 8 + 4 + 6 + 4.5, compile=8.0, input=16.0, checkpoint=4.5, evaluation=6.0)
    assert done.time.goodput == pytest.approx(4 / 38.5)
    # Steps are as fast as they are, whatever came between them.
    assert [record["tokens_per_s"] for record in heard.records] == pytest.approx([4.0, 8.0, 4.0, 8.0])


def test_time_of_nothing():
    assert Time().goodput == 0 and Time(whole=1, compile=2).goodput == 0
    done, _ = go(30)
    assert 0 < done.time.compile < done.time.whole and 0 < done.time.goodput < 1


def test_a_trace_is_written(tmp_path):
    go(4, profile=tmp_path, profiled=(1, 2))
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_run_shorter_than_its_trace_ends_it(tmp_path):
    go(2, profile=tmp_path / "one", profiled=(1, 5))
    go(2, profile=tmp_path / "two", profiled=(1, 1))  # jax refuses a second one while the first goes on
    assert list((tmp_path / "one").rglob("*.xplane.pb")) and list((tmp_path / "two").rglob("*.xplane.pb"))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "checkpoint_every": 0}, {"steps": 1, "evaluate_every": 0},
                                   {"steps": 1, "skip": -1}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="at least 1, skip at least 0"):
        Settings(**wrong)

"""Packed batches: every token asked once, the same whoever makes them and wherever they go on, errors where they belong."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import stream
from jaxlm.data.source import JsonLines, Source
from jaxlm.data.stream import Batches, Phase, Plan, mixture
from jaxlm.objectives import (
    AsText,
    CausalLM,
    CausalSpans,
    FillInTheMiddle,
    MaskedLM,
    Mixture,
    PrefixLM,
    Schedule,
    SpanCorruption,
    ul2,
)

SENTINELS = tuple(range(90_000, 90_100))
SPANS = AsText(SpanCorruption(SENTINELS, end=2))
MIDDLE = FillInTheMiddle(3, 4, 5, 2)
PREFIX = AsText(PrefixLM())
MASKED = MaskedLM(mask=6, vocabulary=90_000, never=(2,))
OBJECTIVES = [CausalLM(), SPANS, MIDDLE, PREFIX, MASKED, CausalSpans(SENTINELS, 7, 2), Mixture((SPANS, PREFIX), (1, 1)),
              AsText(ul2(SENTINELS, 7, 8, 9, end=2))]


@dataclasses.dataclass(frozen=True)
class Documents(Source):
    """Documents of these lengths: their texts are JSON lists of tokens, token i of document d is 1000 d + 10 + i."""

    lengths: tuple[int, ...]
    first: int = 0

    def open(self):
        return [json.dumps(list(range(1000 * d + 10, 1000 * d + 10 + n))) for d, n in enumerate(self.lengths, self.first)]


def plan(*sources, objective=None, rows=4, length=32, steps=None, **more):
    phases = tuple(Phase(((source, 1.0),), steps) for source in sources[:-1]) + (Phase(((sources[-1], 1.0),)),)
    at = objective.at if isinstance(objective, Schedule) else lambda step: objective or CausalLM()
    return Plan(phases, json.loads, at, rows, length, **more)


def mixed(phase, *seed):
    return mixture(phase, [source.open() for source, _ in phase.sources], *seed)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert set(one) == set(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def some_lengths(count, low, high, seed=0):
    return tuple(np.random.default_rng(seed).integers(low, high + 1, count).tolist())


def segments(row):
    """Of a row, each segment's slice."""
    for number in range(1, row["segments"].max() + 1):
        places = np.flatnonzero(row["segments"] == number)
        yield slice(places[0], places[-1] + 1)


def rows_of(batch):
    return [{name: value[row] for name, value in batch.items()} for row in range(len(batch["tokens"]))]


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=12), rows=st.integers(1, 3), length=st.integers(1, 40),
       seed=st.integers(0, 2**40))
def test_every_pair_of_neighbours_is_asked_once_in_an_epoch(lengths, rows, length, seed):
    source = Documents(tuple(lengths) * rows)  # as many documents for every row
    made = Batches(plan(source, rows=rows, length=length, seed=seed), ahead=0)
    asked = [[] for _ in range(rows)]
    most = max(min(8, length // 8) - 1, 0)
    with made:
        while True:
            batch = next(made)
            for pairs, row in zip(asked, rows_of(batch), strict=True):
                used = row["segments"] > 0
                assert used[:len(used) - most].all()
                np.testing.assert_array_equal(row["weights"], used)
                pairs += zip(row["tokens"][used].tolist(), row["targets"][used].tolist(), strict=True)
            if batch["state"][:, 0].min() >= len(lengths):
                break
    found = []
    for pairs in asked:  # whole documents one after another
        starts = [place for place, (token, _) in enumerate(pairs) if token % 1000 == 10]
        assert starts[0] == 0
        found += [pairs[begin:end] for begin, end in itertools.pairwise([*starts, len(pairs)])][:len(lengths)]
    expected = [list(itertools.pairwise(json.loads(text))) for text in source.open()]
    assert sorted(found) == sorted(expected)


@settings(max_examples=10)
@given(objective=st.sampled_from(OBJECTIVES), cut=st.booleans(), seed=st.integers(0, 100), data=st.data())
def test_it_does_not_matter_which_process_makes_which_rows(objective, cut, seed, data):
    mine = plan(Documents(some_lengths(40, 2, 70, seed)), objective=objective, rows=6, length=48, cut=cut, seed=seed)
    whole = take(Batches(mine, ahead=0), 5)
    order = data.draw(st.permutations(range(6)))
    parts = data.draw(st.integers(1, 5))
    for rows in (order[:parts], order[parts:]):
        same(take(Batches(mine, rows), 5), [{name: value[rows] for name, value in batch.items()} for batch in whole])


@settings(max_examples=10)
@given(objective=st.sampled_from([*OBJECTIVES, Schedule(((CausalLM(), 3), (MIDDLE, 3), (PREFIX, None)))]), cut=st.booleans(),
       seed=st.integers(0, 100))
def test_going_on_from_any_state_gives_the_same_batches(objective, cut, seed):
    sources = Documents(some_lengths(30, 2, 90, seed)), Documents(some_lengths(20, 30, 200), 50), Documents((300,) * 9, 80)
    mine = plan(*sources, objective=objective, steps=4, cut=cut, length=64, seed=seed)
    whole = take(Batches(mine), 12)
    for step in range(1, 12):  # phases change at 4 and 8
        same(take(Batches(mine, state=whole[step - 1]["state"], step=step, ahead=0), 3)[:12 - step], whole[step:step + 3])
    if objective == CausalLM():  # which documents a phase has
        firsts = [{int(batch["tokens"][batch["segments"] > 0].min()) // 1000 for batch in part}
                  for part in (whole[:4], whole[4:8], whole[8:])]
        assert max(firsts[0]) < 50 <= min(firsts[1]) and max(firsts[1]) < 80 <= min(firsts[2])


def test_workers_make_the_same_batches(tmp_path):
    texts = Documents(some_lengths(50, 2, 90)).open()
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    schedule = Schedule(((CausalLM(), 2), (MIDDLE, None)))
    source = JsonLines(str(tmp_path / "*.jsonl"))
    mine = Plan((Phase(((source, 1.0),), 3), Phase(((source, 1.0),))), json.loads, schedule.at, 5, 64)
    whole = take(Batches(mine), 6)
    same(take(Batches(mine, workers=2), 6), whole)
    same(take(Batches(mine, [3, 1], workers=1, state=whole[1]["state"], step=2), 2),
         [{name: value[[3, 1]] for name, value in batch.items()} for batch in whole[2:4]])


def first_of(mixed, count):
    return [json.loads(mixed[index])[0] // 1000 for index in range(count)]


@settings(max_examples=8)
@given(shares=st.lists(st.floats(0.05, 20), min_size=2, max_size=4), seed=st.integers(0, 2**32))
def test_a_mixture_has_its_shares_and_repeats_a_source_only_when_it_is_through(shares, seed):
    sizes = [270, 300, 110, 500][:len(shares)]  # what is smaller takes grain long to shuffle
    sources = tuple((Documents((2,) * size, 1000 * place), shares[place]) for place, size in enumerate(sizes))
    found = np.array(first_of(mixed(Phase(sources), seed), 2000))
    for place, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        mine = found[found // 1000 == place]
        assert abs(len(mine) / 2000 - share / sum(shares)) < 0.01
        epochs = [mine[begin:begin + size] for begin in range(0, len(mine) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        if len(epochs) > 1:
            assert list(epochs[0]) != list(epochs[1])  # another order


def test_shares_do_not_depend_on_how_long_documents_are():
    """As many rows as sources, or a multiple: rows would otherwise each read one source, the one of short documents faster."""
    phase = Phase(((Documents((20,) * 50), 1.0), (Documents((400,) * 50, 100), 1.0)))
    mine = Plan((phase,), json.loads, lambda step: CausalLM(), 8, 128)
    tokens = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in take(Batches(mine, ahead=0), 300)])
    assert 0.9 < np.mean(tokens >= 100_000) / (399 / 418) < 1.1


def test_orders_of_sources_phases_and_seeds_differ():
    source = Documents((2,) * 40)
    orders = [tuple(first_of(mixed(Phase(((source, 1.0),)), *seed), 40)) for seed in ((0, 0), (0, 1), (1, 0), (1000, 0))]
    found = np.array(first_of(mixed(Phase(((source, 1.0), (Documents((2,) * 40, 100), 1.0))), 0, 0), 80))
    orders += [tuple(found[found < 100]), tuple(found[found >= 100] - 100)]
    assert orders[0] == orders[4] and len(set(orders)) == 5
    assert all(sorted(order) == list(range(40)) for order in orders)


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(2, 80), min_size=3, max_size=20), length=st.integers(2, 64),
       objective=st.sampled_from([CausalLM(), MASKED]))
def test_without_cutting_only_what_is_longer_than_a_row_is_cut(lengths, length, objective):
    source = Documents(tuple(lengths))
    sizes = dict(enumerate(lengths))
    extra = objective == CausalLM()
    for batch in take(Batches(plan(source, objective=objective, rows=2, length=length, cut=False), ahead=0), 6):
        for row in rows_of(batch):
            for part in segments(row):
                asked = row["targets"][part]
                whole = min(sizes[int(asked[-1]) // 1000] - extra, length)
                assert asked[0] % 1000 == 10 + extra and len(asked) == whole


@pytest.mark.parametrize(("workers", "starts"), [(0, (0, 2, 4)), (2, (2,))])
def test_a_batch_says_what_it_is_made_of(workers, starts):
    """Across phases of several sources, after going on, in documents' own numbers."""
    some, others = Documents(some_lengths(30, 2, 60)), Documents(some_lengths(40, 2, 60, 1), 30)
    phases = Phase(((some, 1.0), (others, 2.0)), 3), Phase(((others, 1.0),))
    mine = Plan(phases, json.loads, lambda step: CausalLM(), 4, 32, 5)
    for start in starts:
        state = take(Batches(mine, ahead=0), start)[-1]["state"] if start else None
        with Batches(mine, [1, 3], state=state, step=start, workers=workers) as batches:
            for step in range(start, start + 3):
                batch = next(batches)
                found = batches.documents(batch, step)
                assert list(found) == [1, 3]
                for row, named in zip(rows_of(batch), found.values(), strict=True):
                    read = [row["tokens"][part.start] // 1000 for part in segments(row)]
                    first = {(0, 0): 0, (0, 1): 30, (1, 0): 30}  # of (phase, source)
                    assert [first[one[:2]] + one[2] for one in named] == read
                    assert {one[0] for one in named} == {int(step >= 3)}


@settings(max_examples=16)
@given(objective=st.sampled_from(OBJECTIVES), cut=st.booleans(), length=st.sampled_from([16, 50, 128]),
       seed=st.integers(0, 1000))
def test_what_every_batch_is_like(objective, cut, length, seed):
    mine = plan(Documents(some_lengths(40, 2, 150, seed)), objective=objective, rows=3, length=length, cut=cut, seed=seed)
    for batch in take(Batches(mine, ahead=0), 6):
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "segments", "prefix"), (np.int32, (3, length))),
            "weights": (np.float32, (3, length)), **dict.fromkeys(("before", "state"), (np.int32, (3, 2)))}
        for row in rows_of(batch):
            used = row["segments"] > 0
            assert used[0] and set(np.diff(row["segments"][used])) <= {0, 1} and row["segments"][0] == 1
            assert not used[used.sum():].any() and not row["weights"][~used].any()
            assert not any(row[name][~used].any() for name in ("tokens", "targets", "prefix"))
            for part in segments(row):
                prefix, weights = row["prefix"][part], row["weights"][part]
                assert len(set(prefix.tolist())) == 1 and 0 <= prefix[0] <= len(prefix)
                assert weights.sum() > 0
                if objective.makes == "decoder":
                    np.testing.assert_array_equal(row["tokens"][part][1:], row["targets"][part][:-1])
                    assert not weights[:max(prefix[0] - 1, 0)].any()
                else:
                    assert prefix[0] == len(prefix)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: type(getattr(one, "objective", one)).__name__)
def test_little_is_padded(objective):
    mine = plan(Documents(some_lengths(200, 100, 600)), objective=objective, rows=4, length=256)
    batches = take(Batches(mine, ahead=0), 40)
    share = np.mean([batch["segments"] == 0 for batch in batches])
    print(f"{type(objective).__name__}: {share:.2%} of the tokens are padding")
    assert share < 0.05


def test_documents_without_two_tokens_are_left_out():
    lengths = (0, 1, 5, 0, 30, 1, 1, 2)
    batches = take(Batches(plan(Documents(lengths), rows=2, length=16)), 30)
    seen = {int(token) // 1000 for batch in batches for token in batch["tokens"][batch["segments"] > 0]}
    assert seen == {2, 4, 7}


@pytest.mark.parametrize("ahead", [0, 2])
def test_only_such_documents_are_an_error(ahead, monkeypatch):
    monkeypatch.setattr(stream, "_MAX_EMPTY", 50)
    with Batches(plan(Documents((0, 1, 1)), rows=2), ahead=ahead) as batches, \
            pytest.raises(ValueError, match="nothing to learn from 50 documents in a row: they have no two tokens"):
        next(batches)


def test_documents_that_an_objective_has_no_use_for_are_left_out(monkeypatch):
    monkeypatch.setattr(stream, "_MAX_EMPTY", 50)
    never = dataclasses.replace(MASKED, never=tuple(range(2000, 3000)))
    batches = take(Batches(plan(Documents((20, 20, 20, 20)), objective=never, rows=2), ahead=0), 20)
    assert {int(one) // 1000 for batch in batches for one in batch["targets"][batch["segments"] > 0]} == {0, 1, 3}
    with Batches(plan(Documents((20,), 2), objective=never), ahead=0) as found, \
            pytest.raises(ValueError, match="nothing to learn from .* no token that may be chosen"):
        next(found)


class Whole(CausalLM):
    """Of documents of 20 tokens; pieces are of no use."""

    def example(self, tokens, random):
        if len(tokens) < 20:
            raise ValueError("this is no document")
        return super().example(tokens, random)


def test_what_is_of_no_use_cut_begins_the_next_row():
    batches = take(Batches(plan(Documents((20,) * 6), objective=Whole(), rows=1), ahead=0), 6)
    assert all(batch["segments"].max() == 1 and (batch["segments"] == 1).sum() == 19 for batch in batches)
    assert {int(batch["tokens"][0, 0]) // 1000 for batch in batches} == set(range(6))


def test_rows_too_short_for_any_example_are_an_error():
    with Batches(plan(Documents((20,)), objective=SPANS, length=3), ahead=0) as found, \
            pytest.raises(ValueError, match="rows of 3 tokens hold no example of AsText"):
        next(found)
    least = len(SPANS.example(np.array([10, 11], np.int32), np.random.default_rng(0)).tokens)
    batch, = take(Batches(plan(Documents((900,)), objective=SPANS, length=least), ahead=0), 1)
    assert (batch["segments"] == 1).all()


def test_states_rows_and_plans_that_do_not_fit():
    one = plan(Documents((20, 30)))
    other = plan(Documents((20, 30)), Documents((20, 30)), steps=2)
    for state in (other.start(), one.start()[:2], one.start()[0]):
        with pytest.raises(ValueError, match=r"the state of these batches is of shape \(4, 2\), got"):
            Batches(one, state=state)
    for rows in ([], [4], [-1]):
        with pytest.raises(ValueError, match="rows are of 0 to 3, at least one, got"):
            Batches(one, rows)
    with pytest.raises(ValueError, match="all but the last of so many steps"):
        plan(Documents((20,)), Documents((20,)))
    with pytest.raises(ValueError, match="has phases"):
        Plan((), json.loads, lambda step: CausalLM(), 1, 1)
    with pytest.raises(ValueError, match="at least one row of one token"):
        plan(Documents((20,)), length=0)
    with pytest.raises(ValueError, match="a seed is not negative, got -1"):
        plan(Documents((20,)), seed=-1)
    with pytest.raises(ValueError, match="shares above 0"):
        Phase(((Documents((20,)), 0.0),))
    with pytest.raises(ValueError, match="at least 1 step"):
        Phase(((Documents((20,)), 1.0),), 0)


def broken(tmp_path):
    """A plan whose second line is no JSON."""
    (tmp_path / "broken.jsonl").write_text('{"text": "[10, 11, 12]"}\n{"text": \n')
    return Plan((Phase(((JsonLines(str(tmp_path / "*.jsonl")), 1.0),)),), json.loads, Schedule(((CausalLM(), None),)).at, 2, 16)


@pytest.mark.parametrize("how", [{"ahead": 0}, {"ahead": 2}, {"workers": 2}])
def test_a_document_that_cannot_be_read_is_named_and_ends_the_batches(tmp_path, how):
    with Batches(broken(tmp_path), **how) as batches:
        with pytest.raises(ValueError, match=r"broken\.jsonl, the line at byte 25, is no JSON"):
            for _ in range(10):
                next(batches)
        with pytest.raises(ValueError, match="these batches are closed"):
            next(batches)


@pytest.mark.parametrize("how", [{}, {"workers": 2}])
def test_a_missing_source_is_an_error_at_once(tmp_path, how):
    mine = Plan((Phase(((JsonLines(str(tmp_path / "*.none")), 1.0),)),), json.loads, Schedule(((CausalLM(), None),)).at, 2, 16)
    with pytest.raises(ValueError, match=r"no file matches '.*none'"):
        Batches(mine, **how)


def test_every_source_is_opened_once(monkeypatch):
    opened, real = [], Documents.open
    monkeypatch.setattr(Documents, "open", lambda self: opened.append(self.first) or real(self))
    take(Batches(plan(Documents((20,)), Documents((20,), 5), steps=1), ahead=0), 2)
    assert opened == [0, 5]


PROGRAM = """
import json, sys
from jaxlm.data.source import JsonLines
from jaxlm.data.stream import Batches, Phase, Plan
from jaxlm.objectives import CausalLM, Schedule
if __name__ == "__main__":
    plan = Plan((Phase(((JsonLines(sys.argv[1]), 1.0),)),), json.loads, Schedule(((CausalLM(), None),)).at, 2, 16)
    found = Batches(plan, workers=int(sys.argv[2]))
    print(next(found)["tokens"].shape)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_ends_quietly_with_batches_open(tmp_path, workers):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in Documents((50,) * 9).open()))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py"), str(tmp_path / "x.jsonl"), str(workers)],
                          capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 16)\n", "")


def running(pid):
    """Whether there is such a process, and not only what is left of it."""
    status = pathlib.Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_a_program_that_is_killed(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in Documents((50,) * 9).open()))
    (tmp_path / "program.py").write_text(PROGRAM + """\
    import multiprocessing, os, signal
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    done = subprocess.run([sys.executable, str(tmp_path / "program.py"), str(tmp_path / "x.jsonl"), "1"],
                          stdout=subprocess.PIPE, text=True, timeout=100)
    workers = [int(pid) for pid in done.stdout.splitlines()[-1].split()]
    assert done.returncode == -9 and workers
    end = time.monotonic() + 30
    while any(map(running, workers)):
        assert time.monotonic() < end, "a worker goes on"
        time.sleep(0.1)


PAIRS = [SpanCorruption(SENTINELS, end=2), PrefixLM(), ul2(SENTINELS, 7, 8, 9, end=2)]


def whole_pairs(batch):
    """By row: inputs and targets of every pair."""
    return [[(row["inputs"][row["input_segments"] == number], row["targets"][row["segments"] == number])
             for number in range(1, row["segments"].max() + 1)]
            for row in ({name: value[place] for name, value in batch.items()} for place in range(len(batch["targets"])))]


@settings(max_examples=12)
@given(objective=st.sampled_from(PAIRS), cut=st.booleans(), sizes=st.sampled_from([(24, 24), (96, 32), (40, 100)]),
       seed=st.integers(0, 1000))
def test_what_batches_of_pairs_are_like(objective, cut, sizes, seed):
    inputs, length = sizes
    mine = plan(Documents(some_lengths(40, 2, 150, seed)), objective=objective, rows=3, length=length, inputs=inputs, cut=cut,
                seed=seed)
    batches = take(Batches(mine, ahead=0), 6)
    same(take(Batches(mine, state=batches[2]["state"], step=3, ahead=0), 3), batches[3:])
    for batch in batches:
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            **dict.fromkeys(("inputs", "input_segments"), (np.int32, (3, inputs))),
            **dict.fromkeys(("targets", "segments"), (np.int32, (3, length))), "weights": (np.float32, (3, length)),
            **dict.fromkeys(("before", "state"), (np.int32, (3, 2)))}
        np.testing.assert_array_equal(batch["weights"], batch["segments"] > 0)
        for tokens, numbers in (("inputs", "input_segments"), ("targets", "segments")):
            assert (np.diff(batch[numbers])[batch[numbers][:, 1:] > 0] >= 0).all() and (batch[numbers][:, 0] == 1).all()
            assert not batch[tokens][batch[numbers] == 0].any()
        np.testing.assert_array_equal(batch["segments"].max(1), batch["input_segments"].max(1))
        for row in whole_pairs(batch):
            assert all(len(read) and len(asked) for read, asked in row)


@pytest.mark.parametrize("cut", [True, False])
def test_pairs_hold_all_of_a_document(cut):
    source = Documents(some_lengths(30, 2, 60))
    mine = plan(source, objective=PrefixLM(), rows=1, length=64, inputs=64, cut=cut)
    found = {}
    for batch in take(Batches(mine, ahead=0), 60):
        for read, asked in whole_pairs(batch)[0]:
            tokens = np.concatenate([read, asked]).tolist()
            found.setdefault(tokens[0] // 1000, []).extend(tokens)
        if batch["state"][0, 0] >= 30:
            break
    for number, text in enumerate(source.open()):
        tokens = json.loads(text)
        # A last token alone is no pair; the order may come by a document twice.
        assert found[number][:len(tokens) - 1] == tokens[:-1]


def test_little_of_pairs_is_padded():
    objective = SpanCorruption(SENTINELS, end=2)
    made = objective.example(np.arange(10, 10 + 568), np.random.default_rng(0))
    mine = plan(Documents(some_lengths(200, 100, 900)), objective=objective, length=len(made.targets), inputs=len(made.inputs))
    batches = take(Batches(mine, ahead=0), 20)
    for name in ("input_segments", "segments"):
        share = np.mean([batch[name] == 0 for batch in batches])
        assert share < 0.05, (name, share)


def test_plans_of_pairs_and_of_texts_are_not_mixed_up():
    with pytest.raises(ValueError, match=r"PrefixLM makes pairs: a plan says how long inputs are \(Plan.inputs\) for pairs"):
        take(Batches(plan(Documents((9,)), objective=PrefixLM()), ahead=0), 1)
    with pytest.raises(ValueError, match="CausalLM makes texts"):
        take(Batches(plan(Documents((9,)), inputs=8), ahead=0), 1)
    with pytest.raises(ValueError, match="at least one row of one token"):
        plan(Documents((9,)), inputs=0)

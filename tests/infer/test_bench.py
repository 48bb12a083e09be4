"""Measures on made-up records, and one run over a tiny model."""

import dataclasses
import gzip
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import jaxlm
from infer import bench, machine, reference, session
from jaxlm import config, model, params
from jaxlm.data.tokenizer import Tokenizer
from tests.io.goldens import make_bart
from tests.tiny import ENCODER_DECODERS

FIELDS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [],
    "tokenizer.ggml.tokens": [*map(chr, range(33, 127)), "Ġ", "Ċ", "<end>"], "tokenizer.ggml.token_type": [1] * 96 + [3],
    "tokenizer.ggml.eos_token_id": 96}


@pytest.fixture(scope="module")
def tiny():
    block = config.Block(config.Attention(2, 1, 8), config.Dense(24), config.PreNorm(config.RmsNorm()))
    cfg = config.Decoder(16, config.Embedding(97), config.stack_of([block]), config.RmsNorm(), config.Head(True), 128)
    return jaxlm.Model(cfg, params.init(model.spec(cfg), jax.random.key(0)), Tokenizer.from_gguf(FIELDS))


def group(category, *ids, prompt=(1, 2)):
    return bench.Group(tuple(bench.Question(i, category, "", True) for i in ids), (prompt,) * len(ids), tuple(range(len(ids))))


def record(category, tokens, seconds, decode, calls, histogram, sizes, differences=(), experts=None):
    answer = bench.Answer([list(range(n)) for n in tokens], seconds, decode, calls, [n - 1 for n in tokens], histogram, sizes,
                          experts=experts)
    return bench.Record(group(category, *map(str, range(len(tokens)))), answer, differences)


def test_questions_of_both_kinds_are_read(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 81, "category": "qa", "turns": ["a", "b"]}\n\n{"task_id": "T/0", "prompt": "def f("}\n')
    expected = [bench.Question("81", "qa", "a", True), bench.Question("T/0", "humaneval", "def f(", False)]
    assert bench.read_questions(path) == expected
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert bench.read_questions(packed) == expected


@pytest.mark.parametrize(("text", "message"), [
    ('{"question_id": 1, "category": "qa", "turns": ["a"]}\n{"question_id": 2}', "line 2 has neither"),
    ('{"question_id": 1, "category": "qa", "turns": []}', "line 1 has neither"),
    ("[]", "line 1 has neither"),
    ("nonsense", "line 1 is not JSON"),
    ("\n", "has no questions"),
])
def test_questions_that_are_none_are_named(tmp_path, text, message):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        bench.read_questions(path)


def test_the_limit_is_per_category():
    questions = [bench.Question(str(i), c, "", True) for i, c in enumerate("aabab")]
    assert [q.id for q in bench.first_of_each(questions, 2)] == ["0", "1", "2", "4"]
    assert bench.first_of_each(questions, None) == questions


def test_groups_are_of_one_category_and_lose_no_question():
    questions = [bench.Question(str(i), c, "", True) for i, c in enumerate("abaaba")]
    made = bench.groups(questions, [[i] for i in range(6)], 3)
    assert [g.places for g in made] == [(0, 2, 3), (1, 4), (5,)]
    assert [g.prompts for g in made] == [((0,), (2,), (3,)), ((1,), (4,)), ((5,),)]
    assert [g.places for g in bench.groups(questions, [[i] for i in range(6)], 1)] == [(i,) for i in range(6)]


def test_tokens_after_the_first_end_do_not_count():
    assert bench.cut([5, 9, 7, 8, 7], (8, 7)) == [5, 9, 7]
    assert bench.cut([5, 9], (7,)) == [5, 9]


def test_where_two_answers_part():
    assert bench.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert bench.first_difference([1, 2, 3], [1, 4, 3]) == (1, 2, 4)
    assert bench.first_difference([1, 2], [1, 2, 3]) == (2, None, 3)
    assert bench.first_difference([1, 2], []) == (0, 1, None)


def test_the_measures_are_those_of_spec_bench():
    plain = [record("qa", [11], 1.0, 0.5, [10], [10], {1: 10}), record("qa", [5], 1.0, 0.8, [4], [4], {1: 4})]
    fast = [record("qa", [11], 0.5, 0.25, [5], [2, 1, 2], {4: 3, 8: 2}), record("qa", [5], 1.0, 0.8, [4], [4], {4: 4})]
    found = bench.summarise(fast, plain, call_seconds=0.01)
    assert found["tokens_per_s"] == pytest.approx((11 / 0.5 + 5 / 1.0) / 2)  # the mean of rates, not the rate of sums
    assert found["ratio_to_plain"] == pytest.approx((22 + 5) / (11 + 5))
    assert found["decode_tokens_per_s"] == pytest.approx((10 / 0.25 + 4 / 0.8) / 2)
    assert found["tokens_per_call"] == pytest.approx(14 / 9)  # the mean over calls, not over questions
    assert found["share_of_bound"] == pytest.approx(0.01 * 9 / 1.05)
    assert found["histogram"] == [6, 1, 2] and found["sizes"] == {"4": 7, "8": 2}
    assert (found["questions"], found["tokens"]) == (2, 16)
    assert found["equal_to_plain"] is True and found["equal_answers"] == 2
    itself = bench.summarise(plain, plain, 0.01)
    assert itself["ratio_to_plain"] == 1 and itself["tokens_per_call"] == 1


def test_a_batch_counts_its_rows():
    both = [record("qa", [4, 2], 2.0, 1.0, [3, 1], [4], {1: 4}), record("qa", [6], 1.0, 1.0, [5], [5], {1: 5})]
    found = bench.summarise(both, both, 0.1)
    assert found["tokens_per_s"] == pytest.approx((2 * 6 / 2 + 6) / 3)
    assert found["share_of_bound"] == pytest.approx(0.1 * (3 + 5) / 2)  # a call serves all rows
    assert found["questions"] == 3


def test_experts_are_counted_by_call_and_shown_where_there_are_some():
    plain = [record("qa", [9, 5], 1.0, 0.5, [8, 4], [12], {1: 12})] * 2
    fast = [record("qa", [9, 5], 0.5, 0.2, [4, 2], [6], {4: 6}, experts=10.0),
            record("qa", [9, 5], 0.5, 0.2, [8, 4], [12], {4: 12}, experts=4.0)]
    assert bench.summarise(fast, plain, 0.1)["experts_per_call"] == pytest.approx((4 * 10 + 8 * 4) / 12)
    assert bench.summarise(plain, plain, 0.1)["experts_per_call"] is None
    engines = [Fake("none", 1.0, []), Fake("fast", 1.0, [])]
    for records, shown in ((fast, ["-", "6.0"]), (plain, None)):
        _, whole = bench.tables(bench.report(engines, dict(zip(engines, (plain, records), strict=True)), 0.1))
        columns = {column.header: list(column.cells) for column in whole.columns}
        assert columns.get("experts per call") == shown and columns["ties"] == ["0", "0"]


def test_answers_of_one_token_have_no_decoding():
    plain, fast = (record("qa", [1], seconds, 0.0, [0], [0], {1: 0}, experts=0.0) for seconds in (1.0, 0.5))
    found = bench.summarise([fast] * 2, [plain] * 2, 0.1)
    assert found["tokens_per_s"] == 2 and found["ratio_to_plain"] == 2
    assert found["decode_tokens_per_s"] is found["tokens_per_call"] is found["share_of_bound"] is None
    assert found["experts_per_call"] is None


def test_only_ties_are_excused():
    def equal(*margins):
        differences = tuple(bench.Difference("0", 3, 1, 2, margin) for margin in margins)
        found = bench.summarise([record("qa", [4, 4], 1.0, 1.0, [3, 3], [6], {}, differences)],
                                [record("qa", [4, 4], 1.0, 1.0, [3, 3], [6], {})], 0.1)
        assert found["equal_answers"] == 2 - len(margins)
        return found["equal_to_plain"], [d["excused"] for d in found["differences"]]

    assert equal() == (True, [])
    assert equal(5e-5) == (True, [True])
    assert equal(5e-5, 2e-4) == (False, [True, False])
    assert equal(None) == (False, [False])
    lossy = bench.summarise([record("qa", [4], 1.0, 1.0, [3], [3], {}, None)], [record("qa", [4], 1.0, 1.0, [3], [3], {})], 0.1)
    assert lossy["equal_to_plain"] is None


def test_differences_carry_the_margin_of_the_logits(tiny):
    prompt = (3, 4, 5)
    asked = group("qa", "7", prompt=prompt)
    plain = bench.Answer([[6, 10, 11]], 1, 1, [2], [2], [2], {})
    other = bench.Answer([[6, 12]], 1, 1, [1], [1], [1], {})
    logits = np.asarray(jaxlm.forward(tiny.params, tiny.config, jnp.array([[*prompt, 6]])).logits[0, -1], np.float64)
    (found,) = bench.compare(tiny, asked, plain, other, greedy=True)
    assert (found.question, found.position, found.plain, found.other) == ("7", 1, 10, 12)
    assert found.margin == pytest.approx(logits.max() - min(logits[10], logits[12]), abs=1e-6)
    assert bench.compare(tiny, asked, plain, plain, greedy=True) == ()
    assert bench.compare(tiny, asked, plain, other, greedy=False)[0].margin is None
    ended = bench.Answer([[6]], 1, 1, [1], [1], [1], {})
    assert bench.compare(tiny, asked, plain, ended, greedy=True)[0].margin is None
    drawn = bench.Answer([[6, 12]], 1, 1, [1], [1], [1], {}, "distribution")
    assert bench.compare(tiny, asked, plain, drawn, greedy=True) is None


def test_the_kinds_of_mt_bench_stand_as_one_and_alone():
    assert bench.categories(["qa", "math", "qa", "stem"]) == {
        "mt_bench": ("math", "stem"), "qa": ("qa",), "math": ("math",), "stem": ("stem",)}
    assert bench.categories(["qa"]) == {"qa": ("qa",)}


class Fake:
    """Answers at a rate; keeps the order of calls in `asked`."""

    def __init__(self, name, rate, asked, fails_at=None):
        self.name, self.state, self.rate, self.asked, self.fails_at = name, "cold", rate, asked, fails_at

    def answer(self, group):
        if group.questions[0].id == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append((group.questions[0].id, self.name))
        return bench.Answer([[1, 2, 3]], 3 / self.rate, 2 / self.rate, [2], [2], [2], {1: 2})


def run_fakes(asked, fails_at=None):
    engines = [Fake("none", 1.0, asked), Fake("a", 2.0, asked, fails_at), Fake("b", 3.0, asked)]
    records = {engine: [] for engine in engines}
    todo = [group(category, str(i)) for i, category in enumerate(["math", "qa", "stem", "math"])]
    try:
        for part in (todo[:3], todo[3:]):
            bench.measure(None, engines, part, 4, True, records, session.console(as_json=True))
    except KeyboardInterrupt:
        assert fails_at is not None
    return engines, records


def test_engines_take_turns():
    asked = []
    engines, records = run_fakes(asked)
    names = [name for _, name in asked]
    assert [names[i:i + 3] for i in range(0, 12, 3)] == [["none", "a", "b"], ["a", "b", "none"], ["b", "none", "a"],
                                                          ["none", "a", "b"]]
    assert [i for i, _ in asked] == [str(i) for i in range(4) for _ in range(3)]
    rows = bench.report(engines, records, 0.1)
    assert [row["drafter"] for row in rows] == ["none", "a", "b"]
    assert [row["ratio_to_plain"] for row in rows] == pytest.approx([1, 2, 3])
    assert {name: part["questions"] for name, part in rows[1]["categories"].items()} == {
        "mt_bench": 3, "math": 2, "qa": 1, "stem": 1}
    assert list(bench.shown(rows[0])) == ["mt_bench", "qa", "overall"]
    assert bench.progress(4, 9, engines, records) == "4 of 9: plain 1.0 tokens/s, a 2.00x, b 3.00x"


def test_an_interruption_leaves_whole_groups():
    engines, records = run_fakes([], fails_at="2")
    assert [len(records[engine]) for engine in engines] == [2, 2, 2]


def test_the_chart_is_a_png(tmp_path):
    engines, records = run_fakes([])
    path = tmp_path / "chart.png"
    bench.draw(bench.report(engines, records, 0.1), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def call(*words):
    bench.main(tyro.cli(bench.Arguments, args=[*map(str, words)]))


@pytest.fixture
def words(tiny, tmp_path, monkeypatch):
    """Arguments for the tiny model and a few questions."""
    path = tmp_path / "q.jsonl"
    lines = [{"question_id": i, "category": category, "turns": [text]}
             for i, (category, text) in enumerate([("qa", "abab"), ("math", "xyz"), ("qa", "hello"), ("qa", "z" * 120)])]
    path.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(jaxlm, "load", lambda *_, **__: tiny)
    monkeypatch.setattr(session, "cache_compilations", lambda: None)
    monkeypatch.setattr(machine, "bandwidth", lambda: 1e9)
    return "--model", "tiny", "--questions", path, "--max-new-tokens", "12", "--json", tmp_path / "out.json"


def test_a_run(words, tiny, capsys):
    call(*words, "--drafters", "none,recycling", "--tree", "4", "--state", "both")
    result = json.loads(words[-1].read_text())
    assert result["complete"] and result["left_out"] == ["3"] and result["questions"] == "q.jsonl"
    assert result["settings"]["tree"] == 4 and result["machine"]["bytes_per_s"] == 1e9
    assert [(row["drafter"], row["state"]) for row in result["drafters"]] == [
        ("none", "cold"), ("recycling", "cold"), ("recycling", "warm")]
    asked = [tiny.tokenizer.encode(text) for text in ("abab", "xyz", "hello")]
    direct, state = [], None
    for prompt in asked:
        direct.append(jaxlm.generate(tiny, [prompt], 12, drafter="recycling", tree=4, drafter_state=state))
        state = direct[-1].speculation.state
    cold = [jaxlm.generate(tiny, [prompt], 12, drafter="recycling", tree=4) for prompt in asked]
    for row, expected in zip(result["drafters"][1:], (cold, direct), strict=True):
        assert row["equal_to_plain"] and row["equal_answers"] == row["questions"] == 3
        assert row["histogram"] == sum(r.speculation.emitted[0] for r in expected).tolist()
        assert row["sizes"] == {"4": sum(row["histogram"])}
        assert row["tokens_per_call"] == pytest.approx(sum(len(r.tokens[0]) - 1 for r in expected) / sum(row["histogram"]))
        assert math.isfinite(row["tokens_per_s"]) and set(row["categories"]) == {"mt_bench", "math", "qa"}
        assert [r["calls"] for r in row["records"]] == [r.speculation.calls.tolist() for r in expected]
    assert "recycling (warm)" in capsys.readouterr().out


def test_nothing_compiles_while_it_is_measured(words, monkeypatch):
    compiled, during = [], []
    measure = bench.measure

    def spy(*arguments):
        before = len(compiled)
        measure(*arguments)
        during.extend(compiled[before:])

    monkeypatch.setattr(bench, "measure", spy)
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        call(*words, "--drafters", "lookup", "--state", "both")
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled and not during


def test_samples_in_batches_are_compared_too(words):
    call(*words, "--drafters", "lookup", "--temperature", "1.5", "--batch", "2")
    plain, other = json.loads(words[-1].read_text())["drafters"]
    assert plain["questions"] == 3 and other["equal_to_plain"] and other["equal_answers"] == 3


def test_a_model_drafts_for_itself(words):
    call(*words, "--drafters", "model", "--draft-model", "tiny")
    _, row = json.loads(words[-1].read_text())["drafters"]
    assert row["drafter"] == "model" and row["equal_to_plain"]
    assert row["tokens_per_call"] > 3  # all that it drafts is right


def test_an_interrupted_run_writes_what_there_is(words, monkeypatch):
    answer = bench.Jaxlm.answer

    def interrupted(engine, group):
        if group.questions[0].id == "1":
            raise KeyboardInterrupt
        return answer(engine, group)

    monkeypatch.setattr(bench.Jaxlm, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(*words, "--drafters", "lookup")
    result = json.loads(words[-1].read_text())
    assert result["complete"] is False and [row["questions"] for row in result["drafters"]] == [1, 1]


@pytest.mark.parametrize(("fields", "message"), [
    ({"batch": 0}, "--batch must be at least 1"),
    ({"transformers": True, "batch": 2}, "--transformers goes with"),
    ({"drafters": "a,,b"}, "names with commas"),
    ({"drafters": "model"}, "go together"),
    ({"drafters": "lookup", "draft_model": "tiny"}, "go together"),
    ({"chart": pathlib.Path("/nowhere/at/all.png")}, "no directory"),
    ({"max_new_tokens": 127}, "no question leaves room"),
])
def test_bench_says_what_is_wrong(words, fields, message):
    with pytest.raises(ValueError, match=message):
        bench.main(bench.Arguments("tiny", words[3], **fields))


def test_bench_counts_the_start(words, tiny, monkeypatch):
    """Before anything is measured."""
    cfg = ENCODER_DECODERS["shared"]
    lm = dataclasses.replace(tiny, config=dataclasses.replace(cfg, start=(1, 2, 3)))
    monkeypatch.setattr(jaxlm, "load", lambda *_, **__: lm)
    with pytest.raises(ValueError, match="--max-new-tokens counts .* start of 3: it must be at least 3, got 2"):
        bench.main(bench.Arguments("tiny", words[3], max_new_tokens=2))


def test_transformers_reply_becomes_an_answer():
    class Pipe:
        def send(self, job):
            self.job = job

        def recv(self):
            return reference.Reply([[5, 6, 7, 9, 8, 8]], 0.5, 1.5, calls=3, first=2, peak_bytes=0)

    pipe = Pipe()
    engine = bench.Transformers(pipe, 10, 16, [9])
    answer = engine.answer(group("qa", "0", prompt=(3, 4)))
    assert pipe.job == reference.Job(((3, 4),), 16, (9,), 10)
    assert answer.tokens == [[5, 6, 7, 9]] and answer.seconds == 2 and answer.decode == 1.5
    assert answer.calls == [2] and answer.emitted == [2]  # without the first call, which reads the prompt
    assert engine.name == "transformers lookup"


@pytest.mark.parity
def test_transformers_answers_like_jaxlm(tiny):
    prompt = tiny.tokenizer.encode("abcabcabcabc")
    with reference.serving(tiny) as pipe:
        for lookup in (None, 3):
            engine = bench.Transformers(pipe, lookup, 12, tiny.tokenizer.eos_ids)
            answer = engine.answer(group("qa", "0", prompt=tuple(prompt)))
            assert answer.tokens[0] == jaxlm.generate(tiny, [prompt], 12).tokens[0].tolist()
            assert answer.emitted[0] <= len(answer.tokens[0]) - 1 and 0 < answer.calls[0] <= 11
            assert lookup is not None or answer.emitted == answer.calls
            assert answer.seconds > answer.decode > 0


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_transformers_answers_like_jaxlm_from_a_source(tmp_path):
    """Behind a start of two tokens; what its own settings force and ban there is not done."""
    made = make_bart.build(make_bart.CASES["bart"])
    prompt, settings = make_bart.SOURCES[0], {"forced_bos_token_id": 0, "forced_eos_token_id": 2}
    made.generation_config.update(**settings, no_repeat_ngram_size=1, min_length=5)
    made.save_pretrained(tmp_path)
    lm = jaxlm.load(tmp_path)
    assert lm.config.start == (2, 0)
    expected = jaxlm.generate(lm, [prompt], make_bart.NEW, eos=()).tokens[0].tolist()
    with reference.serving(lm) as pipe:
        for lookup in (None, 3):
            pipe.send(reference.Job((prompt,), make_bart.NEW, (), lookup))
            reply = pipe.recv()
            assert reply.tokens[0] == expected and reply.first >= 1
            assert lookup is not None or (reply.first, reply.calls) == (1, make_bart.NEW - 1)
    assert expected[0] == expected[1]  # which those settings would not have let be


def test_bandwidth_is_bytes_over_seconds(monkeypatch):
    clock = iter(range(0, 100, 2))  # every look takes 2 s
    monkeypatch.setattr(machine, "_FLOATS", 1 << 10)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.bandwidth() == 4 * 1024 / 2
    assert machine.describe()["platform"] == "cpu" and machine.describe()["cores"] >= 1

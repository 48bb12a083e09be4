"""How much faster speculation makes a model, measured as Spec-Bench measures it.

python -m infer.bench --model PATH --questions FILE --drafters none,lookup,recycling --json OUT --chart PNG

The engines take turns question by question, in an order that rotates, so a noisy machine is as hard on one as on another;
short prompts come first, whatever their category. Wall seconds are those of prefill, decoding and the host's part, without
compiling. Every answer is compared with plain decoding's.

A file of questions has JSON lines: Spec-Bench's (question_id, category, turns) are asked through the chat template where there
is one, HumanEval's (task_id, prompt) are continued as they are; it may be gzipped.
"""

import contextlib
import dataclasses
import gzip
import itertools
import json
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jaxlm
from infer import generate, machine, reference, session
from jaxlm import model as models
from jaxlm.config import EncoderDecoder, dropless
from jaxlm.decoding.generate import bucket, slots_for

# Spec-Bench reports the eight kinds of MT-bench as one.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TIE = 1e-4  # of logits: sums in another order may turn such a choice
LOOKUP = 10  # tokens that transformers' prompt lookup drafts


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a file of questions; `chat` where it is for a chat template."""

    id: str
    category: str
    text: str
    chat: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Questions of one category that are answered together, and their places in the run."""

    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an engine made of a group.

    Attributes:
      tokens: of each row, up to the first end of text.
      seconds: of all of it, without compiling.
      decode: seconds after the prefill, which gives each row's first token.
      calls: of the model after the prefill, for each row.
      emitted: tokens that they gave.
      histogram: how many of them gave 1, 2, ... tokens, all rows together; empty where unknown.
      sizes: {nodes of the verified tree: calls}.
      exact: what the rule keeps: "tokens", "distribution" or "lossy".
      experts: how many experts of a layer a call touched, of all rows together; None where unknown or there are none.
    """

    tokens: list[list[int]]
    seconds: float
    decode: float
    calls: list[int]
    emitted: list[int]
    histogram: list[int]
    sizes: dict[int, int]
    exact: str = "tokens"
    experts: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where an answer leaves plain decoding's.

    Attributes:
      position: of the first token that differs, from 0.
      plain, other: the two tokens; None where an answer has ended.
      margin: how far the lower of their logits is from the largest of all; None where that does not decide (sampling).
    """

    question: str
    position: int
    plain: int | None
    other: int | None
    margin: float | None

    @property
    def excused(self) -> bool:
        """Whether it is a tie."""
        return self.margin is not None and self.margin <= TIE


@dataclasses.dataclass(frozen=True)
class Record:
    """An answer as measured, and its differences from plain decoding; None where the rule does not give plain's tokens."""

    group: Group
    answer: Answer
    differences: tuple[Difference, ...] | None


class Engine(Protocol):
    """What answers."""

    name: str
    state: str

    def answer(self, group: Group) -> Answer:
        """Answers the group's prompts."""

    def warm_up(self, group: Group, ends: int | None) -> int | None:
        """Compiles what the group needs, where that is new; its answers may end at the token `ends`.

        Returns:
          The first token of its answer other than the very first: an answer that ends there has run the loop. None without.
        """


class Jaxlm:
    """`jaxlm.generate` with or without a drafter, whose state is kept from call to call where `state` is "warm"."""

    def __init__(self, model: jaxlm.Model, name: str, state: str, arguments: "Arguments",
                 drafter: str | jaxlm.Model):
        self.name, self.state = name, state
        self._model, self._arguments, self._kept, self._depth = model, arguments, None, 0
        self._compiled: set[tuple[int, ...]] = set()
        self._options: dict[str, Any] = {"temperature": arguments.temperature}
        if name != "none":
            self._options |= {"drafter": drafter, "rule": arguments.rule, "tree": arguments.tree}

    def _generate(self, group: Group, kept: Any, eos: Any = None) -> jaxlm.Generation:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self._arguments.seed), jnp.asarray(group.places))
        return jaxlm.generate(self._model, group.prompts, self._arguments.max_new_tokens, key=keys, eos=eos,
                              drafter_state=kept, **self._options)

    def answer(self, group: Group) -> Answer:
        """Answers the group's prompts."""
        began = time.perf_counter()
        result = self._generate(group, self._kept)
        seconds = time.perf_counter() - began - result.seconds.compile
        tokens, speculation = [row.tolist() for row in result.tokens], result.speculation
        later = [len(row) - 1 for row in tokens]
        if speculation is None:
            return Answer(tokens, seconds, result.seconds.decode, later, later, [sum(later)], {1: sum(later)})
        if self.state == "warm":
            self._kept = speculation.state
        return Answer(tokens, seconds, result.seconds.decode, speculation.calls.tolist(), later,
                      speculation.emitted.sum(axis=0).tolist(),
                      {nodes: int(calls.sum()) for nodes, calls in speculation.sizes.items()}, speculation.exact,
                      speculation.experts)

    def _shape(self, group: Group) -> tuple[int, ...]:
        """What is compiled for: rows, the prompts' bucket, the cache's slots."""
        slots = slots_for(group.longest + self._arguments.max_new_tokens, self._depth)
        return len(group.prompts), bucket(group.longest), slots

    def warm_up(self, group: Group, ends: int | None) -> int | None:
        """Compiles what the group needs, unless a group of the same buckets came before."""
        if self._shape(group) in self._compiled:
            return None
        # As many ids as the tokenizer has: their number is part of the shape.
        eos = None if ends is None else [ends] * len(self._model.tokenizer.eos_ids)
        result = self._generate(group, None, eos)
        if result.speculation is not None:
            self._depth = result.speculation.emitted.shape[1] - 1
            if self.state == "warm":
                self._generate(group, result.speculation.state, eos)
        self._compiled.add(self._shape(group))  # now that the depth is known
        answer = result.tokens[0].tolist()
        return next((token for token in answer if token != answer[0]), None)


class Transformers:
    """transformers' plain decoding or its prompt lookup, one row at a time."""

    state = "cold"

    def __init__(self, pipe: Any, lookup: int | None, new_tokens: int, eos: Sequence[int]):
        self.name = "transformers" if lookup is None else "transformers lookup"
        self._pipe, self._lookup, self._new_tokens, self._eos = pipe, lookup, new_tokens, tuple(eos)
        self._warm = False

    def answer(self, group: Group) -> Answer:
        """Answers the group's prompts."""
        self._pipe.send(reference.Job(group.prompts, self._new_tokens, self._eos, self._lookup))
        reply = self._pipe.recv()
        tokens = cut(reply.tokens[0], self._eos)
        return Answer([tokens], reply.prefill + reply.decode, reply.decode, [reply.calls - 1],
                      [max(len(tokens) - reply.first, 0)], [], {})

    def warm_up(self, group: Group, ends: int | None) -> int | None:
        """Answers once: it compiles nothing."""
        if not self._warm:
            self.answer(group)
        self._warm = True
        return None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How much faster speculation makes a model, measured as Spec-Bench measures it."""

    model: str
    """A Hugging Face directory, a GGUF file, or the id of a model on the hub."""
    questions: pathlib.Path
    """JSON lines as those of Spec-Bench or HumanEval; of another kind of file (*.txt, *.en ...) every line is a prompt, or an
    encoder-decoder's source."""
    drafters: str = "none,lookup,recycling"
    """Drafters with commas between; plain decoding, "none", is measured beside them in any case."""
    draft_model: str | None = None
    """The smaller model that the drafter "model" drafts with."""
    state: Literal["cold", "warm", "both"] = "cold"
    """Whether a drafter starts every question empty, or with what the questions before left it."""
    rule: str | None = None
    """When a drafted token is accepted; default "match"."""
    tree: int | None = None
    """Nodes of a drafted tree; default each drafter's own."""
    max_new_tokens: int = 128
    """The most tokens of an answer."""
    limit: int | None = None
    """Only the first so many questions of each category."""
    batch: int = 1
    """Questions of a category that are answered together; their speed is that of all rows together."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and computation; default float32 on a CPU, bfloat16 on accelerators."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    """Of the sampling."""
    raw: bool = False
    """Ask without the chat template."""
    warm_up: bool = True
    """Compile for a length of prompts before its first measurement; what compiles later is subtracted."""
    transformers: bool = False
    """Measure transformers' plain decoding and prompt lookup beside them, in float32 on the CPU; needs the extra parity."""
    json: pathlib.Path | None = None
    """Write the results to this file, also when interrupted."""
    chart: pathlib.Path | None = None
    """Draw the ratios to plain decoding into this PNG."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if ("model" in drafters(self.drafters)) != (self.draft_model is not None):
            raise ValueError('the drafter "model" and --draft-model go together')
        for path in (self.json, self.chart):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{path} cannot be written: there is no directory {path.parent}")
        if self.transformers and (self.batch > 1 or self.temperature > 0 or self.dtype not in (None, "float32")):
            raise ValueError("--transformers goes with --batch 1, --temperature 0 and --dtype float32 only")


def read_questions(path: pathlib.Path) -> list[Question]:
    """The questions of a file; of several turns the first.

    Raises:
      ValueError: for a line that is neither Spec-Bench's nor HumanEval's, or a file without any; names the line.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no questions")
    if not {".json", ".jsonl"} & set(path.suffixes):
        return [Question(str(number), "text", line.strip(), chat=False) for number, line in lines]
    return [_question(line, f"{path}, line {number}") for number, line in lines]


def _question(line: str, place: str) -> Question:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if isinstance(fields, dict) and {"task_id", "prompt"} <= fields.keys():
        return Question(str(fields["task_id"]), "humaneval", fields["prompt"], chat=False)
    if isinstance(fields, dict) and {"question_id", "category", "turns"} <= fields.keys() and fields["turns"]:
        return Question(str(fields["question_id"]), fields["category"], fields["turns"][0], chat=True)
    raise ValueError(f"{place} has neither question_id, category and turns nor task_id and prompt")


def first_of_each(questions: Iterable[Question], limit: int | None) -> list[Question]:
    """The first `limit` of each category, in their order; None takes all."""
    seen: dict[str, int] = {}
    kept = []
    for question in questions:
        seen[question.category] = seen.get(question.category, 0) + 1
        if limit is None or seen[question.category] <= limit:
            kept.append(question)
    return kept


def groups(questions: Sequence[Question], prompts: Sequence[Sequence[int]], batch: int) -> list[Group]:
    """Up to `batch` questions of a category at a time, in the order of each group's first question."""
    places: dict[str, list[list[int]]] = {}
    for i, question in enumerate(questions):
        parts = places.setdefault(question.category, [[]])
        if len(parts[-1]) == batch:
            parts.append([])
        parts[-1].append(i)
    return [Group(tuple(questions[i] for i in part), tuple(tuple(prompts[i]) for i in part), tuple(part))
            for part in sorted(part for parts in places.values() for part in parts)]


def cut(tokens: Sequence[int], eos: Iterable[int]) -> list[int]:
    """The tokens up to the first that ends a text, that one included."""
    ends = [tokens.index(token) + 1 for token in eos if token in tokens]
    return list(tokens[:min(ends, default=len(tokens))])


def first_difference(plain: Sequence[int], other: Sequence[int]) -> tuple[int, int | None, int | None] | None:
    """Where the two part (from 0), and their tokens there, None where one has ended; None for equal ones."""
    if list(plain) == list(other):
        return None
    same = 0
    while same < min(len(plain), len(other)) and plain[same] == other[same]:
        same += 1
    return (same, *(row[same] if same < len(row) else None for row in (plain, other)))


def margin(model: jaxlm.Model, prompt: Sequence[int], written: Sequence[int], tokens: Sequence[int]) -> float:
    """How far the lowest of these tokens' logits is from the largest of all, after a prompt (a source) and what was written."""
    memory, cfg = None, dropless(model.config)
    with model.context():
        if isinstance(cfg, EncoderDecoder):
            memory = models.encode(model.params, cfg, jnp.asarray([prompt], jnp.int32))
            prompt = cfg.start
        prefix = [*prompt, *written]
        out = jaxlm.forward(model.params, cfg, jnp.asarray([prefix], jnp.int32), memory=memory,
                            at=jnp.asarray([[len(prefix) - 1]], jnp.int32))
    logits = np.asarray(out.logits[0, 0], np.float64)
    return float(logits.max() - min(logits[token] for token in tokens))


def compare(model: jaxlm.Model, group: Group, plain: Answer, other: Answer, greedy: bool) -> tuple[Difference, ...] | None:
    """The differences of an answer from plain decoding's; None where its rule does not give the same tokens."""
    if other.exact != "tokens":
        return None
    found = []
    for question, prompt, expected, tokens in zip(group.questions, group.prompts, plain.tokens, other.tokens, strict=True):
        if (parted := first_difference(expected, tokens)) is None:
            continue
        position, *pair = parted
        decided = greedy and None not in pair
        found.append(Difference(question.id, position, *pair,
                                margin(model, prompt, expected[:position], pair) if decided else None))
    return tuple(found)


def mean(pairs: Iterable[tuple[float, int]]) -> float | None:
    """The mean of (value, how often); None of nothing."""
    values, weights = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
    return float(np.average(values, weights=weights)) if values else None


def tokens_per_s(records: Iterable[Record]) -> float | None:
    """The unweighted mean over questions of new tokens per wall second, prefill included."""
    return mean((sum(map(len, r.answer.tokens)) / r.answer.seconds, len(r.answer.tokens)) for r in records)


def summarise(records: Sequence[Record], plain: Sequence[Record], call_seconds: float) -> dict[str, Any]:
    """Spec-Bench's measures of some questions.

    Args:
      plain: plain decoding's records of the same questions.
      call_seconds: that a call of the model takes at least: reading its weights.
    """
    answers = [record.answer for record in records]
    calls, emitted = sum(sum(a.calls) for a in answers), sum(sum(a.emitted) for a in answers)
    decode = sum(a.decode for a in answers)
    speed = tokens_per_s(records)
    checked = [record for record in records if record.differences is not None]
    differences = [d for record in checked for d in record.differences]
    histogram = np.sum([np.pad(a.histogram, (0, max(len(b.histogram) for b in answers) - len(a.histogram)))
                        for a in answers], axis=0, dtype=int)
    sizes: dict[str, int] = {}
    for a in answers:
        for nodes, count in a.sizes.items():
            sizes[str(nodes)] = sizes.get(str(nodes), 0) + count
    return {
        "questions": sum(len(a.tokens) for a in answers),
        "tokens": sum(len(row) for a in answers for row in a.tokens),
        "tokens_per_s": speed,
        "decode_tokens_per_s": mean((later / a.decode, len(a.tokens)) for a in answers
                                    if a.decode and (later := sum(len(row) - 1 for row in a.tokens))),
        "ratio_to_plain": speed / tokens_per_s(plain),
        "tokens_per_call": emitted / calls if calls else None,
        "experts_per_call": mean((a.experts, max(a.calls)) for a in answers if a.experts is not None and any(a.calls)),
        "share_of_bound": call_seconds * sum(max(a.calls) for a in answers) / decode if decode else None,
        "equal_to_plain": all(d.excused for d in differences) if checked else None,
        "equal_answers": sum(len(r.answer.tokens) for r in checked) - len(differences),
        "differences": [{**dataclasses.asdict(d), "excused": d.excused} for d in differences],
        "histogram": histogram.tolist(),
        "sizes": sizes,
    }


def categories(found: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{name: the file's categories in it}, MT-bench's kinds one by one and, first, as one."""
    found = list(dict.fromkeys(found))
    kinds = tuple(name for name in found if name in MT_BENCH)
    return ({"mt_bench": kinds} if kinds else {}) | {name: (name,) for name in found}


def report(engines: Sequence[Engine], records: Mapping[Engine, Sequence[Record]], call_seconds: float) -> list[dict[str, Any]]:
    """A row per engine, the first of which decodes plainly: the measures over all questions and by category."""
    plain, rows = records[engines[0]], []
    names = categories(record.group.questions[0].category for record in plain)

    def within(records: Sequence[Record], members: tuple[str, ...]) -> list[Record]:
        return [record for record in records if record.group.questions[0].category in members]

    for engine in engines:
        mine = records[engine]
        rows.append({
            "drafter": engine.name, "state": engine.state, **summarise(mine, plain, call_seconds),
            "categories": {name: summarise(within(mine, members), within(plain, members), call_seconds)
                           for name, members in names.items()},
            "records": [{"questions": [q.id for q in r.group.questions], "seconds": r.answer.seconds,
                         "decode_seconds": r.answer.decode, "tokens": [len(row) for row in r.answer.tokens],
                         "calls": r.answer.calls} for r in mine],
        })
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A row's categories as Spec-Bench's table has them: MT-bench as one, and all together at the end."""
    return {name: row["categories"][name] for name in row["categories"] if name not in MT_BENCH} | {"overall": row}


def title(drafter: str, state: str) -> str:
    """An engine's name in tables."""
    return drafter + (" (warm)" if state == "warm" else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """By category, the ratio to plain decoding and the tokens per call of the model; then every engine over all questions."""
    each = Table(title="tokens/s against plain decoding, and tokens per call of the model")
    for heading in ("category", "questions", "plain tokens/s", *(title(row["drafter"], row["state"]) for row in rows[1:])):
        each.add_column(heading, justify="left" if heading == "category" else "right")
    for name, plain in shown(rows[0]).items():
        others = [shown(row)[name] for row in rows[1:]]
        each.add_row(name, str(plain["questions"]), _number(plain["tokens_per_s"], ".1f"),
                     *(f"{other['ratio_to_plain']:.2f}x  {_number(other['tokens_per_call'], '.2f')}" for other in others),
                     end_section=name == list(shown(rows[0]))[-2])
    whole = Table(title="all questions")
    touched = any(row["experts_per_call"] is not None for row in rows)
    for heading in ("drafter", "tokens/s", "ratio", "decoding tokens/s", "tokens per call",
                    *(("experts per call",) if touched else ()), "of the bound", "equal answers", "ties"):
        whole.add_column(heading, justify="left" if heading == "drafter" else "right")
    for row in rows:
        checked = row["equal_to_plain"] is not None
        whole.add_row(title(row["drafter"], row["state"]), _number(row["tokens_per_s"], ".1f"),
                      f"{row['ratio_to_plain']:.2f}x", _number(row["decode_tokens_per_s"], ".1f"),
                      _number(row["tokens_per_call"], ".2f"),
                      *((_number(row["experts_per_call"], ".1f"),) if touched else ()), _number(row["share_of_bound"], ".0%"),
                      f"{row['equal_answers']} of {row['questions']}" if checked else "-",
                      str(sum(d["excused"] for d in row["differences"])) if checked else "-")
    return [each, whole]


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Bars of the ratio to plain decoding, grouped by category."""
    from matplotlib.figure import Figure

    names, others = list(shown(rows[0])), rows[1:]
    figure = Figure(figsize=(max(6.0, 1.4 + len(names) * (0.5 + 0.3 * len(others))), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(others), 1)
    for i, row in enumerate(others):
        ratios = [part["ratio_to_plain"] for part in shown(row).values()]
        places = np.arange(len(names)) + (i - (len(others) - 1) / 2) * width
        bars = axes.bar(places, ratios, width, label=title(row["drafter"], row["state"]))
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=1, label="plain decoding")
    axes.set_xticks(np.arange(len(names)), names, rotation=20, ha="right")
    axes.set_ylabel("tokens/s, ratio to plain decoding")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(others) + 1, 5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def encode(model: jaxlm.Model, question: Question, raw: bool) -> list[int]:
    """The tokens of a question."""
    if question.chat and not raw and model.tokenizer.has_chat_template:
        return generate.ask(model.tokenizer, [{"role": "user", "content": question.text}])
    return model.tokenizer.encode(question.text)


def by_length(todo: Iterable[Group]) -> list[list[Group]]:
    """The groups that programs are compiled for together, the shortest first."""
    def width(group: Group) -> int:
        return bucket(group.longest)

    return [list(part) for _, part in itertools.groupby(sorted(todo, key=width), width)]


def warm_up(engines: Sequence[Engine], todo: Sequence[Group], console: Console) -> None:
    """Compiles for these groups; plain decoding's answer tells after which token the others may stop."""
    with console.status(f"compiling for prompts of {max(group.longest for group in todo)} tokens"):
        for group in todo:
            ends = engines[0].warm_up(group, None)
            for engine in engines[1:]:
                engine.warm_up(group, ends)


def measure(model: jaxlm.Model, engines: Sequence[Engine], todo: Sequence[Group], of: int, greedy: bool,
            records: Mapping[Engine, list[Record]], console: Console) -> None:
    """Has all engines answer every group, in turns; `records` grows by whole groups, so an interruption leaves it even.

    Args:
      of: groups that there are in all.
    """
    told = time.monotonic()
    for i, group in enumerate(todo, len(records[engines[0]])):
        turn = i % len(engines)
        answers = {engine: engine.answer(group) for engine in [*engines[turn:], *engines[:turn]]}
        plain = answers[engines[0]]
        found = {engine: Record(group, answer, compare(model, group, plain, answer, greedy))
                 for engine, answer in answers.items()}
        for engine, record in found.items():
            records[engine].append(record)
        if time.monotonic() - told > 10 or i + 1 == of:
            told = time.monotonic()
            console.print(f"[dim]{progress(i + 1, of, engines, records)}[/dim]")


def progress(done: int, of: int, engines: Sequence[Engine], records: Mapping[Engine, Sequence[Record]]) -> str:
    """One line: how far, and the ratios until here."""
    plain = tokens_per_s(records[engines[0]])
    ratios = (f"{title(engine.name, engine.state)} {tokens_per_s(records[engine]) / plain:.2f}x"
              for engine in engines[1:])
    return f"{done} of {of}: plain {plain:.1f} tokens/s, {', '.join(ratios)}"


def drafters(names: str) -> list[str]:
    """The names between the commas, each once and without "none".

    Raises:
      ValueError: if one is empty.
    """
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise ValueError(f"--drafters must be names with commas between, got {names!r}")
    return [name for name in dict.fromkeys(found) if name != "none"]


@contextlib.contextmanager
def line_up(model: jaxlm.Model, arguments: Arguments) -> Iterator[list[Engine]]:
    """The engines, plain decoding first, and for as long as this lasts transformers' process."""
    states = ("cold", "warm") if arguments.state == "both" else (arguments.state,)
    made: dict[str, str | jaxlm.Model] = {name: name for name in drafters(arguments.drafters)}
    if arguments.draft_model is not None:
        made["model"] = load(arguments.draft_model, arguments)
    engines: list[Engine] = [Jaxlm(model, "none", "cold", arguments, "none")]
    engines += [Jaxlm(model, name, state, arguments, drafter) for name, drafter in made.items() for state in states]
    if not arguments.transformers:
        yield engines
        return
    with reference.serving(model) as pipe:
        yield engines + [Transformers(pipe, lookup, arguments.max_new_tokens, model.tokenizer.eos_ids)
                         for lookup in (None, LOOKUP)]


def main(arguments: Arguments) -> None:
    """Measures all engines in turns, prints the tables, writes JSON and chart."""
    session.cache_compilations()
    console = session.console(as_json=False)
    if not console.is_terminal:
        console.width = 160
    questions = first_of_each(read_questions(arguments.questions), arguments.limit)
    model = load(arguments.model, arguments)
    if model.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer, so it cannot be asked questions")
    prompts = [encode(model, question, arguments.raw) for question in questions]
    length = model.decoder.length
    if isinstance(model.config, EncoderDecoder):
        longest, least = model.config.encoder.length, len(model.config.start)
        if arguments.max_new_tokens < least:
            raise ValueError(f"--max-new-tokens counts the tokens behind the first of the model's start of {least}: it must be "
                             f"at least {least}, got {arguments.max_new_tokens}")
        room = 1 + arguments.max_new_tokens <= length  # the start's other tokens are new ones
        fits = [room and len(prompt) <= longest for prompt in prompts]
    else:
        fits = [len(prompt) + arguments.max_new_tokens <= length for prompt in prompts]
    left_out = [question.id for question, fit in zip(questions, fits, strict=True) if not fit]
    if left_out:
        console.print(f"[dim]{len(left_out)} questions do not fit the model's context of {length} tokens[/dim]")
    if not any(fits):
        raise ValueError(f"no question leaves room for {arguments.max_new_tokens} new tokens in the model's context of "
                         f"{length}: ask for fewer with --max-new-tokens")
    todo = groups([question for question, fit in zip(questions, fits, strict=True) if fit],
                  [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit], arguments.batch)

    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    speed = machine.bandwidth()
    with line_up(model, arguments) as engines:
        records: dict[Engine, list[Record]] = {engine: [] for engine in engines}
        interrupted = None
        try:
            console.print(f"[dim]{len(todo)} calls of {len(engines)} engines, the shortest prompts first[/dim]")
            for part in by_length(todo):
                # No process may map the memory of the programs for all lengths.
                jax.clear_caches()
                model.compiled.clear()
                if arguments.warm_up:
                    warm_up(engines, part, console)
                measure(model, engines, part, len(todo), arguments.temperature == 0, records, console)
        except KeyboardInterrupt as error:
            interrupted = error
    if records[engines[0]]:
        speed = max(speed, machine.bandwidth())  # of two looks, so that a busy moment does not lower the bound
        rows = report(engines, records, weight_bytes / speed)
        for table in tables(rows):
            console.print(table)
        if arguments.json is not None:
            text = json.dumps(results(arguments, rows, speed, weight_bytes, left_out, interrupted is None),
                              ensure_ascii=False, indent=1)
            arguments.json.write_text(text + "\n", encoding="utf-8")
        if arguments.chart is not None:
            draw(rows, arguments.chart)
    if interrupted is not None:
        raise interrupted


def load(path: str, arguments: Arguments) -> jaxlm.Model:
    """A model in the type asked for."""
    return jaxlm.load(path, dtype=None if arguments.dtype is None else jnp.dtype(arguments.dtype))


def results(arguments: Arguments, rows: list[dict[str, Any]], speed: float, weight_bytes: int, left_out: list[str],
            complete: bool) -> dict[str, Any]:
    """What goes into the JSON file."""
    settings = dataclasses.asdict(arguments)
    for name in ("model", "questions", "json", "chart"):
        del settings[name]
    return {
        "model": arguments.model, "questions": arguments.questions.name, "complete": complete, "left_out": left_out,
        "settings": settings,
        "machine": {**machine.describe(), "bytes_per_s": speed, "weight_bytes": weight_bytes},
        "drafters": rows,
    }


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))

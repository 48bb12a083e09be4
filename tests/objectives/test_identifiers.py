"""CodeT5's objectives: names hidden and found again, which tokens are of names, docstring and code in both directions."""

import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.identifiers import GRAMMARS, functions, identifiers, in_bytes
from jaxlm.data.source import Source
from jaxlm.data.stream import Batches, Phase, Plan
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import END, train
from jaxlm.objectives import CausalLM, PrefixLM, SpanCorruption, told
from jaxlm.objectives.identifiers import DualGeneration, IdentifierTagging, MaskedIdentifiers

SAMPLE = "".join(inspect.getsource(one) for one in (json.JSONDecoder, json.JSONEncoder))
TOKENIZER = Tokenizer(train([SAMPLE.replace("self._", "self._ "), "naïve 日本 🙂"], 450), ids={"eos_token": 0})
SPOKEN, OWN = TOKENIZER.token_bytes(), TOKENIZER.size
SENTINELS = tuple(range(OWN, OWN + 80))
CODE, TEXT = OWN + 80, OWN + 81
FUNCTION = 'def area(r):\n    """The area of a disc."""\n    pi = 3\n    return pi * r ** 2\n'
WORDS = ["x", "_y", "x1", "naïve", "日本", "self", "def", "in", "1", "+", "(", ")", ".", ":", "'x'", "# x", " ", "\n", "\n    ",
         "🙂"]
texts = st.lists(st.sampled_from(WORDS), min_size=2, max_size=40).map("".join)
seeds = st.integers(0, 2**32 - 1)
masked = MaskedIdentifiers(SENTINELS, tokenizer=TOKENIZER)
tagged = IdentifierTagging(tokenizer=TOKENIZER)
dual = DualGeneration(CODE, TEXT, tokenizer=TOKENIZER)


def rng(seed):
    return np.random.default_rng(seed)


def ids(text):
    return np.array(TOKENIZER.encode(text, add_special=False, parse_special=False), np.int32)


def spoken(tokens):
    return b"".join(SPOKEN[int(token)] for token in tokens)


def filled(pair):
    """The inputs' bytes, with the targets' names for the sentinels."""
    names, at = {}, None
    for token in pair.targets.tolist():
        if token in SENTINELS:
            assert token not in names
            names[at := token] = b""
        else:
            names[at] += SPOKEN[token]
    return b"".join(names[token] if token in SENTINELS else SPOKEN[token] for token in pair.inputs.tolist())


@given(texts, st.data(), seeds)
def test_names_filled_in_are_the_document(text, data, seed):
    """Of pieces that begin and end anywhere, within characters too."""
    tokens = ids(text)
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(tokens))] * 2)))
    piece = tokens[begin:end]
    names = [one.name for one in in_bytes(spoken(piece))]
    if len(piece) < 2 or not names:
        with pytest.raises(ValueError, match=r"at least 2 tokens|no identifiers of python"):
            masked.example(piece, rng(seed))
        return
    pair = masked.example(piece, rng(seed))
    assert pair.inputs.dtype == pair.targets.dtype == np.int32
    assert filled(pair) == spoken(piece)
    if (begin, end) == (0, len(tokens)):
        np.testing.assert_array_equal(ids(filled(pair).decode()), tokens)
    # One sentinel for each name, in the order of the names, as often as the name.
    order = list(dict.fromkeys(names))
    assert [token for token in pair.inputs if token in SENTINELS] == [SENTINELS[order.index(name)] for name in names]
    assert [token for token in pair.targets if token in SENTINELS] == list(SENTINELS[:len(order)])


def plain_masked(text):
    """Inputs and targets in letters: names replaced from the last to the first."""
    found = identifiers(text)
    names = list(dict.fromkeys(one.name for one in found))
    for one in reversed(found):
        text = text[:one.begin] + f"<{names.index(one.name)}>" + text[one.end:]
    return text, "".join(f"<{place}>{name}" for place, name in enumerate(names))


def shown(tokens):
    return b"".join(f"<{token - OWN}>".encode() if token >= OWN else SPOKEN[token] for token in tokens.tolist()).decode()


def test_real_functions_without_names():
    found = functions(SAMPLE)
    assert len(found) > 5
    for one in found:
        pair = masked.example(ids(one.text), rng(0))
        assert (shown(pair.inputs), shown(pair.targets)) == plain_masked(one.text)
        # Names are spelt as the tokenizer does, and the rest is as it was.
        _, *targets = np.split(pair.targets, np.flatnonzero(pair.targets >= OWN))
        assert all(run[1:].tolist() == ids(spoken(run[1:]).decode()).tolist() for run in targets)
    pair = masked.example(ids(FUNCTION), rng(0))
    assert shown(pair.inputs) == ('def <0>(<1>):\n    """The area of a disc."""\n    <2> = 3\n    return <2> * <1> ** 2\n')
    assert shown(pair.targets) == "<0>area<1>r<2>pi"


def test_tokens_without_letters_of_names_stay():
    tokens = ids(FUNCTION)
    free = IdentifierTagging(tokenizer=TOKENIZER).example(tokens, rng(0)).targets == 0
    left = iter(masked.example(tokens, rng(0)).inputs.tolist())
    assert 0 < free.sum() < len(tokens) and all(token in left for token in tokens[free].tolist())  # in this order


def test_more_names_than_sentinels():
    few = dataclasses.replace(masked, sentinels=SENTINELS[:2])
    seen = set()
    for seed in range(30):
        pair = few.example(ids("a = b + c\na = c\n"), rng(seed))
        assert filled(pair) == b"a = b + c\na = c\n"
        seen.add(shown(pair.inputs))
    assert seen == {"<0> = <1> + c\n<0> = c\n", "<0> = b + <1>\n<0> = <1>\n", "a = <0> + <1>\na = <1>\n"}


def test_ends_and_edges():
    begin, tokens = OWN + 90, ids("a = b\n")
    one = told(dataclasses.replace(masked, end=0), (begin,))
    assert one.edges == (begin,) and set(one.special) == {*SENTINELS, begin, 0}
    for document in ([begin, *tokens], [begin, *tokens, 0]):
        pair = one.example(np.array(document), rng(0))
        assert pair.inputs[0] == begin and pair.inputs[-1] == 0 and (pair.inputs == 0).sum() == 1
        assert shown(pair.inputs[1:-1]) == "<0> = <1>\n" and shown(pair.targets[:-1]) == "<0>a<1>b" and pair.targets[-1] == 0
    pair = told(dataclasses.replace(dual, end=0), (begin,)).example(np.array([begin, *ids(FUNCTION), 0]), rng(0))
    assert pair.inputs[0] == begin and pair.inputs[1] in (CODE, TEXT) and pair.inputs[-1] == pair.targets[-1] == 0
    text = told(tagged, (0,)).example(np.array([0, *tokens, 0]), rng(0))
    assert text.weights.tolist() == [0, *[1] * len(tokens), 0] and text.targets[[0, -1]].tolist() == [0, 0]


@given(texts, st.data())
def test_tags(text, data):
    """Token by token: whether any of its bytes is one of a name."""
    tokens = ids(text)
    tokens = tokens[data.draw(st.integers(0, len(tokens) - 1)):]
    places = {at for begin, end, _ in in_bytes(spoken(tokens)) for at in range(begin, end)}
    made = tagged.example(tokens, rng(0))
    want, at = [], 0
    for token in tokens:
        want.append(int(any(place in places for place in range(at, at + len(SPOKEN[token])))))
        at += len(SPOKEN[token])
    assert made.targets.tolist() == want and made.tokens.tolist() == tokens.tolist() and made.prefix == len(tokens)
    assert made.targets.dtype == made.tokens.dtype == np.int32 and made.weights.tolist() == [1.0] * len(tokens)


def test_what_is_asked_of_a_model():
    assert (IdentifierTagging.makes, IdentifierTagging.labels, IdentifierTagging.prefixes) == ("encoder", 2, True)
    assert MaskedIdentifiers.makes == DualGeneration.makes == "pair"


def test_both_directions():
    one, = functions(FUNCTION)
    sides = {TEXT: "The area of a disc.", CODE: "def area(r):\n    pi = 3\n    return pi * r ** 2\n"}
    assert (one.docstring, one.code) == tuple(sides.values())
    asked = []
    for seed in range(400):
        pair = dual.example(ids(FUNCTION), rng(seed))
        assert {int(pair.inputs[0]), int(pair.targets[0])} == {TEXT, CODE}
        for side in pair:
            np.testing.assert_array_equal(side[1:], ids(sides[int(side[0])]))
        asked.append(int(pair.targets[0]))
    assert 0.42 < asked.count(CODE) / len(asked) < 0.58
    for share, want in ((0.0, TEXT), (1.0, CODE)):
        assert {int(dataclasses.replace(dual, share=share).example(ids(FUNCTION), rng(seed)).targets[0])
                for seed in range(9)} == {want}


def test_of_several_functions_one_is_drawn():
    found = {one.docstring for one in functions(SAMPLE)}
    drawn = [dataclasses.replace(dual, share=1.0).example(ids(SAMPLE), rng(seed)) for seed in range(60)]
    assert {spoken(pair.inputs[1:]).decode() for pair in drawn} == found


def test_documents_without_docstrings():
    plain, cut = ids("def f(x):\n    return x\n"), ids(FUNCTION[:30])
    for document in (plain, cut):
        with pytest.raises(ValueError, match="no Python function with a docstring"):
            dual.example(document, rng(0))
    other = SpanCorruption(SENTINELS)
    either = DualGeneration(CODE, TEXT, otherwise=other, tokenizer=TOKENIZER)
    for document in (plain, cut):
        made, want = either.example(document, rng(3)), other.example(document, rng(3))
        assert [side.tolist() for side in made] == [side.tolist() for side in want]
    assert either.example(ids(FUNCTION), rng(3)).inputs[0] in (CODE, TEXT)
    assert set(either.special) == {CODE, TEXT, *SENTINELS} and told(either, (7,)).otherwise.edges == (7,)


@pytest.mark.parametrize("objective", [masked, tagged, dual], ids=lambda one: type(one).__name__)
def test_a_seed_decides_here_and_in_other_processes(objective):
    one = dataclasses.replace(objective, sentinels=SENTINELS[:3]) if objective is masked else objective
    there = pickle.loads(pickle.dumps(one))
    for seed in range(5):
        here = one.example(ids(FUNCTION), rng(seed))
        for again in (one.example(ids(FUNCTION), rng(seed)), there.example(ids(FUNCTION), rng(seed))):
            for mine, other in zip(here, again, strict=True):
                np.testing.assert_array_equal(mine, other)


def test_errors():
    with pytest.raises(ValueError, match="sentinels are different tokens"):
        MaskedIdentifiers((5, 5))
    with pytest.raises(ValueError, match="not of 'cobol'"):
        MaskedIdentifiers(SENTINELS, language="cobol")
    with pytest.raises(ValueError, match="not of 'cobol'"):
        IdentifierTagging(language="cobol")
    with pytest.raises(ValueError, match="code and text are different tokens and share is 0 to 1"):
        DualGeneration(5, 5)
    with pytest.raises(ValueError, match="got 5, 6 and 1.5"):
        DualGeneration(5, 6, share=1.5)
    with pytest.raises(ValueError, match="DualGeneration makes pairs, and CausalLM makes texts for decoders"):
        DualGeneration(5, 6, otherwise=CausalLM())
    with pytest.raises(ValueError, match="no identifiers of python"):
        masked.example(ids("1 + 2"), rng(0))
    with pytest.raises(ValueError, match="no token that may be asked"):
        told(tagged, tuple(range(OWN))).example(ids("a b"), rng(0))
    with pytest.raises(ValueError, match=f"no token has the id {OWN}"):
        tagged.example(np.array([1, OWN]), rng(0))
    for one in (MaskedIdentifiers(SENTINELS), IdentifierTagging(), DualGeneration(CODE, TEXT)):
        with pytest.raises(ValueError, match=f"{type(one).__name__} reads the text of documents and was given no tokenizer"):
            one.example(ids(FUNCTION), rng(0))


def test_java():
    pytest.importorskip("tree_sitter")
    pytest.importorskip(GRAMMARS["java"][0])
    text = "public int add(int a, int b) { return a + this.b; }"
    pair = MaskedIdentifiers(SENTINELS, language="java", tokenizer=TOKENIZER).example(ids(text), rng(0))
    assert shown(pair.inputs) == "public int <0>(int <1>, int <2>) { return <1> + this.<2>; }"
    assert shown(pair.targets) == "<0>add<1>a<2>b" and filled(pair).decode() == text


@dataclasses.dataclass(frozen=True)
class Texts(Source):
    texts: tuple[str, ...]

    def open(self):
        return self.texts


def encode(text):
    return [*TOKENIZER.encode(text, parse_special=False), TOKENIZER.backend.token_to_id(END)]


@dataclasses.dataclass(frozen=True)
class Always:
    objective: object

    def __call__(self, step):
        return self.objective


def parts(batch, row, name, segments):
    """The examples' tokens in a row."""
    return [batch[name][row][batch[segments][row] == number].tolist() for number in range(1, batch[segments][row].max() + 1)]


def test_batches():
    """Functions that do not fit any more begin the next row whole, where there is something else to make of their pieces."""
    found = [one for one in functions(SAMPLE) if len(ids(one.text)) < 300]
    sources = ((Texts(tuple(one.text for one in found)), 1.0),)
    sides = [((TEXT, *ids(one.docstring), 0), (CODE, *ids(one.code), 0)) for one in found]
    whole = {pair for text, code in sides for pair in ((text, code), (code, text))}
    both = told(dataclasses.replace(dual, end=0, otherwise=PrefixLM()), ())
    for objective, inputs in ((both, 300), (told(dataclasses.replace(masked, end=0), ()), 300), (told(tagged, (0,)), None)):
        plan, seen = Plan((Phase(sources),), encode, Always(objective), 2, 300, cut=False, inputs=inputs), set()
        with Batches(plan, ahead=0) as batches:
            for batch in (next(batches), next(batches)):
                for row in range(2):
                    if objective is both:
                        pairs = zip(parts(batch, row, "inputs", "input_segments"), parts(batch, row, "targets", "segments"),
                                    strict=True)
                        seen |= {(tuple(given), tuple(asked)) for given, asked in pairs}
                    else:
                        assert len(parts(batch, row, "targets", "segments")) >= 1 and batch["weights"][row].any()
        assert seen <= whole and (objective is not both or len(seen) > 4)

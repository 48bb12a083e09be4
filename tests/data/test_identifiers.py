"""Where identifiers are, and Python's functions with docstrings: by construction, by Python's own parser, in broken pieces."""

import ast
import inspect
import json
import keyword
import sys
import textwrap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.data import identifiers as module
from jaxlm.data.identifiers import GRAMMARS, LANGUAGES, RESERVED, Identifier, Spelling, functions, identifiers, in_bytes
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_train import END, train

SILENT = ["'a b'", '"""d\n  é"""', "1.5", "0x1f", "+", "(", ")", "[", "]", "**", "->", ".", ",", ":", "# a b\n", "\n", "\n\n  ",
          *keyword.kwlist]
NAMED = ["x", "_", "__init__", "naïve", "日本", "print", "a1", "Object"]
SAMPLE = "".join(inspect.getsource(one) for one in (json.JSONDecoder, json.JSONEncoder))


def names(text, language="python"):
    """Of the identifiers, checked to stand where it is said."""
    found = identifiers(text, language)
    assert all(text[one.begin:one.end] == one.name for one in found)
    assert all(one.end <= other.begin for one, other in zip(found, found[1:], strict=False))
    return [one.name for one in found]


@given(st.lists(st.tuples(st.sampled_from([*SILENT, *NAMED]), st.sampled_from([" ", "\t", " \n"])), max_size=25))
def test_what_a_text_was_made_of_is_found(parts):
    text, want, depth = "", [], 0
    for word, space in parts:
        if word in (")", "]"):
            if not depth:  # unbalanced, it is an error to some versions of Python
                continue
            word, depth = ")", depth - 1
        elif word in ("(", "["):
            word, depth = "(", depth + 1
        if word in NAMED:
            want.append(Identifier(len(text), len(text) + len(word), word))
        text += word + space
    assert identifiers(text) == want
    data = text.encode()
    assert [(data[begin:end].decode(), name) for begin, end, name in in_bytes(data)] == [(one.name,) * 2 for one in want]


def test_names_of_real_code_are_those_that_its_parser_knows():
    found = set(names(SAMPLE))
    tree, known = ast.parse(SAMPLE), set()
    for node in ast.walk(tree):
        for field in ("id", "name", "attr", "arg"):
            known |= {getattr(node, field)} if isinstance(getattr(node, field, None), str) else set()
    assert found <= known and known - found <= {"__class__", "__name__"}  # before Python 3.12 not those in an f-string
    assert {"JSONDecoder", "object_hook", "self", "skipkeys", "isinstance"} <= found


@pytest.mark.parametrize("text, want", [
    ("        a = 1\n    b = 2\nc = 3\n", "a b c"),  # a piece that begins deep inside
    ("def f(x):\n        y\n    z\nw", "f x y z w"),
    ("x = (a,\n b", "x a b"),
    ("x = a\ny = '''b\nc", "x a y"),
    ("x = a\nb = 'c d\ne", "x a b"),
    ("a\0b", "a"),
    ("", ""),
    ("a\r\n  b\r\n", "a b"),
    ("a\x0c\nb\u2028\n", "a b"),
])
def test_pieces_that_are_not_whole(text, want):
    assert names(text) == want.split()


def test_words_that_are_reserved_in_places():
    text = "match x:\n  case [a, *_]: pass\n  case {'k': v} if v: r\nmatch(z)\ncase = 1\nmatch.y: int = 2\n"
    assert names(text) == "x a _ v v r match z case match y int".split()
    assert names("type X = int\ntype(y)\ntype = 2\ntype in x\n") == "X int type y type type x".split()


@given(st.text(alphabet="ab_(['\"\\#\n\t :é日\U0001f600\0$.=", max_size=40), st.data())
@example("é = '日'", None)
def test_no_text_is_too_broken(text, data):
    names(text)
    functions(text)
    whole = text.encode()
    begin, end = (1, len(whole) - 2) if data is None else sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    for one in in_bytes(whole[begin:end]):
        assert whole[begin:end][one.begin:one.end].decode() == one.name


PIECES = {
    "c": ("#include <a.h>\nstatic int add(struct point *p) { return p->x + sizeof(int); }", "add point p p x"),
    "c_sharp": ("public int Add(List<string> a) { var get = a.Count; return get; }", "Add List a get a Count get"),
    "cpp": ("namespace n { template <class T> T A<T>::get() const { return this->x_; } }", "n T T A T get x_"),
    "go": ("func (s *Server) Run(n int) error { return s.run(n) }", "s Server Run n int error s run n"),
    "java": ("public List<String> f(int é) { /* no */ return this.g(\"no\", é, null); }", "List String f é g é"),
    "javascript": ("const f = async ({a, b: c}) => { await this.#p(a); return x.delete; }", "f a b c #p a x delete"),
    "php": ("<?php function f($list) { return $this->g($list, strlen('no')); }", "f list this g list strlen"),
    "ruby": ("class A < B\n  def f(x)\n    @y = x if x.nil?\n  end\nend", "A B f x @y x x nil?"),
    "rust": ("impl A { fn f(&self, x: u8) -> Self { self.y + x } }", "A f x y x"),
    "typescript": ("interface A { b: string }\nfunction f(x: A): number { return x.b }", "A b f x A x b"),
}


@pytest.mark.parametrize("language", sorted(GRAMMARS))
def test_other_languages(language):
    pytest.importorskip("tree_sitter")
    pytest.importorskip(GRAMMARS[language][0])
    text, want = PIECES[language]
    found = [name for name in names(text, language) if name != "Self"]
    assert found == want.split()
    for cut in range(len(text)):  # never a reserved word nor nothing, however broken
        for piece in (text[cut:], text[:cut]):
            assert not {name for name in names(piece, language) if name not in want.split()} & {*RESERVED[language], ""}
    assert identifiers("", language) == []


def test_php_without_its_tag():
    pytest.importorskip("tree_sitter_php")
    assert names("public function f($list) { return g($list); }", "php") == ["f", "list", "g", "list"]


def test_languages_that_are_unknown_or_not_installed(monkeypatch):
    with pytest.raises(ValueError, match="known of python, c, c_sharp, .*, not of 'cobol'"):
        identifiers("x", "cobol")
    assert set(LANGUAGES) == {"python", *RESERVED}
    module._grammar.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_c_sharp", None)
    with pytest.raises(ValueError, match="identifiers of c_sharp are found by tree-sitter: pip install tree-sitter "
                                         "tree-sitter-c-sharp"):
        identifiers("x", "c_sharp")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train([SAMPLE, "naïve 日本 🙂"], 400))


@given(st.text(max_size=20))
def test_bytes_are_spelt_as_the_tokenizer_does(tokenizer, text):
    spelling = Spelling(tokenizer)
    assert spelling.spell(text.encode()) == tokenizer.encode(text)
    for part in (text.encode()[1:], b"\xff" + text.encode()):
        assert b"".join(spelling.pieces(spelling.spell(part))) == part


def test_bytes_that_a_tokenizer_has_no_tokens_for():
    fields = {"model": "llama", "tokens": ["<unk>", "▁", "a", "aa", "▁a"], "scores": [0.0] * 5, "token_type": [2, 1, 1, 1, 1]}
    spelling = Spelling(Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()}))
    assert spelling.spell(b"aaa") == [3, 2] and spelling.spell(b" a") in ([4], [1, 2])
    with pytest.raises(ValueError, match="no token for b'!', of b'a!'"):
        spelling.spell(b"a!")


def test_special_tokens_end_lines_and_other_ids_are_errors(tokenizer):
    spelling, end = Spelling(tokenizer), tokenizer.backend.token_to_id(END)
    assert spelling.pieces([*tokenizer.encode("a"), end]) == [b"a", b"\n"]
    with pytest.raises(ValueError, match="no token has the id 400: the tokenizer has 400"):
        spelling.pieces([1, 400])


def test_functions_of_real_code():
    found = functions(SAMPLE)
    assert [one.code.split("(")[0] for one in found] == [
        "def __init__", "def decode", "def raw_decode", "def __init__", "def default", "def encode", "def iterencode"]
    for one, real in zip(found, (json.JSONDecoder.__init__, json.JSONDecoder.decode), strict=False):
        assert one.docstring == inspect.getdoc(real).strip()
        assert one.text == textwrap.dedent(inspect.getsource(real))
    for one in found:
        assert functions(one.text) == [one]
        whole, = ast.parse(one.text).body
        code, = ast.parse(one.code).body
        assert ast.dump(ast.Module(whole.body[1:], [])) == ast.dump(ast.Module(code.body, []))
        assert ast.dump(whole.args) == ast.dump(code.args) and ast.get_docstring(code) is None


MANY = '''
if True:
    @one
    @two(
        3)
    async def f(x):  # here
        r"""Says.

          More \\d.
        """  # and here

        def inner():
            "Not for itself."
            return 1
        return inner
def only(): "No code."
def line(): "On one line."; return 1
def code(
    x): "With code before it."; \\
    return_(x)
def none(): return 1
def blank():
    "   "
    return 1
def left():
    "Text at the margin."
    return """
at the margin"""
'''


def test_which_functions_are_taken():
    found = functions(MANY)
    assert [one.docstring for one in found] == ["Says.\n\nMore \\d.", "Text at the margin."]
    assert found[0].text.startswith("@one\n@two(\n    3)\nasync def f(x):  # here\n    r\"\"\"Says.\n")
    assert found[0].code == ("@one\n@two(\n    3)\nasync def f(x):  # here\n\n    def inner():\n"
                             "        \"Not for itself.\"\n        return 1\n    return inner\n")
    one, = functions("class A:\n    def f(self):\n        '''A.\n        B\\n        C'''\n        return 1\n")
    assert one.docstring == "A.\nB\n    C" and functions(one.text) == [one]  # as in the function that is handed out
    moved = "class A:\n    def f(self):\n        'A.'\n        return '''\nat the margin'''\n"
    assert functions(moved) == []
    assert functions("def f(:\n") == functions("a\0b") == functions("(" * 5000) == []
    windows, = functions("def f():\r\n    '''A.\r\n    '''\r\n    return 1\r\n")
    assert windows.code == "def f():\n    return 1\n"

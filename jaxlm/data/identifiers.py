"""What parsers know of code: where the identifiers of a piece are, which tokens they are, Python's functions with docstrings.

Python is read by its own tokenizer, other languages by tree-sitter, whose packages have to be installed. A piece need not be
whole, nor right.
"""

import ast
import functools
import importlib
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.tokenizer import Tokenizer

GRAMMARS = {  # package, function of it that gives the grammar
    "c": ("tree_sitter_c", "language"),
    "c_sharp": ("tree_sitter_c_sharp", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "go": ("tree_sitter_go", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "php": ("tree_sitter_php", "language_php_only"),  # the other takes all for text up to the first <?php
    "ruby": ("tree_sitter_ruby", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
}
LANGUAGES = ("python", *GRAMMARS)
# In right code the grammars know which words are reserved; in broken code, where they guess, some become identifiers.
_C = """auto break case char const continue default do double else enum extern float for goto if inline int long register
    restrict return short signed sizeof static struct switch typedef union unsigned void volatile while"""
_JAVASCRIPT = """await break case catch class const continue debugger default delete do else enum export extends false finally
    for function if import in instanceof new null return super switch this throw true try typeof var void while with yield"""
RESERVED = {language: frozenset(words.split()) for language, words in {
    "c": _C,
    "c_sharp": """abstract as base bool break byte case catch char checked class const continue decimal default delegate do
        double else enum event explicit extern false finally fixed float for foreach goto if implicit in int interface internal
        is lock long namespace new null object operator out override params private protected public readonly ref return sbyte
        sealed short sizeof stackalloc static string struct switch this throw true try typeof uint ulong unchecked unsafe
        ushort using virtual void volatile while""",
    "cpp": _C + """ alignas alignof and asm bool catch class concept const_cast consteval constexpr constinit co_await
        co_return co_yield decltype delete dynamic_cast explicit export false friend mutable namespace new noexcept not nullptr
        operator or private protected public reinterpret_cast requires static_assert static_cast template this thread_local
        throw true try typeid typename using virtual wchar_t xor""",
    "go": """break case chan const continue default defer else fallthrough for func go goto if import interface map package
        range return select struct switch type var""",
    "java": """abstract assert boolean break byte case catch char class const continue default do double else enum extends
        false final finally float for goto if implements import instanceof int interface long native new null package private
        protected public return short static strictfp super switch synchronized this throw throws transient true try void
        volatile while""",
    "javascript": _JAVASCRIPT,
    "php": "",  # any word is a name behind $ and ->
    "ruby": """BEGIN END alias and begin break case class def do else elsif end ensure false for if in module next nil not or
        redo rescue retry return self super then true undef unless until when while yield""",
    "rust": """as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move
        mut pub ref return self Self static struct super trait true type unsafe use where while""",
    "typescript": _JAVASCRIPT,
}.items()}
# What grammars call identifiers that they do not call "identifier" or the like: PHP's, and Ruby's.
_NAMES = ("name", "constant", "instance_variable", "class_variable", "global_variable")
_SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)


class Identifier(NamedTuple):
    """One place where an identifier stands: from `begin` to before `end`."""

    begin: int
    end: int
    name: str


def identifiers(text: str, language: str = "python") -> list[Identifier]:
    """The identifiers of a piece of code in order, their places counted in characters: names of all kinds but reserved words.
    Builtins are names like others.

    Of Python that breaks off or is wrong, those before the error; lines that are indented less than the first are no error.
    Names inside f-strings are seen from Python 3.12 on.

    Args:
      language: one of `LANGUAGES`.

    Raises:
      ValueError: for another language, and when tree-sitter or its grammar is not installed; says what to install.

    Example:
      >>> identifiers("def area(r): return pi * r")
      [Identifier(begin=4, end=8, name='area'), Identifier(begin=9, end=10, name='r'),
       Identifier(begin=20, end=22, name='pi'), Identifier(begin=25, end=26, name='r')]

    Reference: Wang et al. 2021, section 3.2, https://arxiv.org/abs/2109.00859
    """
    return list(_python(text)) if language == "python" else _other(text, language)


def _python(text: str) -> Iterator[Identifier]:
    text = text.partition("\0")[0]  # an error to all of Python's tokenizers, but not to all the same
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    first: int | None = 0
    while first is not None:
        logical: list[tokenize.TokenInfo] = []
        lines: list[list[tokenize.TokenInfo]] = [logical]
        again = None
        try:
            for token in tokenize.generate_tokens(io.StringIO(text[starts[first]:]).readline):
                if token.type == tokenize.ERRORTOKEN:
                    break
                logical.append(token)
                if token.type == tokenize.NEWLINE:
                    lines.append(logical := [])
        except IndentationError as error:  # a piece may begin deep inside: the rest is read for itself
            again = first + error.lineno - 1 if error.lineno and error.lineno > 1 else None
        except (tokenize.TokenError, SyntaxError):
            pass
        for line in lines:
            for token in _named(line):
                begin = starts[first + token.start[0] - 1] + token.start[1]
                yield Identifier(begin, begin + len(token.string), token.string)
        first = again


def _named(line: Sequence[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """Those of a logical line's tokens that are identifiers."""
    line = [token for token in line if token.type not in _SILENT]
    for token in line[1:] if _soft([token.string for token in line], line) else line:
        if token.type == tokenize.NAME and token.string.isidentifier() and not keyword.iskeyword(token.string):
            yield token


def _soft(words: Sequence[str], line: Sequence[tokenize.TokenInfo]) -> bool:
    """Whether a logical line begins with a word that is reserved there only."""
    if words[:1] == ["type"]:
        return len(words) > 2 and line[1].type == tokenize.NAME and not keyword.iskeyword(words[1])
    if words[:1] not in (["match"], ["case"]) or words[1:2] in ([":"], ["."], [","]):
        return False
    depth = 0
    for place, word in enumerate(words):
        depth += (word in ("(", "[", "{")) - (word in (")", "]", "}"))
        if not depth and word == ":":
            return words[0] == "case" or not "".join(words[place + 1:]).strip()
        if not depth and word == "=":
            return False
    return False


@functools.lru_cache
def _grammar(language: str) -> tuple[Any, Any]:
    """(the package, the language)."""
    if language not in GRAMMARS:
        raise ValueError(f"identifiers are known of {', '.join(LANGUAGES)}, not of {language!r}")
    name, make = GRAMMARS[language]
    try:
        package, grammar = importlib.import_module("tree_sitter"), importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"identifiers of {language} are found by tree-sitter: pip install tree-sitter "
                         f"{name.replace('_', '-')}") from error
    return package, package.Language(getattr(grammar, make)())


def _other(text: str, language: str) -> list[Identifier]:
    package, grammar = _grammar(language)
    data = text.encode("utf-8", "replace")
    places = []
    cursor = package.Parser(grammar).parse(data).walk()
    while True:
        node = cursor.node
        kind, begin, end = node.type, node.start_byte, node.end_byte
        if not node.child_count and node.is_named and ("identifier" in kind or kind in _NAMES):
            free = kind not in ("identifier", "type_identifier")  # members may be called anything
            # What the parser misses it makes up, with no letters.
            if begin < end and (free or data[begin:end].decode() not in RESERVED[language]):
                places.append((begin, end))
        if cursor.goto_first_child():
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                at = {byte: place for place, byte in enumerate(_bytes_before(text).tolist())}
                return [Identifier(at[begin], at[end], text[at[begin]:at[end]]) for begin, end in places]


def _bytes_before(text: str) -> np.ndarray:
    """[n + 1] bytes of UTF-8 before each character, and of all; half characters, as `errors` leave them, are one byte."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    half = (code >= 0xD800) & (code < 0xE000)
    sizes = np.where(half, 1, 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))
    return np.concatenate([[0], np.cumsum(sizes)])


class Spelling:
    """A tokenizer's tokens as bytes, and bytes as its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.spoken = tokenizer.token_bytes()
        self.known = {piece: token for token, piece in reversed(list(enumerate(self.spoken))) if piece}
        self.longest = max(map(len, self.known), default=0)

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each token; a line's end for special ones, so that nothing goes on across them.

        Raises:
          ValueError: for an id that the tokenizer does not have.
        """
        strange = [token for token in tokens if not 0 <= token < len(self.spoken)]
        if strange:
            raise ValueError(f"no token has the id {strange[0]}: the tokenizer has {len(self.spoken)}, from 0")
        return [self.spoken[token] or b"\n" for token in tokens]

    def spell(self, part: bytes) -> list[int]:
        """Tokens whose bytes are these: the tokenizer's own for such a text, or else the longest that fit, from the left.

        Raises:
          ValueError: where none fits.
        """
        try:
            found = self.tokenizer.encode(part.decode(), add_special=False, parse_special=False)
        except UnicodeDecodeError:
            found = []
        if b"".join(self.spoken[token] for token in found) == part:
            return found
        found, at = [], 0
        while at < len(part):
            size = next((size for size in range(self.longest, 0, -1) if part[at:at + size] in self.known), 0)
            if not size:
                raise ValueError(f"the tokenizer has no token for {part[at:at + 1]!r}, of {part!r}")
            found.append(self.known[part[at:at + size]])
            at += size
        return found


def in_bytes(data: bytes, language: str = "python") -> list[Identifier]:
    """As `identifiers`, of text as UTF-8 that may begin and end within a character; places are counted in bytes."""
    text = data.decode("utf-8", "surrogateescape")
    at = _bytes_before(text)
    return [Identifier(int(at[begin]), int(at[end]), name)
            for begin, end, name in identifiers(re.sub("[\ud800-\udfff]", " ", text), language)]


class Function(NamedTuple):
    """A function of Python.

    Attributes:
      text: all of it with its decorators, moved to the left.
      docstring: without the indentation of its lines.
      code: the text without the docstring's lines.
    """

    text: str
    docstring: str
    code: str


def functions(text: str) -> list[Function]:
    r"""The functions and methods that have a docstring and something behind it, but for those inside functions; in order.

    None of a text that does not parse. Functions whose lines cannot be moved to the left, or with a docstring that shares its
    lines with code, are left out.

    Example:
      >>> functions("class A:\n    def f(self):\n        'Gives 1.'\n        return 1\n")[0].code
      'def f(self):\n    return 1\n'
    """
    text = io.StringIO(text, newline=None).read()  # lines as the parser counts them
    lines = text.split("\n")
    return [found for node in _outermost(_parsed(text)) if (found := _function(node, lines)) is not None]


def _parsed(text: str) -> ast.Module:
    """Empty for a text that is no Python."""
    try:
        with warnings.catch_warnings():  # of what is odd in the text
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _outermost(child)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> Function | None:
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    said, after = node.body[:2]
    first = min(one.lineno for one in (node, *node.decorator_list)) - 1
    indent = lines[node.lineno - 1][:node.col_offset]
    own = lines[first:node.end_lineno]
    alone = not lines[said.lineno - 1][:said.col_offset].strip() and after.lineno > said.end_lineno
    if not alone or any(line.strip() and not line.startswith(indent) for line in own):
        return None
    whole = [line.removeprefix(indent) for line in own]
    text = "\n".join(whole) + "\n"
    # Read from the moved text: escapes make lines too, and those have not moved.
    docstring = next((ast.get_docstring(moved) for moved in _parsed(text).body), None) if indent else ast.get_docstring(node)
    if not (docstring or "").strip():
        return None
    code = whole[:said.lineno - 1 - first] + whole[said.end_lineno - first:]
    return Function(text, docstring.strip(), "\n".join(code) + "\n")

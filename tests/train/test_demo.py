from jaxlm.data import tokenizer_train
from jaxlm.data.tokenizer import Tokenizer
from train import demo

BODY = "".join(f"    x{i} = {i}\n" for i in range(10))
LONG = f'import os\n\n\ndef long(a):\n    """Does much.\n\n    And more."""\n{BODY}\n'
SHORT = 'def short():\n    """Does little."""\n    return 1\n'


def test_prompts_end_after_a_docstring():
    assert demo.prompts([SHORT, "no python (", LONG, LONG + "\n# 2"], 1) == [LONG[:LONG.index(BODY)]]
    assert len(demo.prompts([LONG] * 3, 2)) == 2 and demo.prompts([SHORT], 2) == []
    assert demo.prompts([f"def bare():\n{BODY}"], 2) == []


def test_prompts_are_cut_between_lines(tmp_path):
    tokenizer_train.save(tokenizer_train.train([LONG], 300), tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_directory(tmp_path / "tokenizer")
    text, whole = "first line\nsecond line\nthird\n", len(tokenizer.encode("second line\nthird\n"))
    assert tokenizer.decode(demo.last_lines(tokenizer, text, whole)) == "second line\nthird\n"
    assert tokenizer.decode(demo.last_lines(tokenizer, text, whole - 1)) == "third\n"
    assert demo.last_lines(tokenizer, text, 1000) == tokenizer.encode(text)
    assert demo.last_lines(tokenizer, "x" * 50, 3) == tokenizer.encode("x" * 50)[-3:]
    assert demo.last_lines(tokenizer, "", 3) == []

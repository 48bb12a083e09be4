"""infer.embed on a tiny sentence encoder in a directory."""

import json

import numpy as np
import pytest
import tokenizers
import tyro

import jaxlm
from infer import embed, session
from jaxlm import config, model
from jaxlm.data.tokenizer import Tokenizer
from tests import tiny

STS = [("5.0", "a b c", "a b c"), ("1.5", "a b", "e f g h"), ("3.0", "d d e", "d e h"), ("4.0", "f g", "g f")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    words = {word: i for i, word in enumerate("abcdefgh")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    norm = config.LayerNorm(1e-12)
    block = tiny.block(config.PostNorm(norm), config.Dense(24, config.Activation.GELU, False, True), heads=2, kv_heads=2,
                       position=None, causal=False, bias=True, out_bias=True)
    cfg = config.Encoder(16, config.Embedding(8, position=config.Learned(32), norm=norm, types=2), config.stack_of([block]),
                         None, config.Vector(config.Pooling.MEAN), 32)
    path = tmp_path_factory.mktemp("model") / "tiny"
    jaxlm.save(jaxlm.Model(cfg, tiny.weights(model.spec(cfg)), Tokenizer(backend)), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """The tests' compilation cache stays what it is."""
    monkeypatch.setattr(session, "cache_compilations", lambda: None)


def run(capsys, *arguments):
    tyro.cli(embed.main, args=[str(one) for one in arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_vectors_of_a_files_lines(directory, tmp_path, capsys):
    # A line separator is part of a text: only line feeds part them.
    (tmp_path / "texts.txt").write_bytes("a b c\r\nd\u2028e\nf\rg h\n".encode())
    texts = ["a b c", "d\u2028e", "f\rg h"]
    assert embed.read_lines(tmp_path / "texts.txt") == texts
    out = tmp_path / "vectors"
    result = run(capsys, directory, "--texts", tmp_path / "texts.txt", "--out", out, "--batch", 3, "--json")
    assert (result["texts"], result["width"]) == (3, 16)
    loaded = jaxlm.load(directory)
    np.testing.assert_allclose(np.load(out), jaxlm.embed(loaded, texts), atol=1e-6)
    run(capsys, directory, "--texts", tmp_path / "texts.txt", "--out", out, "--pooling", "max", "--normalize", "False",
        "--json")
    np.testing.assert_allclose(np.load(out), jaxlm.embed(loaded, texts, pooling="max", normalize=False), atol=1e-6)


def ranks(values):
    """No two are the same here."""
    return np.argsort(np.argsort(values)).astype(float)


def test_spearman_on_sentence_pairs(directory, tmp_path, capsys):
    file = tmp_path / "sts.csv"
    file.write_text("".join(f"genre\tname\tyear\t{i}\t{score}\t{a}\t{b}\tmore\n" for i, (score, a, b) in enumerate(STS)))
    result = run(capsys, directory, "--sts", file, "--json")
    first, second = (jaxlm.embed(jaxlm.load(directory), [row[i] for row in STS]) for i in (1, 2))
    scores = [float(row[0]) for row in STS]
    expected = np.corrcoef(ranks((first * second).sum(axis=1)), ranks(scores))[0, 1]
    assert result["spearman"] == pytest.approx(expected, abs=1e-9)
    # Lengths do not count.
    assert embed.spearman(3 * first, 0.1 * second, scores) == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be(directory, tmp_path, capsys):
    file = tmp_path / "sts.csv"
    file.write_text("a\tb\tc\td\t5.0\tone\ttwo\na\tb\tc\td\thigh\tone\ttwo\n")
    with pytest.raises(ValueError, match="line 2: a score and two sentences must stand in"):
        run(capsys, directory, "--sts", file)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="empty is empty"):
        run(capsys, directory, "--texts", tmp_path / "empty", "--out", tmp_path / "out")
    for arguments in ((), ("--texts", file), ("--sts", file, "--texts", file, "--out", file)):
        with pytest.raises(ValueError, match="give --texts and --out together, or --sts alone"):
            run(capsys, directory, *arguments)

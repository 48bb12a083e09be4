"""The programs on a tiny model in a directory: what they print, and how they say that something is wrong."""

import contextlib
import dataclasses
import io
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
import tyro

import jaxlm
from infer import assets, convert, demo, generate, perplexity, session
from jaxlm import adapt, config, model, params
from jaxlm.data.tokenizer import Tokenizer

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


FIELDS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [],
    "tokenizer.ggml.tokens": [*map(chr, range(33, 127)), "Ġ", "Ċ", "<end>"], "tokenizer.ggml.token_type": [1] * 96 + [3],
    "tokenizer.ggml.eos_token_id": 96, "tokenizer.chat_template": TEMPLATE}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = Tokenizer.from_gguf(FIELDS)
    block = config.Block(config.Attention(2, 1, 8), config.Dense(24), config.PreNorm(config.RmsNorm()))
    cfg = config.Decoder(16, config.Embedding(97), config.stack_of([block] * 2), config.RmsNorm(), config.Head(True), 128)
    weights = params.init(model.spec(cfg), jax.random.key(0))
    path = tmp_path_factory.mktemp("model") / "tiny"
    jaxlm.save(jaxlm.Model(cfg, weights, tokenizer), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """The tests' compilation cache stays what it is."""
    monkeypatch.setattr(session, "cache_compilations", lambda: None)


def run(program, *arguments):
    """Standard output of a program called with these words."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if program is generate:
            generate.main(tyro.cli(generate.Arguments, args=arguments))
        else:
            tyro.cli(program.main, args=arguments)
    return out.getvalue()


def test_generate_prints_one_json_object_last(directory):
    out = run(generate, "--model", str(directory), "--prompt", "ab", "--max-new-tokens", "5", "--raw", "--json")
    result = json.loads(out.splitlines()[-1])
    loaded = jaxlm.load(directory)
    expected = jaxlm.generate(loaded, ["ab"], 5)
    assert result["tokens"] == expected.tokens[0].tolist()
    assert result["text"] == expected.text[0]
    assert result["prompt_tokens"] == 2
    assert result["prefill_s"] > 0 and result["decode_s"] >= 0 and result["tokens_per_s"] >= 0


def test_a_prefix(directory):
    out = run(generate, "--model", str(directory), "--prompt", "abcdef", "--max-new-tokens", "5", "--raw", "--json", "--prefix")
    expected = jaxlm.generate(jaxlm.load(directory), ["abcdef"], 5, prefix=True)
    assert json.loads(out.splitlines()[-1])["tokens"] == expected.tokens[0].tolist()


def test_unixcoder_in_its_modes(tmp_path):
    """An encoder's directory, read as what writes."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<encoder-only>", "<decoder-only>", "<encoder-decoder>", *"abc"]
    attention = config.Attention(2, 2, 8, None, causal=False, bias=True, out_bias=True)
    norm = config.LayerNorm(1e-12)
    block = config.Block(attention, config.Dense(24, config.Activation.GELU, False, True), config.PostNorm(norm))
    cfg = config.Encoder(16, config.Embedding(len(letters), position=config.Learned(42, 2), norm=norm, types=1),
                         config.stack_of([block] * 2), None, None, 40)
    lm = jaxlm.Model(cfg, params.init(model.spec(cfg), jax.random.key(0)))
    jaxlm.io.save(lm, tmp_path, family="roberta")
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    writes = adapt.to_decoder(lm)
    for mode, prefix, prompt in (("encoder-decoder", True, [0, 6, 2, 7, 9, 8, 2]), ("decoder-only", False, [0, 5, 2, 7, 9, 8])):
        out = run(generate, "--model", str(tmp_path), "--prompt", "acb", "--max-new-tokens", "6", "--json", "--mode", mode)
        expected = jaxlm.generate(writes, [prompt], 6, prefix=prefix, eos=2)
        result = json.loads(out.splitlines()[-1])
        assert result["tokens"] == expected.tokens[0].tolist() and result["prompt_tokens"] == len(prompt)
    with pytest.raises(ValueError, match="an encoder writes no text"):
        run(generate, "--model", str(tmp_path), "--prompt", "acb", "--json")


def test_the_chat_template_is_applied_unless_raw(directory):
    results = {}
    for flags in ((), ("--raw",), ("--system", "s")):
        out = run(generate, "--model", str(directory), "--prompt", "ab", "--max-new-tokens", "3", "--json", *flags)
        results[flags] = json.loads(out.splitlines()[-1])["prompt_tokens"]
    assert results[()] == len("<user>ab<assistant>")
    assert results["--raw",] == len("ab")
    assert results["--system", "s"] == len("<system>s<user>ab<assistant>")


def test_sampling_settings_reach_the_model(directory):
    words = ("--model", str(directory), "--prompt", "ab", "--max-new-tokens", "8", "--raw", "--json")
    def tokens(*more):
        return json.loads(run(generate, *words, *more).splitlines()[-1])["tokens"]
    loaded = jaxlm.load(directory)
    expected = jaxlm.generate(loaded, ["ab"], 8, temperature=1.5, top_k=20, key=7)
    assert tokens("--temperature", "1.5", "--top-k", "20", "--seed", "7") == expected.tokens[0].tolist()
    assert tokens("--repetition-penalty", "5.0") != tokens()


def test_speculation_says_what_it_did_and_changes_no_token(directory):
    words = ("--model", str(directory), "--prompt", "ab", "--max-new-tokens", "24", "--raw", "--json")
    plain = json.loads(run(generate, *words).splitlines()[-1])
    result = json.loads(run(generate, *words, "--drafter", "recycling", "--tree", "5", "--rule", "match").splitlines()[-1])
    loaded = jaxlm.load(directory)
    expected = jaxlm.generate(loaded, ["ab"], 24, drafter="recycling", tree=5).speculation
    assert plain["speculation"] is None and result["tokens"] == plain["tokens"]
    found = result["speculation"]
    assert found["drafter"] == "recycling" and found["exact"] == "tokens"
    assert found["calls"] == expected.calls[0] and found["emitted"] == expected.emitted[0].tolist()
    assert found["tokens_per_call"] == pytest.approx((len(result["tokens"]) - 1) / found["calls"])
    assert found["sizes"] == {"5": found["calls"]}


def test_a_smaller_model_drafts(directory):
    """The model itself, so that all is accepted; drawn where the rule wants drafts that are drawn."""
    words = ("--model", str(directory), "--prompt", "ab", "--max-new-tokens", "9", "--raw", "--json")
    drafted = (*words, "--draft-model", str(directory))
    plain, result, drawn = (json.loads(run(generate, *each).splitlines()[-1])
                            for each in (words, drafted, (*drafted, "--rule", "chain", "--temperature", "0.5")))
    assert result["tokens"] == plain["tokens"] and result["speculation"]["drafter"] == str(directory)
    for each, exact in ((result, "tokens"), (drawn, "distribution")):  # eight tokens after the first, by chains of four
        assert each["speculation"]["emitted"] == [0, 0, 1, 0, 1] and each["speculation"]["exact"] == exact


def test_statistics_name_speculation_and_its_loss(directory):
    loaded = jaxlm.load(directory)
    plain = jaxlm.generate(loaded, ["ab"], 8)
    result = jaxlm.generate(loaded, ["ab"], 8, drafter="lookup")
    assert "per call" not in generate.statistics(plain)
    assert f"{result.speculation.tokens_per_call[0]:.2f} per call" in generate.statistics(result)
    assert "lossy" not in generate.statistics(result) and "experts" not in generate.statistics(result)
    mixed = dataclasses.replace(result, speculation=dataclasses.replace(result.speculation, experts=5.25))
    assert "per call of the model on 5.2 experts" in generate.statistics(mixed)
    assert generate.speculated(mixed, "lookup")["experts"] == 5.25
    lossy = dataclasses.replace(result, speculation=dataclasses.replace(result.speculation, exact="lossy"))
    assert "lossy" in generate.statistics(lossy)


def test_a_conversation_keeps_what_the_drafter_learned(directory, monkeypatch):
    typed = iter(["hi", "you", ""])
    results, states = [], []
    answer = generate.answer

    def spy(loaded, prompt, arguments, drafter, show, state):
        states.append(state)
        results.append(answer(loaded, prompt, arguments, drafter, show, state))
        return results[-1]

    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(typed))
    monkeypatch.setattr(generate, "answer", spy)
    run(generate, "--model", str(directory), "--chat", "--max-new-tokens", "4", "--drafter", "recycling", "--tree", "5")
    assert states[0] is None and states[1] is results[0].speculation.state


def test_a_conversation_remembers(directory, monkeypatch):
    typed = iter(["hi", "you", ""])
    asked = []
    answer = generate.answer

    def spy(loaded, prompt, *rest):
        asked.append(loaded.tokenizer.decode(prompt))
        return answer(loaded, prompt, *rest)

    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(typed))
    monkeypatch.setattr(generate, "answer", spy)
    run(generate, "--model", str(directory), "--chat", "--max-new-tokens", "2")
    assert asked[0] == "<user>hi<assistant>"
    assert asked[1].startswith("<user>hi<assistant>") and asked[1].endswith("<user>you<assistant>")
    assert len(asked) == 2


def test_convert_keeps_the_logits(directory, tmp_path):
    out = run(convert, "--from", str(directory), "--to", str(tmp_path / "out"), "--json")
    result = json.loads(out.splitlines()[-1])
    first, second = jaxlm.load(directory), jaxlm.load(tmp_path / "out")
    assert result["parameters"] == params.count(first.params)
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    with pytest.raises(ValueError, match="not empty"):
        run(convert, "--from", str(directory), "--to", str(tmp_path / "out"))


def test_perplexity_is_the_mean_of_scores(directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\nthat is the question")
    loaded = jaxlm.load(directory)
    tokens = loaded.tokenizer.encode(text.read_text())

    result = json.loads(run(perplexity, "--model", str(directory), "--text", str(text), "--json").splitlines()[-1])
    nats = -jaxlm.score(loaded, [tokens])[0].astype(float).sum() / (len(tokens) - 1)
    assert result["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats * len(tokens) / len(text.read_bytes()) / math.log(2), rel=1e-5)

    # Windows that overlap: each token is counted once, with at least `window - stride` tokens before it.
    result = json.loads(run(perplexity, "--model", str(directory), "--text", str(text), "--window", "16", "--stride", "4",
                            "--batch", "3", "--json").splitlines()[-1])
    assert result["scored"] == len(tokens) - 1
    expected = list(jaxlm.score(loaded, [tokens[:16]])[0][1:])
    for start in range(4, len(tokens) - 12, 4):
        expected += list(jaxlm.score(loaded, [tokens[start:start + 16]])[0][12:])
    assert result["nats_per_token"] == pytest.approx(-np.mean(expected, dtype=float), rel=1e-5)
    with pytest.raises(ValueError, match="stride"):
        run(perplexity, "--model", str(directory), "--text", str(text), "--window", "8", "--stride", "9")


def test_perplexity_puts_bos_before_every_window(directory, tmp_path, monkeypatch):
    loaded = jaxlm.load(directory)
    fields = {**FIELDS, "tokenizer.ggml.bos_token_id": 96, "tokenizer.ggml.add_bos_token": True}
    begun = jaxlm.Model(loaded.config, loaded.params, Tokenizer.from_gguf(fields))
    monkeypatch.setattr(jaxlm, "load", lambda *_, **__: begun)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be")
    result = json.loads(run(perplexity, "--model", "x", "--text", str(text), "--window", "8", "--json").splitlines()[-1])
    tokens = loaded.tokenizer.encode(text.read_text())
    rows = [[96, *tokens[start:start + 7]] for start in range(0, len(tokens), 7)]
    expected = np.concatenate([scores[1:] for scores in jaxlm.score(loaded, rows)])
    assert result["tokens"] == result["scored"] == len(tokens)
    assert result["nats_per_token"] == pytest.approx(-expected.mean(dtype=float), rel=1e-5)


def test_a_special_token_may_be_a_stop_string(directory):
    loaded = jaxlm.load(directory)
    forced = {"logit_bias": [{96: 1e4}, {96: 1e4}], "eos": ()}
    out = jaxlm.generate(loaded, ["ab", "ab"], 3, stop_strings=[["<end>"], ["nd"]], **forced)
    assert out.finish == ["stop", "length"] and [len(row) for row in out.tokens] == [1, 3]


def test_text_is_printed_as_it_is(directory, capsys):
    session.show(session.console(as_json=False), ":smile: [bold]\treturn\r\n")
    assert capsys.readouterr().out == ":smile: [bold]\treturn\r\n"


def test_the_demo_answers(directory, monkeypatch):
    monkeypatch.setattr(assets, "smollm2", lambda: directory)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        demo.main("say [/bold] x", max_new_tokens=4)
    loaded = jaxlm.load(directory)
    expected = jaxlm.generate(loaded, [generate.ask(loaded.tokenizer, [{"role": "user", "content": "say [/bold] x"}])], 4)
    assert "say [/bold] x" in out.getvalue() and "tokens/s" in out.getvalue()
    assert out.getvalue().count(expected.text[0]) == 2  # decoded plainly, and by speculation
    compared = out.getvalue().splitlines()[-8:]
    assert any("tokens per call" in line and "1.00" in line for line in compared)
    assert any("the same tokens" in line and "yes" in line for line in compared)


@pytest.mark.parametrize(("flags", "message"), [
    (("--chat", "--prompt", "x"), "goes with none"),
    (("--chat", "--json"), "goes with none"),
    (("--prompt", "ab", "--raw", "--system", "s"), "--system needs"),
    (("--prompt", "a" * 200, "--raw"), "context is 128"),
    (("--prompt", "", "--raw"), "empty"),
    (("--prompt", "ab", "--top-p", "0"), "top_p"),
    (("--prompt", "ab", "--tree", "4"), "name a drafter"),
    (("--prompt", "ab", "--mode", "decoder-only", "--prefix", "--raw"), "give one of them"),
    (("--prompt", "ab", "--mode", "encoder-decoder"), "--mode puts its token before a plain text, .* give --raw"),
    (("--chat", "--mode", "encoder-decoder"), "--mode puts its token before a plain text, .* no --chat"),
])
def test_generate_says_what_is_wrong(directory, flags, message):
    with pytest.raises(ValueError, match=message):
        run(generate, "--model", str(directory), *flags)


@pytest.mark.slow
def test_as_a_process(directory):
    def process(*words):
        return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)

    good = process("infer.generate", "--model", str(directory), "--prompt", "ab", "--max-new-tokens", "4", "--json")
    assert good.returncode == 0, good.stderr
    assert set(json.loads(good.stdout)) >= {"tokens", "text", "prefill_s", "decode_s", "tokens_per_s"}
    bad = process("infer.generate", "--model", str(directory / "nothing"), "--prompt", "ab")
    assert bad.returncode == 1 and bad.stderr.startswith("error:") and "Traceback" not in bad.stderr
    for program in ("generate", "bench", "convert", "perplexity", "demo"):
        shown = process(f"infer.{program}", "--help")
        assert shown.returncode == 0 and "usage" in shown.stdout.lower()


def test_generate_from_a_source(tmp_path, monkeypatch):
    """The prompt is the source, and the text begins with the tokens that were named; it may be as long as the decoder's is."""
    block = config.Block(config.Attention(2, 1, 8), config.Dense(24), config.PreNorm(config.RmsNorm()))
    cross = config.Attention(2, 1, 8, position=None, causal=False, source=16)
    inner = dataclasses.replace(block, attention=dataclasses.replace(block.attention, causal=False))
    embedding, norm = config.Embedding(97), config.RmsNorm()
    cfg = config.EncoderDecoder(
        config.Encoder(16, embedding, config.stack_of([inner]), norm, None, 128),
        config.Decoder(16, embedding, config.stack_of([dataclasses.replace(block, cross=cross)]), norm, config.Head(True), 24),
        (5,))
    loaded = jaxlm.Model(cfg, params.init(model.spec(cfg), jax.random.key(0)), Tokenizer.from_gguf(FIELDS))
    monkeypatch.setattr(jaxlm, "load", lambda *given, **named: loaded)
    said = json.loads(run(generate, "--model", "m", "--prompt", "a" * 40, "--raw", "--start", "b", "c",
                          "--json").splitlines()[-1])
    expected = jaxlm.generate(loaded, ["a" * 40], 23, start=[loaded.tokenizer.id("b"), loaded.tokenizer.id("c")])
    assert said["tokens"] == expected.tokens[0].tolist() and said["prompt_tokens"] == 40 and len(said["tokens"]) == 22
    with pytest.raises(ValueError, match="puts no language code around a text"):
        run(generate, "--model", "m", "--prompt", "a", "--language", "fr")
    with pytest.raises(ValueError, match="the start has 24 tokens, the model's context is 24"):
        run(generate, "--model", "m", "--prompt", "a", "--raw", "--start", *"b" * 24)

    def answer(loaded, prompt, *rest):
        raise StopIteration(len(prompt))

    # A conversation is the source, which may be longer than the decoder's texts.
    monkeypatch.setattr("rich.console.Console.input", lambda *_: "a" * 40)
    monkeypatch.setattr(generate, "answer", answer)
    with pytest.raises(StopIteration, match=str(len("<user><assistant>") + 40)):
        run(generate, "--model", "m", "--chat")
    (tmp_path / "text").write_text("to be or not to be")
    with pytest.raises(ValueError, match=r"m is an encoder-decoder, whose text is scored given a source"):
        run(perplexity, "--model", "m", "--text", str(tmp_path / "text"))

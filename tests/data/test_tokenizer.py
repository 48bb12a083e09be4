"""Tiny vocabularies made here; tokenizers, sentencepiece and (parity) transformers are the oracles."""

import concurrent.futures
import importlib.util
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers

from jaxlm.data import tokenizer_gguf
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_families import MODES

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["ð Ł", "h e", "l l", "he ll", "hell o", "Ġ hello", "Ã ©", "ðŁ ¦", "ðŁ¦ Ļ", "1 2", "12 3"]
BOS, EOS, TOOL, SIZE = 267, 268, 269, 270  # of `byte_level`: 256 bytes, 11 merges, three added tokens
CORPUS = """The quick brown fox jumps over the lazy dog; it said "hello, hello" 3 times, then 12 more.
    def hello(world):
        return world + 1    # four spaces, eight spaces
Hello, world! The world says hello to the quick fox and the lazy dogs of the old worlds.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Voilà, déjà vu.
"""
TEXTS = ["", " ", "   ", "hello", " hello", "  hello world", "hello\n\n  x", "a<s>b", "</s>", "naïve 🦙 中文", "tail  ", "\t\0"]


def fields(model="gpt2", **values):
    """GGUF metadata; `chat_template` and the architecture lie outside tokenizer.ggml."""
    outside = {"chat_template": "tokenizer.chat_template", "architecture": "general.architecture"}
    return {outside.get(key, f"tokenizer.ggml.{key}"): value for key, value in {"model": model, **values}.items()}


def byte_level(**values):
    """Byte-level BPE: all bytes, a few merges, a control token of each kind, and a user-defined one."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    added = ["<bos>", "<eos>", "<tool>"]
    tokens = [*ALPHABET, *merged, *added]
    return fields(**{
        "pre": "gpt-2", "tokens": tokens, "merges": MERGES, "bos_token_id": BOS,
        "token_type": [1] * (len(tokens) - 3) + [3, 3, 4], "eos_token_id": EOS, **values})


def train(**options):
    """A sentencepiece model of the corpus, as bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=out, minloglevel=2, hard_vocab_limit=False, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def llama():
    """A BPE like Llama's, as bytes."""
    return train(model_type="bpe", vocab_size=440, byte_fallback=True, normalization_rule_name="identity",
                 remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """(tokenizer, sentencepiece's processor) of a unigram like T5's."""
    model = train(model_type="unigram", vocab_size=150, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    directory = write(tmp_path_factory.mktemp("t5"), spiece__model=model, config__json={"model_type": "t5"},
                      tokenizer_config__json={"extra_ids": 3})
    return Tokenizer.from_directory(directory), sentencepiece.SentencePieceProcessor(model_proto=model)


def llama_fields(model, **values):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    return fields("llama", **{"tokens": [p.piece for p in proto.pieces], "scores": [p.score for p in proto.pieces],
                              "token_type": [p.type for p in proto.pieces], **values})


def write(directory, **files):
    """Writes files; a name's double underscore is a dot, and dicts become JSON."""
    for name, value in files.items():
        file = directory / name.replace("__", ".")
        if isinstance(value, bytes):
            file.write_bytes(value)
        else:
            file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return directory


def test_needs_no_jax():
    package = pathlib.Path(importlib.util.find_spec("jaxlm").origin).parent
    code = ("import sys, types; package = types.ModuleType('jaxlm'); package.__path__ = [sys.argv[1]]; "
            "sys.modules['jaxlm'] = package; import jaxlm.data.tokenizer; print('jax' in sys.modules)")
    ran = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


class TestByteLevel:
    tokenizer = Tokenizer.from_gguf(byte_level())

    def pieces(self, text, **options):
        return [self.tokenizer.backend.id_to_token(i) for i in self.tokenizer.encode(text, **options)]

    def test_merges_inside_words(self):
        assert self.pieces("hello hello 🦙") == ["hello", "Ġhello", "Ġ", "ðŁ¦Ļ"]
        assert self.pieces("hell o") == ["hell", "Ġ", "o"]
        assert self.pieces("") == []

    def test_added_tokens_are_not_in_the_writing_of_bytes(self):
        made = byte_level()
        made["tokenizer.ggml.tokens"].append("ñ!")  # as a word of the vocabulary it would be the bytes F1 21
        made["tokenizer.ggml.token_type"].append(4)
        tokenizer = Tokenizer.from_gguf(made)
        assert tokenizer.encode("ñ!") == [SIZE]
        assert tokenizer.decode([SIZE]) == "ñ!"

    def test_special_tokens_in_text(self):
        text = "he<eos><tool>"
        assert self.pieces(text) == ["he", "<eos>", "<tool>"]
        assert self.pieces(text, parse_special=False) == ["he", *"<eos>", "<tool>"]
        ids = self.tokenizer.encode(text)
        assert self.tokenizer.decode(ids) == "he<tool>"
        assert self.tokenizer.decode(ids, skip_special=False) == text

    @pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (True, True)])
    def test_around_a_text(self, bos, eos):
        tokenizer = Tokenizer.from_gguf(byte_level(add_bos_token=bos, add_eos_token=eos))
        inside = tokenizer.encode("hello", add_special=False)
        expected = [tokenizer.bos_id] * bos + inside + [tokenizer.eos_id] * eos
        for parse_special in (True, False):
            assert tokenizer.encode("hello", parse_special=parse_special) == expected

    def test_properties(self):
        tokenizer = self.tokenizer
        assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id) == (SIZE, BOS, EOS)
        assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_ids) == (None, None, (EOS,))
        assert f"size={SIZE}" in repr(tokenizer) and f"'<eos>' ({EOS})" in repr(tokenizer)

    @given(st.text())
    def test_any_text_survives(self, text):
        ids = self.tokenizer.encode(text, parse_special=False)
        assert self.tokenizer.decode(ids) == text
        assert b"".join(self.tokenizer.token_bytes()[i] for i in ids) == text.encode()

    @given(st.lists(st.integers(0, SIZE - 1), max_size=12), st.booleans())
    def test_decodes_any_ids_as_tokenizers_does(self, ids, skip_special):
        decoded = self.tokenizer.decode(ids, skip_special=skip_special)
        assert decoded == self.tokenizer.backend.decode(ids, skip_special_tokens=skip_special)

    def test_bytes_of_tokens(self):
        spoken = self.tokenizer.token_bytes()
        assert len(spoken) == self.tokenizer.size
        assert sorted(spoken[:256]) == [bytes([i]) for i in range(256)]
        assert spoken[-3:] == [b"", b"", b"<tool>"]
        spoken.clear()  # the caller's own
        assert self.tokenizer.token_bytes()

    @pytest.mark.parametrize("kind", [list, tuple, iter, np.asarray, jnp.asarray, lambda ids: [jnp.int32(i) for i in ids]])
    def test_ids_of_any_kind(self, kind):
        assert self.tokenizer.decode(kind(self.tokenizer.encode("hello 🦙"))) == "hello 🦙"
        assert self.tokenizer.decode(np.zeros(0)) == self.tokenizer.decode([]) == ""

    @pytest.mark.parametrize("ids, message", [
        ([999], r"no token has the id 999: this tokenizer has 270, from 0"), ([0, -1], r"no token has the id -1"),
        ([1.0], r"integers in one dimension, not float64"), ([[1]], r"not int64 of shape \(1, 1\)"), (3, r"shape \(\)")])
    def test_refuses_other_ids(self, ids, message):
        with pytest.raises(ValueError, match=message):
            self.tokenizer.decode(ids)
        with pytest.raises(ValueError, match=message):
            self.tokenizer.stream().push(ids)

    @pytest.mark.parametrize("text, message", [(b"hello", "must be a str, not bytes"), ("a\ud800", "lone surrogate")])
    def test_refuses_other_texts(self, text, message):
        with pytest.raises(ValueError, match=message):
            self.tokenizer.encode(text)

    def test_stream_waits_for_whole_characters(self):
        byte = {token: i for i, token in enumerate(ALPHABET)}
        stream = self.tokenizer.stream()
        assert [stream.push([byte[letter]]) for letter in "aÃ©ðŁ¦"] == ["a", "", "é", "", "", ""]
        assert stream.push([byte["Ļ"], byte["Ã"]]) == "🦙"
        assert stream.flush() == "\ufffd"

    def test_threads_share_it(self):
        tokenizer = Tokenizer.from_gguf(byte_level())
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            lengths = list(pool.map(lambda i: len(tokenizer.encode("<eos>", parse_special=i % 2 == 0)), range(400)))
        assert lengths == [1, 5] * 200


def word_piece():
    vocab = ["[UNK]", "[SEP]", "the", "dog", "##s", ","]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def kinds(llama, t5):
    """A tokenizer for every way of decoding."""
    return [Tokenizer.from_gguf(byte_level()), Tokenizer.from_gguf(llama_fields(llama)), t5[0], word_piece()]


@given(data=st.data())
def test_stream_joins_to_decode(kinds, data):
    tokenizer = data.draw(st.sampled_from(kinds))
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=20))
    options = {"skip_special": data.draw(st.booleans()), "continued": data.draw(st.booleans())}
    stream, text, at = tokenizer.stream(**options), "", 0
    while at < len(ids):
        count = data.draw(st.integers(0, 3))
        text += stream.push(ids[at:at + count])
        assert tokenizer.decode(ids, **options).startswith(text)
        at += count
    assert text + stream.flush() == tokenizer.decode(ids, **options)


def test_words():
    tokenizer = word_piece()
    ids = tokenizer.encode("the dogs, the[SEP]")
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids) == "the dogs, the"
    assert tokenizer.token_bytes() == [b"", b"", b" the", b" dog", b"s", b","]
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    tokenizer = Tokenizer(backend)  # no decoder: words with spaces between; ids 1 and 2 have no token
    assert tokenizer.decode([3, 0, 3]) == backend.decode([3, 0, 3]) == "b a b"
    assert tokenizer.token_bytes() == [b" a", b"", b"", b" b"]
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match="decoder of type BPEDecoder is not supported"):
        Tokenizer(backend).decode([0])


@pytest.fixture(scope="module")
def both(llama, tmp_path_factory):
    """(from GGUF fields, from tokenizer.model, sentencepiece's processor)"""
    directory = write(tmp_path_factory.mktemp("llama"), tokenizer__model=llama,
                      tokenizer_config__json={"tokenizer_class": "LlamaTokenizer"})
    return (Tokenizer.from_gguf(llama_fields(llama)), Tokenizer.from_directory(directory),
            sentencepiece.SentencePieceProcessor(model_proto=llama))


@given(ids=st.lists(st.integers(0, 4), max_size=6), scheme=st.sampled_from(["always", "never"]))
def test_metaspace(ids, scheme):
    backend = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "b": 1, "▁▁": 2, "\n": 3, "<0x41>": 4}, unk_token="b"))
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    assert Tokenizer(backend).decode(ids) == backend.decode(ids)


class TestSentencepiece:
    @given(text=st.text() | st.text("helo wrd .,1\n<s>/é", max_size=40) | st.sampled_from(TEXTS))
    def test_bpe_is_sentencepieces(self, both, text):
        *ours, processor = both
        for tokenizer in ours:
            ids = tokenizer.encode(text, add_special=False, parse_special=False)
            assert ids == processor.encode(text)
            assert tokenizer.decode(ids) == text

    @given(text=st.text("helo wrd.,'2t\n<s/>", max_size=40) | st.sampled_from(TEXTS))
    def test_unigram_is_sentencepieces(self, t5, text):
        tokenizer, processor = t5
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == processor.encode(text)
        assert tokenizer.encode(text, parse_special=False) == [*ids, tokenizer.eos_id]

    def test_sentinels_come_after_the_pieces_from_the_last(self, t5):
        tokenizer, processor = t5
        pieces = processor.get_piece_size()
        assert (tokenizer.size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (pieces + 3, 0, 1, 2)
        assert tokenizer.encode("<extra_id_2><extra_id_0></s>", add_special=False) == [pieces, pieces + 2, 1]

    def test_special_tokens(self, both):
        for tokenizer in both[:2]:
            bos, eos, unk = tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id
            assert (bos, eos, unk, tokenizer.pad_id) == (1, 2, 0, None)
            hello = tokenizer.encode("hello", add_special=False)
            assert tokenizer.encode("hello</s>hello") == [bos, *hello, eos, *hello]  # a space before each stretch
            assert tokenizer.decode([bos, *hello, eos, *hello]) == "hello hello"
            assert tokenizer.decode([bos, *hello, eos], skip_special=False) == "<s> hello</s>"
            assert not {bos, eos} & set(tokenizer.encode("<s></s>", add_special=False, parse_special=False))
            assert [tokenizer.token_bytes()[i] for i in (0, 1, 2)] == [b"", b"", b""]

    def test_spaces(self, both):
        tokenizer = both[0]
        ids = tokenizer.encode(" hello world", add_special=False)
        assert b"".join(tokenizer.token_bytes()[i] for i in ids) == b"  hello world"
        assert tokenizer.decode(ids) == " hello world"
        assert tokenizer.decode(ids, continued=True) == "  hello world"
        stream = tokenizer.stream()
        assert "".join(stream.push([i]) for i in [*ids, *ids]) == " hello world  hello world"

    def test_bytes(self, both):
        tokenizer = both[0]
        ids = tokenizer.encode("🦙", add_special=False)[-4:]
        assert [tokenizer.token_bytes()[i] for i in ids] == [bytes([byte]) for byte in "🦙".encode()]
        hello = tokenizer.encode("hello", add_special=False)
        assert tokenizer.decode([*ids[:3], *hello, *ids]) == "\ufffd hello🦙"

    def test_without_a_first_space(self, llama):
        tokenizer = Tokenizer.from_gguf(llama_fields(llama, add_space_prefix=False, add_bos_token=False))
        ids = tokenizer.encode("hello hello")
        assert tokenizer.token_bytes()[ids[0]] != b" hello"
        assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"

    def test_legacy_false_puts_a_space_at_the_start_only(self, llama, tmp_path):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
        tokenizer = Tokenizer.from_directory(write(tmp_path, tokenizer__model=llama, tokenizer_config__json=config))
        ids = tokenizer.encode("hello</s>hello")
        end = ids.index(tokenizer.eos_id)
        assert tokenizer.token_bytes()[ids[0]].startswith(b" ") and tokenizer.token_bytes()[ids[end + 1]][:1] == b"h"

    def test_user_defined_pieces_are_whole_in_text(self, llama):
        made = llama_fields(llama)
        made["tokenizer.ggml.tokens"] += ["<tool>", "   "]
        made["tokenizer.ggml.scores"] += [0.0, 0.0]
        made["tokenizer.ggml.token_type"] += [4, 4]
        tokenizer = Tokenizer.from_gguf(made | {"tokenizer.ggml.add_space_prefix": False})
        for parse_special in (True, False):
            ids = tokenizer.encode("<tool>   </s>", add_special=False, parse_special=parse_special)
            assert ids[:2] == [tokenizer.size - 2, tokenizer.size - 1]
            assert (ids[2:] == [tokenizer.eos_id]) == parse_special
        assert tokenizer.decode(ids) == "<tool>   </s>"

    @pytest.mark.parametrize("scores, merges, expected", [
        ([-1.0, -2.0], [], ["ab", "c"]), ([-2.0, -1.0], [], ["a", "bc"]), ([-1.0, -2.0], ["b c", "a b"], ["a", "bc"])])
    def test_scores_order_merges_unless_the_file_has_some(self, scores, merges, expected):
        tokens = ["<unk>", "<s>", "</s>", *"abc", "ab", "bc"]
        tokenizer = Tokenizer.from_gguf(fields(
            "gemma4", tokens=tokens, scores=[0.0] * 6 + scores, token_type=[2, 3, 3, 1, 1, 1, 1, 1], merges=merges,
            add_space_prefix=False, add_bos_token=False))
        assert [tokens[i] for i in tokenizer.encode("abc")] == expected

    def test_merges_never_give_a_control_piece(self):
        tokenizer = Tokenizer.from_gguf(fields(
            "llama", tokens=["<unk>", "<s>", "</s>", "<", "s", ">", "s>"], scores=[0.0] * 7, token_type=[2, 3, 3, 1, 1, 1, 1],
            add_space_prefix=False, add_bos_token=False))
        assert tokenizer.encode("<s>") == [1]
        assert tokenizer.encode("<s>", parse_special=False) == [3, 6]

    def test_phi3s_markers_swallow_spaces(self, llama):
        made = llama_fields(llama, add_bos_token=False)
        made["tokenizer.ggml.tokens"] += ["<|user|>"]
        made["tokenizer.ggml.scores"] += [0.0]
        made["tokenizer.ggml.token_type"] += [3]
        text, plain = "<|user|>\nhello", Tokenizer.from_gguf(made)
        phi3 = Tokenizer.from_gguf(made | {"general.architecture": "phi3"})
        assert phi3.encode(text) == plain.encode("<|user|>hello") != plain.encode(text)


WORDS = "It's  I'LL 12345x\n\n  naïve foo_bar!? 日本 'tis"


@pytest.mark.parametrize("name, words", [
    ("gpt-2", "It|'s| | I|'|LL| 12345|x|\n\n | naïve| foo|_|bar|!?| 日本| '|tis"),
    ("smollm", "It|'s| | I|'|LL| |1|2|3|4|5|x|\n\n | naïve| foo|_|bar|!?| 日本| '|tis"),
    ("qwen2", "It|'s| | I|'LL| |1|2|3|4|5|x|\n\n| | naïve| foo|_bar|!?| 日本| '|tis"),
    ("llama-bpe", "It|'s| | I|'LL| |123|45|x|\n\n| | naïve| foo|_bar|!?| 日本| '|tis"),
    ("tekken", "It|'s| | I|'LL| |1|2|3|4|5|x|\n\n| | naïve| foo|_bar|!?| 日本| '|tis"),
    ("gpt-4o", "It's| | I'LL| |123|45|x|\n\n| | naïve| foo|_bar|!?| 日本| '|tis"),
    ("falcon", "It|'|s| | I|'|LL| |123|45|x|\n\n | naïve| foo|_|bar|!?| 日本| |'|tis"),
    ("deepseek-coder", "It|'|s| | I|'|LL| |1|2|3|4|5|x|\n|\n| | naïve| foo|_|bar|!?| |日本| '|tis"),
    # Its punctuation, from ":" to "~", has the letters of ASCII in it.
    ("deepseek-llm", "It|'|s| | I|'|LL| |1|2|3|4|5|x|\n|\n| | na|ï|ve| foo|_|bar|!?| |日本| '|tis"),
    ("deepseek-v3", "It|'s| | I|'LL| |123|45|x|\n\n| | naïve| foo|_bar|!?| |日本| '|tis"),
    ("bloom", "It's| | I'LL| 12345x|\n\n | naïve| foo_bar|!?| 日本| 'tis"),
    ("default", "It|'|s| | I|'|LL| |123|45|x|\n\n | naïve| foo|_|bar|!?| 日本| |'|tis"),
])
def test_where_words_are_cut(name, words):
    backend = tokenizer_gguf.byte_level({}, [], tokenizer_gguf.PRE_TOKENIZERS[name])
    assert [WORDS[slice(*place)] for _, place in backend.pre_tokenizer.pre_tokenize_str(WORDS)] == words.split("|")


class TestGguf:
    def test_composed_form_where_the_model_has_it(self):
        for name, ids in (("qwen2", 1), ("gpt-2", 3)):
            assert len(Tokenizer.from_gguf(byte_level(pre=name)).encode("e\u0301")) == ids

    def test_words_before_merges(self):
        made = byte_level()
        made["tokenizer.ggml.tokens"].append("Ġworld")  # no merges lead to it
        made["tokenizer.ggml.token_type"].append(1)
        for name, count in (("gpt-2", 6), ("llama-bpe", 1)):
            tokenizer = Tokenizer.from_gguf(made | {"tokenizer.ggml.pre": name})
            assert len(tokenizer.encode(" world", add_special=False)) == count

    @pytest.mark.parametrize("name, added", [("gpt-2", False), ("llama-bpe", True), ("tekken", True), ("qwen2", False)])
    def test_bos_where_the_file_does_not_say(self, name, added):
        tokenizer = Tokenizer.from_gguf(byte_level(pre=name))
        assert (tokenizer.encode("")[:1] == [tokenizer.bos_id]) == added

    def test_ends_of_a_generation(self):
        def ends(added, types, **values):
            made = byte_level(**values)
            made["tokenizer.ggml.tokens"] += added
            made["tokenizer.ggml.token_type"] += types
            return [i - SIZE for i in Tokenizer.from_gguf(made).eos_ids]

        assert ends(["<|im_end|>", "<|endoftext|>"], [3, 3]) == [-2, 0, 1]
        assert ends(["<|im_end|>", "<|endoftext|>"], [3, 1]) == [-2, 0]  # plain text is no end
        assert ends(["<|end|>", "<|return|>", "<|call|>"], [3, 3, 3]) == [-2, 1, 2]
        assert ends(["<|end|>", "<stop>"], [3, 1], eot_token_id=SIZE + 1) == [-2, 1, 0]

    def test_templates(self):
        made = byte_level(chat_template="a") | {"tokenizer.chat_template.tool_use": "b"}
        made["tokenizer.chat_templates"] = ["tool_use"]
        assert Tokenizer.from_gguf(made).templates == {"default": "a", "tool_use": "b"}

    @pytest.mark.parametrize("change, message", [
        ({"model": "rwkv"}, r"tokenizer.ggml.model 'rwkv' is not supported; supported: \"gpt2\""),
        ({"pre": "nobody"}, r"tokenizer.ggml.pre 'nobody' is not supported; supported: .*'gpt-2'.*'smollm'"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "tokenizer.ggml.tokens has 'a' 2 times"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for 270 tokens"),
        ({"merges": ["hel lo"]}, "the merge 'hel' . 'lo' needs 'hel', which is not in the vocabulary"),
        ({"merges": ["hello"]}, "tokenizer.ggml.merges must hold two tokens .* not 'hello'"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores has 1 entries for 270 tokens"),
    ])
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_gguf(byte_level(**change))

    @pytest.mark.parametrize("key", ["model", "tokens", "merges"])
    def test_needs(self, key):
        made = byte_level()
        del made[f"tokenizer.ggml.{key}"]
        with pytest.raises(ValueError, match=f"the GGUF metadata has no tokenizer.ggml.{key}"):
            Tokenizer.from_gguf(made)


TEMPLATE = """{%- if tools %}{{ tools | tojson }}{% endif -%}
{% for message in messages %}
    {% if message.role == "nobody" %}
        {{ raise_exception("no role " + message.role) }}
    {% endif %}
    {% if message.role == "skip" %}{% continue %}{% endif %}
{{ bos_token }}{{ message.role }}: {% generation %}{{ message["content"] }}{% endgeneration %}

{% endfor %}
{% if add_generation_prompt %}{{ name | default("assistant") }}:{% endif %}"""


class TestChat:
    tokenizer = Tokenizer.from_gguf(byte_level(chat_template=TEMPLATE))
    messages = [{"role": "user", "content": "hé <b>"}, {"role": "skip", "content": "x"}]

    def test_renders(self):
        assert self.tokenizer.has_chat_template
        assert self.tokenizer.chat(self.messages) == "<bos>user: hé <b>\nassistant:"
        assert self.tokenizer.chat(self.messages, add_generation_prompt=False) == "<bos>user: hé <b>\n"
        assert self.tokenizer.chat([], name="é") == "é:"
        assert self.tokenizer.chat([], tools=[{"name": "é <b>"}]) == '[{"name": "é <b>"}]assistant:'

    def test_chooses_the_template_for_tools(self):
        tokenizer = Tokenizer(self.tokenizer.backend, templates={"default": "plain", "tool_use": "tools"})
        assert (tokenizer.chat([]), tokenizer.chat([], tools=[{}])) == ("plain", "tools")

    def test_tells_the_date(self):
        text = Tokenizer(self.tokenizer.backend, templates={"default": "{{ strftime_now('%Y-%m-%d') }}"}).chat([])
        assert len(text) == 10 and text[:2] == "20"

    @pytest.mark.parametrize("template, message", [
        ("{{ messages[0].content + 1 }}", "cannot render"), ("{{ x.y }}", "cannot render.*'x' is undefined"),
        ("{% if %}", "cannot render"), ("{{ messages.append(1) }}", "cannot render.*unsafe|not callable"),
        ("{{ messages.__class__.__mro__ }}", "cannot render.*unsafe")])
    def test_says_what_is_wrong(self, template, message):
        with pytest.raises(ValueError, match=message):
            Tokenizer(self.tokenizer.backend, templates={"default": template}).chat(self.messages)

    def test_refuses(self):
        with pytest.raises(ValueError, match="no role nobody"):
            self.tokenizer.chat([{"role": "nobody"}])
        tokenizer = Tokenizer(self.tokenizer.backend)
        assert not tokenizer.has_chat_template
        with pytest.raises(ValueError, match=r"no default chat template; this tokenizer's are: \[\]"):
            tokenizer.chat([])


class TestSave:
    def test_reads_back(self, kinds, tmp_path):
        texts = [*TEXTS, "the dogs", "<eos><tool>"]
        for place, tokenizer in enumerate(kinds):
            tokenizer.save(tmp_path / str(place))
            again = Tokenizer.from_directory(tmp_path / str(place))
            for key in ("size", "names", "ids", "eos_ids", "templates"):
                assert getattr(again, key) == getattr(tokenizer, key)
            assert again.token_bytes() == tokenizer.token_bytes()
            for text in texts:
                for special in (True, False):
                    ids = tokenizer.encode(text, parse_special=special)
                    assert again.encode(text, parse_special=special) == ids
                    assert again.decode(ids) == tokenizer.decode(ids)

    def test_templates_and_ends(self, tmp_path):
        made = byte_level(chat_template="a\r\nb é\n", eot_token_id=1) | {"tokenizer.chat_template.tool_use": "c"}
        tokenizer = Tokenizer.from_gguf(made)
        write(tmp_path, generation_config__json={"eos_token_id": 5})
        tokenizer.save(tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 5}
        tokenizer.save(tmp_path / "new" / "directory")
        again = Tokenizer.from_directory(tmp_path / "new" / "directory")
        assert again.templates == tokenizer.templates == {"default": "a\r\nb é\n", "tool_use": "c"}
        assert again.eos_ids == tokenizer.eos_ids == (tokenizer.eos_id, 1)


class TestDirectory:
    @pytest.fixture
    def saved(self, tmp_path):
        Tokenizer.from_gguf(byte_level()).save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "generation_config.json").unlink()
        return tmp_path

    def test_named_tokens(self, saved):
        config = {"bos_token": {"content": "<bos>", "lstrip": False}, "pad_token": "<pad>", "unk_token": None}
        tokenizer = Tokenizer.from_directory(write(
            saved, tokenizer_config__json=config, special_tokens_map__json={"eos_token": "<eos>", "pad_token": "<eos>"}))
        assert tokenizer.names == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (BOS, EOS, SIZE, None)
        assert tokenizer.encode("he<pad>") == [tokenizer.encode("he")[0], SIZE]  # not in the file: added, as transformers does
        assert tokenizer.decode([SIZE]) == ""

    def test_ids_of_the_model(self, saved):
        write(saved, config__json={"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9})
        tokenizer = Tokenizer.from_directory(saved)
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (7, (8,), 9)
        write(saved, generation_config__json={"eos_token_id": [5, 6, 999], "pad_token_id": None},
              tokenizer_config__json={"eos_token": "<eos>"})
        tokenizer = Tokenizer.from_directory(saved)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (7, EOS, (EOS, 5, 6), 9)

    @pytest.mark.parametrize("bos", [True, False, None])
    @pytest.mark.parametrize("eos", [True, None])
    def test_flags_replace_what_is_put_around(self, saved, bos, eos):
        config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": bos, "add_eos_token": eos}
        Tokenizer.from_gguf(byte_level(add_bos_token=True)).save(saved)
        tokenizer = Tokenizer.from_directory(write(saved, tokenizer_config__json=config))
        expected = [BOS] * (bos or (bos is None and eos is None)) + [EOS] * bool(eos)
        assert tokenizer.encode("") == expected

    def test_added_tokens(self, saved):
        entry = {"content": "<new>", "special": False, "normalized": False}
        config = {"added_tokens_decoder": {str(SIZE): entry}, "additional_special_tokens": ["<tool>"]}
        tokenizer = Tokenizer.from_directory(write(saved, tokenizer_config__json=config))
        assert tokenizer.encode("<new><tool>") == [SIZE, TOOL]
        assert tokenizer.decode([SIZE, TOOL]) == "<new>"
        config["added_tokens_decoder"] = {str(SIZE): entry | {"content": "<pad>", "special": True}, str(SIZE + 1): entry}
        tokenizer = Tokenizer.from_directory(write(saved, tokenizer_config__json=config))
        assert tokenizer.encode("<pad><new>") == [SIZE, SIZE + 1]
        assert tokenizer.encode("<pad><new>", parse_special=False)[-2:] == [ALPHABET.index(">"), SIZE + 1]
        config["added_tokens_decoder"] = {"300": entry}
        with pytest.raises(ValueError, match="added token '<new>' should have the id 300, not 270"):
            Tokenizer.from_directory(write(saved, tokenizer_config__json=config))

    @pytest.mark.parametrize("files", [
        {"chat_template__jinja": "a"}, {"tokenizer_config__json": {"chat_template": "a"}},
        {"chat_template__json": {"chat_template": "a"}},
        {"tokenizer_config__json": {"chat_template": [{"name": "default", "template": "a"}]}},
        {"tokenizer_config__json": {"chat_template": "b"}, "chat_template__jinja": "a"}])
    def test_templates(self, saved, files):
        assert Tokenizer.from_directory(write(saved, **files)).templates == {"default": "a"}

    def test_truncation_and_padding_in_the_file_are_off(self, saved):
        backend = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
        backend.enable_truncation(2)
        backend.enable_padding(length=9)
        backend.save(str(saved / "tokenizer.json"))
        assert len(Tokenizer.from_directory(saved).encode("a b c")) == 5

    @pytest.mark.parametrize("name, ids", [("GPT2Tokenizer", 3), ("Qwen2TokenizerFast", 1), (None, 3)])
    def test_vocab_and_merges(self, tmp_path, name, ids):
        made = byte_level()
        vocab = {token: i for i, token in enumerate(made["tokenizer.ggml.tokens"][:-3])}
        merges = "\n".join(["#version: 0.2", *made["tokenizer.ggml.merges"], ""])
        config = {"tokenizer_class": name, "eos_token": "<|endoftext|>"}
        write(tmp_path, vocab__json=vocab | {"<|endoftext|>": BOS}, merges__txt=merges, tokenizer_config__json=config,
              added_tokens__json={"<new>": EOS})
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert tokenizer.encode("hello hello<|endoftext|><new>")[2:] == [BOS, EOS]
        assert len(tokenizer.encode("e\u0301")) == ids  # each class has its own normaliser and words
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None if name and name.startswith("Qwen2") else BOS, BOS)

    def test_says_what_it_looked_for(self, tmp_path):
        with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path}: looked for tokenizer.json, tokenizer.model, "):
            Tokenizer.from_directory(tmp_path)

    @pytest.mark.parametrize("files, message", [
        ({"tokenizer__json": "{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json must hold a JSON object, not list"),
        ({"tokenizer__model": b"\xff" * 9}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer__model": b"", "tokenizer_config__json": {"tokenizer_class": "XLNetTokenizer"}}, "not for XLNetTokenizer"),
        ({"vocab__json": {}, "merges__txt": "", "tokenizer_config__json": {"tokenizer_class": "CLIPTokenizer"}},
         "not for CLIPTokenizer"),
        ({"vocab__json": [], "merges__txt": ""}, "are not a BPE"),
    ])
    def test_refuses(self, tmp_path, files, message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_directory(write(tmp_path, **files))


@pytest.mark.parity
def test_transformers_reads_what_was_saved(kinds, tmp_path):
    transformers = pytest.importorskip("transformers")
    for place, tokenizer in enumerate(kinds):
        tokenizer = Tokenizer(tokenizer.backend, tokenizer.names, tokenizer.ids, tokenizer.eos_ids, {"default": TEMPLATE})
        tokenizer.save(tmp_path / str(place))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(place))
        for text in [*TEXTS, "the dogs", "<eos><tool>"]:
            ids = theirs(text).input_ids
            assert tokenizer.encode(text) == ids
            assert tokenizer.encode(text, add_special=False) == theirs(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert len(theirs) == tokenizer.size
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        expected = theirs.apply_chat_template(TestChat.messages, tokenize=False, add_generation_prompt=True)
        names = {} if tokenizer.bos_id is not None else {"bos_token": ""}
        assert tokenizer.chat(TestChat.messages, **names) == expected


MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": True, "__type": "AddedToken"}
WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "dog", "##s", "cafe", "café", "中", "文", ","]
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]


def numbered(model, *, without=(), after=()):
    """A vocabulary that numbers a model's pieces its own way: the last is 2."""
    pieces = [piece.piece for piece in sentencepiece_model_pb2.ModelProto.FromString(model).pieces if piece.type == 1]
    tokens = ["</s>", "<unk>", *(piece for piece in reversed(pieces) if piece not in without), *after]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def sides():
    """(source, target) models like Marian's, whose pieces differ."""
    return [train(model_type="unigram", vocab_size=size, normalization_rule_name="nmt_nfkc") for size in (150, 60)]


@pytest.fixture(scope="module")
def families(llama, sides, tmp_path_factory):
    """Directories of files by family."""
    source, target = sides
    letters = [*FAIRSEQ, "<mask>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    bpe = {"vocab__json": {token: i for i, token in enumerate(letters)}, "merges__txt": "\n".join(["#version: 0.2", *MERGES])}
    both = {"source__spm": source, "target__spm": target}
    fairseq, table = {"sentencepiece.bpe.model": llama}, numbered(llama, after=["<s>", "<pad>"])
    listed = {"special_tokens_map__json": {"additional_special_tokens": ["eng_Latn", "fra_Latn"]}}

    def named(name, **config):
        return {"tokenizer_config__json": {"tokenizer_class": name, **config}}

    files = {
        "marian": both | {"vocab__json": numbered(source, without=["e", "."], after=[">>fra<<", "<pad>"])},
        "separate": both | {"vocab__json": numbered(source, after=["<pad>"]), **named("MarianTokenizer", separate_vocabs=True),
                            "target_vocab__json": numbered(target, after=["<pad>"])},
        "bert": {"vocab__txt": "\n".join(WORDPIECES) + "\n"},
        "mpnet": {"vocab__txt": "\n".join([*FAIRSEQ, *WORDPIECES[1:], "<mask>"]), **named("MPNetTokenizer")},
        "bart": bpe | {"config__json": {"model_type": "bart"}},
        "codet5": bpe | named("RobertaTokenizer", mask_token=MASK) | {
            "added_tokens__json": {"<extra_id_0>": len(letters)},
            "special_tokens_map__json": {"additional_special_tokens": ["<extra_id_0>"]}},
        "byt5": named("ByT5Tokenizer"),
        "mbart": fairseq | named("MBartTokenizer"),
        "mbart50": fairseq | named("MBart50Tokenizer", src_lang="de_DE"),
        "nllb": fairseq | named("NllbTokenizer") | listed,
        "nllb, legacy": fairseq | named("NllbTokenizer", legacy_behaviour=True) | listed,
        "xlm-r": fairseq | named("XLMRobertaTokenizer"),
        "m2m100": fairseq | {"vocab__json": table} | named("M2M100Tokenizer", src_lang="de"),
    }
    return {name: write(tmp_path_factory.mktemp("family"), **some) for name, some in files.items()}


class TestFamilies:
    def read(self, families, name):
        return Tokenizer.from_directory(families[name])

    def test_marian_numbers_pieces_by_its_table(self, families, sides):
        tokenizer = self.read(families, "marian")
        table = json.loads((families["marian"] / "vocab.json").read_text())
        text = "The fox ﬁ. ｶﾞ e"
        for side, model in zip((tokenizer, tokenizer.target), sides, strict=True):
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text, out_type=str)
            expected = [table.get(piece, 1) for piece in pieces]
            assert side.encode(text) == [*expected, 0] and 1 in expected
            assert side.encode_pair(text, text) == ([*expected, *expected, 0], [0] * (2 * len(expected) + 1))
        assert tokenizer.encode("The fox") != tokenizer.target.encode("The fox")
        assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.unk_id) == ((0,), len(table) - 1, 1)

    def test_marians_languages_lead_and_special_tokens_are_read_unless_refused(self, families):
        tokenizer = self.read(families, "marian")
        fox, code = tokenizer.encode("fox", add_special=False), tokenizer.id(">>fra<<")
        assert tokenizer.encode(">>fra<< fox") == [code, *fox, 0]
        assert tokenizer.encode(">>deu<<fox") == [1, *fox, 0]
        assert code not in tokenizer.encode("fox >>fra<<")
        assert tokenizer.encode("fox</s>fox") == [*fox, 0, *fox, 0]
        plain = tokenizer.encode(">>fra<< fox</s>fox", parse_special=False)
        assert code not in plain and plain.count(0) == 1
        for text, message in ((3, "must be a str, not int"), ("a\ud800", "lone surrogate")):
            with pytest.raises(ValueError, match=message):
                tokenizer.encode(text)

    def test_what_is_written_is_the_targets(self, families):
        tokenizer = self.read(families, "separate")
        text = "The quick brown fox."
        assert tokenizer.target.size < tokenizer.size
        assert tokenizer.decode(tokenizer.target.encode(text)) == text
        assert tokenizer.token_bytes() == tokenizer.target.token_bytes()
        joined = self.read(families, "marian")
        assert joined.decode(joined.target.encode("The quick fox")) == "Th quick fox"  # "e" is in no table: unknown

    @pytest.mark.parametrize("config, text, pieces", [
        ({}, "The Dogs,中文 Café", ["the", "dog", "##s", ",", "中", "文", "cafe"]),
        ({"do_lower_case": False}, "The dog café", ["The", "dog", "café"]),
        ({"strip_accents": False}, "The café", ["the", "café"]),
        ({"tokenize_chinese_chars": False}, "the 中文", ["the", "[UNK]"])])
    def test_word_piece(self, tmp_path, config, text, pieces):
        tokenizer = Tokenizer.from_directory(write(tmp_path, vocab__txt="\n".join(WORDPIECES), tokenizer_config__json=config))
        ids = [WORDPIECES.index(piece) for piece in pieces]
        assert tokenizer.encode(text) == [2, *ids, 3]
        assert tokenizer.encode_pair(text, "dog[MASK]") == (
            [2, *ids, 3, 7, 4, 3], [0] * (len(ids) + 2) + [1, 1, 1])
        assert tokenizer.encode_pair(text, "[MASK]", add_special=False, parse_special=False)[0] == [*ids, 1, 1, 1]

    def test_word_piece_of_gguf(self, families):
        def marked(piece):
            return piece.removeprefix("##") if piece.startswith(("##", "[")) else f"▁{piece}"

        tokenizer = Tokenizer.from_gguf(fields("bert", tokens=[marked(piece) for piece in WORDPIECES]))
        expected = self.read(families, "bert")
        text = "The Dogs[MASK], 中 Café [x] cat"
        assert tokenizer.encode_pair(text, "the") == expected.encode_pair(text, "the")
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))
        assert (tokenizer.names, tokenizer.ids, tokenizer.size) == (expected.names, expected.ids, expected.size)
        with pytest.raises(ValueError, match="the GGUF metadata has no tokenizer.ggml.tokens"):
            Tokenizer.from_gguf({"tokenizer.ggml.model": "bert"})

    @pytest.mark.parametrize("name, alone, pair", [
        ("bart", "<s> A </s>", "<s> A </s> </s> B </s>"), ("codet5", "<s> A </s>", "<s> A </s> </s> B </s>"),
        ("mpnet", "<s> A </s>", "<s> A </s> </s> B </s>"), ("xlm-r", "<s> A </s>", "<s> A </s> </s> B </s>"),
        ("byt5", "A </s>", "A </s> B </s>"), ("m2m100", "__de__ A </s>", "__de__ A B </s>"),
        ("mbart", "A </s> en_XX", "A B </s> en_XX"), ("mbart50", "de_DE A </s>", "de_DE A B </s>"),
        ("nllb", "eng_Latn A </s>", "eng_Latn A B </s>"), ("nllb, legacy", "A </s> eng_Latn", "A B </s> eng_Latn")])
    def test_what_is_put_around(self, families, name, alone, pair):
        tokenizer = self.read(families, name)
        words = {"A": tokenizer.encode("the fox", add_special=False), "B": tokenizer.encode("dog", add_special=False)}
        expected = [[i for part in text.split() for i in words.get(part) or [tokenizer.id(part)]] for text in (alone, pair)]
        assert tokenizer.encode("the fox") == expected[0]
        assert tokenizer.encode_pair("the fox", "dog") == (expected[1], [0] * len(expected[1]))

    def test_special_tokens_of_byte_pairs(self, families):
        tokenizer = self.read(families, "codet5")
        mask, sentinel = tokenizer.id("<mask>"), tokenizer.id("<extra_id_0>")
        assert sentinel == tokenizer.size - 1
        assert len(tokenizer.encode("he  <mask> <extra_id_0>")) == 6  # the mask takes the spaces before it
        assert tokenizer.decode(tokenizer.encode("he<extra_id_0><mask>llo")) == "hello"
        assert [i for i in tokenizer.encode("a<mask>") if i == mask] == [mask]

    def test_bytes_of_byt5(self, families, tmp_path):
        tokenizer = self.read(families, "byt5")
        assert tokenizer.encode("hé\0<extra_id_0>") == [*(byte + 3 for byte in "hé\0".encode()), 259, 1]
        assert (tokenizer.size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (384, 0, 1, 2)
        assert tokenizer.decode([107, 198, 172, 1]) == "hé"
        config = {"tokenizer_class": "ByT5Tokenizer", "additional_special_tokens": ["<a>", "<b>"]}
        assert Tokenizer.from_directory(write(tmp_path, tokenizer_config__json=config)).id("<b>") == 260

    def test_numbers_of_fairseq(self, families, llama):
        processor = sentencepiece.SentencePieceProcessor(model_proto=llama)
        for name, codes in (("mbart", 25), ("mbart50", 52), ("nllb", 2), ("xlm-r", 0)):
            tokenizer = self.read(families, name)
            assert tokenizer.size == processor.get_piece_size() + 1 + codes + 1
            assert tokenizer.encode("the fox", add_special=False) == [i + 1 for i in processor.encode("the fox")]
            assert [tokenizer.id(token) for token in FAIRSEQ] == [0, 1, 2, 3]
            assert tokenizer.id("<mask>") == tokenizer.size - 1
        assert self.read(families, "nllb").id("fra_Latn") == processor.get_piece_size() + 2

    @pytest.mark.parametrize("name, code, token", [
        ("mbart", "fr_XX", "fr_XX"), ("mbart50", "sl_SI", "sl_SI"), ("nllb", "fra_Latn", "fra_Latn"),
        ("nllb, legacy", "fra_Latn", "fra_Latn"), ("m2m100", "fr", "__fr__"), ("m2m100", "__fr__", "__fr__")])
    def test_languages(self, families, tmp_path, name, code, token):
        tokenizer = self.read(families, name)
        french, ids = tokenizer.in_language(code), tokenizer.encode("the fox")
        place = -1 if ids[-1] != tokenizer.eos_id else 0
        expected = list(ids)
        expected[place] = tokenizer.id(token)
        assert french.encode("the fox") == expected != ids == tokenizer.encode("the fox")
        assert french.in_language(tokenizer.backend.id_to_token(ids[place])).encode("the fox") == ids
        french.save(tmp_path)
        assert Tokenizer.from_directory(tmp_path).encode("the fox") == expected

    def test_refuses_languages(self, families):
        with pytest.raises(ValueError, match=r"no language code 'xx' among .*special tokens: \['eng_Latn', 'fra_Latn'\]"):
            self.read(families, "nllb").in_language("xx")
        for name in ("marian", "bert", "byt5"):
            with pytest.raises(ValueError, match="puts no language code around a text, but"):
                self.read(families, name).in_language("fr")
        with pytest.raises(ValueError, match="the vocabulary of 14 tokens has no 'fra_Latn'"):
            self.read(families, "bert").id("fra_Latn")

    def unixcoder(self, directory):
        tokens = [*FAIRSEQ, *(f"<{mode}>" for mode in MODES), "<mask0>", *ALPHABET,
                  *(merge.replace(" ", "") for merge in MERGES)]
        write(directory, vocab__json={token: i for i, token in enumerate(tokens)},
              merges__txt="\n".join(["#version: 0.2", *MERGES]), tokenizer_config__json={"tokenizer_class": "RobertaTokenizer"},
              config__json={"model_type": "roberta", "eos_token_id": 2})
        return Tokenizer.from_directory(directory)

    @pytest.mark.parametrize("mode, ends", [("encoder-only", True), ("decoder-only", False), ("encoder-decoder", True)])
    def test_modes_of_unixcoder(self, tmp_path, mode, ends):
        tokenizer = self.unixcoder(tmp_path)
        inside = tokenizer.encode("def hello():", add_special=False)
        moded = tokenizer.in_mode(mode)
        expected = [0, tokenizer.id(f"<{mode}>"), 2, *inside, *([2] if ends else [])]
        assert moded.encode("def hello():") == expected and moded.encode("def hello():", add_special=False) == inside
        assert tokenizer.encode("def hello():") == [0, *inside, 2]
        hole = moded.encode("def <mask0>():", add_special=False)
        before, after = (tokenizer.encode(text, add_special=False) for text in ("def ", "():"))
        assert hole == [*before, tokenizer.id("<mask0>"), *after]
        assert "mask0" in tokenizer.decode(tokenizer.encode("def <mask0>():")) and "mask0" not in moded.decode(hole)
        assert moded.in_mode("encoder-only").encode("x") == tokenizer.in_mode("encoder-only").encode("x")
        moded.save(tmp_path / "saved")
        assert Tokenizer.from_directory(tmp_path / "saved").encode("def hello():") == expected

    @pytest.mark.parity
    @pytest.mark.parametrize("mode", MODES)
    def test_modes_are_those_of_unixcoders_code(self, tmp_path, mode):
        import transformers

        ours = self.unixcoder(tmp_path).in_mode(mode)
        theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path)
        theirs.add_tokens(["<mask0>"], special_tokens=True)
        for text in ("def hello():\n    return 12", "hello <mask0> 🦙", " é", ""):
            tokens = [theirs.cls_token, f"<{mode}>", theirs.sep_token, *theirs.tokenize(text),
                      *([theirs.sep_token] if mode != "decoder-only" else [])]
            assert ours.encode(text) == theirs.convert_tokens_to_ids(tokens)

    def test_refuses_modes(self, families, tmp_path):
        with pytest.raises(ValueError, match="mode must be encoder-only, decoder-only, encoder-decoder, got '<encoder-only>'"):
            self.unixcoder(tmp_path).in_mode("<encoder-only>")
        for name in ("bart", "bert", "mbart", "marian"):
            with pytest.raises(ValueError, match="the vocabulary of .* tokens has no '<encoder-decoder>'"):
                self.read(families, name).in_mode("encoder-decoder")

    def test_saved_reads_back(self, families, tmp_path):
        texts = [*TEXTS, ">>fra<< the dog", "<mask> the  <mask>"]
        for place, name in enumerate(families):
            tokenizer = self.read(families, name)
            tokenizer.save(tmp_path / str(place))
            again = Tokenizer.from_directory(tmp_path / str(place))
            for key in ("size", "names", "ids", "eos_ids"):
                assert getattr(again, key) == getattr(tokenizer, key)
            assert again.token_bytes() == tokenizer.token_bytes()
            for text in texts:
                for special in (True, False):
                    assert again.encode(text, parse_special=special) == tokenizer.encode(text, parse_special=special)
                assert again.encode_pair(text, "dog") == tokenizer.encode_pair(text, "dog")
                if tokenizer.target:
                    assert again.target.encode(text) == tokenizer.target.encode(text)
        target = self.read(families, "separate").target
        target.save(tmp_path / "target")
        assert Tokenizer.from_directory(tmp_path / "target").encode("the dog") == target.encode("the dog")

    def test_pickles(self, families):
        tokenizer = self.read(families, "marian")
        ids = tokenizer.encode("the fox")
        assert pickle.loads(pickle.dumps(tokenizer)).encode("the fox") == ids

    @pytest.mark.parametrize("files, message", [
        ({"vocab__txt": "a\nb"}, r"the vocabulary has no '\[(CLS|SEP)\]', which belongs around a text"),
        ({"vocab__json": {"</s>": 0, "<unk>": 1}, "source__spm": b""}, "has no target.spm, which belongs to vocab.json and"),
        ({"vocab__json": {}, "source__spm": b"", "target__spm": b"\xff" * 9}, "target.spm is not a sentencepiece model"),
        ({"sentencepiece.bpe.model": b"", "tokenizer_config__json": {"tokenizer_class": "NllbTokenizer"}},
         "must list the languages in additional_special_tokens"),
    ])
    def test_refuses(self, tmp_path, files, message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_directory(write(tmp_path, **files))

    def test_refuses_a_table_without_an_end(self, tmp_path, sides):
        files = {"source__spm": sides[0], "target__spm": sides[1], "vocab__json": {"<unk>": 0}}
        with pytest.raises(ValueError, match="vocab.json has no '</s>'"):
            Tokenizer.from_directory(write(tmp_path, **files))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["marian", "bert", "mpnet", "bart", "codet5", "byt5", "m2m100"])
def test_families_are_transformers(families, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"marian": "marian", "bert": "bert", "byt5": "t5", "bart": "bart", "codet5": "t5"}.get(name)
    directory = shutil.copytree(families[name], tmp_path / "files")
    if config:
        write(directory, config__json={"model_type": config})
    tokenizer = Tokenizer.from_directory(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, ">>fra<< The fox.", "<mask> the  <mask>[MASK]", "Café, 中文 ｶﾞ"]:
        if not (name == "byt5" and text.endswith("</s>")):  # theirs adds no second end
            assert tokenizer.encode(text) == theirs(text).input_ids
        pair = theirs(text, "a dog")
        ids, types = tokenizer.encode_pair(text, "a dog")
        assert name == "byt5" or ids == pair.input_ids
        assert name != "bert" or types == pair.token_type_ids
    if tokenizer.target:
        assert tokenizer.target.encode("The fox") == theirs(text_target="The fox").input_ids
    tokenizer.save(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("The fox").input_ids == tokenizer.encode("The fox")

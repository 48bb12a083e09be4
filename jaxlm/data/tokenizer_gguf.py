"""Backends for `jaxlm.data.tokenizer` from bare vocabularies: a GGUF file's metadata, sentencepiece pieces, BPE merges.

Everything becomes a `tokenizers.Tokenizer`, so that encoding, special tokens and saving have one path. A sentencepiece
BPE becomes merges in the order of the scores of what they give, which takes the same decisions as sentencepiece. A
byte-level BPE must know how text is cut before it is merged; a GGUF file names that in `tokenizer.ggml.pre`, and
`PRE_TOKENIZERS` says what the names mean. No file is read here.
"""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

# What a token is: the same numbers in GGUF's token_type and in sentencepiece's ModelProto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "▁"  # how sentencepiece writes a space inside a piece

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_QWEN35 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LED = r"[^\r\n\p{L}\p{N}]?"
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
_TEKKEN = rf"{_LED}{_UPPER}*{_LOWER}+|{_LED}{_UPPER}+{_LOWER}*|\p{{N}}|{_MARKS}"
_GPT4O = rf"{_LED}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_LED}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}|{_MARKS}"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ"
    "Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_ASCII_MARK = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = rf"{_ASCII_MARK}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE cuts text into the words inside which it merges.

    Attributes:
      patterns: Oniguruma expressions, applied in turn; each cuts what the ones before it left into matches and gaps.
      nfc: whether text is first brought to Unicode's composed form, as the models' own tokenizers do; llama.cpp does not.
      whole_words: a word that is a token is that token, whatever the merges would give.
      add_bos: whether BOS starts a text when the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_BY_CUT = {
    PreTokenizer((_GPT2,)): "gpt-2 phi-2 jais exaone4 gigachat a.x-4.0 mellum modern-bert trillion granite-docling",
    PreTokenizer((_GPT2,), nfc=True): "mpt olmo",
    PreTokenizer((r"\p{N}", _GPT2)): "starcoder refact smollm codeshell exaone minerva-7b mellum2",
    PreTokenizer((r"\p{N}", _GPT2), nfc=True): "command-r",
    PreTokenizer((_QWEN2,), nfc=True): "qwen2 deepseek-r1-qwen megrez",
    PreTokenizer((_QWEN2,)): "stablelm2 hunyuan grok-2 solar-open",
    PreTokenizer((_QWEN35,), nfc=True): "qwen35",
    PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    PreTokenizer((_LLAMA3,), whole_words=True): "glm4",
    PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 minimax-m2",
    PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _CJK,
            r"\p{N}",
        )
    ): "deepseek-llm",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")): "deepseek-coder",
    PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)): "bloom poro-chat gpt3-finnish",
    PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")): "viking",
    # What llama.cpp does for a file older than the key.
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
}

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: cut for cut, names in _BY_CUT.items() for name in names.split()}

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# Control tokens that end a turn; files often name only one of several as EOS.
_END_OF_TURN = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|call|>",
    "<|endoftext|>", "<|end_of_text|>", "<|EOT|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


def byte_level(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], cut: PreTokenizer) -> tokenizers.Tokenizer:
    """A byte-level BPE: bytes are written as printable characters (GPT-2's table) and merged inside words.

    Args:
      vocab: token, in that writing, to id.

    Raises:
      ValueError: if a merge needs or gives a token outside `vocab`; names the first.

    Reference: Radford et al. 2019, section 2.2.
    """
    backend = tokenizers.Tokenizer(_bpe(vocab, merges, ignore_merges=cut.whole_words))
    backend.normalizer = normalizers.NFC() if cut.nfc else None
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unk_id: int,
    merges: Sequence[tuple[str, str]] | None = None,
    unigram: bool = False,
    prefix: Literal["every", "first", "never"] = "every",
    charsmap: bytes = b"",
    strip: bool = False,
) -> tokenizers.Tokenizer:
    """A sentencepiece model, BPE or unigram, with its control and user-defined pieces as added tokens.

    Args:
      merges: of a BPE; None takes them from the scores.
      prefix: where a space is put before text: "every" stretch between added tokens (sentencepiece, called for each
        stretch), the "first" only and not before a space (what tokenizer_config.json calls `"legacy": false`), or "never".
      charsmap: sentencepiece's precompiled normaliser.
      strip: whether spaces at the ends go and runs of spaces become one (`remove_extra_whitespaces`).

    Raises:
      ValueError: if a merge needs or gives a token outside `pieces`; names the first.

    Reference: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226
    """
    fallback = BYTE in types
    if unigram:
        table = list(zip(pieces, map(float, scores), strict=True))
        model = models.Unigram(table, unk_id=unk_id, byte_fallback=fallback)
    else:
        vocab = {piece: i for i, piece in enumerate(pieces)}
        if merges is None:
            merges = _merges_by_score(pieces, scores, types)
        model = _bpe(vocab, merges, unk_token=pieces[unk_id], fuse_unk=True, byte_fallback=fallback)
    backend = tokenizers.Tokenizer(model)
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if strip:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(SPACE)] if prefix == "every" else []
        steps += [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence(steps)
    unprefix = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            *([decoders.ByteFallback()] if fallback else []),
            decoders.Fuse(),
            *unprefix,
        ]
    )
    _add_tokens(backend, pieces, types, unk_id)
    return backend


def from_gguf(fields: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str], tuple[int, ...]]:
    """A GGUF file's tokenizer: (backend, {"bos_token": text, ...}, ids that end a generation, EOS first).

    Raises:
      ValueError: if a key is missing, or its value is unknown or does not fit the others; names the key.
    """
    kind = _field(fields, "model")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_field(fields, "tokens"))]
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is empty")
    if len(set(tokens)) < len(tokens):
        token, times = collections.Counter(tokens).most_common(1)[0]
        raise ValueError(f"tokenizer.ggml.tokens has {token!r} {times} times")
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    _check_length(tokens, "token_type", types)
    merges = [_pair(line) for line in fields.get("tokenizer.ggml.merges", ())]
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    if kind == "gpt2":
        pre = fields.get("tokenizer.ggml.pre") or "default"
        if pre not in PRE_TOKENIZERS:
            raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {sorted(PRE_TOKENIZERS)}")
        _field(fields, "merges")
        backend = byte_level({token: i for i, token in enumerate(tokens)}, merges, PRE_TOKENIZERS[pre])
        _add_tokens(backend, tokens, types, ids["unk_token"])
        add_bos = PRE_TOKENIZERS[pre].add_bos
    elif kind in ("llama", "gemma4"):
        defaults = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # Llama's, where a file names none
        ids = {name: defaults.get(name) if i is None else i for name, i in ids.items()}
        scores = _field(fields, "scores")
        _check_length(tokens, "scores", scores)
        backend = sentencepiece(
            tokens,
            scores,
            types,
            unk_id=ids["unk_token"],
            merges=merges or None,
            prefix="every" if fields.get("tokenizer.ggml.add_space_prefix", True) else "never",
            strip=fields.get("tokenizer.ggml.remove_extra_whitespaces", False),
        )
        if fields.get("general.architecture") == "phi3":
            _strip_after(backend)
        add_bos = True
    else:
        raise ValueError(f'tokenizer.ggml.model {kind!r} is not supported; supported: "gpt2", "llama", "gemma4"')
    ids = {name: i for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    names = {name: tokens[i] for name, i in ids.items()}
    add_post_processor(
        backend,
        bos=names.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos=names.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return backend, names, _ends(fields, tokens, types, ids)


def add_post_processor(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Makes `backend` put these tokens around a text; None puts none."""
    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    template = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, *(part.replace("$A", "$B") for part in template)],
        special_tokens=special,
    )


def _field(fields: Mapping[str, Any], key: str) -> Any:
    if f"tokenizer.ggml.{key}" not in fields:
        raise ValueError(f"the GGUF metadata has no tokenizer.ggml.{key}")
    return fields[f"tokenizer.ggml.{key}"]


def _check_length(tokens: Sequence[str], key: str, column: Sequence[Any]) -> None:
    if len(column) != len(tokens):
        raise ValueError(f"tokenizer.ggml.{key} has {len(column)} entries for {len(tokens)} tokens")


def _pair(line: str) -> tuple[str, str]:
    """A merge's two sides; the space between them is never the first character."""
    cut = line.find(" ", 1)
    if cut < 0:
        raise ValueError(f"tokenizer.ggml.merges must hold two tokens with a space between, not {line!r}")
    return line[:cut], line[cut + 1 :]


def _bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    for left, right in merges:
        if missing := [token for token in (left, right, left + right) if token not in vocab]:
            raise ValueError(f"the merge {left!r} + {right!r} needs {missing[0]!r}, which is not in the vocabulary")
    return models.BPE(dict(vocab), list(merges), **options)


def _merges_by_score(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best-scored result first: sentencepiece's own order of merging."""
    normal = {piece: i for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind == NORMAL}
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -scores[normal[piece]])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int], unk_id: int | None) -> None:
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL or i == unk_id)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED) or i == unk_id
        ]
    )


def _strip_after(backend: tokenizers.Tokenizer) -> None:
    """Phi-3's markers swallow the whitespace after them; its GGUF files do not say so."""
    added = backend.get_added_tokens_decoder().values()
    markers = [token for token in added if token.content not in ("<unk>", "<s>", "<|endoftext|>")]
    backend.add_tokens([AddedToken(t.content, normalized=False, special=t.special, rstrip=True) for t in markers])


def _ends(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int]) -> tuple[int, ...]:
    named = [ids.get("eos_token"), *(fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    control = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == CONTROL}
    turns = [token for token in _END_OF_TURN if token in control]
    if "<|call|>" in control:  # beside it, <|end|> ends a message inside a turn
        turns = [token for token in turns if token != "<|end|>"]
    ends = [i for i in [*named, *(control[token] for token in turns)] if i is not None and 0 <= i < len(tokens)]
    return tuple(dict.fromkeys(ends))

"""Backends for `jaxlm.data.tokenizer` of encoders and encoder-decoders whose files hold no tokenizer.json.

WordPiece, RoBERTa's and ByT5's bytes, fairseq's numbering of a sentencepiece model, and `Pieces`: models that number
sentencepiece's pieces by a table of their own, so that sentencepiece itself must cut the text. No file is read here.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.data import tokenizer_gguf

_MBART = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()
_MBART50 = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN "
    "te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
).split()
_M2M100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy id ig "
    "ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl "
    "so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()
_WMT21 = "en ha is ja cs ru zh de".split()

LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "MBartTokenizer": tuple(_MBART),
    "MBart50Tokenizer": (*_MBART, *_MBART50),
    "m2m100": tuple(f"__{code}__" for code in _M2M100),
    "wmt21": tuple(f"__{code}__" for code in _WMT21),
}
"""Language codes in the order of their ids. NLLB's files list theirs."""

MODES = ("encoder-only", "decoder-only", "encoder-decoder")
HOLE = "<mask0>"
"""UniXcoder's, which its code adds to what its files say."""

FAIRSEQ_NAMES = {
    "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
    "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
BERT_NAMES = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """Cuts text into a sentencepiece model's pieces, special tokens apart: each stretch between them is cut on its own.

    Attributes:
      model: the sentencepiece model's file.
      special: the tokens that stand for themselves in a text.
      codes: whether a stretch may begin with a language in Marian's writing, ">>fra<<".
      files: what `Tokenizer.save` writes in place of tokenizer.json, which cannot say all of this.
      config: tokenizer_config.json, with the class.
    """

    model: bytes
    special: tuple[str, ...]
    codes: bool
    files: Mapping[str, bytes]
    config: Mapping[str, Any]

    def __call__(self, text: str, parse_special: bool) -> list[str]:
        pieces = []
        for stretch in re.split(self._special, text) if parse_special else [text]:
            if stretch in self.special and parse_special:
                pieces.append(stretch)
                continue
            code = re.match(r">>.*?<<", stretch, re.DOTALL) if self.codes and parse_special else None
            if code:
                pieces.append(code[0])
                stretch = stretch[code.end() :]
            pieces += self._processor.encode(stretch, out_type=str)
        return pieces

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)


def table(ids: Mapping[str, int], unk: str) -> tokenizers.Tokenizer:
    """The backend behind `Pieces`: it is given pieces and looks them up."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(ids), unk_token=unk))
    space = tokenizer_gguf.SPACE
    backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def word_piece(vocab: Mapping[str, int], unk: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's: words and punctuation, cut greedily into the longest pieces.

    Args:
      config: `do_lower_case` (default true), `strip_accents` (default: where it lowers case) and
        `tokenize_chinese_chars` (default true) of tokenizer_config.json.
    """
    backend = tokenizers.Tokenizer(models.WordPiece(dict(vocab), unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def word_piece_from_gguf(fields: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(backend, names) of BERT's tokenizer in a GGUF file, which marks the pieces that begin a word, not those inside one.

    Nothing in the file says whether it is lowered: it is, as by llama.cpp.
    """
    key = "tokenizer.ggml.tokens"
    if key not in fields:
        raise ValueError(f"the GGUF metadata has no {key}")

    def written(token: str) -> str:
        inside = not token.startswith(tokenizer_gguf.SPACE) and not re.fullmatch(r"\[.+\]", token)
        return f"##{token}" if inside else token.removeprefix(tokenizer_gguf.SPACE)

    backend = word_piece({written(token): i for i, token in enumerate(fields[key])}, BERT_NAMES["unk_token"], {})
    put_around_like_bert(backend, BERT_NAMES)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in BERT_NAMES.values()])
    return backend, dict(BERT_NAMES)


def byt5(extra: Sequence[str]) -> tokenizers.Tokenizer:
    """A token per byte after <pad>, </s> and <unk>, and then `extra`.

    Reference: Xue et al. 2022, section 3.1, https://arxiv.org/abs/2105.13626
    """
    names = ["<pad>", "</s>", "<unk>"]
    vocab = {letter: byte + len(names) for letter, byte in byte_spelling().items()}
    vocab |= {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, lstrip=True, rstrip=True, normalized=False) for name in names])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in extra])
    return backend


def fairseq(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], codes: Sequence[str], **options: Any
) -> tokenizers.Tokenizer:
    """A sentencepiece model as fairseq numbers it: <s>, <pad>, </s>, <unk>, the pieces from the fourth, codes, <mask>.

    Args:
      options: those of `tokenizer_gguf.sentencepiece`.
    """
    before, after = ["<s>", "<pad>", "</s>", "<unk>"], [*codes, "<mask>"]
    control = tokenizer_gguf.CONTROL
    backend = tokenizer_gguf.sentencepiece(
        [*before, *pieces[3:], *after],
        [*[0.0] * len(before), *scores[3:], *[0.0] * len(after)],
        [*[control] * len(before), *types[3:], *[control] * len(after)],
        unk_id=3,
        **options,
    )
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return backend


def put_around(backend: tokenizers.Tokenizer, single: str, pair: str) -> None:
    """Makes `backend` put tokens around a text and around two.

    Args:
      single, pair: tokens, "$A" and "$B" with spaces between; ":1" behind one gives it type 1.
    """
    tokens = {re.sub(":[01]$", "", part) for part in f"{single} {pair}".split(" ")} - {"$A", "$B"}
    for token in tokens:
        if backend.token_to_id(token) is None:
            raise ValueError(f"the vocabulary has no {token!r}, which belongs around a text")
    backend.post_processor = processors.TemplateProcessing(
        single=single.split(" "),
        pair=pair.split(" "),
        special_tokens=[(token, backend.token_to_id(token)) for token in sorted(tokens)],
    )


def put_around_like_bert(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> None:
    """[CLS] first [SEP] second [SEP], with type 1 from the second on."""
    cls, sep = names["cls_token"], names["sep_token"]
    put_around(backend, f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1")


def put_around_like_roberta(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> None:
    """<s> first </s> </s> second </s>, with type 0."""
    cls, sep = names["cls_token"], names["sep_token"]
    put_around(backend, f"{cls} $A {sep}", f"{cls} $A {sep} {sep} $B {sep}")


def put_language(backend: tokenizers.Tokenizer, code: str, eos: str, *, behind: bool) -> None:
    """A language's code before the text and the end behind it, or both behind, as mBART's first edition has them."""
    before, after = ("", f"{eos} {code}") if behind else (f"{code} ", eos)
    put_around(backend, f"{before}$A {after}", f"{before}$A $B {after}")


def put_mode(backend: tokenizers.Tokenizer, mode: str, names: Mapping[str, str]) -> None:
    """<s> <mode> </s> text </s>, without the last where the text goes on; UniXcoder's <mask0> becomes a token of texts."""
    cls, sep = (names.get(f"{name}_token", token) for name, token in (("cls", "<s>"), ("sep", "</s>")))
    before, after = f"{cls} <{mode}> {sep}", "" if mode == "decoder-only" else f" {sep}"
    put_around(backend, f"{before} $A{after}", f"{before} $A {sep} $B{after}")
    if backend.token_to_id(HOLE) is not None:
        backend.add_special_tokens([AddedToken(HOLE, normalized=False, special=True)])


def byte_spelling() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level BPE, to the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

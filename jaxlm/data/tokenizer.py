"""`Tokenizer`: text to ids and back, from a Hugging Face directory or a GGUF file's metadata.

One `tokenizers.Tokenizer` does the encoding, whatever the files were; `tokenizer_gguf` and `tokenizer_families` build
it where there is no tokenizer.json. Decoding is done here, because three things must agree: the bytes of a token that
stop strings are matched against, the text of a whole answer, and the text that is streamed. So each id has its bytes, and
text is those bytes joined and read as UTF-8. That is transformers' text, but for malformed bytes: they become
U+FFFD as Unicode recommends, where byte tokens of a sentencepiece would spoil the well-formed ones beside them.

Nothing here imports jax. A `Tokenizer` never changes, so threads may share it; a `Stream` belongs to one text.
"""

import codecs
import dataclasses
import datetime
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import AddedToken

from jaxlm.data import tokenizer_families, tokenizer_gguf
from jaxlm.data.tokenizer_families import Pieces

NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

_STRIPS = ("single_word", "lstrip", "rstrip")  # what an added token can do to the text beside it
_FAIRSEQ_FILE = "sentencepiece.bpe.model"
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", _FAIRSEQ_FILE)
# transformers' classes whose ids are the sentencepiece model's own; the first group puts BOS before a text.
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "BaichuanTokenizer", "InternLM2Tokenizer")
_T5_CLASSES = ("T5Tokenizer", "MT5Tokenizer", "UMT5Tokenizer")
_T5_MODELS = ("t5", "mt5", "umt5", "longt5")
_FAIRSEQ_CLASSES = ("MBartTokenizer", "MBart50Tokenizer", "NllbTokenizer", "XLMRobertaTokenizer")
_BYTE_LEVEL_CLASSES = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_ROBERTA_CLASSES = ("RobertaTokenizer", "BartTokenizer", "LEDTokenizer", "LongformerTokenizer", "MvpTokenizer")
_ROBERTA_MODELS = ("roberta", "bart", "led", "longformer", "mvp")
# Classes that put a language's code around a text: (the code without src_lang, whether it stands behind the text).
_LANGUAGE_CLASSES = {
    "MBartTokenizer": ("en_XX", True), "MBart50Tokenizer": ("en_XX", False), "NllbTokenizer": ("eng_Latn", False),
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: what encodes. Its state must not be changed.
      names: "bos_token", "eos_token", ... to the token's text; chat templates see them as variables.
      ids: the same names to ids; also where only the model's configuration gives an id.
      eos_ids: every id that ends a generation, `eos_id` first.
      templates: chat templates by name.
      pieces: what cuts a text for the backend to look up; None where the backend does that itself.
      target: encodes what the decoder is to write, where source and target are cut differently (Marian); None where this
        one does both. `decode`, `stream` and `token_bytes` are the target's.

    Example:
      >>> tokenizer = Tokenizer.from_gguf({
      ...     "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["h i"],
      ...     "tokenizer.ggml.tokens": ["h", "i", "hi", "<end>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
      ...     "tokenizer.ggml.eos_token_id": 3})
      >>> tokenizer.encode("hihi<end>"), tokenizer.decode([2, 2, 3])
      ([2, 2, 3], 'hihi')
    """

    backend: tokenizers.Tokenizer
    names: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)
    pieces: Pieces | None = None
    target: "Tokenizer | None" = None

    @classmethod
    def from_directory(cls, path: str | pathlib.Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face directory.

        tokenizer.json is taken as it stands; without it, a sentencepiece model (which needs the package protobuf),
        GPT-2's or RoBERTa's vocab.json with merges.txt, BERT's vocab.txt, or nothing for a ByT5Tokenizer. Marian's
        source.spm, target.spm and vocab.json come first; what Moses' punctuation normaliser would change in a text,
        where transformers finds the package sacremoses, stays. `add_bos_token` and `add_eos_token` of
        tokenizer_config.json, where given, replace what the file puts around a text, as in transformers 5; so do the
        rules of classes with languages.

        Raises:
          ValueError: if there is none of these files, or one cannot be read; names the directory or the file.
        """
        directory = pathlib.Path(path)
        config = _read_json(directory / "tokenizer_config.json")
        model_config = _read_json(directory / "config.json")
        special = _read_json(directory / "special_tokens_map.json")
        if (directory / "vocab.json").is_file() and any((directory / n).is_file() for n in ("source.spm", _FAIRSEQ_FILE)):
            return _read_pieces(cls, directory, {**special, **config}, model_config)
        merged = {**special, **config}
        backend, names, around = _read_backend(directory, merged, model_config)
        names |= _names(config, special)
        _add_tokens(backend, _added_tokens(directory, config), directory)
        _mark_special(backend, [*names.values(), *_extra_special(merged)], _flags(special, config))
        given = {key: config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key) is not None}
        if around is not None or given:
            put = {**(around or {}), **given}
            tokenizer_gguf.add_post_processor(
                backend,
                bos=names.get("bos_token") if put.get("add_bos_token") else None,
                eos=names.get("eos_token") if put.get("add_eos_token") else None,
            )
        if (name := _class(config)) in _LANGUAGE_CLASSES:
            code, behind = _LANGUAGE_CLASSES[name]
            code, behind = config.get("src_lang") or code, behind or config.get("legacy_behaviour", False)
            tokenizer_families.put_language(backend, code, names.get("eos_token", "</s>"), behind=behind)
        ids, eos_ids = _ids(backend, names, _read_json(directory / "generation_config.json"), model_config)
        return cls(backend, names, ids, eos_ids, _read_templates(directory, config))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata.

        Args:
          fields: metadata key to Python value. Of `tokenizer.ggml.model`, "gpt2" (byte-level BPE), "llama"
            (sentencepiece BPE), "gemma4" and "bert" (WordPiece) are known.

        Raises:
          ValueError: if a key is missing, or its value is unknown or does not fit the others; names the key.
        """
        if fields.get("tokenizer.ggml.model") == "bert":
            backend, names = tokenizer_families.word_piece_from_gguf(fields)
            return cls(backend, names, {name: backend.token_to_id(token) for name, token in names.items()})
        backend, names, eos_ids = tokenizer_gguf.from_gguf(fields)
        key = "tokenizer.chat_template"
        templates = {"default": fields[key]} if key in fields else {}
        templates |= {k.removeprefix(f"{key}."): fields[k] for k in fields if k.startswith(f"{key}.")}
        ids = {name: backend.token_to_id(token) for name, token in names.items()}
        return cls(backend, names, ids, eos_ids, templates)

    @property
    def size(self) -> int:
        """The number of ids: one more than the largest. A model's table may have more rows."""
        return len(self._tokens)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None where there is none, as for the next three."""
        return self.ids.get("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text; `eos_ids` has all that do."""
        return self.ids.get("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The token that fills up a row."""
        return self.ids.get("pad_token")

    @property
    def unk_id(self) -> int | None:
        """The token for what has no token."""
        return self.ids.get("unk_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` has a template to render."""
        return bool(self.templates)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text; with the defaults, those of transformers' `tokenizer(text).input_ids`.

        Args:
          add_special: puts BOS, EOS and the like around the text where this tokenizer does. False for what `chat`
            returned: templates write them.
          parse_special: reads special tokens written in the text as such. False makes them plain text, which is
            what text from strangers should be. Added tokens that are not special are recognised either way.

        Raises:
          ValueError: if text is not a str, or has a lone surrogate.
        """
        return self._encode((text,), add_special, parse_special).ids

    def encode_pair(
        self, first: str, second: str, *, add_special: bool = True, parse_special: bool = True
    ) -> tuple[list[int], list[int]]:
        """(ids, token types) of two texts in one row, as [CLS] first [SEP] second [SEP] with types 0 and 1 for BERT's;
        with the defaults, transformers' `tokenizer(first, second)`.

        The other arguments and errors are those of `encode`. Families without token types have 0 everywhere.
        """
        encoding = self._encode((first, second), add_special, parse_special)
        return encoding.ids, encoding.type_ids

    def id(self, token: str) -> int:
        """The id of a token as the vocabulary writes it: "<mask>", "<extra_id_0>", "fra_Latn", ">>fra<<".

        Raises:
          ValueError: if there is no such token; names it.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the vocabulary of {self.size} tokens has no {token!r}")
        return found

    def in_language(self, code: str) -> "Tokenizer":
        """This tokenizer with another language's code around a text: of the source, or of the target to be scored.

        Args:
          code: as the family writes it: "fr_XX" for mBART, "fra_Latn" for NLLB, "fr" for M2M100.

        Raises:
          ValueError: if this tokenizer puts no code around a text, or has not that one. Marian's codes, ">>fra<<", are
            written in the text.
        """
        state = json.loads(self.backend.post_processor.__getstate__()) if self.backend.post_processor else {}
        around = [part["SpecialToken"]["id"] for part in state.get("single", []) if "SpecialToken" in part]
        present = [token for token in around if token not in self.names.values()]
        if len(present) != 1 or len(around) != 2:
            raise ValueError(f"this tokenizer puts no language code around a text, but {around}")
        added = self.backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} - set(self.names.values())
        token = next((token for token in (code, f"__{code}__") if token in special), None)
        if token is None:
            raise ValueError(f"no language code {code!r} among this tokenizer's special tokens: {sorted(special)}")
        tokens = [token for _, token in sorted(self.backend.get_added_tokens_decoder().items())]
        backend = _rebuilt(self.backend, self.backend.model, tokens)
        end = next(token for token in around if token not in present)
        tokenizer_families.put_language(backend, token, end, behind=around[-1] in present)
        pieces = self.pieces and dataclasses.replace(self.pieces, config={**self.pieces.config, "src_lang": token.strip("_")})
        return dataclasses.replace(self, backend=backend, pieces=pieces)

    def in_mode(self, mode: str) -> "Tokenizer":
        """This tokenizer with a mode of UniXcoder's around a text: "<s> <encoder-decoder> </s> text </s>".

        In decoder-only mode nothing stands behind the text, which is to go on. "<mask0>" in a text, UniXcoder's token for
        what is to be written, is read as one token.

        Args:
          mode: "encoder-only", "decoder-only" or "encoder-decoder".

        Raises:
          ValueError: for another mode, or if the vocabulary has not its token.

        Reference: Guo et al. 2022, https://arxiv.org/abs/2203.03850; `tokenize` of the code published with it.
        """
        if mode not in tokenizer_families.MODES:
            raise ValueError(f"mode must be {', '.join(tokenizer_families.MODES)}, got {mode!r}")
        self.id(f"<{mode}>")  # says so where there is none
        tokens = [token for _, token in sorted(self.backend.get_added_tokens_decoder().items())]
        backend = _rebuilt(self.backend, self.backend.model, tokens)
        tokenizer_families.put_mode(backend, mode, self.names)
        return dataclasses.replace(self, backend=backend)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continued: bool = False) -> str:
        """The text of ids.

        Args:
          ids: integers, or an array of one dimension of any library.
          skip_special: leaves special tokens out; False writes their names.
          continued: the ids go on from others, so a space that a sentencepiece would drop at the start stays.

        Raises:
          ValueError: if an id is not one of this tokenizer's; names it and the size.
        """
        stream = self.stream(skip_special=skip_special, continued=continued)
        return stream.push(ids) + stream.flush()

    def stream(self, *, skip_special: bool = True, continued: bool = False) -> "Stream":
        """A decoder for ids that arrive a few at a time; the arguments are those of `decode`."""
        return Stream(self.target or self, skip_special, continued)

    def token_bytes(self) -> list[bytes]:
        """What each id stands for in running text, [V]; b"" for special tokens and ids without a token."""
        return list((self.target or self)._spoken)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders the chat template ("tool_use" if there are tools and such a one, else "default").

        The text is to be encoded with `add_special=False`.

        Args:
          messages: dicts with "role" and "content", as the template wants them.
          add_generation_prompt: ends with the opening of the assistant's turn.
          tools: JSON schemas of functions.
          variables: what else the template reads.

        Raises:
          ValueError: if there is no template, or it is wrong or refuses the messages; says why.
        """
        wanted = ["tool_use", "default"] if tools else ["default"]
        name = next((name for name in wanted if name in self.templates), None)
        if name is None:
            raise ValueError(f"no default chat template; this tokenizer's are: {sorted(self.templates)}")
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self.templates[name])
            return self._compiled[name].render(
                **{"documents": None, **self.names, **variables},
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes files that `from_directory` and transformers' AutoTokenizer read to the same ids and templates.

        `eos_ids` go to generation_config.json, unless there is one already.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.pieces is None:
            self.backend.save(str(directory / "tokenizer.json"))
            # The generic class takes tokenizer.json as it stands; others rebuild parts of it.
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        else:
            config = self.pieces.config
            for name, content in self.pieces.files.items():
                (directory / name).write_bytes(content)
        _write_json(directory / "tokenizer_config.json", {**config, **self.names})
        for name, template in self.templates.items():
            other = directory / "additional_chat_templates" / f"{name}.jinja"
            file = directory / "chat_template.jinja" if name == "default" else other
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(template.encode())
        generation = directory / "generation_config.json"
        if not generation.exists():
            found = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
            _write_json(generation, {key: value for key, value in found.items() if value not in (None, [])})

    def __repr__(self) -> str:
        parts = [type(self.backend.model).__name__, f"size={self.size}"]
        parts += [f"{name.removesuffix('_token')}={self._tokens[i]!r} ({i})" for name, i in self.ids.items()]
        return f"Tokenizer({', '.join(parts)}, eos_ids={self.eos_ids}, templates={list(self.templates)})"

    def _encode(self, texts: tuple[str, ...], add_special: bool, parse_special: bool) -> tokenizers.Encoding:
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"text must be a str, not {type(text).__name__}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError("text has a lone surrogate, which UTF-8 cannot write") from error
        if self.pieces is not None:
            cut = (self.pieces(text, parse_special) for text in texts)
            return self.backend.encode(*cut, is_pretokenized=True, add_special_tokens=add_special)
        backend = self.backend if parse_special else self._plain
        return backend.encode(*texts, add_special_tokens=add_special)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        array = np.asarray(list(ids) if isinstance(ids, Iterable) and not hasattr(ids, "__array__") else ids)
        if array.size == 0:
            return []
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"ids must be integers in one dimension, not {array.dtype} of shape {array.shape}")
        outside = array[(array < 0) | (array >= self.size)]
        if outside.size:
            raise ValueError(f"no token has the id {outside[0]}: this tokenizer has {self.size}, from 0")
        return array.tolist()

    @functools.cached_property
    def _tokens(self) -> list[str | None]:
        vocab = self.backend.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            tokens[i] = token
        return tokens

    @functools.cached_property
    def _bytes_and_first(self) -> tuple[list[bytes], Callable[[bytes], bytes]]:
        return _bytes_and_first(self.backend, self._tokens)

    @functools.cached_property
    def _spoken(self) -> list[bytes]:
        spoken = list(self._bytes_and_first[0])
        for i, token in self.backend.get_added_tokens_decoder().items():
            if token.special:
                spoken[i] = b""
        return spoken

    @functools.cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        return {}

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The backend without special tokens; other threads would see a switch on the one backend."""
        added = [token for _, token in sorted(self.backend.get_added_tokens_decoder().items())]
        special = {token.content for token in added if token.special}
        model = self.backend.model
        # Those outside the model's vocabulary are added too, so that tokens after them keep their ids.
        known = {content for content in special if model.token_to_id(content) is not None}
        if isinstance(model, tokenizers.models.Unigram):
            # It would match any piece of its vocabulary, so these must be spelt as no text is.
            state = json.loads(model.__getstate__())
            table = [(f"\ufdd0{piece}" if piece in special else piece, score) for piece, score in state["vocab"]]
            model = tokenizers.models.Unigram(table, state["unk_id"], state["byte_fallback"])
        plain = _rebuilt(self.backend, model, [token for token in added if token.content not in known])
        plain.encode_special_tokens = True
        return plain


class Stream:
    """Text from ids as they arrive: what `push` and `flush` return, joined, is `Tokenizer.decode` of all ids.

    Example:
      >>> halves = {"model": "gpt2", "pre": "gpt-2", "merges": [], "tokens": ["Ã", "©"]}
      >>> tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in halves.items()})
      >>> stream = tokenizer.stream()
      >>> stream.push([0]), stream.push([1, 0]), stream.flush()
      ('', 'é', '\ufffd')
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continued: bool):
        self._tokenizer = tokenizer
        pieces, self._first = tokenizer._bytes_and_first
        self._pieces = tokenizer._spoken if skip_special else pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = continued

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; an unfinished character waits for its other bytes.

        Raises:
          ValueError: as `Tokenizer.decode`.
        """
        pieces = [self._pieces[i] for i in self._tokenizer._checked(ids)]
        if not self._started:
            place = next((place for place, piece in enumerate(pieces) if piece), None)
            if place is not None:
                pieces[place] = self._first(pieces[place])
                self._started = True
        return self._decoder.decode(b"".join(pieces))

    def flush(self) -> str:
        """What was held back; the text ends here."""
        return self._decoder.decode(b"", final=True)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a file; {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    file.write_bytes((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def _class(config: Mapping[str, Any]) -> str:
    """The tokenizer's class in transformers; "" where none is named, or only a generic one."""
    name = (config.get("tokenizer_class") or "").removesuffix("Fast")
    return "" if name in ("PreTrainedTokenizer", "TokenizersBackend") else name


def _text(token: str | Mapping[str, Any]) -> str:
    """A token's text, in either way that the files write one."""
    return token if isinstance(token, str) else token["content"]


def _names(*sources: Mapping[str, Any]) -> dict[str, str]:
    """The named tokens; the first source that has one decides."""
    found = {name: next((source[name] for source in sources if source.get(name)), None) for name in NAMES}
    return {name: _text(token) for name, token in found.items() if token is not None}


def _extra_special(config: Mapping[str, Any]) -> list[str]:
    found: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        found += tokens.values() if isinstance(tokens, dict) else tokens
    return [_text(token) for token in found]


def _added_tokens(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens that the configuration puts beside or over the vocabulary, by id."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    found = {
        int(i): AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
        for i, token in (config.get("added_tokens_decoder") or {}).items()
    }
    if not found and not (directory / "tokenizer.json").is_file():
        for text, i in _read_json(directory / "added_tokens.json").items():
            found[i] = AddedToken(text, normalized=False)
    return dict(sorted(found.items()))


def _add_tokens(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], directory: pathlib.Path) -> None:
    backend.add_tokens(list(added.values()))
    for i, token in added.items():
        if (got := backend.token_to_id(token.content)) != i:
            raise ValueError(f"{directory}: the added token {token.content!r} should have the id {i}, not {got}")


def _mark_special(
    backend: tokenizers.Tokenizer, texts: Iterable[str], flags: Mapping[str, Mapping[str, bool]] | None = None
) -> None:
    """Makes tokens special; `flags` and those that a token has already stay."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    fresh = [text for text in dict.fromkeys(texts) if text not in added or not added[text].special]
    for text in fresh:
        kept = {flag: getattr(added[text], flag) for flag in _STRIPS} if text in added else (flags or {}).get(text, {})
        backend.add_special_tokens([AddedToken(text, **{"normalized": False, "special": True, **kept})])


def _flags(*sources: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """What swallows the space beside it, of the tokens that are written in full."""
    keys = (*NAMES, "additional_special_tokens", "extra_special_tokens")
    values = [source.get(key) for source in sources for key in keys]
    tokens = [token for value in values for token in (value if isinstance(value, list) else [value])]
    full = [token for token in tokens if isinstance(token, dict) and "content" in token]
    return {token["content"]: {flag: token[flag] for flag in _STRIPS if flag in token} for token in full}


def _rebuilt(
    backend: tokenizers.Tokenizer, model: tokenizers.models.Model, added: Sequence[AddedToken]
) -> tokenizers.Tokenizer:
    """A backend that can be changed, with `model` and these added tokens, in the order of their ids."""
    fresh = tokenizers.Tokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(fresh, part, getattr(backend, part))
    fresh.add_tokens(added)
    return fresh


def _read_backend(
    directory: pathlib.Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, bool] | None]:
    """(backend, names that the vocabulary itself gives, defaults of `add_bos_token` and `add_eos_token`).

    None for the defaults: the backend already puts around a text what belongs there.
    """
    if (directory / "tokenizer.json").is_file():
        return _read_tokenizer_json(directory / "tokenizer.json"), {}, None
    name = _class(config)
    if name == "ByT5Tokenizer":
        extra = [_text(token) for token in config.get("additional_special_tokens") or ()]
        backend = tokenizer_families.byt5(extra or [f"<extra_id_{i}>" for i in range(config.get("extra_ids") or 125)])
        tokenizer_families.put_around(backend, "$A </s>", "$A </s> $B </s>")
        return backend, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, None
    for file in (directory / name for name in _SENTENCEPIECE_FILES):
        if file.is_file():
            if name in _FAIRSEQ_CLASSES:
                return _read_fairseq(file, config), dict(tokenizer_families.FAIRSEQ_NAMES), None
            t5 = name in _T5_CLASSES or (not name and model_config.get("model_type") in _T5_MODELS)
            around = {"add_bos_token": name in _LLAMA_CLASSES, "add_eos_token": t5}
            return *_read_sentencepiece(file, config, t5=t5), around
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        if name in _ROBERTA_CLASSES or (not name and model_config.get("model_type") in _ROBERTA_MODELS):
            names = tokenizer_families.FAIRSEQ_NAMES | _names(config)
            backend = _read_byte_level(directory, "gpt-2", prefix=config.get("add_prefix_space", False))
            tokenizer_families.put_around_like_roberta(backend, names)
            return backend, names, None
        if name and name not in _BYTE_LEVEL_CLASSES or config.get("add_prefix_space"):
            raise ValueError(
                f"vocab.json and merges.txt in {directory} are read for {', '.join(_ROBERTA_CLASSES)} and, without "
                f"add_prefix_space, {', '.join(_BYTE_LEVEL_CLASSES)}, not for {name}; save its tokenizer.json with transformers"
            )
        backend = _read_byte_level(directory, _BYTE_LEVEL_CLASSES.get(name, "gpt-2"), prefix=False)
        end = "<|endoftext|>"
        gpt2 = name != "Qwen2Tokenizer" and backend.token_to_id(end) is not None
        return backend, dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) if gpt2 else {}, {}
    if (directory / "vocab.txt").is_file():
        return *_read_word_piece(directory / "vocab.txt", config, model_config), None
    looked_for = ("tokenizer.json", *_SENTENCEPIECE_FILES, "vocab.json with merges.txt or source.spm", "vocab.txt")
    raise ValueError(f"no tokenizer in {directory}: looked for {', '.join(looked_for)}, or the class ByT5Tokenizer")


def _read_word_piece(
    file: pathlib.Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(backend, names): BERT's, or MPNet's, which has RoBERTa's special tokens."""
    mpnet = (_class(config) or model_config.get("model_type")) in ("MPNetTokenizer", "mpnet")
    names = tokenizer_families.BERT_NAMES
    if mpnet:
        names = tokenizer_families.FAIRSEQ_NAMES | {"unk_token": "[UNK]"}
    names = names | _names(config)
    lines = file.read_text(encoding="utf-8").split("\n")
    vocab = {token.removesuffix("\r"): i for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    backend = tokenizer_families.word_piece(vocab, names["unk_token"], config)
    if mpnet:
        _mark_special(backend, [names["mask_token"]], {names["mask_token"]: {"lstrip": True}})
        tokenizer_families.put_around_like_roberta(backend, names)
    else:
        tokenizer_families.put_around_like_bert(backend, names)
    return backend, names


def _read_pieces(
    cls: type[Tokenizer], directory: pathlib.Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Tokenizer:
    """Marian's tokenizer, with the target's in it, or M2M100's."""
    marian = (directory / "source.spm").is_file()
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    codes: tuple[str, ...] = ()
    if not marian:
        names |= {"bos_token": "<s>", "sep_token": "</s>"}
        codes = tokenizer_families.LANGUAGES[config.get("language_codes") or "m2m100"]
    names |= _names(config)
    config = {"tokenizer_class": "MarianTokenizer" if marian else "M2M100Tokenizer", **config}
    generation = _read_json(directory / "generation_config.json")

    def side(files: Mapping[str, str], target: Tokenizer | None = None) -> Tokenizer:
        """One side, of the first two of `files`, a vocabulary and a model; each file has the name to save it under."""
        table, model = list(files.values())[:2]
        if absent := [name for name in files.values() if not (directory / name).is_file()]:
            raise ValueError(f"{directory} has no {absent[0]}, which belongs to {table} and {model}")
        _read_proto(directory / model)
        ids = _read_json(directory / table)
        ids |= {code: len(ids) + i for i, code in enumerate(codes)}
        if missing := [names[name] for name in ("eos_token", "unk_token") if names[name] not in ids]:
            raise ValueError(f"{directory / table} has no {missing[0]!r}")
        backend = tokenizer_families.table(ids, names["unk_token"])
        _mark_special(backend, [*names.values(), *codes, *_extra_special(config)])
        if marian:
            tokenizer_families.put_around(backend, f"$A {names['eos_token']}", f"$A $B {names['eos_token']}")
        else:
            code = f"__{config.get('src_lang') or 'en'}__"
            tokenizer_families.put_language(backend, code, names["eos_token"], behind=False)
        special = tuple(token.content for token in backend.get_added_tokens_decoder().values())
        found = {place: (directory / name).read_bytes() for place, name in files.items()}
        pieces = Pieces((directory / model).read_bytes(), special, marian, found, config)
        named, eos_ids = _ids(backend, names, generation, model_config)
        return cls(backend, names, named, eos_ids, _read_templates(directory, config), pieces, target)

    if not marian:
        return side({"vocab.json": "vocab.json", _FAIRSEQ_FILE: _FAIRSEQ_FILE})
    other = "target_vocab.json" if config.get("separate_vocabs") else "vocab.json"
    own = {"vocab.json": other, "source.spm": "target.spm", "target.spm": "target.spm"}
    both = {name: name for name in ("vocab.json", "source.spm", "target.spm")}
    if config.get("separate_vocabs"):
        own[other] = both[other] = other
    return side(both, side(own))


def _read_tokenizer_json(file: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_sentencepiece(
    file: pathlib.Path, config: Mapping[str, Any], *, t5: bool
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(backend, names that the model itself gives)."""
    if not t5 and _class(config) not in ("", *_LLAMA_CLASSES):
        raise ValueError(
            f"{file} alone is read for {', '.join((*_LLAMA_CLASSES, *_T5_CLASSES, *_FAIRSEQ_CLASSES))}, not for "
            f"{_class(config)}, which may number its pieces differently; save its tokenizer.json with transformers"
        )
    proto = _read_proto(file)
    trainer = proto.trainer_spec
    pieces, scores, types = _columns(proto)
    for i, token in _added_tokens(file.parent, config).items():
        if i < len(pieces):
            pieces[i] = token.content
            types[i] = tokenizer_gguf.CONTROL if token.special else tokenizer_gguf.USER_DEFINED
    backend = tokenizer_gguf.sentencepiece(pieces, scores, types, unk_id=trainer.unk_id, **_how(proto, config))
    if t5:
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(config.get("extra_ids", 100)))]
        _mark_special(backend, sentinels)
    ids = {f"{name}_token": getattr(trainer, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return backend, {name: pieces[i] for name, i in ids.items() if 0 <= i < len(pieces)}


def _read_fairseq(file: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    name, proto = _class(config), _read_proto(file)
    codes = tokenizer_families.LANGUAGES.get(name, ())
    if name == "NllbTokenizer":
        codes = [token for token in _extra_special(config) if token != "<mask>"]
        if not codes:
            raise ValueError(f"special_tokens_map.json in {file.parent} must list the languages in additional_special_tokens")
    backend = tokenizer_families.fairseq(*_columns(proto), codes, **_how(proto, config))
    if name == "XLMRobertaTokenizer":
        tokenizer_families.put_around_like_roberta(backend, tokenizer_families.FAIRSEQ_NAMES)
    return backend


def _read_proto(file: pathlib.Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(f"reading {file} needs the packages sentencepiece and protobuf: {error}") from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose module differs between its versions
        raise ValueError(f"{file} is not a sentencepiece model: {error}") from error
    kind = proto.trainer_spec.model_type
    if kind not in (proto.trainer_spec.UNIGRAM, proto.trainer_spec.BPE):
        raise ValueError(f"{file} is a sentencepiece model of type {kind}; read are unigram (1) and BPE (2)")
    return proto


def _columns(proto: Any) -> list[list[Any]]:
    """The pieces, their scores and their types."""
    return [[getattr(piece, key) for piece in proto.pieces] for key in ("piece", "score", "type")]


def _how(proto: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `tokenizer_gguf.sentencepiece` that the model's file decides."""
    normalizer = proto.normalizer_spec
    return {
        "unigram": proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM,
        "prefix": "never" if not normalizer.add_dummy_prefix else "first" if config.get("legacy") is False else "every",
        "charsmap": normalizer.precompiled_charsmap,
        "strip": normalizer.remove_extra_whitespaces,
    }


def _read_byte_level(directory: pathlib.Path, cut: str, *, prefix: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE cut like `cut`, or with `prefix` like GPT-2 with a space before the text."""
    try:
        vocab, merges = tokenizers.models.BPE.read_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the Rust side raises nothing narrower
        raise ValueError(f"vocab.json and merges.txt in {directory} are not a BPE: {error}") from error
    backend = tokenizer_gguf.byte_level(vocab, merges, tokenizer_gguf.PRE_TOKENIZERS[cut])
    if prefix:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def _ids(
    backend: tokenizers.Tokenizer, names: Mapping[str, str], *configs: Mapping[str, Any]
) -> tuple[dict[str, int], tuple[int, ...]]:
    """(ids of the named tokens, ids that end a generation); the first of `configs` that has an id decides."""
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    given: dict[str, list[int]] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        found = next((c[f"{name}_id"] for c in configs if c.get(f"{name}_id") is not None), [])
        given[name] = [i for i in (found if isinstance(found, list) else [found]) if 0 <= i < size]
    ids = {name: values[0] for name, values in given.items() if values}
    ids |= {name: backend.token_to_id(token) for name, token in names.items()}
    eos_ids = ([ids["eos_token"]] if "eos_token" in ids else []) + given["eos_token"]
    return ids, tuple(dict.fromkeys(eos_ids))


def _read_templates(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template") or {}
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    templates = {"default": found} if isinstance(found, str) else dict(found)
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = (directory / "chat_template.jinja").read_bytes().decode()
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_bytes().decode()
    return templates


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what the assistant says: renders what is inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> jinja2.Environment:
    """What transformers gives chat templates, which come with weights from strangers: hence the sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _bytes_and_first(
    backend: tokenizers.Tokenizer, tokens: Sequence[str | None]
) -> tuple[list[bytes], Callable[[bytes], bytes]]:
    """(what each token stands for inside a text, what becomes of it at the start), read off the backend's decoder."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "Words"}
    steps = state.get("decoders", [state])
    parts = {step["type"]: step for step in steps}
    spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    spaces += [s["pattern"].get("String") for s in steps if s["type"] == "Replace" and s["content"] == " "]
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if "ByteLevel" in parts:
        spelling = tokenizer_families.byte_spelling()

        def spoken(token: str) -> bytes:
            if token in added or not spelling.keys() >= set(token):
                return token.encode()
            return bytes(spelling[letter] for letter in token)

        first = _unchanged
    elif spaces and spaces[0]:
        spelt = {f"<0x{i:02X}>": bytes([i]) for i in range(256)} if "ByteFallback" in parts else {}

        def spoken(token: str) -> bytes:
            return spelt.get(token) or token.replace(spaces[0], " ").encode()

        if "Metaspace" in parts:
            first = _unchanged if parts["Metaspace"]["prepend_scheme"] == "never" else _without_spaces
        else:
            first = _without_space if parts.get("Strip", {}).get("start") else _unchanged
    elif parts.keys() & {"BPEDecoder", "CTC"}:
        raise ValueError(f"a decoder of type {state['type']} is not supported: what it makes of a token depends on the next")
    else:

        def spoken(token: str) -> bytes:
            return (backend.decoder.decode(["a", token])[1:] if backend.decoder else f" {token}").encode()

        first = _without_space
    return [b"" if token is None else spoken(token) for token in tokens], first


def _unchanged(piece: bytes) -> bytes:
    return piece


def _without_space(piece: bytes) -> bytes:
    return piece.removeprefix(b" ")


def _without_spaces(piece: bytes) -> bytes:
    return piece.lstrip(b" ")

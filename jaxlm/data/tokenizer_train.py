"""Training a byte-level BPE tokenizer on a sample of documents, and writing it as Hugging Face directories have it."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.data.source import Source, home

END = "<|end|>"
BYTES = 256


def train(documents: Iterable[str], vocabulary: int, special: Sequence[str] = (END,)) -> tokenizers.Tokenizer:
    """A byte-level BPE as GPT-2's: every text has tokens, and its tokens give the text back.

    Args:
      vocabulary: tokens at most, the 256 bytes and the special ones among them.
      special: tokens that no text has; the first ends documents.

    Raises:
      ValueError: for a vocabulary with no room for bytes and special tokens, special tokens that are none or the same.
    """
    special = list(special)
    if not special or len(set(special)) < len(special):
        raise ValueError(f"special tokens are different, and at least one, which ends documents; got {special}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not all(special) or set(special) & set(alphabet):
        raise ValueError(f"special tokens are no bytes and not empty, got {special}")
    if vocabulary < BYTES + len(special):
        raise ValueError(f"a vocabulary of {vocabulary} has no room for {BYTES} bytes and {len(special)} special tokens")
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False,
                                  initial_alphabet=alphabet)
    found.train_from_iterator(documents, trainer)
    return found


def save(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path, end: str = END) -> None:
    """tokenizer.json and tokenizer_config.json, both or neither, in a directory that need not exist."""
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
        (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        try:
            partial.replace(directory)
        except OSError:  # something is there
            for name in ("tokenizer.json", "tokenizer_config.json"):  # in this order: who sees the second finds the first
                (partial / name).replace(directory / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """A tokenizer that is trained when it is first asked for, and kept.

    Attributes:
      source: documents to train on.
      vocabulary, special: see `train`.
      documents: how many are taken, drawn at random.
    """

    source: Source
    vocabulary: int
    special: tuple[str, ...] = (END,)
    documents: int = 1000

    def directory(self) -> pathlib.Path:
        """Where it is, trained now if it is not there.

        Raises:
          ValueError: as `train` and `Source.open`.
        """
        name = hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()
        path = home() / "tokenizers" / name
        if not (path / "tokenizer_config.json").exists():
            texts = self.source.open()
            order = np.random.default_rng(0).permutation(len(texts))[:self.documents]
            save(train((texts[int(i)] for i in order), self.vocabulary, self.special), path, self.special[0])
        return path

"""The tokenizer of a run: a file that every trainer has, known by its SHA-256 (as `sha256sum` prints it)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from moe_net.data.corpus import Corpus
from moe_net.data.tokenizer import BpeTokenizer, load_tokenizer

MAKE = "moe-peer tokenizer --data FOLDER --vocab-size N --out tokenizer.json"
"""The command that makes one, for messages."""


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_tokenizer(corpus: Corpus, file: Path, *, vocab_size: int) -> tuple[BpeTokenizer, str]:
    """A BPE of the training split, written to `file`, and the file's SHA-256."""
    tokenizer = BpeTokenizer.train((document.text for document in corpus.train), vocab_size=vocab_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(file)
    return tokenizer, sha256_of(file.read_bytes())


def tokenizer_of_run(file: Path, sha256: str | None) -> tuple[BpeTokenizer, bytes]:
    """The tokenizer in `file`, and the file's bytes; ValueError when its SHA-256 is not that of the run (None: any)."""
    data = file.read_bytes()
    if sha256 is not None and sha256_of(data) != sha256:
        raise ValueError(
            f"{file} has the SHA-256 {sha256_of(data)}, and the run's tokenizer has {sha256}: trainers with different "
            "vocabularies would teach the same experts different languages. Ask the run's owner for the file"
        )
    tokenizer = load_tokenizer(file)
    if not isinstance(tokenizer, BpeTokenizer):
        raise ValueError(f"{file} is a tokenizer of bytes, and the run's is a BPE")
    return tokenizer, data

"""Text to token ids and back: bytes, or a byte-level BPE trained on the corpus.

N tokens of one text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Backend

Ids = npt.NDArray[np.integer[Any]]

# Stands between documents (data.corpus); always a token of its own, so that texts can be encoded one by one.
_SEPARATOR = "\0"


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are in 0..vocab_size-1."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids: equal fingerprints give equal ids."""
        ...

    def encode(self, text: bytes | str) -> Ids:
        """Ids [N] in the smallest unsigned type that holds the vocabulary; ValueError when bytes are not UTF-8."""
        ...

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text; bytes that are no UTF-8 (a character cut by sampling) become U+FFFD."""
        ...

    def bytes_of(self, ids: Sequence[int] | Ids) -> int:
        """Bytes of text that `ids` stand for: a loss in nats per token becomes one in nats per byte."""
        ...

    def save(self, path: Path) -> None:
        """Write it as JSON; `load_tokenizer` reads it."""
        ...


def _checked(ids: Sequence[int] | Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
        raise ValueError(f"token ids {int(array.min())}..{int(array.max())} are not in 0..{vocab_size - 1}")
    return array


class ByteTokenizer:
    """Every byte is a token: no training, nothing to download, loss in nats per byte at once."""

    vocab_size = 256

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: bytes | str) -> Ids:
        return np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes().decode(errors="replace")

    def bytes_of(self, ids: Sequence[int] | Ids) -> int:
        return len(ids)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"kind": "bytes"}))


class BpeTokenizer:
    """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) by the `tokenizers` library, no special tokens.

    Any text encodes, for all 256 bytes are in the vocabulary. Tokens never reach across a NUL.
    """

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        self._size = backend.get_vocab_size()
        self._separator = backend.token_to_id("Ā")  # The byte 0 in the byte-level alphabet.
        if self._separator is None:
            raise ValueError("not a byte-level BPE: it has no token for the byte 0")
        # The byte-level alphabet has one character for each byte, so a token has as many bytes as characters.
        self._bytes = np.zeros(self._size, dtype=np.int64)
        for token, index in backend.get_vocab().items():
            self._bytes[index] = len(token)

    @classmethod
    def train(cls, texts: Iterable[bytes], *, vocab_size: int) -> BpeTokenizer:
        """Learn merges from `texts` (UTF-8). The vocabulary comes out smaller when the texts have too few pairs."""
        if vocab_size < 256:
            raise ValueError(f"vocab_size={vocab_size} must be at least 256, one for each byte")
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(_SEPARATOR), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator((text.decode() for text in texts), trainer=trainer)
        return cls(backend)

    @classmethod
    def from_json(cls, text: str) -> BpeTokenizer:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(text))

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: bytes | str) -> Ids:
        text = text.decode() if isinstance(text, bytes) else text
        # One text of 10 MB costs the library gigabytes of offsets; documents one by one, on all cores, do not.
        encodings = self._backend.encode_batch_fast(text.split(_SEPARATOR), add_special_tokens=False)
        dtype = np.uint16 if self._size <= 2**16 else np.uint32
        separator = np.array([self._separator], dtype=dtype)
        parts = [part for one in encodings for part in (np.array(one.ids, dtype=dtype), separator)]
        return np.concatenate(parts[:-1])

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return self._backend.decode(_checked(ids, self._size).tolist(), skip_special_tokens=False)

    def bytes_of(self, ids: Sequence[int] | Ids) -> int:
        return int(self._bytes[_checked(ids, self._size)].sum())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"kind": "bpe", "tokenizer": json.loads(self._backend.to_str())}))


def load_tokenizer(path: Path) -> ByteTokenizer | BpeTokenizer:
    """What `save` wrote; ValueError when the file is something else."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe" and "tokenizer" in values:
        return BpeTokenizer.from_json(json.dumps(values["tokenizer"]))
    raise ValueError(f"{path}: not a tokenizer of this library (kind={kind!r})")

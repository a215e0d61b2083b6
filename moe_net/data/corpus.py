"""Text to train on: this Python's own standard library, or any file or folder of text.

A text is UTF-8 without NUL bytes, so that NUL can stand between two documents of a token stream.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = b"\0"
"""Stands after every document of a stream; no document has it inside."""

HELD_OUT_SHARE = 0.05
# Few documents, or one huge one, can make the hash's share anything: outside of these bounds documents are cut in
# chunks instead, and every 20th chunk is held out.
_SHARE_BOUNDS = (0.02, 0.12)
_CHUNK_EVERY = round(1 / HELD_OUT_SHARE)
_CHUNK_BYTES = 16 * 1024
_SNIFF_BYTES = 8 * 1024

# Tests repeat themselves, idlelib and lib2to3 are applications; encodings and pydoc_data are tables (2 MB of 10)
# that a language model of source code learns nothing from; what `_sysconfigdata` says differs from build to build.
_STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data", "ensurepip", "__phello__"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with a name that is the same on every machine (a relative path, `/` between its parts)."""

    name: str
    text: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents, split once and for all into those to train on and those held out."""

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    fingerprint: str
    """SHA-256 over names, texts and split: trainers of one run, and a resumed trainer, must see the same."""


def join(documents: Sequence[Document]) -> bytes:
    """The documents as one stream, each followed by SEPARATOR."""
    return b"".join(part for document in documents for part in (document.text, SEPARATOR))


def _digest(*parts: bytes) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def _is_text(start: bytes, *, whole: bool) -> bool:
    if not start or SEPARATOR in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        # A start may end within a character of up to 4 bytes; the whole text may not.
        return not whole and error.start > len(start) - 4
    return True


def _read_text(path: Path) -> bytes | None:
    """The text at `path`, or None when it is none; of a large binary file only the start is read."""
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES)
        if not _is_text(start, whole=False):
            return None
        text = start + file.read()
    return text if _is_text(text, whole=True) else None


def _files(root: Path, *, suffix: str = "", without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below `root`; no hidden ones, no links out of the tree, none in folders called as in `without`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in without and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _cut_at(text: bytes, begin: int, limit: int) -> int:
    """The last place in begin..limit where a line ends, or else a character (`begin` when its first is longer)."""
    if limit >= len(text):
        return len(text)
    newline = text.rfind(b"\n", begin, limit)
    if newline >= 0:
        return newline + 1
    while limit > begin and text[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def _load(root: Path, paths: Sequence[Path], max_bytes: int | None) -> list[Document]:
    """Texts by name; with `max_bytes`, of documents drawn by the hash of their name, the last one cut to fit."""
    named = [(path.relative_to(root).as_posix() if path != root else path.name, path) for path in paths]
    if max_bytes is not None:
        named.sort(key=lambda item: _digest(item[0].encode("utf-8", "surrogateescape")))
    seen: set[bytes] = set()
    documents: list[Document] = []
    room = max_bytes
    for name, path in named:
        if room is not None and room <= 0:
            break
        text = _read_text(path)
        if text is None:
            continue
        digest = _digest(text)
        if digest in seen:  # A copy on the other side of the split would make the held-out loss a lie.
            continue
        seen.add(digest)
        if room is not None and len(text) > room:
            text = text[: _cut_at(text, 0, room)]
            # Half a line is worth having only when it is all there is.
            if not text or (documents and not text.endswith(b"\n")):
                break
            room = len(text)
        if room is not None:
            room -= len(text)
        documents.append(Document(name=name, text=text))
    return sorted(documents, key=lambda document: document.name)


def _chunks(documents: Sequence[Document]) -> Iterator[Document]:
    total = sum(len(document.text) for document in documents)
    size = min(_CHUNK_BYTES, total // _CHUNK_EVERY)
    for document in documents:
        begin, number = 0, 0
        while begin < len(document.text):
            # A character has at most 4 bytes: with that many a chunk is never empty.
            end = _cut_at(document.text, begin, begin + max(4, size))
            yield Document(name=f"{document.name}#{number}", text=document.text[begin:end])
            begin, number = end, number + 1


def _split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """By the hash of the content, so that a document stays on its side when others come and go; or by chunks."""
    threshold = int(HELD_OUT_SHARE * 2**64)
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        draw = int.from_bytes(_digest(b"held-out", document.text)[:8], "little")
        (held_out if draw < threshold else train).append(document)
    total = sum(len(document.text) for document in documents)
    share = sum(len(document.text) for document in held_out) / total
    if _SHARE_BOUNDS[0] <= share <= _SHARE_BOUNDS[1]:
        return train, held_out
    chunks = list(_chunks(documents))
    held_out = chunks[_CHUNK_EVERY // 2 :: _CHUNK_EVERY]
    train = [chunk for number, chunk in enumerate(chunks) if number % _CHUNK_EVERY != _CHUNK_EVERY // 2]
    return train, held_out


def from_documents(documents: Sequence[Document], *, name: str) -> Corpus:
    """A corpus of texts that are in memory already; ValueError when there is too little to hold a part out."""
    for document in documents:
        if document.text and not _is_text(document.text, whole=True):
            raise ValueError(f"{name}: {document.name} is not UTF-8 text without NUL bytes")
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"{name}: no text found (UTF-8 without NUL bytes is read, hidden files are not)")
    train, held_out = _split(documents)
    if not train or not held_out:
        total = sum(len(document.text) for document in documents)
        raise ValueError(f"{name}: too little text to hold a part out ({total} bytes); give more")
    sides = [(b"train", train), (b"held-out", held_out)]
    parts = [
        part
        for side, members in sides
        for document in members
        for part in (side, document.name.encode("utf-8", "surrogateescape"), document.text)
    ]
    return Corpus(name=name, train=tuple(train), held_out=tuple(held_out), fingerprint=_digest(*parts).hex())


def load_corpus(path: Path | None = None, *, max_bytes: int | None = None) -> Corpus:
    """The text file at `path`, every text file below it (recursively), or without `path` the standard library.

    About 5 % of the text is held out: whole documents where there are many, every 20th chunk where there are few.
    `max_bytes` limits what is read; which documents then belong is decided by their names, not by the file system.
    The standard library differs between Python versions: `Corpus.fingerprint` tells.
    ValueError says when there is no text at `path`.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1")
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file
            for file in _files(root, suffix=".py", without=_STDLIB_WITHOUT)
            if not file.name.startswith("_sysconfigdata") and not file.parent.name.startswith("config-")
        ]
        name = "python-stdlib"
        if not files:
            raise ValueError("this Python has no source of its standard library: give a file or folder of text")
    else:
        root = path.resolve()
        if not root.exists():
            raise ValueError(f"{path}: no such file or folder")
        files = [root] if root.is_file() else list(_files(root))
        name = root.name
    return from_documents(_load(root, files, max_bytes), name=name)

"""Text to train on: this Python's own standard library, or any file or folder of text.

A text is UTF-8 without NUL bytes, so that NUL can stand between two documents of a token stream.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from moe_net.data.files import FoundFile, find_files
from moe_net.data.formats import parts_of
from moe_net.data.part import NUL, Part, fault_of
from moe_net.data.reading import Reading

SEPARATOR = NUL
"""Stands after every document of a stream; no document has it inside."""

HELD_OUT_SHARE = 0.05
# Few documents, or one huge one, can make the hash's share anything: outside of these bounds documents are cut in
# chunks instead, and every 20th chunk is held out.
_SHARE_BOUNDS = (0.02, 0.12)
_CHUNK_EVERY = round(1 / HELD_OUT_SHARE)
_CHUNK_BYTES = 16 * 1024

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
    summary: str = ""
    """What of the files was read and what was left out, for people; empty when it came from none."""


def join(documents: Sequence[Document]) -> bytes:
    """The documents as one stream, each followed by SEPARATOR."""
    return b"".join(part for document in documents for part in (document.text, SEPARATOR))


def _digest(*parts: bytes) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def _file_digest(file: FoundFile) -> bytes:
    """`_digest` of all its bytes, without holding them; of nothing when it cannot be read."""
    state = hashlib.sha256(file.size_bytes.to_bytes(8, "little"))
    with suppress(OSError), file.path.open("rb") as opened:
        while piece := opened.read(_CHUNK_BYTES):
            state.update(piece)
    return state.digest()


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


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


def _load(files: Sequence[FoundFile], max_bytes: int | None, text_field: str) -> tuple[list[Document], Reading]:
    """Texts by name; with `max_bytes`, of files drawn by the hash of their name, the last text cut to fit."""
    if max_bytes is not None:
        files = sorted(files, key=lambda file: _digest(_bytes(file.name)))
    found_bytes = sum(file.size_bytes for file in files)
    reading = Reading(found_files=len(files), found_bytes=found_bytes, limit_bytes=max_bytes)
    reader = _Reader(reading=reading, text_field=text_field, room=max_bytes)
    for file in files:
        if reader.room == 0:
            break
        reader.read(file)
    reading.limit_reached = reader.room == 0
    return sorted(reader.documents, key=lambda document: document.name), reading


class _Reader:
    """Documents of files, one file after the other, until the room is used up."""

    def __init__(self, *, reading: Reading, text_field: str, room: int | None) -> None:
        self.documents: list[Document] = []
        self.room = room
        self._reading = reading
        self._text_field = text_field
        self._seen: set[bytes] = set()
        self._sizes: set[int] = set()

    def read(self, file: FoundFile) -> None:
        copy = "a copy of another text"
        # Of a longer one only the beginning would be read, and that is no copy of anything.
        is_cut = self.room is not None and file.size_bytes > self.room
        if is_cut and file.size_bytes in self._sizes and _file_digest(file) in self._seen:
            self._reading.leave(file.name, copy, file.size_bytes, is_fault=False)
            return
        before = len(self.documents)
        for part in parts_of(file, text_field=self._text_field, limit_bytes=self.room):
            digest = _digest(part.text)
            if part.reason:
                self._reading.leave(file.name, part.reason, part.size_bytes, where=part.where, is_fault=part.is_fault)
            elif digest in self._seen:  # On the other side of the split it would make the held-out loss a lie.
                self._reading.leave(file.name, copy, part.size_bytes, where=part.where, is_fault=False)
            else:
                self._seen.add(digest)
                self._sizes.add(len(part.text))
                if not self._keep(part):
                    break
        self._reading.read_files += len(self.documents) > before

    def _keep(self, part: Part) -> bool:
        """False once there is no room for more."""
        text, size_bytes = part.text, part.size_bytes
        if self.room is not None and len(text) > self.room:
            text = text[: _cut_at(text, 0, self.room)]
            self.room = 0
            # Half a line is worth having only when it is all there is.
            if not text or (self.documents and not text.endswith(b"\n")):
                return False
            size_bytes = size_bytes * len(text) // len(part.text)
        elif self.room is not None:
            self.room -= len(text)
        self._reading.read_bytes += size_bytes
        self.documents.append(Document(name=part.name, text=text))
        return self.room is None or self.room > 0


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
        if fault := fault_of(document.text):
            raise ValueError(f"{name}: {document.name} is no text: {fault}")
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"{name}: no text found (UTF-8 without NUL bytes is read, hidden files are not)")
    train, held_out = _split(documents)
    if not train or not held_out:
        total = sum(len(document.text) for document in documents)
        raise ValueError(f"{name}: too little text to hold a part out ({total} bytes); give more")
    sides = [(b"train", train), (b"held-out", held_out)]
    parts = [
        part for side, members in sides for document in members for part in (side, _bytes(document.name), document.text)
    ]
    return Corpus(name=name, train=tuple(train), held_out=tuple(held_out), fingerprint=_digest(*parts).hex())


def load_corpus(path: Path | None = None, *, max_bytes: int | None = None, text_field: str = "text") -> Corpus:
    """The text file at `path`, every text file below it (recursively), or without `path` the standard library.

    About 5 % of the text is held out: whole documents where there are many, every 20th chunk where there are few.
    `max_bytes` limits what is read; which files then belong is decided by their names, not by the file system.
    Of JSON lines, Parquet and Arrow files (data sets of Hugging Face's `datasets`) each `text_field` is a document.
    The standard library differs between Python versions: `Corpus.fingerprint` tells.
    ValueError says when there is no text at `path`, and why not when most of it cannot be read.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1")
    if path is None:
        files = [
            file
            for file in find_files(Path(sysconfig.get_paths()["stdlib"]), without=_STDLIB_WITHOUT)
            if file.path.suffix == ".py"
            and not file.path.name.startswith("_sysconfigdata")
            and not file.path.parent.name.startswith("config-")
        ]
        name = "python-stdlib"
        if not files:
            raise ValueError("this Python has no source of its standard library: give a file or folder of text")
    else:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        files, name = _found(path)
    documents, reading = _load(files, max_bytes, text_field)
    if 2 * reading.faulty_bytes > reading.found_bytes:
        raise ValueError(
            f"{name}: most of the text cannot be used: {reading}. Mend that, or give a file or folder without it"
        )
    if not documents and files:
        raise ValueError(f"{name}: no text found: {reading}")
    return replace(from_documents(documents, name=name), summary=str(reading))


def _found(path: Path) -> tuple[list[FoundFile], str]:
    if path.is_dir():
        root = path.resolve()
        return find_files(root), root.name
    # A link's own name: that of what it leads to may lack the suffix.
    fault = "" if path.is_file() else "neither a file nor a folder"
    return [FoundFile(name=path.name, path=path, size_bytes=path.stat().st_size, fault=fault)], path.name

"""One file as texts: plain text is one; what is no text, or no format that is read, is named with the reason."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from moe_net.data.files import FoundFile, words

NUL = b"\0"
"""No text has one: it stands between the documents of a stream."""

_PIECE_BYTES = 2**20
# Where a limit cuts a text off, these bytes more show whether it cuts a character (of up to 4) in two.
_MARGIN_BYTES = 4

_MAGIC = (
    (b"\xff\xfe\0\0", "UTF-32; convert it to UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32; convert it to UTF-8"),
    (b"\xff\xfe", "UTF-16; convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16; convert it to UTF-8"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (b"\xfd7zXZ\0", "compressed by xz; unpack it"),
    (b"BZh", "compressed by bzip2; unpack it"),
    (b"\x04\x22\x4d\x18", "compressed by lz4; unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"%PDF-", "PDF is not read"),
)
_NOT_READ = {
    ".csv": "CSV is not read; convert it to JSON lines",
    ".tsv": "TSV is not read; convert it to JSON lines",
    ".json": "JSON is read by lines only, one object each, as .jsonl",
    ".pdf": "PDF is not read",
    ".doc": "Word is not read",
    ".docx": "Word is not read",
    ".odt": "OpenDocument is not read",
    ".rtf": "RTF is not read",
    ".epub": "EPUB is not read",
    ".xls": "Excel is not read",
    ".xlsx": "Excel is not read",
    ".pptx": "PowerPoint is not read",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a file: a text, or the reason why there is none."""

    name: str
    size_bytes: int
    """Of the file that it stands for."""
    text: bytes = b""
    reason: str = ""
    where: str = ""
    """In the file, like `line 17`."""
    is_fault: bool = True


def fault_of(text: bytes, *, whole: bool = True) -> str:
    """Why it is no text: `not UTF-8 at byte 480000`, `a NUL byte at 7`; empty when it is one. Without `whole` it may
    end within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(text), _PIECE_BYTES):
        # All of it at once, decoded, could take four times its memory.
        piece = text[begin : begin + _PIECE_BYTES]
        if (found := piece.find(NUL)) >= 0:
            return f"a NUL byte at {begin + found}"
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as error:
            return f"not UTF-8 at byte {begin - pending + error.start}"
    if whole and (pending := len(decoder.getstate()[0])):
        return f"not UTF-8 at byte {len(text) - pending}"
    return ""


def parts_of(file: FoundFile, *, limit_bytes: int | None) -> Iterator[Part]:
    """The texts of `file`, one after the other, and what is none. No more than `limit_bytes` (and a piece) is held:
    of a longer text its beginning comes."""
    if file.fault:
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=file.fault)
        return
    try:
        with file.path.open("rb") as opened:
            yield from _parts(file, opened, limit_bytes)
    except OSError as error:
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=words(error))


def _parts(file: FoundFile, opened: BinaryIO, limit_bytes: int | None) -> Iterator[Part]:
    start = opened.read(_PIECE_BYTES)
    if not start:
        yield Part(name=file.name, size_bytes=0, reason="empty", is_fault=False)
        return
    reason = _NOT_READ.get(file.path.suffix.lower(), "")
    reason = reason or next((reason for magic, reason in _MAGIC if start.startswith(magic)), "")
    if reason or (reason := fault_of(start, whole=False)):  # a large binary file is not read any further
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason)
        return
    text = start + opened.read(-1 if limit_bytes is None else max(0, limit_bytes + _MARGIN_BYTES - len(start)))
    reason = fault_of(text, whole=not opened.read(1))
    if reason:
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason)
    else:
        yield Part(name=file.name, size_bytes=len(text), text=text)

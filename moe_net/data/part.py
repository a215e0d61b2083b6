"""A piece of a file of text, and what makes bytes a text: UTF-8 without NUL."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

NUL = b"\0"
"""No text has one: it stands between the documents of a stream."""

PIECE_BYTES = 2**20
"""Files are looked through in pieces of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a file: a text, or the reason why there is none."""

    name: str
    size_bytes: int
    """Bytes of the file that the part stands for."""
    text: bytes = b""
    reason: str = ""
    where: str = ""
    """In the file, like `line 17`."""
    is_fault: bool = True


def fault_of(text: bytes, *, whole: bool = True) -> str:
    """Why it is no text: `not UTF-8 at byte 480000`, `a NUL byte at 7`; empty when it is one. Without `whole` it may
    end within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(text), PIECE_BYTES):
        # All of it at once, decoded, could take four times its memory.
        piece = text[begin : begin + PIECE_BYTES]
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

"""One file as texts: plain text is one, JSON lines, Parquet and Arrow have many; what else there is, is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from moe_net.data.files import FoundFile, words
from moe_net.data.part import NUL, PIECE_BYTES, Part, fault_of
from moe_net.data.records import arrow_rows, is_json_lines, json_lines, parquet_rows

_SNIFF_BYTES = 8 * 1024
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
    ".feather": "Feather is not read; convert it to Parquet",
    ".orc": "ORC is not read; convert it to Parquet",
    ".avro": "Avro is not read; convert it to Parquet",
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
# What the datasets library writes beside a data set's rows.
_OF_DATASETS = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})


def parts_of(file: FoundFile, *, text_field: str, limit_bytes: int | None) -> Iterator[Part]:
    """The texts of `file`, one after the other, and what is none; of a record, its field `text_field`. No more than
    `limit_bytes` (and a piece) is held: of a longer text its beginning comes."""
    if file.fault:
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=file.fault)
        return
    try:
        with file.path.open("rb") as opened:
            yield from _parts(file, opened, text_field, limit_bytes)
    except OSError as error:
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=words(error))


def _parts(file: FoundFile, opened: BinaryIO, text_field: str, limit_bytes: int | None) -> Iterator[Part]:
    start = opened.read(PIECE_BYTES)
    if not start:
        yield Part(name=file.name, size_bytes=0, reason="empty", is_fault=False)
        return
    if reason := _beside_the_text(file):
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason, is_fault=False)
        return
    rows = None
    if is_json_lines(file, start):
        rows = json_lines
    elif start.startswith(b"PAR1"):
        rows = parquet_rows
    elif file.path.suffix.lower() == ".arrow":
        rows = arrow_rows
    if rows is not None:
        opened.seek(0)
        yield from rows(file, opened, text_field)
        return
    reason = _NOT_READ.get(file.path.suffix.lower(), "")
    reason = reason or next((reason for magic, reason in _MAGIC if start.startswith(magic)), "")
    if not reason and _is_wide(start[:_SNIFF_BYTES]):
        reason = "UTF-16; convert it to UTF-8"
    # What is binary from its beginning was never meant as a text; and no such file is read any further.
    is_binary = not reason and NUL in start[:_SNIFF_BYTES]
    if reason or (reason := fault_of(start, whole=False)):
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason, is_fault=not is_binary)
        return
    text = start + opened.read(-1 if limit_bytes is None else max(0, limit_bytes + _MARGIN_BYTES - len(start)))
    reason = fault_of(text, whole=not opened.read(1))
    if reason:
        yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason)
    else:
        yield Part(name=file.name, size_bytes=len(text), text=text)


def _is_wide(start: bytes) -> bool:
    """Whether it looks like UTF-16 without a byte order mark: every second byte NUL, of letters of the West."""
    few, many = sorted((start[0::2].count(NUL), start[1::2].count(NUL)))
    return many > 0.4 * (len(start) // 2) and few < 0.1 * many


def _beside_the_text(file: FoundFile) -> str:
    """What the file is, when the datasets library wrote it, and not as a text to train on; empty otherwise."""
    if file.path.name in _OF_DATASETS:
        return "describes a data set"
    if file.path.suffix != ".arrow":
        return ""
    if file.path.name.startswith("cache-"):
        return "a cache of the datasets library"
    split, dictionary = file.path.parent, file.path.parent.parent
    # A split that is given by itself (its files have no folder in their names) is read, whatever it is called.
    is_one_of_several = "/" in file.name and (dictionary / "dataset_dict.json").exists()
    if is_one_of_several and split.name != "train" and (dictionary / "train").is_dir():
        return f"the split {split.name!r}; 'train' is read"
    return ""

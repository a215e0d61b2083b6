"""Files of records, one text each: JSON lines, Parquet, and the Arrow files of Hugging Face's `datasets`.

They are read piece by piece; a record without a text is named by its line or row, and the others are read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from moe_net.data.files import FoundFile
from moe_net.data.part import NUL, Part, fault_of

if TYPE_CHECKING:
    import pyarrow as pa

_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_GZIP = b"\x1f\x8b"
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_LIMIT_BYTES = 2**24
_BATCH_ROWS = 1024
_NAMED_FIELDS = 8


def is_json_lines(file: FoundFile, start: bytes) -> bool:
    """By its name; compressed by gzip, it has `.gz` after that. UTF-16 it is not."""
    if start.startswith(_WIDE):
        return False
    name = file.path.name.lower()
    return name.removesuffix(".gz" if start.startswith(_GZIP) else "").endswith(_JSON_LINES)


def json_lines(file: FoundFile, opened: BinaryIO, text_field: str) -> Iterator[Part]:
    """A text for each line: its field `text_field`."""
    is_packed = opened.read(len(_GZIP)) == _GZIP
    opened.seek(0)
    # GzipFile is a file of bytes in all but its type.
    lines = cast(BinaryIO, gzip.GzipFile(fileobj=opened)) if is_packed else opened
    number, end = 0, 0
    try:
        while line := lines.readline(_LINE_LIMIT_BYTES):
            number += 1
            is_long = len(line) == _LINE_LIMIT_BYTES and not line.endswith(b"\n")
            size_bytes = len(line)
            while is_long and (more := lines.readline(_LINE_LIMIT_BYTES)):
                size_bytes += len(more)
                is_long = not more.endswith(b"\n")
                line = b""
            if is_packed:  # what of the file went into it; it is read in larger pieces than lines
                begin, end = end, opened.tell()
                size_bytes = end - begin
            yield _line(file, number, line, size_bytes, text_field)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"damaged, and not read any further: {error}"
        yield Part(name=file.name, size_bytes=file.size_bytes - end, reason=reason, where=f"after line {number}")


def _line(file: FoundFile, number: int, line: bytes, size_bytes: int, text_field: str) -> Part:
    where = f"line {number}"
    if not line:
        reason = f"longer than {_LINE_LIMIT_BYTES // 2**20} MiB"
        return Part(name=file.name, size_bytes=size_bytes, reason=reason, where=where)
    if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    if not line.strip():
        return Part(name=file.name, size_bytes=size_bytes, reason="empty", where=where, is_fault=False)
    try:
        record: Any = json.loads(line.decode())
    except UnicodeDecodeError:
        return Part(name=file.name, size_bytes=size_bytes, reason="not UTF-8", where=where)
    except (ValueError, RecursionError):
        return Part(name=file.name, size_bytes=size_bytes, reason="not JSON", where=where)
    if not isinstance(record, dict):
        return Part(name=file.name, size_bytes=size_bytes, reason="not a JSON object", where=where)
    fields = cast(dict[str, Any], record)
    if text_field not in fields:
        where += f", which has {_named(list(fields))}"
        return Part(name=file.name, size_bytes=size_bytes, reason=_no_field(text_field), where=where)
    text = fields[text_field]
    # A lone surrogate, which JSON can spell, is not UTF-8.
    as_bytes = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None
    return _record(file, where, number, as_bytes, size_bytes, text_field)


def _record(file: FoundFile, where: str, number: int, text: bytes | None, size_bytes: int, text_field: str) -> Part:
    """A record's part; `text` is None when the field has none."""
    if text is None:
        return Part(name=file.name, size_bytes=size_bytes, reason=f"the field {text_field!r} is no text", where=where)
    if not text:
        return Part(name=file.name, size_bytes=size_bytes, reason="empty", where=where, is_fault=False)
    if fault_of(text):
        # Where it is in the text would make one reason of each record.
        reason = "a NUL byte in the text" if NUL in text else "the text is not UTF-8"
        return Part(name=file.name, size_bytes=size_bytes, reason=reason, where=where)
    return Part(name=f"{file.name}:{number}", size_bytes=size_bytes, text=text, where=where)


def _no_field(text_field: str) -> str:
    return f"no field {text_field!r} (--text-field names another)"


def _named(fields: Sequence[str]) -> str:
    return ", ".join(repr(field[:40]) for field in fields[:_NAMED_FIELDS]) + (
        ", ..." if len(fields) > _NAMED_FIELDS else ""
    )


def parquet_rows(file: FoundFile, opened: BinaryIO, text_field: str) -> Iterator[Part]:
    """A text for each row: its column `text_field`."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        yield _without_pyarrow(file, "Parquet")
        return
    try:
        table = parquet.ParquetFile(opened)
        if reason := _not_a_text(table.schema_arrow, text_field):
            yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason)
            return
        rows, n_rows = 0, table.metadata.num_rows
        for batch in table.iter_batches(_BATCH_ROWS, columns=[text_field], use_threads=False):
            begin = file.size_bytes * rows // n_rows
            end = file.size_bytes * (rows + batch.num_rows) // n_rows
            yield from _rows(file, batch.column(text_field), rows, end - begin, text_field)
            rows += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        yield _damaged(file, error)


def arrow_rows(file: FoundFile, opened: BinaryIO, text_field: str) -> Iterator[Part]:
    """Rows as `parquet_rows` gives them, of an Arrow stream (`Dataset.save_to_disk` writes such) or an Arrow file."""
    try:
        import pyarrow as pa
    except ImportError:
        yield _without_pyarrow(file, "Arrow")
        return
    try:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        reader = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
        if reason := _not_a_text(reader.schema, text_field):
            yield Part(name=file.name, size_bytes=file.size_bytes, reason=reason)
            return
        rows, end = 0, 0
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            begin, end = end, max(end, opened.tell())
            yield from _rows(file, batch.column(text_field), rows, end - begin, text_field)
            rows += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        yield _damaged(file, error)


def _without_pyarrow(file: FoundFile, what: str) -> Part:
    reason = f"{what} is read by pyarrow: pip install 'moe-net[data]'"
    return Part(name=file.name, size_bytes=file.size_bytes, reason=reason)


def _damaged(file: FoundFile, error: Exception) -> Part:
    text = str(error).splitlines()
    return Part(name=file.name, size_bytes=file.size_bytes, reason=f"damaged: {text[0][:200] if text else error!r}")


def _not_a_text(schema: pa.Schema, text_field: str) -> str:
    """Why the column cannot be read as a text; empty when it can."""
    import pyarrow as pa

    if text_field not in schema.names:
        return f"{_no_field(text_field)}; it has {_named(schema.names)}"
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return "" if is_text else f"the field {text_field!r} is no text, but {kind}"


def _rows(file: FoundFile, column: pa.Array, first: int, size_bytes: int, text_field: str) -> Iterator[Part]:
    """The parts of a column's rows, of which the first has the number `first`; `size_bytes` of all of them."""
    import pyarrow as pa

    texts = column.cast(pa.large_string()).cast(pa.large_binary())
    for index, text in enumerate(texts):
        begin, end = (size_bytes * number // len(texts) for number in (index, index + 1))
        number = first + index
        yield _record(file, f"row {number}", number, text.as_py(), end - begin, text_field)

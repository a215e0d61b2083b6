"""JSON lines, Parquet and Hugging Face's data sets are read by field; what is wrong is named by its line or row."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from moe_net.data.corpus import Corpus, load_corpus

TEXTS = [f"text number {number} of the records\n" for number in range(400)]


def documents(corpus: Corpus) -> list[str]:
    return sorted(document.text.decode() for document in (*corpus.train, *corpus.held_out))


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()


def stream(path: Path, table: pa.Table, *, batch_rows: int = 100) -> None:
    """Write an Arrow stream as `datasets.Dataset.save_to_disk` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.jsonlines", "a.jsonl.gz", "a.ndjson.gz"])
def test_json_lines_are_read_by_field(tmp_path: Path, name: str) -> None:
    data = lines(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    corpus = load_corpus(tmp_path)
    assert documents(corpus) == sorted(TEXTS)
    assert "left out" not in corpus.summary
    assert documents(load_corpus(tmp_path / name)) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": 7}', "(line 3, which has 'id': no field 'text' (--text-field names another))"),
        (b'{"text": "half', "(line 3: not JSON)"),
        (b"[" * 5000, "(line 3: not JSON)"),
        (b"just words", "(line 3: not JSON)"),
        (b'["text"]', "(line 3: not a JSON object)"),
        (b'{"text": null}', "(line 3: the field 'text' is no text)"),
        (b'{"text": ["a", "b"]}', "(line 3: the field 'text' is no text)"),
        (b'{"text": "caf\xe9"}', "(line 3: not UTF-8)"),
        (b'{"text": "a\\u0000b"}', "(line 3: a NUL byte in the text)"),
        (b'{"text": "a\\ud800b"}', "(line 3: the text is not UTF-8)"),
        (b'{"text": ""}', "(line 3: empty)"),
        (b"", "(line 3: empty)"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, words: str) -> None:
    rest = lines(TEXTS).splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rest[:2], line, *rest[2:]]) + b"\n")
    corpus = load_corpus(tmp_path)
    assert documents(corpus) == sorted(TEXTS)
    assert f"a.jsonl {words}" in corpus.summary


def test_a_line_that_does_not_end_is_not_held_and_those_after_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a line of text\n" * 1_200_000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 2**24 + b'"}\n' + lines(["the last"]))
    corpus = load_corpus(tmp_path)
    assert "a.jsonl (line 1: longer than 16 MiB)" in corpus.summary
    assert any("the last" in text for text in documents(corpus))


def test_bad_lines_are_counted_and_most_of_them_bad_is_refused(tmp_path: Path) -> None:
    rows = lines(TEXTS).splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows, b"{", b"}", b"[["]))
    assert "a.jsonl (line 401: not JSON; and 2 more)" in load_corpus(tmp_path).summary
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, field="content"))
    with pytest.raises(ValueError, match=r"read 0 of 1 file.*line 1, which has 'id', 'content': no field 'text'"):
        load_corpus(tmp_path)
    assert documents(load_corpus(tmp_path, text_field="content")) == sorted(TEXTS)


def test_json_lines_in_the_way_of_windows_are_read_or_named(tmp_path: Path) -> None:
    data = lines(TEXTS).replace(b"\n", b"\r\n")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
    assert documents(load_corpus(tmp_path)) == sorted(TEXTS)
    (tmp_path / "b.jsonl").write_bytes(data.decode().encode("utf-16")[:2000])
    assert "b.jsonl (UTF-16; convert it to UTF-8)" in load_corpus(tmp_path).summary


def test_a_damaged_archive_gives_what_comes_before_the_damage(tmp_path: Path) -> None:
    texts = [f"{text}{number * 7919 % 10_007}" for number, text in enumerate(TEXTS * 50)]
    packed = gzip.compress(lines(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) * 9 // 10])
    corpus = load_corpus(tmp_path)
    assert 0.5 * len(texts) < len(documents(corpus)) < len(texts)
    assert "damaged, and not read any further" in corpus.summary


def test_a_limit_takes_whole_records_and_says_the_share(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    corpus = load_corpus(tmp_path, max_bytes=5000)
    assert set(documents(corpus)) < set(TEXTS)
    assert 4900 < sum(map(len, documents(corpus))) <= 5000
    assert "8.96 of 22.2 KB; left out: 13.2 KB beyond the limit of" in corpus.summary


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_larger_than_the_limit_are_not_held(tmp_path: Path, packed: bool) -> None:
    text = "words " * 2000
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    with gzip.open(path, "wb", 1) if packed else path.open("wb") as file:
        for number in range(4000):  # 48 MB
            file.write(json.dumps({"text": f"{number} {text}"}).encode() + b"\n")
    tracemalloc.start()
    try:
        corpus = load_corpus(tmp_path, max_bytes=2**20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "beyond the limit of 1 MiB" in corpus.summary
    assert peak_bytes < 8 * 2**20


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_is_read_by_column_whatever_its_name(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(TEXTS).cast(kind), "id": range(len(TEXTS))})
    parquet.write_table(table, tmp_path / "blob", row_group_size=64)
    corpus = load_corpus(tmp_path)
    assert documents(corpus) == sorted(TEXTS)
    assert "left out" not in corpus.summary


def test_of_parquet_a_row_without_text_and_a_column_that_is_none_are_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [*TEXTS, None, "", "a\0b"], "id": range(403)}), tmp_path / "a.parquet")
    summary = load_corpus(tmp_path).summary
    for words in ("(row 400: the field 'text' is no text)", "(row 401: empty)", "(row 402: a NUL byte in the text)"):
        assert f"a.parquet {words}" in summary
    with pytest.raises(ValueError, match="the field 'id' is no text, but int64"):
        load_corpus(tmp_path, text_field="id")
    with pytest.raises(ValueError, match=r"no field 'body' .--text-field names another.; it has 'text', 'id'"):
        load_corpus(tmp_path, text_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.txt").write_text("a line of text\n" * 4000)
    (tmp_path / name).write_bytes(b"PAR1" * 100)
    assert f"{name} (damaged: " in load_corpus(tmp_path).summary


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    stream(tmp_path / "b.arrow", pa.table({"text": TEXTS}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"Parquet is read by pyarrow: pip install 'moe-net\[data\]'"):
        load_corpus(tmp_path)


def test_a_data_set_that_was_saved_to_disk_is_read_without_its_descriptions_and_caches(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
    stream(tmp_path / "data-00000-of-00002.arrow", table.slice(0, 250))
    stream(tmp_path / "data-00001-of-00002.arrow", table.slice(250))
    stream(tmp_path / "cache-3f2a91c07711.arrow", pa.table({"text": ["mapped"] * 10}))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"description": ""}))
    corpus = load_corpus(tmp_path)
    assert documents(corpus) == sorted(TEXTS)
    assert "cache-3f2a91c07711.arrow (a cache of the datasets library)" in corpus.summary
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert documents(load_corpus(tmp_path / "data.arrow")) == sorted(TEXTS)


def test_of_a_data_set_with_splits_the_training_one_is_read_unless_another_is_given(tmp_path: Path) -> None:
    stream(tmp_path / "train" / "data-00000-of-00001.arrow", pa.table({"text": TEXTS[:300]}))
    stream(tmp_path / "test" / "data-00000-of-00001.arrow", pa.table({"text": TEXTS[300:]}))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    corpus = load_corpus(tmp_path)
    assert documents(corpus) == sorted(TEXTS[:300])
    assert "test/data-00000-of-00001.arrow (the split 'test'; 'train' is read)" in corpus.summary
    assert documents(load_corpus(tmp_path / "test")) == sorted(TEXTS[300:])


def test_tables_larger_than_the_limit_are_not_read_to_their_end(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{number} " + "words " * 200 for number in range(20_000)]})  # 24 MB
    stream(tmp_path / "a.arrow", table, batch_rows=500)
    del table
    before = pa.total_allocated_bytes()
    corpus = load_corpus(tmp_path, max_bytes=2**20)
    assert "read 1 of 1 file, 1.05 of 24.2 MB" in corpus.summary
    assert pa.total_allocated_bytes() - before < 2**20

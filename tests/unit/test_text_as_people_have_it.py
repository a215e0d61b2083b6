"""What is left out of a folder of text is said, with the reason; links are followed; most of it missing is refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
from pathlib import Path

import pytest

from moe_net.data.corpus import Corpus, load_corpus
from moe_peer.cli import main

GOOD = "a line of text\n" * 4000


def names(corpus: Corpus) -> set[str]:
    return {document.name.partition("#")[0] for document in (*corpus.train, *corpus.held_out)}


def bad_texts() -> dict[str, tuple[bytes, str]]:
    ascii_text = b"words and words\n" * 200
    return {
        "latin.txt": (ascii_text + b"caf\xe9\n", "latin.txt (not UTF-8 at byte 3203)"),
        "cp1252.txt": (b"it\x92s\n" * 100, "cp1252.txt (not UTF-8 at byte 2)"),
        "cut.txt": (ascii_text + "€".encode()[:2], "cut.txt (not UTF-8 at byte 3200)"),
        "surrogate.txt": (b"x\xed\xa0\x80\n" * 100, "surrogate.txt (not UTF-8 at byte 1)"),
        "nul.txt": (ascii_text + b"\0", "nul.txt (a NUL byte at 3200)"),
        "wide_no_mark.txt": ("wide".encode("utf-16-le"), "wide_no_mark.txt (UTF-16; convert it to UTF-8)"),
        "windows.txt": ("wide".encode("utf-16"), "windows.txt (UTF-16; convert it to UTF-8)"),
        "big_endian.txt": (b"\xfe\xff\0w\0i", "big_endian.txt (UTF-16; convert it to UTF-8)"),
        "wider.txt": ("wide".encode("utf-32"), "wider.txt (UTF-32; convert it to UTF-8)"),
        "a.txt.gz": (gzip.compress(ascii_text), "a.txt.gz (compressed by gzip; unpack it)"),
        "no_suffix": (gzip.compress(ascii_text), "no_suffix (compressed by gzip; unpack it)"),
        "a.xz": (lzma.compress(ascii_text), "a.xz (compressed by xz; unpack it)"),
        "a.bz2": (bz2.compress(ascii_text), "a.bz2 (compressed by bzip2; unpack it)"),
        "a.zst": (b"\x28\xb5\x2f\xfd\x04\x00", "a.zst (compressed by zstd; unpack it)"),
        "paper.pdf": (b"%PDF-1.7\n" + ascii_text, "paper.pdf (PDF is not read)"),
        "download": (b"%PDF-1.7\n" + ascii_text, "download (PDF is not read)"),
        "table.CSV": (ascii_text, "table.CSV (CSV is not read; convert it to JSON lines)"),
        "letter.docx": (b"PK\x03\x04" + ascii_text, "letter.docx (Word is not read)"),
        "value.json": (b'{"text": 1}', "value.json (JSON is read by lines only, one object each, as .jsonl)"),
        "empty.txt": (b"", "empty.txt (empty)"),
        "copy.txt": (GOOD.encode(), "a copy of another text)"),
    }


@pytest.mark.parametrize("name", bad_texts())
def test_what_is_no_text_is_left_out_and_named_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    data, words = bad_texts()[name]
    (tmp_path / name).write_bytes(data)
    corpus = load_corpus(tmp_path)
    assert len(names(corpus)) == 1
    assert corpus.summary.startswith("read 1 of 2 files, 60 of ")
    assert words in corpus.summary


def test_when_most_of_the_text_is_left_out_for_a_fault_it_is_refused_with_the_share(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("words\n" * 5000)
    (tmp_path / "big.txt").write_bytes(b"a" * 480_000 + b"\xe9" + b"a" * 9_999)
    with pytest.raises(
        ValueError, match=r"read 1 of 2 files, 30 of 520 KB; left out: big.txt \(not UTF-8 at byte 480000\)"
    ):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"read 0 of 1 file, 0 of 490 KB; left out: big.txt \(not UTF-8"):
        load_corpus(tmp_path / "big.txt")
    (tmp_path / "rest.txt").write_text("other words\n" * 50_000)
    assert "big.txt" in load_corpus(tmp_path).summary


def test_a_trainer_refuses_such_text_before_it_looks_for_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "latin.txt").write_bytes(GOOD.encode() + b"caf\xe9\n")
    options = ["--join", "127.0.0.1:1", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "text")]
    with pytest.raises(SystemExit) as ended:
        main(["train", *options])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "latin.txt (not UTF-8 at byte" in said
    assert "127.0.0.1:1" not in said


def test_pictures_and_programs_beside_the_text_are_named_and_no_reason_to_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" + bytes(range(256)) * 1000)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "good.pyc").write_bytes(b"\xa7\r\r\n\0\0" * 100_000)
    assert load_corpus(tmp_path).summary == "read 1 of 2 files, 60 of 316 KB; left out: picture.png (a NUL byte at 8)"
    (tmp_path / "wide.txt").write_bytes(("wide words\n" * 40_000).encode("utf-16-be"))
    with pytest.raises(ValueError, match=r"wide.txt \(UTF-16; convert it to UTF-8\), picture.png"):
        load_corpus(tmp_path)


def test_copies_and_a_limit_of_the_users_own_are_no_fault(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(GOOD)
    assert load_corpus(tmp_path).summary.startswith("read 1 of 10 files, 60 of 600 KB; left out: 1.txt (a copy of")
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" + GOOD)
    summary = load_corpus(tmp_path, max_bytes=2**17).summary
    assert summary.startswith(
        "read 3 of 10 files, 131 of 600 KB; left out: 469 KB beyond the limit of 0.125 MiB (--max-d"
    )


def test_a_copy_that_the_limit_would_cut_off_is_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(f"line {number}\n" for number in range(300_000)))
    size = (tmp_path / "a.txt").stat().st_size
    corpus = load_corpus(tmp_path, max_bytes=size + size // 2)
    assert len(names(corpus)) == 1
    assert "a copy of another text" in corpus.summary


def test_no_more_is_held_than_the_limit(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "huge.txt").open("wb") as file:
        for number in range(64):
            file.write(f"block {number:>9}\n".encode() * 65_536)  # 1 MiB each
    tracemalloc.start()
    try:
        corpus = load_corpus(tmp_path, max_bytes=2 * 2**20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "2.1 of 67.1 MB" in corpus.summary
    assert peak_bytes < 16 * 2**20


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    (tmp_path / "locked.txt").write_text("secret\n")
    opened = Path.open

    def guarded(path: Path, *arguments: str, **options: str):
        if path.name == "locked.txt":
            raise error
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", guarded)
    assert f"locked.txt ({error.strerror.lower()})" in load_corpus(tmp_path).summary


def test_pipes_broken_links_and_names_that_a_terminal_would_obey_are_named_and_hurt_nobody(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "\x1b[2Jodd\n.txt").touch()
    summary = load_corpus(tmp_path).summary
    for words in (
        "pipe (neither a file nor a folder)",
        "gone.txt (a link to nothing)",
        "\ufffd[2Jodd\ufffd.txt (empty)",
    ):
        assert words in summary
    assert "self.txt (too many levels of symbolic links)" in summary


def test_a_hugging_face_snapshot_is_read_by_the_names_of_its_links_each_file_once(tmp_path: Path) -> None:
    blob, other = "2cf24dba5fb0a30e26e83b2ac5b9e29e", "486ea46224d1bb4fb680f34f7c9ad96a"
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / blob).write_text(GOOD)
    (tmp_path / "blobs" / other).write_text("other " + GOOD)
    for revision in ("abc", "def"):
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
        (tmp_path / "snapshots" / revision / "train.txt").symlink_to(f"../../blobs/{blob}")
        (tmp_path / "snapshots" / revision / "more.txt").symlink_to(f"../../blobs/{other}")
    assert names(load_corpus(tmp_path / "snapshots" / "abc")) == {"train.txt", "more.txt"}
    assert names(load_corpus(tmp_path / "snapshots" / "abc" / "train.txt")) == {"train.txt"}
    corpus = load_corpus(tmp_path)
    assert names(corpus) == {"snapshots/abc/train.txt", "snapshots/abc/more.txt"}
    assert "read 2 of 2 files" in corpus.summary


def test_the_links_of_a_config_map_lead_through_a_hidden_folder(tmp_path: Path) -> None:
    data = tmp_path / "..2026_11_30"
    (data / "part").mkdir(parents=True)
    (data / "book.txt").write_text(GOOD)
    (data / "part" / "more.txt").write_text("other " + GOOD)
    (tmp_path / "..data").symlink_to(data.name)
    (tmp_path / "book.txt").symlink_to("..data/book.txt")
    (tmp_path / "part").symlink_to("..data/part")
    assert names(load_corpus(tmp_path)) == {"book.txt", "part/more.txt"}


def test_the_links_of_dvc_and_git_annex_are_read_though_their_store_is_hidden(tmp_path: Path) -> None:
    store = tmp_path / ".dvc" / "cache" / "files" / "md5" / "ab"
    store.mkdir(parents=True)
    (store / "cdef").write_text(GOOD)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").symlink_to(store / "cdef")
    assert names(load_corpus(tmp_path)) == {"text/book.txt"}


def test_loops_end_and_a_folder_has_its_own_name_rather_than_that_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "z" / "deep").mkdir(parents=True)
    (tmp_path / "z" / "deep" / "book.txt").write_text(GOOD)
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "z" / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "z" / "here").symlink_to(".")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "more.txt").write_text("other " + GOOD)
    (outside / "back").symlink_to(tmp_path)
    (tmp_path / "out").symlink_to(outside)
    try:
        assert names(load_corpus(tmp_path)) == {"z/deep/book.txt", "out/more.txt"}
    finally:
        (outside / "back").unlink()
        (outside / "more.txt").unlink()
        outside.rmdir()


def test_a_zip_of_text_is_named_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    with zipfile.ZipFile(tmp_path / "texts.bin", "w") as archive:
        archive.writestr("a.txt", "words\n")
    assert "texts.bin (a zip archive; unpack it)" in load_corpus(tmp_path).summary

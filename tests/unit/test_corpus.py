from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.data.corpus import SEPARATOR, Corpus, Document, from_documents, join, load_corpus


def _whole(corpus: Corpus) -> bytes:
    """All chunks of a single-file corpus, put together again."""
    chunks = sorted((*corpus.train, *corpus.held_out), key=lambda chunk: int(chunk.name.rpartition("#")[2]))
    return b"".join(chunk.text for chunk in chunks)


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _write_tree(root: Path, documents: int) -> None:
    for number in range(documents):
        path = root / f"part{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document number {number}\n" * (5 + number % 3))


def test_the_default_corpus_is_this_pythons_library_without_its_tests() -> None:
    corpus = load_corpus()
    names = [document.name for document in (*corpus.train, *corpus.held_out)]
    assert "dataclasses.py" in names
    assert len(names) == len(set(names)) > 200
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    assert _size(corpus.train) > 4_000_000
    assert 0.02 < _size(corpus.held_out) / _size((*corpus.train, *corpus.held_out)) < 0.12


def test_loading_twice_gives_the_same_fingerprint() -> None:
    first, second = load_corpus(max_bytes=300_000), load_corpus(max_bytes=300_000)
    assert first == second
    assert first.fingerprint != load_corpus(max_bytes=299_000).fingerprint


def test_max_bytes_limits_the_text_and_cuts_between_lines(tmp_path: Path) -> None:
    _write_tree(tmp_path, 300)
    whole = load_corpus(tmp_path)
    corpus = load_corpus(tmp_path, max_bytes=10_000)
    assert 9_900 < _size((*corpus.train, *corpus.held_out)) <= 10_000 < _size(whole.train)
    assert all(document.text.endswith(b"\n") for document in (*corpus.train, *corpus.held_out))


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    _write_tree(tmp_path, 300)
    before = load_corpus(tmp_path)
    assert all("#" not in document.name for document in before.train)
    _write_tree(tmp_path, 400)
    after = load_corpus(tmp_path)
    assert set(before.held_out) <= set(after.held_out)
    assert set(before.train) <= set(after.train)
    assert before.fingerprint != after.fingerprint


def test_a_copy_of_a_document_does_not_reach_the_other_side(tmp_path: Path) -> None:
    _write_tree(tmp_path, 300)
    before = load_corpus(tmp_path)
    copied = before.held_out[0]
    (tmp_path / "a_copy.txt").write_bytes(copied.text)
    after = load_corpus(tmp_path)
    assert copied.text not in {document.text for document in after.train}
    assert len(after.train) + len(after.held_out) == 300


@pytest.mark.parametrize("text", ["line of text\n" * 9000, "no line ends here " * 4000, "äöü€𝄞" * 300, "12345\n" * 20])
def test_a_single_file_is_held_out_in_part_and_nothing_is_lost(tmp_path: Path, text: str) -> None:
    path = tmp_path / "book.txt"
    path.write_text(text)
    corpus = load_corpus(path)
    assert _whole(corpus) == text.encode()
    assert not {chunk.name for chunk in corpus.train} & {chunk.name for chunk in corpus.held_out}
    assert 0.01 < _size(corpus.held_out) / len(text.encode()) < 0.15
    for chunk in (*corpus.train, *corpus.held_out):
        chunk.text.decode()


def test_binary_hidden_and_empty_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("words\n" * 5000)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
    (tmp_path / "late_nul.txt").write_bytes(b"a" * 20_000 + b"\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden\n" * 500)
    (tmp_path / ".env").write_text("hidden\n" * 500)
    corpus = load_corpus(tmp_path)
    assert {document.name.partition("#")[0] for document in (*corpus.train, *corpus.held_out)} == {"good.md"}


def test_a_character_across_the_sniffed_start_is_text(tmp_path: Path) -> None:
    path = tmp_path / "umlaut.txt"
    path.write_bytes(b"a" * 8191 + "ä\n".encode() * 500)
    assert _whole(load_corpus(path)) == path.read_bytes()


def test_nothing_usable_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text found"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        load_corpus(tmp_path / "missing")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match="too little text"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="max_bytes"):
        load_corpus(tmp_path, max_bytes=0)
    with pytest.raises(ValueError, match="not UTF-8"):
        from_documents([Document(name="x", text=b"\xff")], name="memory")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), min_size=1, max_size=8))
def test_split_and_chunks_keep_every_byte_once(texts: list[str]) -> None:
    documents = [Document(name=f"{i:03}", text=(text * 400).encode()) for i, text in enumerate(texts)]
    corpus = from_documents(documents, name="memory")
    assert _size((*corpus.train, *corpus.held_out)) == _size(documents)
    assert corpus.train
    assert corpus.held_out
    assert not set(corpus.train) & set(corpus.held_out)


def test_documents_are_joined_with_a_separator_after_each() -> None:
    documents = [Document(name="a", text=b"one"), Document(name="b", text=b"two")]
    assert join(documents) == b"one" + SEPARATOR + b"two" + SEPARATOR


def test_data_needs_neither_torch_nor_the_bpe_library_at_import() -> None:
    code = (
        "import sys, moe_net.data.corpus, moe_net.data.batches, moe_net.data.ngram, moe_net.data.tokenizer;"
        "sys.exit(bool({'torch', 'tokenizers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.data.corpus import join, load_corpus
from moe_net.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

CORPUS = load_corpus(max_bytes=200_000)
BPE = BpeTokenizer.train([document.text for document in CORPUS.train], vocab_size=600)
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), BPE]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8")))
def test_decoding_gives_the_text_back_and_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert np.array_equal(ids, tokenizer.encode(text.encode()))
    assert all(0 <= token < tokenizer.vocab_size for token in ids.tolist())


def test_bytes_are_their_own_ids() -> None:
    ids = ByteTokenizer().encode(b"\x00\x7f\xff")
    assert ids.tolist() == [0, 127, 255]
    assert ids.dtype == np.uint8


def test_bpe_has_the_asked_size_and_shortens_held_out_text() -> None:
    held_out = join(CORPUS.held_out)
    ids = BPE.encode(held_out)
    assert BPE.vocab_size == 600
    assert ids.dtype == np.uint16
    assert len(ids) < 0.6 * len(held_out)
    assert BPE.bytes_of(ids) == len(held_out)


def test_documents_encode_to_the_same_ids_alone_and_joined() -> None:
    first, second = CORPUS.train[0].text, CORPUS.train[1].text
    joined = BPE.encode(first + b"\0" + second)
    separator = BPE.encode(b"\0")
    assert len(separator) == 1
    assert np.array_equal(joined, np.concatenate([BPE.encode(first), separator, BPE.encode(second)]))


def test_training_twice_gives_the_same_tokenizer() -> None:
    again = BpeTokenizer.train([document.text for document in CORPUS.train], vocab_size=600)
    assert again.fingerprint == BPE.fingerprint
    fewer = BpeTokenizer.train([document.text for document in CORPUS.train], vocab_size=599)
    assert fewer.fingerprint != BPE.fingerprint


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
def test_a_saved_tokenizer_loads_as_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    text = "def f(x):\n    return 'ä€𝄞'\n"
    assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_half_a_character_decodes_to_a_replacement() -> None:
    for tokenizer in TOKENIZERS:
        ids = tokenizer.encode("𝄞")
        assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_wrong_input_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not in 0\.\.255"):
        ByteTokenizer().decode([256])
    with pytest.raises(ValueError, match=r"not in 0\.\.599"):
        BPE.bytes_of([-1])
    with pytest.raises(ValueError, match="at least 256"):
        BpeTokenizer.train([b"text"], vocab_size=255)
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_tokenizer(path)

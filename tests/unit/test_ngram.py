from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.data.corpus import join, load_corpus
from moe_net.data.ngram import BigramModel, UnigramModel

CORPUS = load_corpus(max_bytes=1_000_000)
TRAIN, HELD_OUT = join(CORPUS.train), join(CORPUS.held_out)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(train=st.binary(min_size=2, max_size=300), held_out=st.binary(min_size=1, max_size=100))
def test_bigram_equals_its_formula_byte_by_byte(train: bytes, held_out: bytes) -> None:
    model = BigramModel.fit(train)
    alpha, beta = model.unigram.alpha, model.beta
    singles = Counter(train)
    pairs = Counter(itertools.pairwise(train))
    before = Counter(train[:-1])

    def p(b: int) -> float:
        return (singles[b] + alpha) / (len(train) + 256 * alpha)

    nats = -math.log(p(held_out[0]))
    for a, b in itertools.pairwise(held_out):
        nats -= math.log((pairs[a, b] + beta * p(b)) / (before[a] + beta))
    assert model.nats_per_byte(held_out) == pytest.approx(nats / len(held_out), rel=1e-9)
    assert model.unigram.nats_per_byte(held_out) == pytest.approx(
        -sum(math.log(p(b)) for b in held_out) / len(held_out), rel=1e-9
    )


def test_probabilities_sum_to_one() -> None:
    model = BigramModel.fit(TRAIN)
    assert np.exp(model.unigram.log_p_V).sum() == pytest.approx(1)
    assert np.exp(model.log_p_VV).sum(axis=1) == pytest.approx(np.ones(256))


def test_on_source_code_bigram_beats_unigram_beats_uniform() -> None:
    model = BigramModel.fit(TRAIN)
    bigram, unigram = model.nats_per_byte(HELD_OUT), model.unigram.nats_per_byte(HELD_OUT)
    assert 2.0 < bigram < 2.8
    assert bigram + 0.4 < unigram < math.log(256) - 2


def test_the_chosen_smoothing_is_near_the_best_for_held_out_text() -> None:
    model = BigramModel.fit(TRAIN)
    log_p = model.unigram.log_p_V
    flat = BigramModel.fit(bytes(range(256)) * 2)
    assert model.nats_per_byte(HELD_OUT) < flat.nats_per_byte(HELD_OUT)
    assert np.isfinite(log_p).all()
    assert np.isfinite(model.log_p_VV).all()


def test_pair_nats_are_the_terms_of_the_mean() -> None:
    model = BigramModel.fit(TRAIN)
    text = np.frombuffer(HELD_OUT[:5000], dtype=np.uint8)
    terms = model.pair_nats(text[:-1], text[1:])
    first = -model.unigram.log_p_V[text[0]]
    assert (terms.sum() + first) / len(text) == pytest.approx(model.nats_per_byte(HELD_OUT[:5000]))


def test_counting_in_pieces_loses_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BigramModel.fit(TRAIN[:10_000])
    monkeypatch.setattr("moe_net.data.ngram._PIECE_BYTES", 7)
    assert np.array_equal(BigramModel.fit(TRAIN[:10_000]).log_p_VV, whole.log_p_VV)


def test_a_run_of_one_byte_is_learnt() -> None:
    model = BigramModel.fit(b"a" * 1000)
    assert model.nats_per_byte(b"a" * 1000) < 0.01
    assert UnigramModel.fit(b"a" * 1000).nats_per_byte(b"b") > 5


def test_too_little_text_is_a_clear_error_and_nothing_held_out_is_nan() -> None:
    with pytest.raises(ValueError, match="too little"):
        BigramModel.fit(b"a")
    assert math.isnan(BigramModel.fit(b"ab").nats_per_byte(b""))
    assert math.isnan(UnigramModel.fit(b"ab").nats_per_byte(b""))

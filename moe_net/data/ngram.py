"""Byte unigram and bigram models: the yardstick that a trained network has to pass.

V = 256 bytes; first index of a pair: the byte before, second: the byte predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_net.data.tokenizer import Ids

Floats = npt.NDArray[np.float64]

_V = 256
# Counting makes int64 copies: in pieces of 4 MB they stay small beside the text.
_PIECE_BYTES = 4 << 20
_TAIL_SHARE = 0.1
_GRID = tuple(10.0 ** (k / 2) for k in range(-6, 7))


def _bytes(text: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text, dtype=np.uint8)


def _unigram_counts(text: bytes) -> Floats:
    return np.bincount(_bytes(text), minlength=_V).astype(np.float64)


def _bigram_counts(text: bytes) -> Floats:
    data = _bytes(text)
    counts = np.zeros(_V * _V, dtype=np.int64)
    for begin in range(0, len(data) - 1, _PIECE_BYTES):
        piece = data[begin : begin + _PIECE_BYTES + 1].astype(np.int64)
        counts += np.bincount(piece[:-1] * _V + piece[1:], minlength=_V * _V)
    return counts.reshape(_V, _V).astype(np.float64)


def _mean_nats(counts: Floats, log_p: Floats) -> float:
    total = float(counts.sum())
    return -float((counts * log_p).sum()) / total if total else math.nan


def _unigram(counts: Floats, alpha: float) -> Floats:
    return (counts + alpha) / (counts.sum() + _V * alpha)


def _bigram(counts: Floats, unigram: Floats, beta: float) -> Floats:
    return (counts + beta * unigram) / (counts.sum(axis=1, keepdims=True) + beta)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnigramModel:
    """p(b) = (count(b) + alpha) / (N + 256 alpha)."""

    log_p_V: Floats
    alpha: float

    @classmethod
    def fit(cls, train: bytes) -> UnigramModel:
        """Counts of all of `train`; alpha is what its last tenth likes best after the first nine."""
        _check(train)
        cut = len(train) - max(1, round(len(train) * _TAIL_SHARE))
        head, tail = _unigram_counts(train[:cut]), _unigram_counts(train[cut:])
        alpha = min(_GRID, key=lambda a: _mean_nats(tail, np.log(_unigram(head, a))))
        return cls(log_p_V=np.log(_unigram(head + tail, alpha)), alpha=alpha)

    def nats_per_byte(self, held_out: bytes) -> float:
        """Mean cross-entropy over `held_out`, in nats (divide by ln 2 for bits per byte); nan when it is empty."""
        return _mean_nats(_unigram_counts(held_out), self.log_p_V)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BigramModel:
    """p(b | a) = (count(ab) + beta p(b)) / (count(a) + beta), p(b) the unigram model.

    Interpolation with a Dirichlet prior (MacKay & Peto, 1995): an unseen byte before falls back on the unigram.
    """

    log_p_VV: Floats
    unigram: UnigramModel
    beta: float

    @classmethod
    def fit(cls, train: bytes) -> BigramModel:
        """Counts of all of `train`; beta is what its last tenth likes best after the first nine."""
        unigram = UnigramModel.fit(train)
        cut = len(train) - max(1, round(len(train) * _TAIL_SHARE))
        head, tail = _bigram_counts(train[:cut]), _bigram_counts(train[max(0, cut - 1) :])
        head_unigram = _unigram(_unigram_counts(train[:cut]), unigram.alpha)
        beta = min(_GRID, key=lambda b: _mean_nats(tail, np.log(_bigram(head, head_unigram, b))))
        log_p_VV = np.log(_bigram(head + tail, np.exp(unigram.log_p_V), beta))
        return cls(log_p_VV=log_p_VV, unigram=unigram, beta=beta)

    def nats_per_byte(self, held_out: bytes) -> float:
        """Mean cross-entropy over `held_out`, in nats; its first byte counts as a unigram. nan when it is empty."""
        if not held_out:
            return math.nan
        pairs = _bigram_counts(held_out)
        first = float(self.unigram.log_p_V[held_out[0]])
        return -(first + float((pairs * self.log_p_VV).sum())) / len(held_out)

    def pair_nats(self, before: Ids, after: Ids) -> Floats:
        """-log p(after | before) for each position of two byte arrays: the yardstick on the very windows of an eval."""
        return -self.log_p_VV[before, after]


def _check(train: bytes) -> None:
    if len(train) < 2:
        raise ValueError(f"{len(train)} bytes are too little to count pairs in")

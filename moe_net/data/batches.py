"""Batches by address: which windows of the token stream make up micro-batch (step, trainer, micro).

N tokens of the stream, S tokens of a sequence, W windows, B sequences of a micro-batch.
Nothing is stored between two calls: a resumed trainer asks for the next address, and that is all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_net.data.tokenizer import Ids

IdsBatch = npt.NDArray[np.int64]

_ROUNDS = 6


@dataclass(frozen=True, slots=True, order=True)
class BatchId:
    """The address of one micro-batch."""

    step: int
    trainer: int = 0
    micro: int = 0


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., 2014): every bit of x changes half the bits of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(
    index: npt.NDArray[np.uint64], size: int, *, seed: int, epoch: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Where each `index` (0..size-1) comes to lie in the permutation keyed by (seed, epoch).

    A Feistel network over the next even number of bits; results outside go round again until they are inside
    (cycle walking, Black & Rogaway, 2002): a bijection without a table. The network's range is less than 4 times
    `size`, so a result goes round fewer than 4 times on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    seed_key = _mix(np.array(seed % 2**64, dtype=np.uint64).reshape(1))
    keys = [_mix(seed_key ^ _mix(epoch * np.uint64(_ROUNDS) + np.uint64(i))) for i in range(_ROUNDS)]

    def network(x: npt.NDArray[np.uint64], at: npt.NDArray[np.intp]) -> npt.NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key[at]) & mask)
        return (left << half) | right

    result = network(index, np.arange(len(index)))
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = network(result[outside], outside)
    return result


def _windows(tokens: Ids, window: npt.NDArray[Any], seq_len: int) -> IdsBatch:
    rows = window.astype(np.int64)[:, None] * seq_len + np.arange(seq_len + 1)
    return tokens[rows].astype(np.int64)


def window_count(tokens: int, seq_len: int) -> int:
    """Windows of `seq_len` inputs and as many targets in a stream; neighbours share one token."""
    return max(0, (tokens - 1) // seq_len)


class Batches:
    """The training stream in windows, in a new order each epoch, dealt out to trainers.

    Sample ((step * n_trainers + trainer) * n_micro + micro) * sequences_per_micro + i of an endless row of epochs:
    no window comes twice in an epoch, none is left out, and no two trainers get the same one. A step of given
    sequences has the same samples in the same order however it is cut into micro-batches.
    """

    def __init__(
        self,
        tokens: Ids,
        *,
        seq_len: int,
        sequences_per_micro: int,
        n_trainers: int = 1,
        n_micro: int = 1,
        seed: int = 0,
    ) -> None:
        """`tokens` [N] is any integer array, a memory map too; ValueError when it has not even one window."""
        if min(seq_len, sequences_per_micro, n_trainers, n_micro) < 1:
            raise ValueError("seq_len, sequences_per_micro, n_trainers and n_micro must be at least 1")
        self.n_windows = window_count(len(tokens), seq_len)
        if self.n_windows < 1:
            raise ValueError(f"{len(tokens)} tokens are less than one window of seq_len={seq_len} and its last target")
        self._tokens = tokens
        self._seq_len = seq_len
        self._sequences = sequences_per_micro
        self._n_trainers = n_trainers
        self._n_micro = n_micro
        self._seed = seed

    @property
    def n_micro(self) -> int:
        """Micro-batches of a trainer's step."""
        return self._n_micro

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a trainer's step."""
        return self._n_micro * self._sequences

    def cut(self, n_micro: int) -> Batches:
        """The same steps, of the same samples in the same order, in `n_micro` micro-batches; ValueError when their
        sequences cannot be dealt out to so many."""
        sequences = self.sequences_per_step
        if n_micro < 1 or sequences % n_micro:
            raise ValueError(f"{sequences} sequences cannot be cut into {n_micro} micro-batches")
        return Batches(
            self._tokens,
            seq_len=self._seq_len,
            sequences_per_micro=sequences // n_micro,
            n_trainers=self._n_trainers,
            n_micro=n_micro,
            seed=self._seed,
        )

    def windows(self, batch: BatchId) -> npt.NDArray[np.int64]:
        """Numbers [B] of the windows in a micro-batch; window w holds the tokens w*S .. w*S+S."""
        if batch.step < 0 or not 0 <= batch.trainer < self._n_trainers or not 0 <= batch.micro < self._n_micro:
            raise ValueError(f"{batch} is not within {self._n_trainers} trainers and {self._n_micro} micro-batches")
        first = ((batch.step * self._n_trainers + batch.trainer) * self._n_micro + batch.micro) * self._sequences
        sample = np.arange(first, first + self._sequences, dtype=np.uint64)
        epoch, index = np.divmod(sample, np.uint64(self.n_windows))
        return permute(index, self.n_windows, seed=self._seed, epoch=epoch).astype(np.int64)

    def batch(self, batch: BatchId) -> IdsBatch:
        """Tokens [B, S+1]: inputs are `[:, :-1]`, targets `[:, 1:]`."""
        return _windows(self._tokens, self.windows(batch), self._seq_len)


def eval_batches(tokens: Ids, n: int, *, seq_len: int, sequences: int) -> Iterator[IdsBatch]:
    """At most `n` batches [B, S+1] of `sequences` windows, spread evenly over a held-out stream; the same every time.

    A short stream gives fewer, the last one smaller. ValueError when it has not even one window.
    """
    available = window_count(len(tokens), seq_len)
    if available < 1:
        raise ValueError(f"{len(tokens)} held-out tokens are less than one window of seq_len={seq_len}")
    if min(n, sequences) < 1:
        raise ValueError("n and sequences must be at least 1")
    wanted = min(n * sequences, available)
    window = np.arange(wanted) * available // wanted
    return (_windows(tokens, window[i : i + sequences], seq_len) for i in range(0, wanted, sequences))

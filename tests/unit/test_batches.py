from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.data.batches import Batches, BatchId, eval_batches, permute, window_count

SMALL = st.integers(1, 5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(size=st.integers(1, 700), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 2**40))
def test_the_order_of_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    order = permute(index, size, seed=seed, epoch=np.full(size, epoch, dtype=np.uint64))
    assert sorted(order.tolist()) == list(range(size))


def test_orders_differ_by_seed_and_by_epoch_and_look_shuffled() -> None:
    size = 10_000
    index = np.arange(size, dtype=np.uint64)
    orders = [
        permute(index, size, seed=seed, epoch=np.full(size, epoch, dtype=np.uint64)).astype(np.int64)
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    plain = index.astype(np.int64)
    for i, order in enumerate(orders):
        # Two independent orders agree in about 1 place and correlate by 1/sqrt(size) = 0.01.
        for other in [plain, *orders[:i]]:
            assert np.count_nonzero(order == other) < 10
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05
        neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(neighbours) < 0.05


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    n_windows=st.integers(1, 60), seq_len=SMALL, sequences=SMALL, trainers=SMALL, micros=SMALL, seed=st.integers(0, 9)
)
def test_every_window_comes_exactly_once_per_epoch(
    n_windows: int, seq_len: int, sequences: int, trainers: int, micros: int, seed: int
) -> None:
    batches = Batches(
        np.arange(n_windows * seq_len + 1),
        seq_len=seq_len,
        sequences_per_micro=sequences,
        n_trainers=trainers,
        n_micro=micros,
        seed=seed,
    )
    assert batches.n_windows == n_windows
    per_step = sequences * trainers * micros
    steps = -(-2 * n_windows // per_step)
    dealt = [
        window
        for step in range(steps)
        for trainer in range(trainers)
        for micro in range(micros)
        for window in batches.windows(BatchId(step, trainer, micro)).tolist()
    ]
    for epoch in range(2):
        assert Counter(dealt[epoch * n_windows : (epoch + 1) * n_windows]) == Counter(range(n_windows))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trainers=st.integers(2, 5), micros=SMALL, sequences=SMALL, seed=st.integers(0, 9))
def test_trainers_never_share_a_window_within_an_epoch(trainers: int, micros: int, sequences: int, seed: int) -> None:
    steps = 4
    n_windows = steps * trainers * micros * sequences
    batches = Batches(
        np.zeros(n_windows * 3 + 1, dtype=np.uint8),
        seq_len=3,
        sequences_per_micro=sequences,
        n_trainers=trainers,
        n_micro=micros,
        seed=seed,
    )
    seen = [
        {
            window
            for step in range(steps)
            for micro in range(micros)
            for window in batches.windows(BatchId(step, trainer, micro)).tolist()
        }
        for trainer in range(trainers)
    ]
    assert sum(len(windows) for windows in seen) == len(set[int]().union(*seen)) == n_windows


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cut=st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]),
    trainers=st.integers(1, 3),
    step=st.integers(0, 10**9),
    seed=st.integers(0, 9),
)
def test_cutting_a_step_into_micro_batches_changes_no_sample_and_no_order(
    cut: tuple[int, int], trainers: int, step: int, seed: int
) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 4001)

    def step_of(n_micro: int, sequences: int, trainer: int) -> np.ndarray:
        batches = Batches(
            tokens, seq_len=8, sequences_per_micro=sequences, n_trainers=trainers, n_micro=n_micro, seed=seed
        )
        return np.concatenate([batches.batch(BatchId(step, trainer, micro)) for micro in range(n_micro)])

    for trainer in range(trainers):
        assert np.array_equal(step_of(*cut, trainer), step_of(1, 12, trainer))

    cut_later = Batches(tokens, seq_len=8, sequences_per_micro=12, n_trainers=trainers, seed=seed).cut(cut[0])
    parts = [cut_later.batch(BatchId(step, trainers - 1, micro)) for micro in range(cut_later.n_micro)]
    assert np.array_equal(np.concatenate(parts), step_of(*cut, trainers - 1))


def test_a_step_is_cut_into_equal_parts_only() -> None:
    batches = Batches(np.arange(500), seq_len=8, sequences_per_micro=12)
    with pytest.raises(ValueError, match="12 sequences cannot be cut into 5"):
        batches.cut(5)


def test_a_new_process_goes_on_where_the_old_one_stopped() -> None:
    tokens = np.arange(5000) % 251

    def make() -> Batches:
        return Batches(tokens, seq_len=16, sequences_per_micro=4, n_trainers=2, n_micro=3, seed=5)

    old = make()
    straight = [old.batch(BatchId(step, 1, micro)) for step in range(20) for micro in range(3)]
    resumed = [make().batch(BatchId(step, 1, micro)) for step in range(12, 20) for micro in range(3)]
    assert np.array_equal(np.stack(straight[36:]), np.stack(resumed))


def test_targets_are_the_inputs_shifted_by_one_and_windows_cover_the_stream() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    batches = Batches(tokens, seq_len=10, sequences_per_micro=10)
    batch = batches.batch(BatchId(0))
    assert batch.shape == (10, 11)
    assert batch.dtype == np.int64
    assert np.array_equal(batch[:, 1:], batch[:, :-1] + 1)
    assert sorted(batch[:, 1:].reshape(-1).tolist()) == list(range(1, 101))


def test_known_windows_of_a_known_seed_stay_the_same() -> None:
    # A change of the order would make every checkpoint of a running swarm repeat and skip samples.
    batches = Batches(np.zeros(1001), seq_len=10, sequences_per_micro=8, seed=1)
    assert batches.windows(BatchId(3)).tolist() == [60, 8, 20, 82, 56, 33, 50, 49]


def test_wrong_addresses_and_streams_are_clear_errors() -> None:
    batches = Batches(np.zeros(101), seq_len=10, sequences_per_micro=1, n_trainers=2, n_micro=3)
    for wrong in (BatchId(-1), BatchId(0, 2), BatchId(0, 0, 3), BatchId(0, -1)):
        with pytest.raises(ValueError, match="not within 2 trainers and 3 micro"):
            batches.batch(wrong)
    with pytest.raises(ValueError, match="less than one window"):
        Batches(np.zeros(10), seq_len=10, sequences_per_micro=1)
    with pytest.raises(ValueError, match="at least 1"):
        Batches(np.zeros(100), seq_len=10, sequences_per_micro=0)
    with pytest.raises(ValueError, match="held-out tokens"):
        eval_batches(np.zeros(10), 1, seq_len=10, sequences=1)
    with pytest.raises(ValueError, match="at least 1"):
        eval_batches(np.zeros(100), 0, seq_len=10, sequences=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(length=st.integers(5, 400), n=SMALL, seq_len=st.integers(1, 4), sequences=SMALL)
def test_eval_windows_are_distinct_spread_out_and_always_the_same(
    length: int, n: int, seq_len: int, sequences: int
) -> None:
    tokens = np.arange(length)
    first = [batch.tolist() for batch in eval_batches(tokens, n, seq_len=seq_len, sequences=sequences)]
    again = [batch.tolist() for batch in eval_batches(tokens, n, seq_len=seq_len, sequences=sequences)]
    assert first == again
    starts = [row[0] for batch in first for row in batch]
    available = window_count(length, seq_len)
    assert len(starts) == len(set(starts)) == min(n * sequences, available)
    assert starts == sorted(starts)
    gaps = np.diff([*starts, available * seq_len]) / seq_len
    assert gaps.max() - gaps.min() <= 1

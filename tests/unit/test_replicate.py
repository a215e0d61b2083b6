"""What two replicas make of each other: the mean, what stays of it when one goes on, and who has learned how much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_net.experts.replicate import Meetings, average, divergence, rebase, share_of_other

FIELDS = ("w_in", "w_out", "m_in", "m_out", "v_in", "v_out")
MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
ROWS = st.sampled_from([0, 1, 2, 7, 1000, 2**63])


def state(seed: int, *, indices: tuple[int, ...] = (3,), version: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for index in indices:
        for field in FIELDS:
            value = torch.randn(2, 3, generator=draw) * scale
            made[f"0.{index}.{field}"] = value.square() if field.startswith("v") else value
        made[f"0.{index}.version"] = torch.tensor(version)
    return made


@given(rows=st.tuples(ROWS, ROWS), versions=st.tuples(st.integers(0, 3), st.integers(0, 3)))
@MANY
def test_the_mean_is_the_same_from_either_side_and_lies_between_both(
    rows: tuple[int, int], versions: tuple[int, int]
) -> None:
    a, b = state(1, version=versions[0]), state(2, version=versions[1], scale=1e-6)
    mean = average(a, b, {3: rows[0]}, {3: rows[1]})
    other = average(b, a, {3: rows[1]}, {3: rows[0]})
    share = share_of_other(*rows, *versions)
    assert share == pytest.approx(1 - share_of_other(*reversed(rows), *reversed(versions)))
    for name, value in mean.items():
        torch.testing.assert_close(value, other[name])
        if name.endswith("version"):
            assert int(value) == max(versions)
            continue
        torch.testing.assert_close(value, a[name] * (1 - share) + b[name] * share)
        assert bool((value >= torch.minimum(a[name], b[name])).all())
        if share in (0.0, 1.0):
            assert torch.equal(value, b[name] if share else a[name]), "taken over bit for bit"


def test_whoever_has_learned_nothing_takes_over_the_other() -> None:
    assert share_of_other(0, 5, 9, 1) == 1
    assert share_of_other(5, 0, 1, 9) == 0
    assert share_of_other(1, 3, 0, 0) == 0.75
    assert share_of_other(0, 0, 4, 4) == 0.5
    assert [share_of_other(0, 0, 4, 5), share_of_other(0, 0, 5, 4)] == [1, 0]


def test_each_expert_has_its_own_weight() -> None:
    a, b = state(1, indices=(0, 2)), state(2, indices=(0, 2))
    mean = average(a, b, {0: 1, 2: 0}, {0: 0, 2: 1})
    assert torch.equal(mean["0.0.w_in"], a["0.0.w_in"])
    assert torch.equal(mean["0.2.w_in"], b["0.2.w_in"])


def test_steps_made_meanwhile_are_added_to_the_mean() -> None:
    sent, mean = state(1, version=4), state(2, version=6)
    now = {n: v + (2 if n.endswith("version") else 0.25) for n, v in sent.items()}
    moved = rebase(mean, now, sent)
    torch.testing.assert_close(moved["0.3.w_in"], mean["0.3.w_in"] + 0.25)
    assert int(moved["0.3.version"]) == 8
    still = rebase(mean, sent, sent)
    assert all(torch.equal(still[name], value) for name, value in mean.items())


@given(share=st.sampled_from([0.0, 1e-6, 0.5, 1.0]), decay=st.sampled_from([0.5, 0.95, 0.999, 1.0]))
@MANY
def test_second_moments_never_fall_below_their_own_decay(share: float, decay: float) -> None:
    sent = state(1)
    mean = {n: v * share for n, v in sent.items()}
    now = {n: v * decay for n, v in sent.items()}
    moved = rebase(mean, now, sent)
    for name in ("0.3.v_in", "0.3.v_out"):
        assert bool((moved[name] >= mean[name] * decay * (1 - 1e-5)).all())
    zero = {n: torch.zeros_like(v) for n, v in sent.items()}
    assert all(bool(torch.isfinite(v).all()) for v in rebase(mean, sent, zero).values())


def test_divergence_is_relative_and_of_the_expert_furthest_apart() -> None:
    a = state(1, indices=(0, 1))
    assert divergence(a, a) == 0
    b = dict(a)
    for field in ("w_in", "w_out"):
        b[f"0.1.{field}"] = a[f"0.1.{field}"] * 1.1
        b[f"0.0.{field}"] = a[f"0.0.{field}"] * 1.01
    assert divergence(a, b) == divergence(b, a) == pytest.approx(0.1 / ((1 + 1.1**2) / 2) ** 0.5, rel=1e-5)
    zero = {n: torch.zeros_like(v) for n, v in a.items()}
    assert divergence(zero, zero) == 0


def test_rows_count_from_the_last_meeting_with_that_partner() -> None:
    meetings = Meetings(max_partners=2)
    assert meetings.rows_since("a", 0, {1: 10, 2: 5}) == {1: 10, 2: 5}
    meetings.met("a", 0, {1: 10})
    meetings.met("b", 0, {1: 12, 2: 6})
    assert meetings.rows_since("a", 0, {1: 15, 2: 7}) == {1: 5, 2: 7}
    assert meetings.rows_since("a", 1, {1: 15}) == {1: 15}
    assert meetings.rows_since("b", 0, {1: 15, 2: 7}) == {1: 3, 2: 1}
    meetings.met("a", 0, {2: 7})
    meetings.met("c", 0, {1: 15})
    assert len(meetings) == 2, "the one not met for longest is forgotten"
    assert meetings.rows_since("b", 0, {1: 15}) == {1: 15}
    assert meetings.rows_since("a", 0, {1: 15, 2: 9}) == {1: 5, 2: 2}

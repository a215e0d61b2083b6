"""What two replicas make of each other: the mean, what stays of it when one goes on, and who has learned how much."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_net.experts.lineage import Lineage
from moe_net.experts.replicate import average, divergence, lineage_of, rebase, share_of_other
from moe_net.wire.state import MAX_COUNT

FIELDS = ("w_in", "w_out", "m_in", "m_out", "v_in", "v_out")
MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
ROWS = st.sampled_from([0, 1, 2, 7, 1000, MAX_COUNT])


def state(
    seed: int,
    *,
    indices: tuple[int, ...] = (3,),
    version: int = 0,
    scale: float = 1.0,
    rows: int | Mapping[int, int] = 0,
) -> dict[str, Tensor]:
    """`rows` that the origin `seed` has learned, of each expert."""
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for index in indices:
        for field in FIELDS:
            value = torch.randn(2, 3, generator=draw) * scale
            made[f"0.{index}.{field}"] = value.square() if field.startswith("v") else value
        made[f"0.{index}.version"] = torch.tensor(version)
        lineage = Lineage().plus(seed, rows if isinstance(rows, int) else rows[index], version)
        if lineage.seen:
            made[f"0.{index}.lineage"] = lineage.to_tensor()
    return made


@given(rows=st.tuples(ROWS, ROWS), versions=st.tuples(st.integers(0, 3), st.integers(0, 3)))
@MANY
def test_the_mean_is_the_same_from_either_side_and_lies_between_both(
    rows: tuple[int, int], versions: tuple[int, int]
) -> None:
    a = state(1, version=versions[0], rows=rows[0])
    b = state(2, version=versions[1], scale=1e-6, rows=rows[1])
    mean, other = average(a, b), average(b, a)
    lineages = lineage_of(a, "0.3"), lineage_of(b, "0.3")
    share = share_of_other(*lineages, *versions)
    assert share == pytest.approx(1 - share_of_other(*reversed(lineages), *reversed(versions)))
    assert lineage_of(mean, "0.3") == lineages[0].merged(lineages[1])
    for name, value in mean.items():
        torch.testing.assert_close(value, other[name])
        if name.endswith("version"):
            assert int(value) == max(versions)
        if name.endswith(("version", "lineage")):
            continue
        torch.testing.assert_close(value, a[name] * (1 - share) + b[name] * share)
        assert bool((value >= torch.minimum(a[name], b[name])).all())
        if share in (0.0, 1.0):
            assert torch.equal(value, b[name] if share else a[name]), "taken over bit for bit"


def test_whoever_has_learned_nothing_takes_over_the_other() -> None:
    none, some, more, others = Lineage(), Lineage().plus(1, 5, 1), Lineage().plus(1, 7, 1), Lineage().plus(2, 15, 1)
    assert share_of_other(none, some, 9, 1) == 1
    assert share_of_other(some, none, 1, 9) == 0
    assert share_of_other(some, more, 9, 1) == 1, "it has seen all that we have"
    assert share_of_other(some, others, 0, 0) == 0.75
    assert share_of_other(more.merged(others), some.merged(others), 0, 0) == 0
    assert share_of_other(some, some, 4, 4) == 0.5
    assert [share_of_other(some, some, 4, 5), share_of_other(none, none, 5, 4)] == [1, 0]


def test_each_expert_has_its_own_weight() -> None:
    a, b = state(1, indices=(0, 2), rows={0: 1, 2: 0}), state(2, indices=(0, 2), rows={0: 0, 2: 1})
    mean = average(a, b)
    assert torch.equal(mean["0.0.w_in"], a["0.0.w_in"])
    assert torch.equal(mean["0.2.w_in"], b["0.2.w_in"])


def test_steps_made_meanwhile_are_added_to_the_mean() -> None:
    sent, mean = state(1, version=4, rows=1), state(2, version=6, rows=7)
    now = {n: v + (2 if n.endswith("version") else 0.25) for n, v in sent.items() if not n.endswith("lineage")}
    now["0.3.lineage"] = Lineage().plus(1, 3, 6).to_tensor()
    moved = rebase(mean, now, sent)
    torch.testing.assert_close(moved["0.3.w_in"], mean["0.3.w_in"] + 0.25)
    assert int(moved["0.3.version"]) == 6
    assert lineage_of(moved, "0.3") == Lineage().plus(1, 3, 6).plus(2, 7, 6)
    still = rebase(mean, sent, sent)
    assert all(torch.equal(still[name], value) for name, value in mean.items() if not name.endswith("lineage"))


@given(share=st.sampled_from([0.0, 1e-6, 0.5, 1.0]), decay=st.sampled_from([0.5, 0.95, 0.999, 1.0]))
@MANY
def test_second_moments_never_fall_below_their_own_decay(share: float, decay: float) -> None:
    sent = state(1)
    mean = {n: v * share for n, v in sent.items()}
    now = {n: v * decay for n, v in sent.items()} | {"0.3.version": torch.tensor(1)}
    now["0.3.lineage"] = Lineage().plus(1, 5, 1).to_tensor()
    moved = rebase(mean, now, sent)
    for name in ("0.3.v_in", "0.3.v_out"):
        assert bool((moved[name] >= mean[name] * decay * (1 - 1e-5)).all())
    zero = {n: torch.zeros_like(v) for n, v in sent.items()}
    stepped = sent | {"0.3.lineage": now["0.3.lineage"]}
    assert all(bool(torch.isfinite(v).all()) for v in rebase(mean, stepped, zero).values())


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


def test_a_step_that_both_made_while_they_met_counts_once() -> None:
    """Sharing replicas step on the same rows: the mean of a state sent before and one of after that step has it whole,
    and what the sender has made meanwhile is the same step."""
    sent, stepped = state(1, version=4, rows=3), state(2, version=5)
    stepped["0.3.lineage"] = Lineage().plus(1, 3, 4).plus(1, 2, 5).plus(2, 2, 5).to_tensor()
    met = rebase(average(stepped, sent), stepped, sent)
    assert all(torch.equal(met[name], value) for name, value in stepped.items())
    # The other side steps after it has answered: it will be where we are.
    early = rebase(average(sent, sent), stepped, sent)
    assert all(torch.equal(early[name], value) for name, value in stepped.items())

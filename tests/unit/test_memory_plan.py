"""How a peer's memory is divided."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_peer.config import ServeConfig
from moe_peer.memory_plan import MIB, MemoryPlan, plan_memory


def plan(available_mib: float, *, expert_mib: float = 12, n_asked: int | None = None, **options: Any) -> MemoryPlan:
    return plan_memory(
        ServeConfig(**options),
        available_bytes=int(available_mib * MIB),
        expert_bytes=int(expert_mib * MIB),
        n_asked=n_asked,
    )


def test_where_memory_is_plentiful_caches_have_all_they_can_use_and_experts_half_of_the_rest() -> None:
    it = plan(24_000)
    assert [it.stage_bytes, it.queue_bytes] == [576 * MIB, 256 * MIB]
    assert it.n_experts == it.fitting_experts == (24_000 - 1600) // 2 // 12
    assert it.at_once_bytes == 512 * MIB
    assert not it.sparing


def test_a_container_of_one_gib_hosts_experts_beside_its_caches() -> None:
    it = plan(790)  # torch, gRPC and the libp2p daemon have the rest
    assert it.n_experts == 16
    assert it.caches_bytes <= 790 * MIB / 4
    assert it.sparing


@given(available_mib=st.integers(64, 300_000), expert_mib=st.floats(0.01, 20))
def test_what_is_planned_is_there_whatever_there_is(available_mib: int, expert_mib: float) -> None:
    try:
        it = plan(available_mib, expert_mib=expert_mib)
    except ValueError:
        assert available_mib < 7 * expert_mib
        return
    experts_bytes = it.n_experts * int(expert_mib * MIB)
    assert it.caches_bytes <= available_mib * MIB / 4
    assert experts_bytes <= (available_mib * MIB - it.caches_bytes) / 2
    assert 4 * MIB <= it.at_once_bytes <= 512 * MIB


@given(more=st.integers(0, 4000))
def test_more_memory_never_means_fewer_experts_or_smaller_caches(more: int) -> None:
    little, much = plan(800), plan(800 + more)
    assert much.n_experts >= little.n_experts
    assert much.stage_bytes >= little.stage_bytes


def test_options_win_and_experts_get_what_they_leave() -> None:
    it = plan(800, stage_mib=100)
    assert it.stage_bytes == 100 * MIB
    assert it.n_experts < plan(800, stage_mib=0).n_experts
    assert plan(24_000, max_queue_mib=7).queue_bytes == 7 * MIB


def test_who_asks_for_more_than_fits_gets_it_and_learns_what_would_fit() -> None:
    it = plan(800, n_asked=40)
    assert (it.n_experts, it.fitting_experts) == (40, 16)
    assert plan(800, n_asked=3).n_experts == 3


def test_more_experts_than_there_is_memory_are_refused_with_the_figures() -> None:
    complaint = r"70 experts take 840 MiB, but 800 MiB .* available here: there is room for 16 \(--max-experts 16\)"
    with pytest.raises(ValueError, match=complaint):
        plan(800, n_asked=70)


def test_where_no_expert_fits_it_is_said_what_takes_the_memory() -> None:
    with pytest.raises(ValueError, match=r"no expert fits: 100 MiB .* caches take 25, and an expert 50\.0"):
        plan(100, expert_mib=50)

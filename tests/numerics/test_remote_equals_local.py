"""With nothing failing, a swarm is the same computation as one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from swarms import make_trainer, remote_link, single_process_losses, small_run

from moe_net.client import host_here

STEPS = 50


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.0},
        {"experts_per_token": 1, "combine": "raw"},
        {"experts_per_token": 3, "capacity_factor": 1.0},
        {"expert_width": 24 // 4},
    ],
    ids=["top2-normalized", "top2-unclipped", "top1-raw", "top3-capacity", "narrow-experts"],
)
def test_three_peers_over_grpc_learn_what_one_process_learns(changes: dict[str, Any]) -> None:
    run = small_run(**changes)
    expected = single_process_losses(run, STEPS)
    with remote_link(run, n_peers=3) as (link, _):
        trainer = make_trainer(run, link)
        losses = [trainer.train_step().loss for _ in range(STEPS)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.3, "nothing was learned: the comparison would hold for frozen weights too"


def test_micro_batches_change_nothing_but_the_order_of_sums() -> None:
    run = small_run(balance_loss=0.0)
    expected = single_process_losses(run, 20, n_micro=1)
    with host_here(run, n_peers=2) as link:
        trainer = make_trainer(run, link, n_micro=2)
        losses = [trainer.train_step().loss for _ in range(20)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("in_flight", [2, 4])
def test_micro_batches_in_flight_learn_what_one_process_learns(in_flight: int) -> None:
    run = small_run(balance_loss=0.0)
    expected = single_process_losses(run, STEPS)
    with remote_link(run, n_peers=3) as (link, _), make_trainer(run, link, n_micro=4, in_flight=in_flight) as trainer:
        losses = [trainer.train_step().loss for _ in range(STEPS)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_same_seed_and_swarm_give_the_same_losses_to_the_bit() -> None:
    run = small_run(jitter=0.05)

    def losses() -> list[float]:
        with remote_link(run, n_peers=2) as (link, _):
            trainer = make_trainer(run, link)
            return [trainer.train_step().loss for _ in range(10)]

    assert losses() == losses()


def test_replicas_do_not_make_the_losses_a_matter_of_chance() -> None:
    """Each replica learns from what reaches it alone: the same trainer has to keep to the same ones, run after run."""
    run = small_run()

    def losses() -> list[float]:
        with remote_link(run, n_peers=2, replicas=2) as (link, _):
            trainer = make_trainer(run, link)
            return [trainer.train_step().loss for _ in range(10)]

    assert losses() == losses()

"""A peer with a GPU, which computes in bf16, beside one without: the run learns what it learns in fp32, within bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from gpu_peers import rounded_banks
from swarms import make_trainer, single_process_losses, small_run

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo

STEPS = 50


@contextmanager
def two_peers(run: RunConfig, computing: Sequence[str]) -> Iterator[SwarmLink]:
    peers = [
        PeerInfo(peer_id=f"here-{i}", address="", experts=tuple(e for e in run.model.expert_ids if e.index % 2 == i))
        for i in range(2)
    ]
    hosts = {
        peer.peer_id: ExpertHost(rounded_banks(run, peer.experts) if kind == "gpu" else make_banks(run, peer.experts))
        for peer, kind in zip(peers, computing, strict=True)
    }
    view = View(peers)
    with Portal() as portal:
        swarm = ExpertSwarm(trainer="here", transport=LocalTransport(hosts), view=lambda: view)
        try:
            yield SwarmLink(swarm=swarm, runner=portal)
        finally:
            portal.run(swarm.close())


@pytest.mark.parametrize("computing", [("gpu", "cpu"), ("gpu", "gpu")], ids="-".join)
def test_a_gpu_peer_learns_what_one_process_learns_within_bf16(computing: Sequence[str]) -> None:
    run = small_run()
    expected = single_process_losses(run, STEPS)
    with two_peers(run, computing) as link:
        trainer = make_trainer(run, link)
        losses = [trainer.train_step().loss for _ in range(STEPS)]
    # bf16 keeps 8 bits: 0.4 % of an expert's output, which adds to the residual.
    np.testing.assert_allclose(losses, expected, rtol=5e-3)
    assert losses != expected, "nothing was rounded: the comparison shows nothing"
    assert losses[-1] < losses[0] - 0.3

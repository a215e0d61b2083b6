"""What a step sends and receives is what the formula says, plus a stated overhead."""

from __future__ import annotations

from dataclasses import replace

import pytest
from swarms import make_trainer, remote_link, small_run

from moe_net.types import Encoding
from moe_net.wire.compress import payload_bytes

# Message fields that are neither rows nor pairs: ids, sizes, versions, timings, tags, alignment. Measured: 50 bytes
# sent and 28 received per call. A call has some 19 rows, so neither 4 bytes more per row or pair one way fit in, nor a
# commit that names each call twice.
OVERHEAD_BYTES_PER_CALL = 56
NAME_BYTES = 18
"""Of a call in the commit that counts it: its id of 16 bytes, and two of protobuf."""


@pytest.mark.parametrize("expert_width", [None, 6])
@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16", "int8"])
def test_a_step_moves_one_row_per_token_and_server_each_way_and_eight_bytes_per_pair(
    wire: str, expert_width: int | None
) -> None:
    run = replace(small_run(expert_width=expert_width), wire=wire)
    with remote_link(run, n_peers=3) as (link, transport):
        trainer = make_trainer(run, link)
        trainer.train_step()
        sent, received, calls = (
            transport.traffic.sent_bytes, transport.traffic.received_bytes, transport.traffic.calls,
        )  # fmt: skip
    stats = link.swarm.stats
    row = payload_bytes(1, expert_width or run.model.d_model, Encoding.parse(wire))
    # Forward: x, a count per row, (expert, gate) per pair; the reply: y. Backward: g; the reply: dx, a gate gradient.
    # Commit: the name of each call.
    named = 3 * len(run.model.moe_layers)
    expected_sent = stats.rows * (row + 4) + stats.routed_pairs * 8 + stats.rows * row + named * NAME_BYTES
    expected_received = stats.rows * row + stats.rows * row + stats.routed_pairs * 4
    assert calls == stats.calls == 2 * named + 3
    assert 0 <= sent - expected_sent <= OVERHEAD_BYTES_PER_CALL * calls
    assert 0 <= received - expected_received <= OVERHEAD_BYTES_PER_CALL * calls
    # The point of one call per server: fewer rows than pairs, since a server gets a token once for all its experts.
    assert stats.rows < stats.routed_pairs


def test_two_choices_on_one_server_share_one_row() -> None:
    run = small_run()
    with remote_link(run, n_peers=1) as (link, _):
        make_trainer(run, link).train_step()
    tokens = run.global_batch_tokens
    assert link.swarm.stats.rows == tokens * len(run.model.moe_layers)
    assert link.swarm.stats.routed_pairs == 2 * link.swarm.stats.rows

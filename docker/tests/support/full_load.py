"""Calls of several trainers at once, as fast as one peer answers; runs in a container beside it.

`python full_load.py RUN_TOML ADDRESS EXPERTS SECONDS` prints what came of the calls, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

from moe_net.config import RunConfig, load_toml
from moe_net.rpc.base import CallError
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import Encoding, ExpertId, PeerInfo
from moe_net.wire.messages import BackwardCall, CommitCall, ForwardCall, RoutedRows
from moe_peer.config import parse_experts

TRAINERS = 4
CALLS_AT_ONCE = 3
"""Calls of each trainer and layer that are under way: as many as it has micro-batches in flight."""
ROWS = 2048
TIMEOUT_S = 20.0


def rows_for(indices: list[int], run: RunConfig) -> RoutedRows:
    k = run.model.router.experts_per_token
    chosen = torch.stack([torch.randperm(len(indices))[:k] for _ in range(ROWS)])
    return RoutedRows(
        x_RD=torch.randn(ROWS, run.model.d_model),
        experts_per_row_R=torch.full((ROWS,), k, dtype=torch.int32),
        expert_index_P=torch.tensor(indices, dtype=torch.int32)[chosen].flatten(),
        gate_P=torch.rand(k * ROWS),
    )


async def load(run: RunConfig, address: str, experts: tuple[ExpertId, ...], seconds: float) -> Counter[str]:
    of_layer: dict[int, list[int]] = defaultdict(list)
    for expert in experts:
        of_layer[expert.layer].append(expert.index)
    rows_of = {layer: rows_for(indices, run) for layer, indices in of_layer.items()}
    peer = PeerInfo(peer_id="peer", address=address, experts=experts)
    counts: Counter[str] = Counter()
    end_s = time.monotonic() + seconds

    async def there_and_back(transport: GrpcTransport, trainer: str, step: int, layer: int) -> bytes | None:
        """The id of a call that the step's commit may name."""
        rows, call_id, encoding = rows_of[layer], secrets.token_bytes(16), Encoding.BF16
        forward = ForwardCall(
            call_id=call_id, trainer=trainer, step=step, layer=layer, rows=rows, encoding=encoding,
            reply_encoding=encoding,
        )  # fmt: skip
        backward = BackwardCall(
            call_id=call_id, trainer=trainer, step=step, layer=layer, grad_RD=rows.x_RD, encoding=encoding,
            reply_encoding=encoding,
        )  # fmt: skip
        try:
            await transport.forward(peer, forward, timeout_s=TIMEOUT_S)
            await transport.backward(peer, backward, timeout_s=TIMEOUT_S)
        except CallError as error:
            # A peer with more than it can do says so: that is no fault.
            counts[error.failure.value] += 1
            return None
        counts["answered"] += 1
        return call_id

    async def trainer(name: str) -> None:
        transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
        try:
            step = 0
            while time.monotonic() < end_s:
                layers = [layer for layer in of_layer for _ in range(CALLS_AT_ONCE)]
                ids = await asyncio.gather(*(there_and_back(transport, name, step, layer) for layer in layers))
                commit = CommitCall(trainer=name, step=step, tokens=ROWS, calls=tuple(filter(None, ids)))
                answer = await transport.commit(peer, commit, timeout_s=TIMEOUT_S)
                counts["committed"] += 1
                counts["gone"] += len(answer.missing)
                step += 1
        finally:
            await transport.close()

    await asyncio.gather(*(trainer(f"trainer-{index}") for index in range(TRAINERS)))
    return counts


if __name__ == "__main__":
    toml, where, hosted, for_s = sys.argv[1:]
    the_run = load_toml(RunConfig, Path(toml))
    torch.set_num_threads(1)
    print(json.dumps(asyncio.run(load(the_run, where, parse_experts(hosted, the_run.model), float(for_s)))))

"""What several tests need: a small run, its single-process form on plain PyTorch, and real expert servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.data.batches import Batches, BatchId
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.model.local_moe import LocalMoE
from moe_net.model.losses import auxiliary_loss
from moe_net.model.remote_moe import SwarmLink
from moe_net.model.transformer import Transformer
from moe_net.optim import OptimizerConfig
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_peer.serve import load_experts
from moe_peer.server import ExpertServer
from moe_peer.trainer import Trainer, build_model

SEQUENCES, SEQ_LEN = 4, 16


def small_run(*, clip_norm: float = 0.5, expert_width: int | None = None, **router: object) -> RunConfig:
    """Two MoE layers of six experts, top-2; a step has 64 tokens.

    The optimizer's eps is as large as the gradients' roots: Adam alone would forgive any constant factor on them.
    """
    return RunConfig(
        name="test",
        seed=3,
        model=ModelConfig(
            vocab_size=64, seq_len=SEQ_LEN, d_model=24, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=12,
            n_experts=6, d_ff_expert=20, expert_width=expert_width,
            router=RouterConfig(**{"z_loss": 0.001, **router}),  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5, total_steps=60, clip_norm=clip_norm, eps=1e-3),
        global_batch_tokens=SEQUENCES * SEQ_LEN,
        wire="fp32",
    )  # fmt: skip


def text_batches(run: RunConfig, *, n_micro: int = 1) -> Batches:
    """A stream with something to learn: noisy counting."""
    draw = np.random.default_rng(0)
    tokens = (np.arange(6000) * 7 + draw.integers(0, 3, 6000)) % run.model.vocab_size
    return Batches(
        tokens.astype(np.uint16), seq_len=SEQ_LEN, sequences_per_micro=SEQUENCES // n_micro, n_micro=n_micro,
        seed=run.seed,
    )  # fmt: skip


def single_process_losses(run: RunConfig, steps: int, *, n_micro: int = 1) -> list[float]:
    """Loss per step of one process: plain autograd, torch's AdamW and clipping, nothing of ours that calls experts."""
    model = Transformer(
        run.model,
        lambda layer: LocalMoE(run.model, layer, run=run.name, seed=run.seed, backend="reference"),
        seed=run.seed,
    )
    batches = text_batches(run, n_micro=n_micro)
    config = run.optimizer
    optimizer = torch.optim.AdamW(model.parameter_groups(config), betas=(config.beta1, config.beta2), eps=config.eps)
    experts = [module for module in model.modules() if isinstance(module, LocalMoE)]
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(n_micro):
            rows = torch.from_numpy(batches.batch(BatchId(step, 0, micro)))
            logits, routings = model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            extra = sum(auxiliary_loss(r.balance_loss, r.z_loss, run.model.router) for r in routings)
            ((loss + extra) / n_micro).backward()
            total += loss.item() / n_micro
        limit = config.clip_norm or float("inf")
        nn.utils.clip_grad_norm_(model.trunk_parameters().values(), limit)
        for moe in experts:
            for e in range(run.model.n_experts):
                norm = torch.sqrt(moe.w_in_EDH.grad[e].square().sum() + moe.w_out_EFD.grad[e].square().sum())
                scale = min(1.0, limit / (float(norm) + 1e-6))
                moe.w_in_EDH.grad[e] *= scale
                moe.w_out_EFD.grad[e] *= scale
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        optimizer.step()
        losses.append(total)
    return losses


@asynccontextmanager
async def serve(
    run: RunConfig, *, n_peers: int, replicas: int = 1, load: Path | None = None
) -> AsyncIterator[dict[str, ExpertServer]]:
    """Expert servers on free ports of this machine; peer p hosts index i when i % n_peers == p (and the next ones).

    With `load`, their experts are those of a checkpoint.
    """
    servers: dict[str, ExpertServer] = {}
    try:
        for p in range(n_peers):
            mine = [e for e in run.model.expert_ids if (p - e.index) % n_peers < replicas]
            host = ExpertHost(make_banks(run, mine))
            if load is not None:
                load_experts(host, run, load)
            server = ExpertServer(host, run=run, peer_id=f"peer-{p}")
            await server.start("127.0.0.1:0")
            servers[f"peer-{p}"] = server
        yield servers
    finally:
        for server in servers.values():
            await server.stop(grace_s=1.0)


@contextmanager
def remote_link(
    run: RunConfig, *, n_peers: int, replicas: int = 1, load: Path | None = None
) -> Iterator[tuple[SwarmLink, GrpcTransport]]:
    """A SwarmLink to real servers, every call over gRPC."""
    with Portal() as portal:
        serving = serve(run, n_peers=n_peers, replicas=replicas, load=load)
        servers = portal.run(serving.__aenter__())
        peers = [
            PeerInfo(
                peer_id=name,
                address=server.address,
                experts=tuple(e for e in run.model.expert_ids if (int(name[5:]) - e.index) % n_peers < replicas),
            )
            for name, server in servers.items()
        ]
        view = View(peers)
        transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
        try:
            swarm = ExpertSwarm(trainer="test", transport=transport, view=lambda: view, encoding=run.wire_encoding)
            yield SwarmLink(swarm=swarm, runner=portal), transport
        finally:
            portal.run(transport.close())
            portal.run(serving.__aexit__(None, None, None))


def make_trainer(run: RunConfig, link: SwarmLink, *, n_micro: int = 1, in_flight: int = 1) -> Trainer:
    """With several in flight, close it (`with`): it has threads then."""
    return Trainer(
        run=run, model=build_model(run, link), link=link, batches=text_batches(run), n_micro=n_micro,
        in_flight=in_flight,
    )  # fmt: skip

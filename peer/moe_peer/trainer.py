"""One trainer's arithmetic: micro-batches, losses, gradients, the optimizer step, the commit. No process set-up here.

B sequences of a micro-batch, S positions, T tokens, V vocabulary.

Gradients are of the SUM of the token losses, everywhere: the trunk divides by the step's tokens before its update,
experts divide by the committed tokens before theirs. So a step's arithmetic does not depend on how it
is cut into micro-batches or dealt out to trainers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_net.config import RunConfig
from moe_net.data.batches import Batches, BatchId
from moe_net.model.losses import auxiliary_loss
from moe_net.model.remote_moe import RemoteMoE, SwarmLink
from moe_net.model.transformer import Transformer
from moe_peer.cut import Cut
from moe_peer.pipeline import Pipeline
from moe_peer.tuning import Tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Means over a step's tokens; the router's losses are means over the MoE layers too."""

    loss: float
    """Cross-entropy, nats per token."""
    balance_loss: float
    z_loss: float
    grad_norm: float
    """Of the trunk, before clipping."""
    tokens: int
    overflowed_pairs: int
    """(token, expert) pairs that the capacity factor left out."""
    moved_pairs: int
    """Pairs whose expert was chosen only because of the latency bias."""
    load_LE: Tensor
    """float [MoE layers, experts]: pairs per expert."""
    in_flight: int = 1
    """Micro-batches at once."""
    wait_s: float = 0.0
    """Nothing was computed here, because every micro-batch in flight waited for its experts."""


def build_model(run: RunConfig, link: SwarmLink) -> Transformer:
    """The run's trunk, initialised from its seed, with remote experts."""
    return Transformer(run.model, lambda layer: RemoteMoE(run.model, layer, link), seed=run.seed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One micro-batch, done."""

    sums: Tensor
    """float64 [3]: cross-entropy, balance loss and z-loss, each times the tokens."""
    tokens: int
    overflowed: int
    moved: int
    load_LE: Tensor
    gradients: tuple[Tensor | None, ...]
    """One per parameter of the trunk."""


class Trainer:
    """Trunk, its optimizer, and the trainer's place in the data. A context manager: it owns the pipeline's threads."""

    def __init__(
        self,
        *,
        run: RunConfig,
        model: Transformer,
        link: SwarmLink,
        batches: Batches,
        index: int = 0,
        n_micro: int = 1,
        in_flight: int = 1,
        choices: Sequence[Cut] = (),
    ) -> None:
        """`choices`: the cuts of which one is chosen after a few steps; until then it is n_micro and in_flight."""
        self.run = run
        self.model = model
        self.step = 0
        """The next step to make."""
        self._link = link
        self.batches = batches.cut(n_micro)
        self.in_flight = in_flight
        """Micro-batches at once."""
        self._index = index
        self._pipeline = Pipeline(link.runner)
        self._tuning = Tuning(choices) if len(choices) > 1 else None
        self._pipeline.keep_waits = self._tuning is not None
        self._moe = [module for module in model.modules() if isinstance(module, RemoteMoE)]
        for moe in self._moe:
            moe.link = replace(link, runner=self._pipeline)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            model.parameter_groups(run.optimizer),
            lr=run.optimizer.learning_rate,
            betas=(run.optimizer.beta1, run.optimizer.beta2),
            eps=run.optimizer.eps,
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipeline.close()

    def train_step(self) -> StepResult:
        """Make step `self.step`: forward and backward of its micro-batches, trunk update, commit to the peers.

        NoLiveExpertsError, with nothing changed, when a layer has none; once gradients are with the peers, the step is
        made of the micro-batches that are whole. CancelledError, with nothing changed here, when the link's runner ends
        the waiting; what peers have summed up for the step is never committed.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64)
        tokens = overflowed = moved = 0
        load_LE = torch.zeros(len(self._moe), self.run.model.n_experts)
        for moe in self._moe:
            moe.step = self.step

        def take(part: _Part) -> None:
            nonlocal sums, tokens, overflowed, moved
            sums += part.sums
            tokens += part.tokens
            overflowed += part.overflowed
            moved += part.moved
            load_LE.add_(part.load_LE)
            self._add_gradients(part.gradients)

        in_flight, waits = self.in_flight, self._pipeline.waits
        idle_s, started_s = waits.idle_s, time.perf_counter()
        self._pipeline.each(self._micro_batch, take, n=self.batches.n_micro, in_flight=in_flight)
        wait_s = waits.idle_s - idle_s
        if self._tuning is not None:
            self._tune(self._tuning, time.perf_counter() - started_s - wait_s)
        # Before anything changes: a step that is given up (see `Waits`) is given up here at the latest.
        self._link.runner.run(asyncio.sleep(0))
        grad_norm = self._update_trunk(tokens)
        # From here on the step is made, also when we are asked to stop and wait for nobody's answer.
        with suppress(CancelledError):
            self._link.runner.run(self._link.swarm.commit(self.step, tokens))
        for moe, load_E in zip(self._moe, load_LE, strict=True):
            moe.router.update_balance_bias(load_E, self._link.swarm.live(moe.layer, moe.n_experts))
        self.step += 1
        loss_mean, balance_mean, z_mean = (sums / tokens).tolist()
        return StepResult(
            loss=loss_mean, balance_loss=balance_mean, z_loss=z_mean, grad_norm=grad_norm, tokens=tokens,
            overflowed_pairs=overflowed, moved_pairs=moved, load_LE=load_LE, in_flight=in_flight, wait_s=wait_s,
        )  # fmt: skip

    def _micro_batch(self, micro: int) -> _Part:
        """Forward and backward of one micro-batch; on a thread of the pipeline when several are in flight."""
        rows = torch.from_numpy(self.batches.batch(BatchId(self.step, self._index, micro)))
        inputs_BS, targets_BS = rows[:, :-1], rows[:, 1:]
        n = targets_BS.numel()
        with nullcontext() if self._tuning is None else self._tuning.noting_graph(self._parameters, len(rows)):
            logits_BSV, routings = self.model(inputs_BS, generator=self._jitter_generator(micro))
        loss = F.cross_entropy(logits_BSV.reshape(n, -1).float(), targets_BS.reshape(n), reduction="sum")
        total = loss
        sums = torch.zeros(3, dtype=torch.float64)
        sums[0] = loss.detach().double()
        for routing in routings:
            balance, z = routing.balance_loss, routing.z_loss
            total = total + n * auxiliary_loss(balance, z, self.run.model.router)
            sums[1:] += n / len(routings) * torch.stack([balance.detach(), z.detach()]).double()
        self._pipeline.pass_return()
        return _Part(
            # Not `backward()`, which adds to the parameters in the order in which micro-batches come back.
            gradients=torch.autograd.grad(total, self._parameters, allow_unused=True),
            sums=sums,
            tokens=n,
            overflowed=sum(int(routing.overflow) for routing in routings),
            moved=sum(int(routing.moved) for routing in routings),
            load_LE=torch.stack([routing.load_E for routing in routings]) if routings else torch.zeros(0),
        )

    def _add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if p.grad is None:
                # A copy: autograd may give two parameters one tensor, or an expanded one.
                p.grad = torch.empty_like(p).copy_(gradient)
            else:
                p.grad += gradient

    def _tune(self, tuning: Tuning, compute_s: float) -> None:
        waits = self._pipeline.waits
        tuning.note(compute_s, waits.network_s)
        waits.network_s = []
        if tuning.is_complete:
            cut = tuning.choose(self.batches.sequences_per_step, trips=2 * len(self._moe))
            self.batches, self.in_flight = self.batches.cut(cut.micro_batches), cut.in_flight
            self._tuning, self._pipeline.keep_waits = None, False

    def _jitter_generator(self, micro: int) -> torch.Generator:
        # Keyed by position, not carried along: a resumed run draws what the uninterrupted one would have drawn.
        key = np.random.SeedSequence([self.run.seed, self.step, self._index, micro]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(key) & (2**63 - 1))

    def _update_trunk(self, tokens: int) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for p in parameters:
            assert p.grad is not None
            p.grad.div_(tokens)
        limit = self.run.optimizer.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.optimizer.lr_at(self.step)
        self.optimizer.step()
        return float(grad_norm)

    def evaluate(self, batches: Iterable[np.ndarray]) -> tuple[float, int]:
        """Sum of the token losses in nats, and the number of tokens, over batches [B, S+1]; as many at once as
        micro-batches of a step."""
        self.model.eval()
        work = list(batches)
        total, tokens = 0.0, 0

        @torch.no_grad()  # here, for it holds for one thread
        def evaluate_one(i: int) -> tuple[float, int]:
            rows = torch.from_numpy(work[i])
            targets_BS = rows[:, 1:]
            logits_BSV, _ = self.model(rows[:, :-1])
            n = targets_BS.numel()
            return float(F.cross_entropy(logits_BSV.reshape(n, -1).float(), targets_BS.reshape(n), reduction="sum")), n

        def take(part: tuple[float, int]) -> None:
            nonlocal total, tokens
            total += part[0]
            tokens += part[1]

        self._pipeline.each(evaluate_one, take, n=len(work), in_flight=self.in_flight)
        return total, tokens

"""One trainer's arithmetic: micro-batches, losses, gradients, the optimizer step, the commit. No process set-up here.

B sequences of a micro-batch, S positions, T tokens, V vocabulary.

Gradients are of the SUM of the token losses, everywhere: the trunk divides by the step's tokens before its update,
experts divide by the committed tokens before theirs (design, D6). So a step's arithmetic does not depend on how it
is cut into micro-batches or dealt out to trainers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_net.config import RunConfig
from moe_net.data.batches import Batches, BatchId
from moe_net.errors import NoLiveExpertsError
from moe_net.model.losses import auxiliary_loss
from moe_net.model.remote_moe import RemoteMoE, SwarmLink
from moe_net.model.transformer import Transformer


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
    load_LE: Tensor
    """float [MoE layers, experts]: pairs per expert."""


def build_model(run: RunConfig, link: SwarmLink) -> Transformer:
    """The run's trunk, initialised from its seed, with remote experts."""
    return Transformer(run.model, lambda layer: RemoteMoE(run.model, layer, link), seed=run.seed)


class Trainer:
    """Trunk, its optimizer, and the trainer's place in the data."""

    def __init__(
        self, *, run: RunConfig, model: Transformer, link: SwarmLink, batches: Batches, index: int = 0, n_micro: int = 1
    ) -> None:
        self.run = run
        self.model = model
        self.step = 0
        """The next step to make."""
        self._link = link
        self.batches = batches
        self._index = index
        self._n_micro = n_micro
        self._moe = [module for module in model.modules() if isinstance(module, RemoteMoE)]
        self.optimizer = torch.optim.AdamW(
            model.parameter_groups(run.optimizer),
            lr=run.optimizer.learning_rate,
            betas=(run.optimizer.beta1, run.optimizer.beta2),
            eps=run.optimizer.eps,
        )

    def train_step(self) -> StepResult:
        """Make step `self.step`: forward and backward of its micro-batches, trunk update, commit to the peers.

        NoLiveExpertsError, with nothing changed, when a layer has none; from the second micro-batch on, the step is
        made of those before.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64)
        tokens = overflowed = 0
        load_LE = torch.zeros(len(self._moe), self.run.model.n_experts)
        for moe in self._moe:
            moe.step = self.step
        for micro in range(self._n_micro):
            rows = torch.from_numpy(self.batches.batch(BatchId(self.step, self._index, micro)))
            inputs_BS, targets_BS = rows[:, :-1], rows[:, 1:]
            n = targets_BS.numel()
            try:
                logits_BSV, routings = self.model(inputs_BS, generator=self._jitter_generator(micro))
            except NoLiveExpertsError:
                if tokens == 0:
                    raise
                break  # The gradients of the first micro-batches are with the peers already: the step ends with them.
            loss = F.cross_entropy(logits_BSV.reshape(n, -1).float(), targets_BS.reshape(n), reduction="sum")
            total = loss
            for i, routing in enumerate(routings):
                balance, z = routing.balance_loss, routing.z_loss
                total = total + n * auxiliary_loss(balance, z, self.run.model.router)
                sums[1:] += n / len(routings) * torch.stack([balance.detach(), z.detach()]).double()
                overflowed += int(routing.overflow)
                load_LE[i] += routing.load_E
            total.backward()
            sums[0] += loss.detach().double()
            tokens += n
        grad_norm = self._update_trunk(tokens)
        self._link.runner.run(self._link.swarm.commit(self.step, tokens))
        for moe, load_E in zip(self._moe, load_LE, strict=True):
            moe.router.update_balance_bias(load_E, self._link.swarm.live(moe.layer, moe.n_experts))
        self.step += 1
        loss_mean, balance_mean, z_mean = (sums / tokens).tolist()
        return StepResult(
            loss=loss_mean, balance_loss=balance_mean, z_loss=z_mean, grad_norm=grad_norm, tokens=tokens,
            overflowed_pairs=overflowed, load_LE=load_LE,
        )  # fmt: skip

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

    @torch.no_grad()
    def evaluate(self, batches: Iterable[np.ndarray]) -> tuple[float, int]:
        """Sum of the token losses in nats, and the number of tokens, over batches [B, S+1]."""
        self.model.eval()
        total, tokens = 0.0, 0
        for batch in batches:
            rows = torch.from_numpy(batch)
            targets_BS = rows[:, 1:]
            logits_BSV, _ = self.model(rows[:, :-1])
            n = targets_BS.numel()
            total += float(F.cross_entropy(logits_BSV.reshape(n, -1).float(), targets_BS.reshape(n), reduction="sum"))
            tokens += n
        return total, tokens

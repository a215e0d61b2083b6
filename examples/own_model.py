"""Remote experts inside your own PyTorch model. Runs as it is, with every expert in this process:

    python examples/own_model.py

With the address of a run, its peers do the work instead (of its layer 0; global_batch_tokens should be 256):

    python examples/own_model.py 127.0.0.1:7700
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from moe_net.client import host_here, join_run
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.model.remote_moe import RemoteMoE, SwarmLink
from moe_net.optim import OptimizerConfig

ROWS, D_MODEL, STEPS = 256, 64, 200
RUN = RunConfig(
    name="own-model",
    model=ModelConfig(d_model=D_MODEL, n_layers=1, n_experts=8, d_ff_expert=128, router=RouterConfig(z_loss=1e-3)),
    optimizer=OptimizerConfig(learning_rate=3e-3, total_steps=STEPS),
    global_batch_tokens=ROWS,
)


class Regressor(nn.Module):
    """A linear layer, a mixture of experts somewhere, a linear layer."""

    def __init__(self, run: RunConfig, link: SwarmLink) -> None:
        super().__init__()
        self.before = nn.Linear(4, run.model.d_model)
        self.moe = RemoteMoE(run.model, layer=0, link=link)
        self.after = nn.Linear(run.model.d_model, 1)
        self.jitter = torch.Generator().manual_seed(0)  # of the router's noise, in runs that have it

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.before(x)
        y, routing = self.moe(h[None], generator=self.jitter)  # (batch, positions, d_model)
        config = self.moe.router.config
        return self.after(h + y[0]), config.balance_loss * routing.balance_loss + config.z_loss * routing.z_loss


def train(run: RunConfig, link: SwarmLink) -> tuple[float, float]:
    """First and last loss."""
    torch.manual_seed(0)
    model = Regressor(run, link)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for step in range(STEPS):
        x = torch.randn(ROWS, 4)
        target = x[:, :1] * x[:, 1:2] + x[:, 2:3].abs()
        model.moe.step = step
        prediction, router_loss = model(x)
        loss = (prediction - target).square().mean()
        optimizer.zero_grad()
        # Experts divide by the tokens of the commit: give them the gradient of the sum.
        (ROWS * (loss + router_loss)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= ROWS
        optimizer.step()
        link.runner.run(link.swarm.commit(step, ROWS))
        losses.append(loss.item())
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with join_run(sys.argv[1:], trainer="own-model") as member:
            train(member.run, member.link)
    else:
        with host_here(RUN, n_peers=2) as here:
            train(RUN, here)

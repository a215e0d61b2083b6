"""The way of an MoE layer's tokens to experts that see another width than the trunk, and back.

B sequences, S positions, T = B * S tokens, D model width, L expert width.
"""

# pyright: basic
from __future__ import annotations

from torch import Tensor, nn

from moe_net.model.config import ModelConfig
from moe_net.model.init import normal_


class LatentProjections(nn.Module):
    """Two linear maps of the trunk around the experts (LatentMoE, arXiv 2601.18089); without parameters, both are the
    identity where `expert_width` is `d_model`."""

    def __init__(self, config: ModelConfig, layer: int, *, seed: int = 0) -> None:
        """`layer` and `seed` key the initial weights."""
        super().__init__()
        d_model, width = config.d_model, config.expert_shape.d_model
        self.down_proj = nn.Identity() if width == d_model else nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Identity() if width == d_model else nn.Linear(width, d_model, bias=False)
        # The name that it has in a Transformer, which draws it anew from its own seed.
        for name, parameter in self.named_parameters():
            normal_(parameter, seed=seed, name=f"layers.{layer}.mlp.latent.{name}", std=config.init_std)

    def down(self, h_BSD: Tensor) -> Tensor:
        """The rows that experts see, [T, L]."""
        return self.down_proj(h_BSD.reshape(-1, h_BSD.shape[-1]))

    def up(self, y_TL: Tensor, h_BSD: Tensor) -> Tensor:
        """What the experts made of `down(h_BSD)`, in h's shape and dtype."""
        return self.up_proj(y_TL.to(h_BSD.dtype)).to(h_BSD.dtype).view_as(h_BSD)

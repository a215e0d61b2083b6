"""RMSNorm, and RMSNorm with rotary positions on the heads of queries and keys, with their gradients by hand.

On a CPU a small trunk takes as long as it has operators, whatever its width, and a wide one as long as it goes through
memory. As autograd has it (one operator after the other, and two for each of them backward), forward and backward of a
norm of [4, 64, 128] and [4, 64, 1024] take 0.10 and 0.97 ms on one core, by hand 0.08 and 0.31; norms and rotation of
a layer's queries and keys (2 heads of 32 and 1) 0.27 and 0.21.

B sequences, S positions, N query heads, G key heads, M = N + G, H head width, D width of a norm.
"""

# pyright: basic
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`, in fp32 inside (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)  # type: ignore[return-value]


def rope_tables(n_positions: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, H/2], of the rotary embedding (Su et al., 2021), on the device and in the dtype of `like`.

    Computed per forward: S * H / 2 angles cost nothing, and the module keeps no buffer to save or to move.
    """
    exponent = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    angle_SH = torch.arange(n_positions, device=like.device, dtype=torch.float32)[:, None] / theta**exponent
    return angle_SH.cos().to(like.dtype), angle_SH.sin().to(like.dtype)


def rotated_norms(
    q_BSNH: Tensor, k_BSGH: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, cos_SH: Tensor, sin_SH: Tensor
) -> tuple[Tensor, Tensor]:
    """(q_BSNH, k_BSGH): each head normed by its norm, then rotated in the pairs (i, i + H/2), which is the half-split
    layout of the Hugging Face checkpoints; `cos_SH` and `sin_SH` as `rope_tables` gives them."""
    assert q_norm.eps == k_norm.eps
    return _RotatedNorms.apply(  # type: ignore[return-value]
        q_BSNH, k_BSGH, q_norm.weight, k_norm.weight, cos_SH, sin_SH, q_norm.eps
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """[..., 1]."""
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _grad_through_rms(grad: Tensor, normed: Tensor, inverse_rms: Tensor) -> Tensor:
    """Of `x`, for `grad` of `normed = x * inverse_rms(x)`; `grad` is used up."""
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, along, value=-1).mul_(inverse_rms)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = _wide(x)
        inverse_rms = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight_D, inverse_rms)
        return (wide * inverse_rms).to(x.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_D, inverse_rms = ctx.saved_tensors
        normed, grad = _wide(x) * inverse_rms, _wide(grad)
        d_weight_D = (grad * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        return _grad_through_rms(grad * weight_D, normed, inverse_rms).to(x.dtype), d_weight_D, None


class _RotatedNorms(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q_BSNH: Tensor, k_BSGH: Tensor, q_weight_H: Tensor, k_weight_H: Tensor, cos_SH: Tensor,
        sin_SH: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n_heads = q_BSNH.shape[2]
        x_BSMH = torch.cat((q_BSNH, k_BSGH), 2)
        wide_BSMH = _wide(x_BSMH)
        inverse_rms_BSM1 = _inverse_rms(wide_BSMH, eps)
        weight_MH = torch.cat((q_weight_H.expand(n_heads, -1), k_weight_H.expand(k_BSGH.shape[2], -1)))
        ctx.save_for_backward(x_BSMH, inverse_rms_BSM1, weight_MH, cos_SH, sin_SH)
        ctx.n_heads = n_heads
        y_BSMH = (wide_BSMH * inverse_rms_BSM1).to(x_BSMH.dtype) * weight_MH
        return _split(_rotated(y_BSMH, cos_SH, sin_SH, 1.0), n_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BSNH: Tensor, dk_BSGH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BSMH, inverse_rms_BSM1, weight_MH, cos_SH, sin_SH = ctx.saved_tensors
        normed_BSMH = _wide(x_BSMH) * inverse_rms_BSM1
        # Back by the same angles.
        grad_BSMH = _rotated(_wide(torch.cat((dq_BSNH, dk_BSGH), 2)), cos_SH, sin_SH, -1.0)
        d_weight_MH = (grad_BSMH * normed_BSMH).flatten(0, 1).sum(0).to(weight_MH.dtype)
        dx_BSMH = _grad_through_rms(grad_BSMH * weight_MH, normed_BSMH, inverse_rms_BSM1).to(x_BSMH.dtype)
        dq_BSNH, dk_BSGH = _split(dx_BSMH, ctx.n_heads)
        dq_weight_H, dk_weight_H = d_weight_MH[: ctx.n_heads].sum(0), d_weight_MH[ctx.n_heads :].sum(0)
        return dq_BSNH, dk_BSGH, dq_weight_H, dk_weight_H, None, None, None


def _split(x_BSMH: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    return x_BSMH[:, :, :n_heads], x_BSMH[:, :, n_heads:]


def _rotated(x_BSMH: Tensor, cos_SH: Tensor, sin_SH: Tensor, direction: float) -> Tensor:
    other_SH = torch.cat((-direction * sin_SH, direction * sin_SH), -1)
    half = x_BSMH.shape[-1] // 2
    turned = x_BSMH * torch.cat((cos_SH, cos_SH), -1)[:, None]
    return turned.addcmul_(x_BSMH.roll(half, -1), other_SH[:, None])

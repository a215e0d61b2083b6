# pyright: basic, reportCallIssue=false
"""The experts' non-linearity and its derivative, as functions of Triton programs; fp32 in and out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(h):
    """Exact (erf) GELU."""
    return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def gelu_slope(h):
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327


@triton.jit
def swiglu(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_slopes(gate, up):
    """(d/dgate, d/dup)."""
    s = tl.sigmoid(gate)
    return s * (1.0 + gate * (1.0 - s)) * up, gate * s

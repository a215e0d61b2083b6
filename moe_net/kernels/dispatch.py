# pyright: basic
"""The experts of one layer applied to rows: `y_t = sum_k gate_tk * expert_{id_tk}(x_t)`, on the best backend there is.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU).

Measured on one core of an AMD EPYC (Zen 5), fp32, forward / forward and backward in ms, torch 2.13; "torch.mm" is the
loop without oneDNN (see `onednn`):

| T, K, E, D, F, activation     | reference + autograd | grouped     | loop, torch.mm | loop        |
| 2048, 2, 4, 512, 2048, GELU   | 165 / 511            | 165 / 554   | 160 / 500      | 84 / 279    |
| 256, 2, 4, 512, 2048, GELU    | 25.4 / 86.1          | 23.0 / 72.8 | 22.9 / 67.9    | 12.7 / 37.4 |
| 128, 1, 2, 128, 1280, SwiGLU  | 1.42 / 5.10          | 1.45 / 4.98 | 1.46 / 4.37    | 0.78 / 2.84 |
| 512, 2, 3, 128, 128, SwiGLU   | 1.22 / 3.67          | 1.33 / 3.76 | 1.14 / 3.51    | 0.72 / 2.41 |

So a CPU loops. What a GPU does is measured in docs/kernels.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_net.kernels import reference
from moe_net.kernels.types import Backend, ExpertWeights, Saved, WeightCall, WeightGrads, Work
from moe_net.types import Activation
from moe_net.wire.matrices import ON_CPU, Matrices

__all__ = [
    "ExpertWeights",
    "Saved",
    "WeightCall",
    "WeightGrads",
    "Work",
    "available",
    "matrices_on",
    "moe_ffn",
    "moe_ffn_backward",
    "moe_ffn_forward",
    "moe_ffn_weight_grads",
]

logger = logging.getLogger(__name__)

# Name -> what has to be installed for it; torch is.
_NEEDS = {"reference": (), "loop": (), "grouped": (), "triton": ("triton",), "quack": ("triton", "quack")}
_TAKES = {
    "grouped": "rows of multiples of 16 bytes",
    "quack": "bf16 or fp16 SwiGLU experts with rows of multiples of 16 bytes and D contiguous in w_in",
}
_MODULES = {"triton": "fused", "quack": "hopper"}

# Fewer pairs than this for an expert: launches and half-empty tiles cost more than the larger products save.
FEW_PAIRS = 64
# And of wide experts (`ExpertWeights.wide`) so few are faster with grouped_mm: Mixtral with 256 each 5.9 ms, and 6.2
# with QuACK (H200).
FEW_WIDE_PAIRS = 512
_logged: set[tuple[str, str, str]] = set()
ResultT = TypeVar("ResultT")

_tried: dict[tuple[Any, ...], bool] = {}
_TRIED_ROWS = 16


@cache
def _installed(backend: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in _NEEDS[backend])


def available() -> tuple[str, ...]:
    """The backends that what is installed here allows; which of them run depends on the device, dtype and shape too."""
    return tuple(backend for backend in _NEEDS if _installed(backend))


@cache
def _load(backend: str) -> Backend:
    """Imported when first used: Triton and QuACK take seconds, which a peer without a GPU need not spend."""
    return importlib.import_module(f"moe_net.kernels.{_MODULES.get(backend, backend)}")  # pyright: ignore


def matrices_on(device: torch.device, dtype: torch.dtype) -> Matrices:
    """What turns a server's messages into rows for experts that compute in `dtype` on `device`, and rows into messages.

    On a GPU they go over in their wire format, a quarter of fp32 for int8; without Triton the CPU reads and writes.
    """
    if device.type != "cuda" or not _installed("triton"):
        return ON_CPU
    made: Matrices | Exception = _attempt(
        lambda: importlib.import_module("moe_net.kernels.device.matrices").OnDevice(device, dtype)
    )
    if not isinstance(made, Exception):
        return made
    logger.warning("Triton is left out, the CPU reads messages: %s: %s", type(made).__name__, made)
    return ON_CPU


def _attempt(work: Callable[[], ResultT]) -> ResultT | Exception:
    """What `work` returns or, as a value, what it raises: a package of another version may fail in any way when it is
    imported, compiled or launched, and must not take the peer down. The one place that catches everything."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return error


def _fits(backend: str, x_TD: Tensor, weights: ExpertWeights) -> bool:
    fits = getattr(_load(backend), "fits", None)
    return fits is None or fits(x_TD, weights)


def candidates(x_TD: Tensor, expert_ids_TK: Tensor, weights: ExpertWeights) -> tuple[str, ...]:
    """The backends for this device, dtype and number of pairs, the fastest first; the last one always runs."""
    if not x_TD.is_cuda or x_TD.dtype is torch.float64:
        return ("loop",)
    # grouped_mm has its own kernel for bf16 on Hopper and newer, and is a loop over experts elsewhere. The
    # capabilities of AMD's cards are other numbers.
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(x_TD.device)[0] >= 9
    native = hopper and x_TD.dtype is torch.bfloat16
    n_pairs, n_experts = expert_ids_TK.numel(), weights.w_in_EDH.shape[0]
    if native and n_pairs >= FEW_PAIRS * n_experts:
        few_wide = weights.wide and n_pairs < FEW_WIDE_PAIRS * n_experts
        return ("grouped", "triton", "loop") if few_wide else ("quack", "grouped", "triton", "loop")
    return ("triton", "grouped", "loop") if native else ("triton", "loop")


def _fastest(x_TD: Tensor, expert_ids_TK: Tensor, weights: ExpertWeights) -> str:
    *others, last = candidates(x_TD, expert_ids_TK, weights)
    return next((name for name in others if _installed(name) and _runs(name, x_TD, weights)), last)


def _runs(backend: str, x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether the backend takes rows and experts like these, and has been seen to: tried once for each kind of them, on
    one expert, for a package of another version may fail in any way when it is imported, compiled or launched."""
    w_in_EDH, w_out_EFD, activation = weights
    key = (
        backend, x_TD.device, x_TD.dtype, activation, *w_in_EDH.shape[1:],
        w_in_EDH.is_contiguous(), w_in_EDH.transpose(1, 2).is_contiguous(), w_out_EFD.is_contiguous(),
    )  # fmt: skip
    if key not in _tried:
        outcome = _attempt(lambda: _fits_and_runs(backend, x_TD, weights))
        if isinstance(outcome, Exception):
            logger.warning("expert kernels: backend %s is left out: %s: %s", backend, type(outcome).__name__, outcome)
        _tried[key] = outcome is True
    return _tried[key]


def _fits_and_runs(backend: str, x_TD: Tensor, weights: ExpertWeights) -> bool:
    if not _fits(backend, x_TD, weights):
        return False
    _try(_load(backend), x_TD, weights)
    return True


@torch.no_grad()
def _try(backend: Backend, x_TD: Tensor, weights: ExpertWeights) -> None:
    """Forward and backward of a few rows; waits for them."""
    one = ExpertWeights(weights.w_in_EDH[:1], weights.w_out_EFD[:1], weights.activation)
    x_PD = x_TD.new_zeros((_TRIED_ROWS, x_TD.shape[1]))
    ids_PK = torch.zeros((_TRIED_ROWS, 1), dtype=torch.int32, device=x_TD.device)
    gates_PK = torch.ones((_TRIED_ROWS, 1), device=x_TD.device)
    y_PD, saved = backend.forward(x_PD, ids_PK, gates_PK, one, keep=True)
    dy_PD = torch.zeros_like(y_PD)
    *_, work = backend.backward_rows(dy_PD, x_PD, ids_PK, gates_PK, one, saved)
    backend.weight_grads([WeightCall(dy_PD, x_PD, ids_PK, work)], one)
    if x_TD.is_cuda:
        torch.cuda.synchronize(x_TD.device)


def choose(x_TD: Tensor, expert_ids_TK: Tensor, weights: ExpertWeights, backend: str | None) -> Backend:
    """The backend asked for, or the fastest one for this device, dtype and shape."""
    if backend is None:
        backend = _fastest(x_TD, expert_ids_TK, weights)
    elif backend not in available():
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(available())}")
    elif not _fits(backend, x_TD, weights):
        sizes = f"D={x_TD.shape[1]}, F={weights.w_out_EFD.shape[1]} {weights.activation.value} {x_TD.dtype}"
        raise ValueError(f"backend {backend!r} takes {_TAKES[backend]}, not {sizes}")
    key = (backend, x_TD.device.type, str(x_TD.dtype))
    if key not in _logged:
        _logged.add(key)
        logger.info("expert kernels: backend %s for %s, %s", *key)
    return _load(backend)


def _check(x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights) -> None:
    """ValueError unless shapes and dtypes fit together."""
    n_experts, d_model, d_hidden = weights.w_in_EDH.shape
    d_ff = d_hidden // 2 if weights.activation is Activation.SWIGLU else d_hidden
    if weights.w_out_EFD.shape != (n_experts, d_ff, d_model):
        raise ValueError(
            f"w_out is {list(weights.w_out_EFD.shape)}, but w_in {list(weights.w_in_EDH.shape)} "
            f"and {weights.activation.value} need {[n_experts, d_ff, d_model]}"
        )
    if x_TD.ndim != 2 or x_TD.shape[1] != d_model:
        raise ValueError(f"x is {list(x_TD.shape)}, but the experts take [T, {d_model}]")
    if expert_ids_TK.ndim != 2 or expert_ids_TK.shape[0] != x_TD.shape[0] or gates_TK.shape != expert_ids_TK.shape:
        raise ValueError(
            f"ids {list(expert_ids_TK.shape)} and gates {list(gates_TK.shape)} must both be [{x_TD.shape[0]}, K]"
        )
    if expert_ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert ids are {expert_ids_TK.dtype}, not int32 or int64")
    if not x_TD.dtype == weights.w_in_EDH.dtype == weights.w_out_EFD.dtype:
        raise ValueError(
            f"x, w_in and w_out are {x_TD.dtype}, {weights.w_in_EDH.dtype} and {weights.w_out_EFD.dtype}: "
            "they must be the same"
        )


@torch.no_grad()
def moe_ffn_forward(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    *,
    keep: bool,
    backend: str | None = None,
) -> tuple[Tensor, Saved | None]:
    """Row sums y [T, D] in x's dtype, and with `keep` what the backward can use again.

    Ids are int32 or int64; -1 is padding and adds nothing (its gate must be finite). Any other id outside 0..E-1 is a
    ValueError with "loop", padding with the others, which do not wait for the device to look. No autograd here.
    """
    _check(x_TD, expert_ids_TK, gates_TK, weights)
    x_TD, expert_ids_TK, gates_TK = x_TD.contiguous(), expert_ids_TK.contiguous(), gates_TK.contiguous()
    return choose(x_TD, expert_ids_TK, weights, backend).forward(x_TD, expert_ids_TK, gates_TK, weights, keep=keep)


@torch.no_grad()
def moe_ffn_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
    *,
    rows: bool = True,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor, Work]:
    """(dx [T, D], dgates [T, K], what `moe_ffn_weight_grads` needs of this call); without `rows` the last one only.

    `saved` comes from a forward of the same arguments and is used up; without it (or if another backend saved it) the
    pre-activations are computed again, to the same values. dgates is 0 for padding.
    """
    _check(x_TD, expert_ids_TK, gates_TK, weights)
    if dy_TD.shape != x_TD.shape or dy_TD.dtype != x_TD.dtype:
        raise ValueError(f"dy is {dy_TD.dtype} {list(dy_TD.shape)}, but x is {x_TD.dtype} {list(x_TD.shape)}")
    module, saved = _of_backward(x_TD, expert_ids_TK, weights, saved, backend)
    dy_TD, x_TD, expert_ids_TK, gates_TK = (v.contiguous() for v in (dy_TD, x_TD, expert_ids_TK, gates_TK))
    return module.backward_rows(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved, rows=rows)


@torch.no_grad()
def moe_ffn_weight_grads(
    calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
) -> WeightGrads:
    """The weights' gradients, summed over the calls in their order, those of one backend after those of another: the
    same bits for the same calls in the same order. At least one call, and each with at least one pair. fp32, or on a
    GPU the dtype of the weights. `into`: memory of fp32 that may be used for them; new memory is touched page by page,
    which takes longer than the products of few rows."""
    of_backend: dict[str, list[WeightCall]] = {}
    for dy_TD, x_TD, expert_ids_TK, work in calls:
        dense = WeightCall(dy_TD.contiguous(), x_TD.contiguous(), expert_ids_TK.contiguous(), work)
        of_backend.setdefault(work.backend, []).append(dense)
    # A GPU's few pairs and its many have other backends, each with its own layout of what it keeps: each its products.
    (name, first), *others = of_backend.items()
    grads = _load(name).weight_grads(first, weights, into=into)
    for name, of_one in others:
        new = _load(name).weight_grads(of_one, weights)
        dtype = torch.promote_types(grads.w_in_EDH.dtype, torch.float32)
        grads = WeightGrads(*(one.to(dtype).add_(other) for one, other in zip(grads, new, strict=True)))
    return grads


def _of_backward(
    x_TD: Tensor, expert_ids_TK: Tensor, weights: ExpertWeights, saved: Saved | None, backend: str | None
) -> tuple[Backend, Saved | None]:
    """Who makes the backward, and of what was saved what it can use."""
    module = choose(x_TD, expert_ids_TK, weights, backend or (saved.backend if saved is not None else None))
    if saved is not None and (saved.backend != module.NAME or saved.used_up):
        saved = None
    return module, saved


class _MoeFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, expert_ids_TK, gates_TK, w_in_EDH, w_out_EFD, activation, backend):
        weights = ExpertWeights(w_in_EDH, w_out_EFD, activation)
        y_TD, saved = moe_ffn_forward(x_TD, expert_ids_TK, gates_TK, weights, keep=True, backend=backend)
        ctx.activation = activation
        ctx.saved_as = None if saved is None else (saved.backend, saved.routing)
        blocks = () if saved is None else saved.blocks
        ctx.save_for_backward(x_TD, expert_ids_TK, gates_TK, w_in_EDH, w_out_EFD, *blocks)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x_TD, expert_ids_TK, gates_TK, w_in_EDH, w_out_EFD, *blocks = ctx.saved_tensors
        saved = None if ctx.saved_as is None else Saved(ctx.saved_as[0], ctx.saved_as[1], tuple(blocks))
        weights = ExpertWeights(w_in_EDH, w_out_EFD, ctx.activation)
        fresh = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        module, saved = _of_backward(x_TD, expert_ids_TK, weights, saved, None)
        dy_TD, x_TD, expert_ids_TK, gates_TK = (v.contiguous() for v in (dy_TD, x_TD, expert_ids_TK, gates_TK))
        dx_TD, dgates_TK, new = module.backward(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved, fresh=fresh)
        dw_in_EDH, dw_out_EFD = (None, None) if new is None else new
        return dx_TD, None, dgates_TK, dw_in_EDH, dw_out_EFD, None, None


def moe_ffn(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, backend: str | None = None
) -> Tensor:
    """y [T, D], differentiable once in x, gates and both weights ("reference" any number of times).

    Ids as in `moe_ffn_forward`. Backward keeps the inputs and the [P, H] pre-activations, and computes the activation
    again.
    """
    _check(x_TD, expert_ids_TK, gates_TK, weights)
    if choose(x_TD, expert_ids_TK, weights, backend).NAME == reference.NAME:
        return reference.moe_ffn_reference(x_TD, expert_ids_TK, gates_TK, weights)
    inputs = (x_TD, gates_TK, weights.w_in_EDH, weights.w_out_EFD)
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in inputs)):
        return moe_ffn_forward(x_TD, expert_ids_TK, gates_TK, weights, keep=False, backend=backend)[0]
    return _MoeFfn.apply(
        x_TD, expert_ids_TK, gates_TK, weights.w_in_EDH, weights.w_out_EFD, weights.activation, backend
    )

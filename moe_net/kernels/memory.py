"""What experts take on a GPU while they run, counted: for planning how many experts and rows fit.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection, P = T * K.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_net.types import ExpertShape

# Allocations are rounded up to this, and a call has about forty.
_GRAIN_BYTES = 512
_N_ALLOCATIONS = 40


@dataclass(frozen=True, slots=True)
class Rows:
    """What runs at once, and how. ValueError for a backend other than "grouped", "triton" and "quack"."""

    n_tokens: int
    n_choices: int
    n_experts: int
    shape: ExpertShape
    item_bytes: int
    """Of a row's values, and of the weights that compute."""
    backend: str

    def __post_init__(self) -> None:
        if self.backend not in ("grouped", "triton", "quack"):
            raise ValueError(f"nothing is known about the memory of backend {self.backend!r}")

    @property
    def n_pairs(self) -> int:
        return self.n_tokens * self.n_choices

    @property
    def y_TD(self) -> int:
        return self.n_tokens * self.shape.d_model * self.item_bytes

    @property
    def row_PD(self) -> int:
        return self.n_choices * self.y_TD

    @property
    def h_PH(self) -> int:
        return self.n_pairs * self.shape.d_hidden * self.item_bytes

    @property
    def a_PF(self) -> int:
        return self.n_pairs * self.shape.d_ff * self.item_bytes

    @property
    def gates(self) -> int:
        return self.n_pairs * 4

    @property
    def partial(self) -> int:
        """Parts of the gates' gradients, until these are summed up; "grouped" has none."""
        if self.backend == "grouped":
            return 0
        return self.gates * (1 if self.backend == "quack" else max(1, -(-self.shape.d_ff // 128)))

    @property
    def routing(self) -> int:
        """Pairs, rows and places, and bounds."""
        return 3 * self.n_pairs * 4 + 3 * self.n_experts * 4

    def dw(self, width: int, item_bytes: int) -> int:
        """A gradient of one of the two weights, `width` of whose sides is not D."""
        return self.n_experts * self.shape.d_model * width * item_bytes


def autograd_bytes(rows: Rows, *, fresh: bool) -> int:
    """Most memory that forward and backward hold at once under autograd (`types.Backend.backward`, with or without the
    weights' gradients), beside x, dy, ids, gates and weights."""
    dw_in, dw_out = (fresh * rows.dw(width, rows.item_bytes) for width in (rows.shape.d_hidden, rows.shape.d_ff))
    gates, partial = rows.gates, rows.partial
    last = dw_in + dw_out + rows.row_PD + max(rows.h_PH, rows.y_TD + gates)
    if rows.backend == "grouped":
        moments = [
            rows.row_PD + rows.a_PF + gates + rows.h_PH + max(rows.h_PH, dw_out),
            rows.h_PH + gates + rows.row_PD + dw_in + dw_out,
            last + gates,
        ]
    else:
        moments = [rows.h_PH + rows.a_PF + partial + max(rows.h_PH, dw_out), last + partial]
    return _kept(rows) + max(_forward(rows), *moments)


def dispatch_bytes(rows: Rows) -> int:
    """Most memory that forward and backward of a server's call hold at once, with all that it keeps for the weights'
    gradients, beside x, dy, ids, gates and weights."""
    work = rows.a_PF + rows.h_PH
    dy_PD = rows.row_PD if rows.backend == "grouped" else 0
    moments = [
        dy_PD + work + rows.h_PH + max(rows.partial, rows.gates),
        work + rows.partial + rows.row_PD + rows.y_TD + rows.gates,
    ]
    return _kept(rows) + max(_forward(rows), *moments)


def weight_grads_bytes(rows: Rows, *, merged: bool) -> int:
    """Most memory that the weights' gradients of calls, `rows` all together, and what they are made of hold at once,
    beside these calls with what they keep. `merged`: of several calls, whose parts are first brought together."""
    grad_bytes = 4 if rows.backend == "triton" else rows.item_bytes
    dw_in, dw_out = (rows.dw(width, grad_bytes) for width in (rows.shape.d_hidden, rows.shape.d_ff))
    spread = rows.row_PD if rows.backend == "grouped" else 0
    if not merged:
        return spread + dw_in + dw_out
    own = 2 * rows.y_TD + rows.a_PF + rows.h_PH
    moments = [own + rows.h_PH + rows.gates, own + spread + dw_out, rows.y_TD + rows.h_PH + spread + dw_out + dw_in]
    return rows.routing + _N_ALLOCATIONS * _GRAIN_BYTES + max(moments)


def _forward(rows: Rows) -> int:
    return rows.h_PH + rows.a_PF + rows.row_PD


def _kept(rows: Rows) -> int:
    """Until the end; the pre-activations are there only until their gradients are."""
    return rows.routing + rows.y_TD + _N_ALLOCATIONS * _GRAIN_BYTES

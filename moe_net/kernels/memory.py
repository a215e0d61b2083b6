"""What a dispatch takes on a GPU, counted: for planning how many experts and rows fit.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection, P = T * K.
"""

from __future__ import annotations

from moe_net.types import ExpertShape

# Allocations are rounded up to this, and a call has about forty.
_GRAIN_BYTES = 512
_N_ALLOCATIONS = 40


def dispatch_bytes(
    n_tokens: int,
    n_choices: int,
    n_experts: int,
    shape: ExpertShape,
    *,
    item_bytes: int,
    backend: str,
    fresh: bool,
    early: bool = False,
) -> int:
    """Most memory that forward and backward of `n_tokens` hold at once, beside x, dy, ids, gates and weights.

    `item_bytes` of a row's values; `fresh`: the weights' gradients are new tensors and not added to the caller's sums
    (`types.Backend.backward`); `early`: rows come back before them, while all that they are made of is there.
    ValueError for a backend other than "grouped", "triton" and "quack".
    """
    n_pairs = n_tokens * n_choices
    d_hidden = shape.d_hidden
    row_PD = n_pairs * shape.d_model * item_bytes
    h_PH = n_pairs * d_hidden * item_bytes
    a_PF = n_pairs * shape.d_ff * item_bytes
    y_TD = n_tokens * shape.d_model * item_bytes
    dw_in, dw_out = (n_experts * shape.d_model * width * item_bytes for width in (d_hidden, shape.d_ff))
    gates = n_pairs * 4
    # Pairs, rows and places, bounds and y are there until the end; the pre-activations until dh is there.
    kept = 3 * n_pairs * 4 + 3 * n_experts * 4 + y_TD + _N_ALLOCATIONS * _GRAIN_BYTES
    if backend == "grouped":
        # grouped_mm has no output to add to: the gradients exist by themselves before they are added.
        moments = [
            h_PH + row_PD + a_PF,
            h_PH + a_PF + row_PD + h_PH + gates,
            row_PD + a_PF + h_PH + gates + dw_out,
            h_PH + gates + dw_out + row_PD + dw_in,
            gates + (dw_out + dw_in) * fresh + row_PD + max(h_PH, y_TD),
            early * (2 * row_PD + a_PF + h_PH + gates + y_TD),
        ]
    elif backend in ("triton", "quack"):
        new = (dw_in + dw_out) * fresh
        partial = gates if backend == "quack" else n_pairs * 4 * max(1, -(-shape.d_ff // 128))
        moments = [
            h_PH + a_PF + row_PD,
            h_PH + h_PH + a_PF + partial,
            h_PH + a_PF + partial + dw_out * fresh,
            partial + new + row_PD + max(h_PH, y_TD + gates),
            early * (h_PH + a_PF + partial + row_PD + y_TD + gates),
        ]
    else:
        raise ValueError(f"nothing is known about the memory of backend {backend!r}")
    return kept + max(moments)

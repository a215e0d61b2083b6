"""Which rows go to which server, and how the answers come together again. Pure tensor bookkeeping.

T tokens, D model width, K experts per token, R rows sent to one server, P (row, expert) pairs of those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_net.types import Encoding
from moe_net.wire.compress import payload_bytes
from moe_net.wire.messages import RoutedRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shipment:
    """The rows of one call to one server."""

    peer_id: str
    experts: tuple[int, ...]
    """What the server was chosen for; a call that was cut by rows need not use all of them."""
    token_R: Tensor
    """int64, token of each row, ascending."""
    pair_P: Tensor
    """int64, position of each pair in the flattened [T, K] routing, ascending."""
    rows: RoutedRows


def ship(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    pending_TK: Tensor,
    server_of: Mapping[int, str],
    *,
    encoding: Encoding,
    max_tensor_bytes: int,
    max_rows: int,
) -> list[Shipment]:
    """Cut the pending pairs into calls: each token's row goes once to each server that hosts any of its experts.

    `server_of` maps an expert index to the peer that shall run it; pairs of other experts are left out.
    A call stays within `max_tensor_bytes` and `max_rows` (larger ones are cut by rows: a big message blocks a
    connection, and servers refuse one over their limits).
    """
    n_tokens, k = expert_ids_TK.shape
    names = sorted(set(server_of.values()))
    table_E = torch.full((int(expert_ids_TK.max().item()) + 2 if n_tokens else 1,), -1, dtype=torch.int64)
    for expert, name in server_of.items():
        if expert < table_E.numel() - 1:
            table_E[expert] = names.index(name)
    # Index -1 (no expert) reads the table's last entry, which is always -1.
    server_TK = table_E[expert_ids_TK].masked_fill(~pending_TK, -1)
    rows_per_call = min(max_rows, max(1, max_tensor_bytes // max(1, payload_bytes(1, x_TD.shape[1], encoding))))
    shipments: list[Shipment] = []
    for number, name in enumerate(names):
        here_TK = server_TK == number
        experts = tuple(expert for expert, server in server_of.items() if server == name)
        token_all = here_TK.any(dim=1).nonzero().squeeze(1)
        for token_R in token_all.split(rows_per_call):
            if token_R.numel() == 0:
                continue
            here_RK = here_TK[token_R]
            slot_RK = token_R[:, None] * k + torch.arange(k)
            pair_P = slot_RK[here_RK]
            shipments.append(
                Shipment(
                    peer_id=name,
                    experts=experts,
                    token_R=token_R,
                    pair_P=pair_P,
                    rows=RoutedRows(
                        # All tokens: no copy is needed.
                        x_RD=x_TD if token_R.numel() == n_tokens else x_TD[token_R],
                        experts_per_row_R=here_RK.sum(dim=1, dtype=torch.int32),
                        expert_index_P=expert_ids_TK.reshape(-1)[pair_P].to(torch.int32),
                        gate_P=gates_TK.reshape(-1)[pair_P],
                    ),
                )
            )
    return shipments


def add_rows(total_TD: Tensor, token_R: Tensor, part_RD: Tensor) -> None:
    """`total[token] += part`, each token at most once: the order of the calls alone decides the rounding."""
    if token_R.numel() == total_TD.shape[0]:
        total_TD += part_RD
    else:
        total_TD.index_add_(0, token_R, part_RD)


def answered_pairs(shipment: Shipment, failed_experts: tuple[int, ...]) -> Tensor:
    """bool [P]: the pairs of a call whose expert ran."""
    if not failed_experts:
        return torch.ones(shipment.pair_P.shape, dtype=torch.bool)
    return ~torch.isin(shipment.rows.expert_index_P, torch.tensor(failed_experts, dtype=torch.int32))

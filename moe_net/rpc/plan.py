"""Which rows go to which server, and how the answers come together again. Pure tensor bookkeeping.

T tokens, D model width, K experts per token, R rows sent to one server, P (row, expert) pairs of those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
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
    n_tokens = expert_ids_TK.shape[0]
    # By numpy: of hundreds of tokens an operator of torch's is all overhead (256 x 2 to four servers: 196 -> 72 us).
    ids_TK, gate_all = expert_ids_TK.numpy(), gates_TK.detach().reshape(-1).numpy()
    names = sorted(set(server_of.values()))
    table_E = np.full(int(ids_TK.max()) + 2 if n_tokens else 1, -1, dtype=np.int16)
    for expert, name in server_of.items():
        if expert < table_E.size - 1:
            table_E[expert] = names.index(name)
    # Index -1 (no expert) reads the table's last entry, which is always -1.
    server_TK = np.where(pending_TK.numpy(), table_E[ids_TK], -1)
    rows_per_call = min(max_rows, max(1, max_tensor_bytes // max(1, payload_bytes(1, x_TD.shape[1], encoding))))
    shipments: list[Shipment] = []
    for number, name in enumerate(names):
        here_TK = server_TK == number
        experts = tuple(expert for expert, server in server_of.items() if server == name)
        count_T = here_TK.sum(axis=1, dtype=np.int32)
        token_all, pair_all = np.flatnonzero(count_T), np.flatnonzero(here_TK)
        first_pair = 0
        for first in range(0, token_all.size, rows_per_call):
            token_R = torch.from_numpy(token_all[first : first + rows_per_call])
            count_R = count_T[token_all[first : first + rows_per_call]]
            pair_P = pair_all[first_pair : first_pair + int(count_R.sum())]
            first_pair += pair_P.size
            shipments.append(
                Shipment(
                    peer_id=name,
                    experts=experts,
                    token_R=token_R,
                    pair_P=torch.from_numpy(pair_P),
                    rows=RoutedRows(
                        # All tokens: no copy is needed.
                        x_RD=x_TD if token_R.numel() == n_tokens else x_TD.index_select(0, token_R),
                        experts_per_row_R=torch.from_numpy(count_R),
                        expert_index_P=torch.from_numpy(ids_TK.reshape(-1)[pair_P].astype(np.int32)),
                        gate_P=torch.from_numpy(gate_all[pair_P]),
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

"""rpc/plan: every pending pair travels once, each token's row once per server, cut within the byte limit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.rpc.plan import add_rows, answered_pairs, ship
from moe_net.rpc.policy import CallPolicy
from moe_net.types import Encoding
from moe_net.wire.compress import payload_bytes
from moe_net.wire.validate import Limits

E, D = 7, 5


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict[int, str], int]:
    n_tokens = draw(st.integers(0, 12))
    k = draw(st.integers(1, 4))
    ids = [draw(st.permutations(range(E)))[:k] for _ in range(n_tokens)]
    ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(n_tokens, k)
    dropped = torch.tensor(
        draw(st.lists(st.booleans(), min_size=n_tokens * k, max_size=n_tokens * k)), dtype=torch.bool
    )
    ids_TK = ids_TK.masked_fill(dropped.reshape(n_tokens, k), -1)
    hosted = draw(st.dictionaries(st.integers(0, E - 1), st.sampled_from(["a", "b", "c"])))
    pending_TK = ids_TK >= 0
    limit = draw(st.sampled_from([1, 4 * D * 3, 10**6]))
    return ids_TK, pending_TK, hosted, limit


@settings(max_examples=300, deadline=None)
@given(routings())
def test_every_hosted_pair_travels_exactly_once_and_each_row_once_per_server(case) -> None:
    ids_TK, pending_TK, hosted, limit = case
    n_tokens, k = ids_TK.shape
    x_TD = torch.arange(n_tokens * D, dtype=torch.float32).reshape(n_tokens, D)
    gates_TK = torch.rand(n_tokens, k, generator=torch.Generator().manual_seed(1))
    shipments = ship(
        x_TD, ids_TK, gates_TK, pending_TK, hosted, encoding=Encoding.FP32, max_tensor_bytes=limit, max_rows=5
    )
    seen: list[int] = []
    tokens_of: dict[str, list[int]] = {}
    for s in shipments:
        rows = s.rows
        tokens_of.setdefault(s.peer_id, []).extend(s.token_R.tolist())
        assert torch.equal(rows.x_RD, x_TD[s.token_R])
        assert rows.x_RD.shape[0] <= 5
        assert rows.x_RD.shape[0] == 1 or rows.x_RD.numel() * 4 <= limit
        assert int(rows.experts_per_row_R.sum()) == s.pair_P.numel()
        assert bool((rows.experts_per_row_R >= 1).all())
        # The pairs stand in the order of their rows.
        assert torch.equal(s.pair_P // k, s.token_R.repeat_interleave(rows.experts_per_row_R))
        assert torch.equal(rows.expert_index_P.long(), ids_TK.reshape(-1)[s.pair_P])
        assert torch.equal(rows.gate_P, gates_TK.reshape(-1)[s.pair_P])
        assert all(hosted[e] == s.peer_id for e in rows.expert_index_P.tolist())
        seen += s.pair_P.tolist()
    expected = [i for i, e in enumerate(ids_TK.reshape(-1).tolist()) if e >= 0 and e in hosted]
    assert sorted(seen) == expected
    assert all(len(tokens) == len(set(tokens)) for tokens in tokens_of.values())


def test_a_gap_in_the_middle_of_a_token_s_choices_is_no_expert() -> None:
    ids_TK = torch.tensor([[3, -1], [-1, -1], [-1, 2]])
    (s,) = ship(
        torch.ones(3, D), ids_TK, torch.ones(3, 2), ids_TK >= 0, {2: "a", 3: "a"},
        encoding=Encoding.FP32, max_tensor_bytes=10**6, max_rows=10**6,
    )  # fmt: skip
    assert s.token_R.tolist() == [0, 2]
    assert s.rows.expert_index_P.tolist() == [3, 2]
    assert s.pair_P.tolist() == [0, 5]


def test_the_largest_calls_stay_within_what_a_server_takes() -> None:
    """Whatever the width and the encoding, forward and a backward with its inputs fit the limits."""
    policy, limits = CallPolicy(), Limits()
    for encoding in Encoding:
        for width in (1, 8, 64, 128, 4096):
            rows = min(policy.max_rows, policy.max_tensor_bytes // payload_bytes(1, width, encoding))
            pairs = 8 * rows
            both = 2 * payload_bytes(rows, width, encoding) + 4 * rows + 8 * pairs
            assert both < limits.max_message_bytes
            assert 4 * rows * width <= limits.max_matrix_bytes
            assert rows <= limits.max_rows


def test_answered_pairs_leave_out_the_experts_that_failed() -> None:
    ids_TK = torch.tensor([[0, 1], [2, 1]])
    (s,) = ship(
        torch.ones(2, D), ids_TK, torch.ones(2, 2), ids_TK >= 0, {0: "a", 1: "a", 2: "a"},
        encoding=Encoding.FP32, max_tensor_bytes=10**6, max_rows=10**6,
    )  # fmt: skip
    assert answered_pairs(s, (1,)).tolist() == [True, False, True, False]
    assert answered_pairs(s, ()).all()


def test_add_rows_adds_to_the_named_tokens_only() -> None:
    total_TD = torch.ones(3, 2)
    add_rows(total_TD, torch.tensor([2]), torch.full((1, 2), 5.0))
    assert total_TD.tolist() == [[1, 1], [1, 1], [6, 6]]
    add_rows(total_TD, torch.tensor([0, 1, 2]), torch.ones(3, 2))
    assert total_TD.tolist() == [[2, 2], [2, 2], [7, 7]]

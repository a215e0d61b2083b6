"""wire/validate: what each check lets through, what it refuses, and what it says then.

R rows, D columns, P (row, expert) pairs.
"""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_net.errors import LimitError, WireError
from moe_net.types import Encoding
from moe_net.wire.compress import payload_bytes
from moe_net.wire.messages import RoutedRows
from moe_net.wire.validate import (
    Int32Array,
    Limits,
    check_call_id,
    check_encoding,
    check_finite,
    check_matrix,
    check_message_bytes,
    check_routing,
    check_rows,
    check_trainer,
)

LIMITS = Limits()
SMALL = Limits(max_message_bytes=4096, max_matrix_bytes=8192, max_rows=16, max_experts_per_row=4)


def int32(*values: int) -> Int32Array:
    return np.array(values, np.int64).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_stands(bad: float) -> None:
    clean_N = torch.randn(300, generator=torch.Generator().manual_seed(1))
    check_finite(clean_N, "x")
    for position in range(300):
        x_N = clean_N.clone()
        x_N[position] = bad
        with pytest.raises(WireError, match=r"^grad: holds an infinity or NaN"):
            check_finite(x_N, "grad")


def test_infinities_of_both_signs_do_not_hide_each_other() -> None:
    with pytest.raises(WireError):
        check_finite(torch.tensor([math.inf, 1.0, -math.inf]), "x")


def test_values_whose_sum_overflows_are_finite_all_the_same() -> None:
    check_finite(torch.full((1000,), 3e38), "x")
    check_finite(torch.empty(0), "x")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_finite_means_what_isfinite_says(values: list[float]) -> None:
    x_N = torch.tensor(values, dtype=torch.float32)
    if bool(torch.isfinite(x_N).all()):
        check_finite(x_N, "x")
    else:
        with pytest.raises(WireError):
            check_finite(x_N, "x")


@pytest.mark.parametrize("encoding", Encoding)
def test_a_matrix_at_the_limit_passes_and_one_row_more_does_not(encoding: Encoding) -> None:
    check_matrix("x", 16, 128, encoding, payload_bytes(16, 128, encoding), SMALL)
    with pytest.raises(LimitError, match="x: 17 rows, the limit is 16"):
        check_matrix("x", 17, 1, encoding, payload_bytes(17, 1, encoding), SMALL)
    with pytest.raises(LimitError, match="take 8256 bytes, the limit is 8192"):
        check_matrix("x", 16, 129, encoding, payload_bytes(16, 129, encoding), SMALL)


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (0, 0)])
def test_a_matrix_without_rows_or_columns_is_refused(rows: int, cols: int) -> None:
    with pytest.raises(WireError, match=f"y: {rows} rows of {cols} columns"):
        check_matrix("y", rows, cols, Encoding.FP32, 0, LIMITS)


def test_sizes_whose_product_would_overflow_are_over_the_limit() -> None:
    largest = 2**32 - 1
    with pytest.raises(LimitError):
        check_matrix("x", 65_536, largest, Encoding.FP32, 0, LIMITS)
    with pytest.raises(LimitError):
        check_matrix("x", largest, largest, Encoding.INT8, 0, LIMITS)


@pytest.mark.parametrize("encoding", Encoding)
def test_data_of_another_length_than_the_sizes_say_is_refused(encoding: Encoding) -> None:
    right = payload_bytes(3, 70, encoding)
    check_matrix("x", 3, 70, encoding, right, LIMITS)
    for wrong in (0, right - 1, right + 1, right * 2):
        with pytest.raises(WireError, match=f"x_data: {wrong} bytes for 3 rows of 70 columns"):
            check_matrix("x", 3, 70, encoding, wrong, LIMITS)


def test_a_claim_of_a_gibibyte_costs_nothing() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LimitError):
            check_matrix("x", 2**14, 2**14, Encoding.FP32, 2**30, LIMITS)
        with pytest.raises(LimitError):
            check_message_bytes(2**30, LIMITS)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 1024


ROUTING_MISTAKES: dict[str, tuple[tuple[int, Int32Array, Int32Array, int], type[WireError], str]] = {
    "count missing": ((3, int32(1, 1), int32(0, 1), 2), WireError, "experts_per_row: 2 counts for 3 rows"),
    "no counts": ((1, int32(), int32(), 0), WireError, "experts_per_row: 0 counts for 1 rows"),
    "gate missing": ((2, int32(1, 1), int32(0, 1), 1), WireError, "gate: 1 gates for 2 entries"),
    "zero count": ((2, int32(2, 0), int32(0, 1), 2), WireError, "experts_per_row: 0 in row 1, must be 1..4"),
    "huge count": ((1, int32(2**32 - 1), int32(0), 1), WireError, "experts_per_row: 4294967295 in row 0"),
    "count over the limit": ((2, int32(1, 5), int32(*range(6)), 6), LimitError, "5 in row 1, the limit is 4"),
    "sum too small": ((2, int32(1, 1), int32(0, 1, 2), 3), WireError, "sums to 2, but expert_index has 3"),
    "sum too large": ((2, int32(2, 2), int32(0, 1, 2), 3), WireError, "sums to 4, but expert_index has 3"),
    "negative index": ((2, int32(1, 1), int32(0, 2**31), 2), WireError, "expert_index: 2147483648 is no index"),
    "duplicate": ((2, int32(2, 3), int32(3, 4, 7, 4, 7), 5), WireError, "expert_index: expert 7 twice in row 1"),
}


@pytest.mark.parametrize("mistake", ROUTING_MISTAKES)
def test_routing_that_does_not_add_up_is_refused_with_its_place(mistake: str) -> None:
    arguments, error, text = ROUTING_MISTAKES[mistake]
    with pytest.raises(error, match=text.replace("..", r"\.\.")) as caught:
        check_routing(*arguments, SMALL)
    assert type(caught.value) is error


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([(n, n) for n in range(1, 5)] + [(1, 4)]).flatmap(
        lambda size: st.lists(st.lists(st.integers(0, 5), min_size=size[0], max_size=size[1]), min_size=1, max_size=8)
    )
)
def test_only_an_expert_twice_in_one_row_is_a_duplicate(experts_R: list[list[int]]) -> None:
    arguments = (
        len(experts_R),
        int32(*(len(row) for row in experts_R)),
        int32(*(index for row in experts_R for index in row)),
        sum(len(row) for row in experts_R),
    )
    if all(len(set(row)) == len(row) for row in experts_R):
        check_routing(*arguments, SMALL)
    else:
        with pytest.raises(WireError, match="twice in row"):
            check_routing(*arguments, SMALL)


def test_unknown_encodings_are_refused_with_the_known_ones() -> None:
    assert check_encoding(4, "x.encoding") is Encoding.INT8
    for number in (0, 5, -1, 2**31 - 1):
        with pytest.raises(WireError, match=rf"^x.encoding: unknown encoding {number}, known are 1 \(fp32\)"):
            check_encoding(number, "x.encoding")


def test_names_and_ids_of_wrong_length_are_refused() -> None:
    check_trainer("x" * 128)
    check_call_id(bytes(16))
    with pytest.raises(WireError, match="trainer: empty"):
        check_trainer("")
    with pytest.raises(LimitError, match="trainer: a name of 130 bytes"):
        check_trainer("é" * 65)
    for length in (0, 15, 17):
        with pytest.raises(WireError, match=f"call_id: {length} bytes, must be 16"):
            check_call_id(bytes(length))


def rows_of(x_RD: Tensor, *experts: int) -> RoutedRows:
    return RoutedRows(
        x_RD=x_RD,
        experts_per_row_R=torch.ones(len(experts), dtype=torch.int32),
        expert_index_P=torch.tensor(experts, dtype=torch.int32),
        gate_P=torch.ones(len(experts)),
    )


def test_rows_must_have_the_models_width_and_its_experts() -> None:
    check_rows(rows_of(torch.ones(2, 8), 0, 3), width=8, n_experts=4)
    with pytest.raises(WireError, match="x: rows of 8 columns, the run has expert_width=16"):
        check_rows(rows_of(torch.ones(2, 8), 0, 3), width=16, n_experts=4)
    with pytest.raises(WireError, match="expert_index: 4, but each layer has n_experts=4"):
        check_rows(rows_of(torch.ones(2, 8), 0, 4), width=8, n_experts=4)

"""The products that a CPU leaves to oneDNN: the same experts as by torch.mm, in shapes of a bounded number."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, make_case, shapes
from kernel_checks import check, run_explicit

from moe_net.kernels import onednn
from moe_net.kernels.onednn import has_fast, padded, product, product_into
from moe_net.types import Activation

# Where there is oneDNN its operator must be, too: torch promises no name for it, and without it experts are slow again.
pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the cases lie on a GPU, where nothing goes to oneDNN"),
]

CASES = shapes(max_tokens=60)


@contextmanager
def always_fast() -> Generator[None]:
    """Of whatever size, and whatever the processor can do."""
    with patch.multiple(onednn, _is_faster=lambda: True, _MANY=0, _FEWEST_ROWS=1):
        yield


@given(shape=CASES, few=st.integers(1, 12))
@settings(max_examples=200)
def test_experts_of_few_rows_beside_those_of_many(shape: dict[str, Any], few: int) -> None:
    many = few * shape["d"] * shape["f"]
    with patch.multiple(onednn, _is_faster=lambda: True, _MANY=many, _FEWEST_ROWS=1):
        case = make_case(**shape)
        check(case, "loop")
        kept, fresh = run_explicit(case, "loop"), run_explicit(case, "loop", keep=False)
    assert all(torch.equal(kept[name], fresh[name]) for name in kept)


def test_autocast_changes_nothing() -> None:
    case = make_case(3, t=90, k=2, e=4, d=16, f=24, activation=Activation.SWIGLU)
    with always_fast():
        plain = run_explicit(case, "loop")
        with torch.autocast("cpu", torch.bfloat16):
            rounded = run_explicit(case, "loop")
    assert all(torch.equal(plain[name], rounded[name]) for name in plain)


@given(shape=CASES)
@settings(max_examples=1000)
def test_output_and_every_gradient_equal_the_fp64_reference(shape: dict[str, Any]) -> None:
    with always_fast():
        check(make_case(**shape), "loop")


@pytest.mark.parametrize("activation", Activation)
def test_without_what_forward_kept_the_bits_are_the_same(activation: Activation) -> None:
    case = make_case(3, t=90, k=2, e=4, d=16, f=24, activation=activation)
    with always_fast():
        kept, fresh = run_explicit(case, "loop"), run_explicit(case, "loop", keep=False)
    assert all(torch.equal(kept[name], fresh[name]) for name in kept)


@pytest.mark.parametrize("activation", Activation)
def test_experts_large_enough_take_them_by_themselves_and_agree(activation: Activation) -> None:
    case = make_case(3, t=200, k=2, e=3, d=96, f=320, activation=activation)
    with (
        patch.object(onednn, "_is_faster", new=lambda: True),
        patch.object(onednn.torch.ops.mkldnn, "_linear_pointwise") as op,
    ):
        op.side_effect = RuntimeError("called")
        with pytest.raises(RuntimeError, match="called"):
            run_explicit(case, "loop")
    with patch.object(onednn, "_is_faster", new=lambda: True):
        check(case, "loop")


def test_few_rows_small_experts_and_other_dtypes_stay_with_torch() -> None:
    x = torch.ones(1)
    with patch.object(onednn, "_is_faster", new=lambda: True):
        assert has_fast(x, 64, 128, 1280)
        assert not has_fast(x, 3, 4096, 4096)
        assert not has_fast(x, 64, 64, 64)
        assert not has_fast(x.double(), 64, 128, 1280)
        assert not has_fast(x.bfloat16(), 64, 128, 1280)


@given(rows=st.integers(1, 2**20))
def test_rows_are_filled_up_by_an_eighth_at_most(rows: int) -> None:
    assert rows <= padded(rows) <= max(rows + rows / 8, 16)
    assert padded(padded(rows)) == padded(rows)


def test_there_are_few_numbers_of_rows() -> None:
    assert len({padded(rows) for rows in range(1, 2**14 + 1)}) <= 8 * 14


def test_products_of_views() -> None:
    a, b = torch.randn(40, 24).t(), torch.randn(56, 40).t()
    expected = (a.double() @ b.double()).float()
    torch.testing.assert_close(product(a, b), expected, rtol=1e-5, atol=1e-5)
    first = torch.empty(20, 56)
    product_into(first, a, b, fast=True)
    torch.testing.assert_close(first, expected[:20], rtol=1e-5, atol=1e-5)

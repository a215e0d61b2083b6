"""A backend that is installed and does not run costs a line in the log, never the peer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_net.kernels import dispatch, loop
from moe_net.kernels.types import ExpertWeights
from moe_net.types import Activation

CHOICES = ("quack", "triton", "loop")


class OddError(Exception):
    """An error as a compiler of its own raises it, of no kind that we know."""


class Backend:
    """A backend that computes as `loop` does, until it fails."""

    NAME = "quack"

    def __init__(self, *, at: str, error: Exception) -> None:
        self._at, self._error = at, error

    def fits(self, *_: Any) -> bool:
        return self._do("fits", lambda: True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("forward", lambda: loop.forward(*args, **kwargs))

    def backward_rows(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("backward", lambda: loop.backward_rows(*args, **kwargs))

    def weight_grads(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("weights", lambda: loop.weight_grads(*args, **kwargs))

    def _do(self, what: str, work: Any) -> Any:
        if what == self._at:
            raise self._error
        return work()


def rows_and_experts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights]:
    weights = ExpertWeights(torch.randn(2, 8, 32), torch.randn(2, 16, 8), Activation.SWIGLU)
    return torch.randn(4, 8), torch.zeros((4, 1), dtype=torch.int32), torch.ones(4, 1), weights


@pytest.fixture(autouse=True)
def _a_gpus_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_tried", {})
    monkeypatch.setattr(dispatch, "candidates", lambda *_: CHOICES)
    monkeypatch.setattr(dispatch, "_installed", lambda _: True)


@pytest.mark.parametrize(
    ("at", "error"),
    [
        ("import", ImportError("no symbol of that name")),
        ("import", AttributeError("module 'cutlass' has no attribute 'cute'")),
        ("import", SyntaxError("of a newer Python")),
        ("fits", OddError("who knows")),
        ("forward", TypeError("epilogue fn depends on <ContextVar ...>")),
        ("forward", OddError("does not compile")),
        ("backward", RuntimeError("too many resources requested for launch")),
        ("backward", NotImplementedError("not on this card")),
        ("weights", RuntimeError("operation not supported")),
    ],
)
def test_a_backend_that_fails_is_left_out_with_one_line(
    at: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str) -> Any:
        if name == "loop":
            return loop
        if at == "import":
            raise error
        return Backend(at=at, error=error)

    monkeypatch.setattr(dispatch, "_load", load)
    inputs = rows_and_experts()
    y, saved = dispatch.moe_ffn_forward(*inputs, keep=True)
    dispatch.moe_ffn_backward(torch.ones_like(y), *inputs, saved)
    dispatch.moe_ffn_forward(*inputs, keep=True)
    assert torch.equal(y, loop.forward(*inputs, keep=False)[0])
    assert [message for message in caplog.messages if "quack" in message] == [
        f"expert kernels: backend quack is left out: {type(error).__name__}: {error}"
    ]


def test_one_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    working = Backend(at="never", error=OddError())
    monkeypatch.setattr(dispatch, "_load", lambda _: working)
    x, ids, _, weights = rows_and_experts()
    assert dispatch.choose(x, ids, weights, None) is working


def test_one_that_is_asked_for_by_name_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_load", lambda _: Backend(at="forward", error=OddError("who knows")))
    monkeypatch.setattr(dispatch, "available", lambda: CHOICES)
    with pytest.raises(OddError, match="who knows"):
        dispatch.moe_ffn_forward(*rows_and_experts(), keep=False, backend="quack")


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [
        (None, (9, 0), "quack"),
        (None, (10, 0), "quack"),
        (None, (8, 0), "triton"),
        ("6.4", (9, 4), "triton"),  # an MI300
        ("6.4", (11, 0), "triton"),  # a Radeon
    ],
)
def test_an_amd_card_is_not_taken_for_a_hopper(
    hip: str | None, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))
    weights = ExpertWeights(torch.zeros(2, 8, 32), torch.zeros(2, 16, 8), Activation.SWIGLU)
    assert dispatch.candidates(x, torch.zeros(512, 1), weights)[0] == expected


def test_a_triton_that_does_not_import_leaves_messages_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def import_nothing(name: str) -> Any:
        raise OddError("of another version")

    monkeypatch.setattr(dispatch.importlib, "import_module", import_nothing)
    assert dispatch.matrices_on(torch.device("cuda"), torch.bfloat16) is dispatch.ON_CPU
    assert caplog.messages == ["Triton is left out, the CPU reads messages: OddError: of another version"]

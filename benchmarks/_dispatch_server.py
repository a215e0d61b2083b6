# pyright: basic
"""A server's step on the GPU: what it computes, and the same from the bytes of calls to the bytes of answers."""

from __future__ import annotations

import numpy as np
import torch
from _dispatch_task import Step, Task

from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.types import ExpertWeights, zero_sums
from moe_net.optim import OptimizerConfig
from moe_net.types import Encoding, ExpertShape
from moe_net.wire import codec
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall, RoutedRows
from moe_net.wire.validate import Limits


def dispatch(task: Task) -> Step:
    """What a server computes for a call of all tokens: gradients are added to fp32 sums."""
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    experts = GraphedExperts(weights, zero_sums(weights))

    def step() -> tuple[torch.Tensor | None, ...]:
        y_TD, saved = experts.forward(task.x_TD, task.ids_TK, task.gates_TK, keep=True)
        dx_TD, dgates_TK, _ = experts.backward(task.dy_TD, task.x_TD, task.ids_TK, task.gates_TK, saved)
        torch.cuda.current_stream().synchronize()
        return y_TD, dx_TD, dgates_TK, None, None

    return step


def payloads(task: Task) -> Step:
    """The same from int8 rows in pinned memory to int8 rows in pinned memory, by what a server reads and writes with.
    The first step returns y and dx as they arrive, for the comparison with the oracle."""
    n_rows, width = task.x_TD.shape
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    experts = GraphedExperts(weights, zero_sums(weights))
    matrices = OnDevice(task.x_TD.device, task.x_TD.dtype)
    x_N, dy_N = matrices.write(task.x_TD, Encoding.INT8), matrices.write(task.dy_TD, Encoding.INT8)

    def step() -> tuple[torch.Tensor | None, ...]:
        x_TD = matrices.read(x_N, n_rows, width, Encoding.INT8, "x")
        y_TD, saved = experts.forward(x_TD, task.ids_TK, task.gates_TK, keep=True)
        torch.cuda.current_stream().synchronize()
        matrices.write(y_TD, Encoding.INT8)
        dy_TD = matrices.read(dy_N, n_rows, width, Encoding.INT8, "dy")
        dx_TD, dgates_TK, _ = experts.backward(dy_TD, x_TD, task.ids_TK, task.gates_TK, saved)
        torch.cuda.current_stream().synchronize()
        matrices.write(dx_TD, Encoding.INT8)
        return y_TD, dx_TD, dgates_TK, None, None

    return step


def _host(task: Task) -> ExpertHost:
    """Of experts with the task's weights."""
    n_experts, d_model, _ = task.w_in_EDH.shape
    shape = ExpertShape(d_model=d_model, d_ff=task.w_out_EFD.shape[1], activation=task.activation)
    bank = ExpertBank(
        layer=0, indices=range(n_experts), shape=shape, optimizer=OptimizerConfig(), global_batch_tokens=2**40,
        run="benchmark", seed=0, init_std=0.02, device="cuda", compute_dtype=task.x_TD.dtype,
    )  # fmt: skip
    for index in range(n_experts):
        state = bank.state([index])
        state[f"0.{index}.w_in"] = task.w_in_EDH[index].float().cpu().contiguous()
        state[f"0.{index}.w_out"] = task.w_out_EFD[index].float().cpu().contiguous()
        bank.load_state(state)
    return ExpertHost({0: bank})


def _pinned(message: bytes, matrices: OnDevice) -> tuple[memoryview, np.ndarray]:
    """(the message where a server has it that came in pieces, the 16 bytes of its call id)"""
    there = matrices.room(len(message))
    there[:] = message
    start = message.index(_ID)
    return there, np.frombuffer(there, np.uint8)[start : start + 16]


_ID = bytes(range(200, 216))


def whole(task: Task) -> Step:
    """All that a server does between a call's bytes and its answer's: read and check the message, look the call up,
    dispatch, remember, write. On one thread: a server reads the next call, and writes the last answer, meanwhile."""
    host, limits = _host(task), Limits()
    matrices = OnDevice(task.x_TD.device, task.x_TD.dtype)
    n_rows, n_choices = task.ids_TK.shape
    rows = RoutedRows(
        x_RD=task.x_TD.float().cpu(),
        experts_per_row_R=torch.full((n_rows,), n_choices, dtype=torch.int32),
        expert_index_P=task.ids_TK.reshape(-1).int().cpu(),
        gate_P=task.gates_TK.reshape(-1).cpu(),
    )
    common = {"call_id": _ID, "trainer": "t", "step": 0, "layer": 0}
    int8 = {"encoding": Encoding.INT8, "reply_encoding": Encoding.INT8}
    forward = codec.encode_forward_call(ForwardCall(**common, **int8, rows=rows))
    backward = codec.encode_backward_call(BackwardCall(**common, **int8, grad_RD=task.dy_TD.float().cpu()))
    (forward_N, forward_id), (backward_N, backward_id) = (_pinned(m, matrices) for m in (forward, backward))
    turn = 0

    def step() -> tuple[torch.Tensor | None, ...]:
        nonlocal turn
        turn += 1
        forward_id[:8] = backward_id[:8] = np.frombuffer(turn.to_bytes(8, "little"), np.uint8)
        call = codec.decode_forward_call(forward_N, limits, matrices)
        answer = host.forward_many([call])[0]
        assert isinstance(answer, ForwardAnswer), answer
        codec.forward_answer_parts(answer, matrices)
        gradient = codec.decode_backward_call(backward_N, limits, matrices)
        back = host.backward_many([gradient])[0]
        assert isinstance(back, BackwardAnswer), back
        codec.backward_answer_parts(back, matrices)
        return answer.y_RD, back.dx_RD, back.gate_grad_P.view(n_rows, n_choices).to(task.x_TD.device), None, None

    return step

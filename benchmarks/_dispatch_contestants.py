# pyright: basic
"""Who can compute an expert layer, for `dispatch.py`: a contestant is a function of `Task` that returns a step.

T tokens, D model width, F expert width, E experts, K experts per token, H columns of the first projection,
P = T * K pairs. A step runs forward and backward and returns y, dx, dgates, dw_in, dw_out (None for what it has not).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_net.kernels.device.step import PayloadExperts
from moe_net.kernels.device.wire import payload_bytes, quantise
from moe_net.kernels.dispatch import ExpertWeights, moe_ffn
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.types import zero_sums
from moe_net.types import Activation

Step = Callable[[], tuple[torch.Tensor | None, ...]]


@dataclass(slots=True)
class Task:
    """One shape with fresh random data; weights as the kernels want them (see `ExpertWeights`)."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    dy_TD: torch.Tensor
    w_in_EDH: torch.Tensor
    w_out_EFD: torch.Tensor
    activation: Activation

    @property
    def gated(self) -> bool:
        return self.activation is Activation.SWIGLU

    def leaves(self) -> list[torch.Tensor]:
        values = (self.x_TD, self.gates_TK, self.w_in_EDH, self.w_out_EFD)
        return [value.detach().requires_grad_() for value in values]


def _differentiate(task: Task, layer: Callable[..., torch.Tensor]) -> Step:
    def step() -> tuple[torch.Tensor, ...]:
        leaves = task.leaves()
        y_TD = layer(*leaves)
        return (y_TD.detach(), *torch.autograd.grad(y_TD, leaves, task.dy_TD))

    return step


def ours(backend: str | None) -> Callable[[Task], Step]:
    def contestant(task: Task) -> Step:
        return _differentiate(
            task,
            lambda x, gates, w_in, w_out: moe_ffn(
                x, task.ids_TK, gates, ExpertWeights(w_in, w_out, task.activation), backend=backend
            ),
        )

    return contestant


def server_dispatch(task: Task) -> Step:
    """What a server computes for a call of all tokens: gradients are added to fp32 sums. Beside `server_step`."""
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    sums = zero_sums(weights)
    experts = GraphedExperts(weights, sums)

    def step() -> tuple[torch.Tensor | None, ...]:
        y_TD, saved = experts.forward(task.x_TD, task.ids_TK, task.gates_TK, keep=True)
        dx_TD, dgates_TK, _ = experts.backward(task.dy_TD, task.x_TD, task.ids_TK, task.gates_TK, saved)
        torch.cuda.current_stream().synchronize()
        return y_TD, dx_TD, dgates_TK, None, None

    return step


def server_step(task: Task) -> Step:
    """The same from int8 bytes in pinned memory to int8 bytes in pinned memory."""
    n_rows, width = task.x_TD.shape
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    experts = PayloadExperts(GraphedExperts(weights, zero_sums(weights)), width, n_rows, task.x_TD.dtype)
    x_N, dy_N, y_N, dx_N = torch.empty((4, payload_bytes(n_rows, width)), dtype=torch.uint8).pin_memory()
    for rows_RD, pinned_N in ((task.x_TD, x_N), (task.dy_TD, dy_N)):
        sent = torch.empty(pinned_N.numel(), dtype=torch.uint8, device="cuda")
        quantise(rows_RD, sent)
        pinned_N.copy_(sent)

    def step() -> tuple[torch.Tensor | None, ...]:
        x_TD, saved = experts.forward(x_N, task.ids_TK, task.gates_TK, y_N)
        dgates_TK = experts.backward(dy_N, x_TD, task.ids_TK, task.gates_TK, saved, dx_N)
        experts.finish()
        return None, None, dgates_TK, None, None

    return step


def dense(task: Task) -> Step:
    """The same arithmetic as plain products with one expert's weights: what cuBLAS makes of the FLOPs, nothing else."""
    n_pairs = task.ids_TK.numel()
    d_model, d_hidden = task.w_in_EDH.shape[1:]
    d_ff = task.w_out_EFD.shape[1]
    new = task.x_TD.new_empty
    x_PD, dy_PD = new(n_pairs, d_model).normal_(), new(n_pairs, d_model).normal_()
    h_PH, a_PF = new(n_pairs, d_hidden).normal_(), new(n_pairs, d_ff).normal_()
    w_in_DH, w_out_FD = task.w_in_EDH[0].contiguous(), task.w_out_EFD[0].contiguous()

    def step() -> tuple[None, ...]:
        torch.mm(x_PD, w_in_DH)
        torch.mm(a_PF, w_out_FD)
        torch.mm(dy_PD, w_out_FD.t())
        torch.mm(a_PF.t(), dy_PD)
        torch.mm(x_PD.t(), h_PH)
        torch.mm(h_PH, w_in_DH.t())
        return (None,) * 5

    return step


def _titan(x_TD, ids_TK, gates_TK, w_in_EDH, w_out_EFD, gated: bool):
    """torchtitan's way: sort, gather, grouped products, weighted scatter, all left to autograd and the compiler."""
    n_experts, n_choices = w_in_EDH.shape[0], ids_TK.shape[1]
    key_P, order_P = torch.sort(ids_TK.view(-1), stable=True)
    expert_E = torch.arange(n_experts, device=key_P.device)
    end_E = torch.searchsorted(key_P, expert_E, right=True, out_int32=True)
    row_P = order_P // n_choices
    h_PH = F.grouped_mm(x_TD[row_P], w_in_EDH, offs=end_E)
    if gated:
        gate_PF, up_PF = h_PH.chunk(2, dim=1)
        a_PF = F.silu(gate_PF) * up_PF
    else:
        a_PF = F.gelu(h_PH)
    y_PD = F.grouped_mm(a_PF, w_out_EFD, offs=end_E)
    weighted_PD = (y_PD.float() * gates_TK.view(-1)[order_P].unsqueeze(1)).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, row_P, weighted_PD)


def titan_compiled(task: Task) -> Step:
    layer = torch.compile(_titan, dynamic=False)
    return _differentiate(task, lambda x, gates, w_in, w_out: layer(x, task.ids_TK, gates, w_in, w_out, task.gated))


def titan_graph(task: Task) -> Step:
    """The same, forward and backward in one CUDA graph: no launch costs, but one graph per token count."""
    eager = titan_compiled(task)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = eager()

    def step() -> tuple[torch.Tensor | None, ...]:
        graph.replay()
        return results

    return step


def ours_server(task: Task) -> Step:
    """As a server runs it: no autograd, and a token count that changes from call to call, up to all of them.

    The first step has all tokens, for the comparison with the oracle.
    """
    experts = GraphedExperts(ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation))
    n_tokens = task.x_TD.shape[0]
    counts = [n_tokens, *(n_tokens - n_tokens * missing // 64 for missing in (3, 1, 7, 2, 5, 0, 4, 6))]
    turn = 0

    def step() -> tuple[torch.Tensor, ...]:
        nonlocal turn
        n = counts[turn % len(counts)]
        turn += 1
        x_TD, ids_TK, gates_TK = task.x_TD[:n], task.ids_TK[:n], task.gates_TK[:n]
        y_TD, saved = experts.forward(x_TD, ids_TK, gates_TK, keep=True)
        dx_TD, dgates_TK, new = experts.backward(task.dy_TD[:n], x_TD, ids_TK, gates_TK, saved)
        assert new is not None
        return y_TD, dx_TD, dgates_TK, new.w_in_EDH, new.w_out_EFD

    return step


def sonicmoe(task: Task) -> Step:
    """SonicMoE 0.1.2 (its tuner runs first: minutes)."""
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    n_tokens, n_choices = task.ids_TK.shape
    n_experts = task.w_in_EDH.shape[0]
    token_P = torch.arange(n_tokens, device="cuda", dtype=torch.int32).repeat_interleave(n_choices)
    expert_P = task.ids_TK.reshape(-1).to(torch.int32)
    stream = torch.cuda.current_stream().cuda_stream

    def layer(x_TD, gates_TK, w_in_EDH, w_out_EFD):
        return moe_general_routing_inputs(
            x_TD, gates_TK.reshape(-1), token_P, expert_P, w_in_EDH.permute(2, 1, 0), None, w_out_EFD.permute(2, 1, 0),
            None, n_experts, stream, ActivationType.SWIGLU, False, concat_layout=True,
        )[0]  # fmt: skip

    return _differentiate(task, layer)


CONTESTANTS: dict[str, Callable[[Task], Step]] = {
    "dense": dense,
    "ours": ours(None),
    "ours:grouped": ours("grouped"),
    "ours:triton": ours("triton"),
    "ours:quack": ours("quack"),
    "ours, a server": ours_server,
    "dispatch of a server": server_dispatch,
    "step of a server": server_step,
    "titan compiled": titan_compiled,
    "titan graph": titan_graph,
    "sonicmoe": sonicmoe,
}

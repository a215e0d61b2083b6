# pyright: basic
"""Who can compute an expert layer, for `dispatch.py`: a contestant is a function of `Task` that returns a step.

T tokens, D model width, F expert width, E experts, K experts per token, H columns of the first projection,
P = T * K pairs. A step runs forward and backward and returns y, dx, dgates, dw_in, dw_out (None for what it has not).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import _dispatch_server
import torch
import torch.nn.functional as F
from _dispatch_task import Step, Task

from moe_net.kernels.dispatch import ExpertWeights, WeightCall, moe_ffn, moe_ffn_weight_grads
from moe_net.kernels.graphed import GraphedExperts


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
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    experts = GraphedExperts(weights)
    sent_ids_TK, sent_gates_TK = task.sent(task.ids_TK), task.sent(task.gates_TK)
    n_tokens = task.x_TD.shape[0]
    counts = [n_tokens, *(n_tokens - n_tokens * missing // 64 for missing in (3, 1, 7, 2, 5, 0, 4, 6))]
    turn = 0

    def step() -> tuple[torch.Tensor, ...]:
        nonlocal turn
        n = counts[turn % len(counts)]
        turn += 1
        x_TD, dy_TD, ids_TK, gates_TK = task.x_TD[:n], task.dy_TD[:n], sent_ids_TK[:n], sent_gates_TK[:n]
        y_TD, saved = experts.forward(x_TD, ids_TK, gates_TK, keep=True)
        dx_TD, dgates_TK, work = experts.backward(dy_TD, x_TD, ids_TK, gates_TK, saved, keep=True)
        assert work is not None
        new = moe_ffn_weight_grads([WeightCall(dy_TD, x_TD, task.ids_TK[:n], work)], weights)
        return y_TD, dx_TD, dgates_TK, new.w_in_EDH, new.w_out_EFD

    return step


def transformers(compiled: bool) -> Callable[[Task], Step]:
    """The experts of Hugging Face's transformers (5.24) in their implementation "grouped_mm"."""

    def contestant(task: Task) -> Step:
        from transformers.integrations import moe  # pyright: ignore[reportMissingImports]

        experts = SimpleNamespace(
            num_experts=task.w_in_EDH.shape[0], has_gate=task.gated, has_bias=False, is_transposed=True,
            has_post_expert_norm=False, _is_expert_parallel=False, act_fn=F.silu if task.gated else F.gelu,
        )  # fmt: skip
        experts._apply_gate = partial(moe._default_apply_gate, experts)

        def layer(x_TD, gates_TK, w_in_EDH, w_out_EFD):
            experts.gate_up_proj = experts.up_proj = w_in_EDH
            experts.down_proj = w_out_EFD
            return moe.grouped_mm_experts_forward(experts, x_TD, task.ids_TK, gates_TK)

        return _differentiate(task, torch.compile(layer, dynamic=False) if compiled else layer)

    return contestant


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
    "dispatch of a server": _dispatch_server.dispatch,
    "from rows to rows": _dispatch_server.payloads,
    "from call to answer": _dispatch_server.one_by_one,
    "calls of three trainers": _dispatch_server.served,
    "titan compiled": titan_compiled,
    "titan graph": titan_graph,
    "transformers": transformers(compiled=False),
    "transformers compiled": transformers(compiled=True),
    "sonicmoe": sonicmoe,
}

# pyright: basic
"""Forward, Backward and Commit of a server's calls on one GPU: weights' gradients call by call, or all at the commit.

    python benchmarks/commit_gpu.py
    python benchmarks/commit_gpu.py --dry-run    # tiny, on a CPU by Triton's interpreter: whether it runs, no figures

T tokens, D model width, F expert width, E experts, K experts per token. Three ways take turns within a round, on the
same calls and through the same graphs; times are medians over rounds:

- added: after each call's rows its weights' gradients, added to fp32 sums that are always there; all that in graphs.
  Here a pass over the sums adds; the kernels of "triton" and "quack" could add by themselves.
- staged: each call leaves activations and pre-activation gradients; the commit makes one product of them all.
- rows only: each call leaves its rows; the commit makes the rest again.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from _dispatch_task import MIB, Shape, Task, make_task, time_ms
from _processes import print_table

from moe_net.kernels import graphed
from moe_net.kernels.dispatch import WeightCall, moe_ffn_backward, moe_ffn_weight_grads
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.routing import Routing
from moe_net.kernels.types import ExpertWeights, WeightGrads, Work, zero_sums

SHAPES = {
    "olmoe": Shape(2048, 2048, 1024, 64, 8),
    "server": Shape(2048, 1024, 4096, 16, 2),
    "qwen3/4": Shape(2048, 2048, 768, 32, 8),
}
TINY = {"tiny": Shape(16, 32, 32, 3, 2)}
WRONG = 0.02
"""Gradients that differ by more (relative to their norm) are not the same, in bf16."""


class Call(NamedTuple):
    """Ids and gates are where a server has them, on the host, but for those that products read."""

    dy_TD: torch.Tensor
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    device_ids_TK: torch.Tensor
    device_gates_TK: torch.Tensor


Way = Callable[[Sequence[Call], ExpertWeights, str | None], Callable[[], WeightGrads]]


def added(calls: Sequence[Call], weights: ExpertWeights, backend: str | None) -> Callable[[], WeightGrads]:
    experts, sums = GraphedExperts(weights, backend=backend), zero_sums(weights)
    bucket = experts._bucket(calls[0].ids_TK)

    def add() -> list[torch.Tensor]:
        work = Work(bucket._backend.NAME, Routing(*bucket._kept[1:]), None, (bucket._a_PF,), (bucket._dh_PH,))
        grads = moe_ffn_weight_grads([WeightCall(bucket.dy_BD, bucket.x_BD, bucket.ids_BK, work)], weights)
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad)
        return []

    add_graph, _ = graphed._capture(add, weights.w_in_EDH.device)

    def step() -> WeightGrads:
        for total in sums:  # as the step before left them
            total.zero_()
        for dy_TD, x_TD, ids_TK, gates_TK, *_ in calls:
            _, saved = experts.forward(x_TD, ids_TK, gates_TK, keep=True)
            experts.backward(dy_TD, x_TD, ids_TK, gates_TK, saved, keep=False)
            add_graph()
        return sums

    return step


def staged(calls: Sequence[Call], weights: ExpertWeights, backend: str | None) -> Callable[[], WeightGrads]:
    experts = GraphedExperts(weights, backend=backend)

    def step() -> WeightGrads:
        left: list[WeightCall] = []
        for dy_TD, x_TD, ids_TK, gates_TK, device_ids_TK, _ in calls:
            _, saved = experts.forward(x_TD, ids_TK, gates_TK, keep=True)
            *_, work = experts.backward(dy_TD, x_TD, ids_TK, gates_TK, saved, keep=True)
            assert work is not None
            left.append(WeightCall(dy_TD, x_TD, device_ids_TK, work))
        return moe_ffn_weight_grads(left, weights)

    return step


def rows_only(calls: Sequence[Call], weights: ExpertWeights, backend: str | None) -> Callable[[], WeightGrads]:
    experts = GraphedExperts(weights, backend=backend)

    def again(call: Call) -> WeightCall:
        inputs = (call.dy_TD, call.x_TD, call.device_ids_TK, call.device_gates_TK)
        *_, work = moe_ffn_backward(*inputs, weights, None, rows=False, backend=backend)
        return WeightCall(call.dy_TD, call.x_TD, call.device_ids_TK, work)

    def step() -> WeightGrads:
        for dy_TD, x_TD, ids_TK, gates_TK, *_ in calls:
            _, saved = experts.forward(x_TD, ids_TK, gates_TK, keep=True)
            experts.backward(dy_TD, x_TD, ids_TK, gates_TK, saved, keep=False)
        return moe_ffn_weight_grads([again(call) for call in calls], weights)

    return step


WAYS: dict[str, Way] = {"added": added, "staged": staged, "rows only": rows_only}


def make_calls(task: Task, n_calls: int) -> list[Call]:
    ids_TK, gates_TK = task.sent(task.ids_TK), task.sent(task.gates_TK)
    values = (task.dy_TD, task.x_TD, ids_TK, gates_TK, task.ids_TK.int(), task.gates_TK)
    return [Call(*parts) for parts in zip(*(value.chunk(n_calls) for value in values), strict=True)]


def timed(step: Callable[[], object], n_steps: int, device: str) -> float:
    if device == "cuda":
        return time_ms(step, n_steps)  # pyright: ignore[reportArgumentType]
    began = time.perf_counter()
    for _ in range(n_steps):
        step()
    return (time.perf_counter() - began) * 1e3 / n_steps


def built(
    way: Way, calls: Sequence[Call], weights: ExpertWeights, backend: str | None
) -> tuple[Callable[[], WeightGrads], str, str]:
    """(its step, MiB of its tensors at the most, MiB that it took from the device), buffers of graphs and sums
    included, calls and weights not."""
    if not weights.w_in_EDH.is_cuda:
        return way(calls, weights, backend), "-", "-"
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step = way(calls, weights, backend)
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak, taken = torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved
    return step, f"{peak / MIB:.0f}", f"{taken / MIB:.0f}"


def difference(found: WeightGrads, right: WeightGrads) -> float:
    """The larger one of the two weights', relative to the norm."""
    norms = [(a.float() - b).norm() / b.norm() for a, b in zip(found, right, strict=True)]
    return max(float(norm) for norm in norms)


def compare(name: str, shape: Shape, arguments: argparse.Namespace, device: str, backend: str | None) -> bool:
    """Whether all ways make the same gradients."""
    counts: list[int] = arguments.calls
    most = shape._replace(tokens=shape.tokens * max(counts))
    task = make_task(most, "uniform", arguments.seed, device, torch.bfloat16)
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    every = make_calls(task, max(counts))
    for way in WAYS.values():
        way(every[:1], weights, backend)()  # what is compiled and loaded once
    rows: list[list[str]] = []
    same = True
    for n_calls in counts:
        calls = every[:n_calls]
        ways = {way: built(function, calls, weights, backend) for way, function in WAYS.items()}
        right = WeightGrads(*(grad.float().clone() for grad in ways["added"][0]()))
        errors = {way: difference(step(), right) for way, (step, *_) in ways.items()}
        del right
        n_steps = {
            way: max(1, int(arguments.milliseconds / timed(step, 1, device))) for way, (step, *_) in ways.items()
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, (step, *_) in ways.items():
                # The card's clock follows the power of the last tenth of a second: nobody inherits it.
                timed(step, n_steps[way], device)
                times[way].append(timed(step, n_steps[way], device))
        added_ms = median(times["added"])
        for way, (_, peak, taken) in ways.items():
            ms = median(times[way])
            spread = (max(times[way]) - min(times[way])) / ms
            wrong = not errors[way] <= WRONG
            same = same and not wrong
            rows.append(
                [f"{n_calls} calls, {way}", f"{ms:.3f}", f"{ms / added_ms:.2f}", f"{spread:.0%}", peak, taken,
                 f"{'WRONG ' if wrong else ''}{errors[way]:.1e}"]
            )  # fmt: skip
        del ways, step
    print(f"\n{name} {tuple(shape)[:5]} {shape.activation.value}")
    print_table(["calls", "ms", "of added", "spread", "peak MiB", "taken MiB", "difference"], rows)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--calls", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--milliseconds", type=float, default=100.0, help="of one way in one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    shapes, device, backend = {name: SHAPES[name] for name in arguments.shapes}, "cuda", None
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        shapes, device, backend = TINY, "cpu", "triton"
        arguments.calls, arguments.rounds, arguments.milliseconds = [1, 3], 1, 0.0
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here (--dry-run does not need one)")
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    same = [compare(name, shape, arguments, device, backend) for name, shape in shapes.items()]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()

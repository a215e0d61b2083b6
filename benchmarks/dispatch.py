# pyright: basic
"""Expert layers on one GPU: ours beside the others, forward and backward, correctness first.

    python benchmarks/dispatch.py --shapes olmoe server-gelu --contestants dense ours "titan compiled"

A contestant is a name of `_dispatch_contestants.py`, or `module:function` of the same kind. They take turns within a
round; times are medians over rounds. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from statistics import median

import torch
from _dispatch_contestants import CONTESTANTS
from _dispatch_task import MIB, Shape, Step, Task, make_task, time_ms

from moe_net.kernels.dispatch import ExpertWeights
from moe_net.kernels.reference import moe_ffn_reference
from moe_net.types import Activation

SHAPES = {
    "olmoe": Shape(16384, 2048, 1024, 64, 8),
    "qwen3": Shape(16384, 2048, 768, 128, 8),
    "mixtral": Shape(16384, 4096, 14336, 8, 2),
    "olmoe-2048": Shape(2048, 2048, 1024, 64, 8),
    "server-2048": Shape(2048, 1024, 4096, 16, 2),
    "switch": Shape(16384, 768, 3072, 64, 1, Activation.GELU),
    "server-gelu": Shape(256, 1024, 4096, 16, 2, Activation.GELU),
    "server-swiglu": Shape(256, 1024, 4096, 16, 2),
}


def oracle(task: Task) -> tuple[torch.Tensor, ...]:
    """The reference in fp32 from the same rounded data."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in task.leaves()]
    x, gates, w_in, w_out = leaves
    y = moe_ffn_reference(x, task.ids_TK, gates, ExpertWeights(w_in, w_out, task.activation))
    return (y.detach(), *torch.autograd.grad(y, leaves, task.dy_TD.float()))


def errors(step: Step, expected: tuple[torch.Tensor, ...]) -> list[float]:
    """||got - expected|| / ||expected|| of those of y, dx, dgates, dw_in, dw_out that the step returns; freed memory is
    filled with NaN before."""
    poison = [torch.full((64 * MIB,), float("nan"), device=expected[0].device) for _ in range(16)]
    del poison
    found = step()
    norms = []
    for value, right in zip(found, expected, strict=True):
        if value is not None:
            norms.append(((value.float() - right).norm() / right.norm()).item())
    return norms


def peak_mib(step: Step) -> float:
    """Most memory that a step takes on top of what was there, its outputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def find(name: str):
    if name in CONTESTANTS:
        return CONTESTANTS[name]
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def end(step: Step) -> None:
    """Of a contestant with threads of its own."""
    getattr(step, "close", lambda: None)()


def compare(name: str, routing: str, arguments: argparse.Namespace) -> None:
    shape = SHAPES[name]
    task = make_task(shape, routing, arguments.seed, "cuda", torch.bfloat16)
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    expected = oracle(task)
    for contestant in arguments.contestants:
        try:
            first = find(contestant)(task)
            first()  # compiles
            end(first)
            step = find(contestant)(task)
            norms = errors(step, expected) if contestant != "dense" else []
        except (RuntimeError, ImportError, ValueError, TypeError, AssertionError) as error:
            notes[contestant] = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            continue
        worst = max((n for n in norms if n == n), default=0.0)
        wrong = any(n != n for n in norms) or worst > 0.02
        notes[contestant] = ("WRONG " + " ".join(f"{n:.1e}" for n in norms)) if wrong else f"{worst:.1e}"
        steps[contestant] = step
    del expected
    torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {contestant: [] for contestant in steps}
    n_steps = {contestant: max(2, int(arguments.milliseconds / time_ms(step, 2))) for contestant, step in steps.items()}
    for _ in range(arguments.rounds):
        for contestant, step in steps.items():
            # The card's clock follows the power of the last tenth of a second: nobody inherits it from the one before.
            time_ms(step, n_steps[contestant])
            seconds[contestant].append(time_ms(step, n_steps[contestant]))
    dense_ms = median(seconds["dense"]) if "dense" in seconds else float("nan")
    print(f"\n{name} {tuple(shape)[:5]} {shape.activation.value}, {routing} routing")
    print(f"{'contestant':24} {'ms':>8} {'of dense':>9} {'spread':>7} {'peak MiB':>9}  worst error")
    for contestant in arguments.contestants:
        if contestant not in steps:
            print(f"{contestant:24} {'-':>8} {'-':>9} {'-':>7} {'-':>9}  {notes[contestant]}")
            continue
        ms = median(seconds[contestant])
        spread = (max(seconds[contestant]) - min(seconds[contestant])) / ms
        peak = peak_mib(steps[contestant])
        print(
            f"{contestant:24} {ms:8.3f} {dense_ms / ms:9.2f} {spread:7.0%} {peak:9.0f}  {notes[contestant]}", flush=True
        )
        end(steps[contestant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--milliseconds", type=float, default=100.0, help="of one contestant in one round")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape in arguments.shapes:
        for routing in arguments.routing:
            compare(shape, routing, arguments)


if __name__ == "__main__":
    main()

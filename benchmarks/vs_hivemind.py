# pyright: basic
"""Tokens per second, forward and backward with input gradient, of one MoE layer: ours, hivemind's, and no network.

    python benchmarks/vs_hivemind.py                                  # hidden 512 and 1024; about ten minutes
    python benchmarks/vs_hivemind.py --hidden 512 --batches 256 2048  # the two of the acceptance

One server with 8 experts, top-2, client and server on this machine over loopback, fp32 on every wire. Contestants take
turns within a round and keep their processes alive; the table gives medians. Every contestant gets one torch thread in
every process it has, and all experts of a contestant are computed by one process. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median

import _hivemind_fixes
import torch
from _moe_task import N_EXPERTS
from _processes import HERE, Child, end_cleanly_on_sigterm, print_table

START_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 600.0
LOCAL = "one process, no network"
OURS = "moe-net"
BY_HAND = "hivemind RemoteExpert by hand"
MOE = "hivemind RemoteMixtureOfExperts"
SWITCH = "hivemind RemoteSwitchMixtureOfExperts"

NOTES = f"""\
threads: 1 torch thread in every process. Experts are computed by 1 process of 1 thread in each contestant: ours in the
  server, hivemind's in its Runtime; its 4 handler and 16 pool processes and our client compute no experts.
arithmetic: GELU d -> 4d -> d without bias for all, same weights and routing. hivemind's own `ffn` has biases, a
  residual and a LayerNorm besides; here it serves a custom expert without them.
weights: hivemind steps the optimizer (SGD, its cheapest) at the end of every backward call; ours gets a Commit after
  each backward, which makes an AdamW step of all experts; the single process makes an AdamW step, too.
by hand: rows grouped by expert on the client, RemoteExpert called once per expert, results summed.
{_hivemind_fixes.DESCRIPTION}"""


@dataclass(slots=True)
class Contestant:
    name: str
    worker: Child
    key: str
    seconds: dict[int, list[float]] = field(default_factory=dict[int, list[float]])

    def measure(self, tokens: int, at_least_s: float, warm_up: bool) -> None:
        answer = self.worker.ask(
            STEP_TIMEOUT_S, do="steps", contestant=self.key, tokens=tokens, at_least_s=at_least_s, warm_up=warm_up
        )
        self.seconds.setdefault(tokens, []).extend(answer["seconds"])

    def tokens_per_s(self, tokens: int) -> float:
        return tokens / median(self.seconds[tokens])

    def is_slow(self) -> bool:
        """A step of this batch or the one before took seconds: no step to spare for warming up."""
        return any(max(taken_s) > 2 for taken_s in self.seconds.values())


@contextmanager
def contestants(d_model: int, handlers: int, only: str) -> Iterator[list[Contestant]]:
    """Start servers and workers for one width; all of them are gone afterwards."""
    with ExitStack() as stack:

        def start(script: str, *arguments: str) -> tuple[Child, dict]:
            child = stack.enter_context(Child(script, *arguments))
            return child, child.answer(START_TIMEOUT_S)

        found: list[Contestant] = []
        if only in ("all", "hivemind"):
            _, ready = start(
                "_hivemind_server.py",
                "--expert_uids", *(f"bench.{index}" for index in range(N_EXPERTS)),
                "--expert_cls", "plain_gelu_ffn", "--custom_module_path", str(HERE / "_hivemind_expert.py"),
                "--hidden_dim", str(d_model), "--num_handlers", str(handlers),
                "--optimizer", "sgd", "--device", "cpu", "--no_relay",
            )  # fmt: skip
            worker, _ = start("_hivemind_worker.py", str(d_model), ready["addresses"][0])
            found += [Contestant(MOE, worker, "moe"), Contestant(SWITCH, worker, "switch")]
            found += [Contestant(BY_HAND, worker, "by_hand")]
        found.append(Contestant(LOCAL, start("_local_worker.py", str(d_model))[0], "local"))
        if only in ("all", "ours"):
            _, ready = start("_moe_net_server.py", str(d_model))
            found.append(Contestant(OURS, start("_moe_net_worker.py", str(d_model), ready["address"])[0], "moe_net"))
        yield found


def check_equal(found: list[Contestant]) -> None:
    """Before any step, all give the same rows (Switch has other gates by design); RuntimeError otherwise."""
    rows = {c.name: torch.tensor(c.worker.ask(STEP_TIMEOUT_S, do="rows", contestant=c.key)["rows"]) for c in found}
    for name, rows_TD in rows.items():
        worst = float((rows_TD - rows[LOCAL]).abs().max())
        if name != SWITCH and worst > 1e-4:
            raise RuntimeError(f"{name} does not compute the same layer: rows differ by {worst:.2g}")


def run_width(d_model: int, batches: list[int], rounds: int, arguments: argparse.Namespace) -> bool:
    """Measure and print one width; False when a bar was measured and missed."""
    print(f"\nhidden {d_model}, {N_EXPERTS} experts, top-2")
    with contestants(d_model, arguments.handlers, arguments.only) as found:
        check_equal(found)
        for tokens in batches:
            for turn in range(rounds):
                for contestant in found:
                    # The slowest would take most of an hour: they get fewer steps, and the table says how many.
                    if sum(contestant.seconds.get(tokens, [])) < arguments.budget_s:
                        contestant.measure(tokens, arguments.at_least_s, turn == 0 and not contestant.is_slow())
    header = ["tokens/s"]
    for tokens in batches:
        header += [f"batch {tokens}", "of local", "steps"]
    rows = []
    by_name = {contestant.name: contestant for contestant in found}
    for contestant in found:
        row = [contestant.name]
        for tokens in batches:
            ratio = contestant.tokens_per_s(tokens) / by_name[LOCAL].tokens_per_s(tokens)
            row += [f"{contestant.tokens_per_s(tokens):.0f}", f"{ratio:.3f}", str(len(contestant.seconds[tokens]))]
        rows.append(row)
    print_table(header, rows)
    return print_bars(by_name, d_model, batches)


def print_bars(by_name: dict[str, Contestant], d_model: int, batches: list[int]) -> bool:
    """How often ours is each contestant, and whether the bars for hidden 512 are met."""
    if OURS not in by_name:
        return True
    met = True
    for name, contestant in by_name.items():
        ratios = {tokens: by_name[OURS].tokens_per_s(tokens) / contestant.tokens_per_s(tokens) for tokens in batches}
        if name != OURS:
            print(f"  moe-net / {name}: " + ", ".join(f"{ratio:.2f}x at {t}" for t, ratio in ratios.items()))
        bars = {MOE: {256: 10.0, 2048: 10.0}, LOCAL: {2048: 0.85}}.get(name, {}) if d_model == 512 else {}
        for tokens, bar in bars.items():
            if tokens in ratios:
                met &= ratios[tokens] >= bar
                verdict = "met" if ratios[tokens] >= bar else "MISSED"
                print(f"    bar {bar:g}x at batch {tokens}: {verdict} ({ratios[tokens]:.2f}x)")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 256, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-least-s", type=float, default=1.0, help="seconds of steps per turn, at least one step")
    parser.add_argument("--budget-s", type=float, default=30.0, help="seconds after which a contestant sits out")
    parser.add_argument("--handlers", type=int, default=4, help="hivemind's connection handler processes")
    parser.add_argument("--only", choices=["all", "hivemind", "ours"], default="all")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    torch.set_num_threads(1)
    print(f"cores: {os.cpu_count()}, load before: {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n{NOTES}")
    results = [run_width(d_model, arguments.batches, arguments.rounds, arguments) for d_model in arguments.hidden]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()

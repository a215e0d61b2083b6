# pyright: basic, reportIndexIssue=false
"""Client of hivemind's MoE server: three ways to call it. Argument 1: width; argument 2: an address of the server.

Every backward call also steps the called expert's optimizer on the server (SGD here, the cheapest it offers).
"""

from __future__ import annotations

import sys
from typing import Any

import _hivemind_fixes
import torch
from _moe_task import (
    EXPERTS_PER_TOKEN,
    N_EXPERTS,
    Layer,
    by_expert,
    first_rows,
    gate_weight,
    timed_steps,
)
from _processes import die_with_parent, serve_requests
from hivemind.dht import DHT
from hivemind.moe import RemoteMixtureOfExperts, RemoteSwitchMixtureOfExperts
from hivemind.moe.server.dht_handler import get_experts
from torch import Tensor, nn

UIDS = [f"bench.{index}" for index in range(N_EXPERTS)]


def make_layers(dht: DHT, d_model: int) -> dict[str, Layer]:
    gate_ED = nn.Parameter(gate_weight(d_model))
    common = {"in_features": d_model, "grid_size": (N_EXPERTS,), "dht": dht, "uid_prefix": "bench."}
    moe = RemoteMixtureOfExperts(**common, k_best=EXPERTS_PER_TOKEN)
    switch = RemoteSwitchMixtureOfExperts(**common, k_best=EXPERTS_PER_TOKEN)
    for module in (moe, switch):
        with torch.no_grad():
            module.proj.weight.copy_(gate_ED)
            module.proj.bias.zero_()
    experts = get_experts(dht, UIDS)

    def run_expert(index: int, x_RD: Tensor) -> Tensor:
        expert = experts[index]
        assert expert is not None
        return expert(x_RD)

    return {
        "moe": moe,
        # It multiplies its input by noise in place, which autograd forbids for a leaf.
        "switch": lambda x_TD: switch(x_TD * 1.0)[0],
        "by_hand": lambda x_TD: by_expert(x_TD, gate_ED, run_expert),
    }


def main() -> None:
    die_with_parent()
    torch.set_num_threads(1)
    _hivemind_fixes.apply()
    d_model = int(sys.argv[1])
    dht = DHT(initial_peers=[sys.argv[2]], start=True, client_mode=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        layers = make_layers(dht, d_model)

        def steps(contestant: str, tokens: int, at_least_s: float, warm_up: bool) -> dict[str, Any]:
            return timed_steps(layers[contestant], tokens, d_model, at_least_s, warm_up)

        serve_requests({"steps": steps, "rows": lambda contestant: {"rows": first_rows(layers[contestant], d_model)}})
    finally:
        dht.shutdown()


if __name__ == "__main__":
    main()

"""What a peer with a GPU hosts, and reads and writes with; on a machine without one the same arithmetic on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kernel_cases import DEVICE

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.bank import ExpertBank
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.graphed import GraphedExperts
from moe_net.types import ExpertId
from moe_net.wire.matrices import Matrices


def rounded_banks(run: RunConfig, experts: Sequence[ExpertId], *, graphed: bool = False) -> dict[int, ExpertBank]:
    """`graphed`: with a GPU's graphs on a CPU, too; by Triton's interpreter, so for few rows."""
    banks = make_banks(run, experts, device=DEVICE, compute_dtype=torch.bfloat16)
    if graphed and DEVICE == "cpu":
        for bank in banks.values():
            bank._graphed = GraphedExperts(bank._compute, backend="triton")
    return banks


def device_matrices(_device: torch.device, dtype: torch.dtype) -> Matrices:
    """In place of `matrices_on`, which on a CPU says the CPU's."""
    return OnDevice(torch.device(DEVICE), dtype)

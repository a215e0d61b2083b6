"""`pip install moe-net[hopper]` on a Hopper card: QuACK is what experts run on, and none of its parts is needed.

Each case is a process of its own, for what is imported stays. Runs where the extra and such a card are.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HOPPER = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9

SERVE = """
import logging, sys

for part in sys.argv[1:]:
    sys.modules[part] = None  # as if it were not installed
import torch

from moe_net.kernels import dispatch
from moe_net.kernels.types import ExpertWeights
from moe_net.types import Activation

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
generator = torch.Generator().manual_seed(1)
normal = lambda *shape: torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)
w_in_EDH = (normal(4, 512, 256) / 16).transpose(1, 2)
weights = ExpertWeights(w_in_EDH, normal(4, 256, 256) / 16, Activation.SWIGLU)
inputs = (
    normal(2048, 256), torch.randint(4, (2048, 2), generator=generator).cuda(),
    torch.rand((2048, 2), generator=generator).cuda(), weights,
)
for _ in range(2):
    y_TD, saved = dispatch.moe_ffn_forward(*inputs, keep=True)
    dx_TD, dgates_TK = dispatch.moe_ffn_backward(normal(2048, 256), *inputs, saved, weight_grads=None)
expected_TD, _ = dispatch.moe_ffn_forward(*inputs, keep=False, backend="reference")
torch.testing.assert_close(y_TD.float(), expected_TD.float(), rtol=0.05, atol=0.05)
assert dx_TD.isfinite().all() and dgates_TK.isfinite().all()
"""


def serve(folder: Path, *without: str) -> list[str]:
    """What a process says that runs experts, forward and backward, while parts of the extra are not there."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE, *without], capture_output=True, text=True, check=False, timeout=170,
        env=os.environ | {"TMPDIR": str(folder)},  # what QuACK compiles stays there
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        line for line in done.stdout.splitlines() if line.startswith("expert kernels: ") and "reference" not in line
    ]


if HOPPER and importlib.util.find_spec("quack") is not None:

    def test_quack_is_chosen(tmp_path: Path) -> None:
        assert serve(tmp_path) == ["expert kernels: backend quack for cuda, torch.bfloat16"]

    @pytest.mark.parametrize("part", ["quack", "cutlass", "tvm_ffi", "torch_c_dlpack_ext", "einops", "triton"])
    def test_experts_run_without_a_part_of_the_extra(part: str, tmp_path: Path) -> None:
        *left_out, chosen = serve(tmp_path, part)
        assert chosen.startswith("expert kernels: backend ")
        assert chosen.endswith(" for cuda, torch.bfloat16")
        assert all(" is left out: " in line for line in left_out)
        if part in ("quack", "cutlass", "triton"):
            assert "quack" not in chosen

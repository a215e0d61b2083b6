"""How many threads tensor work takes."""

from __future__ import annotations

import torch

from moe_net.machine import processors


def use_threads(asked: int | None) -> None:
    """Compute with the threads asked for; by default with torch's own choice (a thread per core, or OMP_NUM_THREADS),
    but no more than a container's quota lets run: those beyond it stop all the others in the middle of a product."""
    torch.set_num_threads(asked or min(torch.get_num_threads(), processors()))

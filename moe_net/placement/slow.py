"""What slow experts lose in the selection. Pure.

The bias stays within a bound that the run chooses: it decides between experts that the router likes about as well, and
cannot push tokens to experts that it does not like at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moe_net.placement.view import View
from moe_net.types import ExpertId

FULL_SLOWNESS = 4.0
"""At this many times the typical latency an expert loses the whole bound; in between, its logarithm decides."""


def latency_bias(
    view: View, layer: int, n_experts: int, slowness: Mapping[str, float], *, bound: float
) -> tuple[float, ...]:
    """For each expert of the layer, -bound..0 by the slowness of its fastest replica; 0 for one of unknown speed.

    `slowness`: peer id -> its latency over that of the typical peer (`placement.latency.slowness`).
    """
    return tuple(
        -bound * min(1.0, max(0.0, math.log(fastest, FULL_SLOWNESS)))
        for fastest in (
            min((max(slowness.get(p, 1.0), 1e-9) for p in view.replicas(ExpertId(layer, index))), default=1.0)
            for index in range(n_experts)
        )
    )

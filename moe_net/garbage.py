"""Tell Python's collector of cycles to leave alone what stays, and to look less often at what goes."""

from __future__ import annotations

import gc

# From Python's 700: a call of a server's makes hundreds of objects that are gone without it.
_YOUNG_OBJECTS = 5_000


def tune_collector() -> None:
    """Call it first thing in a process's main, when its modules are imported.

    torch and gRPC alone are some 220 000 objects, which the collector would look through again and again, for 0.1 s
    each time in which nothing else runs, and find nothing. Of a trainer's CPU in `benchmarks/latency.py` it was a
    tenth, of all processes' together 4 %. The settings hold for the whole process, so libraries do not call this.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # the oldest are none now: a round of all is due when there are a quarter more of them
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)

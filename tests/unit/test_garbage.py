"""The collector's settings: what was imported is left alone, cycles still go."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
import torch
from moe_net.garbage import tune_collector

class Node: ...

tune_collector()
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000, gc.get_freeze_count()
node = Node()
node.itself, gone = node, weakref.ref(node)
del node
made = [[] for _ in range(20_000)]  # no collection is asked for
assert gone() is None
"""


def test_modules_are_not_looked_through_again_and_cycles_go_without_being_asked_for() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr

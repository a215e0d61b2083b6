"""The examples do what they say when run as their first lines say."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


async def test_remote_experts_learn_inside_somebody_elses_model() -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "examples/own_model.py", cwd=ROOT, stdout=pipe)
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", stdout.decode())]
    assert losses[-1] < 0.5 * losses[0]

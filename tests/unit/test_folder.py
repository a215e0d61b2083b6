"""A folder belongs to one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_net.folder import alone_in

HOLDER = """
import sys
from pathlib import Path
from moe_net.folder import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_kept_out_until_the_first_has_gone_however_it_went(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(ValueError, match="another process writes to"), alone_in(folder):
            pass
        holder.kill()
        holder.wait()
        with alone_in(folder), pytest.raises(ValueError, match="a folder of its own"), alone_in(folder):
            pass

"""The committed generated code is what protos/ gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "protos/generate.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generated_code_matches_the_protos() -> None:
    answer = check(ROOT)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("changed", ["protos/moe_net/proto/v1/coordinator.proto", "moe_net/proto/v1/expert_pb2.pyi"])
def test_a_change_on_either_side_is_found(changed: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copytree(ROOT / "moe_net/proto", tmp_path / "moe_net/proto")
    path = tmp_path / changed
    path.write_text(path.read_text().replace("GetRun", "GetIt").replace("queue_rows", "queue_lines"))
    answer = check(tmp_path)
    assert answer.returncode != 0
    assert "differs from protos/" in answer.stderr

"""What can be known of a command line without the network is said before anything starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_coordinator.cli
import moe_peer.cli

MAINS = {"moe-peer": moe_peer.cli.main, "moe-coordinator": moe_coordinator.cli.main}
PEER = ("moe-peer", "serve", "--join", "127.0.0.1:1")
TRAINER = ("moe-peer", "train", "--join", "127.0.0.1:1")
LOCAL = ("moe-coordinator", "local")
COORDINATOR = ("moe-coordinator", "serve", "--config", "run.toml")

MISTAKES = [
    ((*TRAINER, "--data", "nowhere"), "--data nowhere: there is no such file or folder"),
    ((*TRAINER, "--data", "empty"), "--data empty: there is no file in that folder"),
    ((*TRAINER, "--out", "file"), "--out file: file is a file, not a folder"),
    ((*TRAINER, "--out", "file/deeper/still"), "--out file/deeper/still: Not a directory"),
    ((*TRAINER, "--out", "x" * 300), f"--out {'x' * 300}: File name too long"),
    ((*TRAINER, "--resume", "nowhere"), "--resume nowhere: there is no such folder"),
    ((*TRAINER, "--resume", "empty"), "--resume empty: nothing to resume: no empty/checkpoints/step-N/state.json"),
    ((*TRAINER, "--config", "nowhere"), "--config nowhere: there is no such file"),
    ((*TRAINER, "--config", "empty"), "--config empty: that is a folder, not a file"),
    (TRAINER[:2], "--join: give an address to join by"),
    ((*PEER, "--identity", "file"), "--identity file: mode 0644 lets others read the private key"),
    ((*PEER, "--identity", "secret"), "--identity secret: not a private key in PEM"),
    ((*PEER, "--identity", "empty"), "--identity empty: that is a folder, not a file"),
    ((*PEER, "--identity", "file/key"), "--identity file: file is a file, not a folder"),
    ((*PEER, "--load", "nowhere"), "--load nowhere: there is no such folder"),
    ((*PEER, "--experts", "banana"), "experts: 'banana' is not layer.index"),
    ((*PEER, "--listen", "192.0.2.1:0"), "cannot listen on 192.0.2.1:0"),
    ((*LOCAL, "--data", "nowhere"), "--data nowhere: there is no such file or folder"),
    ((*LOCAL, "--out", "file"), "--out file: file is a file, not a folder"),
    ((*LOCAL, "--resume", "empty"), "--resume empty/run.toml: there is no such file"),
    ((*LOCAL, "--faults", "nowhere"), "--faults nowhere: there is no such file"),
    ((*LOCAL, "--faults", "binary"), "binary: 'utf-8' codec can't decode"),
    ((*LOCAL, "--config", "nowhere"), "--config nowhere: there is no such file"),
    ((*LOCAL, "--config", "words.toml"), "model.vocab_size=64: tokenizer='bytes' has 256 tokens or more"),
    ((*LOCAL, "--config", "run.toml", "--sequences", "17"), "sequences=17 of seq_len=128 make a step of 2176 tokens"),
    ((*COORDINATOR[:3], "words.toml"), "model.vocab_size=64"),
    ((*COORDINATOR[:3], "top1.toml"), 'Use combine = "raw"'),
    ((*COORDINATOR[:3], "nowhere"), "--config nowhere: there is no such file"),
    ((*COORDINATOR, "--state", "file"), "--state file: file is a file, not a folder"),
    ((*COORDINATOR, "--listen", "192.0.2.1:7700"), "cannot listen on 192.0.2.1:7700"),
    ((*COORDINATOR, "--join", "127.0.0.1:107929"), "a port is in 1..65535, not 107929"),
    (
        ("moe-coordinator", "proxy", "--listen", "127.0.0.1:0", "--target", "h:1", "--faults", "nowhere"),
        "--faults nowhere: there is no such file",
    ),
    (
        ("moe-coordinator", "chaos", "--project", "p", "--metrics", "m", "--faults", "empty"),
        "--faults empty: that is a folder, not a file",
    ),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "secret").write_text("no key")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "run.toml").write_text('name = "demo"\n')
    (tmp_path / "words.toml").write_text("[model]\nvocab_size = 64\n")
    (tmp_path / "top1.toml").write_text("[model.router]\nexperts_per_token = 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def refusal(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        MAINS[arguments[0]](list(arguments[1:]))
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    return output.err


@pytest.mark.parametrize(
    ("arguments", "complaint"), MISTAKES, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_a_mistake_is_named_in_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(folder)
    said = refusal(arguments, capsys)
    assert said.startswith(f"{arguments[0]}: ")
    assert complaint in said
    assert said.count("\n") == 1
    assert everything_in(folder) == before


def test_a_port_that_is_taken_is_said_before_anything_starts(
    folder: Path, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    complaint = f"cannot listen on 127.0.0.1:{taken}: Address already in use"
    assert complaint in refusal((*PEER, "--listen", f"127.0.0.1:{taken}"), capsys)
    assert complaint in refusal((*COORDINATOR, "--listen", f"127.0.0.1:{taken}"), capsys)
    # The second of the peers would get it.
    assert complaint in refusal((*LOCAL, "--base-port", str(taken - 2)), capsys)


@pytest.mark.parametrize("arguments", [MISTAKES[0][0], (*PEER, "--load", "nowhere"), (*LOCAL, "--data", "nowhere")])
def test_a_mistake_costs_neither_torch_nor_grpc(arguments: tuple[str, ...], folder: Path) -> None:
    program = (
        "import sys\n"
        f"from {arguments[0].replace('-', '_')}.cli import main\n"
        "try:\n  main(sys.argv[1:])\n"
        "finally:\n  print(sorted({'torch', 'grpc', 'hivemind'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, *arguments[1:]], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (answer.returncode, answer.stdout) == (2, "[]\n")
    assert "nowhere" in answer.stderr

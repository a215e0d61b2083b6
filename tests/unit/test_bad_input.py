"""Any value for any option of any command, and for any field of a file: it is taken, or refused within a second by exit
code 2 and words that name it, and nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_coordinator.chaos
import moe_coordinator.cli
import moe_coordinator.local
import moe_coordinator.proxy_command
import moe_peer.cli
from moe_coordinator.command_line import COMMANDS as COORDINATOR
from moe_coordinator.config import toml_value
from moe_coordinator.faults import Fault, FaultPlan, Network
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.optim import OptimizerConfig
from moe_peer.command_line import COMMANDS as PEER

LIMIT_S = 1.0
NOT_BEGUN = 130
"""What `chaos` says where nothing was watched."""
MAINS: dict[str, Callable[[list[str]], None]] = {
    "moe-peer": moe_peer.cli.main,
    "moe-coordinator": moe_coordinator.cli.main,
}
NEEDED = {
    ("moe-peer", "serve"): {"join": "127.0.0.1:1"},
    ("moe-peer", "train"): {"join": "127.0.0.1:1"},
    ("moe-peer", "tokenizer"): {},
    ("moe-peer", "health"): {"what": "127.0.0.1:1"},
    ("moe-coordinator", "serve"): {"config": "run.toml"},
    ("moe-coordinator", "local"): {},
    ("moe-coordinator", "proxy"): {"listen": "127.0.0.1:0", "target": "127.0.0.1:1"},
    ("moe-coordinator", "chaos"): {"project": "p", "faults": "faults.toml", "metrics": "m"},
    ("moe-coordinator", "fields"): {},
}
OPTIONS = [
    (program, command, field.name, str(field.type))
    for program, commands in (("moe-peer", PEER), ("moe-coordinator", COORDINATOR))
    for command, kind in commands.items()
    for field in dataclasses.fields(kind)
]
FIELDS = [
    (table, field.name)
    for table, kind in (("", RunConfig), ("optimizer", OptimizerConfig), ("model", ModelConfig))
    for field in dataclasses.fields(kind)
] + [("model.router", field.name) for field in dataclasses.fields(RouterConfig)]
FAULT_FIELDS = [("", f.name) for f in dataclasses.fields(FaultPlan)] + [
    (table, field.name)
    for table, kind in (("network", Network), ("fault", Fault))
    for field in dataclasses.fields(kind)
]

WORDS = st.one_of(
    st.sampled_from(
        [
            "", " ", "-1", "0", "1", "2", "-0.5", "nan", "inf", "-inf", "1e400", "1e-9", "99999999999999999999999",
            "True", "None", "null", "*", "*.*", "0.0-99999999999", "1.", "h:1", "[::1]:0", "http://h:1", "127.0.0.1",
            "127.0.0.1:99999", "/ip4/127.0.0.1/tcp/0", "/ip4/x/tcp/1/p2p/A", "/", ".", "..", "run.toml", "faults.toml",
            "nowhere/at/all", "file", "file/below", "/dev/null", "/proc/1", "/proc/none", "x" * 300, "--help",
            "tiny", "bf16", "cpu", "cuda:9", "cuda:x", "9" * 5000,
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
VALUES = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-2, 300),
    st.floats(),
    st.booleans(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from(["fp32", "bpe", "raw", "gelu", "lowest_gate", "peer-0", "kill", "delay", "cut", "up"]),
)
SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run, and begin nothing: what does the work ends with exit code 0."""
    (tmp_path / "run.toml").write_text('name = "demo"\n')
    (tmp_path / "faults.toml").write_text("")
    (tmp_path / "file").write_text("text")
    monkeypatch.chdir(tmp_path)

    def stub(module: str, name: str) -> None:
        stubbed = ModuleType(module)
        setattr(stubbed, name, lambda *_: 0)
        monkeypatch.setitem(sys.modules, module, stubbed)
        package, _, last = module.rpartition(".")
        monkeypatch.setattr(sys.modules[package], last, stubbed, raising=False)

    stub("moe_peer.serve", "run_serve")
    stub("moe_peer.train", "run_train")
    stub("moe_peer.tokenizer", "run_tokenizer")
    stub("moe_peer.health", "run_health")
    stub("moe_coordinator.serve", "main")
    monkeypatch.setattr(moe_coordinator.local, "begin", lambda *_: 0)
    monkeypatch.setattr("moe_coordinator.chaos.until_signalled", lambda work: work)
    for module in ("moe_coordinator.proxy_command", "moe_coordinator.chaos"):
        monkeypatch.setattr(sys.modules[module].uvloop, "run", lambda work: work.close())
    return tmp_path


def words(program: str, command: str, **changed: str) -> list[str]:
    given = NEEDED[program, command] | changed
    positional = ["--", given.pop("what")] if "what" in given else []
    return [command, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()), *positional]


def outcome(program: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr. Takes less than the limit, and prints nothing for machines."""
    out, err = io.StringIO(), io.StringIO()
    began_s = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        MAINS[program](arguments)
    assert time.process_time() - began_s < LIMIT_S
    assert isinstance(stop.value.code, int)
    return stop.value.code, err.getvalue()


def names(said: str, name: str) -> bool:
    flat = " ".join(said.replace("│", " ").split())
    return name in flat or f"--{name.replace('_', '-')}" in flat


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@SETTINGS
@given(option=st.sampled_from(OPTIONS), value=WORDS)
def test_any_value_of_any_option_is_taken_or_named(option: tuple[str, str, str, str], value: str, folder: Path) -> None:
    program, command, name, kind = option
    before = everything_in(folder)
    changed = {"no_" + name if value == "no" else name: value}
    arguments = words(program, command, **changed)
    if kind == "bool":
        arguments = [*words(program, command), f"--{name.replace('_', '-')}", value]
    code, said = outcome(program, arguments)
    assert code in (0, 2, NOT_BEGUN), said
    if code == 2:
        # What is wrong within a file is said with the file's name.
        assert names(said, name) or kind == "bool" or said.startswith(f"{program}: {value}: "), said
        assert "Traceback" not in said
    assert everything_in(folder) == before


def check_file(program: str, arguments: list[str], name: str, folder: Path) -> None:
    before = everything_in(folder)
    code, said = outcome(program, arguments)
    assert code in (0, 2, NOT_BEGUN), said
    if code == 2:
        assert name in said, said
        assert "Value error" not in said
        assert said.count("\n") == 1, said
    assert everything_in(folder) == before


def toml(table: str, name: str, value: Any) -> str:
    return (f"[{table}]\n" if table else "") + f"{name} = {written(value)}\n"


def written(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return toml_value(value)


@SETTINGS
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_of_any_field_of_a_manifest_is_taken_or_named(
    field: tuple[str, str], value: Any, folder: Path
) -> None:
    (folder / "changed.toml").write_text(toml(*field, value))
    check_file("moe-coordinator", ["serve", "--config", "changed.toml"], field[1], folder)
    check_file("moe-coordinator", ["local", "--config", "changed.toml"], field[1], folder)


@SETTINGS
@given(
    option=st.sampled_from(
        [(c, f.name) for c, kind in PEER.items() if c != "health" for f in dataclasses.fields(kind)]
    ),
    value=VALUES,
)
def test_any_value_of_any_option_in_a_file_is_taken_or_named(option: tuple[str, str], value: Any, folder: Path) -> None:
    command, name = option
    (folder / "changed.toml").write_text(toml("", name, value))
    given = [] if name == "join" or command == "tokenizer" else ["--join", "127.0.0.1:1"]
    check_file("moe-peer", [command, *given, "--config", "changed.toml"], name, folder)


@SETTINGS
@given(field=st.sampled_from(FAULT_FIELDS), value=VALUES)
def test_any_value_of_any_field_of_a_faults_file_is_taken_or_named(
    field: tuple[str, str], value: Any, folder: Path
) -> None:
    table, name = field
    if table == "fault":
        there = {"target": '"peer-0"', "what": '"kill"', "at_step": "3"}
        text = "[[fault]]\n" + "".join(f"{key} = {word}\n" for key, word in there.items() if key != name)
        text += f"{name} = {written(value)}\n"
    else:
        text = toml(table, name, value)
    (folder / "changed.toml").write_text(text)
    check_file("moe-coordinator", ["local", "--faults", "changed.toml"], name, folder)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "run.toml").write_text("sed = 3\n")
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("program", "arguments", "named"),
    [
        ("moe-peer", ["train", "--join", "h:1", "--steps", "x"], "--steps"),
        ("moe-peer", ["serve", "--join", "h:1", "--listen", "1"], "listen"),
        ("moe-coordinator", ["serve", "--config", "run.toml"], "sed: unexpected keyword (is seed meant?)"),
        ("moe-coordinator", ["local", "--replicas", "9"], "replicas=9"),
    ],
)
def test_real_processes_say_it_too(program: str, arguments: list[str], named: str, bare: Path) -> None:
    module = program.replace("-", "_") + ".cli"
    answer = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=bare,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert (answer.returncode, answer.stdout) == (2, "")
    assert named in answer.stderr
    assert "Traceback" not in answer.stderr

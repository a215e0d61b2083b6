"""Ctrl-C at any moment of a command's start, and what a signal does to work on the loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from moe_net.signals import until_signalled

COMMANDS = {
    "moe_peer.cli": ("serve", "--join", "127.0.0.1:1"),
    "moe_coordinator.cli": ("serve", "--config", "examples/run.toml"),
}
# The command, interrupted as it begins to import a module.
INTERRUPTED = """
import os, signal, sys
from importlib import import_module
at, number, module, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[3:]
def interrupt(event, details):
    if event == "import" and details[0] == at:
        try:
            os.kill(os.getpid(), number)
            for _ in range(1000):  # the handler runs between two of these
                pass
        except KeyboardInterrupt:
            if at == "moe_net.entry":
                raise
            print("taken for something else, as some libraries do", file=sys.stderr)
command = import_module(module)
sys.addaudithook(interrupt)
command.main()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_way_in_imports_nothing_before_it_can_catch_ctrl_c(command: str) -> None:
    code = f"import sys\nbefore = set(sys.modules)\nimport {command}\nprint(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name != "__future__"] == [command.partition(".")[0], command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("module", ["moe_net.entry", "tyro", "moe_net.errors", "torch"])
def test_ctrl_c_while_a_command_is_being_loaded_ends_it_without_a_word(command: str, module: str) -> None:
    assert interrupted(command, module, signal.SIGINT) == (130, "", "")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_asked_to_stop_while_it_is_being_loaded_has_stopped_as_it_should(
    command: str, number: signal.Signals
) -> None:
    assert interrupted(command, "torch", number) == (0, "", "")


def interrupted(command: str, module: str, number: signal.Signals) -> tuple[int, str, str]:
    """Exit code, stderr and stdout of a command that gets a signal as it begins to import `module`."""
    argv = [sys.executable, "-c", INTERRUPTED, module, str(int(number)), command, *COMMANDS[command]]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return ended.returncode, ended.stderr, ended.stdout


async def test_the_first_signal_cancels_the_work_and_the_second_lets_it_clear_up() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)
            steps.append("cleared up")

    async with asyncio.timeout(10):
        await until_signalled(work())
    assert steps == ["cleared up"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_the_handlers_of_before_are_back_when_the_work_is_over(number: signal.Signals) -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(number, mine)
    try:
        await until_signalled(asyncio.sleep(0))
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


async def test_a_closed_terminal_changes_nothing_for_one_that_nohup_has_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    steps: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.01)  # a handler would be called by now
        steps.append("worked")

    try:
        await until_signalled(work())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps == ["worked"]


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await until_signalled(work())

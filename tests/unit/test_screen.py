"""A terminal that is closed, a pipe that nobody reads, a full disk: what is said there is lost, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disks import full_at

from moe_net.screen import Lossy, lossy_screen

SAYS = """
import sys
from moe_net.screen import lossy_screen
with lossy_screen():
    for stream in (sys.stdout, sys.stderr):
        for number in range(3):
            print(number, file=stream)
"""


def said(stdout: int, stderr: int) -> None:
    subprocess.run([sys.executable, "-c", SAYS], stdout=stdout, stderr=stderr, check=True)


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_one_that_is_gone_is_told_once_on_the_other_and_the_program_ends_well(tmp_path: Path, gone: str) -> None:
    read, pipe = os.pipe()
    os.close(read)
    with (tmp_path / "other").open("wb") as other:
        said(*((pipe, other.fileno()) if gone == "stdout" else (other.fileno(), pipe)))
    os.close(pipe)
    told = f"{gone} cannot be written (Broken pipe): going on without it"
    lines = (tmp_path / "other").read_text().splitlines()
    assert lines == ([told, "0", "1", "2"] if gone == "stdout" else ["0", "1", "2", told])


def test_with_neither_of_them_it_ends_well_too() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    said(full, full)
    os.close(full)


def test_a_file_takes_again_what_is_written_once_there_is_room_and_a_second_loss_is_told_again(tmp_path: Path) -> None:
    told: list[str] = []
    with Lossy(tmp_path / "log", "a", name="the log", tell=told.append) as log:
        assert log.write(b"one\n") == 4
        with full_at(6):
            assert log.write(b"two\n") == 4, "as much as fits"
            log.write(b"lost\n")
        log.write(b"three\n")
        with full_at(0):
            log.write(b"lost\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwthree\n"
    assert told == ["the log cannot be written (File too large): going on without it"] * 2


def test_the_streams_of_before_are_back_and_those_without_a_file_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    before = sys.stderr
    with lossy_screen():
        assert sys.stdout is stdout
    assert sys.stderr is before

"""Generated tests are the same on every machine, slow ones too, and leave nothing in the repository."""

from __future__ import annotations

from pathlib import Path

from hypothesis import settings
from hypothesis.configuration import storage_directory

ROOT = Path(__file__).resolve().parents[2]


def test_generated_tests_draw_the_same_examples_without_a_deadline_and_keep_none() -> None:
    default = settings.default
    assert default is not None
    assert (default.deadline, default.derandomize, default.database, default.print_blob) == (None, True, None, True)


def test_what_hypothesis_keeps_lies_outside_the_repository() -> None:
    assert not storage_directory().path.resolve().is_relative_to(ROOT)

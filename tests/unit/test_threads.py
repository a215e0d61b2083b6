"""How many threads compute, in a container and out of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe_peer import threads
from moe_peer.threads import use_threads


@pytest.fixture(autouse=True)
def torch_would_take_three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "processors", "n"), [(None, 1, 1), (None, 2, 2), (None, 64, 3), (4, 1, 4)]
)  # fmt: skip
def test_without_an_order_no_more_threads_compute_than_processors_may_be_used(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, processors: int, n: int
) -> None:
    monkeypatch.setattr(threads, "processors", lambda: processors)
    use_threads(asked)
    assert torch.get_num_threads() == n

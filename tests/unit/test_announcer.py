"""What an announcer does when the directory does not answer; the rest is in tests/contract/test_discovery.py."""

from __future__ import annotations

import asyncio

import pytest

from moe_net.discovery import announcer as announcer_module
from moe_net.discovery.announcer import Announcer
from moe_net.discovery.memory import MemoryDiscovery, MemoryRegistry
from moe_net.discovery.record import Identity
from moe_net.types import ExpertId


async def test_a_withdrawal_that_nobody_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stalling(MemoryDiscovery):
        stalled = False

        async def announce(self, record: bytes, *, peer_id: str, expires_at_s: float) -> None:
            if self.stalled:
                await asyncio.Event().wait()

    monkeypatch.setattr(announcer_module, "WITHDRAW_S", 0.05)
    one = Stalling(MemoryRegistry(), run="run")
    async with asyncio.timeout(5):
        async with Announcer(one, Identity.generate(), run="run", address="127.0.0.1:1", experts=[ExpertId(0, 0)]):
            one.stalled = True
    assert "perhaps not withdrawn" in caplog.text

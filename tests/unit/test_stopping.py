"""What a training that is asked to stop gives up, and when."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from swarms import make_trainer, small_run

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_peer import stopping
from moe_peer.stopping import Stop, Waits
from moe_peer.trainer import Trainer

RUN = small_run()


@pytest.fixture
def waits() -> Iterator[Waits]:
    with Portal() as portal:
        yield Waits(portal)


async def for_ever() -> None:
    await asyncio.Event().wait()


def test_closed_waits_end_those_that_wait_and_begin_no_more(waits: Waits) -> None:
    assert waits.run(asyncio.sleep(0, "an answer")) == "an answer"
    waits.close_after(0.01)
    with pytest.raises(CancelledError):
        waits.run(for_ever())
    with pytest.raises(CancelledError):
        waits.submit(asyncio.sleep(0))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_a_signal_before_the_steps_interrupts_at_once(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Stop().installed() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_request_does_not_cut_short_the_leaving(waits: Waits) -> None:
    with Stop().installed() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.ends(waits), pytest.raises(CancelledError):  # whoever took it for something else and went on
            waits.run(for_ever())


def test_who_started_us_with_nohup_does_not_want_us_to_hear_of_the_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().installed() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not stop.asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_steps_ends_what_is_waited_for(waits: Waits, number: signal.Signals) -> None:
    with Stop().installed() as stop, stop.ends(waits):
        os.kill(os.getpid(), number)
        with pytest.raises(CancelledError):
            waits.run(for_ever())
        # Docker may ask again; only somebody at a keyboard may know better.
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked


def test_the_step_at_hand_may_end(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stop().installed() as stop, stop.ends(waits), stop.at_a_step():
        os.kill(os.getpid(), signal.SIGTERM)
        assert waits.run(asyncio.sleep(0.01, "made")) == "made"
    monkeypatch.setattr(stopping, "STEP_S", 0.01)
    with Stop().installed() as stop, stop.ends(waits), stop.at_a_step():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(CancelledError):
            waits.run(for_ever())


def test_a_signal_after_the_steps_changes_nothing(waits: Waits) -> None:
    with Stop().installed() as stop:
        with stop.ends(waits):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert waits.run(asyncio.sleep(0, "leaving")) == "leaving"


class Stalling(LocalTransport):
    """Asks for the stop when it is called for `kind`, and never answers."""

    kind = ""
    waits: Waits

    async def _stall(self, kind: str) -> None:
        if kind == self.kind:
            await asyncio.to_thread(self.waits.close_after, 0)
            await for_ever()

    async def backward(self, *args: Any, **kwargs: Any) -> Any:
        await self._stall("backward")
        return await super().backward(*args, **kwargs)

    async def commit(self, *args: Any, **kwargs: Any) -> Any:
        answer = await super().commit(*args, **kwargs)
        await self._stall("commit")
        return answer


@contextmanager
def stalling_at_the_second(kind: str, n_micro: int) -> Generator[tuple[Trainer, ExpertHost]]:
    """A trainer that has made one step, and whose peer stalls in the next one at its `kind` of call."""
    host = ExpertHost(make_banks(RUN, RUN.model.expert_ids))
    transport = Stalling({"peer": host})
    view = View([PeerInfo(peer_id="peer", address="", experts=RUN.model.expert_ids)])
    with Portal() as portal:
        swarm = ExpertSwarm(trainer="test", transport=transport, view=lambda: view)
        transport.waits = Waits(portal)
        link = SwarmLink(swarm=swarm, runner=transport.waits)
        with make_trainer(RUN, link, n_micro=n_micro, in_flight=n_micro) as trainer:
            trainer.train_step()
            transport.kind = kind
            yield trainer, host
        portal.run(swarm.close())


@pytest.mark.parametrize("n_micro", [1, 2])
def test_a_step_that_is_given_up_has_changed_nothing(n_micro: int) -> None:
    with stalling_at_the_second("backward", n_micro) as (trainer, host):
        trunk = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        experts = host.fetch(0, ())
        with pytest.raises(CancelledError):
            trainer.train_step()
        assert trainer.step == 1
        assert all(torch.equal(value, trunk[name]) for name, value in trainer.model.state_dict().items())
        assert all(torch.equal(value, experts[name]) for name, value in host.fetch(0, ()).items())


def test_a_step_whose_commit_nobody_answers_is_made() -> None:
    with stalling_at_the_second("commit", 1) as (trainer, host):
        trainer.train_step()
        assert trainer.step == 2
        assert {version for versions in host.versions.values() for version in versions.values()} == {2}

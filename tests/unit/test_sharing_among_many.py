"""Whom a peer asks for their part of a step when many claim to be its replicas."""

from __future__ import annotations

import asyncio
from collections import deque

from replicas import times_asked

from moe_net.rpc.base import CallError, CallFailure
from moe_peer.sharing import MIN_WAIT_S, PARTS_FACTOR, STRANGERS_FACTOR, _Partner, choose


async def test_a_partner_that_takes_its_time_to_say_that_it_is_busy_is_asked_more_and_more_seldom() -> None:
    async def stall() -> None:
        await asyncio.sleep(MIN_WAIT_S)
        raise CallError(CallFailure.BUSY, "liar", "a moment")

    assert await times_asked(6, stall) == 2, "and after one step without it"


def partner(*, answered: int = 0, failures: int = 0, asked: int = 0) -> _Partner:
    return _Partner(waits_s=deque([0.1] * answered), failures=failures, asked=asked)


def test_strangers_are_asked_for_what_there_is_room_for_and_keep_out_nobody_who_answers() -> None:
    friends = {f"friend {i}": partner(answered=1, asked=i) for i in range(3)}
    sybils = {f"sybil {i}": partner() for i in range(24)}
    everybody = {**sybils, **friends}
    chosen = choose(everybody, dict.fromkeys(everybody, 10), 10)
    assert chosen >= friends.keys()
    assert len(chosen) == len(friends) + STRANGERS_FACTOR
    many = {f"friend {i:02}": partner(answered=1, asked=i) for i in range(20)}
    assert choose(sybils | many, dict.fromkeys(sybils | many, 10), 10) == set(list(many)[:PARTS_FACTOR])
    small = {f"sybil {i}": 1 for i in range(24)}
    assert choose(sybils, small, 10) == sybils.keys(), "it is bytes that are short"


def test_an_honest_newcomer_has_its_turn_however_many_others_come() -> None:
    partners = {f"sybil {i}": partner() for i in range(24)} | {"honest": partner()}
    for step in range(1, 8):
        chosen = choose(partners, dict.fromkeys(partners, 10), 10)
        if "honest" in chosen:
            break
        for peer_id in chosen:
            partners[peer_id].asked = step
        partners |= {f"sybil {100 * step + i}": partner() for i in range(24)}
    else:
        raise AssertionError("it was never asked")

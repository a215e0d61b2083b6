"""Where members were last seen, and whom to look for."""

from __future__ import annotations

import pytest

from moe_net.discovery.book import A_TIME, MAX_MET, AddressBook, split, tcp_of

GIVEN = "/dns/run.example/tcp/7/p2p/12D3KooA"


def test_a_member_that_was_given_stays_and_its_name_comes_before_where_it_was_seen() -> None:
    book = AddressBook([GIVEN])
    book.note("12D3KooA", ["/ip4/10.0.0.7/tcp/7"])
    for number in range(2 * MAX_MET):
        book.note(f"B{number}", ["/ip4/10.0.0.8/tcp/7"])
    assert book.addresses("12D3KooA") == ("/dns/run.example/tcp/7",)
    assert GIVEN in book.multiaddrs
    book.note("12D3KooA", ["/ip4/10.0.0.9/tcp/7"])
    assert book.addresses("12D3KooA") == ("/dns/run.example/tcp/7", "/ip4/10.0.0.9/tcp/7")


def test_of_those_that_were_met_the_longest_unseen_leave() -> None:
    book = AddressBook([])
    for number in range(MAX_MET):
        book.note(f"B{number}", ["/ip4/10.0.0.8/tcp/7"])
    book.note("B0", ["/ip4/10.0.0.9/tcp/7"])
    book.note("new", ["/ip4/10.0.0.9/tcp/7"])
    assert book.addresses("B1") == ()
    assert book.addresses("B0") == ("/ip4/10.0.0.9/tcp/7",)
    book.note("nowhere", [])
    assert book.addresses("nowhere") == ()


def test_every_member_that_is_lost_has_its_turn_and_no_other() -> None:
    book = AddressBook([GIVEN])
    names = {f"B{number}" for number in range(3 * A_TIME + 1)}
    for name in sorted(names):
        book.note(name, ["/ip4/10.0.0.8/tcp/7"])
    turns = [book.next_lost(["B0"]) for _ in range(len(names))]
    assert all(turn[0] == "12D3KooA" and len(turn) == 1 + A_TIME == len(set(turn)) for turn in turns)
    assert set().union(*turns) == names - {"B0"} | {"12D3KooA"}
    assert book.next_lost([*names, "12D3KooA"]) == []


@pytest.mark.parametrize("wrong", ["", "host:1", "/ip4/1.2.3.4/tcp/1", "/p2p/12D3KooA", "/ip4/1.2.3.4/tcp/1/p2p/O0"])
def test_what_is_no_members_address_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not the libp2p address of a member"):
        split(wrong)


def test_host_and_port_of_an_address() -> None:
    assert split(GIVEN) == ("/dns/run.example/tcp/7", "12D3KooA")
    assert tcp_of("/ip6/::1/tcp/7") == ("::1", 7)
    assert tcp_of("/ip4/1.2.3.4/udp/7/quic") is None

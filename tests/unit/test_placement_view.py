"""The view: replicas, what is live, and views without some peers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_net.placement.view import View
from moe_net.types import ExpertId, PeerInfo

EXPERTS = st.builds(ExpertId, st.integers(0, 2), st.integers(0, 5))
PEERS = st.lists(
    st.builds(
        lambda peer_id, experts, sequence: PeerInfo(
            peer_id=peer_id, address="h:1", experts=tuple(sorted(experts)), sequence=sequence
        ),
        st.sampled_from("abcdefgh"),
        st.sets(EXPERTS, max_size=8),
        st.integers(0, 3),
    ),
    max_size=10,
)


@given(peers=PEERS)
def test_replicas_are_the_peers_that_say_so(peers: list[PeerInfo]) -> None:
    view = View(peers)
    assert list(view.peers) == sorted({p.peer_id for p in peers})
    for layer in range(3):
        for index in range(6):
            expert = ExpertId(layer, index)
            hosts = [p.peer_id for p in view.peers.values() if expert in p.experts]
            assert view.replicas(expert) == tuple(hosts)
            assert (expert in view.experts) == bool(hosts)
        assert view.live(layer, 6) == tuple(bool(view.replicas(ExpertId(layer, i))) for i in range(6))


@given(peers=PEERS)
def test_the_latest_record_of_a_peer_counts(peers: list[PeerInfo]) -> None:
    for peer_id, peer in View(peers).peers.items():
        assert peer.sequence == max(p.sequence for p in peers if p.peer_id == peer_id)


@given(peers=PEERS, gone=st.sets(st.sampled_from("abcdefghxyz")))
def test_without_is_the_view_of_the_others(peers: list[PeerInfo], gone: set[str]) -> None:
    view = View(peers)
    before = (dict(view.peers), {e: view.replicas(e) for e in view.experts})
    less = view.without(gone)
    fresh = View([p for p in view.peers.values() if p.peer_id not in gone])
    assert less == fresh
    assert hash(less) == hash(fresh)
    assert less.experts == fresh.experts
    assert all(less.replicas(e) == fresh.replicas(e) for e in view.experts)
    assert (dict(view.peers), {e: view.replicas(e) for e in view.experts}) == before
    if not gone & view.peers.keys():
        assert less is view

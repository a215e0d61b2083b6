"""Who has learned what: replicas that meet in any order end with all of it, once, and the newest of one line wins."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.errors import CheckpointError
from moe_net.experts.lineage import Lineage, Seen
from moe_net.experts.replicate import share_of_other
from moe_net.types import ExpertShape
from moe_net.wire.state import MAX_COUNT, MAX_ORIGINS, check_state

MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@dataclass
class Replica:
    """`worth` of each row that was ever learned: how much of it is in the weights. A mean of two is the mean of these:
    gradients learned apart reach the weights by the share of the one that learned them."""

    origin: int
    lineage: Lineage = field(default_factory=Lineage)
    worth: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    learned: int = 0
    version: int = 0

    def learn(self, rows: int) -> None:
        self.version += 1
        for _ in range(rows):
            self.learned += 1
            self.worth[self.origin, self.learned] = 1.0
        self.lineage = self.lineage.plus(self.origin, rows, self.version)


def meet(a: Replica, b: Replica) -> float:
    """As `replicate.average`; the share of b."""
    share = share_of_other(a.lineage, b.lineage, a.version, b.version)
    rows = a.worth.keys() | b.worth.keys()
    mean = {row: (1 - share) * a.worth.get(row, 0.0) + share * b.worth.get(row, 0.0) for row in rows}
    for replica in (a, b):
        replica.worth = {row: worth for row, worth in mean.items() if worth > 0}
        replica.version = max(a.version, b.version)
    a.lineage = b.lineage = a.lineage.merged(b.lineage)
    return share


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(0, 3), st.integers(0, 4)),
        st.tuples(st.just("meet"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("restart"), st.integers(0, 3), st.integers(0, 3)),
    ),
    max_size=30,
)


@given(events=EVENTS)
@MANY
def test_no_learning_is_lost_and_none_counts_twice_however_replicas_meet(events: list[tuple[str, int, int]]) -> None:
    replicas = [Replica(origin) for origin in range(1, 5)]
    lives = 4
    for what, i, n in events:
        match what:
            case "learn":
                replicas[i].learn(n)
            case "meet" if i != n:
                meet(replicas[i], replicas[n])
            case "restart":  # all that it knows is gone, and it takes over another's state
                lives += 1
                replicas[i] = Replica(lives)
                if i != n:
                    meet(replicas[i], replicas[n])
        for replica in replicas:
            said = {(o, row) for o, seen in replica.lineage.seen.items() for row in range(1, seen.rows + 1)}
            assert replica.worth.keys() <= said, "what is in the weights is in the lineage"
            assert all(worth <= 1 + 1e-9 for worth in replica.worth.values()), "more than once"
    everything = Lineage()
    for replica in replicas:
        everything = everything.merged(replica.lineage)
    for _ in range(2):
        for a, b in permutations(replicas, 2):
            meet(a, b)
    assert all(replica.lineage == everything for replica in replicas)


@given(
    order=st.permutations([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    between=st.lists(st.sampled_from([(1, 2), (2, 3), (0, 1), (0, 3)]), max_size=6),
)
@MANY
def test_the_one_that_learns_wins_in_any_order_of_meetings(
    order: list[tuple[int, int]], steps: list[int], between: list[tuple[int, int]]
) -> None:
    replicas = [Replica(origin) for origin in range(1, 5)]
    for rows in steps:
        replicas[0].learn(rows)
        for a, b in between:
            share = meet(replicas[a], replicas[b])
            assert share in (0.0, 1.0) or replicas[a].worth == replicas[b].worth
    expected = dict(replicas[0].worth)
    for _ in range(2):  # whom it meets last in the first round knows it for the others in the second
        for a, b in order:
            meet(replicas[a], replicas[b])
    assert all(replica.worth == expected for replica in replicas)
    assert set(expected.values()) == {1.0}


def test_who_has_taken_over_a_third_ones_learning_does_not_lose_half_of_it() -> None:
    learner, carrier, idle = (Replica(origin) for origin in (1, 2, 3))
    learner.learn(10)
    meet(learner, carrier)
    # Neither of these two has learned anything itself.
    assert meet(idle, carrier) == 1
    assert idle.worth == learner.worth


LINEAGES = st.dictionaries(
    st.integers(0, 60), st.builds(Seen, st.integers(1, 50), st.integers(1, 9)), max_size=MAX_ORIGINS
).map(Lineage)


@given(a=LINEAGES, b=LINEAGES, c=LINEAGES)
@MANY
def test_merging_is_the_same_in_any_order_and_bounded(a: Lineage, b: Lineage, c: Lineage) -> None:
    assert a.merged(b) == b.merged(a)
    assert a.merged(a) == a
    assert a.merged(b).merged(c) == a.merged(b.merged(c))
    both = a.merged(b)
    assert len(both.seen) <= MAX_ORIGINS
    assert a.unseen_by(both) == b.unseen_by(both) == 0, "also when the oldest were forgotten"
    assert Lineage.from_tensor(both.to_tensor()) == both


def test_the_origins_that_learned_last_are_kept() -> None:
    lineage = Lineage()
    for origin in range(3 * MAX_ORIGINS):
        lineage = lineage.plus(origin, 5, version=origin + 1)
    assert lineage.seen.keys() == set(range(2 * MAX_ORIGINS, 3 * MAX_ORIGINS))
    assert lineage.plus(7, 0, 1) is lineage
    assert lineage.plus(95, MAX_COUNT, 97).seen[95] == Seen(MAX_COUNT, 97)


def test_nobody_else_says_what_we_have_learned() -> None:
    forged = Lineage().plus(1, MAX_COUNT, 3).plus(2, 8, 3)
    assert forged.capped(1, 5) == Lineage({1: Seen(5, 3), 2: Seen(8, 3)})
    assert forged.capped(1, 0) == Lineage({2: Seen(8, 3)})
    assert forged.capped(3, 0) is forged


def test_our_own_rows_are_not_forgotten_however_many_others_claim_to_have_learned_later() -> None:
    """Rows that we learned afterwards counted from 0: who had seen our first ones took them for those."""
    mine = Lineage(own=1).plus(1, 10, 3)
    seen_by_others = mine
    invented = Lineage({100 + i: Seen(MAX_COUNT, MAX_COUNT) for i in range(MAX_ORIGINS)})
    met = mine.merged(invented).plus(7, 1, 4).plus(1, 2, 4)
    assert len(met.seen) == MAX_ORIGINS
    assert met.rows_of(1) == 12
    assert met.unseen_by(seen_by_others) >= 2
    assert Lineage.from_tensor(met.to_tensor(), own=1).merged(invented).rows_of(1) == 12


def test_an_idle_replica_does_not_outweigh_those_who_have_seen_and_forgotten_its_rows() -> None:
    idle = Lineage(own=1).plus(1, 10**6, 100)
    busy = Lineage(idle.seen, own=100)
    for i in range(MAX_ORIGINS + 1):
        busy = busy.plus(100 + i, 1000, 200 + i)
    assert busy.rows_of(1) == 0
    idle_sent, busy_sent = (Lineage.from_tensor(lineage.to_tensor()) for lineage in (idle, busy))
    assert share_of_other(idle, busy_sent, 100, 232) == 1.0
    assert share_of_other(busy, idle_sent, 232, 100) == 0.0
    assert idle.plus(1, 5, 233).unseen_by(busy) > 0


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[1, 2]], "not torch.int64"),
        ([[i, 1, 1] for i in range(MAX_ORIGINS + 1)], "not torch.int64"),
        ([[1, -1, 0]], "negative or over"),
        ([[-1, 1, 0]], "negative or over"),
        ([[1, MAX_COUNT + 1, 0]], "negative or over"),
        ([[1, 1, 0], [1, 2, 0]], "twice"),
    ],
)
def test_a_lineage_that_cannot_be_is_refused(rows: list[list[int]], reason: str) -> None:
    shape = ExpertShape(d_model=2, d_ff=3)
    sizes = {"in": (2, shape.d_hidden), "out": (3, 2)}
    state = {f"0.1.{kind}_{side}": torch.zeros(size) for kind in "wmv" for side, size in sizes.items()}
    state["0.1.version"] = torch.tensor(0)
    check_state(state, layer=0, indices=[1], shape=shape)
    with pytest.raises(CheckpointError, match=reason):
        check_state(state | {"0.1.lineage": torch.tensor(rows)}, layer=0, indices=[1], shape=shape)

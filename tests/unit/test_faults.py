"""The file of faults, and what is due when."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_coordinator.faults import Action, Fault, FaultPlan, Network, Timetable, advance, is_cut, timetable
from moe_coordinator.shaping import Conditions
from moe_net.config import from_dict, load_toml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def plan(**fault: object) -> FaultPlan:
    return from_dict(FaultPlan, {"fault": [fault]})


def test_a_file_reads_as_written(tmp_path: Path) -> None:
    file = tmp_path / "faults.toml"
    file.write_text(
        "seed = 7\n[network]\nround_trip_s = 0.15\n"
        '[[fault]]\nat_step = 20\ntarget = "peer-1"\nwhat = "stop"\nduration_s = 5\n'
        '[[fault]]\nat_s = 30.0\ntarget = "peer-0"\nwhat = "half_open"\ndirection = "up"\n'
    )
    assert load_toml(FaultPlan, file) == FaultPlan(
        seed=7,
        network=Network(round_trip_s=0.15),
        fault=(
            Fault(at_step=20, target="peer-1", what="stop", duration_s=5.0),
            Fault(at_s=30.0, target="peer-0", what="half_open", direction="up"),
        ),
    )


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("faults*.toml")), ids=lambda path: path.name)
def test_the_examples_are_what_a_run_of_three_peers_can_have(file: Path) -> None:
    read = load_toml(FaultPlan, file)
    read.check(peers=3, trainers=1, steps=300)
    assert read.fault


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({"wat": 1}, "fault.0.wat: unexpected keyword"),
        ({"what": "explode"}, "fault.0.what: Input should be 'kill'"),
        ({"at_step": -1}, "fault.0: .*must not be negative"),
        ({"at_s": 3.0}, "at_step or at_s, and not both"),
        ({"at_step": None}, "at_step or at_s"),
        ({"duration_s": 3.0}, "duration_s says nothing about kill"),
        ({"what": "bandwidth"}, "bandwidth needs mib_s"),
        ({"what": "bandwidth", "mib_s": 0.0}, "bandwidth_mib_s=0.0 must be positive"),
        ({"what": "half_open"}, "half_open needs direction"),
        ({"what": "corrupt"}, "corrupt needs per_mib"),
        ({"what": "delay"}, "delay needs round_trip_s"),
        ({"what": "delay", "tail_s": 1.0}, "go together"),
        ({"what": "delay", "round_trip_s": -1.0}, "round_trip_s=-1.0 must be a number, and not negative"),
        ({"what": "cut", "target": "coordinator"}, "only peers have one"),
        ({"what": "restart", "target": "trainer-0"}, "only peers and the coordinator are restarted"),
        ({"what": "disconnect", "after_s": 1.0}, "after_s says nothing about disconnect"),
    ],
)
def test_mistakes_are_named(fault: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan(**{"target": "peer-0", "what": "kill", "at_step": 1, **fault})


def test_what_the_run_does_not_have_is_refused() -> None:
    faults = plan(target="peer-3", what="kill", at_step=10)
    faults.check(peers=4, trainers=1, steps=11)
    with pytest.raises(ValueError, match=r"fault\.0\.target: the run has no peer-3"):
        faults.check(peers=3, trainers=1, steps=11)
    with pytest.raises(ValueError, match=r"fault\.0\.at_step=10 is not one of the steps 0\.\.9"):
        faults.check(peers=4, trainers=1, steps=10)


def test_only_peers_with_a_bad_network_need_a_proxy() -> None:
    faults = plan(target="peer-1", what="cut", at_step=1)
    assert [faults.needs_proxy(f"peer-{i}") for i in range(3)] == [False, True, False]
    assert not plan(target="peer-1", what="stop", at_step=1).needs_proxy("peer-1")
    assert FaultPlan(network=Network(round_trip_s=0.1)).needs_proxy("peer-1")


def test_conditions_of_faults_at_the_same_time_add_up_and_others_do_not_count() -> None:
    faults = FaultPlan(network=Network(round_trip_s=0.1, bandwidth_mib_s=5.0))
    peer = {"at_step": 0, "target": "peer-0"}
    active = [
        Fault(what="delay", round_trip_s=0.2, jitter_s=0.1, tail_probability=0.02, tail_s=1.0, **peer),  # type: ignore[arg-type]
        Fault(what="bandwidth", mib_s=9.0, **peer),  # type: ignore[arg-type]
        Fault(what="half_open", direction="down", **peer),  # type: ignore[arg-type]
        Fault(what="blackhole", at_step=0, target="peer-1"),
        Fault(what="kill", **peer),  # type: ignore[arg-type]
    ]
    up, down = faults.conditions("peer-0", active)
    assert up == Conditions(delay_s=0.05 + 0.1, jitter_s=0.05, tail_probability=0.01, tail_s=1.0, bandwidth_mib_s=5.0)
    assert (up.silent, down.silent) == (False, True)
    assert faults.conditions("peer-2", active) == (Conditions(delay_s=0.05, bandwidth_mib_s=5.0),) * 2


def test_a_way_is_cut_until_the_last_of_its_cuts_ends() -> None:
    cut = Fault(at_s=0.0, target="peer-0", what="cut", duration_s=1.0)
    other = Fault(at_s=0.0, target="peer-1", what="cut", duration_s=1.0)
    assert is_cut("peer-0", [other, cut])
    assert not is_cut("peer-0", [other, Fault(at_s=0.0, target="peer-0", what="blackhole")])


def test_a_disconnected_container_needs_no_proxy() -> None:
    assert not plan(target="peer-1", what="disconnect", at_step=1).needs_proxy("peer-1")
    assert not Fault(target="coordinator", what="disconnect", at_step=1, duration_s=3.0).on_network


STOP = Fault(at_step=5, target="peer-0", what="stop", duration_s=10.0)
LATER = Fault(at_s=3.0, target="peer-1", what="kill")


def names(actions: list[Action]) -> list[tuple[str, str]]:
    return [(action.fault.what, action.phase) for action in actions]


def test_a_fault_begins_with_its_step_and_ends_after_its_duration() -> None:
    state = timetable([STOP])
    assert state.next_s is None
    state, actions = advance(state, now_s=100.0, step=4)
    assert actions == []
    state, actions = advance(state, now_s=101.0, step=6)  # the trainer's steps need not all be seen
    assert names(actions) == [("stop", "began")]
    assert state.active == (STOP,)
    assert state.next_s == 111.0
    state, actions = advance(state, now_s=110.9, step=7)
    assert actions == []
    state, actions = advance(state, now_s=111.0)
    assert names(actions) == [("stop", "ended")]
    assert state == Timetable(began_s=100.0)


def test_seconds_count_from_the_first_step() -> None:
    state = timetable([LATER])
    state, actions = advance(state, now_s=100.0)
    assert (actions, state.next_s) == ([], None)
    state, actions = advance(state, now_s=200.0, step=0)
    assert (actions, state.next_s) == ([], 203.0)
    state, actions = advance(state, now_s=203.0)
    assert names(actions) == [("kill", "began")]
    assert state.active == (LATER,)
    assert state.next_s is None, "it lasts for good"


def test_a_cut_of_no_duration_begins_and_ends_at_once() -> None:
    cut = Fault(at_step=0, target="peer-0", what="cut", duration_s=0.0)
    state, actions = advance(timetable([cut]), now_s=0.0, step=0)
    assert names(actions) == [("cut", "began"), ("cut", "ended")]
    assert state.active == ()


def test_of_two_faults_in_a_row_the_first_ends_before_the_second_begins() -> None:
    first = Fault(at_s=0.0, target="peer-0", what="stop", duration_s=5.0)
    second = Fault(at_s=5.0, target="peer-0", what="stop", duration_s=5.0)
    state, _ = advance(timetable([second, first]), now_s=0.0, step=0)
    state, actions = advance(state, now_s=5.0)
    assert [(a.fault, a.phase) for a in actions] == [(first, "ended"), (second, "began")]


faults = st.builds(
    lambda at, seconds, lasts: Fault(
        target="peer-0",
        what="blackhole",
        at_step=None if seconds else at,
        at_s=float(at) if seconds else None,
        duration_s=lasts,
    ),
    st.integers(0, 20),
    st.booleans(),
    st.none() | st.floats(0.0, 20.0),
)
events = st.lists(st.tuples(st.floats(0.0, 5.0), st.none() | st.integers(0, 3)), max_size=40)


@given(planned=st.lists(faults, max_size=8), history=events)
def test_every_fault_begins_once_and_ends_at_most_once_and_never_before(
    planned: list[Fault], history: list[tuple[float, int | None]]
) -> None:
    state, now_s, step, log = timetable(planned), 0.0, 0, list[Action]()
    for wait_s, steps in [*history, (0.0, 100), (1000.0, None), (1000.0, None)]:
        now_s += wait_s
        step += steps or 0
        state, actions = advance(state, now_s=now_s, step=None if steps is None else step)
        log += actions
        assert state.next_s is None or state.next_s > now_s, "nothing that is due stays"
    assert state.waiting == ()
    for fault in planned:
        phases = [action.phase for action in log if action.fault is fault]
        assert phases == (["began"] if fault.duration_s is None else ["began", "ended"])

"""What a host keeps of calls until their commit: one budget, who has to go when it is used up, who may name what."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moe_net.errors import BusyError, InputsGoneError, StaleStepError, WireError
from moe_net.experts.staging import ENTRY_OVERHEAD_BYTES, FORGET_AFTER_S, SILENT_AFTER_S, CallFacts, Staging

Book = Staging[str, str, str, str]
UNIT = ENTRY_OVERHEAD_BYTES
"""Of a call that counts nothing but its overhead."""


def new_book(units: float = 1000, *, max_trainers: int = 99) -> Book:
    return Staging(limit_bytes=int(units * UNIT), max_trainers=max_trainers)


def facts(trainer: str = "t", step: int = 0, layer: int = 0, n_rows: int = 4, n_pairs: int | None = 8) -> CallFacts:
    return CallFacts(trainer=trainer, step=step, layer=layer, n_rows=n_rows, n_pairs=n_pairs)


def stage(
    book: Book, call_id: bytes, known: CallFacts | None = None, *, units: float = 1, resent: str | None = "x",
    extra_units: float = 0,
) -> str:  # fmt: skip
    """What a host does with a Backward that takes so many units in all; the inputs that it ran on."""
    n_bytes = int(units * UNIT) - ENTRY_OVERHEAD_BYTES
    found = book.find(call_id, known or facts(), resent, input_bytes=n_bytes, grad_bytes=0)
    book.stage(call_id, found, "dy", n_bytes)
    if extra_units:
        book.add_extra(call_id, "work", int(extra_units * UNIT))
    return found.inputs


def keep(book: Book, call_id: bytes, known: CallFacts | None = None, *, units: float = 1, saved: float = 0) -> bool:
    n_bytes = int(units * UNIT) - ENTRY_OVERHEAD_BYTES
    return book.keep(call_id, known or facts(), "x", n_bytes, "h" if saved else None, int(saved * UNIT))


def waits(book: Book, call_id: bytes, known: CallFacts | None = None) -> bool:
    """Whether the call's inputs are there."""
    try:
        book.find(call_id, known or facts(), None, input_bytes=0, grad_bytes=0)
    except InputsGoneError:
        return False
    return True


def taken(book: Book, trainer: str, step: int, *call_ids: bytes) -> tuple[list[bytes], list[bytes]]:
    """(counted, missing)"""
    answer = book.commit(trainer, step, call_ids)
    assert answer is not None
    return list(answer.calls), list(answer.missing)


# -- what a commit may name --------------------------------------------------------------------------------------------


def test_a_commit_gets_what_it_names_in_its_order_and_what_it_does_not_name_is_gone() -> None:
    book = new_book()
    for call_id in (b"a", b"b", b"c"):
        stage(book, call_id)
    keep(book, b"d")
    assert taken(book, "t", 0, b"c", b"a") == ([b"c", b"a"], [])
    assert book.n_calls == 0
    assert book.held_bytes == book.n_bytes == 2 * UNIT, "what counts is its host's"
    book.let_go(2 * UNIT)
    assert book.n_bytes == 0


def test_a_call_that_is_named_twice_is_taken_once() -> None:
    book = new_book()
    stage(book, b"a")
    assert taken(book, "t", 0, b"a", b"a", b"?", b"?") == ([b"a"], [b"?"])
    assert book.held_bytes == UNIT


def test_only_a_trainers_own_staged_calls_of_steps_that_the_commit_closes_can_be_named() -> None:
    book = new_book()
    stage(book, b"others", facts("u"))
    stage(book, b"later", facts(step=5))
    stage(book, b"earlier", facts(step=3))
    keep(book, b"forward only", facts(step=4))
    named = (b"others", b"later", b"forward only", b"unknown", b"earlier")
    assert taken(book, "t", 4, *named) == ([b"earlier"], [b"others", b"later", b"forward only", b"unknown"])
    assert taken(book, "u", 0, b"others") == ([b"others"], []), "nobody else's commit touches it"
    assert taken(book, "t", 5, b"later") == ([b"later"], [])


def test_what_comes_after_its_commit_is_refused_and_leaves_nothing() -> None:
    book = new_book()
    book.commit("t", 3, ())
    for step in (0, 3):
        with pytest.raises(StaleStepError, match=f"step {step} came after 't' committed step 3"):
            stage(book, b"a", facts(step=step))
        assert not keep(book, b"a", facts(step=step))
    assert book.n_calls == book.n_bytes == 0
    stage(book, b"a", facts(step=4))
    stage(book, b"b", facts("u", step=0))


def test_commits_count_once_and_never_go_back_and_the_last_answer_is_told_again() -> None:
    book = new_book()
    assert [book.commit("t", step, ()) is None for step in (0, 0, 4, 3, 4, 5)] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    assert book.last_committed_step("t") == 5
    assert book.last_committed_step("stranger") == -1
    assert book.answer_of("t", 5) is None, "not told yet"
    book.note_answer("t", "five")
    assert book.commit("t", 5, ()) is None
    assert [book.answer_of("t", step) for step in (4, 5, 6)] == [None, "five", None]
    assert book.answer_of("stranger", 5) is None
    book.commit("t", 6, ())
    assert book.answer_of("t", 6) is book.answer_of("t", 5) is None, "not that of another commit"


# -- retries -----------------------------------------------------------------------------------------------------------


def test_a_backward_that_comes_again_replaces_itself_and_needs_no_inputs() -> None:
    book = new_book(2)
    stage(book, b"a", resent="first")
    stage(book, b"b")
    assert stage(book, b"a", resent=None) == "first"
    assert stage(book, b"a", resent="second") == "first", "what is here is preferred"
    assert (book.n_calls, book.n_bytes) == (2, 2 * UNIT), "a full book takes a retry"


def test_a_forward_that_comes_again_replaces_its_inputs_but_not_what_is_staged() -> None:
    book = new_book()
    assert keep(book, b"a", saved=2)
    assert keep(book, b"a")
    assert book.n_bytes == UNIT
    stage(book, b"a", resent=None, extra_units=1)
    assert not keep(book, b"a")
    assert taken(book, "t", 0, b"a") == ([b"a"], [])
    assert book.held_bytes == 2 * UNIT


def test_a_backward_uses_what_its_forward_left_and_leaves_something_else() -> None:
    book = new_book()
    keep(book, b"a", saved=3)
    assert book.find(b"a", facts(), None, input_bytes=0, grad_bytes=0).extra == "h"
    stage(book, b"a", resent=None)
    assert book.find(b"a", facts(), None, input_bytes=0, grad_bytes=0).extra is None
    assert book.n_bytes == UNIT


@pytest.mark.parametrize(
    "other",
    [facts("u"), facts(step=1), facts(layer=1), facts(n_rows=5), facts(n_pairs=9)],
    ids=["trainer", "step", "layer", "rows", "pairs"],
)
@pytest.mark.parametrize("is_staged", [False, True])
def test_a_call_that_contradicts_what_is_known_of_its_id_is_refused_and_changes_nothing(
    other: CallFacts, is_staged: bool
) -> None:
    book = new_book()
    stage(book, b"a") if is_staged else keep(book, b"a")
    with pytest.raises(WireError, match="belongs to another call"):
        stage(book, b"a", other)
    with pytest.raises(WireError, match="belongs to another call"):
        book.check_forward(b"a", other)
    book.check_forward(b"a", facts())
    book.check_forward(b"b", other)
    assert waits(book, b"a", facts(n_pairs=None)), "a Backward without inputs says nothing of pairs"
    assert (book.n_calls, book.n_bytes) == (1, UNIT)


# -- room --------------------------------------------------------------------------------------------------------------


def test_extras_go_first_then_waiting_inputs_and_the_oldest_before_the_younger() -> None:
    book = new_book(9)
    keep(book, b"old", saved=1)
    keep(book, b"young", saved=1)
    stage(book, b"staged", extra_units=1)
    keep(book, b"younger", saved=1)
    assert book.n_bytes == 8 * UNIT

    def left() -> list[str]:
        found = {i: book._calls.get(i) for i in (b"old", b"young", b"staged", b"younger")}
        return [f"{i.decode()}{'+' if call.extra else ''}" for i, call in found.items() if call is not None]

    assert left() == ["old+", "young+", "staged+", "younger+"]
    stage(book, b"1", units=2)
    assert left() == ["old", "young+", "staged+", "younger+"]
    stage(book, b"2", units=3)
    assert left() == ["old", "young", "staged", "younger"]
    stage(book, b"3")
    assert left() == ["young", "staged", "younger"]
    stage(book, b"4", units=2)
    assert left() == ["staged"]
    with pytest.raises(BusyError, match="at most"):
        stage(book, b"5")
    assert left() == ["staged"]
    assert book.n_bytes == 9 * UNIT


def test_inputs_make_room_for_inputs_but_nothing_that_is_staged_does() -> None:
    book = new_book(3)
    stage(book, b"staged")
    for n in range(4):
        assert keep(book, b"%d" % n)
    assert [waits(book, b"%d" % n) for n in range(4)] == [False, False, True, True]
    stage(book, b"more", units=2)
    assert not keep(book, b"4")
    assert taken(book, "t", 0, b"staged", b"more") == ([b"staged", b"more"], [])


def test_a_call_never_makes_its_own_inputs_go() -> None:
    book = new_book(3)
    keep(book, b"a", units=2)
    keep(book, b"b")
    found = book.find(b"a", facts(), None, input_bytes=0, grad_bytes=UNIT)
    assert found.inputs == "x"
    assert not waits(book, b"b")
    book.stage(b"a", found, "dy", 2 * UNIT)
    assert book.n_bytes == 3 * UNIT


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_what_can_never_fit_makes_nothing_go(how: str) -> None:
    book = new_book(10)
    keep(book, b"inputs", facts("u"), saved=1)
    stage(book, b"mine", units=3)
    if how == "forward":
        assert not keep(book, b"huge", units=8)
    else:
        with pytest.raises(BusyError):
            stage(book, b"huge", units=8)
    assert waits(book, b"inputs", facts("u"))
    assert book.n_bytes == 5 * UNIT
    book.add_extra(b"mine", "huge", 11 * UNIT)
    assert book.n_bytes == 5 * UNIT


def test_extras_are_kept_for_calls_that_are_here_alone_and_never_make_rows_go() -> None:
    book = new_book(4)
    keep(book, b"a", saved=1)
    stage(book, b"b")
    book.add_extra(b"unknown", "work", UNIT)
    book.add_extra(b"b", "work", 3 * UNIT)
    assert book.n_bytes == 2 * UNIT, "an older one has gone for it, and that was not enough"
    book.add_extra(b"b", "work", 2 * UNIT)
    assert book.n_bytes == 4 * UNIT


def test_what_is_committed_takes_room_until_it_is_let_go() -> None:
    book = new_book(4)
    stage(book, b"a", units=3, extra_units=1)
    book.commit("t", 0, (b"a",))
    with pytest.raises(BusyError):
        stage(book, b"b", facts(step=1))
    assert not keep(book, b"b", facts(step=1))
    book.let_go(4 * UNIT)
    stage(book, b"b", facts(step=1), units=4)


# -- trainers among each other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 0.5 + 1])
def test_a_trainer_that_floods_a_host_loses_its_own_and_costs_others_no_gradient(units: float) -> None:
    """With calls of one row, too, which are nothing but overhead."""
    book = new_book(100)
    stage(book, b"first", facts("small"), units=10)
    n, refused = 0, 0
    while refused < 5:
        n += 1
        try:
            stage(book, b"flood%d" % n, facts("flood"), units=units)
        except BusyError:
            refused += 1
    assert n < 200
    for k in range(3):
        stage(book, b"more%d" % k, facts("small"), units=10)
        stage(book, b"other%d" % k, facts(f"other {k}"), units=5)
    for name, mine in (("small", [b"first", b"more0", b"more1", b"more2"]), ("other 1", [b"other1"])):
        assert taken(book, name, 0, *mine) == (mine, [])
    named = [b"flood%d" % k for k in range(1, n + 1)]
    left, gone = taken(book, "flood", 0, *named)
    assert left == named[: len(left)], "it keeps what it staged first"
    assert gone == named[len(left) :]
    assert len(left) * units * UNIT <= 45 * UNIT


def test_who_has_staged_as_much_as_the_largest_is_refused() -> None:
    book = new_book(10)
    for k in range(5):
        stage(book, b"a%d" % k, facts("a"))
        stage(book, b"b%d" % k, facts("b"))
    for name in ("a", "b"):
        with pytest.raises(BusyError, match="this call takes"):
            stage(book, b"more", facts(name))
    for k in range(3):
        stage(book, b"c%d" % k, facts("c"))
    with pytest.raises(BusyError):
        stage(book, b"c3", facts("c"))
    named = {name: [f"{name}{k}".encode() for k in range(5)] for name in "abc"}
    assert [len(taken(book, name, 0, *named[name])[0]) for name in "abc"] == [3, 4, 3]


def test_a_flood_of_forwards_takes_nobodys_gradient() -> None:
    book = new_book(10)
    stage(book, b"mine", units=5)
    for n in range(100):
        keep(book, b"%d" % n, facts("flood"), saved=1)
    assert taken(book, "t", 0, b"mine") == ([b"mine"], [])
    assert book.n_bytes <= 10 * UNIT


def test_who_is_silent_for_long_makes_room_before_anybody_who_is_not() -> None:
    book = new_book(10)
    book.advance(1000)
    stage(book, b"silent", facts("silent"), units=2)
    book.advance(1000 + SILENT_AFTER_S / 2)
    stage(book, b"busy", facts("busy"), units=7)
    book.advance(999 + SILENT_AFTER_S)
    stage(book, b"new", facts("new"), units=1)
    with pytest.raises(BusyError):
        stage(book, b"big", facts("newer"), units=8)
    book.advance(1000 + SILENT_AFTER_S)
    stage(book, b"newer", facts("newer"), units=2)
    assert taken(book, "busy", 0, b"busy") == ([b"busy"], []), "although it has staged most"
    assert taken(book, "silent", 0, b"silent") == ([], [b"silent"])
    book.advance(0)
    assert taken(book, "new", 0, b"new") == ([b"new"], []), "time does not go back"


def test_who_asks_after_a_long_silence_keeps_its_own() -> None:
    book = new_book(10)
    stage(book, b"a", units=2)
    stage(book, b"u", facts("u"), units=2)
    book.advance(SILENT_AFTER_S)
    stage(book, b"b", units=8)
    assert taken(book, "t", 0, b"a", b"b") == ([b"a", b"b"], [])
    assert taken(book, "u", 0, b"u") == ([], [b"u"])


def test_a_host_has_room_for_so_many_trainers_and_forgets_the_one_that_was_silent_longest() -> None:
    book = new_book(max_trainers=2)
    book.commit("committed", 0, ())
    book.advance(1)
    stage(book, b"staged", facts("staged"))
    book.advance(FORGET_AFTER_S - 1)
    for ask in (lambda: stage(book, b"n", facts("n")), lambda: book.commit("n", 0, ())):
        with pytest.raises(BusyError, match="2 trainers"):
            ask()
    assert not keep(book, b"n", facts("n"))
    assert (book.last_committed_step("n"), book.n_calls) == (-1, 1), "nothing has changed"
    stage(book, b"s2", facts("staged"))
    book.advance(FORGET_AFTER_S)
    stage(book, b"n", facts("n"))
    assert book.n_trainers == 2
    assert book.last_committed_step("committed") == -1
    assert taken(book, "staged", 0, b"staged", b"s2") == ([b"staged", b"s2"], [])


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("how", ["keep", "stage", "commit"])
def test_who_is_forgotten_leaves_nothing(how: str, committed: bool) -> None:
    book = new_book(max_trainers=1)
    if committed:
        book.commit("gone", 3, ())
    stage(book, b"a", facts("gone", step=4), extra_units=1)
    keep(book, b"b", facts("gone", step=4), saved=1)
    book.advance(FORGET_AFTER_S)
    if how == "keep":
        assert keep(book, b"c", facts("new"))
    elif how == "stage":
        stage(book, b"c", facts("new"))
    else:
        assert taken(book, "new", 0, b"a", b"b") == ([], [b"a", b"b"])
    assert (book.n_trainers, book.n_bytes) == (1, 0 if how == "commit" else UNIT)
    assert book.last_committed_step("gone") == -1


def test_a_trainer_that_never_committed_is_forgotten_with_its_last_call() -> None:
    book = new_book(1, max_trainers=2)
    for n in range(50):
        assert keep(book, b"%d" % n, facts(f"trainer {n}"))
    assert book.n_trainers == 1
    book.commit("trainer 49", 0, ())
    assert (book.n_calls, book.n_trainers) == (0, 1), "a commit has to be remembered"


NAMES, STEPS, NUMBERS = st.sampled_from("abcdef"), st.integers(0, 3), st.integers(0, 5)
EXTRAS = st.sampled_from([0, 0.5, 2])
UNITS = (1, 1, 1.25, 1.5, 3, 3)
"""Of the calls of each number: one call always takes the same."""


class Books(RuleBasedStateMachine):
    """Any calls in any order: what is counted is what is there, and within the limit."""

    @initialize(units=st.sampled_from([2.5, 7, 40]), max_trainers=st.sampled_from([2, 4]))
    def begin(self, units: float, max_trainers: int) -> None:
        self.book = new_book(units, max_trainers=max_trainers)
        self.held: list[int] = []
        self.committed: dict[str, int] = {}
        self.now_s = 0.0

    def call(self, name: str, step: int, number: int) -> tuple[bytes, CallFacts]:
        return f"{name}{step}{number}".encode(), facts(name, step=step, layer=number)

    @rule(name=NAMES, step=STEPS, number=NUMBERS, extra=EXTRAS)
    def forward(self, name: str, step: int, number: int, extra: float) -> None:
        keep(self.book, *self.call(name, step, number), units=UNITS[number], saved=extra)

    @rule(name=NAMES, step=STEPS, number=NUMBERS, extra=EXTRAS, resend=st.booleans())
    def backward(self, name: str, step: int, number: int, extra: float, resend: bool) -> None:
        call_id, known = self.call(name, step, number)
        try:
            stage(self.book, call_id, known, units=UNITS[number], extra_units=extra, resent="x" if resend else None)
        except InputsGoneError:
            assert not resend
        except StaleStepError:
            assert step <= self.committed[name]
        except BusyError:
            assert call_id not in self.book._calls or self.book._calls[call_id].grad is None, "a retry needs no room"
        else:
            assert self.book._calls[call_id].grad == "dy"

    @rule(name=NAMES, step=STEPS, named=st.lists(st.integers(0, 5)), foreign=st.booleans())
    def commit(self, name: str, step: int, named: list[int], foreign: bool) -> None:
        ids = [self.call("a" if foreign else name, step, number)[0] for number in named]
        known = self.book.last_committed_step(name)
        try:
            answer = self.book.commit(name, step, ids)
        except BusyError:
            assert known == -1
            return
        assert (answer is None) == (step <= known)
        if answer is not None:
            self.committed[name] = step
            assert set(answer.calls).isdisjoint(answer.missing)
            assert {*answer.calls, *answer.missing} == set(ids)
            assert all(one.facts.trainer == name and one.grad for one in answer.calls.values())
            self.held.append(sum(one.n_bytes for one in answer.calls.values()))

    @rule()
    def make_the_step(self) -> None:
        while self.held:
            self.book.let_go(self.held.pop())

    @rule(passes_s=st.sampled_from([1, SILENT_AFTER_S, FORGET_AFTER_S]))
    def wait(self, passes_s: float) -> None:
        self.now_s += passes_s
        self.book.advance(self.now_s)

    @invariant()
    def what_is_counted_is_what_is_there(self) -> None:
        book = self.book
        assert book.n_bytes <= book.limit_bytes
        assert book.held_bytes == sum(self.held)
        assert book.n_bytes == book.held_bytes + sum(call.n_bytes for call in book._calls.values())
        assert len(book._trainers) <= book._max_trainers
        staged: defaultdict[str, int] = defaultdict(int)
        for call_id, call in book._calls.items():
            staged[call.facts.trainer] += call.row_bytes if call.grad is not None else 0
            assert call_id in book._trainers[call.facts.trainer].calls
            assert call.facts.step > book.last_committed_step(call.facts.trainer)
        assert {name: one.staged_bytes for name, one in book._trainers.items() if one.calls} == staged
        assert book._staged_bytes == sum(staged.values())
        assert set(book._waiting) == {call_id for call_id, call in book._calls.items() if call.grad is None}
        assert set(book._with_extra) == {call_id for call_id, call in book._calls.items() if call.extra is not None}
        for name, one in book._trainers.items():
            assert one.calls or one.last_committed_step >= 0, f"nothing has to be remembered of {name}"


Books.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True, database=None
)
test_books = Books.TestCase

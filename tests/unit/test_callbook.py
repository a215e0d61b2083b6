"""The book of calls: each gradient exactly once, bounded memory, whatever comes in whatever order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moe_net.errors import BusyError, InputsGoneError, StaleStepError, WireError
from moe_net.experts.callbook import ENTRY_OVERHEAD_BYTES, FORGET_AFTER_S, CallBook, CallFacts

BIG = 1 << 30


def facts(trainer: str = "t", step: int = 0, layer: int = 0, n_rows: int = 4, n_pairs: int | None = 8) -> CallFacts:
    return CallFacts(trainer=trainer, step=step, layer=layer, n_rows=n_rows, n_pairs=n_pairs)


def new_book(
    *, cache_bytes: int = BIG, reply_bytes: int = BIG, max_trainers: int = 99, max_open: int = 99, max_mine: int = 99
) -> CallBook[str, str, str]:
    return CallBook(
        cache_bytes=cache_bytes,
        reply_bytes=reply_bytes,
        max_trainers=max_trainers,
        max_open_calls=max_open,
        max_open_calls_per_trainer=max_mine,
    )


def apply(book: CallBook[str, str, str], call_id: bytes, known: CallFacts, resent: str | None = None) -> bool:
    """What a host does with a Backward; True when its gradient was added."""
    plan = book.plan_backward(call_id, known, resent)
    if plan.answer is not None:
        return False
    if plan.accumulate:
        book.mark_applied(call_id, plan.facts)
    book.store_reply(call_id, "dx", 100)
    return plan.accumulate


def test_a_retry_gets_the_same_answer_and_adds_nothing() -> None:
    book = new_book()
    book.keep(b"a", facts(), "x", 100)
    assert apply(book, b"a", facts())
    again = book.plan_backward(b"a", facts())
    assert (again.answer, again.accumulate) == ("dx", False)


def test_a_retry_whose_answer_is_gone_is_computed_again_without_adding() -> None:
    book = new_book(reply_bytes=0)
    book.keep(b"a", facts(), "x", 100)
    assert apply(book, b"a", facts())
    with pytest.raises(InputsGoneError, match="send them along"):
        book.plan_backward(b"a", facts(n_pairs=None))
    again = book.plan_backward(b"a", facts(), "x again")
    assert (again.answer, again.inputs, again.accumulate) == (None, "x again", False)


def test_inputs_that_are_gone_are_asked_for_and_taken() -> None:
    book = new_book()
    with pytest.raises(InputsGoneError):
        book.plan_backward(b"a", facts(n_pairs=None))
    assert book.plan_backward(b"a", facts(), "x").accumulate


def test_kept_inputs_and_their_pre_activations_are_preferred_to_resent_ones() -> None:
    book = new_book()
    book.keep(b"a", facts(), "x", 100, "h", 100)
    plan = book.plan_backward(b"a", facts(), "x again")
    assert (plan.inputs, plan.saved) == ("x", "h")


def test_pre_activations_go_before_inputs_and_the_oldest_goes_first() -> None:
    entry = ENTRY_OVERHEAD_BYTES + 100
    book = new_book(cache_bytes=3 * entry + 250)
    for call_id in (b"a", b"b", b"c"):
        book.keep(call_id, facts(), "x", 100, "h", 100)
    saved = {i: book.plan_backward(i, facts()).saved for i in (b"a", b"b", b"c")}
    assert saved == {b"a": None, b"b": "h", b"c": "h"}
    book.keep(b"d", facts(), "x", 100, "h", 100)
    with pytest.raises(InputsGoneError):
        book.plan_backward(b"a", facts())
    assert book.sizes.kept_calls == 3
    assert book.sizes.kept_bytes <= 3 * entry + 250


def test_a_call_larger_than_the_cache_evicts_nobody() -> None:
    book = new_book(cache_bytes=3000)
    book.keep(b"a", facts(), "x", 100)
    assert not book.keep(b"b", facts(), "x", 3000)
    assert book.plan_backward(b"a", facts()).inputs == "x"


def test_nothing_is_kept_that_no_backward_can_want() -> None:
    book = new_book()
    assert book.keep(b"a", facts(step=3), "x", 100)
    apply(book, b"a", facts(step=3))
    assert not book.keep(b"a", facts(step=3), "x", 100), "applied already"
    book.commit("t", 5)
    assert not book.keep(b"b", facts(step=5), "x", 100), "committed already"
    assert book.sizes.kept_calls == 0


def test_a_commit_closes_its_step_and_all_before_it_and_forgets_their_calls() -> None:
    book = new_book()
    for step in range(4):
        book.keep(b"kept%d" % step, facts(step=step), "x", 100)
        apply(book, b"done%d" % step, facts(step=step), "x")
    apply(book, b"other", facts(trainer="u", step=0), "x")
    assert book.commit("t", 2)
    assert (book.sizes.kept_calls, book.sizes.replies, book.sizes.applied_calls) == (1, 2, 2)
    for step in range(3):
        with pytest.raises(StaleStepError, match="committed step 2"):
            book.plan_backward(b"done%d" % step, facts(step=step), "x")
    assert book.plan_backward(b"done3", facts(step=3)).answer == "dx"
    assert book.plan_backward(b"other", facts(trainer="u")).answer == "dx"


def test_commits_are_idempotent_and_never_go_back() -> None:
    book = new_book()
    assert [book.commit("t", step) for step in (0, 0, 4, 3, 4, 5)] == [True, False, True, False, False, True]
    assert book.last_committed_step("t") == 5


@pytest.mark.parametrize(
    "other",
    [facts(trainer="u"), facts(step=1), facts(layer=1), facts(n_rows=5), facts(n_pairs=9)],
    ids=["trainer", "step", "layer", "rows", "pairs"],
)
@pytest.mark.parametrize("applied", [False, True])
def test_a_call_that_contradicts_the_remembered_one_is_refused(other: CallFacts, applied: bool) -> None:
    book = new_book()
    book.keep(b"a", facts(), "x", 100)
    if applied:
        apply(book, b"a", facts())
    with pytest.raises(WireError, match="belongs to another call"):
        book.plan_backward(b"a", other, "x")
    with pytest.raises(WireError, match="belongs to another call"):
        book.check_forward(b"a", other)
    book.check_forward(b"a", facts())


def test_a_full_book_refuses_and_forgets_nothing() -> None:
    book = new_book(max_mine=2, max_open=3, max_trainers=2)
    for call_id in (b"a", b"b"):
        apply(book, call_id, facts(), "x")
    with pytest.raises(BusyError, match="2 applied calls in steps it has not committed"):
        book.plan_backward(b"c", facts(), "x")
    apply(book, b"d", facts(trainer="u"), "x")
    with pytest.raises(BusyError, match="3 applied calls"):
        book.plan_backward(b"e", facts(trainer="u"), "x")
    with pytest.raises(BusyError, match="no room for 'v'"):
        book.commit("v", 0)
    assert book.plan_backward(b"a", facts()).answer == "dx"
    book.commit("t", 0)
    assert apply(book, b"e", facts(trainer="u"), "x")


def test_calls_planned_together_cannot_overfill_the_book() -> None:
    book = new_book(max_mine=1)
    plans = [book.plan_backward(i, facts(), "x") for i in (b"a", b"b")]
    book.mark_applied(b"a", plans[0].facts)
    with pytest.raises(BusyError):
        book.mark_applied(b"b", plans[1].facts)


def test_room_is_made_by_forgetting_the_trainer_silent_longest() -> None:
    book = new_book(max_trainers=3)
    for now_s, trainer in enumerate(("old", "older than it looks", "young")):
        book.advance(float(now_s))
        apply(book, trainer.encode(), facts(trainer=trainer), "x")
    book.advance(10.0)
    book.commit("old", 0)
    book.advance(FORGET_AFTER_S + 1.0)
    assert book.commit("new", 7)
    with pytest.raises(BusyError, match="no room for 'newer'"):
        book.commit("newer", 7)  # "young" has been silent for an hour less a second
    assert (book.sizes.trainers, book.sizes.applied_calls, book.sizes.replies) == (3, 1, 1)
    assert book.plan_backward(b"young", facts(trainer="young")).answer == "dx"
    assert book.last_committed_step("old") == 0
    assert book.last_committed_step("new") == 7


def test_a_vanished_trainer_does_not_hold_room_for_applied_calls_for_ever() -> None:
    book = new_book(max_open=4)
    for call_id in (b"a", b"b", b"c", b"d"):
        apply(book, call_id, facts(trainer="vanished"), "x")
    book.advance(FORGET_AFTER_S - 1)
    with pytest.raises(BusyError, match="4 applied calls"):
        apply(book, b"e", facts(trainer="u"), "x")
    assert book.plan_backward(b"a", facts(trainer="vanished")).answer == "dx"
    book.advance(FORGET_AFTER_S)
    assert apply(book, b"e", facts(trainer="u"), "x")
    assert (book.sizes.trainers, book.sizes.applied_calls, book.sizes.replies) == (1, 1, 1)


def test_a_trainer_that_comes_back_is_not_forgotten_to_make_room_for_itself() -> None:
    book = new_book(max_open=2)
    apply(book, b"a", facts(step=0), "x")
    apply(book, b"b", facts(step=0), "x")
    book.advance(2 * FORGET_AFTER_S)
    with pytest.raises(BusyError, match="2 applied calls"):
        apply(book, b"c", facts(step=0), "x")
    assert not apply(book, b"a", facts(step=0)), "added once"
    book.advance(0.0)
    assert book.commit("t", 0), "its commit makes the room, and time does not go back"


def test_time_alone_forgets_nothing() -> None:
    book = new_book(max_trainers=2)
    apply(book, b"a", facts(), "x")
    book.commit("u", 3)
    before = book.sizes
    book.advance(100 * FORGET_AFTER_S)
    assert not apply(book, b"a", facts())
    assert not book.commit("u", 3)
    assert book.sizes == before


def test_sixty_five_thousand_names_in_a_minute_lock_nobody_out_for_longer_than_an_hour() -> None:
    book = new_book(max_trainers=65_536)
    for number in range(65_536):
        book.advance(number / 1000)
        book.commit(f"junk {number}", 0)
    with pytest.raises(BusyError):
        book.commit("honest", 0)
    book.advance(FORGET_AFTER_S + 0.5)
    assert book.commit("honest", 0)
    assert book.sizes.trainers == 65_536


IDS = st.integers(0, 7)
TRAINERS = 2
CACHE, REPLIES = 4 * (ENTRY_OVERHEAD_BYTES + 100), 2 * (ENTRY_OVERHEAD_BYTES + 100)


class AnyHistory(RuleBasedStateMachine):
    """Retries, duplicates, evictions, re-sends and commits in any order. A call's facts follow from its number."""

    def __init__(self) -> None:
        super().__init__()
        self.book = new_book(cache_bytes=CACHE, reply_bytes=REPLIES, max_mine=3, max_open=5)
        self.added: Counter[int] = Counter()
        self.answered: set[int] = set()
        self.committed = dict.fromkeys(range(TRAINERS), -1)

    def facts_of(self, number: int) -> CallFacts:
        return facts(trainer=f"t{number % TRAINERS}", step=number // 4, n_rows=number + 1)

    @rule(number=IDS, saved_bytes=st.sampled_from([0, 60, 2000]), big=st.booleans())
    def forward(self, number: int, saved_bytes: int, big: bool) -> None:
        size = CACHE if big else 100
        self.book.check_forward(bytes([number]), self.facts_of(number))
        self.book.keep(bytes([number]), self.facts_of(number), "x", size, "h" if saved_bytes else None, saved_bytes)

    @rule(number=IDS, resend=st.booleans())
    def backward(self, number: int, resend: bool) -> None:
        trainer = number % TRAINERS
        stale = self.facts_of(number).step <= self.committed[trainer]
        try:
            added = apply(self.book, bytes([number]), self.facts_of(number), "x" if resend else None)
        except StaleStepError:
            assert stale
        except InputsGoneError:
            assert not resend
        except BusyError:
            assert number not in self.answered, "a retry needs no new room"
        else:
            assert not stale
            assert added == (number not in self.answered)
            self.added[number] += added
            self.answered.add(number)

    @rule(number=IDS)
    def contradiction(self, number: int) -> None:
        before = self.book.sizes
        other = facts(trainer=f"t{number % TRAINERS}", step=number // 4, n_rows=99)
        if number in self.answered and other.step > self.committed[number % TRAINERS]:
            with pytest.raises(WireError):
                self.book.plan_backward(bytes([number]), other, "x")
        assert self.book.sizes == before

    @rule(trainer=st.integers(0, TRAINERS - 1), step=st.integers(0, 1))
    def commit(self, trainer: int, step: int) -> None:
        assert self.book.commit(f"t{trainer}", step) == (step > self.committed[trainer])
        self.committed[trainer] = max(step, self.committed[trainer])

    @invariant()
    def every_gradient_counts_at_most_once_and_every_answered_one_counts(self) -> None:
        assert all(count == 1 for number, count in self.added.items() if number in self.answered)
        assert all(self.added[number] == 1 for number in self.answered)

    @invariant()
    def memory_is_bounded_and_the_books_balance(self) -> None:
        sizes = self.book.sizes
        assert sizes.kept_bytes <= CACHE
        assert sizes.reply_bytes <= REPLIES
        open_calls = [n for n in self.answered if self.facts_of(n).step > self.committed[n % TRAINERS]]
        assert sizes.applied_calls == len(open_calls) <= 5
        assert sizes.kept_bytes == sum(k.inputs_bytes + k.saved_bytes for k in self.book._kept.values())
        assert sizes.reply_bytes == sum(r.n_bytes for r in self.book._replies.values())
        assert set(self.book._with_saved) == {i for i, k in self.book._kept.items() if k.saved is not None}


AnyHistory.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_any_history_applies_each_gradient_exactly_once = AnyHistory.TestCase

"""The ledger of page states, against a plain dictionary."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvist.kv.pages import TRANSITIONS, PageLedger, PageState
from tests.budget import budget

NUM_PAGES = 6


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(NUM_PAGES)
        self.model = dict.fromkeys(range(NUM_PAGES), PageState.FREE)

    def pages_in(self, state: PageState) -> list[int]:
        return [page_id for page_id, page_state in self.model.items() if page_state is state]

    @rule(num_pages=st.integers(0, NUM_PAGES))
    def allocate(self, num_pages: int) -> None:
        free = self.pages_in(PageState.FREE)
        if num_pages > len(free):
            with pytest.raises(AssertionError):
                self.ledger.allocate(num_pages)
            return
        page_ids = self.ledger.allocate(num_pages)
        assert len(set(page_ids)) == num_pages
        assert set(page_ids) <= set(free)
        self.model.update(dict.fromkeys(page_ids, PageState.OWNED))

    @rule(data=st.data(), move=st.sampled_from(sorted(TRANSITIONS - {(PageState.FREE, PageState.OWNED)})))
    def move_legally(self, data: st.DataObject, move: tuple[PageState, PageState]) -> None:
        source, target = move
        page_ids = [page_id for page_id in self.pages_in(source) if data.draw(st.booleans())]
        self.ledger.move(page_ids, source, target)
        self.model.update(dict.fromkeys(page_ids, target))

    @precondition(lambda self: len(set(self.model.values())) > 1)
    @rule(data=st.data(), move=st.sampled_from(sorted(TRANSITIONS - {(PageState.FREE, PageState.OWNED)})))
    def moving_a_page_that_is_elsewhere_is_our_bug(
        self, data: st.DataObject, move: tuple[PageState, PageState]
    ) -> None:
        source, target = move
        elsewhere = [page_id for page_id, state in self.model.items() if state is not source]
        if elsewhere:
            with pytest.raises(AssertionError):
                self.ledger.move([data.draw(st.sampled_from(elsewhere))], source, target)

    @invariant()
    def states_and_counts_agree_with_the_model(self) -> None:
        assert {page_id: self.ledger.state(page_id) for page_id in range(NUM_PAGES)} == self.model
        for state in PageState:
            assert self.ledger.count(state) == len(self.pages_in(state))
        assert sum(self.ledger.count(state) for state in PageState) == self.ledger.num_pages


LedgerMachine.TestCase.settings = settings(max_examples=budget(30, long=1000), stateful_step_count=30)
TestLedger = LedgerMachine.TestCase


@pytest.mark.parametrize(
    ("source", "target"), sorted(set(itertools.product(PageState, PageState)) - TRANSITIONS), ids=lambda s: s.name
)
def test_a_transition_outside_the_table_is_refused(source: PageState, target: PageState) -> None:
    ledger = PageLedger(1)
    with pytest.raises(AssertionError):
        ledger.move([], source, target)


def test_a_page_in_flight_can_only_return_to_its_owner() -> None:
    assert {target for source, target in TRANSITIONS if source is PageState.IN_FLIGHT} == {PageState.OWNED}


def test_pages_never_needed_are_never_allocated() -> None:
    ledger = PageLedger(1000)
    for _ in range(50):
        page_ids = ledger.allocate(4)
        assert max(page_ids) < 4
        ledger.move(page_ids, PageState.OWNED, PageState.FREE)


def test_the_page_freed_last_is_allocated_first() -> None:
    ledger = PageLedger(10)
    page_ids = ledger.allocate(5)
    ledger.move([page_ids[3]], PageState.OWNED, PageState.FREE)
    assert ledger.allocate(1) == [page_ids[3]]

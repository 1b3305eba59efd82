"""The states of a prefetch: every transition happens by its trigger, and no other, under any order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvist.kv.keys import page_digests
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import TRANSITIONS, Prefetch, PrefetchConfig, PrefetchState, PrefetchTrigger
from kvist.kv.tiers.storage import StorageTier
from kvist.plan.tiers import CancelFetch, FetchPages, FindPages, PagesFetched, PagesFound, StorageAttached, StorePages
from tests.budget import budget

NUM_HOST_PAGES = 8
REACHABLE = {(state, next_state) for state, row in TRANSITIONS.items() for next_state in row.values()}
PASSED_AT_ONCE = {
    (PrefetchState.FINDING, PrefetchState.FETCHING),
    (PrefetchState.FINDING, PrefetchState.DONE),
    (PrefetchState.QUEUED, PrefetchState.DONE),
}


def test_every_state_can_end_and_every_trigger_is_used() -> None:
    assert set(TRANSITIONS) == set(PrefetchState)
    assert {trigger for row in TRANSITIONS.values() for trigger in row} == set(PrefetchTrigger)
    for state in PrefetchState:
        seen: set[PrefetchState] = set()
        ahead = [state]
        while ahead:
            seen.add(ahead[-1])
            ahead += [each for each in TRANSITIONS[ahead.pop()].values() if each not in seen]
        assert PrefetchState.CLOSED in seen


def test_a_trigger_that_the_state_does_not_know_is_ignored() -> None:
    prefetch = Prefetch(digests=(), num_cached=0, wait_s=0.0)
    assert prefetch.fire(PrefetchTrigger.GIVEN_UP)
    for trigger in set(PrefetchTrigger) - {PrefetchTrigger.CLOSED}:
        assert not prefetch.fire(trigger)
    assert prefetch.state is PrefetchState.DONE


class PrefetchMachine(RuleBasedStateMachine):
    """Prefetches over one store whose answers are late, short, or missing. Only neighbouring states follow each other,
    each prefetch settles once, and what a state says is true."""

    @initialize()
    def start(self) -> None:
        self.host = HostTier(NUM_HOST_PAGES)
        self.storage = StorageTier(self.host, PrefetchConfig(threshold_tokens=2), page_size=1)
        self.storage.on_event(StorageAttached(attached=True))
        self.attached = True
        self.states: dict[Prefetch, PrefetchState] = {}
        self.finds: dict[int, FindPages] = {}
        self.fetches: dict[int, FetchPages] = {}
        self.settled: list[Prefetch] = []
        self.given_up: set[Prefetch] = set()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=6), num_cached=st.integers(0, 2))
    def begin(self, prompt: list[int], num_cached: int) -> None:
        digests = page_digests(prompt, 1, "space")
        prefetch = self.storage.begin(digests, min(num_cached, len(digests)))
        if prefetch is not None:
            self.states[prefetch] = prefetch.state
            assert prefetch.state in (PrefetchState.FINDING, PrefetchState.FETCHING)

    @precondition(lambda self: self.finds)
    @rule(data=st.data(), answered=st.booleans())
    def find(self, data: st.DataObject, answered: bool) -> None:
        job = self.finds.pop(data.draw(st.sampled_from(sorted(self.finds))))
        num_pages = data.draw(st.integers(0, len(job.digests))) if answered else 0
        self.storage.on_event(PagesFound(job_id=job.job_id, num_pages=num_pages, answered=answered))

    @precondition(lambda self: self.fetches)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        job = self.fetches.pop(data.draw(st.sampled_from(sorted(self.fetches))))
        num_pages = data.draw(st.integers(0, len(job.digests)))
        self.storage.on_event(PagesFetched(job_id=job.job_id, num_pages=num_pages))

    @precondition(lambda self: self.states)
    @rule(data=st.data(), closes=st.booleans())
    def end(self, data: st.DataObject, closes: bool) -> None:
        prefetch = data.draw(st.sampled_from([*self.states]))
        was_done = prefetch.is_done
        self.storage.give_up(prefetch)
        if not was_done:
            self.given_up.add(prefetch)
        self.follow(prefetch)
        if closes:
            self.storage.close(prefetch)
            self.follow(prefetch)
            del self.states[prefetch]

    @rule(attached=st.booleans())
    def attach(self, attached: bool) -> None:
        self.storage.on_event(StorageAttached(attached=attached))
        self.attached = attached

    @rule()
    def evict(self) -> None:
        self.host.flush()

    def follow(self, prefetch: Prefetch) -> None:
        before, self.states[prefetch] = self.states[prefetch], prefetch.state
        # A call may pass FETCHING, or QUEUED and FETCHING, at once.
        assert before is prefetch.state or (before, prefetch.state) in REACHABLE | PASSED_AT_ONCE

    @invariant()
    def states_follow_the_table_and_say_the_truth(self) -> None:
        if not hasattr(self, "storage"):
            return
        self.storage.start_queued()
        self.settled += (settled := self.storage.take_settled())
        assert len(set(self.settled)) == len(self.settled), "a prefetch settles once"
        assert all(prefetch.is_done for prefetch in settled)
        assert not [prefetch for prefetch in settled if prefetch in self.given_up], "it was given up: nothing waits"
        for job in self.storage.take_jobs():
            if isinstance(job, FindPages):
                self.finds[job.job_id] = job
            elif isinstance(job, FetchPages):
                self.fetches[job.job_id] = job
            else:
                assert not isinstance(job, StorePages)
                assert isinstance(job, CancelFetch)
                assert job.job_id in self.fetches, "only a fetch under way is cancelled"
        for prefetch in self.states:
            self.follow(prefetch)
            assert bool(prefetch.fetches) <= (not prefetch.is_done)
            if prefetch.state is PrefetchState.FETCHING:
                assert prefetch.fetches, "a prefetch that fetches has a fetch under way"
            if prefetch.is_done:
                assert prefetch in self.given_up or prefetch in self.settled
        assert set(self.storage.open_prefetches) == set(self.states)
        asking = (PrefetchState.FINDING, PrefetchState.QUEUED)
        assert self.attached or not [each for each in self.states if each.state in asking], "no store is there to ask"
        num_fetching = sum(len(job.digests) for job in self.fetches.values())
        num_kept = sum(prefetch.num_fetched for prefetch in self.states)
        assert self.storage.num_reserved == num_fetching + num_kept <= NUM_HOST_PAGES // 2


PrefetchMachine.TestCase.settings = settings(max_examples=budget(50, long=1000), stateful_step_count=40)
TestPrefetches = PrefetchMachine.TestCase

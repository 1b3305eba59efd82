"""Membership: which sources name a worker, and when the worker joins and leaves."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvist.errors import Conflict, Overloaded, UnknownWorker
from kvist.request import Role
from kvist.router.membership import (
    ANNOUNCEMENT,
    FLAGS,
    HTTP,
    MISSED_ANNOUNCEMENTS,
    Announcement,
    Change,
    Joined,
    Left,
    Membership,
    NamedWorker,
    Outcome,
    Source,
)
from tests.budget import budget

A, B, C = (f"http://{name}:1" for name in "abc")
FILE, DNS = Source("file:/workers"), Source("dns:workers:30000")


def announced(url: str = A, instance: str = "1", interval_s: float = 2.0) -> Announcement:
    return Announcement(url=url, instance=instance, interval_s=interval_s)


def test_a_worker_joins_with_its_first_source_and_leaves_with_its_last() -> None:
    membership = Membership(max_workers=8)
    worker = NamedWorker(url=A)
    assert membership.add(FLAGS, worker) == [Joined(worker)]
    assert membership.add(HTTP, worker) == []
    assert membership.replace(FILE, [A, A]) == ([], 0)
    assert membership.sources() == {A: (FLAGS, HTTP, FILE)}
    assert membership.remove(HTTP, A) == []
    assert membership.replace(FILE, []) == ([], 0)
    assert membership.remove(FLAGS, A) == [Left(A)]
    assert membership.remove(FLAGS, A) == []


def test_an_announcement_counts_until_its_repeats_are_missing() -> None:
    membership = Membership(max_workers=8)
    assert membership.announce(announced(), 0.0) == [Joined(NamedWorker(url=A))]
    assert membership.announce(announced(), 2.0) == []
    last_s = 2.0 + MISSED_ANNOUNCEMENTS * 2.0
    assert membership.expire(last_s - 0.01) == []
    membership.postpone(10.0)  # the gateway was stopped
    assert membership.expire(last_s + 9.9) == []
    assert membership.expire(last_s + 10.0) == [Left(A)]
    assert membership.num_announcements == {
        Outcome.ACCEPTED: 1,
        Outcome.REPEATED: 1,
        Outcome.WITHDRAWN: 0,
        Outcome.EXPIRED: 1,
    }


def test_a_late_withdrawal_of_the_previous_process_does_not_remove_its_successor() -> None:
    membership = Membership(max_workers=8)
    membership.announce(announced(instance="old"), 0.0)
    membership.announce(announced(instance="new"), 1.0)
    assert membership.withdraw(A, "old") == []
    assert membership.withdraw(A, "new") == [Left(A)]


def test_a_removed_worker_stays_away_until_it_restarts_or_the_operator_names_it() -> None:
    membership = Membership(max_workers=8)
    membership.announce(announced(), 0.0)
    membership.add(FLAGS, NamedWorker(url=A))
    assert membership.dismiss(A) == [Left(A)]
    with pytest.raises(Conflict, match="removed by DELETE"):
        membership.announce(announced(), 1.0)
    assert membership.announce(announced(instance="2"), 2.0) == [Joined(NamedWorker(url=A))]
    membership.dismiss(A)
    membership.add(HTTP, NamedWorker(url=A))
    assert membership.announce(announced(instance="2"), 3.0) == []


def test_a_worker_of_a_discovery_can_only_be_removed_there() -> None:
    membership = Membership(max_workers=8)
    membership.replace(FILE, [A])
    membership.add(HTTP, NamedWorker(url=A))
    with pytest.raises(Conflict, match="file:/workers"):
        membership.dismiss(A)
    with pytest.raises(UnknownWorker):
        membership.dismiss(B)
    assert membership.sources() == {A: (FILE, HTTP)}


def test_two_sources_may_not_name_a_worker_with_two_roles() -> None:
    membership = Membership(max_workers=8)
    membership.add(FLAGS, NamedWorker(url=A, role=Role.PREFILL))
    with pytest.raises(Conflict, match="flags names it as prefill"):
        membership.add(HTTP, NamedWorker(url=A, role=Role.DECODE))
    assert membership.add(HTTP, NamedWorker(url=A)) == []
    assert membership.remove(FLAGS, A) == [Left(A), Joined(NamedWorker(url=A))], "the named role is gone"


def test_the_gateways_own_key_is_sent_to_a_worker_that_any_source_but_http_names() -> None:
    membership = Membership(max_workers=8)
    posted = NamedWorker(url=A, api_key="of the client")
    assert membership.add(HTTP, posted) == [Joined(posted)]
    assert membership.replace(DNS, [A]) == ([Left(A), Joined(NamedWorker(url=A))], 0)


def test_the_number_of_workers_is_bounded_for_every_source() -> None:
    membership = Membership(max_workers=2)
    membership.add(FLAGS, NamedWorker(url=A))
    assert membership.replace(FILE, [A, B, C]) == ([Joined(NamedWorker(url=B))], 1)
    for refused in (
        lambda: membership.add(HTTP, NamedWorker(url=C)),
        lambda: membership.announce(announced(C), 0.0),
    ):
        with pytest.raises(Overloaded, match="--max-workers"):
            refused()
    assert set(membership.sources()) == {A, B}
    assert membership.expire(100.0) == []


URLS = strategies.sampled_from([A, B, C])
SOURCES = strategies.sampled_from([FLAGS, HTTP, FILE, DNS])
INSTANCES = strategies.sampled_from(["1", "2"])


class MembershipMachine(RuleBasedStateMachine):
    """The sources in any order, against a plain model: for each worker the set of its sources."""

    def __init__(self) -> None:
        super().__init__()
        self.membership = Membership(max_workers=3)
        self.now_s = 0.0
        self.named: dict[str, set[str]] = {url: set() for url in (A, B, C)}
        self.announcements: dict[str, tuple[str, float]] = {}  # by URL: instance, time of expiry
        self.dismissed: dict[str, str] = {}
        self.used: set[str] = set()  # as the changes say

    def follow(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change, Joined):
                assert change.worker.url not in self.used
                self.used.add(change.worker.url)
            else:
                self.used.remove(change.url)

    @rule(source=SOURCES, url=URLS)
    def add(self, source: Source, url: str) -> None:
        self.named[url].add(source)
        if source == HTTP:
            self.dismissed.pop(url, None)
        self.follow(self.membership.add(source, NamedWorker(url=url)))

    @rule(source=SOURCES, url=URLS)
    def remove(self, source: Source, url: str) -> None:
        self.named[url].discard(source)
        self.follow(self.membership.remove(source, url))

    @rule(source=strategies.sampled_from([FILE, DNS]), urls=strategies.lists(URLS, max_size=4))
    def replace(self, source: Source, urls: list[str]) -> None:
        for url, named in self.named.items():
            (named.add if url in urls else named.discard)(source)
        changes, num_left_out = self.membership.replace(source, urls)
        assert num_left_out == 0
        self.follow(changes)

    @rule(url=URLS, instance=INSTANCES, interval_s=strategies.sampled_from([1.0, 2.0]))
    def announce(self, url: str, instance: str, interval_s: float) -> None:
        announcement = announced(url, instance, interval_s)
        if self.dismissed.get(url) == instance:
            with pytest.raises(Conflict):
                self.membership.announce(announcement, self.now_s)
            return
        self.dismissed.pop(url, None)
        self.named[url].add(ANNOUNCEMENT)
        self.announcements[url] = instance, self.now_s + MISSED_ANNOUNCEMENTS * interval_s
        self.follow(self.membership.announce(announcement, self.now_s))

    @rule(url=URLS, instance=INSTANCES)
    def withdraw(self, url: str, instance: str) -> None:
        if self.announcements.get(url, ("", 0.0))[0] == instance:
            self.named[url].discard(ANNOUNCEMENT)
            del self.announcements[url]
        self.follow(self.membership.withdraw(url, instance))

    @rule(by_s=strategies.sampled_from([0.5, 1.0, 4.0]))
    def time_passes(self, by_s: float) -> None:
        self.now_s += by_s
        for url, (_, expires_s) in list(self.announcements.items()):
            if expires_s <= self.now_s:
                self.named[url].discard(ANNOUNCEMENT)
                del self.announcements[url]
        self.follow(self.membership.expire(self.now_s))

    @rule(url=URLS)
    def dismiss(self, url: str) -> None:
        if not self.named[url] or self.named[url] & {FILE, DNS}:
            with pytest.raises((Conflict, UnknownWorker)):
                self.membership.dismiss(url)
            return
        self.named[url].clear()
        if (known := self.announcements.pop(url, None)) is not None:
            self.dismissed[url] = known[0]
        self.follow(self.membership.dismiss(url))

    @invariant()
    def a_worker_is_a_member_exactly_while_a_source_names_it(self) -> None:
        assert self.used == {url for url, named in self.named.items() if named}
        assert {url: set(named) for url, named in self.membership.sources().items()} == {
            url: named for url, named in self.named.items() if named
        }


TestMembership = MembershipMachine.TestCase
TestMembership.settings = settings(max_examples=budget(60, long=2000), stateful_step_count=30)

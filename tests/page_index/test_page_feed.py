"""The pages that a gateway knows of one worker: equal to the worker's own after lost, late and repeated messages."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvist import wire
from kvist.engine.gateways import Gateways, PageReader
from kvist.engine.page_events import SUMS_INTERVAL_S, PageEventLog
from kvist.kv.changes import PageChanges
from kvist.kv.tiers.host import HostTier
from kvist.page_index.page_feed import MAX_WAIT_S, PageFeed, Reason
from kvist.page_index.page_runs import NOTHING_HELD, TIERS
from kvist.page_index.prefix_index import PrefixIndex
from kvist.plan.plan import SeenInStore
from kvist.request import Role, WorkerId
from kvist.simulation.lossy_wires import LossyWires
from kvist.testing.page_events import joined, short, tier_changes
from tests.budget import budget

WORKER = WorkerId("w")
NUM_PAGES = 12  # of each tier
NAMES = [short(bytes([number])) for number in range(1, 40)]
REPAIR_S = 5.0


class Pair:
    """The pages of an engine, and the gateway that follows them. `now_s` is both sides' clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.changes = {tier: PageChanges(tier) for tier in TIERS}
        self.rows: dict[tuple[wire.PageTier, bytes], int] = {}
        self.log = PageEventLog(list_pages=self._list_pages)
        self.gateways = Gateways(timeout_s=1e9, role=Role.UNIFIED)
        self.index = PrefixIndex(1000, seed=1 << 70 | 12345)
        self.index.add(WORKER, dict.fromkeys(TIERS, NUM_PAGES))
        self.index.set_store(WORKER, "file:/pages")
        self.feed = PageFeed(self.index, WORKER)
        self.wires: LossyWires[wire.PageEvents | wire.ListPages] = LossyWires()
        self.send(self.feed.request(self.now_s))

    def _list_pages(self, piece: int) -> wire.ListedPages:
        pieces = [(tier, number) for number in range(3) for tier in TIERS]
        tier, number = pieces[piece]
        changes = self.changes[tier]
        digests = changes.piece(number) if number < changes.num_pieces else b""
        following = piece + 1 if piece + 1 < len(pieces) else None
        return wire.ListedPages(tier=tier, digests=digests, first_piece=piece, next_piece=following)

    def send(self, request: wire.ListPages | None) -> None:
        if request is not None:
            self.wires.send("gateway", "engine", request)

    def store(self, tier: wire.PageTier, name: bytes) -> None:
        num_held = sum(each == tier for each, _ in self.rows)
        if (tier, name) not in self.rows and num_held < NUM_PAGES:
            self.rows[tier, name] = self.changes[tier].on_stored(name)

    def remove(self, tier: wire.PageTier, name: bytes) -> None:
        row = self.rows.pop((tier, name), None)
        if row is not None:
            self.changes[tier].on_removed(name, row)

    def see_in_store(self, found: set[bytes], missing: set[bytes]) -> None:
        self.log.record((), SeenInStore(found=tuple(sorted(found)), missing=tuple(sorted(missing))))

    def known_in_store(self) -> set[bytes]:
        """Return the pages that count as stored, without pages in a tier."""
        return {name for name in NAMES if self.index.match([name]).get(WORKER, NOTHING_HELD).num_stored}

    def step(self) -> None:
        """Take one step of the engine: report what changed and what is asked for."""
        for changes in self.changes.values():
            self.log.record(changes.take())
        for _, message in self.log.make(self.gateways, self.now_s):
            self.wires.send("engine", "gateway", message)

    def deliver(self, message: wire.PageEvents | wire.ListPages) -> None:
        if isinstance(message, wire.PageEvents):
            self.send(self.feed.on_events(message, self.now_s))
            return
        gateway = self.gateways.note_contact(b"g", self.now_s)
        assert gateway is not None
        gateway.pages = gateway.pages or PageReader()
        gateway.pages.wanted = message

    def known(self) -> set[tuple[wire.PageTier, bytes]]:
        found = set()
        for name in NAMES:
            bits = self.index._table.bits(self.index._distinct(name)[0])
            member = self.index._members[WORKER]
            for tier in TIERS:
                column, bit = self.index._place_of(member.shown.number, tier)
                if bits[column][0] & bit:
                    found.add((tier, name))
        return found

    def run(self, duration_s: float) -> None:
        """Let time pass, with a network that loses nothing."""
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self.step()
            for each in self.wires.waiting():
                while (message := self.wires.take(each)) is not None:
                    self.deliver(message)
            self.send(self.feed.request(self.now_s))
            self.now_s += 0.1


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    """Let a list of a few pages have several pieces, and take several requests."""
    with (
        mock.patch("kvist.kv.changes.MAX_DIGESTS", 4),
        mock.patch("kvist.engine.page_events.MAX_DIGESTS", 4),
        mock.patch("kvist.page_index.page_feed.NUM_PIECES", 2),
    ):
        yield


class FeedMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.last: tuple[tuple[str, str], wire.PageEvents | wire.ListPages] | None = None

    @rule(tier=st.sampled_from(TIERS), names=st.sets(st.sampled_from(NAMES), max_size=8))
    def store(self, tier: wire.PageTier, names: set[bytes]) -> None:
        for name in names:
            self.pair.store(tier, name)

    @rule(tier=st.sampled_from(TIERS), names=st.sets(st.sampled_from(NAMES), max_size=8))
    def remove(self, tier: wire.PageTier, names: set[bytes]) -> None:
        for name in names:
            self.pair.remove(tier, name)

    @rule(found=st.sets(st.sampled_from(NAMES), max_size=8), missing=st.sets(st.sampled_from(NAMES), max_size=2))
    def see_in_store(self, found: set[bytes], missing: set[bytes]) -> None:
        self.pair.see_in_store(found - missing, missing)

    @rule(pause_s=st.sampled_from([0.0, 0.06, 1.1]))
    def step(self, pause_s: float) -> None:
        self.pair.now_s += pause_s
        self.pair.step()

    @precondition(lambda self: self.pair.wires.waiting())
    @rule(data=st.data(), fate=st.sampled_from(["arrives", "arrives", "arrives", "lost", "late", "twice"]))
    def deliver(self, data: st.DataObject, fate: str) -> None:
        chosen = data.draw(st.sampled_from(self.pair.wires.waiting()))
        message = self.pair.wires.take(chosen)
        assert message is not None
        if fate == "late":
            self.pair.wires.repeat(chosen, message, at_once=False)
        elif fate != "lost":
            if fate == "twice":
                self.pair.wires.repeat(chosen, message, at_once=data.draw(st.booleans()))
            self.pair.deliver(message)

    @rule(duration_s=st.sampled_from([0.05, 0.15, 0.5, 1.5]))
    def run_without_losses(self, duration_s: float) -> None:
        self.pair.run(duration_s)

    @rule()
    def tick(self) -> None:
        self.pair.send(self.pair.feed.request(self.pair.now_s))

    @invariant()
    def the_bound_holds(self) -> None:
        assert self.pair.index.num_pages(WORKER) <= 2 * NUM_PAGES
        assert self.pair.index.num_entries <= 2 * 2 * NUM_PAGES + len(NAMES)  # of two listings, and of the store

    def teardown(self) -> None:
        self.pair.feed._wait_s = 0.0  # a feed that was wrong again and again waits longer before it repairs
        self.pair.feed._due_at_s = min(self.pair.feed._due_at_s, self.pair.now_s)
        self.pair.run(REPAIR_S)
        assert self.pair.known() == set(self.pair.rows)
        assert not self.pair.feed.is_listing


def test_the_gateway_knows_the_engines_pages_within_5_s_after_any_loss() -> None:
    run_state_machine_as_test(
        FeedMachine, settings=settings(max_examples=budget(50, long=1000), stateful_step_count=40)
    )


def test_a_new_feed_lists_all_pages_a_few_pieces_at_a_time() -> None:
    pair = Pair()
    for name in NAMES[:10]:
        pair.store("device", name)
    pair.store("host", NAMES[0])
    pair.run(1.0)
    assert pair.known() == set(pair.rows)
    assert pair.feed.num_listings == {Reason.JOINED: 1, Reason.GAP: 0, Reason.SUMS: 0, Reason.SHARE: 0}


def test_pages_seen_in_the_store_are_known_without_a_list_and_change_no_sum() -> None:
    pair = Pair()
    pair.run(1.0)
    pair.see_in_store(set(NAMES[:10]), set())
    pair.run(1.0)
    assert pair.known_in_store() == set(NAMES[:10])
    pair.see_in_store({NAMES[10]}, {NAMES[0]})
    pair.see_in_store({NAMES[1]}, {NAMES[10]})  # the newest report of a page counts
    pair.run(3.0)
    assert pair.known_in_store() == set(NAMES[1:10])
    assert pair.feed.num_listings == {Reason.JOINED: 1, Reason.GAP: 0, Reason.SUMS: 0, Reason.SHARE: 0}


def test_hints_that_no_message_has_room_for_are_dropped_oldest_first() -> None:
    pair = Pair()
    pair.run(1.0)
    with mock.patch("kvist.engine.page_events._MAX_HINTS", 6):
        pair.see_in_store(set(NAMES[:10]), set())
    pair.run(1.0)
    assert pair.known_in_store() == set(NAMES[4:10])


def test_a_lost_message_without_a_successor_is_found_by_the_next_sums() -> None:
    pair = Pair()
    pair.run(1.0)
    pair.store("device", NAMES[0])
    pair.step()
    assert pair.wires.take(("engine", "gateway")) is not None  # lost
    pair.run(2 * SUMS_INTERVAL_S)
    assert pair.known() == set(pair.rows)
    assert pair.feed.num_listings[Reason.GAP] == 1


def test_other_sums_make_the_pages_due_without_a_gap() -> None:
    pair = Pair()
    pair.store("device", NAMES[0])
    pair.run(1.0)
    pair.index.discard(WORKER, "device", NAMES[0])
    pair.run(2 * SUMS_INTERVAL_S)
    assert pair.known() == set(pair.rows)
    assert pair.feed.num_listings[Reason.SUMS] == 1


def test_a_worker_that_reports_false_sums_is_listed_ever_more_rarely() -> None:
    pair = Pair()
    pair.run(1.0)
    pair.log.record([])
    pair.log._tiers["device"]._num_pages += 1
    pair.run(300.0)
    assert 6 <= pair.feed.num_listings[Reason.SUMS] <= 10
    assert pair.feed._wait_s == MAX_WAIT_S


def test_a_worker_over_its_share_is_listed_again() -> None:
    index = PrefixIndex(16, seed=3)
    index.add(WORKER, {"device": 100})
    feed = PageFeed(index, WORKER)
    assert feed.request(0.0) == wire.ListPages(num_pieces=2)
    nothing = wire.ListedPages(tier="device", first_piece=0)
    feed.on_events(wire.PageEvents(sequence=0, changes=(tier_changes(*NAMES[:10]),), listed=(nothing,)), 0.0)
    assert feed.request(100.0) is None
    index.add(WorkerId("other"), {})
    assert feed.request(200.0) is None, "the sums have not been right since the last listing"
    assert feed.request(202.0) == wire.ListPages(num_pieces=2)
    assert feed.num_listings[Reason.SHARE] == 1


def test_a_gap_in_a_list_ends_the_list_and_the_next_one_begins_later() -> None:
    index = PrefixIndex(16, seed=3)
    index.add(WORKER, {"device": 100})
    feed = PageFeed(index, WORKER)
    assert feed.request(0.0) == wire.ListPages(num_pieces=2)
    pieces = [wire.ListedPages(tier="device", first_piece=number, next_piece=number + 1) for number in range(3)]
    assert feed.on_events(wire.PageEvents(sequence=0, listed=(pieces[0],)), 0.0) is None
    assert feed.on_events(wire.PageEvents(sequence=2, listed=(pieces[1],)), 0.0) is None
    assert feed.request(0.9) is None
    assert feed.request(1.0) == wire.ListPages(num_pieces=2)


def test_a_request_that_is_not_answered_is_repeated() -> None:
    index = PrefixIndex(16, seed=3)
    index.add(WORKER, {"device": 100})
    feed = PageFeed(index, WORKER)
    asked = wire.ListPages(num_pieces=2)
    assert feed.request(0.0) == asked
    assert feed.request(0.9) is None
    assert feed.request(1.0) == asked


def test_the_pieces_of_a_tier_have_each_page_once_while_pages_come_and_go() -> None:
    tier = HostTier(10)
    pages = [tier.reserve(None, name) for name in NAMES[:9]]
    for page in pages:
        assert page is not None
        tier.written(page, ok=True)
    assert tier.changes.num_pieces == 3
    assert b"".join(tier.changes.piece(number) for number in range(3)).count(NAMES[0]) == 1
    assert len(joined(*NAMES[:9])) == sum(len(tier.changes.piece(number)) for number in range(3))

"""Contact with peers on other hosts: no peer that answers is silent, and each that does not answer is, in time."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.request import EpochId, HandoffId, RequestId
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_peer_spec
from kvist.transfer import Transports
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.liveness import MAX_CONTACTS, SILENCE_S, PeerContact
from kvist.wire import Ack, Closed, Grant, PeerMessage, Ping, Pong, PoolAddress, Revoke

TARGET, SOURCE = EpochId("target"), EpochId("source")
ENDPOINT = "tcp://10.0.0.1:9001"


def grant(handoff_id: str = "h") -> Grant:
    return Grant(
        handoff_id=HandoffId(handoff_id),
        request_id=RequestId("r"),
        target_epoch=TARGET,
        source_epoch=SOURCE,
        target=make_peer_spec(),
        first_page=0,
        page_ids=(0,),
    )


def met(now_s: float = 0.0) -> PeerContact:
    """Return the contact of decode that has sent a Grant."""
    contact = PeerContact()
    contact.on_sent(grant(), ENDPOINT, now_s)
    return contact


def silent_from(contact: PeerContact, epoch: EpochId, now_s: float) -> float | None:
    """Ask every second, as the loop does. Return when the peer was first silent."""
    for second in range(60):
        if contact.is_silent(epoch, now_s + second):
            return now_s + second
    return None


def test_decode_pings_the_prefill_engines_that_it_has_granted_pages() -> None:
    assert met().pings(TARGET, {SOURCE, EpochId("never met")}) == [
        (ENDPOINT, Ping(target_epoch=TARGET, source_epoch=SOURCE))
    ]


def test_prefill_answers_and_sends_no_pings() -> None:
    contact = PeerContact()
    ping = Ping(target_epoch=TARGET, source_epoch=SOURCE)
    assert contact.on_received(ping, 0.0) == Pong(target_epoch=TARGET, source_epoch=SOURCE)
    assert contact.pings(SOURCE, {TARGET}) == []


@pytest.mark.parametrize(
    "message",
    [
        Pong(target_epoch=TARGET, source_epoch=SOURCE),
        Closed(handoff_id=HandoffId("h"), target_epoch=TARGET, source_epoch=SOURCE),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_of_the_peer_counts_as_an_answer(message: PeerMessage) -> None:
    contact = met()
    for second in range(10):
        assert not contact.is_silent(SOURCE, float(second))
    contact.on_received(message, 9.0)
    assert silent_from(contact, SOURCE, 10.0) == 9.0 + SILENCE_S


@pytest.mark.parametrize(
    "message",
    [
        Ping(target_epoch=TARGET, source_epoch=SOURCE),
        Ack(handoff_id=HandoffId("h"), target_epoch=TARGET),
        Revoke(handoff_id=HandoffId("h"), target_epoch=TARGET, reason="r"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_of_decode_shows_prefill_that_it_lives(message: PeerMessage) -> None:
    contact = PeerContact()
    for second in range(10):
        assert not contact.is_silent(TARGET, float(second))
    contact.on_received(message, 9.0)
    assert silent_from(contact, TARGET, 10.0) == 9.0 + SILENCE_S


def test_a_peer_that_is_asked_about_for_the_first_time_has_the_whole_time_to_answer() -> None:
    assert silent_from(PeerContact(), SOURCE, 1e6) == 1e6 + SILENCE_S


def test_after_a_pause_without_handoffs_a_peer_has_the_whole_time_again() -> None:
    contact = met()
    contact.is_silent(SOURCE, 1.0)
    assert silent_from(contact, SOURCE, 3600.0) == 3600.0 + SILENCE_S


def test_contacts_are_bounded() -> None:
    contact = met()
    for number in range(2 * MAX_CONTACTS):
        contact.is_silent(EpochId(f"peer-{number}"), 0.0)
    assert contact.pings(TARGET, {SOURCE}) == []


@given(
    lost=st.lists(st.booleans(), min_size=1, max_size=30),
    delays_s=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30),
    drift=st.floats(0.5, 2.0),
)
def test_a_peer_is_silent_exactly_when_no_answer_arrived_for_the_time(
    lost: list[bool], delays_s: list[float], drift: float
) -> None:
    """A ping each second over a channel that loses and delays; the peer's clock does not matter."""
    decode, prefill = met(), PeerContact()
    arrivals_s = [0.0]
    for second, is_lost, delay_s in zip(range(60), itertools.cycle(lost), itertools.cycle(delays_s), strict=False):
        [(_, ping)] = decode.pings(TARGET, {SOURCE})
        pong = prefill.on_received(ping, second * drift)
        assert pong is not None
        if not is_lost:
            arrivals_s.append(second + delay_s)
    heard_s = sorted(arrivals_s)
    for now_s in range(80):
        while heard_s and heard_s[0] <= now_s:
            last_s = heard_s.pop(0)
            decode.on_received(Pong(target_epoch=TARGET, source_epoch=SOURCE), last_s)
        assert decode.is_silent(SOURCE, float(now_s)) == (now_s - last_s >= SILENCE_S)


# ---------------------------------------------------------------- with transports


class FakeNetwork:
    """A transport between hosts: pages are written only through open windows."""

    def __init__(self) -> None:
        self.address = PoolAddress(
            transport="net", location="x", num_pages=4, page_bytes=64, layout="l", same_host=False
        )
        self.revoked: list[EpochId] = []

    def address_for(self, epoch: EpochId) -> PoolAddress:
        return msgspec.structs.replace(self.address, location=epoch)

    def granted(self, grant: Grant) -> Grant:
        return grant

    def is_unsettled(self, handoff_id: HandoffId) -> bool:
        return handoff_id == "torn"

    def settle(self, closed: Closed) -> None:
        self.revoked.append(closed.source_epoch)

    def revoke(self, epoch: EpochId) -> None:
        self.revoked.append(epoch)

    def write(self, job: object) -> None: ...
    def verify(self, job: object) -> None: ...
    def stop(self, handoff_id: HandoffId) -> None: ...
    def poll(self) -> list[object]:
        return []

    def peer_is_dead(self, epoch: EpochId) -> bool:
        return epoch == "proved dead"

    def close(self) -> None: ...


class World:
    def __init__(self, runtime_dir: Path) -> None:
        self.clock, self.network = FakeClock(), FakeNetwork()
        self.transports = Transports(
            {"net": self.network},  # type: ignore[dict-item]  # jobs are not looked at
            watch=EpochWatch(runtime_dir),
            wakeup=lambda: None,
            clock=self.clock,
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_silent_peer_has_lost_its_access_before_it_counts_as_dead(world: World) -> None:
    world.transports.sending(grant(), ENDPOINT)
    for _ in range(int(SILENCE_S)):
        assert not world.transports.peer_is_dead(SOURCE)
        assert world.network.revoked == []
        world.clock.advance(1.0)
    assert world.transports.peer_is_dead(SOURCE)
    assert world.network.revoked == [SOURCE]


def test_a_peer_that_was_silent_is_alive_for_its_next_handoff(world: World) -> None:
    for _ in range(int(SILENCE_S)):
        assert not world.transports.peer_is_dead(SOURCE)
        world.clock.advance(1.0)
    assert world.transports.peer_is_dead(SOURCE)
    world.transports.sending(grant("next"), ENDPOINT)
    assert not world.transports.peer_is_dead(SOURCE)


def test_a_silent_peer_of_this_host_is_not_dead_and_gets_no_pings(world: World, tmp_path: Path) -> None:
    """Such a peer may reach our pages by other ways than the network; only its lock proves its end."""
    lock = EpochLock(tmp_path, SOURCE)
    world.transports.sending(grant(), ENDPOINT)
    assert world.transports.pings(TARGET, {SOURCE}) == []
    for _ in range(3 * int(SILENCE_S)):
        assert not world.transports.peer_is_dead(SOURCE)
        world.clock.advance(1.0)
    assert world.network.revoked == []
    lock.close()


def test_a_peer_that_is_proved_dead_has_lost_its_access(world: World) -> None:
    assert world.transports.peer_is_dead(EpochId("proved dead"))
    assert world.network.revoked == ["proved dead"]


def test_an_unsettled_end_is_marked_by_prefill_and_settled_by_decode(world: World) -> None:
    closed = Closed(handoff_id=HandoffId("torn"), target_epoch=TARGET, source_epoch=SOURCE)
    marked = world.transports.sending(closed)
    assert isinstance(marked, Closed)
    assert marked.unsettled
    world.transports.received(closed)
    assert world.network.revoked == []
    world.transports.received(marked)
    assert world.network.revoked == [SOURCE]

"""The sockets between engines and gateways, with real ZeroMQ on loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from kvist import wire
from kvist.channel import ChannelConfig, EngineChannel, GatewayLink, Member, is_loopback
from kvist.errors import ConfigError
from kvist.request import EpochId, HandoffId, RequestId
from kvist.testing.specs import make_request, submit_full

BOUND_S = 60.0
HELLO = wire.Hello(gateway_id="g")
FLUSHED = wire.Flushed(call_id="c", num_pages=3)
KEY = "the key of this cluster"
CLOSED = wire.Closed(handoff_id=HandoffId("h"), target_epoch=EpochId("decode"), source_epoch=EpochId("prefill"))

Context = zmq.Context[zmq.Socket[bytes]]


class Engine(EngineChannel):
    """A channel with its own epoch, which an engine would know."""

    def __init__(self, cluster_key: str = KEY, bind: str = "tcp://127.0.0.1:0", **config: Any) -> None:
        member = Member(cluster_key)
        super().__init__(bind, member=member, config=ChannelConfig(**config))
        self.epoch = member.epoch

    @property
    def ack(self) -> wire.Ack:
        return wire.Ack(handoff_id=HandoffId("h"), target_epoch=self.epoch)


MakeChannel = Callable[..., Engine]


@pytest.fixture
def make_channel() -> Iterator[MakeChannel]:
    with ExitStack() as stack:

        def make(cluster_key: str = KEY, **config: Any) -> Engine:
            channel = Engine(cluster_key, **config)
            stack.callback(channel.close)
            return channel

        yield make


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


def recv_some(channel: EngineChannel, bound_s: float = BOUND_S) -> list[tuple[bytes, object]]:
    """Receive as `recv` does, but ignore the empty results after handshakes."""
    steps = int(bound_s / 0.05)
    for _ in range(steps):
        if received := channel.recv(0.05):
            return list(received)
    return []


def raw_dealer(
    context: Context, endpoint: str, address: bytes | None = None, member: Member | None = None
) -> zmq.Socket[bytes]:
    member = member or Member(KEY)
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, address or member.new_address())
    member.secure_client(dealer)
    dealer.linger = 0
    dealer.connect(endpoint)
    return dealer


class Inbox:
    """Collects the messages of a link, and lets a test wait for them."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()

    async def message(self) -> object:
        return await asyncio.wait_for(self.messages.get(), BOUND_S)

    async def lost_reason(self) -> str:
        return await asyncio.wait_for(self.lost.get(), BOUND_S)


MakeLink = Callable[..., tuple[GatewayLink, Inbox]]


@pytest.fixture
async def make_link(context: Context) -> AsyncIterator[MakeLink]:
    links: list[GatewayLink] = []

    def make(
        endpoint: str, cluster_key: str = KEY, on_rejected: Callable[[], None] = lambda: None
    ) -> tuple[GatewayLink, Inbox]:
        inbox = Inbox()
        link = GatewayLink(
            context,
            endpoint,
            member=Member(cluster_key),
            on_message=inbox.messages.put_nowait,
            on_lost=inbox.lost.put_nowait,
            on_rejected=on_rejected,
        )
        links.append(link)
        link.open()
        return link, inbox

    yield make
    for link in links:
        link.close()


async def in_thread(channel: EngineChannel) -> list[tuple[bytes, object]]:
    return await asyncio.to_thread(recv_some, channel)


async def test_a_gateway_and_an_engine_exchange_messages(make_channel: MakeChannel, make_link: MakeLink) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint)
    assert link.send(HELLO)
    [(gateway, message)] = await in_thread(channel)
    assert message == HELLO
    assert channel.send(gateway, FLUSHED)
    assert await inbox.message() == FLUSHED


async def test_one_recv_returns_all_waiting_messages_in_order(make_channel: MakeChannel, make_link: MakeLink) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint)
    aborts = [wire.Abort(request_id=RequestId(str(i))) for i in range(500)]
    for abort in aborts:
        assert link.send(abort)
    received: list[tuple[bytes, object]] = []
    for _ in range(20):
        received += await in_thread(channel)
        if len(received) >= 500:
            break
    assert [message for _, message in received] == aborts
    gateway = received[0][0]
    answers = [wire.Flushed(call_id=str(i), num_pages=i) for i in range(600)]  # more than one drain reads
    assert all(channel.send(gateway, answer) for answer in answers)
    assert [await inbox.message() for _ in answers] == answers


async def test_one_recv_is_limited_to_about_a_megabyte(make_channel: MakeChannel, make_link: MakeLink) -> None:
    channel = make_channel()
    link, _ = make_link(channel.endpoint)
    ids = tuple(range(1000, 31_000))  # 90 kB
    for number in range(40):
        request = make_request(str(number), ids, max_tokens=1)
        assert link.send(submit_full(request))
    await asyncio.sleep(0.3)
    counts: list[int] = []
    while sum(counts) < 40:
        counts.append(len(await in_thread(channel)))
    assert max(counts) <= 13
    assert len(counts) >= 4


def test_a_send_to_a_disconnected_peer_returns_false(make_channel: MakeChannel) -> None:
    channel = make_channel()
    assert channel.send(b"unknown", FLUSHED) is False


def test_a_peer_that_does_not_read_fails_sends_instead_of_blocking(make_channel: MakeChannel, context: Context) -> None:
    channel = make_channel(send_queue_messages=16)
    lazy = context.socket(zmq.DEALER)
    member = Member(KEY)
    lazy.setsockopt(zmq.IDENTITY, member.new_address())
    member.secure_client(lazy)
    lazy.rcvhwm = 1
    lazy.linger = 0
    lazy.connect(channel.endpoint)
    lazy.send(wire.encode(HELLO))
    [(address, _)] = recv_some(channel)
    full = b"x" * wire.DIGEST_BYTES * wire.MAX_DIGESTS
    big = wire.PageEvents(sequence=0, changes=(wire.TierChanges(tier="device", stored=full),) * 12)
    assert not all(channel.send(address, big) for _ in range(100))


def test_undecodable_messages_are_dropped_and_counted_and_the_next_is_read(
    make_channel: MakeChannel, context: Context
) -> None:
    channel = make_channel()
    dealer = raw_dealer(context, channel.endpoint)
    dealer.send(b"\xff not msgpack")
    dealer.send(wire.encode(CLOSED))  # a message that an engine's ROUTER does not accept
    dealer.send_multipart([b"two", b"frames"])
    dealer.send(wire.encode(HELLO))
    received = recv_some(channel)
    while not received:
        received = recv_some(channel)
    assert [message for _, message in received] == [HELLO]
    assert channel.num_undecodable == 3


async def test_a_link_drops_and_counts_undecodable_messages(make_channel: MakeChannel, make_link: MakeLink) -> None:
    channel, rejected = make_channel(), []
    link, inbox = make_link(channel.endpoint, on_rejected=lambda: rejected.append(1))
    link.send(HELLO)
    [(gateway, _)] = await in_thread(channel)
    channel._router.send_multipart([gateway, b"\xc1"])
    channel.send(gateway, FLUSHED)
    assert await inbox.message() == FLUSHED
    assert rejected == [1]


async def test_a_message_whose_handler_raises_does_not_block_the_next_ones(
    make_channel: MakeChannel, context: Context
) -> None:
    channel, taken, rejected = make_channel(), asyncio.Event(), []

    def on_message(message: object) -> None:
        if isinstance(message, wire.Flushed) and message.num_pages < 0:
            raise ZeroDivisionError("our bug")
        taken.set()

    link = GatewayLink(
        context,
        channel.endpoint,
        member=Member(KEY),
        on_message=on_message,
        on_lost=print,
        on_rejected=lambda: rejected.append(1),
    )
    link.open()
    try:
        link.send(HELLO)
        [(gateway, _)] = await in_thread(channel)
        channel.send(gateway, wire.Flushed(call_id="c", num_pages=-1))
        channel.send(gateway, FLUSHED)
        await asyncio.wait_for(taken.wait(), BOUND_S)
        assert rejected == [1]
    finally:
        link.close()


def test_wakeup_from_another_thread_ends_a_waiting_recv(make_channel: MakeChannel) -> None:
    channel = make_channel()
    waker = threading.Thread(target=channel.wakeup)
    waker.start()
    assert channel.recv(60.0) == []  # far above the time limit of the test
    waker.join()
    assert channel.recv(0.0) == []


def test_many_wakeups_end_one_recv_only(make_channel: MakeChannel) -> None:
    channel = make_channel()
    for _ in range(100_000):  # more than the pipe can hold
        channel.wakeup()
    channel.recv(BOUND_S)
    started_s = time.monotonic()
    assert channel.recv(0.2) == []
    assert time.monotonic() - started_s >= 0.2, "a wakeup was left, and ended the second recv at once"


def test_a_wakeup_after_the_end_of_the_channel_is_ignored(make_channel: MakeChannel) -> None:
    channel = make_channel()
    channel.close()
    channel.wakeup()


def test_decode_and_prefill_engines_exchange_handoff_messages(make_channel: MakeChannel) -> None:
    prefill, decode = make_channel(), make_channel()
    assert decode.send_to_peer(prefill.endpoint, decode.ack)
    assert recv_some(prefill) == [(decode.epoch.encode(), decode.ack)]
    assert prefill.send(decode.epoch.encode(), CLOSED)
    assert recv_some(decode) == [(prefill.endpoint.encode(), CLOSED)]


def test_peer_connections_are_bounded_and_the_least_recently_used_closes(make_channel: MakeChannel) -> None:
    decode = make_channel(max_peers=2)
    name, ack = decode.epoch.encode(), decode.ack
    prefills = [make_channel() for _ in range(3)]
    for prefill in prefills:
        assert decode.send_to_peer(prefill.endpoint, ack)
        assert recv_some(prefill) == [(name, ack)]
    assert prefills[2].send(name, CLOSED)
    assert prefills[1].send(name, CLOSED)
    for _ in range(100):
        prefills[0].recv(0.05)
        if not prefills[0].send(name, CLOSED):
            break
    else:
        pytest.fail("the first connection is still open")
    assert decode.send_to_peer(prefills[0].endpoint, ack)  # a new connection
    assert recv_some(prefills[0]) == [(name, ack)]
    assert prefills[0].send(name, CLOSED)


def test_a_bad_peer_endpoint_does_not_stop_the_engine(make_channel: MakeChannel) -> None:
    decode = make_channel()
    for endpoint in (
        "nonsense",
        "inproc://zeromq.zap.01",
        "tcp://127.0.0.1:*",
    ):
        assert decode.send_to_peer(endpoint, decode.ack) is False, endpoint


async def test_a_link_reports_a_lost_engine_once(make_channel: MakeChannel, make_link: MakeLink) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint)
    link.send(HELLO)
    [(gateway, _)] = await in_thread(channel)
    channel.send(gateway, FLUSHED)
    assert await inbox.message() == FLUSHED
    channel.close()
    assert "broke" in await inbox.lost_reason()
    assert link.send(HELLO) is False
    assert inbox.lost.empty()


async def test_a_link_connects_once_its_engine_starts(make_link: MakeLink) -> None:
    with socket.socket() as held:  # bound but not listening: reserves the port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        link, inbox = make_link(endpoint)
        link.send(HELLO)
        late = Engine(bind=endpoint)
        try:
            assert [message for _, message in await in_thread(late)] == [HELLO]
            assert inbox.lost.empty()
        finally:
            link.close()
            late.close()


def test_a_reconnecting_client_takes_over_its_address(make_channel: MakeChannel, context: Context) -> None:
    channel, member = make_channel(), Member(KEY)
    address = member.new_address()
    first = raw_dealer(context, channel.endpoint, address, member)
    first.send(wire.encode(HELLO))
    assert recv_some(channel) == [(address, HELLO)]
    second = raw_dealer(context, channel.endpoint, address, member)
    second.send(wire.encode(HELLO))
    assert recv_some(channel) == [(address, HELLO)]
    assert channel.send(address, FLUSHED)
    assert second.poll(int(BOUND_S * 1000))


# ---------------------------------------------------------------- endpoints and membership


def test_a_port_in_use_is_a_config_error(make_channel: MakeChannel) -> None:
    channel = make_channel()
    with pytest.raises(ConfigError, match="cannot bind"):
        Engine(bind=channel.endpoint)


@pytest.mark.parametrize(
    ("endpoint", "inside"),
    [
        ("tcp://127.0.0.1:0", True),
        ("tcp://127.8.9.1:77", True),
        ("tcp://[::1]:77", True),
        ("tcp://localhost:77", True),
        ("ipc:///tmp/x", True),
        ("tcp://0.0.0.0:77", False),
        ("tcp://*:77", False),
        ("tcp://10.0.0.1:77", False),
        ("tcp://localhost.example.org:77", False),
        ("tcp://[::]:77", False),
    ],
)
def test_loopback_endpoints_are_recognised(endpoint: str, inside: bool) -> None:
    assert is_loopback(endpoint) is inside


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:80", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://h:port"])
def test_an_invalid_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="not an engine endpoint"):
        is_loopback(endpoint)


@pytest.mark.parametrize("key", [None, ""])
def test_a_member_needs_a_cluster_key(key: str | None) -> None:
    with pytest.raises(ConfigError, match="--cluster-key-file"):
        Member(key)


def test_a_wildcard_bind_advertises_the_host_it_is_given() -> None:
    channel = EngineChannel("tcp://0.0.0.0:0", member=Member(KEY), advertise_host="192.0.2.7")
    channel.close()
    assert channel.endpoint.startswith("tcp://192.0.2.7:")


@pytest.mark.parametrize("kind", ["another cluster's key", "no key"])
def test_clients_without_the_cluster_key_are_refused(make_channel: MakeChannel, context: Context, kind: str) -> None:
    channel = make_channel()
    if kind == "no key":
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.connect(channel.endpoint)
    else:
        stranger = raw_dealer(context, channel.endpoint, member=Member(kind))
    stranger.send(wire.encode(HELLO))
    member = Member(KEY)
    address = member.new_address()
    client = raw_dealer(context, channel.endpoint, address, member)
    client.send(wire.encode(HELLO))
    assert recv_some(channel) == [(address, HELLO)]
    for _ in range(600):
        assert channel.recv(0.05) == []
        if channel.num_refused:
            return
    pytest.fail("the refused connection was not counted")


async def test_a_refused_link_reports_the_cluster_key_as_the_reason(
    make_channel: MakeChannel, make_link: MakeLink
) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint, cluster_key="the key of another cluster")
    link.send(HELLO)
    assert "--cluster-key-file" in await inbox.lost_reason()


def test_secrets_are_not_in_a_repr() -> None:
    member = Member(KEY)
    assert member._own.secret.decode() not in repr(member._own)
    assert KEY not in repr(ChannelConfig(cluster_key=KEY))

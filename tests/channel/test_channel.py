"""Sockets between engines and gateways, over real ZeroMQ on loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest
import zmq

from kvist import wire
from kvist.channel import ChannelConfig, EngineChannel, GatewayLink, is_loopback, security
from kvist.errors import ConfigError
from kvist.request import EpochId, HandoffId, RequestId

BOUND_S = 60.0
HELLO = wire.Hello(gateway_id="g")
FLUSHED = wire.Flushed(call_id="c", num_pages=3)
ACK = wire.Ack(handoff_id=HandoffId("h"), target_epoch=EpochId("decode"))
CLOSED = wire.Closed(handoff_id=HandoffId("h"), target_epoch=EpochId("decode"), source_epoch=EpochId("prefill"))

MakeChannel = Callable[..., EngineChannel]


@pytest.fixture
def make_channel() -> Iterator[MakeChannel]:
    with ExitStack() as stack:

        def make(epoch: str = "e", cluster_key: str = "", **config: int) -> EngineChannel:
            channel = EngineChannel(
                "tcp://127.0.0.1:0", epoch=EpochId(epoch), config=ChannelConfig(cluster_key=cluster_key, **config)
            )
            stack.callback(channel.close)
            return channel

        yield make


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def recv_some(channel: EngineChannel, bound_s: float = BOUND_S) -> list[tuple[bytes, object]]:
    """Like `recv`, but not ended by the answers to handshakes, which wake it with nothing to show."""
    steps = int(bound_s / 0.05)
    for _ in range(steps):
        if received := channel.recv(0.05):
            return list(received)
    return []


def raw_dealer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes = b"gw") -> zmq.Socket[bytes]:
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity)
    dealer.linger = 0
    dealer.connect(endpoint)
    return dealer


class Inbox:
    """Collects what a link delivers, and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()

    async def message(self) -> object:
        return await asyncio.wait_for(self.messages.get(), BOUND_S)

    async def lost_reason(self) -> str:
        return await asyncio.wait_for(self.lost.get(), BOUND_S)


@pytest.fixture
async def make_link(context: zmq.Context[zmq.Socket[bytes]]) -> AsyncIterator[Callable[..., tuple[GatewayLink, Inbox]]]:
    links: list[GatewayLink] = []

    def make(endpoint: str, identity: bytes = b"gw", cluster_key: str = "") -> tuple[GatewayLink, Inbox]:
        inbox = Inbox()
        link = GatewayLink(
            context,
            endpoint,
            identity=identity,
            on_message=inbox.messages.put_nowait,
            on_lost=inbox.lost.put_nowait,
            config=ChannelConfig(cluster_key=cluster_key),
        )
        links.append(link)
        link.open()
        return link, inbox

    yield make
    for link in links:
        link.close()


async def in_thread(channel: EngineChannel) -> list[tuple[bytes, object]]:
    return await asyncio.to_thread(recv_some, channel)


async def test_a_gateway_and_an_engine_exchange_messages(make_channel: MakeChannel, make_link) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint)
    assert link.send(HELLO)
    assert await in_thread(channel) == [(b"gw", HELLO)]
    assert channel.send(b"gw", FLUSHED)
    assert await inbox.message() == FLUSHED


async def test_one_recv_drains_all_that_waits_and_keeps_the_order(make_channel: MakeChannel, make_link) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint)
    aborts = [wire.Abort(request_id=RequestId(str(i))) for i in range(500)]
    for abort in aborts:
        assert link.send(abort)
    received: list[object] = []
    for _ in range(20):
        received += [message for _, message in await in_thread(channel)]
        if len(received) >= 500:
            break
    assert received == aborts
    answers = [wire.Flushed(call_id=str(i), num_pages=i) for i in range(600)]  # more than one drain takes
    assert all(channel.send(b"gw", answer) for answer in answers)
    assert [await inbox.message() for _ in answers] == answers


def test_a_send_to_a_peer_that_is_gone_is_reported(make_channel: MakeChannel) -> None:
    channel = make_channel()
    assert channel.send(b"nobody", FLUSHED) is False


def test_a_peer_that_does_not_read_fails_sends_instead_of_blocking(make_channel: MakeChannel, context) -> None:
    channel = make_channel(send_queue_messages=16)
    lazy = context.socket(zmq.DEALER)
    lazy.setsockopt(zmq.IDENTITY, b"lazy")
    lazy.rcvhwm = 1
    lazy.linger = 0
    lazy.connect(channel.endpoint)
    lazy.send(wire.encode(HELLO))
    assert recv_some(channel)
    big = wire.LoadReport(
        sequence=0, num_running=0, num_waiting=0, num_free_pages=0, num_cached_pages=0, num_owned_pages=0,
        num_in_flight_pages=0, cached_added=(b"x" * 16,) * 50_000,
    )  # fmt: skip
    assert not all(channel.send(b"lazy", big) for _ in range(100))


def test_undecodable_messages_are_dropped_and_counted_and_the_next_is_read(make_channel, context) -> None:
    channel = make_channel()
    dealer = raw_dealer(context, channel.endpoint)
    dealer.send(b"\xff not msgpack")
    dealer.send(wire.encode(CLOSED))  # a message, but not one that an engine's ROUTER takes
    dealer.send_multipart([b"two", b"frames"])
    dealer.send(wire.encode(HELLO))
    received = recv_some(channel)
    while not received:
        received = recv_some(channel)
    assert received == [(b"gw", HELLO)]
    assert channel.num_undecodable == 3


async def test_a_link_drops_what_it_cannot_decode(context, make_link) -> None:
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1")
    link, inbox = make_link(f"tcp://127.0.0.1:{port}")
    link.send(HELLO)
    identity, _ = await asyncio.to_thread(router.recv_multipart)
    router.send_multipart([identity, b"\xc1"])
    router.send_multipart([identity, wire.encode(FLUSHED)])
    assert await inbox.message() == FLUSHED
    assert link.num_undecodable == 1


def test_wakeup_from_another_thread_ends_a_waiting_recv(make_channel: MakeChannel) -> None:
    channel = make_channel()
    waker = threading.Thread(target=channel.wakeup)
    waker.start()
    assert channel.recv(60.0) == []  # the test's own time limit is far below this wait
    waker.join()
    assert channel.recv(0.0) == []


def test_many_wakeups_count_as_one_and_none_is_needed_after_close(make_channel: MakeChannel) -> None:
    channel = make_channel()
    for _ in range(100_000):  # more than the pipe holds
        channel.wakeup()
    channel.recv(60.0)
    channel.close()
    channel.wakeup()


def test_decode_and_prefill_engines_exchange_handoff_messages(make_channel: MakeChannel) -> None:
    prefill, decode = make_channel("prefill"), make_channel("decode")
    assert decode.send_to_peer(prefill.endpoint, ACK)
    assert recv_some(prefill) == [(b"decode", ACK)]
    assert prefill.send(b"decode", CLOSED)
    assert recv_some(decode) == [(prefill.endpoint.encode(), CLOSED)]


def test_connections_to_peers_are_bounded_and_the_least_recent_goes_first(make_channel: MakeChannel) -> None:
    decode = make_channel("decode", max_peers=2)
    prefills = [make_channel(f"p{i}") for i in range(3)]
    for prefill in prefills:
        assert decode.send_to_peer(prefill.endpoint, ACK)
        assert recv_some(prefill) == [(b"decode", ACK)]
    assert prefills[2].send(b"decode", CLOSED)
    assert prefills[1].send(b"decode", CLOSED)
    for _ in range(100):
        prefills[0].recv(0.05)
        if not prefills[0].send(b"decode", CLOSED):
            break
    else:
        pytest.fail("the first connection is still there")
    assert decode.send_to_peer(prefills[0].endpoint, ACK)  # a new connection
    assert recv_some(prefills[0]) == [(b"decode", ACK)]


def test_a_bad_peer_endpoint_does_not_stop_the_engine(make_channel: MakeChannel) -> None:
    decode = make_channel("decode")
    assert decode.send_to_peer("nonsense", ACK) is False
    assert decode.send_to_peer("tcp://192.0.2.1:5", ACK) is False  # off loopback, and there is no key


async def test_a_link_tells_once_that_the_engine_is_gone(make_channel: MakeChannel, make_link) -> None:
    channel = make_channel()
    link, inbox = make_link(channel.endpoint)
    link.send(HELLO)
    assert await in_thread(channel)
    channel.send(b"gw", FLUSHED)
    assert await inbox.message() == FLUSHED
    channel.close()
    assert "broke" in await inbox.lost_reason()
    assert link.send(HELLO) is False
    assert inbox.lost.empty()


async def test_a_link_waits_for_an_engine_that_is_not_there_yet(make_link) -> None:
    with socket.socket() as held:  # bound and not listened to: nobody else is given the port meanwhile
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        link, inbox = make_link(endpoint)
        link.send(HELLO)
        late = EngineChannel(endpoint, epoch=EpochId("late"))
        try:
            assert await in_thread(late) == [(b"gw", HELLO)]
            assert inbox.lost.empty()
        finally:
            link.close()
            late.close()


def test_a_reconnecting_identity_takes_over_from_its_dead_connection(make_channel: MakeChannel, context) -> None:
    channel = make_channel()
    first = raw_dealer(context, channel.endpoint)
    first.send(wire.encode(HELLO))
    assert recv_some(channel)
    second = raw_dealer(context, channel.endpoint)
    second.send(wire.encode(HELLO))
    assert recv_some(channel)
    assert channel.send(b"gw", FLUSHED)
    assert second.poll(int(BOUND_S * 1000))


# ---------------------------------------------------------------- who may in


def test_a_taken_port_is_a_clear_error(make_channel: MakeChannel) -> None:
    channel = make_channel()
    with pytest.raises(ConfigError, match="cannot bind"):
        EngineChannel(channel.endpoint, epoch=EpochId("x"))


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
def test_loopback_is_told_from_the_rest(endpoint: str, inside: bool) -> None:
    assert is_loopback(endpoint) is inside


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:80", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://h:port"])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="no engine endpoint"):
        is_loopback(endpoint)


def test_binding_off_loopback_needs_a_cluster_key() -> None:
    with pytest.raises(ConfigError, match="--cluster-key"):
        EngineChannel("tcp://0.0.0.0:0", epoch=EpochId("e"))


def test_connecting_off_loopback_needs_a_cluster_key(context) -> None:
    with pytest.raises(ConfigError, match="--cluster-key"):
        GatewayLink(context, "tcp://192.0.2.1:1", identity=b"g", on_message=print, on_lost=print)


def test_a_wildcard_bind_advertises_the_host_it_is_given() -> None:
    channel = EngineChannel(
        "tcp://0.0.0.0:0", epoch=EpochId("e"), config=ChannelConfig(cluster_key="k"), advertise_host="192.0.2.7"
    )
    channel.close()
    assert channel.endpoint.startswith("tcp://192.0.2.7:")


async def test_members_of_the_cluster_come_in(make_channel: MakeChannel, make_link) -> None:
    prefill, decode = make_channel("prefill", "secret"), make_channel("decode", "secret")
    link, inbox = make_link(prefill.endpoint, cluster_key="secret")
    link.send(HELLO)
    assert await in_thread(prefill) == [(b"gw", HELLO)]
    prefill.send(b"gw", FLUSHED)
    assert await inbox.message() == FLUSHED
    assert decode.send_to_peer(prefill.endpoint, ACK)
    assert await in_thread(prefill) == [(b"decode", ACK)]


@pytest.mark.parametrize("stranger_key", ["wrong", ""])
def test_a_stranger_and_a_plain_client_stay_out(make_channel: MakeChannel, context, stranger_key: str) -> None:
    channel = make_channel("e", "secret")
    stranger = context.socket(zmq.DEALER)
    if stranger_key:
        security.secure_client(stranger, security.member_keys(stranger_key))
    stranger.linger = 0
    stranger.connect(channel.endpoint)
    stranger.send(wire.encode(HELLO))
    member = context.socket(zmq.DEALER)
    member.setsockopt(zmq.IDENTITY, b"member")
    security.secure_client(member, security.member_keys("secret"))
    member.linger = 0
    member.connect(channel.endpoint)
    member.send(wire.encode(HELLO))
    assert recv_some(channel) == [(b"member", HELLO)]
    assert recv_some(channel, 0.3) == []


def test_knowing_the_public_key_is_not_enough(make_channel: MakeChannel, context) -> None:
    channel = make_channel("e", "secret")
    stranger = context.socket(zmq.DEALER)
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.curve_serverkey = security.member_keys("secret").public
    stranger.linger = 0
    stranger.connect(channel.endpoint)
    stranger.send(wire.encode(HELLO))
    for _ in range(100):
        assert channel.recv(0.05) == []
        if channel._gate is not None and channel._gate.num_refused:
            break
    else:
        pytest.fail("the gate was never asked")


async def test_a_refused_link_says_what_to_check(make_channel: MakeChannel, make_link) -> None:
    channel = make_channel("e", "secret")
    link, inbox = make_link(channel.endpoint, cluster_key="another")
    link.send(HELLO)
    assert "--cluster-key" in await inbox.lost_reason()


def test_the_secret_is_not_shown() -> None:
    assert security.member_keys("hush").secret.decode() not in repr(security.member_keys("hush"))

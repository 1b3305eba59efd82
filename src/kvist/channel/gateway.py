"""The gateway's side: one connection to one engine, in an asyncio loop.

Life cycle: `open` connects in the background (ZeroMQ retries until the engine listens); `on_message` is called for each
message; `on_lost` is called once, when an established connection breaks or the engine refuses the key. A link is one
connection: after `on_lost` its owner makes a new link with a new address, so that messages queued for a dead engine are
never sent to the next one.

The event loop watches the socket's file descriptor: one callback reads a burst of messages, without a future per
message.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvist import wire
from kvist.bounded_log import BoundedLog
from kvist.channel import security
from kvist.channel.keepalive import enable_tcp_keepalive
from kvist.channel.security import ChannelConfig, Member
from kvist.errors import ConfigError, WireError

logger = logging.getLogger(__name__)

_RECONNECT_IVL_MS, _RECONNECT_IVL_MAX_MS = 50, 400
_MAX_MESSAGES_PER_DRAIN = 32  # then the tasks of the streams run
_REFUSED = (
    "the engine at {} refused this gateway: the engine has another cluster key. Processes of one user on one machine "
    f"share a key; otherwise start all of them with the same --cluster-key-file FILE, made by {security.MAKE_A_KEY}"
)
_HANDSHAKE_FAILURES = frozenset(
    {
        zmq.Event.HANDSHAKE_FAILED_AUTH,
        zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
        zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    }
)


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))


class GatewayLink:
    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        member: Member,
        on_message: Callable[[wire.EngineToGateway], None],
        on_lost: Callable[[str], None],
        on_rejected: Callable[[], None] = lambda: None,
        config: ChannelConfig | None = None,
    ) -> None:
        """`on_rejected` is called if a message cannot be decoded or `on_message` raises. Raises `ConfigError` if the
        endpoint is invalid."""
        self._config = config or ChannelConfig()
        security.split_tcp_endpoint(endpoint)
        self.endpoint = endpoint
        self._context = context
        self._member = member
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_rejected = on_rejected
        self._decoder = wire.Decoder(wire.EngineToGateway)
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected = False
        self._log = BoundedLog(logger)

    def open(self) -> None:
        """Start to connect. Call once, inside the running loop."""
        assert self._socket is None, "a link is one connection: make a new one"
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.sndhwm = dealer.rcvhwm = self._config.send_queue_messages
        dealer.maxmsgsize = self._config.max_message_bytes
        dealer.reconnect_ivl = _RECONNECT_IVL_MS
        dealer.reconnect_ivl_max = _RECONNECT_IVL_MAX_MS
        enable_tcp_keepalive(dealer)
        dealer.setsockopt(zmq.IDENTITY, self._member.new_address())
        self._member.secure_client(dealer)
        self._loop = asyncio.get_running_loop()
        self._monitor = dealer.get_monitor_socket()
        self._socket = dealer
        try:
            dealer.connect(self.endpoint)
        except zmq.ZMQError as error:
            dealer.disable_monitor()
            dealer.close()
            self._socket = self._monitor = None
            raise ConfigError(f"cannot connect to the engine at {self.endpoint}: {error}") from error
        self._loop.add_reader(_descriptor(dealer), self._drain)
        self._loop.add_reader(_descriptor(self._monitor), self._read_monitor)
        self._loop.call_soon(self._read_monitor)  # the descriptor is edge-triggered: an event may be waiting already

    def send(self, message: wire.GatewayToEngine) -> bool:
        """Queue a message without blocking. Return False if the queue is full or the link is closed."""
        if self._socket is None or self._loop is None:
            return False
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        # A send may consume the descriptor's edge: check for messages that arrived meanwhile.
        self._loop.call_soon(self._drain)
        return True

    def close(self) -> None:
        """Close the connection and drop queued messages. No callback follows. A second call is harmless."""
        if self._socket is None or self._monitor is None or self._loop is None:
            return
        self._loop.remove_reader(_descriptor(self._socket))
        self._loop.remove_reader(_descriptor(self._monitor))
        self._socket.disable_monitor()
        self._socket.close(linger=0)
        self._socket = self._monitor = None

    def _drain(self) -> None:
        for _ in range(_MAX_MESSAGES_PER_DRAIN):
            if not self._receive():
                return
        if self._loop is not None:
            self._loop.call_soon(self._drain)

    def _receive(self) -> bool:
        """Deliver one message. Return False if none is waiting or the link is closed (perhaps by a callback)."""
        if self._socket is None:
            return False
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            if len(frames) != 1:
                raise WireError(f"a message has one frame, not {len(frames)}")
            self._on_message(self._decoder.decode(frames[0]))  # type: ignore[arg-type]  # the decoder's union
        except WireError as error:
            self._on_rejected()
            self._log.warning("dropped a message from the engine at %s: %s", self.endpoint, error)
        except Exception:  # our bug: the messages behind this one belong to other requests
            self._on_rejected()
            self._log.warning("cannot handle a message from the engine at %s", self.endpoint, exc_info=True)
        return True

    def _read_monitor(self) -> None:
        while self._monitor is not None:
            try:
                frames = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(frames)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif event in _HANDSHAKE_FAILURES:
                self._lose(_REFUSED.format(self.endpoint))
            elif event == zmq.Event.DISCONNECTED and self._connected:
                while self._receive():  # earlier messages may end streams, which would otherwise fail
                    pass
                self._lose(f"the connection to the engine at {self.endpoint} broke")

    def _lose(self, reason: str) -> None:
        if self._socket is not None:
            self.close()
            self._on_lost(reason)

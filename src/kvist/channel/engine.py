"""The engine's side: one ROUTER that gateways and decode engines connect to, and a DEALER to each prefill peer.

Life: bind (port 0 chooses a free port, see `endpoint`), then the engine loop alternates `recv` and `send`, then
`close`. One thread uses the channel; only `wakeup` may be called from other threads.

A send never blocks. `False` means that the message is lost, because the peer is disconnected or its queue is full: the
caller should abort the peer's requests, which would otherwise wait for the lost message.

Messages from a process that is not a member, or in the name of another member, are dropped and counted before `recv`
returns (security.py).
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

import zmq

from kvist import wire
from kvist.bounded_log import BoundedLog
from kvist.channel import security
from kvist.channel.keepalive import enable_tcp_keepalive
from kvist.channel.security import ChannelConfig, KeyGate, Member
from kvist.errors import ConfigError, WireError

logger = logging.getLogger(__name__)

Inbound = wire.ToEngine | wire.SourceToTarget
Outbound = wire.EngineToGateway | wire.SourceToTarget
V = TypeVar("V")

_MAX_MESSAGES_PER_RECV = 4096  # the engine then runs a step before it reads more
_MAX_BYTES_PER_RECV = 1 << 20  # a second limit: 300,000 token ids take about 20 ms to decode and check
_MAX_CLIENTS = 4096  # known addresses; a forgotten one is checked again with its next message
_HANDSHAKE_FAILURES = (  # NO_DETAIL: the other side was first to detect the mismatch
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_AUTH
)
_LINGER_MS = 500  # a last Ended or Ack may still leave


class EngineChannel:
    def __init__(
        self, bind: str, *, member: Member, config: ChannelConfig | None = None, advertise_host: str | None = None
    ) -> None:
        """`bind`: for example "tcp://127.0.0.1:0". `advertise_host`: the host that others connect to, with a wildcard
        bind.

        Raises `ConfigError` if the address is in use or invalid."""
        security.split_tcp_endpoint(bind)
        self._config = config or ChannelConfig()
        self._member = member
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = KeyGate(self._context)
        self._router = self._new_socket(zmq.ROUTER)
        self._peers: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()  # endpoint → DEALER, least recently used first
        self._admitted: OrderedDict[bytes, str] = OrderedDict()  # address → the key that it was verified with
        self._sources: OrderedDict[bytes, str] = OrderedDict()  # prefill engine's epoch → endpoint of its Grants
        self._targets: OrderedDict[bytes, bytes] = OrderedDict()  # decode engine's epoch → its last address
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._refusals = self._router.get_monitor_socket(_HANDSHAKE_FAILURES)
        self._from_router = wire.Decoder(wire.ToEngine)
        self._from_peer = wire.Decoder(wire.SourceToTarget)
        self._poller = zmq.Poller()
        self._log = BoundedLog(logger)
        self.num_undecodable = 0
        self.num_unexpected = 0  # not from a member, or in the name of another member
        self.num_refused = 0  # connections
        self.endpoint = self._bind(bind, advertise_host)

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]:
        """Wait up to `timeout_s`; return the waiting messages, about a megabyte at most, as (sender, message).

        The sender is the identity for `send`: a gateway's address or a decode engine's epoch; for a prefill peer
        (`Done`, `Closed`) its endpoint. The list is empty after a timeout or a `wakeup`."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000 + 0.999))))
        if self._wake_out.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                while self._wake_out.recv(4096):
                    pass
        if self._gate.socket in ready:
            self._gate.answer_waiting()
        if self._refusals in ready:
            self._count_refusals()
        received: list[tuple[bytes, Inbound]] = []
        if self._router in ready:
            for frames in _pending_messages(self._router):
                self._receive(frames, received)
        for endpoint, peer in self._peers.items():
            if peer in ready:
                for frames in _pending_messages(peer):
                    self._receive_from_peer(endpoint, frames, received)
        return received

    def send(self, identity: bytes, message: Outbound) -> bool:
        """Send to a gateway or a decode engine, by the identity that `recv` returned."""
        address = self._targets.get(identity, identity)
        try:
            self._router.send_multipart((address, wire.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        """Send to the prefill engine with its ROUTER at `endpoint`; connects on first use."""
        try:
            peer = self._peer(endpoint)
            if isinstance(message, wire.Grant):
                _remember(self._sources, message.source_epoch.encode(), endpoint)
            peer.send(wire.encode(message), zmq.NOBLOCK)
        except (zmq.ZMQError, ConfigError) as error:  # the endpoint comes from a message, and may be invalid
            self._log.warning("cannot send %s to the prefill engine at %s: %s", type(message).__name__, endpoint, error)
            return False
        return True

    def wakeup(self) -> None:
        """End the `recv` that is waiting, or the next one. Safe from any thread, also after `close`."""
        with contextlib.suppress(OSError):  # full pipe: a wakeup is pending; closed pipe: no `recv` is waiting
            self._wake_in.send(b"\0")

    def close(self) -> None:
        self._wake_in.close()
        self._wake_out.close()
        self._context.destroy(linger=_LINGER_MS)

    def _bind(self, bind: str, advertise_host: str | None) -> str:
        try:
            self._router.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind the engine socket to {bind}: {error}") from error
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_out, zmq.POLLIN)
        self._poller.register(self._gate.socket, zmq.POLLIN)
        self._poller.register(self._refusals, zmq.POLLIN)
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        address = security.split_tcp_endpoint(bound)
        if advertise_host and address is not None:
            return f"tcp://{security.bracketed(advertise_host)}:{address[1]}"
        return bound

    def _new_socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.linger = _LINGER_MS
        made.sndhwm = made.rcvhwm = self._config.send_queue_messages
        made.maxmsgsize = self._config.max_message_bytes
        enable_tcp_keepalive(made)
        if kind == zmq.ROUTER:
            made.router_mandatory = True  # a send to a peer that is gone is an error, not a silent drop
            made.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a reconnecting client takes its address over
            self._member.secure_server(made)
        else:
            made.setsockopt(zmq.IDENTITY, self._member.new_address())
            self._member.secure_client(made)
        return made

    def _peer(self, endpoint: str) -> zmq.Socket[bytes]:
        if endpoint in self._peers:
            self._peers.move_to_end(endpoint)
            return self._peers[endpoint]
        security.split_tcp_endpoint(endpoint)
        peer = self._new_socket(zmq.DEALER)
        try:
            peer.connect(endpoint)
        except zmq.ZMQError:
            peer.close(linger=0)
            raise
        if len(self._peers) >= self._config.max_peers:
            _, oldest = self._peers.popitem(last=False)
            self._poller.unregister(oldest)
            oldest.close()
        self._peers[endpoint] = peer
        self._poller.register(peer, zmq.POLLIN)
        return peer

    def _receive(self, frames: list[zmq.Frame], received: list[tuple[bytes, Inbound]]) -> None:
        """Append a message of the ROUTER to `received`. Its first frame is the address."""
        address = frames[0].bytes
        if not self._is_member(address, frames):
            self._drop("the sender is not a member of the cluster", security.address_for_log(address))
            return
        message = self._decode(security.address_for_log(address), frames[1:], self._from_router)
        if isinstance(message, wire.TargetToSource):
            epoch = security.epoch_of(address)
            if message.target_epoch != epoch:
                self._drop(f"sender {epoch} used the epoch {message.target_epoch}", security.address_for_log(address))
                return
            sender = epoch.encode()
            _remember(self._targets, sender, address)
            received.append((sender, message))
        elif message is not None:
            received.append((address, message))

    def _receive_from_peer(self, endpoint: str, frames: list[zmq.Frame], received: list[tuple[bytes, Inbound]]) -> None:
        message = self._decode(endpoint, frames, self._from_peer)
        if not isinstance(message, wire.SourceToTarget):
            return
        if self._sources.get(message.source_epoch.encode(), endpoint) != endpoint:
            self._drop(f"epoch {message.source_epoch} belongs to another endpoint", endpoint)
        else:
            received.append((endpoint.encode(), message))

    def _count_refusals(self) -> None:
        for _ in _pending_messages(self._refusals):
            self.num_refused += 1
            self._log.warning("refused a connection to %s: the client has another cluster key, or none", self.endpoint)

    def _is_member(self, address: bytes, frames: list[zmq.Frame]) -> bool:
        try:
            proved_key = str(frames[-1].get("User-Id"))
        except zmq.ZMQError:  # not set by our gate
            return False
        if self._admitted.get(address) == proved_key:
            return True
        if not self._member.admits(address, proved_key):
            return False
        _remember(self._admitted, address, proved_key)
        return True

    def _drop(self, why: str, sender: str) -> None:
        self.num_unexpected += 1
        self._log.warning("dropped a message from %s: %s", sender, why)

    def _decode(self, sender: str, frames: list[zmq.Frame], decoder: wire.Decoder) -> Inbound | None:
        try:
            if len(frames) != 1:
                raise WireError(f"a message has one frame, not {len(frames)}")
            return decoder.decode(frames[0].buffer)  # type: ignore[return-value]  # the decoder was built for this union
        except WireError as error:
            self.num_undecodable += 1
            self._log.warning("dropped a message from %s: %s", sender, error)
            return None


def _pending_messages(socket: zmq.Socket[bytes]) -> Iterator[list[zmq.Frame]]:
    """Yield the frames of each waiting message, up to the limits of one `recv`."""
    num_bytes = 0
    for _ in range(_MAX_MESSAGES_PER_RECV):
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        yield frames
        num_bytes += sum(map(len, frames))
        if num_bytes > _MAX_BYTES_PER_RECV:
            return


def _remember(memory: OrderedDict[bytes, V], key: bytes, value: V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _MAX_CLIENTS:
        memory.popitem(last=False)

"""The engine's side: one ROUTER that gateways and decode engines connect to, and a DEALER to each prefill peer.

Life: bind (port 0 finds a free one; `endpoint` tells it), then the engine loop alternates `recv` and `send`, then
`close`. One thread uses the channel; only `wakeup` may be called from others.

A send never blocks. `False` means that the peer no longer gets what we send (it is gone, or so slow that its queue is
full): what it asked for should be aborted, since a lost message would leave it waiting.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Iterator

import zmq

from kvist import wire
from kvist.channel import security
from kvist.channel.keepalive import notice_vanished_hosts
from kvist.channel.security import ChannelConfig
from kvist.errors import ConfigError, WireError
from kvist.request import EpochId

logger = logging.getLogger(__name__)

Inbound = wire.ToEngine | wire.SourceToTarget
Outbound = wire.EngineToGateway | wire.SourceToTarget

_MAX_MESSAGES_A_RECV = 4096  # then the engine takes a step before it reads on
_LINGER_MS = 500  # a last Ended or Ack may still leave


class EngineChannel:
    def __init__(
        self, bind: str, *, epoch: EpochId, config: ChannelConfig | None = None, advertise_host: str | None = None
    ) -> None:
        """`bind`: "tcp://127.0.0.1:0". `advertise_host`: how other machines name this one, when bound to a wildcard.

        Raises `ConfigError` when the address is taken, or leaves loopback without a cluster key."""
        self._config = config or ChannelConfig()
        security.require_key_off_loopback(bind, self._config.cluster_key)
        self._identity = epoch.encode()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys = security.member_keys(self._config.cluster_key) if self._config.cluster_key else None
        self._gate = security.MemberGate(self._context, self._keys) if self._keys else None
        self._router = self._new_socket(zmq.ROUTER)
        self._peers: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()  # endpoint → DEALER, least recently used first
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._from_router = wire.Decoder(wire.ToEngine)
        self._from_peer = wire.Decoder(wire.SourceToTarget)
        self._poller = zmq.Poller()
        self.num_undecodable = 0
        self.endpoint = self._bind(bind, advertise_host)

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]:
        """Everything that waits, as (sender, message), after at most `timeout_s`. The sender is the identity to answer
        by `send`; for a prefill peer (`Done`, `Closed`) it is its endpoint. Empty after a timeout or a `wakeup`."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000 + 0.999))))
        if self._wake_out.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                while self._wake_out.recv(4096):
                    pass
        if self._gate is not None and self._gate.socket in ready:
            self._gate.answer_waiting()
        received: list[tuple[bytes, Inbound]] = []
        if self._router in ready:
            for identity, *frames in _waiting_on(self._router):
                self._decode(identity, frames, self._from_router, received)
        for endpoint, peer in self._peers.items():
            if peer in ready:
                for frames in _waiting_on(peer):
                    self._decode(endpoint.encode(), frames, self._from_peer, received)
        return received

    def send(self, identity: bytes, message: Outbound) -> bool:
        """To a gateway (the identity that `recv` gave) or a decode engine (its epoch's bytes)."""
        try:
            self._router.send_multipart((identity, wire.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        """To the prefill engine whose ROUTER is at `endpoint`; connects on first use."""
        try:
            peer = self._peer(endpoint)
            peer.send(wire.encode(message), zmq.NOBLOCK)
        except (zmq.ZMQError, ConfigError) as error:  # the endpoint came over the wire: it must not stop the engine
            logger.error("cannot send %s to the prefill engine at %s: %s", type(message).__name__, endpoint, error)
            return False
        return True

    def wakeup(self) -> None:
        """End a waiting `recv`, or the next one. Safe from any thread, also after `close`."""
        with contextlib.suppress(OSError):  # a full pipe: a wakeup waits already; a closed one: nobody is asleep
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
        if self._gate is not None:
            self._poller.register(self._gate.socket, zmq.POLLIN)
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
        notice_vanished_hosts(made)
        if kind == zmq.ROUTER:
            made.router_mandatory = True  # a send to a peer that is gone is an error, not a silent drop
            made.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who reconnects takes its identity over from its dead connection
            if self._keys is not None:
                security.secure_server(made, self._keys)
        else:
            made.setsockopt(zmq.IDENTITY, self._identity)
            if self._keys is not None:
                security.secure_client(made, self._keys)
        return made

    def _peer(self, endpoint: str) -> zmq.Socket[bytes]:
        if endpoint in self._peers:
            self._peers.move_to_end(endpoint)
            return self._peers[endpoint]
        security.require_key_off_loopback(endpoint, self._config.cluster_key)
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

    def _decode(
        self, sender: bytes, frames: list[bytes], decoder: wire.Decoder, received: list[tuple[bytes, Inbound]]
    ) -> None:
        try:
            if len(frames) != 1:
                raise WireError(f"a message has one frame, not {len(frames)}")
            message = decoder.decode(frames[0])
        except WireError as error:
            self.num_undecodable += 1
            logger.warning("dropped a message from %r: %s", sender, error)
            return
        received.append((sender, message))  # type: ignore[arg-type]  # the decoder was built for this union


def _waiting_on(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """The frames of each message that is there, as far as one `recv` goes."""
    for _ in range(_MAX_MESSAGES_A_RECV):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return

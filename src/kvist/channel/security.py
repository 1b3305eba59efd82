"""Who may speak on an engine socket: everybody on loopback, else only holders of the cluster key.

With a cluster key every socket of the cluster is CurveZMQ: encrypted, and authenticated in both directions. All members
share one keypair derived from the key, so a peer proves membership, not who it is. A client must know the server's
public key to say hello at all, and the engine checks the client's own key again (ZAP): a stranger who learnt the public
key still stays out.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from kvist.config import option
from kvist.errors import ConfigError

logger = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by ZeroMQ's RFC 27
ZAP_DOMAIN = b"kvist"
_ZAP_FRAMES = 7  # version, request id, domain, address, identity, mechanism, and CURVE's one credential
WILDCARD_HOSTS = frozenset({"*", "0.0.0.0", "::"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelConfig:
    cluster_key: str = option(
        "",
        "secret shared by every gateway and engine of the cluster; needed as soon as an engine socket leaves loopback",
        secret=True,
    )
    max_message_bytes: int = option(
        64 << 20, "largest message an engine socket accepts", unit="bytes", minimum=1 << 16, maximum=1 << 30
    )
    send_queue_messages: int = option(
        10_000, "messages that may wait for one peer before sending to it fails", unit="messages", minimum=16
    )
    max_peers: int = option(64, "prefill engines one decode engine keeps connections to", minimum=1, maximum=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberKeys:
    """The cluster's keypair in ZeroMQ's Z85 text form."""

    public: bytes
    secret: bytes = field(repr=False)


def member_keys(cluster_key: str) -> MemberKeys:
    digest = hashlib.blake2b(cluster_key.encode(), digest_size=32, person=b"kvist-curve").digest()
    secret = z85.encode(digest)
    return MemberKeys(public=zmq.curve_public(secret), secret=secret)


def split_tcp_endpoint(endpoint: str) -> tuple[str, str] | None:
    """("host", "port") of a tcp endpoint, the host without brackets; None for other transports."""
    scheme, separator, address = endpoint.partition("://")
    if not separator or scheme not in ("tcp", "ipc", "inproc") or not address:
        raise ConfigError(f"{endpoint!r} is no engine endpoint; write tcp://HOST:PORT or ipc://PATH")
    if scheme != "tcp":
        return None
    host, separator, port = address.rpartition(":")
    if not separator or not host or not (port == "*" or port.isdigit()):
        raise ConfigError(f"{endpoint!r} is no engine endpoint; write tcp://HOST:PORT")
    return host.strip("[]"), port


def bracketed(host: str) -> str:
    """The host as it stands before ":PORT" in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def host_to_name(host: str, instead: str) -> str:
    """As `bracketed`; `instead` of an address that stands for all."""
    return instead if not host or host in WILDCARD_HOSTS else bracketed(host)


def is_loopback(endpoint: str) -> bool:
    """Whether nothing outside this machine can reach the endpoint."""
    address = split_tcp_endpoint(endpoint)
    if address is None or address[0] == "localhost":
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:  # a host name: it may resolve to anything
        return False


def require_key_off_loopback(endpoint: str, cluster_key: str) -> None:
    """Raises `ConfigError` when the endpoint leaves loopback and there is no cluster key."""
    if not cluster_key and not is_loopback(endpoint):
        raise ConfigError(
            f"{endpoint} can be reached from other machines: give every gateway and engine the same --cluster-key,"
            " or keep engine sockets on 127.0.0.1",
            param="cluster_key",
        )


def secure_server(socket: zmq.Socket[bytes], keys: MemberKeys) -> None:
    socket.curve_secretkey = keys.secret
    socket.curve_publickey = keys.public
    socket.curve_server = True
    socket.zap_domain = ZAP_DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no answer from our gate is a no


def secure_client(socket: zmq.Socket[bytes], keys: MemberKeys) -> None:
    socket.curve_secretkey = keys.secret
    socket.curve_publickey = keys.public
    socket.curve_serverkey = keys.public


class MemberGate:
    """Answers ZeroMQ's question "may this client in?" (ZAP, RFC 27). It lives in its owner's loop: poll `socket` and
    call `answer_waiting`; a client's handshake waits until then."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: MemberKeys) -> None:
        self._public = z85.decode(keys.public)
        self.num_refused = 0
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)

    def answer_waiting(self) -> None:
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._answer(frames))

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        member = (
            len(frames) == _ZAP_FRAMES
            and frames[5] == b"CURVE"
            and frames[2] == ZAP_DOMAIN
            and hmac.compare_digest(frames[6], self._public)
        )
        request_id = frames[1] if len(frames) > 1 else b""
        if member:
            return [b"1.0", request_id, b"200", b"OK", b"member", b""]
        self.num_refused += 1
        logger.warning("refused a connection from %s: it does not hold the cluster key", frames[3:4])
        return [b"1.0", request_id, b"400", b"not a member", b"", b""]

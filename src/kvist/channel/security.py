"""Authenticates the members of a cluster: the holders of the cluster key, each with an identity that no other can use.

Every socket uses CurveZMQ: encrypted, and authenticated in both directions. All members derive one server key pair from
the cluster key, and its public half is never sent: without the cluster key a connection fails at its first packet. As a
client each process has a key pair of its own, generated at start and never written to disk.

A client's *address* (its ZeroMQ routing id) is made of three parts: the client's public key, a secret nonce, and a MAC
of both under the cluster key. Before decoding a message the engine compares the key with the one that the connection
has proved (ZAP's User-Id) and checks the MAC. Consequences:

- an address proves membership, and is useless with another key;
- an attacker cannot take over a connection by its address, which only the two ends know (ROUTER_HANDOVER is on, so that
  a client whose network has failed can reconnect with the same address);
- an engine's epoch is a hash of its public key: a Grant in the name of an epoch is accepted only from the process with
  that key, without a table of names.

Members are not protected from each other in other ways: docs/security.md lists what a member can do.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from kvist.config import option
from kvist.errors import ConfigError
from kvist.request import EpochId

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by ZeroMQ's RFC 27
ZAP_DOMAIN = b"kvist"
_ZAP_FRAMES = 7  # version, request id, domain, address, identity, mechanism, and one credential (CURVE)
WILDCARD_HOSTS = frozenset({"*", "0.0.0.0", "::"})
_KEY_BYTES, _NONCE_BYTES, _MAC_BYTES = 32, 16, 16
MAKE_A_KEY = "(umask 077; head -c 32 /dev/urandom | base64 > FILE)"
ADDRESS_BYTES = _KEY_BYTES + _NONCE_BYTES + _MAC_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelConfig:
    """The options of all sockets between processes."""

    cluster_key: str | None = option(
        None,
        "secret shared by all gateways and engines of the cluster. Other users can read the command line: prefer "
        "--cluster-key-file or KVIST_CLUSTER_KEY",
        secret=True,
    )
    cluster_key_file: str | None = option(
        None,
        "file with the cluster key, readable by its owner only; by default kvist/cluster.key in your configuration "
        "folder (~/.config), created if missing",
    )
    max_message_bytes: int = option(
        64 << 20, "maximum size of a message on an engine socket", unit="bytes", minimum=1 << 16, maximum=1 << 30
    )
    send_queue_messages: int = option(
        10_000, "maximum number of messages queued for one peer; further sends fail", unit="messages", minimum=16
    )
    max_peers: int = option(
        64, "maximum number of prefill engines that one decode engine stays connected to", minimum=1, maximum=1024
    )


def split_tcp_endpoint(endpoint: str) -> tuple[str, str] | None:
    """Return ("host", "port") of a tcp endpoint, the host without brackets; None for ipc. Raises `ConfigError`."""
    scheme, separator, address = endpoint.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not address:
        raise ConfigError(f"{endpoint!r} is not an engine endpoint; use tcp://HOST:PORT or ipc://PATH")
    if scheme != "tcp":
        return None
    host, separator, port = address.rpartition(":")
    if not separator or not host or not (port == "*" or port.isdigit()):
        raise ConfigError(f"{endpoint!r} is not an engine endpoint; use tcp://HOST:PORT")
    return host.strip("[]"), port


def bracketed(host: str) -> str:
    """Return the host as written before ":PORT" in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def host_to_name(host: str, instead: str) -> str:
    """Return the bracketed host, or `instead` for a wildcard address."""
    return instead if not host or host in WILDCARD_HOSTS else bracketed(host)


def is_loopback(endpoint: str) -> bool:
    """Return whether only this machine can reach the endpoint."""
    address = split_tcp_endpoint(endpoint)
    if address is None or address[0] == "localhost":
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:  # a host name, which may resolve to any address
        return False


class Member:
    """Identity of one process in the cluster. Raises `ConfigError` without a cluster key (cluster_key.py)."""

    def __init__(self, cluster_key: str | None) -> None:
        if not cluster_key:
            raise ConfigError("engine sockets need a cluster key: set --cluster-key-file", param="cluster_key")
        server_secret = z85.encode(_derived(cluster_key, b"kvist-curve"))
        self._server = _KeyPair(public=zmq.curve_public(server_secret), secret=server_secret)
        public, secret = zmq.curve_keypair()
        self._own = _KeyPair(public=public, secret=secret)
        self._mac_key = _derived(cluster_key, b"kvist-member")

    @property
    def epoch(self) -> EpochId:
        """The id of this run of the process."""
        return epoch_of(z85.decode(self._own.public))

    def new_address(self) -> bytes:
        """Return a new address for one client socket."""
        claim = z85.decode(self._own.public) + secrets.token_bytes(_NONCE_BYTES)
        return claim + self._mac(claim)

    def admits(self, address: bytes, proved_key: str) -> bool:
        """Return whether a member with that key (in Z85) created the address."""
        claim = address[:-_MAC_BYTES]
        return (
            len(address) == ADDRESS_BYTES
            and z85.encode(address[:_KEY_BYTES]) == proved_key.encode()
            and hmac.compare_digest(self._mac(claim), address[-_MAC_BYTES:])
        )

    def secure_server(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_secretkey = self._server.secret
        socket.curve_publickey = self._server.public
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer of `KeyGate` the client is refused

    def secure_client(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_secretkey = self._own.secret
        socket.curve_publickey = self._own.public
        socket.curve_serverkey = self._server.public

    def _mac(self, claim: bytes) -> bytes:
        return hashlib.blake2b(claim, key=self._mac_key, digest_size=_MAC_BYTES).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyPair:
    """A CURVE key pair in ZeroMQ's Z85 text form."""

    public: bytes
    secret: bytes = field(repr=False)


def _derived(cluster_key: str, purpose: bytes) -> bytes:
    return hashlib.blake2b(cluster_key.encode(), digest_size=32, person=purpose).digest()


def epoch_of(address: bytes) -> EpochId:
    """Return the epoch of the process with this address (or this key)."""
    return EpochId(hashlib.blake2b(address[:_KEY_BYTES], digest_size=16, person=b"kvist-epoch").hexdigest())


def address_for_log(address: bytes) -> str:
    """Return the first bytes of an address, for logs; the whole address is secret."""
    return address[:4].hex()


class KeyGate:
    """Handler of ZeroMQ's authentication requests (ZAP, RFC 27). Admits any key that CURVE has proved; ZeroMQ then adds
    the key to each message as its User-Id.

    Runs in its owner's loop: poll `socket` and call `answer_waiting`. A client's handshake waits until then."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)

    def answer_waiting(self) -> None:
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(_zap_answer(frames))


def _zap_answer(frames: list[bytes]) -> list[bytes]:
    request_id = frames[1] if len(frames) > 1 else b""
    if len(frames) == _ZAP_FRAMES and (frames[2], frames[5], len(frames[6])) == (ZAP_DOMAIN, b"CURVE", _KEY_BYTES):
        return [b"1.0", request_id, b"200", b"OK", z85.encode(frames[6]), b""]
    return [b"1.0", request_id, b"400", b"not a member", b"", b""]

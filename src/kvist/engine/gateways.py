"""The gateways connected to this engine, their requests, and the time of their last message.

A gateway is added at its first message. A gateway that is silent for `timeout_s`, or cannot be reached any more, is
removed, and its requests are aborted. The entry of a request is removed with its `Ended`, even if its gateway was
removed before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvist.request import RequestId, Role
from kvist.wire import ListPages

MAX_GATEWAYS = 256


@dataclass(slots=True)
class PageReader:
    """How far a gateway has got with the page events. Mutable; owned by its `ConnectedGateway`."""

    next_sequence: int = 0
    wanted: ListPages | None = None  # pieces of the list of all pages that are to be sent


@dataclass(slots=True)
class ConnectedGateway:
    """Mutable; owned by `Gateways`."""

    identity: bytes
    last_contact_s: float
    known_role: Role  # by which the gateway uses this engine
    has_report: bool = False  # a LoadReport was sent
    pages: PageReader | None = None  # None: the gateway has not asked for page events
    request_ids: set[RequestId] = field(default_factory=set)


class Gateways:
    """Mutable; owned by the engine loop."""

    def __init__(self, *, timeout_s: float, role: Role) -> None:
        """`role`: of the engine's spec, by which a new gateway uses the engine."""
        self._timeout_s = timeout_s
        self._role = role
        self._gateways: dict[bytes, ConnectedGateway] = {}
        self._owners: dict[RequestId, bytes] = {}
        self.owner = self._owners.get  # of a request: its gateway's identity, or None; called for each token

    def note_contact(self, identity: bytes, now_s: float) -> ConnectedGateway | None:
        """Record a message of a gateway, new or known. Return None for a new gateway beyond `MAX_GATEWAYS`."""
        gateway = self._gateways.get(identity)
        if gateway is None:
            if len(self._gateways) >= MAX_GATEWAYS:
                return None
            gateway = self._gateways[identity] = ConnectedGateway(identity, now_s, self._role)
        gateway.last_contact_s = now_s
        return gateway

    def add_request(self, gateway: ConnectedGateway, request_id: RequestId) -> bool:
        """Add a request; return False if its id is in use."""
        if request_id in self._owners:
            return False
        self._owners[request_id] = gateway.identity
        gateway.request_ids.add(request_id)
        return True

    def end_request(self, request_id: RequestId) -> None:
        identity = self._owners.pop(request_id, None)
        if identity in self._gateways:
            self._gateways[identity].request_ids.discard(request_id)

    def forget(self, identity: bytes) -> list[RequestId]:
        """Remove a gateway. Return its requests, which must be aborted."""
        gateway = self._gateways.pop(identity, None)
        return sorted(gateway.request_ids) if gateway else []

    def forget_silent(self, now_s: float) -> list[RequestId]:
        """Remove the gateways that are silent. Return their requests, which must be aborted."""
        silent = [gateway.identity for gateway in self if now_s - gateway.last_contact_s > self._timeout_s]
        return [request_id for identity in silent for request_id in self.forget(identity)]

    @property
    def num_requests(self) -> int:
        """The number of requests that have not ended."""
        return len(self._owners)

    def all_requests(self) -> list[tuple[RequestId, bytes]]:
        return list(self._owners.items())

    def __iter__(self) -> Iterator[ConnectedGateway]:
        return iter(list(self._gateways.values()))

    def __len__(self) -> int:
        return len(self._gateways)

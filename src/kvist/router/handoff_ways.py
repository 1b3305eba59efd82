"""Chooses the way of the handoffs between two workers: directly, or through a store that both use. Pure.

wanted    tried in this order
auto      direct, store
direct    direct
store     store, direct
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from kvist.plan.compat import TransportChoice
from kvist.router.config import HANDOFFS
from kvist.wire import LoadReport, StorageStatus


class Member(Protocol):
    """The part of a worker that the choice depends on."""

    @property
    def worker_id(self) -> str: ...
    @property
    def load(self) -> LoadReport | None:
        """The newest report."""


class Way(enum.Enum):
    DIRECT = "direct"  # prefill writes the pages into the pool of decode
    STORE = "store"  # prefill stores the pages, and decode fetches them


class WayCause(enum.Enum):
    """Why a way was chosen, as the label of a metric. `HandoffWay.reason` has the details."""

    WANTED = "wanted"  # --handoff names it
    TRANSPORT = "transport"  # the two workers have a transport in common
    NO_TRANSPORT = "no_transport"  # they have none
    NO_STORE = "no_store"  # --handoff names the store, but the two workers have none in common


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffWay:
    way: Way | None  # None: no way is left
    cause: WayCause
    reason: str  # a text to be read


def choose_way(wanted: str, prefill: Member, decode: Member, transport: TransportChoice) -> HandoffWay:
    """Return the way of the handoffs from `prefill` to `decode`. `wanted` is one of `HANDOFFS`, `transport` the
    transport that the two have in common, if any."""
    assert wanted in HANDOFFS
    cause = {"auto": WayCause.TRANSPORT, "direct": WayCause.WANTED, "store": WayCause.NO_STORE}[wanted]
    if transport.name is not None and wanted != "store":
        return HandoffWay(way=Way.DIRECT, cause=cause, reason=transport.reason)
    if wanted == "direct" or not transport.compatible:
        return HandoffWay(way=None, cause=WayCause.NO_TRANSPORT, reason=transport.reason)
    no_store = _why_no_store(prefill, decode)
    if no_store is None:
        where = f"both workers use the store {_storage(decode).location}"
        if wanted == "store":
            return HandoffWay(way=Way.STORE, cause=WayCause.WANTED, reason=where)
        return HandoffWay(way=Way.STORE, cause=WayCause.NO_TRANSPORT, reason=f"{where}; {transport.reason}")
    reason = f"{transport.reason}; {no_store}"
    if transport.name is not None:
        return HandoffWay(way=Way.DIRECT, cause=cause, reason=reason)
    return HandoffWay(way=None, cause=WayCause.NO_TRANSPORT, reason=reason)


def _why_no_store(prefill: Member, decode: Member) -> str | None:
    """Return why pages cannot travel through a store; None if they can."""
    for worker in (prefill, decode):
        storage = None if worker.load is None else worker.load.storage
        if storage is None or storage.state != "attached":
            return f"worker {worker.worker_id} has no store (--hicache-storage-backend)"
        if storage.breaker == "open":
            return f"the store of worker {worker.worker_id} does not answer"
    one, other = _storage(prefill).location, _storage(decode).location
    if one != other:
        return f"worker {prefill.worker_id} uses the store {one}, worker {decode.worker_id} {other}"
    return None


def _storage(worker: Member) -> StorageStatus:
    assert worker.load is not None
    assert worker.load.storage is not None
    return worker.load.storage

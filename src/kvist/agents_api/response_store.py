"""Keeps responses of /v1/responses, so that later requests can read and continue them.

The store is bounded in number, bytes and time. Each API key sees only its own responses, and when the store is full,
the oldest response of the key with the most bytes is dropped. A response holds the turns before it: a conversation can
be continued even when its earlier responses were deleted, and turns that several responses share are counted once.

The store is memory of one gateway: it outlives every worker, and ends with the gateway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric

from kvist.agents_api.config import AgentApiOptions
from kvist.clock import Clock
from kvist.errors import UnknownResponse

_OVERHEAD_BYTES = 1024  # of Python objects and keys, for each response


@dataclass(slots=True, kw_only=True, eq=False)
class Turn:
    """The input and the output of one response. `num_holders` belongs to the store, all else is frozen."""

    before: Turn | None
    input_items: bytes  # JSON list
    response: bytes  # JSON object
    num_holders: int = 0  # the stored response of this turn, and the turns after it

    @property
    def num_bytes(self) -> int:
        return len(self.input_items) + len(self.response) + _OVERHEAD_BYTES

    def conversation(self) -> list[Turn]:
        """Return the turns up to this one, the first one first."""
        found: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            found.append(turn)
            turn = turn.before
        return found[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    turn: Turn
    end_s: float  # on the clock of the store


@dataclass(slots=True, eq=False)
class _Shelf:
    """The responses of one API key, by id, the oldest first."""

    responses: dict[str, _Stored] = field(default_factory=dict)
    num_bytes: int = 0


class ResponseStore:
    """Mutable; called from any thread."""

    def __init__(self, options: AgentApiOptions, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        self._shelves: dict[str, _Shelf] = {}  # by API key
        self.num_responses = 0
        self.num_bytes = 0

    def families(self) -> Iterator[Metric]:
        """Yield the metrics of the store."""
        yield from store_families(self.num_responses, self.num_bytes)

    def put(self, owner: str, response_id: str, turn: Turn) -> None:
        """Keep a response; `owner` names its API key."""
        with self._lock:
            shelf = self._shelves.setdefault(owner, _Shelf())
            shelf.responses[response_id] = _Stored(
                turn=turn, end_s=self._clock.now_s() + self._options.stored_response_ttl_s
            )
            self.num_responses += 1
            self._hold(shelf, turn)
            self._drop_expired()
            while (
                self.num_responses > self._options.max_stored_responses
                or self.num_bytes > self._options.max_stored_response_bytes
            ):
                fullest = max(self._shelves.values(), key=lambda each: each.num_bytes)
                self._drop(fullest, next(iter(fullest.responses)))

    def get(self, owner: str, response_id: str) -> Turn:
        """Raises `UnknownResponse`, also for a response of another API key."""
        with self._lock:
            self._drop_expired()
            shelf = self._shelves.get(owner)
            stored = None if shelf is None else shelf.responses.get(response_id)
            if stored is None:
                raise unknown_response(response_id)
            return stored.turn

    def delete(self, owner: str, response_id: str) -> None:
        """Raises `UnknownResponse`."""
        self.get(owner, response_id)
        with self._lock:
            shelf = self._shelves.get(owner)
            if shelf is not None and response_id in shelf.responses:
                self._drop(shelf, response_id)

    def _hold(self, shelf: _Shelf, turn: Turn) -> None:
        """Count a holder of the turn. A turn that nothing held before holds the turn before it."""
        for each in _until(turn, lambda one: one.num_holders > 0):
            each.num_holders += 1
            if each.num_holders == 1:
                self._count(shelf, each.num_bytes)

    def _drop(self, shelf: _Shelf, response_id: str) -> None:
        stored = shelf.responses.pop(response_id)
        self.num_responses -= 1
        for each in _until(stored.turn, lambda one: one.num_holders > 1):
            each.num_holders -= 1
            if each.num_holders == 0:
                self._count(shelf, -each.num_bytes)
        if not shelf.responses:
            self._shelves = {owner: one for owner, one in self._shelves.items() if one is not shelf}

    def _count(self, shelf: _Shelf, num_bytes: int) -> None:
        shelf.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _drop_expired(self) -> None:
        now_s = self._clock.now_s()
        for shelf in list(self._shelves.values()):
            while shelf.responses:
                oldest = next(iter(shelf.responses))
                if shelf.responses[oldest].end_s > now_s:
                    break
                self._drop(shelf, oldest)


def _until(turn: Turn, is_last: Callable[[Turn], bool]) -> Iterator[Turn]:
    """Yield the turn and the turns before it, up to the first one for which `is_last` holds."""
    each: Turn | None = turn
    while each is not None:
        last, before = is_last(each), each.before
        yield each
        each = None if last else before


def store_families(num_responses: int, num_bytes: int) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "kvist:stored_responses", "responses kept for previous_response_id, of --max-stored-responses", num_responses
    )
    yield GaugeMetricFamily(
        "kvist:stored_response_bytes",
        "bytes of the responses kept for previous_response_id, of --max-stored-response-bytes",
        num_bytes,
    )


def unknown_response(response_id: str) -> UnknownResponse:
    return UnknownResponse(
        f"no response {response_id[:64]!r} is stored here: it was not stored, was deleted, has expired "
        "(--stored-response-ttl-s) or was dropped (--max-stored-responses, --max-stored-response-bytes); send the "
        "whole conversation as `input`"
    )

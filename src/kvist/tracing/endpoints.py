"""GET /requests and GET /requests/ID.

limit     most requests to list, 1 to 1000
order     recent: those under way first, then the newest; slowest: those with the longest duration
status    running, finished, failed or aborted; several with commas between them
"""

from __future__ import annotations

import heapq
from itertools import islice

from starlette.types import Receive, Scope, Send

from kvist.errors import RequestError, RequestNotFound
from kvist.flight.records import Status
from kvist.http.asgi import query_of, send_json
from kvist.server.gateway import GatewayContext
from kvist.server.operations import require_operator

_FIELDS = ("limit", "order", "status")
_ORDERS = ("recent", "slowest")
_MOST_LISTED, _USUALLY_LISTED = 1000, 100
_MAX_SHOWN_CHARS = 64


class Requests:
    """Each public method is one endpoint, raw ASGI. The records name other clients' requests: without API keys, only
    clients on this host may read them."""

    def __init__(self, gateway: GatewayContext) -> None:
        self._gateway = gateway

    async def all(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        require_operator(self._gateway.config, scope)
        asked = query_of(scope, *_FIELDS)
        limit, order, statuses = _limit(asked.get("limit")), _order(asked.get("order")), _statuses(asked.get("status"))
        records = (each for each in self._gateway.flights.records() if each.status in statuses)
        if order == "slowest":
            found = heapq.nlargest(limit, records, key=lambda record: record.duration_s)
        else:
            found = list(islice(records, limit))
        await send_json(send, {"requests": found})

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        require_operator(self._gateway.config, scope)
        name = scope["path_params"]["request"]
        record = self._gateway.flights.find(name)
        if record is None:
            raise RequestNotFound(
                f"there is no record of a request {name[:_MAX_SHOWN_CHARS]!r}: its id is the x-request-id of the "
                "response, and this server keeps only the newest requests (--request-log-size)"
            )
        await send_json(send, record)


def _limit(given: str | None) -> int:
    if given is None:
        return _USUALLY_LISTED
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:9]) <= _MOST_LISTED):
        raise RequestError(f"`limit` is {given[:_MAX_SHOWN_CHARS]!r}; it must be 1 to {_MOST_LISTED}", param="limit")
    return int(given)


def _order(given: str | None) -> str:
    if given is not None and given not in _ORDERS:
        raise RequestError(f"`order` is {given[:_MAX_SHOWN_CHARS]!r}; use {' or '.join(_ORDERS)}", param="order")
    return given or _ORDERS[0]


def _statuses(given: str | None) -> frozenset[Status]:
    if given is None:
        return frozenset(Status)
    known = {status.value: status for status in Status}
    names = given.split(",", len(known))
    if not all(name in known for name in names):
        shown, allowed = given[:_MAX_SHOWN_CHARS], ", ".join(known)
        raise RequestError(f"`status` is {shown!r}; use {allowed}, or several with commas between them", param="status")
    return frozenset(known[name] for name in names)

"""The dashboard: what the server and its workers do now, and where the time of requests went.

windows.py and recorder.py keep the last minutes of the counters of /metrics; cluster_state.py and snapshot.py give
them their form; feed.py reads them once a second for all viewers. The page is static/: modules without a build step,
which need no other server. The page may be read by everybody, its figures only with an API key, if the server has one.

GET /dashboard              the page
GET /dashboard/snapshot     the figures now, with the last ?points= of each chart
GET /dashboard/events       server-sent events: first the figures with the whole history, then new figures once a second
"""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import Receive, Scope, Send

from kvist import __version__
from kvist.clock import unix_time_ns
from kvist.dashboard.feed import UNREAD_S, Feed
from kvist.dashboard.recorder import MAX_POINTS, Reading, Recorder
from kvist.dashboard.snapshot import Server
from kvist.dashboard.static_files import PAGE, StaticFiles
from kvist.errors import RequestError
from kvist.http.asgi import JSON_TYPE, ClientDisconnected, cancel_on_disconnect, query_of, send_bytes
from kvist.server.app import MountedApi
from kvist.server.gateway import GatewayContext

_POINTS = 60  # of a snapshot, without ?points=
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise buffer events
]


def dashboard_api(gateway: GatewayContext) -> MountedApi:
    files, feed = StaticFiles(), Feed(Recorder(gateway.metrics), lambda: _reading(gateway))

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        await files.send(PAGE, scope, send)

    async def static(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        await files.send(scope["path_params"]["name"], scope, send)

    async def snapshot(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        found = feed.snapshot(_num_points(scope))
        await send_bytes(send, msgspec.json.encode(found), headers=[JSON_TYPE, (b"cache-control", b"no-store")])

    async def events(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send_bytes(send, b"", headers=_EVENT_HEADERS)
            return
        with feed.viewer():
            async with cancel_on_disconnect(receive):
                await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
                try:
                    async for event in feed.events():
                        async with asyncio.timeout(UNREAD_S):
                            await send({"type": "http.response.body", "body": event, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                except TimeoutError:  # the client reads nothing
                    raise ClientDisconnected from None

    return MountedApi(
        routes=(
            ("/dashboard", page, ("GET",)),
            ("/dashboard/static/{name}", static, ("GET",)),
            ("/dashboard/snapshot", snapshot, ("GET",)),
            ("/dashboard/events", events, ("GET",)),
        ),
        paths_without_key=["/dashboard", *(f"/dashboard/static/{name}" for name in files.names)],
        polled=["/dashboard/snapshot", "/requests"],
        background=[feed.run],
    )


def _reading(gateway: GatewayContext) -> Reading:
    cluster = gateway.dispatcher.snapshot()
    return Reading(
        now_s=gateway.clock.now_s(),
        unix_s=unix_time_ns() / 1e9,
        server=Server(
            version=__version__,
            model=gateway.model_name,
            instance_id=gateway.instance_id,
            role="router" if gateway.own_role is None else gateway.own_role.value,
            ready=gateway.ready(),
            draining=gateway.lifecycle.stopping,
            num_open_requests=gateway.lifecycle.num_open,
            policy=cluster.policy,
        ),
        cluster=cluster,
        metrics=gateway.metrics,
    )


def _num_points(scope: Scope) -> int:
    """Return ?points= of the request."""
    value = query_of(scope, "points").get("points", str(_POINTS))
    if not value.isascii() or not value.isdigit() or len(value) > 4 or int(value) > MAX_POINTS:
        raise RequestError(f"`points` is {value[:64]!r}; use 0 to {MAX_POINTS}", param="points")
    return int(value)

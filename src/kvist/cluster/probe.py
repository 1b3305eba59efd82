"""Asks a process over HTTP whether it is ready."""

from __future__ import annotations

import httpx

from kvist.cluster.processes import ALIVE, NO_ANSWER, READY, Answer

PROBE_TIMEOUT_S = 1.0
_NOT_READY = "not ready: "  # server/admin.py; what follows is what it does


def is_ready(url: str) -> bool:
    """True when `GET /ready` answers 200. Never raises, never takes longer than a second or so."""
    try:
        return httpx.get(f"{url}/ready", timeout=PROBE_TIMEOUT_S, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def probe_child(url: str, instance_id: str) -> Answer:
    """How the server that was started with this instance id answers. Never raises, never takes longer than a second or
    so. That another server is ready says nothing."""
    try:
        response = httpx.get(f"{url}/ready", timeout=PROBE_TIMEOUT_S, trust_env=False)
        body = response.json()
        if response.status_code == httpx.codes.OK:
            return READY if body.get("instance_id") == instance_id else NO_ANSWER
        message = body["error"]["message"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
        return NO_ANSWER
    doing = message.removeprefix(_NOT_READY) if message.startswith(_NOT_READY) else ""
    return Answer(alive=True, doing=doing) if doing else ALIVE

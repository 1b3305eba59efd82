"""Probes a child process over HTTP: whether it answers, and whether it is ready."""

from __future__ import annotations

import httpx

from kvist.cluster.processes import ALIVE, NO_ANSWER, READY, Answer

PROBE_TIMEOUT_S = 1.0
_NOT_READY = "not ready: "  # from server/admin.py; the current activity follows


def probe_child(url: str, instance_id: str) -> Answer:
    """Return the answer of the server with this instance id; another server on the port counts as no answer. Never
    raises; takes about one second at most."""
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

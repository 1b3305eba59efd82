"""Announces that a server is ready, with an example request; until then, logs which workers are missing."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kvist.request import Role
from kvist.router.stream import ClusterSnapshot

CHECK_INTERVAL_S = 0.2
REPORT_INTERVAL_S = 5.0
MAX_NAMED = 8
_QUESTION = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'

logger = logging.getLogger(__name__)


class Readiness(Protocol):
    """The state of the workers, as the dispatcher knows it (router/dispatch.py)."""

    def ready(self) -> bool: ...

    def snapshot(self) -> ClusterSnapshot: ...


def curl_example(url: str, *, api_key: str | None = None, key_file: Path | None = None) -> str:
    """Return an example request: one line to paste into a shell, which reads the key from its file, if it has one."""
    key = "" if api_key is None else f" -H 'Authorization: Bearer {api_key}'"
    if key_file is not None:
        key = f' -H "Authorization: Bearer $(cat {key_file})"'
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{_QUESTION}'"


def router_example(url: str, role: Role) -> str:
    """Return the command of a router for a prefill or decode worker."""
    urls = {Role.PREFILL: "PREFILL_URL", Role.DECODE: "DECODE_URL", role: url}
    return f"kvist router --prefill {urls[Role.PREFILL]} --decode {urls[Role.DECODE]}"


def shown_key(api_keys: Sequence[str]) -> str | None:
    """Return the API key to print in an example: the key itself on a terminal only, elsewhere a placeholder."""
    if not api_keys:
        return None
    return api_keys[0] if sys.stdout.isatty() else "YOUR_KEY"


def waiting_for(snapshot: ClusterSnapshot) -> str:
    """Return the workers that are not ready, each with its reason."""
    if not snapshot.workers:
        return "workers to join (kvist serve --router URL, or POST /workers)"
    missing = [f"{each.worker_id} ({each.problem or each.state})" for each in snapshot.workers if not each.alive]
    if len(missing) > MAX_NAMED:
        missing[MAX_NAMED:] = [f"{len(missing) - MAX_NAMED} more"]
    return "; ".join(missing) or "a worker of the other role"


async def announce(readiness: Readiness, on_ready: Callable[[], None], *, reports_waiting: bool = True) -> None:
    """Call `on_ready` when the server is ready for the first time, until cancelled.

    Log when readiness is lost and regained and, with `reports_waiting`, which workers are missing."""
    loop = asyncio.get_running_loop()
    was_ready, was_announced, last_reported, next_report_s = False, False, "", loop.time() + REPORT_INTERVAL_S
    while True:
        ready = readiness.ready()
        if ready and not was_announced:
            was_announced = True
            on_ready()
        elif ready and not was_ready:
            logger.info("ready again")
        elif was_ready and not ready:
            logger.warning("no longer ready: %s", waiting_for(readiness.snapshot()))
        elif reports_waiting and not ready and loop.time() >= next_report_s:
            next_report_s = loop.time() + REPORT_INTERVAL_S
            if (text := waiting_for(readiness.snapshot())) != last_reported:
                last_reported = text
                logger.info("waiting for %s", text)
        was_ready = ready
        await asyncio.sleep(CHECK_INTERVAL_S)

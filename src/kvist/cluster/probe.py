"""Asks a process over HTTP whether it is ready, and waits for a cluster with something to look at meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from kvist.clock import MonotonicClock
from kvist.cluster.processes import Answer, Child, ChildState, Processes

PROBE_TIMEOUT_S = 1.0
REPORT_INTERVAL_S = 2.0
LONGEST_PROGRESS_CHARS = 40


def is_ready(url: str) -> bool:
    """True when `GET /ready` answers 200. Never raises, never takes longer than a second or so."""
    try:
        return httpx.get(f"{url}/ready", timeout=PROBE_TIMEOUT_S, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def ask(url: str, instance_id: str) -> Answer:
    """How the server that was started with this instance id answers. Never raises, never takes longer than a second or
    so. That another server is ready says nothing."""
    try:
        response = httpx.get(f"{url}/ready", timeout=PROBE_TIMEOUT_S, trust_env=False)
        if response.status_code != httpx.codes.OK:
            return Answer.ALIVE
        return Answer.READY if response.json().get("instance_id") == instance_id else Answer.NONE
    except (httpx.HTTPError, ValueError, AttributeError):
        return Answer.NONE


class StartReport:
    """Prints who is ready and what the others say they are doing: on every change, and every few seconds."""

    def __init__(self, processes: Processes, say: Callable[[str], None]) -> None:
        self._processes = processes
        self._clock = MonotonicClock()
        self._say = say
        self._start_s = self._clock.now_s()
        self._last_s = float("-inf")
        self._last_states: dict[str, ChildState] = {}

    def __call__(self) -> None:
        states = {name: child.state for name, child in self._processes.children.items()}
        now_s = self._clock.now_s()
        if states == self._last_states and now_s - self._last_s < REPORT_INTERVAL_S:
            return
        self._last_states, self._last_s = states, now_s
        words = ", ".join(_word(child) for child in self._processes.children.values())
        self._say(f"{now_s - self._start_s:5.1f} s: {words}")


def _word(child: Child) -> str:
    doing = f" ({child.last_lines[-1]})" if child.state is ChildState.STARTING and child.last_lines else ""
    # a progress line ("loading weights 40%") is short; a log line would not fit
    return f"{child.plan.name} {child.state.value}{doing if len(doing) <= LONGEST_PROGRESS_CHARS else ''}"

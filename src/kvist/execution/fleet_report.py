"""Reads the fleet of a Kvist server from its /server_info: roles, rates, queues, pages (`workers[].capacity`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvist.planning.fleet import Fleet, Native, Role, Worker

_HANDOFF_S = 0.01  # until a worker has measured its own
_LEAST_MEASURED_S = 0.05  # of handoffs: less says little
_AFTER_PREFILL = ("last_copy", "verify", "admission")  # the parts of a handoff that do not overlap with its prefill


def fleet_of(info: Any) -> Fleet | None:
    """Return the fleet; None if the answer is not that of a Kvist server."""
    if not isinstance(info, dict) or not isinstance(info.get("workers"), list) or "pairs" not in info:
        return None
    ready = [each for each in info["workers"] if each.get("alive") and isinstance(each.get("capacity"), dict)]
    leasable = [_pages(each, "leasable") * each["capacity"]["page_size"] for each in ready]
    return Fleet(
        workers=_as_measured([_worker(each) for each in ready]),
        native=frozenset(Native),
        page_size=max((each["capacity"]["page_size"] for each in ready), default=16),
        num_lease_tokens=sum(leasable),
    )


def _as_measured(workers: Sequence[Worker]) -> tuple[Worker, ...]:
    """Return the workers; one that decodes computes prompts no faster than those that prefill. Its own rate may be the
    assumed one, since it seldom computes a prompt."""
    fastest = max((one.prefill_tokens_per_s for one in workers if one.role is Role.PREFILL), default=None)
    if fastest is None:
        return tuple(workers)
    return tuple(
        one if one.prefills else replace(one, prefill_tokens_per_s=min(one.prefill_tokens_per_s, fastest))
        for one in workers
    )


def _worker(described: Any) -> Worker:
    capacity, totals = described["capacity"], (described.get("load") or {}).get("totals") or {}
    role, usual = capacity.get("role"), Worker(name="", role=Role.UNIFIED)
    step_ms = capacity.get("decode_step_ms")
    num_handoffs = totals.get("handoffs_received") or 0
    handoff_s = sum(totals.get(f"handoff_{part}_seconds") or 0.0 for part in _AFTER_PREFILL)
    return Worker(
        name=str(described["worker_id"]),
        role=Role(role) if role in set(Role) else Role.UNIFIED,
        prefill_tokens_per_s=capacity.get("prefill_tokens_per_s") or usual.prefill_tokens_per_s,
        decode_tokens_per_s=1000 / step_ms if step_ms else usual.decode_tokens_per_s,
        queue_s=(capacity.get("queue_ms") or 0.0) / 1000,
        num_running=(described.get("load") or {}).get("num_running") or 0,
        max_running=capacity.get("max_running_requests") or usual.max_running,
        num_cache_tokens=_pages(described, "total") * capacity["page_size"],
        max_answer_tokens=capacity.get("max_answer_tokens") or 0,
        handoff_s=handoff_s / num_handoffs if num_handoffs and handoff_s > _LEAST_MEASURED_S else _HANDOFF_S,
    )


def _pages(described: Any, kind: str) -> int:
    pages = (described["capacity"].get("pages") or {}).get("device") or {}
    return int(pages.get(kind) or 0)

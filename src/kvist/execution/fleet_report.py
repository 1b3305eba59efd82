"""Reads the fleet of a Kvist server from its /server_info: roles, measured rates, queues, pages."""

from __future__ import annotations

from typing import Any

from kvist.planning.fleet import Fleet, Native, Role, Worker

# The operations of every Kvist server that reports `pairs`.
_NATIVE = frozenset({Native.SCORE, Native.PREFILL, Native.SESSION})
_PREFILL_TOKENS_PER_S, _DECODE_TOKENS_PER_S, _HANDOFF_S = 4000.0, 25.0, 0.01  # until a worker has measured its own
_LEAST_MEASURED_S = 0.05  # of steps: less says little


def fleet_of(info: Any) -> Fleet | None:
    """Return the fleet; None if the answer is not that of a Kvist server."""
    if not isinstance(info, dict) or not isinstance(info.get("workers"), list) or "pairs" not in info:
        return None
    ready = [each for each in info["workers"] if each.get("alive") and isinstance(each.get("engine"), dict)]
    page_sizes = [each["engine"].get("page_size") or 16 for each in ready]
    return Fleet(workers=tuple(_worker(each) for each in ready), native=_NATIVE, page_size=max(page_sizes, default=16))


def _worker(described: Any) -> Worker:
    engine, load = described["engine"], described.get("load") or {}
    totals = load.get("totals") or {}
    prompt_s = totals.get("prompt_step_seconds") or 0.0
    finished = totals.get("requests_finished") or 0.0
    role = described.get("role")
    return Worker(
        name=str(described["worker_id"]),
        role=Role(role) if role in set(Role) else Role.UNIFIED,
        prefill_tokens_per_s=_rate(totals.get("prompt_step_tokens"), prompt_s, _PREFILL_TOKENS_PER_S),
        decode_tokens_per_s=_rate(totals.get("decode_steps"), totals.get("decode_step_seconds"), _DECODE_TOKENS_PER_S),
        queue_s=(load.get("num_waiting") or 0) * prompt_s / finished if finished else 0.0,
        num_running=load.get("num_running") or 0,
        max_running=engine.get("max_running_requests") or 64,
        num_cache_tokens=(engine.get("num_pages") or 0) * (engine.get("page_size") or 16),
        handoff_s=1 / _rate(totals.get("handoffs_received"), totals.get("handoff_seconds"), 1 / _HANDOFF_S),
    )


def _rate(amount: float | None, seconds: float | None, default: float) -> float:
    """Return the measured rate, or the default before enough was measured."""
    if not amount or not seconds or seconds < _LEAST_MEASURED_S:
        return default
    return amount / seconds

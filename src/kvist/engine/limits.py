"""Replaces "auto" in the scheduler's limits, such as the size of a step, by numbers for the device and the role.

Done once, when an engine is built and its device is known; scheduler, runner and `EngineSpec` then have numbers. Limits
set by the user are kept, and "auto" limits adapt to them, so that a single flag never contradicts a default.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

from kvist.request import Role
from kvist.scheduler.config import SchedulerConfig, SchedulerOptions

_ROUND_TO = 128  # tokens: the tile size of a GPU's matrix products
_SHARED = {each.name for each in fields(SchedulerOptions)} & {each.name for each in fields(SchedulerConfig)}


class _Limits(NamedTuple):
    num_running: int  # requests
    usual: int  # usual tokens of a step
    most: int  # most tokens of a step


# A CPU takes milliseconds for a token, so steps must be small, or the streams in them are slowed down. A GPU's matrix
# products take the same time per token at 512 tokens as at thousands, and steps up to 2048 tokens are replayed as
# graphs; on workers without decode streams, larger steps save fixed costs. Above 1792 tokens the products of an H200
# are 6% slower (docs/log.md). A decode worker computes a prompt beside its streams when that is sooner than waiting for
# prefill, and its streams must not notice: on an H200 256 tokens add
# 6 ms to a step, 512 tokens 12 ms, 2048 tokens 43 ms.
_AUTO = {
    ("cpu", Role.UNIFIED): _Limits(128, 512, 512),
    ("cpu", Role.PREFILL): _Limits(128, 512, 512),
    ("cpu", Role.DECODE): _Limits(128, 512, 512),
    ("cuda", Role.UNIFIED): _Limits(256, 512, 1792),
    ("cuda", Role.PREFILL): _Limits(256, 2048, 2048),
    ("cuda", Role.DECODE): _Limits(256, 256, 512),
}


def resolve_limits(options: SchedulerOptions, *, device: str, role: Role) -> SchedulerConfig:
    """Resolve "auto"; `device` is "cpu" or "cuda". Raises `ConfigError` if limits of the user contradict each other."""
    auto = _AUTO[device, role]
    num_running, chunk, budget = options.max_running_requests, options.chunked_prefill_size, options.max_prefill_tokens
    if num_running is None:
        num_running = auto.num_running if budget is None else min(auto.num_running, budget)
    if budget is None:
        budget = -(-max(auto.most, num_running, chunk or 0) // _ROUND_TO) * _ROUND_TO
    resolved: dict[str, Any] = {
        "max_running_requests": num_running,
        "chunked_prefill_size": min(auto.usual, budget) if chunk is None else chunk,
        "max_prefill_tokens": budget,
        "overlap": device == "cuda" if options.overlap is None else options.overlap,
    }
    kept = {name: getattr(options, name) for name in _SHARED - resolved.keys()}
    return SchedulerConfig(**kept, **resolved)


def usual_step_tokens(options: SchedulerOptions, limits: SchedulerConfig, *, device: str) -> dict[Role, int]:
    """Return the usual tokens of a step in each role that an engine with these limits may be switched to. The largest
    step stays as it is: buffers and graphs were made for it."""
    if options.chunked_prefill_size is not None:
        return dict.fromkeys(Role, limits.chunked_prefill_size)
    return {role: min(_AUTO[device, role].usual, limits.max_prefill_tokens) for role in Role}

"""Replaces "auto" in the scheduler's limits, such as the size of a step, by numbers for the device and the role.

Done once, when an engine is built and its device is known; scheduler, runner and `EngineSpec` then have numbers. Limits
set by the user are kept, and "auto" limits adapt to them, so that a single flag never contradicts a default.
"""

from __future__ import annotations

from typing import NamedTuple

from kvist.request import Role
from kvist.scheduler.config import SchedulerConfig, SchedulerOptions

_ROUND_TO = 128  # tokens: the tile size of a GPU's matrix products


class _Limits(NamedTuple):
    num_running: int  # requests
    usual: int  # usual tokens of a step
    most: int  # most tokens of a step


# A CPU takes milliseconds for a token, so steps must be small, or the streams in them are slowed down. A GPU's matrix
# products take the same time per token at 512 tokens as at thousands, and steps up to 2048 tokens are replayed as
# graphs; on workers without decode streams, larger steps save fixed costs. Above 1792 tokens the products of an H200
# are 6% slower (docs/log.md). A decode worker computes the
# prompts of whole requests in usual steps beside its streams.
_AUTO = {
    ("cpu", Role.UNIFIED): _Limits(128, 512, 512),
    ("cpu", Role.PREFILL): _Limits(128, 512, 512),
    ("cpu", Role.DECODE): _Limits(128, 512, 512),
    ("cuda", Role.UNIFIED): _Limits(256, 512, 1792),
    ("cuda", Role.PREFILL): _Limits(256, 2048, 2048),
    ("cuda", Role.DECODE): _Limits(256, 512, 2048),
}


def resolve_limits(options: SchedulerOptions, *, device: str, role: Role) -> SchedulerConfig:
    """Resolve "auto"; `device` is "cpu" or "cuda". Raises `ConfigError` if limits of the user contradict each other."""
    auto = _AUTO[device, role]
    num_running, chunk, budget = options.max_running_requests, options.chunked_prefill_size, options.max_prefill_tokens
    if num_running is None:
        num_running = auto.num_running if budget is None else min(auto.num_running, budget)
    if budget is None:
        budget = -(-max(auto.most, num_running, chunk or 0) // _ROUND_TO) * _ROUND_TO
    return SchedulerConfig(
        max_running_requests=num_running,
        max_queued_requests=options.max_queued_requests,
        chunked_prefill_size=min(auto.usual, budget) if chunk is None else chunk,
        max_prefill_tokens=budget,
        overlap=device == "cuda" if options.overlap is None else options.overlap,
        queue_timeout_s=options.queue_timeout_s,
        grant_timeout_s=options.grant_timeout_s,
        handoff_timeout_s=options.handoff_timeout_s,
        ack_timeout_s=options.ack_timeout_s,
        max_remembered_handoffs=options.max_remembered_handoffs,
    )

"""Which pages are asked of the storage tier (L3), stored there and fetched from it. Pure: no bytes, no clock."""

from __future__ import annotations

from dataclasses import dataclass

PREFETCH_POLICIES = ("best_effort", "wait_complete", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchConfig:
    """How long a request may wait for its pages to come from the store, and from how many tokens on it does."""

    policy: str = "timeout"  # one of PREFETCH_POLICIES
    base_s: float = 1.0  # `timeout`: the longest wait
    per_1k_s: float = 0.25  # and this much for each 1000 tokens
    threshold_tokens: int = 256  # fewer are computed rather than fetched

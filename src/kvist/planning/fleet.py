"""A cluster as a planner sees it: its workers and their rates, and which native operations its gateway has.

The figures come from /server_info and from the requests so far. A server of another kind is one worker of which little
is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class Native(StrEnum):
    """Operations of a Kvist server that others lack."""

    SCORE = "score"  # all continuations of a prompt in one step
    PREFILL = "prefill"  # compute a prompt without generating
    LEASE = "lease"  # keep a prefix until the lease ends
    SESSION = "session"  # requests with one session id go to one worker where loads are about equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    name: str
    role: Role
    prefill_tokens_per_s: float = 4000.0
    decode_tokens_per_s: float = 25.0  # of one stream
    queue_s: float = 0.0  # until a new request is computed
    num_running: int = 0
    max_running: int = 64
    num_cache_tokens: int = 1 << 17  # of its page pool
    handoff_s: float = 0.01  # from the end of a prefill until decode has the pages
    max_answer_tokens: int = 0  # of a prefill worker: the longest answer that it writes itself, without a handoff

    @property
    def prefills(self) -> bool:
        return self.role is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self.role is not Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    workers: tuple[Worker, ...]
    native: frozenset[Native] = frozenset()
    page_size: int = 16  # tokens
    num_lease_tokens: int = 0  # that this client may still pin
    chars_per_token: float = 4.0  # measured, since only the server has the tokenizer
    answer_fraction: float = 0.5  # of max_tokens that an answer has, measured

    def num_tokens(self, num_chars: int) -> int:
        return round(num_chars / self.chars_per_token)

    @property
    def separates(self) -> bool:
        """Whether prefill and decode are apart."""
        return any(not worker.decodes for worker in self.workers)

    def measured(self, *, chars_per_token: float, answer_fraction: float) -> Fleet:
        return replace(self, chars_per_token=chars_per_token, answer_fraction=answer_fraction)

    def after(self, seconds: float) -> Fleet:
        """Return the fleet as expected that long after its report: its queues are shorter then."""
        workers = tuple(
            replace(one, queue_s=max(one.queue_s - seconds, 0.0)) if one.queue_s else one for one in self.workers
        )
        return replace(self, workers=workers)


def unknown_fleet(name: str) -> Fleet:
    """Return the fleet of a server that says nothing of itself."""
    return Fleet(workers=(Worker(name=name, role=Role.UNIFIED),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The requests and prefixes that are out already."""

    num_in_flight: int = 0
    width: int = 64  # requests that may be out at once
    cached: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by worker: sorted outlines it has computed
    warmed: frozenset[str] = frozenset()  # outlines of the prefixes that were computed ahead, or are being computed
    pinned: frozenset[str] = frozenset()  # outlines under a lease
    num_pinned_tokens: int = 0

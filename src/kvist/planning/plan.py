"""A plan: what to do with each operation, and what to compute and keep ahead of need. The planner's output, a value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvist.planning.prompt import Prompt


class Work(StrEnum):
    """The parts of the cluster that an operation needs."""

    PREFILL = "prefill"  # the prompt alone
    DECODE = "decode"  # prompt and answer on the worker that decodes
    SPLIT = "prefill, decode"  # the prompt on one worker, the answer on another
    CLIENT = "client"  # no request


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and when an operation is expected to run. Times are predictions, in milliseconds since the plan."""

    operation_id: int
    work: Work
    prefill_worker: str | None = None
    decode_worker: str | None = None
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    start_ms: float = 0.0
    duration_ms: float = 0.0
    reason: str = ""
    session: str = ""  # requests with one session are best served by one worker
    after_warm: str | None = None  # outline of the prefix that must be computed first; None: the server sees to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """A prefix to compute ahead of need."""

    prompt: Prompt
    worker: str | None
    num_tokens: int
    users: tuple[int, ...]  # operation ids
    after_warm: str | None  # outline of the shorter prefix that must be computed first
    duration_ms: float
    reason: str
    is_awaited: bool = False  # its users are sent after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A prefix to keep cached until its last use was sent."""

    prompt: Prompt
    worker: str | None
    num_tokens: int
    until: tuple[int, ...]  # operation ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    placements: tuple[Placement, ...]  # in the order in which requests are sent
    warm: tuple[Warm, ...] = ()
    pin: tuple[Pin, ...] = ()
    width: int = 1  # requests that may be out at once
    notes: tuple[str, ...] = ()  # what the server lacks, and what takes its place

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(placement.operation_id for placement in self.placements)

    def placement(self, operation_id: int) -> Placement | None:
        return next((each for each in self.placements if each.operation_id == operation_id), None)

    @property
    def duration_ms(self) -> float:
        return max((each.start_ms + each.duration_ms for each in self.placements), default=0.0)

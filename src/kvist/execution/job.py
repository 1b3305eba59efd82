"""Requests as programs give them to the executor, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.execution.choices import ChoicesMethod
from kvist.execution.results import Result
from kvist.execution.sampling import Sampling
from kvist.planning.graph import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request of a program. Its prompt may have holes. `sampling` is complete, with the seed of the state."""

    operation: Request
    result: Result
    sampling: Sampling
    form: str = ""
    form_source: str = ""
    form_argument: str = ""  # the argument of the program that gives the form, for errors
    defaults: frozenset[str] = frozenset()  # the parts of `sampling` that the generation itself does not give
    method: ChoicesMethod = ChoicesMethod.TOKEN_LENGTH_NORMALIZED  # of a Score
    streams: bool = False  # somebody may read the pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    planned: bool = True
    width: int | None = None  # most requests at once; None: as many as the cluster takes
    request_timeout_s: float = 600.0  # of one operation, with all its attempts
    max_attempts: int = 5  # of a request that fails; one that is refused as too much is sent until its timeout
    gather_s: float = 0.01  # a running program may add requests during this time before the plan is made
    lease_ttl_s: float = 30.0
    fleet_interval_s: float = 1.0

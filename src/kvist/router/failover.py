"""Decides whether a stream whose worker failed goes on elsewhere. PURE.

A stream is a function of (prompt, parameters, seed, position), so any worker can go on with it. Two limits apply. A
stream waits for at most `migration_timeout_s` until a worker takes it. After `migration_limit` failures in a row it
ends: if every worker that computes a request dies, the request may be the cause, and must not end the whole fleet. The
row is broken when an attempt adds `PROGRESS_TOKENS` tokens, since a stream that comes to a deadly position dies there
again and again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.errors import KvistError, Overloaded, PoisonousRequest, Timeout, WorkerLost
from kvist.router.registry import Worker

PROGRESS_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class Trouble:
    """The failures of one stream. Mutable; owned by its stream."""

    num_failovers: int = 0  # attempts after the first one
    num_in_a_row: int = 0
    num_deaths_in_a_row: int = 0
    error: KvistError | None = None  # the last one
    since_s: float | None = None  # of the pause that the client sees; None while tokens arrive
    wait_until_s: float = 0.0
    avoided: list[frozenset[Worker]] = field(default_factory=list)  # each excluded from one search, in this order

    def on_progress(self, num_tokens: int) -> None:
        """Handle tokens of an attempt; `num_tokens`: all of it so far."""
        if num_tokens >= PROGRESS_TOKENS and self.num_in_a_row:
            self.num_in_a_row = self.num_deaths_in_a_row = 0
            self.avoided = []


def final_error(
    trouble: Trouble, error: KvistError, *, has_begun: bool, has_run: bool, limit: int
) -> KvistError | None:
    """Record a failure. Return the error that ends the stream; None if the stream may go on.

    `has_begun`: a token has arrived. `has_run`: the worker may have computed something, so that the request may be the
    cause. `limit`: `--migration-limit`."""
    trouble.error = error
    if not error.retryable or not limit:
        return error
    if not may_wait(error, has_begun=has_begun):
        return None if trouble.since_s is None else error  # tried elsewhere once
    if not has_run:
        return None
    trouble.num_in_a_row += 1
    trouble.num_deaths_in_a_row = trouble.num_deaths_in_a_row + 1 if isinstance(error, WorkerLost) else 0
    if trouble.num_in_a_row <= limit:
        return None
    if trouble.num_deaths_in_a_row < trouble.num_in_a_row:
        return error
    return PoisonousRequest(
        f"{trouble.num_deaths_in_a_row} workers in a row were lost while they had this request, the last one because: "
        f"{error.message}. The request may be the cause, so no further worker gets it (--migration-limit)"
    )


def may_wait(error: KvistError, *, has_begun: bool) -> bool:
    """Return whether the stream may wait for a worker. The client of a new request learns at once of full queues."""
    return has_begun or not isinstance(error, Overloaded | Timeout)


def error_after_wait(trouble: Trouble, reason: str, *, waited_s: float, retry_after_s: float) -> KvistError:
    """Return the error of a stream that no worker could take. `reason`: why, a text to be read."""
    assert trouble.error is not None
    within = f"no other worker could go on within {waited_s:g} s (--migration-timeout-s): {reason}"
    return type(trouble.error)(f"{trouble.error.message}; {within}", retry_after_s=retry_after_s)

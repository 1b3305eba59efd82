"""Rank 0's runner of a tensor-parallel engine: runs its own part of each step and sends the batch to the other ranks.

Every rank has the same kind of runner and gets the same batches. All ranks sample the same tokens, because they use the
same logits and the same rules, and each continues from its own tokens: a follower sends no answer and never waits for
rank 0's host. `launch` sends the batch to the followers first, then launches it on rank 0.

Collectives wait for every rank. Rank 0 therefore polls instead of blocking, and checks the followers meanwhile. A rank
that has ended, a step that fails only at rank 0 or a step over the time limit leaves the ranks out of step for good:
`EngineError`, and the engine must be restarted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from kvist.clock import Clock, MonotonicClock
from kvist.errors import EngineError
from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens
from kvist.runner.batch_message import BatchEncoder
from kvist.runner.runner import AnyRunner, InFlight
from kvist.runner.tp import COLLECTIVE_TIMEOUT_S

_POLL_S = 20e-6  # the system sleeps about 70 us; the scheduler plans one step ahead, so no time is lost


class Followers(Protocol):
    """tp.FollowerProcesses, or a fake."""

    def send(self, payload: bytes) -> None: ...

    def check_alive(self) -> None: ...

    def close(self, *, kill: bool = False) -> None: ...


class LeadingRunner:
    """Owns the runner of rank 0's share and the follower processes."""

    def __init__(self, runner: AnyRunner, followers: Followers, clock: Clock | None = None) -> None:
        self.pool = runner.pool
        self.pool_reason = runner.pool_reason
        self.attention_name = runner.attention_name
        self._runner = runner
        self._followers = followers
        self._clock = clock or MonotonicClock()
        self._encoder = BatchEncoder()
        self._last: WatchedBatch | None = None  # the batch launched last
        self._is_in_step = True

    def launch(self, batch: Batch) -> InFlight:
        with self.in_step():
            self._followers.send(self._encoder.encode(batch))
            self._last = WatchedBatch(self._runner.launch(batch), self)
        return self._last

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Guard a step: after any exception inside, the ranks are out of step for good."""
        if not self._is_in_step:
            raise EngineError("the tensor-parallel ranks are out of step. Restart the worker")
        try:
            yield
        except BaseException as error:
            self._is_in_step = False
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            self._followers.check_alive()  # raises with a more precise reason
            raise EngineError(f"tensor-parallel rank 0 failed in a step: {error}. Restart the worker") from error

    def is_done(self, flight: InFlight) -> bool:
        with self.in_step():
            if flight.is_done():
                return True
            self._followers.check_alive()
            return False

    def wait(self, flight: InFlight) -> None:
        """Wait until the result of `flight` is available. Raises `EngineError` after `COLLECTIVE_TIMEOUT_S`."""
        deadline_s = self._clock.now_s() + COLLECTIVE_TIMEOUT_S
        while not self.is_done(flight):
            with self.in_step():
                if self._clock.now_s() > deadline_s:
                    raise EngineError(
                        f"a tensor-parallel step took more than {COLLECTIVE_TIMEOUT_S:.0f} s. Restart the worker"
                    )
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close the runner and the followers. The time is bounded, unless rank 0's device is stuck."""
        if self._last is not None:
            with contextlib.suppress(EngineError):
                self._last.wait()
        if self._is_in_step:
            self._runner.close()
            self._followers.close()
        else:
            self._followers.close(kill=True)  # aborts collectives that wait for a rank that has ended
            self._runner.close()


class WatchedBatch:
    """A batch in flight on all ranks."""

    def __init__(self, flight: InFlight, leader: LeadingRunner) -> None:
        self._flight = flight
        self._leader = leader

    def is_done(self) -> bool:
        """Return whether the result is available. Raises `EngineError` when the step cannot finish."""
        return self._leader.is_done(self._flight)

    def wait(self) -> None:
        self._leader.wait(self._flight)

    def result(self) -> SampledTokens:
        self.wait()
        with self._leader.in_step():
            return self._flight.result()

"""The runner of rank 0 of a tensor-parallel engine: sends each batch to the other ranks, and runs rank 0's part of it.

Every rank has the same kind of runner and gets the same batches. All ranks sample the same tokens, because they use the
same logits and the same rules, and each continues from its own tokens: a follower sends no answer and never waits for
rank 0's host. `launch` sends the batch to the followers first, then launches it on rank 0.

Collectives wait for every rank. Rank 0 therefore polls instead of blocking, in the thread of engine/step_waiter.py, and
checks the followers meanwhile. If a rank has ended, or a step fails at rank 0 alone or exceeds the time limit, the
ranks can never be in sync again: the error is an `EngineError`, which every later call raises too, and the engine must
be restarted.
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
from kvist.runner.runner import LaunchedBatch, RankRunner
from kvist.runner.tp import COLLECTIVE_TIMEOUT_S

_POLL_S = 100e-6  # with steps planned ahead, this delays tokens and no step; each poll takes the lock of Python


class Followers(Protocol):
    """tp.FollowerProcesses, or a fake."""

    def send(self, payload: bytes) -> None: ...

    def check_alive(self) -> None: ...

    def close(self, *, kill: bool = False) -> None: ...


class LeadingRunner:
    """Owns the runner of rank 0 and the follower processes."""

    def __init__(self, runner: RankRunner, followers: Followers, clock: Clock | None = None) -> None:
        self.pool = runner.pool
        self.pool_reason = runner.pool_reason
        self.attention_name = runner.attention_name
        self._runner = runner
        self._followers = followers
        self._clock = clock or MonotonicClock()
        self._encoder = BatchEncoder()
        self._before_last: WatchedBatch | None = None
        self._last: WatchedBatch | None = None  # the batch launched last
        self._failure: EngineError | None = None  # the first: the ranks are not in sync any more

    def launch(self, batch: Batch) -> LaunchedBatch:
        with self.keep_in_sync():
            self._followers.send(self._encoder.encode(batch))
            launched = WatchedBatch(self._runner.launch(batch), self)
        self._before_last, self._last = self._last, launched
        return launched

    def _settle(self) -> None:
        """Let the newest batch choose its tokens, if it waits for the batch before."""
        if self._before_last is not None:
            self._before_last.wait()
            with self.keep_in_sync():
                self._runner.settle()

    @contextlib.contextmanager
    def keep_in_sync(self) -> Iterator[None]:
        """Guard a part of a step: after an exception inside, the ranks can never be in sync again."""
        if self._failure is not None:
            raise EngineError(self._failure.message) from self._failure
        try:
            yield
        except BaseException as error:
            failure = self._failure = self._failure or self._describe(error)
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            raise failure from error

    def _describe(self, error: BaseException) -> EngineError:
        if isinstance(error, EngineError):
            return error
        try:
            self._followers.check_alive()
        except EngineError as reason:  # more precise
            return reason
        return EngineError(f"tensor-parallel rank 0 failed in a step: {error}. Restart the worker")

    def is_done(self, launched: LaunchedBatch) -> bool:
        with self.keep_in_sync():
            if launched.is_done():
                return True
            self._followers.check_alive()
            return False

    def wait(self, launched: LaunchedBatch) -> None:
        """Wait until the result of `launched` is available. Raises `EngineError` after `COLLECTIVE_TIMEOUT_S`."""
        deadline_s = self._clock.now_s() + COLLECTIVE_TIMEOUT_S
        while not self.is_done(launched):
            with self.keep_in_sync():
                if self._clock.now_s() > deadline_s:
                    raise EngineError(
                        f"a tensor-parallel step took more than {COLLECTIVE_TIMEOUT_S:.0f} s. Restart the worker"
                    )
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close the runner and the followers. Takes a bounded time, unless the device of rank 0 is stuck."""
        if self._last is not None:
            with contextlib.suppress(EngineError):
                self._settle()
                self._last.wait()
        if self._failure is None:
            self._runner.close()
            self._followers.close()
        else:
            self._followers.close(kill=True)  # aborts collectives that wait for a rank that has ended
            self._runner.close()


class WatchedBatch:
    """A batch in flight on all ranks."""

    def __init__(self, launched: LaunchedBatch, leader: LeadingRunner) -> None:
        self._launched = launched
        self._leader = leader

    def is_done(self) -> bool:
        """Return whether the result is available. Raises `EngineError` when the step cannot finish."""
        return self._leader.is_done(self._launched)

    def wait(self) -> None:
        self._leader.wait(self._launched)

    def result(self) -> SampledTokens:
        self.wait()
        with self._leader.keep_in_sync():
            return self._launched.result()

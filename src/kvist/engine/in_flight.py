"""Steps that were launched and not read yet: at most one, with overlap two. They end in the order of their launches.

    launch(batch) ──► in flight ──► has ended ──► read_if_done() ──► StepFinished | StepFailed

A step that fails fails its requests, and the engine goes on; after `MAX_FAILED_STEPS_IN_A_ROW` the engine ends, since
its device is broken. A request whose own fields exclude every token fails, too, but not its step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvist.engine.step_abort import StepAborted
from kvist.engine.step_times import StepCpuTimes
from kvist.errors import EngineError
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens, StepFailed, StepFinished
from kvist.request import SlotId

MAX_FAILED_STEPS_IN_A_ROW = 8  # the device then counts as broken, and the engine ends

logger = logging.getLogger(__name__)


class LaunchedStep(Protocol):
    """`runner.LaunchedBatch`, or a fake."""

    def is_done(self) -> bool: ...
    def wait(self) -> None: ...
    def result(self) -> SampledTokens: ...


class StepRunner(Protocol):
    """The runner of the engine's device, or a fake."""

    def launch(self, batch: Batch) -> LaunchedStep: ...


@dataclass(frozen=True, slots=True)
class _Step:
    batch: Batch
    launched: LaunchedStep | Exception  # an exception: the launch failed
    restricted_rows: frozenset[int]  # of requests whose own fields may exclude every token


class StepsInFlight:
    """Mutable; owned by the engine loop."""

    def __init__(
        self, runner: StepRunner, watch: Callable[[LaunchedStep], None], times: StepCpuTimes, *, overlap: bool
    ) -> None:
        """`watch` lets the loop be woken when a step has ended (step_waiter.py). `overlap`: a second step is launched
        before the first is read."""
        self._runner = runner
        self._watch = watch
        self._times = times
        self._most = 2 if overlap else 1
        self._steps: deque[_Step] = deque()
        self._restricted: set[SlotId] = set()  # slots of requests whose own fields may exclude every token
        self._oldest_since_s = 0.0  # when the oldest step was launched, or became the oldest
        self._num_failed_in_a_row = 0
        self.num_failed = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_room(self) -> bool:
        """Whether another batch may be launched now."""
        return len(self._steps) < self._most

    def launch(self, batch: Batch, now_s: float) -> None:
        if not self._steps:
            self._oldest_since_s = now_s
        launched: LaunchedStep | Exception
        with self._times.launching():
            try:
                launched = self._runner.launch(batch)
                if not launched.is_done():
                    self._watch(launched)
            except Exception as error:  # reported after the previous batch
                launched = error
        self._restricted.difference_update(batch.ended)
        self._restricted.difference_update(start.slot for start in batch.started)
        self._restricted.update(start.slot for start in batch.started if start.sampling.may_exclude_all)
        self._steps.append(_Step(batch, launched, self._restricted_rows(batch) if self._restricted else frozenset()))

    def _restricted_rows(self, batch: Batch) -> frozenset[int]:
        sampled = (item for item in batch.items if item.samples)
        return frozenset(row for row, item in enumerate(sampled) if item.slot in self._restricted)

    def waited_s(self, now_s: float) -> float:
        """Return for how long the oldest step has been computed; 0 if none is in flight."""
        return now_s - self._oldest_since_s if self._steps else 0.0

    def wait(self) -> None:
        """Wait until the oldest step has ended. Raises `EngineError` if the runner does."""
        launched = self._steps[0].launched
        if not isinstance(launched, Exception):
            try:
                launched.wait()
            except EngineError:
                raise
            except Exception:  # `result` raises it again
                logger.debug("waiting for a step failed", exc_info=True)

    def read_if_done(self, now_s: float) -> list[Event]:
        """Read the oldest step if it has ended. Raises `EngineError` if the runner does, and after
        `MAX_FAILED_STEPS_IN_A_ROW`."""
        if not self._steps or not _is_done(self._steps[0].launched):
            return []
        self._oldest_since_s = now_s
        return [self._read(self._steps.popleft())]

    def _read(self, step: _Step) -> Event:
        batch, launched = step.batch, step.launched
        try:
            with self._times.reading():
                if isinstance(launched, Exception):
                    raise launched
                sampled = launched.result()
        except StepAborted as error:  # no request fails: all of them have ended
            return StepFailed(step_id=batch.step_id, message=str(error))
        except EngineError:  # the runner cannot continue: a tensor-parallel rank has ended
            raise
        except Exception as error:  # any error of the model or device: these requests fail, the engine continues
            logger.exception("step %d with %d tokens failed", batch.step_id, batch.num_tokens)
            self.num_failed += 1
            self._num_failed_in_a_row += 1
            if self._num_failed_in_a_row >= MAX_FAILED_STEPS_IN_A_ROW:
                raise EngineError(
                    f"{self._num_failed_in_a_row} steps in a row failed, the last with: {error}"
                ) from error
            return StepFailed(step_id=batch.step_id, message=f"{type(error).__name__}: {error}")
        self._num_failed_in_a_row = 0
        excluded = sampled.invalid_rows & (step.restricted_rows | sampled.constraint_errors.keys())
        if broken := sampled.invalid_rows - excluded:
            self.num_failed += 1
            logger.error(
                "step %d: %d of its %d requests have no valid token (NaN, or infinity) and fail",
                batch.step_id,
                len(broken),
                len(batch.items),
            )
        if excluded:
            logger.info(
                "step %d: %d of its %d requests end, as their own fields or constraints leave no token",
                batch.step_id,
                len(excluded),
                len(batch.items),
            )
        return StepFinished(step_id=batch.step_id, sampled=sampled)


def _is_done(launched: LaunchedStep | Exception) -> bool:
    if isinstance(launched, Exception):
        return True
    try:
        return launched.is_done()
    except EngineError:
        raise
    except Exception:  # an error of the device, which `result` raises again
        return True

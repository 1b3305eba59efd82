"""The real store mover with threads that the test steps, and a store with faults: a state machine can stop any thread
between two pages, and between a call and its report, and continue with another.

    stepped = SteppedStoreMover(host_pool, FakeClock())
    stepped.attach(FaultyStore("namespace", folder, page_bytes=4096, num_pages=64))
    stepped.start(job)
    while stepped.busy():
        for fiber in stepped.fibers:
            fiber.step()               # to its next pause
        reports += stepped.poll()

The threads are real, but only one of them runs at a time, and only while the test steps it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvist.memory.host_pool import HostPool
from kvist.plan.tiers import CancelFetch, StoreJob, StoreReport
from kvist.store.backend import PageStore, StoreContext, StoreStats
from kvist.store.breaker import BreakerState
from kvist.store.file import FileStore
from kvist.store.io_threads import Threads
from kvist.store.mover import StoreMover
from kvist.testing.clocks import FakeClock

BEHAVIOURS = ("works", "works", "fails", "raises", "misreports", "loses_pages")
_current = threading.local()


class Fiber:
    """A thread that runs only when the test steps it, from one `pause` to the next. Takes the arguments of Thread."""

    def __init__(self, *, target: Callable[..., None], args: tuple[Any, ...], **_: object) -> None:
        self.is_over = False
        self.is_idle = True  # waits for work
        self._target, self._args = target, args
        self._is_killed = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def step(self) -> None:
        if not self.is_over:
            self._go.release()
            assert self._back.acquire(timeout=20), "the thread waits for a thread that does not run"

    def kill(self) -> None:
        """End the thread at its next `pause`."""
        self._is_killed = True
        self.step()

    def _run(self) -> None:
        self._go.acquire()
        _current.fiber = self
        try:
            if not self._is_killed:
                self._target(*self._args)
        except SystemExit:
            pass
        finally:
            self.is_over = self.is_idle = True
            self._back.release()

    def pause(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._is_killed:
            raise SystemExit


def in_fiber() -> Fiber | None:
    return getattr(_current, "fiber", None)


def pause() -> None:
    """Stop the running fiber until its next step; do nothing outside a fiber."""
    if (fiber := in_fiber()) is not None:
        fiber.pause()


class FiberLock:
    """A lock after whose release a fiber pauses, so that another one can run between two critical sections."""

    def __init__(self) -> None:
        self._real = threading.Lock()

    def acquire(self) -> None:
        self._real.acquire()

    def release(self) -> None:
        self._real.release()

    def __enter__(self) -> None:
        self._real.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._real.release()
        if kind is None:
            pause()


class FiberCondition:
    """A condition on which a fiber waits from step to step: it looks again in each step, so no notice is needed."""

    def __init__(self, lock: FiberLock) -> None:
        self._lock = lock

    def wait_for(self, predicate: Callable[[], object]) -> None:
        fiber = in_fiber()
        assert fiber is not None, "only fibers wait"
        fiber.is_idle = True
        while not predicate():
            self._lock.release()
            try:
                fiber.pause()
            finally:
                self._lock.acquire()
        fiber.is_idle = False

    def notify(self) -> None: ...

    def notify_all(self) -> None: ...


class FaultyStore:
    """A file store with the faults of its `behaviour`, one of `BEHAVIOURS`; pages that `get` counts as read are right.

    A call pauses before and after each page. Mutable; the test's."""

    max_readers: int | None = None
    max_writers: int | None = None
    max_read_processes = 0

    def __init__(self, namespace: str, folder: Path, page_bytes: int, num_pages: int) -> None:
        self.folder = folder
        self.behaviour = "works"
        context = StoreContext(namespace=namespace, page_bytes=page_bytes)
        self._real: PageStore = FileStore(folder, context, capacity_bytes=num_pages * (4096 + page_bytes))

    def exists(self, keys: Sequence[bytes]) -> int:
        pause()
        num_pages = self._real.exists(keys)
        self._trouble()
        return {"misreports": len(keys), "fails": num_pages // 2}.get(self.behaviour, num_pages)

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        for index in range(len(keys)):
            pause()
            if self.behaviour in ("fails", "raises"):
                for page in into[index:]:
                    page[: len(page) // 2] = b"\xdd" * (len(page) // 2)
            self._trouble()
            if self.behaviour == "fails" or not self._real.get(keys[index : index + 1], into[index : index + 1]):
                return index
            pause()
        if self.behaviour == "misreports" and keys:
            into[-1][:] = b"\xdd" * len(into[-1])
            return len(keys) - 1
        return len(keys)

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        for index in range(len(keys)):
            pause()
            self._trouble()
            if self.behaviour == "fails":
                return index
            if self.behaviour == "misreports":
                continue
            if not self._real.put(keys[index : index + 1], pages[index : index + 1]):
                return index
        return len(keys)

    def probe(self) -> None:
        pause()
        self._trouble()
        self._real.probe()

    def stats(self) -> StoreStats:
        return self._real.stats()

    def close(self) -> None:
        self._real.close()

    def _trouble(self) -> None:
        if self.behaviour == "raises":
            raise OSError(5, "Input/output error")
        if self.behaviour == "loses_pages":
            for path in self.folder.rglob("*.page"):
                os.unlink(path)


class SteppedStoreMover:
    """A `StoreMover` whose threads are fibers: two readers and a writer for each store. Mutable; the test's."""

    def __init__(self, host: HostPool, clock: FakeClock) -> None:
        self.fibers: list[Fiber] = []
        self.is_attached = False
        self._num_open = 0  # jobs without a report
        threads = Threads(
            num_readers=2, num_writers=1, make=self._make_fiber, make_lock=FiberLock, make_condition=FiberCondition
        )
        self._mover = StoreMover(host, wakeup=pause, clock=clock, deadline_s=10.0, threads=threads)

    def _make_fiber(self, **options: Any) -> Fiber:
        self.fibers.append(Fiber(**options))
        return self.fibers[-1]

    def attach(self, store: FaultyStore) -> None:
        self.fibers = [fiber for fiber in self.fibers if not fiber.is_over]
        self._mover.attach(store, store.stats())
        self.is_attached = True

    def detach(self) -> None:
        if self.is_attached:
            self._mover.detach()
            self.is_attached = False

    def start(self, job: StoreJob) -> None:
        self._num_open += not isinstance(job, CancelFetch)
        self._mover.start(job)

    def poll(self) -> list[StoreReport]:
        reports = self._mover.poll()
        self._num_open -= len(reports)
        return reports

    def busy(self) -> bool:
        """Return whether a job has no report yet, a fiber is in the middle of one, or a probe waits for a fiber."""
        is_probed = self._mover.breaker() is BreakerState.HALF_OPEN
        return self._num_open > 0 or is_probed or any(not fiber.is_idle for fiber in self.fibers)

    def slots_under_call(self) -> set[int]:
        return self._mover.slots_under_call()

    def kill(self) -> None:
        for fiber in self.fibers:
            fiber.kill()

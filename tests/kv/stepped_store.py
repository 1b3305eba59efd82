"""The real store mover with threads that the test steps, and a store with faults: a state machine can stop any thread
between two pages and continue with another."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvist.store.backend import PageStore, StoreContext, StoreStats
from kvist.store.file import FileStore
from kvist.store.io_threads import Threads
from kvist.store.mover import StoreMover
from kvist.testing.clocks import FakeClock

BEHAVIOURS = ("works", "works", "fails", "raises", "misreports", "loses_pages")
_Thread = threading.Thread
_current = threading.local()


class Fiber:
    """A thread that runs only when the test steps it, from one `pause` to the next. Replaces threading.Thread."""

    def __init__(self, *, target: Callable[..., None], args: tuple[Any, ...], **_: object) -> None:
        self.is_over = False
        self.is_idle = True  # waits for work
        self._target, self._args = target, args
        self._is_killed = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def start(self) -> None:
        _Thread(target=self._run, daemon=True).start()

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

    def _wait(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._is_killed:
            raise SystemExit


def in_fiber() -> Fiber | None:
    return getattr(_current, "fiber", None)


def pause() -> None:
    """Stop the running fiber until its next step; do nothing outside a fiber."""
    if (fiber := in_fiber()) is not None:
        fiber._wait()


class FaultyStore:
    """A file store with the faults of its `behaviour`; pages that `get` counts as read are always right. The test can
    stop a call before and after each page."""

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
    """A `StoreMover` whose threads are fibers."""

    def __init__(self, host: Any, clock: FakeClock) -> None:
        self._made: list[Fiber] = []
        threads = Threads(num_readers=2, num_writers=1, make=self._make_fiber)
        self.mover = StoreMover(host, wakeup=pause, clock=clock, deadline_s=10.0, threads=threads)
        self.fibers: list[Fiber] = []

    def _make_fiber(self, **options: Any) -> Fiber:
        self._made.append(Fiber(**options))
        return self._made[-1]

    def attach(self, store: FaultyStore) -> None:
        self._made = []
        self.mover.attach(store, store.stats())
        attached: Any = self.mover._attached
        real_next, real_report = attached._next_call, attached._io.report

        def next_(queue: Any) -> Any:
            fiber = in_fiber()
            assert fiber is not None
            fiber.is_idle = True
            while not (attached._stopped or queue.waiting):
                pause()
            fiber.is_idle = False
            return real_next(queue)

        def report(*arguments: Any) -> None:
            pause()
            real_report(*arguments)

        attached._next_call = next_
        attached._io = dataclasses.replace(attached._io, report=report)
        self.fibers = [fiber for fiber in self.fibers if not fiber.is_over] + self._made

    @property
    def is_attached(self) -> bool:
        return self.mover._attached is not None

    def detach(self) -> None:
        if self.is_attached:
            self.mover.detach()

    def busy(self) -> bool:
        stores: Any = self.mover._stores()
        waiting = any(store._reads.waiting or store._writes.waiting for store in stores)
        return waiting or bool(self.mover._reports) or any(not fiber.is_idle for fiber in self.fibers)

    def slots_under_call(self) -> set[int]:
        stores: Any = self.mover._stores()
        return {slot for store in stores for queue in store._queues for call in queue.calls for slot in call.slots}

    def kill(self) -> None:
        for fiber in self.fibers:
            fiber.kill()

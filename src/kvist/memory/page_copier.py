"""Copies whole pages between the device pool and the host pool, on the mover's own threads.

    engine loop: start ──► loads   ──► thread, with a stream per GPU  ──► reports ──► engine loop: poll
                     └───► backups ──► thread, with a stream per GPU  ──┘   (after a call of `wakeup`)

Loads and backups have separate copy queues, because the two directions of a link do not slow each other down, and
because requests wait for loads, but seldom for backups. A queue runs its jobs in order. A GPU gets the next jobs while
it is copying, so that the link is not idle between small jobs. Every job is reported, until `close`.

Each tensor-parallel rank on a GPU has a piece of every page; the host pool has whole pages, assembled from the pieces.

No stream needs to wait for another. A page is backed up after the host has read the results of the step that computed
the page, and this read waits for the whole step, on all ranks. A page is loaded into a device page that no request
uses: the last request released the page after the results of its last step were read (`PendingSteps.writes`). The step
that uses loaded pages is launched after their report, and a queue sends the report after it has waited for its own
stream.

The thread of the backups writes the records of a persistent host pool (persistence.py), so that the engine loop
computes no checksum and never waits for a disk.

kv/ decides which page is copied where, and when both pages may be used again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvist.clock import Clock
from kvist.memory.counters import COPY_COUNTERS
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool
from kvist.plan.tiers import BackUpPages, ForgetPages, LoadPages, PageReport, PagesBackedUp, PagesForgotten, PagesLoaded

MAX_JOBS_UNDER_WAY = 4  # jobs queued on a GPU at once
COPIES_PER_CALL = 32

logger = logging.getLogger(__name__)


class PageMover:
    """The two copy queues. Only the engine loop calls the methods; any thread may call `wakeup`."""

    def __init__(self, device: DevicePool, host: HostPool, *, wakeup: Callable[[], None], clock: Clock) -> None:
        self._reports: deque[PageReport] = deque()
        pieces = [(piece, host.tensor[:, at : at + piece.shape[1]]) for at, piece in device.pieces()]
        once = {
            on_host.data_ptr(): (piece, on_host) for piece, on_host in pieces
        }  # several ranks may have the same head
        self._loads = _CopyQueue("kvist-load", [(on_host, piece) for piece, on_host in pieces], clock)
        self._backups = _CopyQueue("kvist-backup", list(once.values()), clock)
        self._wakeup = wakeup
        self._persistent = host.persistent

    def start(self, job: LoadPages | BackUpPages | ForgetPages) -> None:
        job_id = job.job_id
        if isinstance(job, LoadPages):
            self._loads.start(job.host_slots, job.page_ids, lambda ok: self._report(PagesLoaded(job_id=job_id, ok=ok)))
        elif isinstance(job, ForgetPages):  # in the queue of the backups: later backups into these slots run after it
            self._backups.run(partial(self._forget, job))
        else:
            self._backups.start(
                job.page_ids, job.host_slots, partial(self._backed_up, job), partial(self._before_backup, job)
            )

    def poll(self) -> list[PageReport]:
        """Return the reports since the last call."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def totals(self) -> dict[str, float]:
        """Return the values of COPY_COUNTERS."""
        loads, backups = self._loads, self._backups
        numbers = (loads.num_jobs, loads.num_bytes, loads.seconds, backups.num_jobs, backups.num_bytes, backups.seconds)
        return dict(zip(COPY_COUNTERS.names(), numbers, strict=True))

    def close(self) -> None:
        """Stop both queues: no byte is copied after the return. Jobs that have not begun are dropped without a
        report."""
        for copies in (self._loads, self._backups):
            copies.stop()
        for copies in (self._loads, self._backups):
            copies.join()

    def _forget(self, job: ForgetPages) -> None:
        if self._persistent is not None:
            self._persistent.clear(job.host_slots)
        self._report(PagesForgotten(job_id=job.job_id))

    def _before_backup(self, job: BackUpPages) -> None:
        if self._persistent is not None:
            self._persistent.clear(job.host_slots)

    def _backed_up(self, job: BackUpPages, ok: bool) -> None:
        if ok and self._persistent is not None:  # before the report: after it, the slots may belong to other pages
            self._persistent.record(job.host_slots, job.names)
        self._report(PagesBackedUp(job_id=job.job_id, ok=ok))

    def _report(self, report: PageReport) -> None:
        self._reports.append(report)
        self._wakeup()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copies:
    """A job whose copies have been launched."""

    num_bytes: int
    start_s: float
    copied: tuple[torch.cuda.Event, ...]  # one per GPU; empty if the bytes are in place already
    done: Callable[[bool], None]


class _CopyQueue:
    """The copies of one direction, and their thread, which alone writes the counters."""

    def __init__(self, name: str, pieces: Sequence[tuple[Tensor, Tensor]], clock: Clock) -> None:
        """`pieces`: (source, target), each [num_pages, piece bytes] uint8; one of the two is on the host."""
        self.num_jobs = 0
        self.num_bytes = 0.0
        self.seconds = 0.0  # during which a job was under way
        self._pieces = pieces
        self._clock = clock
        gpus = {side.device for sides in pieces for side in sides if side.is_cuda}
        # A view of each page, made once: each call that makes a view releases the GIL, and may have to wait for it.
        self._pages = [(source.unbind(), target.unbind()) for source, target in pieces] if gpus else []
        self._streams = {gpu: torch.cuda.Stream(gpu) for gpu in gpus}  # type: ignore[no-untyped-call]
        self._closed = False
        # None ends the thread. The queue is bounded by the pages in flight and by the number of flushes.
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._under_way: deque[_Copies] = deque()  # used by the thread only
        self._last_end_s = 0.0
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def start(
        self,
        source_ids: Sequence[int],
        target_ids: Sequence[int],
        done: Callable[[bool], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        assert len(source_ids) == len(target_ids), "each page needs one destination"
        source, target = self._pieces[0]
        assert max(source_ids) < source.shape[0], "a page outside the pool"
        assert max(target_ids) < target.shape[0], "a page outside the pool"
        self._jobs.put(partial(self._launch_copies, source_ids, target_ids, done, begin))

    def run(self, job: Callable[[], None]) -> None:
        """Run `job` on the queue's thread, after all earlier jobs have ended."""
        self._jobs.put(partial(self._run_when_idle, job))

    def stop(self) -> None:
        self._closed = True
        self._jobs.put(None)

    def join(self) -> None:
        self._thread.join()  # waits for the jobs under way only

    def _serve(self) -> None:
        while (job := self._next()) is not None and not self._closed:
            job()
        while self._under_way:
            self._end_oldest()

    def _next(self) -> Callable[[], None] | None:
        while self._under_way:
            if len(self._under_way) < MAX_JOBS_UNDER_WAY:
                with contextlib.suppress(queue.Empty):
                    return self._jobs.get_nowait()
            self._end_oldest()
        return self._jobs.get()

    def _run_when_idle(self, job: Callable[[], None]) -> None:
        while self._under_way:
            self._end_oldest()
        job()

    def _launch_copies(
        self,
        source_ids: Sequence[int],
        target_ids: Sequence[int],
        done: Callable[[bool], None],
        begin: Callable[[], None],
    ) -> None:
        start_s = self._clock.now_s()
        try:
            begin()
            copied = self._copy(source_ids, target_ids)
        except Exception:  # the thread must survive a failed job
            logger.exception("copying %d pages between device and host failed", len(source_ids))
            for stream in self._streams.values():  # some of the job's copies may be under way
                with contextlib.suppress(Exception):
                    stream.synchronize()
            done(False)
            return
        num_bytes = len(source_ids) * sum(source.shape[1] for source, _ in self._pieces)
        self._under_way.append(_Copies(num_bytes=num_bytes, start_s=start_s, copied=copied, done=done))
        if not copied:
            self._end_oldest()

    def _copy(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> tuple[torch.cuda.Event, ...]:
        for number, (source, target) in enumerate(self._pieces):
            stream = self._streams.get(source.device) or self._streams.get(target.device)
            if stream is None:
                for first, to, count in runs(source_ids, target_ids):  # numpy: torch would use the model's threads
                    np.copyto(target.numpy()[to : to + count], source.numpy()[first : first + count])
                continue
            # The pieces of a rank are not contiguous in the host pool: torch would first gather several in a buffer.
            longest = len(source_ids) if source.is_contiguous() and target.is_contiguous() else 1
            copies = runs(source_ids, target_ids, longest)
            source_pages, target_pages = self._pages[number]
            with torch.cuda.stream(stream):
                # Many copies in one call, which does not need the GIL in between: other threads do not delay the
                # copies.
                while some := list(itertools.islice(copies, COPIES_PER_CALL)):
                    torch._foreach_copy_(
                        [target_pages[to] if count == 1 else target[to : to + count] for _, to, count in some],
                        [source_pages[at] if count == 1 else source[at : at + count] for at, _, count in some],
                        non_blocking=True,
                    )
        return tuple(stream.record_event() for stream in self._streams.values())

    def _end_oldest(self) -> None:
        """Wait for the copies of the oldest job, and report the job."""
        job = self._under_way.popleft()
        try:
            for event in job.copied:
                event.synchronize()
        except Exception:
            logger.exception("copying pages between device and host failed")
            job.done(False)
            return
        now_s = self._clock.now_s()
        self.num_jobs += 1
        self.num_bytes += job.num_bytes
        self.seconds += now_s - max(job.start_s, self._last_end_s)
        self._last_end_s = now_s
        job.done(True)


def runs(
    source_ids: Sequence[int], target_ids: Sequence[int], longest: int = sys.maxsize
) -> Iterator[tuple[int, int, int]]:
    """Yield (source, target, count): runs of at most `longest` pages that are consecutive on both sides."""
    start = 0
    for index in range(1, len(source_ids) + 1):
        length = index - start
        if (
            index < len(source_ids)
            and length < longest
            and source_ids[index] == source_ids[start] + length
            and target_ids[index] == target_ids[start] + length
        ):
            continue
        yield source_ids[start], target_ids[start], length
        start = index

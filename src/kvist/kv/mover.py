"""Copies pages between the device pool and the host pool, whole pages each, on threads of its own.

    engine loop: start ──► loads   ──► thread, on GPUs with a stream  ──► reports ──► engine loop: poll
                     └───► backups ──► thread, the same               ──┘   (after a call of `wakeup`)

Two lanes, because the two directions of a link do not disturb each other, and since a request waits for a load but
nobody for a backup. Within a lane jobs are carried out in order. Every job is answered, until `close`.

Of tensor-parallel ranks on GPUs each has a piece of every page: the host has the whole page, put together of them.

Why no stream waits for another. A page is backed up after the step that computed it was read by the host, and reading
waits for the whole step. A page is loaded into a device page that nobody has: who had it before gave it up after the
last step that used it was read (`RequestTable.is_written`). And the step that uses what was loaded is launched after
the report, which a lane makes after it has waited for its own stream.

The records of a host pool that persists (persistence.py) are kept by the backups' thread: the engine loop computes no
checksum and waits for no disk.

It decides nothing: which page goes where, and when either may be used again, is kv/cache.py's.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvist.clock import Clock
from kvist.kv.device import DevicePool
from kvist.kv.host import HostPool
from kvist.kv.moves import BackUpPages, ForgetPages, LoadPages, PagesBackedUp, PagesForgotten, PagesLoaded

MOVE_COUNTERS = (
    "host_loads",
    "host_load_bytes",
    "host_load_seconds",
    "host_backups",
    "host_backup_bytes",
    "host_backup_seconds",
)

log = logging.getLogger(__name__)


class PageMover:
    """`start`, `poll`, `totals` and `close` are the engine loop's; `wakeup` is called by any thread."""

    def __init__(self, device: DevicePool, host: HostPool, *, wakeup: Callable[[], None], clock: Clock) -> None:
        self._reports: deque[PagesLoaded | PagesBackedUp | PagesForgotten] = deque()
        pieces = [(piece, host.tensor[:, at : at + piece.shape[1]]) for at, piece in device.pieces()]
        once = {on_host.data_ptr(): (piece, on_host) for piece, on_host in pieces}  # several ranks may have one head
        self._loads = _Lane("kvist-load", [(on_host, piece) for piece, on_host in pieces], clock)
        self._backups = _Lane("kvist-backup", list(once.values()), clock)
        self._wakeup = wakeup
        self._persistent = host.persistent

    def start(self, job: LoadPages | BackUpPages | ForgetPages) -> None:
        job_id = job.job_id
        if isinstance(job, LoadPages):
            self._loads.start(job.host_slots, job.page_ids, lambda ok: self._report(PagesLoaded(job_id=job_id, ok=ok)))
        elif isinstance(job, ForgetPages):  # in the backups' lane: whoever gets the slots next writes them after this
            self._backups.run(partial(self._forget, job))
        else:
            self._backups.start(
                job.page_ids, job.host_slots, partial(self._backed_up, job), partial(self._before_backup, job)
            )

    def poll(self) -> list[PagesLoaded | PagesBackedUp | PagesForgotten]:
        """What happened since the last call."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def totals(self) -> dict[str, float]:
        """MOVE_COUNTERS."""
        loads, backups = self._loads, self._backups
        numbers = (loads.num_jobs, loads.num_bytes, loads.seconds, backups.num_jobs, backups.num_bytes, backups.seconds)
        return dict(zip(MOVE_COUNTERS, numbers, strict=True))

    def close(self) -> None:
        """No byte is moved once this returns. What has not begun is dropped without a report."""
        for lane in (self._loads, self._backups):
            lane.stop()
        for lane in (self._loads, self._backups):
            lane.join()

    def _forget(self, job: ForgetPages) -> None:
        if self._persistent is not None:
            self._persistent.clear(job.host_slots)
        self._report(PagesForgotten(job_id=job.job_id))

    def _before_backup(self, job: BackUpPages) -> None:
        if self._persistent is not None:
            self._persistent.clear(job.host_slots)

    def _backed_up(self, job: BackUpPages, ok: bool) -> None:
        if ok and self._persistent is not None:  # before the report: after it, the slots may be other pages'
            self._persistent.record(job.host_slots, job.names)
        self._report(PagesBackedUp(job_id=job.job_id, ok=ok))

    def _report(self, report: PagesLoaded | PagesBackedUp | PagesForgotten) -> None:
        self._reports.append(report)
        self._wakeup()


class _Lane:
    """One direction. The counters are written by its thread alone."""

    def __init__(self, name: str, pieces: Sequence[tuple[Tensor, Tensor]], clock: Clock) -> None:
        """`pieces`: (source, target), each [num_pages, piece bytes] uint8; one of the two is on the host."""
        self.num_jobs = 0
        self.num_bytes = 0.0
        self.seconds = 0.0
        self._pieces = pieces
        self._clock = clock
        gpus = {side.device for sides in pieces for side in sides if side.is_cuda}
        self._streams = {gpu: torch.cuda.Stream(gpu) for gpu in gpus}  # type: ignore[no-untyped-call]
        self._closed = False
        # None: the end. Bounded by the pages that the cache lets be in flight, and the flushes that it is asked for.
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def start(
        self,
        source_ids: Sequence[int],
        target_ids: Sequence[int],
        done: Callable[[bool], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        assert len(source_ids) == len(target_ids), "one destination for each page"
        source, target = self._pieces[0]
        assert max(source_ids) < source.shape[0], "a page outside the pool"
        assert max(target_ids) < target.shape[0], "a page outside the pool"
        self.run(partial(self._carry_out, source_ids, target_ids, done, begin))

    def run(self, job: Callable[[], None]) -> None:
        """In its turn, on the lane's thread."""
        self._jobs.put(job)

    def stop(self) -> None:
        self._closed = True
        self._jobs.put(None)

    def join(self) -> None:
        self._thread.join()  # at most one job

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            job()

    def _carry_out(
        self,
        source_ids: Sequence[int],
        target_ids: Sequence[int],
        done: Callable[[bool], None],
        begin: Callable[[], None],
    ) -> None:
        start_s = self._clock.now_s()
        try:
            begin()
            self._copy(source_ids, target_ids)
        except Exception:  # the thread must outlive any one job
            log.exception("copying %d pages between device and host", len(source_ids))
            done(False)
            return
        self.num_jobs += 1
        self.num_bytes += len(source_ids) * sum(source.shape[1] for source, _ in self._pieces)
        self.seconds += self._clock.now_s() - start_s
        done(True)

    def _copy(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Every byte is in place when it returns."""
        for source, target in self._pieces:
            stream = self._streams.get(source.device) or self._streams.get(target.device)
            if stream is None:
                for first, to, count in runs(source_ids, target_ids):  # torch would use the model's threads for it
                    np.copyto(target.numpy()[to : to + count], source.numpy()[first : first + count])
                continue
            # Pieces do not follow each other in the host's pages: torch would put several together first.
            longest = len(source_ids) if source.is_contiguous() and target.is_contiguous() else 1
            with torch.cuda.stream(stream):
                for first, to, count in runs(source_ids, target_ids, longest):
                    target[to : to + count].copy_(source[first : first + count], non_blocking=True)
        for stream in self._streams.values():
            stream.synchronize()


def runs(
    source_ids: Sequence[int], target_ids: Sequence[int], longest: int = sys.maxsize
) -> Iterator[tuple[int, int, int]]:
    """(source, target, count): pages that follow each other on both sides are copied at once, up to so many."""
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

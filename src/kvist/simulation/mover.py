"""The page copies between the device pool and the host tier of a simulated engine: checks of every copy, and faults."""

from __future__ import annotations

from kvist.kv.cache import PageCache
from kvist.kv.pages import PageState
from kvist.plan.events import Event
from kvist.plan.tiers import BackUpPages, ForgetPages, LoadPages, PagesBackedUp, PagesForgotten, PagesLoaded
from kvist.simulation.device import Page, SimDevice


class SimMover:
    """Copies between device and host pages, one job for each `advance`, as promised by `memory/page_copier.py`.

    Mutable; the engine's. A test sets `fail_next` for the next copy."""

    def __init__(self, cache: PageCache, device: SimDevice, num_host_pages: int) -> None:
        self._cache = cache
        self._device = device
        self.host: list[Page] = [[] for _ in range(num_host_pages)]
        self._jobs: list[tuple[LoadPages | BackUpPages, list[Page]]] = []  # job, pages to copy
        self._reports: list[Event] = []
        self.fail_next = False

    def take(self, job: LoadPages | BackUpPages | ForgetPages) -> None:
        if isinstance(job, ForgetPages):
            assert not any(set(other.host_slots) & set(job.host_slots) for other, _ in self._jobs)
            self._reports.append(PagesForgotten(job_id=job.job_id))
            return
        loads = isinstance(job, LoadPages)
        source = [self.host[slot] for slot in job.host_slots] if loads else self._device_pages(job)
        assert all(None not in page for page in source), "a page is copied before it was filled"
        self._jobs.append((job, [list(page) for page in source]))

    @property
    def slots(self) -> list[tuple[bool, int]]:
        """(is written, slot) for every slot of every pending job."""
        return [(isinstance(job, BackUpPages), slot) for job, _ in self._jobs for slot in job.host_slots]

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._reports)

    def advance(self, newest: bool = False) -> None:
        """Carry out one job. Jobs of different queues may finish in any order."""
        if not self._jobs:
            return
        job, expected = self._jobs.pop(-1 if newest else 0)
        ok, self.fail_next = not self.fail_next, False
        states = {self._cache.page_state(page_id) for page_id in job.page_ids}
        if isinstance(job, LoadPages):
            assert [self.host[slot] for slot in job.host_slots] == expected, "a host page changed while it was loaded"
            assert states == {PageState.IN_FLIGHT}
            for page_id, page in zip(job.page_ids, expected, strict=True):
                self._device.pages[page_id] = list(page) if ok else [(0, 0)] * len(page)
            self._reports.append(PagesLoaded(job_id=job.job_id, ok=ok))
        else:
            assert self._device_pages(job) == expected, "a page changed while it was backed up"
            assert states == {PageState.CACHED}
            for slot, page in zip(job.host_slots, expected, strict=True):
                self.host[slot] = page if ok else [(0, 0)] * len(page)
            self._reports.append(PagesBackedUp(job_id=job.job_id, ok=ok))

    def poll(self) -> list[Event]:
        reports, self._reports = self._reports, []
        return reports

    def _device_pages(self, job: LoadPages | BackUpPages) -> list[Page]:
        return [self._device.pages[page_id] for page_id in job.page_ids]

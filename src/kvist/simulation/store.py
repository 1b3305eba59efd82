"""The store of a simulated engine and its threads, with faults: delays, failures, hangs, false reports, lost pages."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.plan.events import Event
from kvist.plan.tiers import (
    CancelFetch,
    FetchPages,
    FindPages,
    PagesFetched,
    PagesFound,
    PagesStored,
    StoreJob,
    StorePages,
)
from kvist.simulation.device import Page

NONSENSE = (-2, -2)


class SimStore:
    """The store of one engine, on top of `pages`, which all engines share. `advance` runs a job, in any order."""

    def __init__(self, host: list[Page], pages: dict[bytes, Page]) -> None:
        """`host` has the pages of the engine's host tier, by slot."""
        self._host = host
        self._pages = pages
        self._jobs: list[tuple[FindPages | FetchPages | StorePages, list[Page]]] = []  # job, pages to store
        self._reports: list[Event] = []
        self._begun: set[int] = set()  # fetches
        self._cancelled: set[int] = set()
        self.hung: set[int] = set()  # job ids; answered after they are removed here
        self.fetched: list[bytes] = []  # digest of every requested page
        self.fail_next = False
        self.overclaims = False  # report every page as found

    def take(self, job: StoreJob) -> None:
        if isinstance(job, CancelFetch):
            assert job.job_id in self._begun
            self._cancelled.add(job.job_id)  # without effect if the fetch is finished already
            return
        assert all(other.job_id != job.job_id for other, _ in self._jobs)
        if not isinstance(job, FindPages):
            assert 0 < len(job.digests) == len(job.host_slots) <= 128
        if isinstance(job, FetchPages):
            assert [digest for digest, _ in job.names] == list(job.digests)
            self.fetched += job.digests
            self._begun.add(job.job_id)
            self._write(
                job.host_slots, [[NONSENSE]] * len(job.host_slots)
            )  # the store may write the slots from now on, at any time
        expected = [list(page) for page in self._read(job.host_slots)] if isinstance(job, StorePages) else []
        self._jobs.append((job, expected))

    @property
    def slots(self) -> list[tuple[bool, int]]:
        """(is written, slot) for every slot of every pending job."""
        jobs = [job for job, _ in self._jobs if not isinstance(job, FindPages)]
        return [(isinstance(job, FetchPages), slot) for job in jobs for slot in job.host_slots]

    @property
    def busy(self) -> bool:
        return bool(self._reports) or any(job.job_id not in self.hung for job, _ in self._jobs)

    def hang(self) -> None:
        self.hung.update(job.job_id for job, _ in self._jobs)

    def advance(self, newest: bool = False) -> None:
        ready = [index for index, (job, _) in enumerate(self._jobs) if job.job_id not in self.hung]
        if not ready:
            return
        job, expected = self._jobs.pop(ready[-1 if newest else 0])
        most, self.fail_next = (len(job.digests) // 2 if self.fail_next else len(job.digests)), False
        if isinstance(job, FindPages):
            num_pages = len(job.digests) if self.overclaims else self._num_leading_pages(job.digests)
            self._reports.append(PagesFound(job_id=job.job_id, num_pages=min(num_pages, most)))
        elif isinstance(job, FetchPages):
            num_pages = 0 if job.job_id in self._cancelled else min(self._num_leading_pages(job.digests), most)
            self._write(job.host_slots, [self._pages[digest] for digest in job.digests[:num_pages]])
            self._reports.append(PagesFetched(job_id=job.job_id, num_pages=num_pages))
        else:
            assert [list(page) for page in self._read(job.host_slots)] == expected, (
                "a host page changed while it was stored"
            )
            assert all(slot is not None and slot[0] >= 0 for page in expected for slot in page), (
                "an invalid page is stored"
            )
            self._pages.update(zip(job.digests[:most], expected, strict=False))
            self._reports.append(PagesStored(job_id=job.job_id, num_pages=most))

    def poll(self) -> list[Event]:
        reports, self._reports = self._reports, []
        return reports

    def _num_leading_pages(self, digests: Sequence[bytes]) -> int:
        return next((place for place, digest in enumerate(digests) if digest not in self._pages), len(digests))

    def _read(self, slots: Sequence[int]) -> list[Page]:
        return [self._host[slot] for slot in slots]

    def _write(self, slots: Sequence[int], pages: list[Page]) -> None:
        for slot, page in zip(slots, pages, strict=False):
            self._host[slot] = list(page)

"""The copies under way between the device pool and the host tier: loads and backups. Pure.

    begin_load ──► LoadPages ──loaded──► the pages are in the device pool, and their slots unpinned
    back_up ──► BackUpPages ──backed_up──► resident in the host tier, or lost

write_policy.py decides which pages are backed up, and when; cache.py decides which pages are loaded. This class applies
the limits of backups, and keeps the pages of each copy and the jobs for the mover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.kv.lease import PageLease
from kvist.kv.radix import PageNode, Root
from kvist.kv.tiers.host import HostPage, HostTier
from kvist.plan.tiers import BackUpPages, ForgetPages, LoadPages, PageJob, PagesBackedUp, PagesLoaded

MAX_BACKUPS = 64  # jobs under way; pages that become due meanwhile are skipped
MAX_PAGES_BACKED_UP = 2048  # in all backups under way; with write_back, the last job may exceed it


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One `LoadPages` job under way."""

    lease: PageLease
    pages: list[HostPage]
    num_fetched: int  # pages that came from the storage tier, and were not loaded since


class HostCopies:
    """Mutable; its one owner is `PageCache`, which uses the same host tier."""

    def __init__(self, host: HostTier) -> None:
        self.host = host
        self._loads: dict[int, Load] = {}  # under way, by job id
        self._loading: dict[HostPage, int] = {}  # the pages of `_loads`, with their job ids
        self._backups: dict[int, tuple[PageLease, list[HostPage]]] = {}  # under way, by job id
        self._num_pages_backed_up = 0  # in `_backups`
        self._jobs: list[PageJob] = []  # since the last `take_jobs`
        self._num_loaded = self._num_backed_up = self._num_skipped = self._num_failed = 0

    # ---------------------------------------------------------------- host tier → device pool

    def begin_load(self, lease: PageLease, pages: list[HostPage], page_ids: Sequence[int]) -> int:
        """Load resident pages into `page_ids` of the lease; return the job's id."""
        job_id = self.host.next_job_id()
        self._loads[job_id] = Load(lease=lease, pages=pages, num_fetched=sum(page.from_storage for page in pages))
        for page in pages:
            self.host.pin(page)
            page.from_storage = False
            self._loading[page] = job_id
        self._jobs.append(
            LoadPages(job_id=job_id, host_slots=tuple(page.slot for page in pages), page_ids=tuple(page_ids))
        )
        return job_id

    @property
    def is_loading(self) -> bool:
        return bool(self._loads)

    def load_of(self, digest: bytes) -> int | None:
        """Return the id of the job that loads the page, if any."""
        page = self.host.get(digest)
        return None if page is None else self._loading.get(page)

    def loaded(self, event: PagesLoaded) -> Load:
        """End a load, and return it."""
        load = self._loads.pop(event.job_id)
        for page in load.pages:
            self.host.unpin(page)
            self._loading.pop(page, None)
        if event.ok:
            self._num_loaded += len(load.pages)
        else:
            self._num_failed += len(load.pages)
        return load

    # ---------------------------------------------------------------- device pool → host tier

    @property
    def has_room_for_backup(self) -> bool:
        return len(self._backups) < MAX_BACKUPS and self._num_pages_backed_up < MAX_PAGES_BACKED_UP

    def back_up(self, lease: PageLease, nodes: Sequence[PageNode], *, exceeds_limit: bool = False) -> bool:
        """Back up the pages of a path that the host tier lacks, in prefix order; return whether a copy begins.

        The lease's pin must read the pages, and keeps them until the copy is reported. After the first skipped page all
        others are skipped too, since no match would reach them. With `exceeds_limit` the copy may exceed
        MAX_PAGES_BACKED_UP."""
        host, pages, page_ids = self.host, list[HostPage](), list[int]()
        num_allowed = len(nodes) if exceeds_limit else self._num_pages_allowed()
        for index, node in enumerate(nodes):
            known = host.get(node.digest)
            if known is not None and not known.lost:
                continue
            if node in lease.pin.duplicates:
                break  # the pin reads its duplicate, and does not keep the tree's page
            page = self._reserve(node) if len(pages) < num_allowed else None
            if page is None:
                self._num_skipped += len(nodes) - index
                break
            pages.append(page)
            page_ids.append(node.page_id)
        if pages:
            self._begin_backup(lease, pages, page_ids)
        return bool(pages)

    def _num_pages_allowed(self) -> int:
        return MAX_PAGES_BACKED_UP - self._num_pages_backed_up if self.has_room_for_backup else 0

    def _reserve(self, node: PageNode) -> HostPage | None:
        if isinstance(node.parent, Root):
            return self.host.reserve(None, node.digest)
        parent = self.host.get(node.parent.digest)
        return None if parent is None else self.host.reserve(parent, node.digest)

    def _begin_backup(self, lease: PageLease, pages: list[HostPage], page_ids: list[int]) -> None:
        job_id = self.host.next_job_id()
        self._backups[job_id] = lease, pages
        self._num_pages_backed_up += len(pages)
        lease.begin_backup()
        self._jobs.append(
            BackUpPages(
                job_id=job_id,
                page_ids=tuple(page_ids),
                host_slots=tuple(page.slot for page in pages),
                names=tuple(page.name for page in pages),
            )
        )

    def backed_up(self, event: PagesBackedUp) -> tuple[PageLease, list[HostPage]]:
        """End a backup; return its lease and its pages."""
        lease, pages = self._backups.pop(event.job_id)
        for page in pages:
            self.host.written(page, ok=event.ok)
        self._num_pages_backed_up -= len(pages)
        lease.end_backup()
        if event.ok:
            self._num_backed_up += len(pages)
        else:
            self._num_failed += len(pages)
        return lease, pages

    # ---------------------------------------------------------------- all copies

    def flush(self) -> tuple[int, int | None]:
        """Free every host page that no copy or prefetch uses. Return the number of pages, and the id of the job that
        erases their records (None: no page was freed)."""
        slots = self.host.flush()
        if not slots:
            return 0, None
        job_id = self.host.next_job_id()
        self._jobs.append(ForgetPages(job_id=job_id, host_slots=tuple(slots)))
        return len(slots), job_id

    def take_jobs(self) -> list[PageJob]:
        jobs, self._jobs = self._jobs, []
        return jobs

    def totals(self) -> dict[str, float]:
        return {
            "host_evicted_pages": self.host.num_evicted,
            "host_loaded_pages": self._num_loaded,
            "host_backed_up_pages": self._num_backed_up,
            "host_skipped_pages": self._num_skipped,
            "host_failed_pages": self._num_failed,
        }

"""The queue from the host tier to the store: which resident pages are due, and the jobs under way. Pure.

    resident, not known to be stored ──store──► due ──a job may start──► StorePages ──stored──► in the store; after a
                                                 └── evicted before: skipped        failure, due again at the next hit

Pages of a handoff through the store are stored before all others: a decode engine waits for them.

Pages being stored take at most a quarter of the host tier, so that a slow store cannot occupy the whole tier. The pages
of a job are pinned; a hung job keeps its pages, and their part of the quarter, until it returns.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvist.kv.tiers.host import HostPage, HostTier
from kvist.plan.tiers import PIECE_PAGES, PagesStored, StorePages

MAX_STORES = 64  # jobs under way; further pages wait
MAX_PAGES_STORED = 2048  # in all these jobs together


class StoreQueue:
    """Mutable; its one owner is the `StorageTier`, which uses the same host tier."""

    def __init__(self, host: HostTier) -> None:
        self._host = host
        self._max_pages = min(MAX_PAGES_STORED, max(1, host.num_pages // 4))
        self._jobs: dict[int, tuple[int, list[HostPage]]] = {}  # under way, by id, with the generation of their start
        self._due: dict[HostPage, None] = {}  # to be stored, oldest first; some may have been evicted since
        self._first: dict[HostPage, None] = {}  # to be stored before those, for handoffs through the store
        self._hurried: set[bytes] = set()  # digests of pages that go into `_first`
        self._storing: set[HostPage] = set()  # in jobs under way
        self._started: list[StorePages] = []  # since the last `take_jobs`
        self.generation = 0  # number of the store; knowledge of one store is not valid for the next
        self.num_pages = 0  # in jobs under way
        self.num_stored = self.num_skipped = self.num_failed = 0

    @property
    def num_due(self) -> int:
        return len(self._due) + len(self._first)

    def has(self, page: HostPage) -> bool:
        """Return whether the page is due, or is being stored."""
        return page in self._storing or page in self._first or page in self._due

    def hurry(self, digests: Iterable[bytes]) -> None:
        """Store these pages, now and later, before all others."""
        for digest in digests:
            self._hurried.add(digest)
            page = self._host.get(digest)
            if page is not None and page in self._due:
                del self._due[page]
                self._first[page] = None

    def stop_hurrying(self, digests: Iterable[bytes]) -> None:
        self._hurried.difference_update(digests)

    def on_store_changed(self) -> None:
        """Drop the pages that are due, and forget which pages are stored."""
        self.generation += 1
        self._due.clear()
        self._first.clear()
        self._host.forget_stored()

    def store(self, pages: Iterable[HostPage]) -> None:
        """Queue the resident pages of a path that are not known to be stored. `pages` are in prefix order."""
        for page in pages:
            if page.resident and not page.stored:
                (self._first if page.digest in self._hurried else self._due)[page] = None
        while len(self._due) > self._host.num_pages:  # some of them were evicted
            del self._due[next(iter(self._due))]
            self.num_skipped += 1
        self._start_jobs()

    def stored(self, event: PagesStored) -> list[HostPage]:
        """End a job. Return the pages that are in the store now, if it is still the same store."""
        generation, pages = self._jobs.pop(event.job_id)
        self.num_pages -= len(pages)
        self._storing.difference_update(pages)
        for index, page in enumerate(pages):
            self._host.unpin(page)
            if index >= event.num_pages and generation == self.generation:
                page.stored = False
        self.num_stored += event.num_pages
        self.num_failed += len(pages) - event.num_pages
        self._start_jobs()
        return pages[: event.num_pages] if generation == self.generation else []

    def take_jobs(self) -> list[StorePages]:
        started, self._started = self._started, []
        return started

    def _start_jobs(self) -> None:
        while self.num_pages < self._max_pages and len(self._jobs) < MAX_STORES:
            piece = self._next_due(min(PIECE_PAGES, self._max_pages - self.num_pages))
            if not piece:
                return
            self.num_pages += len(piece)
            for page in piece:
                page.stored = True  # unless a failure is reported; no second job stores the page meanwhile
                self._host.pin(page)
            self._storing.update(piece)
            job_id = self._host.next_job_id()
            self._jobs[job_id] = self.generation, piece
            digests, slots = tuple(page.digest for page in piece), tuple(page.slot for page in piece)
            self._started.append(StorePages(job_id=job_id, digests=digests, host_slots=slots))

    def _next_due(self, num_pages: int) -> list[HostPage]:
        piece: list[HostPage] = []
        while (due := self._first or self._due) and len(piece) < num_pages:
            page = next(iter(due))
            del due[page]
            if self._host.get(page.digest) is page:
                piece.append(page)
            else:
                self.num_skipped += 1
        return piece

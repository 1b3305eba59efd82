"""What is asked of, and heard from, whoever moves pages between the tiers: a plan carries the jobs, events the reports.

    PageMover (mover.py)      LoadPages, BackUpPages, ForgetPages  device pool ◄─► host pool
    StoreMover                FindPages, FetchPages, StorePages    store ◄─► host pool

Each job is answered once, whatever becomes of it. Until then no page and no slot that it names goes to anybody else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PIECE_PAGES = 128  # at most, of one call of the store: what its deadline is for


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPages:
    """Copy host pages into our device pool; answered by `PagesLoaded`."""

    job_id: int
    host_slots: tuple[int, ...]
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackUpPages:
    """Copy pages of our device pool into the host's; answered by `PagesBackedUp`."""

    job_id: int
    page_ids: tuple[int, ...]
    host_slots: tuple[int, ...]
    names: tuple[tuple[bytes, bytes | None], ...] = field(default=(), repr=False)  # (digest, that of the page before)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetPages:
    """These host pages were flushed: no restart may bring them back. Answered by `PagesForgotten`.

    It holds no slot: what is copied into one of them later comes behind it."""

    job_id: int
    host_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesForgotten:
    job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesLoaded:
    job_id: int
    ok: bool  # every byte is in place; else the device pages hold nothing of use


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesBackedUp:
    job_id: int
    ok: bool  # every byte is in place; else the host slots hold nothing of use


@dataclass(frozen=True, slots=True, kw_only=True)
class FindPages:
    """Which of these does the store have? Answered by `PagesFound`."""

    job_id: int
    digests: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPages:
    """Copy pages of the store into the host pool; answered by `PagesFetched`."""

    job_id: int
    digests: tuple[bytes, ...] = field(repr=False)
    host_slots: tuple[int, ...]
    names: tuple[tuple[bytes, bytes | None], ...] = field(default=(), repr=False)  # as in `BackUpPages`


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePages:
    """Copy host pages into the store; answered by `PagesStored`."""

    job_id: int
    digests: tuple[bytes, ...] = field(repr=False)
    host_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelFetch:
    """Drop the `FetchPages` of this number if it has not begun: it is answered as always. Else nothing."""

    job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesFound:
    job_id: int
    num_pages: int  # leading ones; 0 for any trouble
    answered: bool = True  # by the store; False: it failed, or was not asked after all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesFetched:
    job_id: int
    num_pages: int  # leading ones, complete and verified; the slots after them hold nothing of use


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesStored:
    job_id: int
    num_pages: int  # leading ones


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageAttached:
    """There is a store from now on, or none."""

    attached: bool


StoreJob = FindPages | FetchPages | StorePages | CancelFetch
TierJob = LoadPages | BackUpPages | ForgetPages | StoreJob
PageReport = PagesLoaded | PagesBackedUp | PagesForgotten
TierReport = PageReport | PagesFound | PagesFetched | PagesStored | StorageAttached

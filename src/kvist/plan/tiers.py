"""Jobs and reports of copies between tiers: a plan carries the jobs to the movers, events carry the reports back.

    PageMover (memory/)    LoadPages, BackUpPages, ForgetPages   device pool ◄─► host pool
    StoreMover (store/)    FindPages, FetchPages, StorePages     store ◄─► host pool

Every job except `CancelFetch` gets exactly one report, whether the copy succeeds or fails. Until the report of a copy,
its pages and host slots are not given to another request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PIECE_PAGES = 128  # most pages in one call of a store; the deadline of a store applies to each call


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPages:
    """Copy host pages into our device pool. Report: `PagesLoaded`."""

    job_id: int
    host_slots: tuple[int, ...]
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackUpPages:
    """Copy pages of our device pool into the host pool. Report: `PagesBackedUp`."""

    job_id: int
    page_ids: tuple[int, ...]
    host_slots: tuple[int, ...]
    names: tuple[tuple[bytes, bytes | None], ...] = field(default=(), repr=False)  # (digest, digest of the parent page)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetPages:
    """Erase the records of flushed host pages, so that no restart restores them. Report: `PagesForgotten`.

    The slots are free at once. Later backups into these slots run after this job. A fetch may run before it: the
    fetched page is then not restored either."""

    job_id: int
    host_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesForgotten:
    job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesLoaded:
    job_id: int
    ok: bool  # True: every byte is in place; False: the device pages hold no valid data


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesBackedUp:
    job_id: int
    ok: bool  # True: every byte is in place; False: the host slots hold no valid data


@dataclass(frozen=True, slots=True, kw_only=True)
class FindPages:
    """Look up pages in the store. Report: `PagesFound`."""

    job_id: int
    digests: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPages:
    """Copy pages of the store into the host pool. Report: `PagesFetched`."""

    job_id: int
    digests: tuple[bytes, ...] = field(repr=False)
    host_slots: tuple[int, ...]
    names: tuple[tuple[bytes, bytes | None], ...] = field(default=(), repr=False)  # as in `BackUpPages`


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePages:
    """Copy host pages into the store. Report: `PagesStored`."""

    job_id: int
    digests: tuple[bytes, ...] = field(repr=False)
    host_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelFetch:
    """Cancel the `FetchPages` with this id if its copy has not begun; the fetch gets its report all the same."""

    job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesFound:
    job_id: int
    num_pages: int  # leading pages that the store has; 0 on any failure
    answered: bool = True  # False: the store failed, or the look-up of some pages was skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesFetched:
    job_id: int
    num_pages: int  # leading pages that are complete and verified; the slots after them hold no valid data


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesStored:
    job_id: int
    num_pages: int  # leading pages that are in the store now


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageAttached:
    """A store was attached or detached."""

    attached: bool


StoreJob = FindPages | FetchPages | StorePages | CancelFetch
PageJob = LoadPages | BackUpPages | ForgetPages
TierJob = PageJob | StoreJob
PageReport = PagesLoaded | PagesBackedUp | PagesForgotten
StoreReport = PagesFound | PagesFetched | PagesStored
TierReport = PageReport | StoreReport | StorageAttached

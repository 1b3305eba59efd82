"""PURE. The workers that a gateway should use, and which sources name each of them.

A worker is a member from the first source that names it until no source names it any more. The sources are the flags,
`POST /workers`, the announcements of the worker itself, and each `--discovery`. An announcement counts until it is
withdrawn, or until `MISSED_ANNOUNCEMENTS` repeats are missing. Each method that changes the set returns the changes, in
order, for fleet.py to follow. Uses no sockets and no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NewType

from kvist.errors import Conflict, Overloaded, UnknownWorker
from kvist.request import Role

Source = NewType("Source", str)  # one of the three below, or the text of a --discovery
FLAGS, HTTP, ANNOUNCEMENT = Source("flags"), Source("http"), Source("announcement")
_OF_OPERATOR = (FLAGS, HTTP, ANNOUNCEMENT)  # sources that DELETE /workers overrules
MISSED_ANNOUNCEMENTS = 3
_MAX_DISMISSED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWorker:
    """A worker as one source names it."""

    url: str  # normalised (addresses.py)
    role: Role | None = None  # None: the role that the worker was started with
    api_key: str | None = field(default=None, repr=False)  # for the worker's HTTP server; None: the gateway's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    url: str
    instance: str  # names the process that announces itself: another process at this URL has another one
    interval_s: float  # until the next announcement


@dataclass(frozen=True, slots=True)
class Joined:
    worker: NamedWorker


@dataclass(frozen=True, slots=True)
class Left:
    """The worker gets no new request; its open requests may finish."""

    url: str


Change = Joined | Left


class Outcome(Enum):
    """The result of an announcement, or its end."""

    ACCEPTED = "accepted"  # the first one of the process
    REPEATED = "repeated"
    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Announced:
    instance: str
    expires_s: float


class Membership:
    """Mutable; owned by the gateway's members.py."""

    def __init__(self, *, max_workers: int) -> None:
        self._max_workers = max_workers
        self._named: dict[str, dict[Source, NamedWorker]] = {}
        self._announced: dict[str, _Announced] = {}
        self._dismissed: OrderedDict[str, str] = OrderedDict()  # URL → instance that DELETE /workers has removed
        self.num_announcements = dict.fromkeys(Outcome, 0)

    def sources(self) -> Mapping[str, tuple[Source, ...]]:
        """Return the sources of each member, by URL."""
        return {url: tuple(named) for url, named in self._named.items()}

    def add(self, source: Source, worker: NamedWorker) -> list[Change]:
        """Name a worker. Raises `Conflict` if another source names it with another role, `Overloaded` if there are as
        many workers as allowed."""
        self._check_role(source, worker)
        if worker.url not in self._named and len(self._named) >= self._max_workers:
            raise Overloaded(
                f"this gateway takes no more workers: --max-workers is {self._max_workers}; remove one, or raise it"
            )
        before = self._effective(worker.url)
        self._named.setdefault(worker.url, {})[source] = worker
        if source == HTTP:
            self._dismissed.pop(worker.url, None)
        return self._changes(worker.url, before)

    def remove(self, source: Source, url: str) -> list[Change]:
        """Withdraw one source's naming of a worker, if there is one."""
        before = self._effective(url)
        named = self._named.get(url, {})
        named.pop(source, None)
        if source == ANNOUNCEMENT:
            self._announced.pop(url, None)
        if not named:
            self._named.pop(url, None)
        return self._changes(url, before)

    def replace(self, source: Source, urls: Iterable[str]) -> tuple[list[Change], int]:
        """Replace all workers that the source names. Return the changes, and how many URLs were left out because there
        are as many workers as allowed."""
        wanted = dict.fromkeys(urls)
        changes, num_left_out = [], 0
        for url in [url for url, named in self._named.items() if source in named and url not in wanted]:
            changes += self.remove(source, url)
        for url in wanted:
            try:
                changes += self.add(source, NamedWorker(url=url))
            except Overloaded:
                num_left_out += 1
        return changes, num_left_out

    def dismiss(self, url: str) -> list[Change]:
        """Remove a worker for the operator: one named by flags, by `POST /workers` or by its own announcements, whose
        repeats are then refused. Raises `UnknownWorker`, and `Conflict` if a `--discovery` names the worker."""
        named = self._named.get(url)
        if named is None:
            raise UnknownWorker(f"there is no worker {url}: GET /workers lists the workers")
        others = [source for source in named if source not in _OF_OPERATOR]
        if others:
            raise Conflict(f"{url} is named by {others[0]}: remove it there")
        if url in self._announced:
            self._dismissed[url] = self._announced[url].instance
            self._dismissed.move_to_end(url)
            if len(self._dismissed) > _MAX_DISMISSED:
                self._dismissed.popitem(last=False)
        return [change for source in list(named) for change in self.remove(source, url)]

    # ---------------------------------------------------------------- announcements

    def announce(self, announcement: Announcement, now_s: float) -> list[Change]:
        """Name a worker until the announcement expires. Raises `Conflict` for a process that was removed by
        `DELETE /workers`, and `Overloaded`."""
        url, instance = announcement.url, announcement.instance
        if self._dismissed.get(url) == instance:
            raise Conflict(
                f"{url} was removed by DELETE /workers: to use it again, restart the worker or name it in POST /workers"
            )
        changes = self.add(ANNOUNCEMENT, NamedWorker(url=url))
        known = self._announced.get(url)
        self._count(Outcome.REPEATED if known is not None and known.instance == instance else Outcome.ACCEPTED)
        expires_s = now_s + MISSED_ANNOUNCEMENTS * announcement.interval_s
        self._announced[url] = _Announced(instance=instance, expires_s=expires_s)
        self._dismissed.pop(url, None)  # a new process at this URL
        return changes

    def withdraw(self, url: str, instance: str) -> list[Change]:
        """End the announcement of this process; the announcement of a later process at this URL stays."""
        known = self._announced.get(url)
        if known is None or known.instance != instance:
            return []
        self._count(Outcome.WITHDRAWN)
        return self.remove(ANNOUNCEMENT, url)

    def expire(self, now_s: float) -> list[Change]:
        """End the announcements whose repeats are missing."""
        due = [url for url, known in self._announced.items() if known.expires_s <= now_s]
        for _ in due:
            self._count(Outcome.EXPIRED)
        return [change for url in due for change in self.remove(ANNOUNCEMENT, url)]

    def postpone(self, pause_s: float) -> None:
        """Do not count a time in which this gateway did not run: the repeats may be waiting unread."""
        if pause_s:
            for url, known in self._announced.items():
                self._announced[url] = replace(known, expires_s=known.expires_s + pause_s)

    def _count(self, outcome: Outcome) -> None:
        self.num_announcements[outcome] += 1

    def _check_role(self, source: Source, worker: NamedWorker) -> None:
        for other, named in self._named.get(worker.url, {}).items():
            if other != source and None not in (named.role, worker.role) and named.role is not worker.role:
                raise Conflict(
                    f"{worker.url} is named as {worker.role}, but {other} names it as {named.role}: name it once, or "
                    "with the same role"
                )

    def _effective(self, url: str) -> NamedWorker | None:
        """Return the worker as all its sources together name it; None if there is no source."""
        named = self._named.get(url)
        if not named:
            return None
        roles = [worker.role for worker in named.values() if worker.role is not None]
        keys = [worker.api_key for worker in named.values()]
        return NamedWorker(url=url, role=roles[0] if roles else None, api_key=None if None in keys else keys[0])

    def _changes(self, url: str, before: NamedWorker | None) -> list[Change]:
        after = self._effective(url)
        if before == after:
            return []
        gone: list[Change] = [] if before is None else [Left(url)]
        return gone if after is None else [*gone, Joined(after)]

"""The members of a gateway at run time: takes what the sources say (membership.py); the links follow (fleet.py).

Owns the sources' state and counts; the operator and the workers change it over HTTP (server/workers.py). Tasks of this
module read each `--discovery` (sources.py), and end announcements that are not repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from kvist.bounded_log import BoundedLog
from kvist.channel import ClusterProof
from kvist.clock import Clock, PauseMeter
from kvist.errors import Forbidden, KvistError, Unavailable
from kvist.request import Role
from kvist.router.addresses import HostRule
from kvist.router.membership import (
    FLAGS,
    HTTP,
    Announcement,
    Change,
    Joined,
    Membership,
    NamedWorker,
    Outcome,
)
from kvist.router.registry import Registry
from kvist.router.sources import Discovery

logger = logging.getLogger(__name__)

_EXPIRY_CHECK_S = 0.25


class Links(Protocol):
    """The connections to the workers (fleet.py)."""

    def join(self, named: NamedWorker) -> None: ...

    def leave(self, url: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberCounts:
    announcements: Mapping[Outcome, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)  # requests to change the members, by error code
    discovery_failures: Mapping[str, int] = field(default_factory=dict)  # by --discovery


class Members:
    """Mutable; used in the gateway's event loop."""

    def __init__(
        self,
        *,
        membership: Membership,
        registry: Registry,
        links: Links,
        hosts: HostRule,
        proof: ClusterProof,
        discoveries: Sequence[Discovery] = (),
        clock: Clock,
    ) -> None:
        self._membership = membership
        self._registry = registry
        self._links = links
        self._hosts = hosts
        self._proof = proof
        self._clock = clock
        self._log = BoundedLog(logger)
        self._refused: Counter[str] = Counter()
        self._discoveries = discoveries
        self._failures: dict[str, int] = {each.source: 0 for each in discoveries}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to watch the sources. Call inside the running loop."""
        self._tasks.append(asyncio.create_task(self._expire_forever(), name="expiry of announcements"))
        self._tasks += [asyncio.create_task(self._watch(each), name=each.source) for each in self._discoveries]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def counts(self) -> MemberCounts:
        return MemberCounts(
            announcements=dict(self._membership.num_announcements),
            refused=dict(self._refused),
            discovery_failures=dict(self._failures),
        )

    # ---------------------------------------------------------------- what the sources say

    def name_by_flag(self, url: str, role: Role | None) -> None:
        self._follow(self._membership.add(FLAGS, NamedWorker(url=url, role=role)))

    def add(self, url: str, role: Role | None, *, sender: str, api_key: str | None) -> str:
        """Name a worker for the operator at the address `sender`. Return its URL. `api_key` is sent to the worker
        instead of the gateway's own key, which this operator might not know.

        Raises `RequestError`, `Forbidden`, `Conflict` or `Overloaded` if the worker is refused."""
        with self._counting_refusals("worker", url, sender):
            url = self._hosts.check(url, sender)
            self._follow(self._membership.add(HTTP, NamedWorker(url=url, role=role, api_key=api_key)))
        return url

    def remove(self, name: str, *, sender: str) -> str:
        """Remove a worker, named by its URL or id, for the operator. Return its URL. Raises `UnknownWorker`, and
        `Conflict` if a `--discovery` names the worker."""
        with self._counting_refusals("removal of worker", name, sender):
            url = self.url_of(name)
            self._follow(self._membership.dismiss(url))
        return url

    def announce(self, announcement: Announcement, *, sender: str, proof: str) -> str:
        """Name a worker as its own process does. Return its URL. Raises what `add` raises."""
        with self._counting_refusals("announcement of", announcement.url, sender):
            self._check_proof(proof, "POST", announcement.url, announcement.instance)
            url = self._hosts.check(announcement.url, sender)
            announced = Announcement(url=url, instance=announcement.instance, interval_s=announcement.interval_s)
            self._follow(self._membership.announce(announced, self._clock.now_s()))
        return url

    def withdraw(self, url: str, instance: str, *, sender: str, proof: str) -> None:
        """End the announcement of a process that stops."""
        with self._counting_refusals("withdrawal of", url, sender):
            self._check_proof(proof, "DELETE", url, instance)
            self._follow(self._membership.withdraw(self._hosts.check(url, sender), instance))

    def url_of(self, name: str) -> str:
        """Return the URL of the worker with this URL or id. Raises `UnknownWorker`."""
        return self._registry.named(name).url

    # ---------------------------------------------------------------- what follows

    def _follow(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change, Joined):
                self._links.join(change.worker)
                logger.info("worker %s joins", change.worker.url)
            else:
                self._links.leave(change.url)
                logger.info("worker %s leaves", change.url)
        sources = self._membership.sources()
        for worker in self._registry.workers:
            worker.sources = sources.get(worker.url, ())

    def _check_proof(self, proof: str, *words: str) -> None:
        if not self._proof.holds(proof, *words):
            raise Forbidden(
                "the announcement is not from a member of this cluster: start the worker and the gateway with the same "
                "--cluster-key-file"
            )

    @contextmanager
    def _counting_refusals(self, what: str, name: str, sender: str) -> Iterator[None]:
        try:
            yield
        except KvistError as error:
            self._refused[error.code] += 1
            self._log.warning("refused the %s %s by %s: %s", what, name[:200], sender, error.message)
            raise

    async def _watch(self, discovery: Discovery) -> None:
        problem = ""
        while True:
            try:
                urls = await discovery.read()
                changes, num_left_out = self._membership.replace(discovery.source, urls)
                self._follow(changes)
                reason = f"--max-workers leaves out {num_left_out} of its workers" if num_left_out else ""
            except Unavailable as error:
                reason = f"{error.message}; its workers stay as they are"
                self._failures[discovery.source] += 1
            if reason and reason != problem:
                logger.warning("--discovery %s: %s", discovery.source, reason)
            elif problem and not reason:
                logger.info("--discovery %s is read again", discovery.source)
            problem = reason
            await asyncio.sleep(discovery.interval_s)

    async def _expire_forever(self) -> None:
        pauses = PauseMeter(self._clock.now_s(), max_interval_s=2 * _EXPIRY_CHECK_S)
        while True:
            await asyncio.sleep(_EXPIRY_CHECK_S)
            now_s = self._clock.now_s()
            self._membership.postpone(pauses.measure_s(now_s))
            self._follow(self._membership.expire(now_s))

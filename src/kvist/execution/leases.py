"""The pins of a plan: leases on prefixes, renewed while they are needed and given back after their last use.

Taking a lease computes its prefix, so a prefix that is computed ahead and kept needs one request. Any other prefix is
leased once its first use has computed it: a lease before that would make the first use wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvist.errors import KvistError
from kvist.execution.backend import Backend, Hints
from kvist.execution.results import Served
from kvist.planning.plan import Pin

_RENEWALS_PER_TTL = 3
_END_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Held:
    pin: Pin
    users: set[int]
    taken: asyncio.Future[Served | None]
    lease_id: str | None = None
    used: asyncio.Event = field(default_factory=asyncio.Event)  # once, or ended
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        self.used.set()
        self.ended.set()


class Leases:
    """Mutable; owned by one executor, in its loop. A lease that its client does not renew ends by itself."""

    def __init__(self, backend: Backend, *, ttl_s: float) -> None:
        self._backend, self._ttl_s = backend, ttl_s
        self._held: dict[tuple[str, str | None], _Held] = {}  # by outline and worker
        self._tasks: set[asyncio.Task[None]] = set()
        self.problems: list[str] = []

    def hold(
        self, pin: Pin, *, unfinished: Iterable[int], ahead: bool, after: asyncio.Task[None] | None = None
    ) -> asyncio.Future[Served | None]:
        """Take a lease for the uses that are not finished: `ahead` of them, once `after` is done, or when the first of
        them is done. Return how its prefix was computed, perhaps to come; None: there is no lease."""
        held = _Held(pin, set(unfinished), asyncio.get_running_loop().create_future())
        key = (pin.prompt.outline, pin.worker)
        if key in self._held or not held.users:
            held.taken.set_result(None)
            return held.taken
        self._held[key] = held
        task = asyncio.create_task(self._keep(held, ahead, after))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return held.taken

    def used(self, operation_id: int) -> None:
        """Record that an operation is done; the lease ends with its last use."""
        for key, held in list(self._held.items()):
            if operation_id not in held.users:
                continue
            held.users.discard(operation_id)
            held.used.set()
            if not held.users:
                held.end()
                del self._held[key]

    @property
    def outlines(self) -> frozenset[str]:
        return frozenset(outline for outline, _ in self._held)

    @property
    def num_tokens(self) -> int:
        return sum(held.pin.num_tokens for held in self._held.values())

    async def close(self) -> None:
        """End all leases. Takes bounded time; a lease whose end does not reach the server expires."""
        for held in self._held.values():
            held.end()
        self._held.clear()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_END_TIMEOUT_S)
            for task in late:
                task.cancel()

    async def _keep(self, held: _Held, ahead: bool, after: asyncio.Task[None] | None) -> None:
        hints = Hints(worker=held.pin.worker)
        try:
            if after is not None:
                await asyncio.wait([after], timeout=self._ttl_s)
            if not ahead:
                await held.used.wait()
            while not held.ended.is_set():
                leased = await self._backend.lease(held.pin.prompt, held.lease_id, self._ttl_s, hints)
                if leased is None:
                    self.problems.append("the server has no room for a lease: the prefix may be evicted")
                    return
                held.lease_id = leased.lease_id
                if not held.taken.done():
                    held.taken.set_result(leased.served)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(held.ended.wait(), self._ttl_s / _RENEWALS_PER_TTL)
            if held.lease_id is not None:
                await asyncio.wait_for(self._backend.lease(held.pin.prompt, held.lease_id, 0, hints), _END_TIMEOUT_S)
        except (KvistError, TimeoutError) as error:
            self.problems.append(f"a lease failed: {error}")  # the pages may be evicted; the answers stay the same
        finally:
            if not held.taken.done():
                held.taken.set_result(None)

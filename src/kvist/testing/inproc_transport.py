"""The transport between pools of one process: no thread, `poll` does the work.

Pools find each other through a `PoolDirectory`, which also acts as the host: it knows which epochs are over.
"""

from __future__ import annotations

from collections.abc import Callable

from kvist.errors import Unavailable
from kvist.plan.transfers import TransferReport, VerifyPages, WritePages
from kvist.request import EpochId, HandoffId
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.jobs import TransferJobs, in_groups
from kvist.wire import PoolAddress

INPROC = "inproc"


class PoolDirectory:
    """The pools of one process by location (their engine's epoch). Mutable, single-threaded."""

    def __init__(self) -> None:
        self._pools: dict[str, Pages] = {}
        self._dead: set[EpochId] = set()

    def publish(self, epoch: EpochId, pages: Pages) -> None:
        self._pools[epoch] = pages

    def kill(self, epoch: EpochId) -> None:
        """End the engine of this epoch and remove its pool."""
        self._pools.pop(epoch, None)
        self._dead.add(epoch)

    def is_dead(self, epoch: EpochId) -> bool:
        return epoch in self._dead

    def pages_of(self, location: str) -> Pages | None:
        return self._pools.get(location)


class InprocTransport:
    def __init__(
        self, *, address: PoolAddress, pages: Pages, directory: PoolDirectory, wakeup: Callable[[], None]
    ) -> None:
        assert address.transport == INPROC
        self._directory = directory
        self._wakeup = wakeup
        own = HostPages(pages)
        self._jobs = TransferJobs(
            address=address, pages=own, copies=in_groups(own), open_peer=self._open_peer, wakeup=wakeup
        )
        directory.publish(EpochId(address.location), pages)

    @property
    def address(self) -> PoolAddress:
        return self._jobs.address

    def write(self, job: WritePages) -> None:
        self._jobs.write(job)
        self._wakeup()  # `poll` does the work, so ask for a call

    def verify(self, job: VerifyPages) -> None:
        self._jobs.verify(job)
        self._wakeup()

    def stop(self, handoff_id: HandoffId) -> None:
        self._jobs.stop(handoff_id)
        self._wakeup()

    def poll(self) -> list[TransferReport]:
        while self._jobs.work_one(wait=False):
            pass
        return self._jobs.poll()

    def peer_is_dead(self, epoch: EpochId) -> bool:
        return self._directory.is_dead(epoch)

    def close(self) -> None:
        self._jobs.close()

    def _open_peer(self, address: PoolAddress) -> Pages:
        pages = self._directory.pages_of(address.location)
        if pages is None:
            raise Unavailable(f"the peer has ended: no pool {address.location!r} in this process")
        if pages.shape != (address.num_pages, address.page_bytes):
            raise Unavailable(f"the pool {address.location!r} is {pages.shape}, not what its address claims")
        return pages

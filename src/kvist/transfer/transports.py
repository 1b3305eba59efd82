"""All transports of one engine behind the interface of one.

The scheduler chooses the transport of a handoff (plan/compat.py): a write names it in the peer's address, a
verification by its name. A stop goes to the transport that writes the handoff's pages.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from kvist.clock import Clock, MonotonicClock
from kvist.plan.transfers import PagesVerified, TransferReport, VerifyPages, WritePages, WritesFailed
from kvist.request import EpochId, HandoffId
from kvist.transfer.epoch import MAX_WATCHED, EpochWatch
from kvist.transfer.jobs import MAX_HANDOFFS
from kvist.transfer.liveness import PeerContact
from kvist.transfer.transport import OfferedTransport, Revocable
from kvist.wire import Closed, Grant, PeerMessage, Ping, Pong, PoolAddress


class Transports:
    """As `Transport`. Mutable; used by the engine loop's thread."""

    def __init__(
        self,
        offered: Mapping[str, OfferedTransport],
        *,
        watch: EpochWatch,
        wakeup: Callable[[], None],
        settle_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        """`settle_s`: the longest time after the end of a peer's process during which its last writes may still arrive
        by one of the transports."""
        self._offered = offered
        self._revocable = [each for each in offered.values() if isinstance(each, Revocable)]
        self._watch = watch
        self._contact = PeerContact()
        self._wakeup = wakeup
        self._settle_s = settle_s
        self._clock = clock or MonotonicClock()
        self._found_dead_s: OrderedDict[EpochId, float] = OrderedDict()
        self._writers: OrderedDict[HandoffId, OfferedTransport] = OrderedDict()  # the newest handoffs
        self._refused: deque[TransferReport] = deque()

    @property
    def addresses(self) -> tuple[PoolAddress, ...]:
        """The addresses of our pool, one per transport, best first."""
        return tuple(each.address for each in self._offered.values())

    def offered(self, name: str) -> OfferedTransport:
        return self._offered[name]

    def addresses_for(self, epoch: EpochId) -> tuple[PoolAddress, ...]:
        """Return the addresses through which the peer of that epoch may write."""
        return tuple(
            each.address_for(epoch) if isinstance(each, Revocable) else each.address for each in self._offered.values()
        )

    def sending(self, message: PeerMessage, endpoint: str | None = None) -> PeerMessage:
        """Complete a message to a peer: a Grant with our windows for it, a Closed with whether writes are under way."""
        self._contact.on_sent(message, endpoint, self._clock.now_s())
        for transport in self._revocable:
            if isinstance(message, Grant):
                message = transport.granted(message)
            elif isinstance(message, Closed) and transport.is_unsettled(message.handoff_id):
                message = msgspec.structs.replace(message, unsettled=True)
        return message

    def received(self, message: PeerMessage) -> Pong | None:
        """Note a message of a peer, before the scheduler gets it: when this returns, no byte of an unsettled handoff
        can arrive any more. Return the answer to a ping."""
        if isinstance(message, Closed) and message.unsettled:
            for transport in self._revocable:
                transport.settle(message)
        return self._contact.on_received(message, self._clock.now_s())

    def pings(self, own: EpochId, epochs: Iterable[EpochId]) -> list[tuple[str, Ping]]:
        """Return the pings to prefill engines of other hosts, each with its endpoint."""
        return self._contact.pings(own, [epoch for epoch in epochs if not self._watch.is_here(epoch)])

    def write(self, job: WritePages) -> None:
        transport = self._offered.get(job.pool.transport)
        if transport is None:
            self._refuse(WritesFailed(handoff_id=job.handoff_id, message=self._unknown(job.pool.transport)))
            return
        self._writers[job.handoff_id] = transport
        self._writers.move_to_end(job.handoff_id)
        while len(self._writers) > MAX_HANDOFFS:
            self._writers.popitem(last=False)
        transport.write(job)

    def verify(self, job: VerifyPages) -> None:
        transport = self._offered.get(job.transport)
        if transport is None:
            self._refuse(PagesVerified(handoff_id=job.handoff_id, checksum=""))  # equals no writer's checksum
            return
        transport.verify(job)

    def stop(self, handoff_id: HandoffId) -> None:
        """Stop the writes of a handoff. Of an unknown one no page was written, which any transport can answer."""
        any_transport = next(iter(self._offered.values()))
        self._writers.get(handoff_id, any_transport).stop(handoff_id)

    def poll(self) -> list[TransferReport]:
        reports = list(self._refused)
        self._refused.clear()
        for transport in self._offered.values():
            reports += transport.poll()
        return reports

    def peer_is_dead(self, epoch: EpochId) -> bool:
        dead = [transport.peer_is_dead(epoch) for transport in self._offered.values()]  # each drops what it has mapped
        if any(dead):
            self._revoke(epoch)
            return self._has_settled(epoch)
        elsewhere = bool(self._revocable) and not self._watch.is_here(epoch)
        if not elsewhere or not self._contact.is_silent(epoch, self._clock.now_s()):
            return False
        self._revoke(epoch)  # from here on its life does not matter: it cannot write any more
        self._contact.forget(epoch)
        return True

    def close(self) -> None:
        for transport in self._offered.values():
            transport.close()
        self._watch.close()

    def _revoke(self, epoch: EpochId) -> None:
        for transport in self._revocable:
            transport.revoke(epoch)

    def _has_settled(self, epoch: EpochId) -> bool:
        now_s = self._clock.now_s()
        while epoch not in self._found_dead_s and len(self._found_dead_s) >= MAX_WATCHED:
            self._found_dead_s.popitem(last=False)
        return now_s - self._found_dead_s.setdefault(epoch, now_s) >= self._settle_s

    def _refuse(self, report: TransferReport) -> None:
        self._refused.append(report)
        self._wakeup()

    def _unknown(self, name: str) -> str:
        return f"the peer's pool uses the transport {name!r}, and this engine offers {', '.join(self._offered)}"

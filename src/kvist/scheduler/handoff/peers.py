"""The engines that this engine has met in handoffs: whether pages may travel between them, and by which transport."""

from __future__ import annotations

import math

from kvist.plan.compat import TransportChoice, meet
from kvist.request import EpochId
from kvist.scheduler.handoff.memory import ExpiringMap
from kvist.wire import PeerSpec

MAX_KNOWN_PEERS = 4096


class KnownPeers:
    """Compares each engine once in its life, at the first handoff. Mutable; its one owner is a handoff side.

    A spec is fixed for the life of its process, so the result is valid as long as the epoch is."""

    def __init__(self, own: PeerSpec) -> None:
        self._own = own
        self._choices: ExpiringMap[EpochId, TransportChoice] = ExpiringMap(capacity=MAX_KNOWN_PEERS, max_age_s=math.inf)

    def to(self, epoch: EpochId, target: PeerSpec) -> TransportChoice:
        """Return the transport of handoffs from this engine to `target`."""
        return self._choices.get(epoch) or self._remember(epoch, meet(self._own, target))

    def from_(self, epoch: EpochId, source: PeerSpec) -> TransportChoice:
        """Return the transport of handoffs from `source` to this engine."""
        return self._choices.get(epoch) or self._remember(epoch, meet(source, self._own))

    def _remember(self, epoch: EpochId, choice: TransportChoice) -> TransportChoice:
        self._choices.put(epoch, choice, 0.0)
        return choice

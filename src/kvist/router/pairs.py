"""Which prefill and decode workers can hand requests over to each other, and how. No sockets, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvist.plan.compat import TransportChoice, meet
from kvist.request import EpochId
from kvist.router.handoff_ways import HandoffWay, choose_way
from kvist.router.registry import Worker
from kvist.wire import EngineSpec

MAX_PAIRS = 1 << 16  # remembered choices


class Pairs:
    """Compares each pair of engines once, and remembers the newest `MAX_PAIRS` results. Mutable; the router's."""

    def __init__(self, wanted: str = "auto") -> None:
        """`wanted`: one of `config.HANDOFFS`."""
        self._wanted = wanted
        self._choices: OrderedDict[tuple[EpochId, EpochId], TransportChoice] = OrderedDict()

    def choice(self, prefill: EngineSpec, decode: EngineSpec) -> TransportChoice:
        """Return the transport of handoffs from one engine to the other, or why there is none."""
        key = prefill.epoch, decode.epoch
        found = self._choices.get(key)
        if found is None:
            while len(self._choices) >= MAX_PAIRS:
                self._choices.popitem(last=False)
            found = self._choices[key] = meet(prefill, decode)
        return found

    def way(self, prefill: Worker, decode: Worker) -> HandoffWay:
        """Return the way of handoffs from one worker to the other, at this time: a store may come and go."""
        assert prefill.spec is not None
        assert decode.spec is not None
        return choose_way(self._wanted, prefill, decode, self.choice(prefill.spec, decode.spec))

    def may_pair(self, prefill: Worker, decode: Worker) -> bool:
        assert prefill.spec is not None
        assert decode.spec is not None
        # with a common transport there is always a way; every pair is looked at for every request
        return self.choice(prefill.spec, decode.spec).name is not None or self.way(prefill, decode).way is not None

    def with_partner(
        self, prefill: Sequence[Worker], decode: Sequence[Worker]
    ) -> tuple[Sequence[Worker], Sequence[Worker]]:
        """Keep the prefill and decode workers that have a partner among the others."""
        pairs = [(p, d) for p in prefill for d in decode if self.may_pair(p, d)]
        if len(pairs) == len(prefill) * len(decode):
            return prefill if decode else (), decode if prefill else ()
        readers, writers = {p for p, _ in pairs}, {d for _, d in pairs}
        return [p for p in prefill if p in readers], [d for d in decode if d in writers]

    def problems(self, prefill: Sequence[Worker], decode: Sequence[Worker]) -> list[str]:
        """Return why each pair cannot hand requests over; each text once."""
        ways = [self.way(p, d) for p in prefill for d in decode]
        return list(dict.fromkeys(way.reason for way in ways if way.way is None))

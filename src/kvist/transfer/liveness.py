"""Whether peers on other hosts answer. Pure: the caller sends the pings and passes on what arrives.

On this host the kernel proves the end of a process (epoch.py). No one can prove the end of a process on another host,
and none has to: a peer that is silent for `SILENCE_S` loses its access (mooncake.py), and then it is as good as dead
for our pages. If the peer lives and only the network was down, its writes are refused, the handoffs fail, and the next
Grant gives it a new window.

    decode ── Ping ──► prefill       while decode has a handoff with prefill
    decode ◄── Pong ── prefill

Every other message of a handoff counts as an answer, too. By the pings prefill knows that decode lives; if decode is
taken for dead, prefill stops its writes before it releases the pages that it reads from, as after any death.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from kvist.request import EpochId
from kvist.wire import Grant, PeerMessage, Ping, Pong, TargetToSource

SILENCE_S = 10.0
MAX_CONTACTS = 1024
_PAUSE_S = 5.0


@dataclass(slots=True)
class _Contact:
    """Mutable."""

    endpoint: str | None  # None: not known, because the peer is a decode engine, which sends the pings
    heard_s: float
    asked_s: float  # the last question whether the peer is silent


class PeerContact:
    """Our contact with peers on other hosts. Mutable; its one owner is the `Transports`."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._contacts: OrderedDict[EpochId, _Contact] = OrderedDict()  # the latest met

    def on_sent(self, message: PeerMessage, endpoint: str | None, now_s: float) -> None:
        """Remember the endpoint of a prefill engine to which a Grant is sent."""
        if isinstance(message, Grant) and endpoint is not None:
            self._contact(message.source_epoch, now_s).endpoint = endpoint

    def on_received(self, message: PeerMessage, now_s: float) -> Pong | None:
        """Note that a peer has answered. Return the answer to a ping."""
        sender = message.target_epoch if isinstance(message, TargetToSource) else message.source_epoch
        self._contact(sender, now_s).heard_s = now_s
        if isinstance(message, Ping):
            return Pong(target_epoch=message.target_epoch, source_epoch=message.source_epoch)
        return None

    def pings(self, own: EpochId, epochs: Iterable[EpochId]) -> list[tuple[str, Ping]]:
        """Return the pings to the prefill engines among `epochs`, each with its endpoint."""
        known = ((epoch, self._contacts[epoch].endpoint) for epoch in sorted(epochs) if epoch in self._contacts)
        return [
            (endpoint, Ping(target_epoch=own, source_epoch=epoch)) for epoch, endpoint in known if endpoint is not None
        ]

    def is_silent(self, epoch: EpochId, now_s: float) -> bool:
        """Return whether no message has come for too long. Asked every second while there are handoffs with the peer:
        after a pause without pings the time starts again."""
        contact = self._contact(epoch, now_s)
        if now_s - contact.asked_s > _PAUSE_S:
            contact.heard_s = now_s
        contact.asked_s = now_s
        return now_s - contact.heard_s >= self._silence_s

    def forget(self, epoch: EpochId) -> None:
        """Start again with a peer that was silent: its next handoff finds it alive, or silent once more."""
        self._contacts.pop(epoch, None)

    def _contact(self, epoch: EpochId, now_s: float) -> _Contact:
        if epoch not in self._contacts:
            while len(self._contacts) >= MAX_CONTACTS:
                self._contacts.popitem(last=False)
            self._contacts[epoch] = _Contact(endpoint=None, heard_s=now_s, asked_s=now_s)
        self._contacts.move_to_end(epoch)
        return self._contacts[epoch]

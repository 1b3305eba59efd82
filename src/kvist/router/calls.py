"""PURE. Calls to several workers at once, each with the answers received so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvist import wire
from kvist.lease_messages import LeaseCommand
from kvist.request import WorkerId
from kvist.router.registry import Worker

FIRST_VERSIONS: Mapping[type[wire.Command], int] = {
    wire.SetRole: 5,
    LeaseCommand: 6,
}  # of the engines that know a newer command


@dataclass(slots=True, eq=False)
class Call:
    """Mutable; owned by `Calls`."""

    waiting: set[Worker]
    answers: dict[WorkerId, wire.Answer] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return not self.waiting


class Calls:
    """The open calls of a gateway. Mutable, with one owner. Methods return the calls that became complete."""

    def __init__(self) -> None:
        self._open: dict[str, Call] = {}

    def begin(self, call_id: str, workers: set[Worker]) -> Call:
        call = self._open[call_id] = Call(set(workers))
        return call

    def forget(self, call_id: str) -> None:
        del self._open[call_id]

    def on_answer(self, worker: Worker, answer: wire.Answer) -> list[Call]:
        call = self._open.get(answer.call_id)
        if call is None or worker not in call.waiting:
            return []
        call.answers[worker.worker_id] = answer
        return self._settle([call], worker)

    def on_lost(self, worker: Worker) -> list[Call]:
        """Handle the loss of a worker, or a command that cannot be sent to it."""
        return self._settle([call for call in self._open.values() if worker in call.waiting], worker)

    @staticmethod
    def _settle(calls: list[Call], worker: Worker) -> list[Call]:
        for call in calls:
            call.waiting.discard(worker)
        return [call for call in calls if call.is_complete]

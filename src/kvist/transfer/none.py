"""The transport of an engine whose pages cannot be handed over: every write fails and says why.

For a unified engine on a GPU, until there is a transport for device memory: it serves whole requests, and answers a
prefill request with a clear failure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvist.request import EpochId, HandoffId
from kvist.scheduler.events import PagesVerified, WritesCompleted, WritesFailed
from kvist.scheduler.plan import VerifyPages, WritePages
from kvist.transfer import TransferReport
from kvist.transfer.checksum import RunningChecksum
from kvist.transfer.epoch import EpochWatch

NONE = "none"


class NoTransport:
    def __init__(self, *, reason: str, runtime_dir: Path, wakeup: Callable[[], None]) -> None:
        self._reason = reason
        self._watch = EpochWatch(runtime_dir)
        self._wakeup = wakeup
        self._reports: list[TransferReport] = []

    def write(self, job: WritePages) -> None:
        self._report(WritesFailed(handoff_id=job.handoff_id, message=self._reason))

    def verify(self, job: VerifyPages) -> None:
        # No peer can have written: the checksum of nothing equals no writer's.
        self._report(PagesVerified(handoff_id=job.handoff_id, checksum=""))

    def stop(self, handoff_id: HandoffId) -> None:
        nothing = RunningChecksum().hexdigest()
        self._report(WritesCompleted(handoff_id=handoff_id, num_pages=0, checksum=nothing))

    def poll(self) -> list[TransferReport]:
        reports, self._reports = self._reports, []
        return reports

    def peer_is_dead(self, epoch: EpochId) -> bool:
        return self._watch.is_dead(epoch)

    def close(self) -> None:
        self._watch.close()

    def _report(self, report: TransferReport) -> None:
        self._reports.append(report)
        self._wakeup()

"""A worker that reads prompts and writes answers (FULL), and prefills for decode workers (PREFILL) when asked to."""

from __future__ import annotations

from kvist.request import Mode
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.source import SourceHalf
from kvist.scheduler.steps import RoleParts, Steps
from kvist.wire import Submit


def unified_scheduler(parts: RoleParts) -> Steps:
    table = RequestTable(parts.config, parts.cache, refuse_mode=_refuse_mode)
    source = SourceHalf(table, epoch=parts.epoch, pool=parts.pool)
    return Steps(table, source, source.handlers())


def _refuse_mode(event: Submit) -> str | None:
    if event.mode is Mode.DECODE:
        return "this worker is unified: it cannot take over pages; send decode requests to a decode worker"
    return None

"""A worker that reads prompts for decode workers. A whole request is its affair only when one token is all it asks."""

from __future__ import annotations

from kvist.request import Mode
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.source import SourceHalf
from kvist.scheduler.steps import RoleParts, Steps
from kvist.wire import Submit


def prefill_scheduler(parts: RoleParts) -> Steps:
    table = RequestTable(parts.config, parts.cache, refuse_mode=_refuse_mode)
    source = SourceHalf(table, epoch=parts.epoch, pool=parts.pool)
    return Steps(table, source, source.handlers())


def _refuse_mode(event: Submit) -> str | None:
    if event.mode is Mode.PREFILL or (event.mode is Mode.FULL and event.request.sampling.max_tokens == 1):
        return None
    return "this is a prefill worker: it reads prompts and writes one token; send the rest to a decode worker"

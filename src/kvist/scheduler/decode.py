"""A worker that takes over prompts that others have read, and writes their answers."""

from __future__ import annotations

from kvist.request import Mode
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.steps import RoleParts, Steps
from kvist.scheduler.target import TargetHalf
from kvist.wire import Submit


def decode_scheduler(parts: RoleParts) -> Steps:
    table = RequestTable(parts.config, parts.cache, refuse_mode=_refuse_mode)
    target = TargetHalf(table, epoch=parts.epoch, pool=parts.pool)
    return Steps(table, target, target.handlers())


def _refuse_mode(event: Submit) -> str | None:
    if event.mode is Mode.DECODE:
        return None
    return "this is a decode worker: it does not read prompts; send the request to the router"

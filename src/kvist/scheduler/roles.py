"""Builds the scheduler of a role. Roles differ in their side of the handoffs and in the modes that they refuse.

unified   computes whole requests (FULL), and prompts for decode workers (PREFILL)
prefill   computes prompts for decode workers (PREFILL), and whole requests (FULL) of one output token
decode    takes over requests whose prompts another engine has computed (DECODE), and generates their answers
"""

from __future__ import annotations

from collections.abc import Callable

from kvist.kv.cache import PageCache
from kvist.request import EpochId, Mode
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.source import SourceSide
from kvist.scheduler.steps import Steps
from kvist.scheduler.target import TargetSide
from kvist.wire import PoolAddress, Submit


def _refuse_unified(event: Submit) -> str | None:
    if event.mode is Mode.DECODE:
        return "this worker has the role unified: it does not take over pages. Send decode requests to a decode worker"
    return None


def _refuse_prefill(event: Submit) -> str | None:
    if event.mode is Mode.PREFILL or (event.mode is Mode.FULL and event.request.sampling.max_tokens == 1):
        return None
    return "this worker has the role prefill: it computes prompts and one token. Send longer requests to the router"


def _refuse_decode(event: Submit) -> str | None:
    if event.mode is Mode.DECODE:
        return None
    return "this worker has the role decode: it does not compute prompts. Send the request to the router"


_ROLES: dict[str, tuple[type[SourceSide | TargetSide], Callable[[Submit], str | None]]] = {
    "unified": (SourceSide, _refuse_unified),
    "prefill": (SourceSide, _refuse_prefill),
    "decode": (TargetSide, _refuse_decode),
}


def build_scheduler(
    role: str, config: SchedulerConfig, cache: PageCache, epoch: EpochId, pool_address: PoolAddress
) -> Steps:
    """Build a scheduler. `role` is "unified", "prefill" or "decode"; at `pool_address` peers find our pages."""
    side_type, refuse_mode = _ROLES[role]
    table = RequestTable(config, cache, refuse_mode=refuse_mode)
    side = side_type(table, epoch=epoch, pool=pool_address)
    return Steps(table, side, side.handlers())

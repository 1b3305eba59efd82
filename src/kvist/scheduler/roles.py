"""What the roles differ in: which side of the handoffs they are, and what they refuse.

unified   reads prompts and writes answers (FULL), and prefills for decode workers (PREFILL) when asked to
prefill   reads prompts for decode workers; a whole request is its affair only when one token is all it asks
decode    takes over prompts that others have read, and writes their answers
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
        return "this worker is unified: it cannot take over pages; send decode requests to a decode worker"
    return None


def _refuse_prefill(event: Submit) -> str | None:
    if event.mode is Mode.PREFILL or (event.mode is Mode.FULL and event.request.sampling.max_tokens == 1):
        return None
    return "this is a prefill worker: it reads prompts and writes one token; send the rest to a decode worker"


def _refuse_decode(event: Submit) -> str | None:
    if event.mode is Mode.DECODE:
        return None
    return "this is a decode worker: it does not read prompts; send the request to the router"


_ROLES: dict[str, tuple[type[SourceSide | TargetSide], Callable[[Submit], str | None]]] = {
    "unified": (SourceSide, _refuse_unified),
    "prefill": (SourceSide, _refuse_prefill),
    "decode": (TargetSide, _refuse_decode),
}


def build_scheduler(
    role: str, config: SchedulerConfig, cache: PageCache, epoch: EpochId, pool_address: PoolAddress
) -> Steps:
    """`role` is "unified", "prefill" or "decode"; `pool_address` is where peers find our pages."""
    side_type, refuse_mode = _ROLES[role]
    table = RequestTable(config, cache, refuse_mode=refuse_mode)
    side = side_type(table, epoch=epoch, pool=pool_address)
    return Steps(table, side, side.handlers())

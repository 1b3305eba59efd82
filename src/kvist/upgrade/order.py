"""PURE. The order in which `kvist upgrade` replaces the processes of a cluster, and how each of them is replaced.

    master ─► stores, one by one ─► workers, one by one ─► router

The router is the last: neighbouring protocol versions interwork, and a router of the old version uses no field that a
new worker lacks. Every process is replaced in one of three ways:

- START_FIRST: the new process starts on a new port, takes over, and the old one drains. Nothing is lost if it fails.
- STOP_FIRST: the old process drains, then the new one starts with its port, GPU and folders; if the new one fails, the
  old version starts again. For processes that hold something that two cannot share.
- HAND_OVER: the new router accepts connections on the socket of the old one, which serves its open ones to their end.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.errors import ConfigError


class Order(enum.StrEnum):
    """The order of stop and start of each worker, as the operator asks for it."""

    AUTO = "auto"
    START_FIRST = "start-first"
    STOP_FIRST = "stop-first"


class How(enum.StrEnum):
    START_FIRST = "start first"
    STOP_FIRST = "stop first"
    HAND_OVER = "hand over"


class Kind(enum.Enum):
    """The kinds of processes, in the order in which they are replaced."""

    MASTER = 0
    STORE = 1
    WORKER = 2
    ROUTER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process of the cluster."""

    name: str
    kind: Kind
    has_gpu: bool = False  # a worker whose GPU has hardly room for a second one
    folder: Path | None = None  # for one process only: of a worker's host tier, of a store's SSD


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The replacement of one process. `empties`: a store moves its pages to the other stores before it stops."""

    name: str
    kind: Kind
    how: How
    empties: bool = False


def plan_upgrade(parts: Sequence[Part], order: Order) -> tuple[Step, ...]:
    """Return the steps, in order. Raises `ConfigError` if the order would interrupt the service or cannot work."""
    num_workers = sum(part.kind is Kind.WORKER for part in parts)
    num_stores = sum(part.kind is Kind.STORE for part in parts)
    steps = []
    for part in sorted(parts, key=lambda part: part.kind.value):  # a stable sort
        match part.kind:
            case Kind.ROUTER:
                how = How.HAND_OVER
            case Kind.WORKER:
                how = _how_of_worker(part, order, num_workers)
            case _:
                how = How.STOP_FIRST  # workers serve without their pool meanwhile
        empties = part.kind is Kind.STORE and part.folder is None and num_stores > 1
        steps.append(Step(name=part.name, kind=part.kind, how=how, empties=empties))
    return tuple(steps)


def _how_of_worker(part: Part, order: Order, num_workers: int) -> How:
    if order is Order.START_FIRST and part.folder is not None:
        raise ConfigError(
            f"--order start-first: {part.name} and its successor cannot use the folder {part.folder} "
            "(--hicache-persist) at once: use --order stop-first",
            param="order",
        )
    is_tied = part.has_gpu or part.folder is not None
    if order is Order.START_FIRST or (order is Order.AUTO and not is_tied):
        return How.START_FIRST
    if num_workers > 1:
        return How.STOP_FIRST
    if part.folder is not None:
        why, remedy = f"only one process can use its folder {part.folder}", "run kvist up with a second worker"
    else:
        why = "its GPU may lack memory for two workers" if order is Order.AUTO else "--order stop-first stops it"
        remedy = "try --order start-first, or run kvist up with a second worker"
    raise ConfigError(
        f"{part.name} is the only worker, and no other one can serve while it is replaced: {why}. To upgrade without a "
        f"break, {remedy}",
        param="order",
    )

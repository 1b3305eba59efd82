"""The faults of a chaos run: which process fails when, and how. PURE: the same seed gives the same faults.

The faults have an order and earliest times. A fault waits while it would leave no worker that can serve, so the same
seed gives the same faults in the same order, at times that depend on how fast the machine restarts its processes.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

GATEWAY = "gateway"
SHARE_OF_BLACKOUTS = 0.08
_STOP_S = (0.3, 6.0)  # shorter and longer than the silence after which a worker counts as lost
_BLACKOUT_S = (1.0, 5.0)


class Fault(enum.StrEnum):
    KILL_ENGINE = "kill engine"  # SIGKILL; its HTTP process restarts it
    KILL_HTTP = "kill HTTP process"  # SIGKILL; its engine notices and ends
    KILL_BOTH = "kill"  # SIGKILL of all processes of the victim, as when its host dies
    STOP_ENGINE = "stop engine"  # SIGSTOP, then SIGCONT
    STOP_BOTH = "stop"  # SIGSTOP and SIGCONT of all processes of the victim
    STOP_KILL = "stop, then kill"  # SIGSTOP, then SIGKILL: the connection closes late
    RESTART = "restart"  # SIGTERM: the victim ends in order, and is started again
    BLACKOUT = "blackout"  # SIGKILL of all workers of one role, which stay dead for a while

    @property
    def is_stop(self) -> bool:
        return self in (Fault.STOP_ENGINE, Fault.STOP_BOTH, Fault.STOP_KILL)


_OF_WORKERS = {
    Fault.KILL_ENGINE: 4,
    Fault.KILL_HTTP: 2,
    Fault.KILL_BOTH: 4,
    Fault.STOP_ENGINE: 2,
    Fault.STOP_BOTH: 2,
    Fault.STOP_KILL: 1,
    Fault.RESTART: 2,
}
_OF_GATEWAYS = {Fault.KILL_BOTH: 2, Fault.STOP_BOTH: 2, Fault.RESTART: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    fault: Fault
    victims: tuple[str, ...]  # one, or all of a role
    at_s: float  # earliest time, since the start of the load
    for_s: float = 0.0  # until SIGCONT, the SIGKILL after a stop, or the restart after a blackout


def role_of(name: str) -> str:
    """Return "prefill" of "prefill-1"."""
    return name.rpartition("-")[0]


def plan_faults(
    names: Sequence[str], *, seed: int, seconds: float, interval_s: float, has_blackouts: bool
) -> list[PlannedFault]:
    """Return the faults in order. `names`: of all processes that may fail, "ROLE-NUMBER" each; `interval_s`: mean time
    between two faults. With blackouts, each role that is not the only one is dead as a whole at least once."""
    assert names
    draw = random.Random(seed)
    dark = blackouts(names) if has_blackouts else []
    faults, at_s = [], draw.uniform(0.5, 1.5) * interval_s
    first = draw.sample(dark, len(dark))  # each of them once, spread over the run
    due_s = [seconds * (place + draw.random()) / max(1, len(first)) for place in range(len(first))]
    while due_s or at_s < seconds:
        if due_s and at_s >= due_s[0]:  # also where the next other fault would come after the end
            for_s = draw.uniform(*_BLACKOUT_S)
            faults.append(PlannedFault(fault=Fault.BLACKOUT, victims=first.pop(), at_s=due_s.pop(0), for_s=for_s))
            continue
        if dark and draw.random() < SHARE_OF_BLACKOUTS:
            victims, fault, for_s = draw.choice(dark), Fault.BLACKOUT, draw.uniform(*_BLACKOUT_S)
        else:
            victims = (draw.choice(names),)
            kinds = _OF_GATEWAYS if role_of(victims[0]) == GATEWAY else _OF_WORKERS
            fault = draw.choices(list(kinds), list(kinds.values()))[0]
            for_s = draw.uniform(*_STOP_S) if fault.is_stop else 0.0
        faults.append(PlannedFault(fault=fault, victims=victims, at_s=at_s, for_s=for_s))
        at_s += draw.expovariate(1 / interval_s)
    return faults


def blackouts(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the workers of each role; none if all workers have one role."""
    roles: dict[str, list[str]] = {}
    for name in names:
        if role_of(name) != GATEWAY:
            roles.setdefault(role_of(name), []).append(name)
    return [tuple(victims) for victims in roles.values()] if len(roles) > 1 else []


def may_begin(planned: PlannedFault, *, serving: Sequence[str], ready_gateways: Sequence[str]) -> bool:
    """Return whether a worker and a gateway can serve during the fault. `serving`: the workers that every gateway can
    use now."""
    victims = set(planned.victims)
    return bool(set(serving) - victims) and bool(set(ready_gateways) - victims)

"""PURE. Decides which worker should be switched between prefill and decode, by the time that requests wait for each.

The wait of a role is the mean of the waits that its workers report (service_time.py), each estimated from measured
rates and times. A burst that a worker admits at once is therefore no wait. A worker is switched to the role where
requests wait, if they have waited there for `hold_s` and longer than `wait_s`, many times longer than in the other
role, and the other role keeps a worker. While that wait becomes shorter, no further worker follows: those that are
there suffice. After a switch, also one by an operator or another router, nothing is decided for `pause_s`: the queues
show the effect of a switch late. Unified workers are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvist.request import Role, WorkerId

_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceRules:
    wait_s: float  # shorter waits change nothing
    ratio: float = 4.0  # the other role's wait must be shorter by this factor: the hysteresis
    hold_s: float = 1.0
    pause_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedWorker:
    """A ready prefill or decode worker, as it reports itself."""

    worker_id: WorkerId
    role: Role
    num_running: int
    num_waiting: int
    queue_wait_s: float | None  # how long its queue lasts; None: not measured yet


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceState:
    """Memory between two decisions."""

    roles: Mapping[WorkerId, Role] = field(default_factory=dict)  # as last seen
    crowded: Role | None = None  # where requests wait
    crowded_since_s: float = 0.0
    paused_until_s: float = 0.0
    last_wait_s: float = 0.0  # for `crowded`, when it was last decided about


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """A worker that should be switched to another role."""

    worker_id: WorkerId
    role: Role
    wait_s: float  # for this role, so far


def wait_of(role: Role, workers: Sequence[BalancedWorker]) -> float:
    """Return the wait for a role in seconds; 0 without workers and without measurements."""
    waits = [worker.queue_wait_s or 0.0 for worker in workers if worker.role is role]
    return sum(waits) / len(waits) if waits else 0.0


def balance(
    workers: Sequence[BalancedWorker], state: BalanceState, rules: BalanceRules, now_s: float
) -> tuple[BalanceState, Shift | None]:
    """Return what to remember, and the worker to switch now, if any."""
    roles = {worker.worker_id: worker.role for worker in workers}
    if any(state.roles.get(worker_id, role) is not role for worker_id, role in roles.items()):
        state = replace(state, paused_until_s=now_s + rules.pause_s)
    state = replace(state, roles=roles)
    waits = {role: wait_of(role, workers) for role in _OTHER}
    crowded = next(
        (
            role
            for role, other in _OTHER.items()
            if waits[role] > rules.wait_s and waits[role] > rules.ratio * waits[other]
        ),
        None,
    )
    if crowded is not state.crowded:
        state = replace(state, crowded=crowded, crowded_since_s=now_s, last_wait_s=0.0)
    if crowded is None or now_s < max(state.paused_until_s, state.crowded_since_s + rules.hold_s):
        return state, None
    shrinks, wait_s = waits[crowded] < state.last_wait_s, waits[crowded]
    state = replace(state, paused_until_s=now_s + rules.pause_s, last_wait_s=wait_s)
    if shrinks:
        return state, None
    givers = [worker for worker in workers if worker.role is _OTHER[crowded]]
    if len(givers) < 2:
        return state, None
    giver = min(givers, key=lambda each: (each.num_running + each.num_waiting, each.worker_id))
    shift = Shift(worker_id=giver.worker_id, role=crowded, wait_s=wait_s)
    return state, shift

"""PURE. The role of an engine, and its switch to another one while the engine serves.

    SERVING ──SetRole──► SWITCHING ──every gateway follows the new role──► SERVING
                           ▲   │
                           └───┘ SetRole

A switch takes effect at once: the next load reports have the new role, and gateways send new requests by it. Until a
gateway has confirmed (`Hello.known_role`) that it follows the new role, the engine also admits the requests of the role
that this gateway knows, so that no request is refused for its role. A gateway of an older version never confirms, and
is served by the role that the worker was started with. Requests that run are not touched: every engine has both sides
of a handoff.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from kvist.errors import Conflict
from kvist.plan.events import RoleChanged
from kvist.request import Role


class SwitchState(enum.Enum):
    SERVING = "serving"  # every gateway follows the present role
    SWITCHING = "switching"


class SwitchMeter:
    """Counts the switches of an engine, and the time until every gateway follows each. Mutable; owned by the loop."""

    def __init__(self) -> None:
        self._role: Role | None = None
        self._since_s: float | None = None  # of a switch that some gateway does not follow yet
        self._num_switches = 0
        self._seconds = 0.0

    def note(self, roles: RoleSwitch, now_s: float) -> float | None:
        """Note the present state. Return the time since the last switch if every gateway follows it from now on."""
        if self._role not in (None, roles.role):
            self._num_switches += 1
            self._since_s = now_s
        self._role = roles.role
        if self._since_s is None or roles.state is SwitchState.SWITCHING:
            return None
        seconds, self._since_s = now_s - self._since_s, None
        self._seconds += seconds
        return seconds

    def totals(self) -> dict[str, float]:
        return {"role_switches": float(self._num_switches), "role_switch_seconds": self._seconds}


class RoleSwitch:
    """Mutable; owned by the engine loop. Other threads may read `role`."""

    def __init__(
        self,
        started: Role,
        *,
        present: Role | None = None,
        usual_step_tokens: Mapping[Role, int] | None = None,
        hands_over: bool = True,
    ) -> None:
        """`started`: of the worker's flags, and of `EngineSpec`. `present`: that an earlier process was switched to.
        `usual_step_tokens`: of a step in each role; None: the same in all. `hands_over`: other engines can reach the
        pages."""
        self.started = started
        self.role = present or started
        self.earlier_roles: tuple[Role, ...] = ()  # that some gateway follows
        self._usual_step_tokens = usual_step_tokens or {}
        self._hands_over = hands_over
        self._applied: RoleChanged | None = None

    @property
    def state(self) -> SwitchState:
        return SwitchState.SWITCHING if self.earlier_roles else SwitchState.SERVING

    def request(self, role: Role) -> None:
        """Switch to a role. Raises `Conflict` for a role that this engine cannot have."""
        if role is not Role.UNIFIED and not self._hands_over:
            raise Conflict(
                f"this worker cannot be a {role} worker: it was started as {self.started}, and no transport "
                f"reaches its pages. Start it with --role {role}"
            )
        self.role = role

    def update(self, known_roles: Iterable[Role]) -> RoleChanged | None:
        """Return the scheduler's event, if the role or the admitted modes are others than before. `known_roles`: by
        which the gateways use this engine."""
        role, earlier = self.role, {known for known in known_roles if known is not self.role}
        if self._applied is None and role is self.started and not earlier:
            return None
        self.earlier_roles = tuple(sorted(earlier, key=str))
        modes = role.modes.union(*(known.modes for known in earlier))
        change = RoleChanged(role=role, modes=modes, usual_step_tokens=self._usual_step_tokens.get(role))
        if change == self._applied:
            return None
        self._applied = change
        return change

"""PURE. The workers that a request asks for. All of it is a hint: a request that they cannot serve runs elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    session: str = ""  # a name that requests with a common prefix share; "": none (sessions.py)
    group: str = ""  # requests of one group run on one worker, or one pair of workers, while that is possible; "": none
    worker: str = ""  # URL or id of the wanted worker, which computes the prompt or generates the answer; "": any
    role: Role | None = None  # of the workers that serve the request: DECODE alone; with PREFILL its pair, or alone too

    @property
    def is_bound(self) -> bool:
        """Whether some workers are wanted and others are not."""
        return bool(self.group or self.worker or self.role is not None)


ANYWHERE = Placement()

"""The requests of a run as they happened, beside their plan: the source of its explanation."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.execution.results import Served
from kvist.planning.graph import Graph, Operation
from kvist.planning.plan import Pin, Placement, Warm


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One request. Times in seconds since the executor's start."""

    operation: Operation
    placement: Placement | None  # None: without a plan
    start_s: float
    end_s: float
    served: Served | None  # None: it failed
    problem: str = ""
    num_attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneWarm:
    warm: Warm
    start_s: float
    end_s: float
    served: Served | None
    problem: str = ""


@dataclass(slots=True)
class Report:
    """Mutable; the executor adds to it, others read it after the run."""

    requests: list[Done] = field(default_factory=list)
    warms: list[DoneWarm] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once
    planning_s: float = 0.0
    planning_cpu_s: float = 0.0  # of it, in which the planner had the interpreter
    num_planned: int = 0  # operations that a plan has seen; one with a hole twice
    num_refusals: int = 0

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens that were computed for all requests, the prefixes ahead of need included."""
        served = [*(each.served for each in self.requests), *(each.served for each in self.warms)]
        return sum(each.num_computed_tokens for each in served if each is not None)

    def of_graph(self, graph: Graph) -> list[Done]:
        ids = {each.operation_id for each in graph.operations}
        return [each for each in self.requests if each.operation.operation_id in ids]

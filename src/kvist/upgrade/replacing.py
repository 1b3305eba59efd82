"""Replaces the processes of a running cluster, one by one, by those of another version; a failure ends the upgrade.

Until the last step of a process is safe, the old one keeps its place:

    START_FIRST   start new ─► ready ─► joins the router ─► used ─► takes the place ─► old one leaves, drains, ends
    STOP_FIRST    old one drains, ends ─► start new ─► ready ─► used by the router     (fails: the old version starts)
    HAND_OVER     start new ─► ready ─► knows all workers ─► accepts ─► old router serves its connections, ends

Streams of a worker that drains finish, or go on at other workers after `--shutdown-timeout-s`, with the same tokens.
The functions block, and run on a thread of `kvist up`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvist.clock import MonotonicClock
from kvist.cluster.plan import ROUTER, ClusterShape, plan_router
from kvist.cluster.ports import free_ports
from kvist.cluster.processes import Processes
from kvist.cluster.stop_requests import RETIRE
from kvist.errors import KvistError, Unavailable
from kvist.request import Role
from kvist.supervisor.child import Child, ChildPlan
from kvist.upgrade.order import How, Kind, Step
from kvist.upgrade.report import PauseCounts, Row, longest_pause_s
from kvist.upgrade.view import ClusterView, ServerView, WorkerView

USED_TIMEOUT_S = 30.0  # for the router to use a worker that is ready
PAGES_TIMEOUT_S = 3.0  # for a new worker to report its pages
RETIRE_TIMEOUT_S = 630.0  # for the last stream of an old router: its --request-timeout-s and a grace period
EMPTY_RETRY_S = 10.0  # for a store to join the master that has just been replaced
POLL_S = 0.05

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`problem`: why the upgrade ended before the last process; "" if it did not."""

    rows: tuple[Row, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Successor:
    """The new version, and how long each of its processes may take to be ready."""

    python: str
    start_timeout_s: float


def successor_plan(plan: ChildPlan, python: str, *, port: int | None = None, role: Role | None = None) -> ChildPlan:
    """PURE. Return the plan of the process that replaces a worker or a node: with this Python, and another port
    and role if given."""
    argv = [python, *plan.argv[1:]]
    url = plan.url
    if port is not None:
        argv = [f"--port={port}" if word.startswith("--port=") else word for word in argv]
        url = f"{url.rpartition(':')[0]}:{port}"
    if role is not None:
        argv = [f"--role={role}" if word.startswith("--role=") else word for word in argv]
    return replace(plan, argv=tuple(argv), url=url)


class Replacing:
    """One upgrade. Not thread-safe."""

    def __init__(
        self, processes: Processes, view: ClusterView, shape: ClusterShape, successor: Successor, show: Show
    ) -> None:
        self._processes = processes
        self._view = view
        self._shape = shape
        self._successor = successor
        self._show = show
        self._clock = MonotonicClock()
        self._num_pages: int | None = None  # that the process which started last had kept

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Carry out the steps until one fails. Never raises `KvistError`."""
        rows = []
        for number, step in enumerate(steps, start=1):
            self._show(f"[{number}/{len(steps)}] {step.name}: {step.how.value}")
            row = self._row(step)
            rows.append(row)
            if row.problem:
                return Outcome(rows=tuple(rows), problem=f"{step.name}: {row.problem}")
            self._show(f"{step.name} is replaced after {row.seconds:.1f} s")
        return Outcome(rows=tuple(rows))

    def _row(self, step: Step) -> Row:
        start_s, old = self._clock.now_s(), self._processes.children[step.name]
        before, was = self._pauses(), self._server(old.plan.url)
        try:
            pauses = self._replace(step, old)
        except KvistError as error:
            seconds = self._clock.now_s() - start_s
            return Row(process=step.name, old_version=was.version, seconds=seconds, problem=error.message)
        new = self._server(self._processes.children[step.name].plan.url)
        longest = longest_pause_s({} if step.kind is Kind.ROUTER else before, self._pauses())
        if step.kind is Kind.ROUTER:
            longest = max(longest, longest_pause_s(before, pauses))
        return Row(
            process=step.name,
            old_version=was.version,
            new_version=new.version,
            seconds=self._clock.now_s() - start_s,
            num_pages=self._num_pages,
            longest_pause_s=longest,
        )

    def _replace(self, step: Step, old: Child) -> PauseCounts:
        """Replace one process; return the pauses that its old router counted last."""
        match step.how:
            case How.START_FIRST:
                self._start_first(old)
            case How.STOP_FIRST:
                self._stop_first(step, old)
            case How.HAND_OVER:
                return self._hand_over(old)
        return {}

    # ---------------------------------------------------------------- the three ways

    def _start_first(self, old: Child) -> None:
        (port,) = free_ports(1)
        plan = successor_plan(old.plan, self._successor.python, port=port, role=self._role_of(old))
        new = self._started(plan)
        router = self._router.plan.url
        try:
            self._view.join(router, plan.url)
            self._wait_used(router, plan.url)
        except KvistError:
            self._leave(router, plan.url)
            self._processes.end_one(new)
            raise
        self._processes.take_place(new)
        self._name_workers_to_router()
        self._leave(router, old.plan.url)
        self._processes.end_one(old)

    def _stop_first(self, step: Step, old: Child) -> None:
        role = self._role_of(old) if step.kind is Kind.WORKER else None
        if step.empties:
            self._empty(old)
        before = old.plan
        self._processes.end_one(old)
        new = None
        try:
            new = self._started(successor_plan(before, self._successor.python, role=role))
            if step.kind is Kind.WORKER:
                self._wait_used(self._router.plan.url, before.url)
        except KvistError as error:
            if new is not None:
                self._processes.end_one(new)
            raise Unavailable(f"{error.message}\n{self._restore(before)}") from error

    def _restore(self, plan: ChildPlan) -> str:
        """Start the old version again; return the outcome in words. If it is not ready in time, it goes on starting."""
        try:
            self._processes.wait_one(self._processes.start_one(plan), self._successor.start_timeout_s)
        except KvistError as error:
            return f"The old version is not ready again either: {error.message}"
        return "The old version runs again."

    def _hand_over(self, old: Child) -> PauseCounts:
        (port,) = free_ports(1)
        new = self._started(self._router_plan(self._successor.python, port))
        try:
            self._hand_workers_over(old.plan.url, new.plan.url)
        except KvistError:
            self._processes.end_one(new)
            raise
        pauses = self._pauses()
        self._processes.take_place(new)
        self._show("the new router accepts connections; the old one ends with its last stream")
        self._processes.end_one(old, word=RETIRE, within_s=RETIRE_TIMEOUT_S)
        return pauses

    def _hand_workers_over(self, old: str, new: str) -> None:
        """Wait until the new router can use every worker that the old one can use."""
        known, own = self._view.workers(old), self._view.workers(new)
        for url, worker in known.items():
            if worker.is_named_by_hand and url not in own:
                self._view.join(new, url)
        for url, worker in known.items():
            if worker.is_usable:
                self._wait_used(new, url)

    # ---------------------------------------------------------------- parts of them

    @property
    def _router(self) -> Child:
        return self._processes.children[ROUTER]

    def _started(self, plan: ChildPlan) -> Child:
        """Start a process and return it when it is ready; if it fails, end it and raise its error."""
        child = self._processes.start_one(plan)
        try:
            self._processes.wait_one(child, self._successor.start_timeout_s)
        except KvistError:
            self._processes.end_one(child)
            raise
        self._num_pages = self._restored_pages(plan)
        return child

    def _restored_pages(self, plan: ChildPlan) -> int | None:
        """Return the pages that a worker with a folder (--hicache-persist) had restored when it was ready."""
        if not any(word.startswith("--hicache-persist") for word in plan.argv):
            return None
        deadline_s = self._clock.now_s() + PAGES_TIMEOUT_S
        while (num_pages := self._server(plan.url).num_pages) is None and self._clock.now_s() < deadline_s:
            time.sleep(POLL_S)
        return num_pages

    def _wait_used(self, router: str, worker: str) -> None:
        deadline_s = self._clock.now_s() + USED_TIMEOUT_S
        while True:
            seen = self._view.workers(router).get(worker)
            if seen is not None and seen.is_usable:
                return
            if self._processes.stopping:
                raise Unavailable("kvist up is stopping")
            if self._clock.now_s() > deadline_s:
                reason = "it does not list this worker" if seen is None else seen.problem
                raise Unavailable(f"the router does not use {worker}: {reason}")
            time.sleep(POLL_S)

    def _leave(self, router: str, worker: str) -> None:
        with contextlib.suppress(KvistError):  # the router lists a worker that it has lost, and sends it nothing
            self._view.leave(router, worker)

    def _role_of(self, child: Child) -> Role | None:
        """Return the worker's present role, which `POST /role` may have changed; None: that of its flags."""
        seen = self._workers().get(child.plan.url)
        return None if seen is None else seen.role

    def _workers(self) -> Mapping[str, WorkerView]:
        return self._view.workers(self._router.plan.url)

    def _name_workers_to_router(self) -> None:
        """Let the router know the present workers at its next start."""
        router = self._router
        router.plan = self._router_plan(router.plan.argv[0], _port_of(router.plan.url))

    def _router_plan(self, python: str, own_port: int) -> ChildPlan:
        seen, names = self._workers(), self._shape.worker_names
        urls: dict[Role, list[str]] = {role: [] for role in Role}
        for name in names:
            plan = self._processes.children[name].plan
            role = seen[plan.url].role if plan.url in seen else None
            urls[role or _role_by_flag(plan)].append(plan.url)
        return plan_router(replace(self._shape, python=python), urls, own_port, names)

    def _empty(self, store: Child) -> None:
        """Move the pages of a store to the others. Stores join a new master by themselves, within seconds."""
        give_up_s = self._clock.now_s() + EMPTY_RETRY_S
        while True:
            try:
                self._view.empty_store(store.plan.url)
            except KvistError as error:
                if self._processes.stopping or self._clock.now_s() > give_up_s:  # the pages are computed again
                    self._show(f"{store.plan.name} stops with its pages: {error.message}")
                    return
                time.sleep(POLL_S)
            else:
                return

    # ---------------------------------------------------------------- for the report

    def _pauses(self) -> PauseCounts:
        with contextlib.suppress(KvistError):
            return self._view.pauses(self._router.plan.url)
        return {}

    def _server(self, url: str) -> ServerView:
        with contextlib.suppress(KvistError):
            return self._view.server(url)
        return ServerView()


def _port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def _role_by_flag(plan: ChildPlan) -> Role:
    return next(Role(word.removeprefix("--role=")) for word in plan.argv if word.startswith("--role="))

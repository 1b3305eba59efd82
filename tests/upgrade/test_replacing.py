"""Processes are replaced one by one; a failure ends the upgrade, and what was there before serves on.

The workers are one-line programs, and the router's view of them is a fake that follows the processes.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.errors import KvistError, Unavailable
from kvist.request import Role
from kvist.supervisor.child import ALIVE, NO_ANSWER, READY, Answer, ChildPlan, ChildState
from kvist.upgrade.order import How, Kind, Step
from kvist.upgrade.replacing import Outcome, Replacing, Successor
from kvist.upgrade.report import PauseCounts
from kvist.upgrade.view import ServerView, WorkerView

# A process answers probes once it has made the file of its instance, as a real one does once it runs.
ANSWERS = "import os, sys; open(os.path.join(os.environ['ANSWERS'], os.environ['KVIST_INSTANCE_ID']), 'x').close(); "
STAYS = ANSWERS + "[sys.exit() for line in sys.stdin if line.strip() in ('stop', 'retire')]"
DIES = "import sys; print('cannot do this', flush=True); sys.exit(3)"
REFUSES = "import sys; print('no such flag', flush=True); sys.exit(2)"
TIMEOUT_S = 30.0
ROUTER_URL = "http://router:1"


def argv_of(name: str, program: str, port: int) -> tuple[str, ...]:
    """The words of `kvist up` follow the program, which ignores them."""
    role = name.partition("-")[0]
    words = () if role == "router" else (f"--role={role}", f"--port={port}")
    return (sys.executable, "-S", "-E", "-c", program, *words)


def plan(name: str, port: int, program: str = STAYS) -> ChildPlan:
    url = ROUTER_URL if name == "router" else f"http://worker:{port}"
    return ChildPlan(name=name, argv=argv_of(name, program, port), url=url)


@dataclass
class FakeView:
    """Routers that use every worker whose process runs, and that they were asked to use."""

    known: dict[str, WorkerView] = field(default_factory=dict)
    calls: list[tuple[str, ...]] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)  # URLs of workers that routers refuse
    newcomers: set[str] = field(default_factory=set)  # workers that only the old router knows
    num_pages: int | None = None
    counts: dict[float, float] = field(default_factory=dict)
    store_problem: str = ""

    def workers(self, router: str) -> Mapping[str, WorkerView]:
        hidden = self.newcomers if router != ROUTER_URL else set()
        return {
            url: replace(worker, is_usable=url not in self.unusable, problem="of another protocol")
            for url, worker in self.known.items()
            if url not in hidden
        }

    def join(self, router: str, worker: str) -> None:
        self.calls.append(("join", router, worker))
        self.known.setdefault(worker, WorkerView(role=Role.DECODE, is_usable=True))
        self.newcomers.discard(worker)

    def leave(self, router: str, worker: str) -> None:
        self.calls.append(("leave", router, worker))
        self.known.pop(worker, None)

    def server(self, url: str) -> ServerView:
        del url
        return ServerView(version="1.0", num_pages=self.num_pages)

    def pauses(self, router: str) -> PauseCounts:
        del router
        return dict(self.counts)

    def empty_store(self, url: str) -> None:
        self.calls.append(("empty", url))
        if self.store_problem:
            raise Unavailable(self.store_problem)


@dataclass
class Bench:
    """A router and two workers that run, and an upgrade of them."""

    processes: Processes
    view: FakeView
    answers: Path  # the folder of the instances that answer
    lines: list[str] = field(default_factory=list)
    new_program: str = STAYS  # of all successors
    never_ready: set[str] = field(default_factory=set)  # programs

    def __post_init__(self) -> None:
        self.pids = {name: child.pid for name, child in self.processes.children.items()}

    def upgrade(self, *steps: Step, timeout_s: float = TIMEOUT_S) -> Outcome:
        bench = self

        class WithProgram(Replacing):
            """Successors run another program, as those of another version would."""

            def _started(self, plan: ChildPlan) -> object:  # type: ignore[override]
                words = plan.argv if plan.name != "router" else argv_of("router", STAYS, 0)
                at = words.index("-c") + 1
                argv = (sys.executable, *words[1:at], bench.new_program, *words[at + 1 :])
                url = plan.url if plan.name != "router" else "http://router:2"
                return super()._started(replace(plan, argv=argv, url=url, environ={"ANSWERS": str(bench.answers)}))

        shape = ClusterShape(config=ClusterConfig())
        successor = Successor(python=sys.executable, start_timeout_s=timeout_s)
        return WithProgram(self.processes, self.view, shape, successor, self.lines.append).run(steps)

    def assert_old_ones_serve(self, *names: str) -> None:
        children = self.processes.children
        assert set(children) == set(self.pids), "no other process is left"
        for name in names:
            assert children[name].pid == self.pids[name]
            assert children[name].state is ChildState.READY
            assert not children[name].is_leaving


@contextmanager
def running(*plans: ChildPlan) -> Iterator[Bench]:
    view = FakeView()
    for each in plans:
        if (role := each.name.partition("-")[0]) in {role.value for role in Role}:
            view.known[each.url] = WorkerView(role=Role(role), is_usable=True)
    never_ready: set[str] = set()

    with tempfile.TemporaryDirectory() as answers:

        def probe(url: str, instance_id: str) -> Answer:
            if not Path(answers, instance_id).exists():
                return NO_ANSWER
            return ALIVE if url in never_ready else READY

        timeouts, named = ChildTimeouts(drain_s=TIMEOUT_S), [replace(p, environ={"ANSWERS": answers}) for p in plans]
        with Processes(named, probe=probe, sink=lambda _name, _line: None, timeouts=timeouts) as processes:
            processes.wait_ready(TIMEOUT_S)
            yield Bench(processes=processes, view=view, answers=Path(answers), never_ready=never_ready)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with running(plan("prefill-0", 1), plan("decode-0", 2), plan("router", 3)) as made:
        yield made


def step(name: str, how: How, **more: bool) -> Step:
    kinds = {"router": Kind.ROUTER, "store": Kind.STORE}
    return Step(name=name, kind=kinds.get(name.partition("-")[0], Kind.WORKER), how=how, **more)


def test_every_process_is_replaced_in_order_and_nothing_of_the_old_ones_is_left(bench: Bench) -> None:
    steps = (step("prefill-0", How.START_FIRST), step("decode-0", How.STOP_FIRST), step("router", How.HAND_OVER))
    outcome = bench.upgrade(*steps)
    assert outcome.problem == ""
    assert [row.process for row in outcome.rows] == ["prefill-0", "decode-0", "router"]
    children = bench.processes.children
    assert set(children) == set(bench.pids)
    assert all(
        children[name].pid != pid and children[name].state is ChildState.READY for name, pid in bench.pids.items()
    )
    assert [child.num_restarts for child in children.values()] == [0, 0, 0]


def test_a_new_worker_serves_before_the_old_one_leaves(bench: Bench) -> None:
    assert bench.upgrade(step("decode-0", How.START_FIRST)).problem == ""
    new = bench.processes.children["decode-0"].plan
    assert bench.view.calls == [("join", ROUTER_URL, new.url), ("leave", ROUTER_URL, "http://worker:2")]
    assert new.url != "http://worker:2"
    router = bench.processes.children["router"].plan.argv
    assert router[router.index("--decode") + 1] == new.url, "a restarted router knows the new worker"
    assert router[router.index("--prefill") + 1] == "http://worker:1"


def test_a_worker_keeps_the_role_that_it_was_switched_to(bench: Bench) -> None:
    bench.view.known["http://worker:2"] = WorkerView(role=Role.PREFILL, is_usable=True)
    assert bench.upgrade(step("decode-0", How.STOP_FIRST)).problem == ""
    assert "--role=prefill" in bench.processes.children["decode-0"].plan.argv


@pytest.mark.parametrize(("program", "reason"), [(DIES, "cannot do this"), (REFUSES, "no such flag")])
@pytest.mark.parametrize("name", ["decode-0", "router"])
def test_a_new_process_that_does_not_start_ends_the_upgrade_and_the_old_ones_serve(
    bench: Bench, program: str, reason: str, name: str
) -> None:
    bench.new_program = program
    how = How.HAND_OVER if name == "router" else How.START_FIRST
    outcome = bench.upgrade(step(name, how), step("prefill-0", How.START_FIRST))
    assert reason in outcome.problem
    assert [row.process for row in outcome.rows] == [name], "the upgrade ends with the first failure"
    bench.assert_old_ones_serve("prefill-0", "decode-0", "router")
    assert bench.view.calls == []


def test_a_new_worker_that_is_never_ready_is_ended_after_the_start_timeout(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.upgrade.replacing.free_ports", lambda _count: [9])
    bench.never_ready.add("http://worker:9")
    outcome = bench.upgrade(step("decode-0", How.START_FIRST), timeout_s=0.3)
    assert "not ready after 0.3 s" in outcome.problem
    bench.assert_old_ones_serve("prefill-0", "decode-0", "router")


def test_a_new_worker_that_the_router_cannot_use_is_ended_and_leaves_the_router(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.upgrade.replacing.free_ports", lambda _count: [9])
    monkeypatch.setattr("kvist.upgrade.replacing.USED_TIMEOUT_S", 0.2)
    bench.view.unusable.add("http://worker:9")
    outcome = bench.upgrade(step("decode-0", How.START_FIRST))
    assert "of another protocol" in outcome.problem
    assert bench.view.calls[-1] == ("leave", ROUTER_URL, "http://worker:9")
    assert "http://worker:2" in bench.view.known
    bench.assert_old_ones_serve("prefill-0", "decode-0", "router")


def test_a_worker_that_stopped_first_is_started_in_its_old_version_if_the_new_one_fails(bench: Bench) -> None:
    bench.new_program = DIES
    outcome = bench.upgrade(step("decode-0", How.STOP_FIRST), step("router", How.HAND_OVER))
    assert "cannot do this" in outcome.problem
    assert "The old version runs again." in outcome.problem
    bench.assert_old_ones_serve("prefill-0", "router")
    again = bench.processes.children["decode-0"]
    assert again.state is ChildState.READY
    assert STAYS in again.plan.argv
    assert again.plan.url == "http://worker:2"


def test_a_python_that_is_gone_is_an_error_and_the_old_worker_serves(bench: Bench) -> None:
    shape, successor = ClusterShape(config=ClusterConfig()), Successor(python="/no/python", start_timeout_s=TIMEOUT_S)
    outcome = Replacing(bench.processes, bench.view, shape, successor, print).run([step("decode-0", How.START_FIRST)])
    assert "/no/python cannot be started" in outcome.problem
    bench.assert_old_ones_serve("prefill-0", "decode-0", "router")


def test_a_new_router_gets_the_workers_that_an_operator_added_by_hand(bench: Bench) -> None:
    bench.view.known["http://far:5"] = WorkerView(role=Role.DECODE, is_usable=True, is_named_by_hand=True)
    bench.view.newcomers.add("http://far:5")
    assert bench.upgrade(step("router", How.HAND_OVER)).problem == ""
    assert ("join", "http://router:2", "http://far:5") in bench.view.calls


def test_a_new_router_that_cannot_use_a_worker_of_the_old_one_is_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.upgrade.replacing.USED_TIMEOUT_S", 0.2)
    bench.view.newcomers.add("http://worker:2")
    outcome = bench.upgrade(step("router", How.HAND_OVER))
    assert "does not list this worker" in outcome.problem
    bench.assert_old_ones_serve("prefill-0", "decode-0", "router")


@pytest.mark.parametrize("problem", ["", "the other stores have no room"])
def test_a_store_moves_its_pages_first_and_stops_with_them_if_there_is_no_room(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.upgrade.replacing.EMPTY_RETRY_S", 0.2)
    with running(plan("prefill-0", 1), plan("store-0", 5), plan("router", 3)) as bench:
        bench.view.store_problem = problem
        outcome = bench.upgrade(step("store-0", How.STOP_FIRST, empties=True))
        assert outcome.problem == ""
        assert set(bench.view.calls) == {("empty", "http://worker:5")}
        assert (len(bench.view.calls) > 1) is bool(problem), "the store may not have joined a new master yet"
        assert bench.processes.children["store-0"].pid != bench.pids["store-0"]
        assert any("no room" in line for line in bench.lines) is bool(problem)


def test_a_stop_during_an_upgrade_ends_both_versions_and_the_upgrade(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.upgrade.replacing.free_ports", lambda _count: [9])
    bench.never_ready.add("http://worker:9")
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(bench.upgrade(step("decode-0", How.START_FIRST))))
    thread.start()
    give_up = threading.Event()
    while "decode-0+" not in bench.processes.children:
        assert not give_up.wait(0.01)
    new = bench.processes.children["decode-0+"].pid
    bench.processes.stop()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert "stopping" in outcomes[0].problem
    assert new is not None
    for pid in (new, *bench.pids.values()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid or 0, 0)


def test_a_child_that_dies_beside_its_successor_is_not_restarted_once_the_other_has_its_place(bench: Bench) -> None:
    new = bench.processes.start_one(replace(plan("decode-0", 9), environ={"ANSWERS": str(bench.answers)}))
    bench.processes.wait_one(new, TIMEOUT_S)
    old = bench.processes.take_place(new)
    assert (new.label, old.label) == ("decode-0", "decode-0-")
    old.signal_group(9)  # type: ignore[arg-type]
    bench.processes.end_one(old)
    assert set(bench.processes.children) == set(bench.pids)
    assert old.num_restarts == 0


def test_a_listening_socket_is_used_by_the_new_child_only_when_it_has_the_place_of_the_old_one() -> None:
    accepts = (
        "import socket, sys\n"
        "s = socket.socket(fileno={fd})\n"
        "for line in sys.stdin:\n"
        "    if line.strip() == 'accept':\n"
        "        s.listen(); s.settimeout(30); c = s.accept()[0]; c.sendall(b'{name}'); c.close()\n"
        "    elif line.strip() in ('stop', 'retire'): break\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as front:
        fd, address = front.fileno(), front.getsockname()

        def router(name: str) -> ChildPlan:
            argv = (sys.executable, "-S", "-E", "-c", accepts.format(fd=fd, name=name))
            return ChildPlan(name="router", argv=argv, url="r", listen_fd=fd)

        def served_by() -> bytes:
            with socket.create_connection(address, timeout=TIMEOUT_S) as client:
                return client.recv(16)

        def ready(_url: str, _instance_id: str) -> Answer:
            return READY

        with Processes([router("old")], probe=ready, sink=lambda *_: None) as processes:
            processes.wait_ready(TIMEOUT_S)
            new = processes.start_one(router("new"))
            processes.wait_one(new, TIMEOUT_S)
            assert served_by() == b"old"
            old = processes.take_place(new)
            processes.end_one(old)
            assert served_by() == b"new"


def test_the_report_has_the_pages_of_a_worker_with_a_folder_and_the_pauses_of_each_step() -> None:
    kept = plan("decode-0", 2)
    kept = replace(kept, argv=(*kept.argv, "--hicache-persist=/pages"))
    with running(plan("prefill-0", 1), kept, plan("router", 3)) as bench:
        bench.view.num_pages, bench.view.counts = 40, {0.1: 1.0, 2.0: 1.0}
        drain = bench.processes.end_one

        def end_one(child: object, **options: object) -> None:
            bench.view.counts[2.0] += 1
            drain(child, **options)  # type: ignore[arg-type]

        bench.processes.end_one = end_one  # type: ignore[method-assign]
        rows = bench.upgrade(step("decode-0", How.STOP_FIRST), step("prefill-0", How.START_FIRST)).rows
    assert [(row.num_pages, row.longest_pause_s) for row in rows] == [(40, 2.0), (None, 2.0)]
    assert rows[0].old_version == rows[0].new_version == "1.0"


def test_errors_of_the_view_do_not_end_an_upgrade_that_can_go_on(bench: Bench) -> None:
    def broken(*_args: object) -> object:
        raise KvistError("no answer")

    no_answer: Callable[..., object] = broken
    bench.view.server = bench.view.pauses = bench.view.leave = no_answer  # type: ignore[method-assign,assignment]
    outcome = bench.upgrade(step("decode-0", How.START_FIRST))
    assert outcome.problem == ""
    assert outcome.rows[0].new_version is None

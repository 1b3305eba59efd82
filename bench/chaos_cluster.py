"""The processes of a chaos run: started, killed, suspended, restarted and counted, as by a supervisor and its enemy.

Every process that is started here leads a session of its own, whose other members are its engine and the ranks of the
engine. A session that has ended has no process left; `leftovers` finds those that break this rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from chaos_faults import GATEWAY, Fault, PlannedFault, may_begin, role_of
from kvist.cluster.ports import free_ports
from kvist.http_client import HttpClient, HttpFailure, read_whole
from kvist.supervisor.child import ChildPlan

PROBE_INTERVAL_S = 0.25
RESTART_WAIT_S = 0.2
MAX_FAILED_STARTS = 5  # in a row, of one process
PROBE_TIMEOUT_S = 2.0
_GPU_DEVICES = "/dev/nvidia"


class ChaosFailure(Exception):
    """The reason why the run cannot go on."""


@dataclass(slots=True, kw_only=True)
class Member:
    """One process with its restarts. Mutable; owned by its `ChaosCluster`."""

    plan: ChildPlan
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    is_ready: bool = False  # answered /ready with 200 in this run, and no fault has begun since
    suspended: set[int] = field(default_factory=set)  # pids that got SIGSTOP
    dead_until_s: float = 0.0
    num_starts: int = 0
    num_failed_starts: int = 0  # in a row
    num_faults: int = 0  # so far
    num_ends: int = 0  # of them, those that end the process
    ending: subprocess.Popen[bytes] | None = None  # got SIGTERM: it may answer once more that it is ready

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def pids(self) -> list[int]:
        """The process and its descendants, parents first; empty if it has ended."""
        return [] if self.process is None or self.process.poll() is not None else family_of(self.process.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspension:
    begin_s: float
    end_s: float
    of_gateway: bool


class ChaosCluster:
    """Use `start`, then run `supervise` as a task, and `stop` at the end. Not thread-safe."""

    def __init__(self, plans: Sequence[ChildPlan], folder: Path, environ: Mapping[str, str]) -> None:
        """`folder` gets the logs. `environ` is that of all processes."""
        self._environ = dict(environ)
        self.members = {plan.name: Member(plan=plan, log_path=folder / f"{plan.name}.log") for plan in plans}
        self._clients = {plan.name: HttpClient(plan.url, api_key=None) for plan in plans}
        self._views: dict[str, set[str]] = {}  # by gateway: the URLs of the workers that it can use
        self._sessions: set[int] = set()
        self._stopping = False
        self.num_kills = 0  # processes that got SIGKILL
        self.num_stops = 0  # suspensions
        self.exit_statuses: list[tuple[str, int]] = []  # of orderly ends
        self.suspensions: list[Suspension] = []  # that have ended
        self.descriptors_before: dict[int, tuple[str, int]] = {}  # by pid: name, and open files when all were ready
        self._pending: set[asyncio.Task[None]] = set()  # ends of faults

    @property
    def gateways(self) -> list[Member]:
        return [member for member in self.members.values() if role_of(member.name) == GATEWAY]

    @property
    def workers(self) -> list[Member]:
        return [member for member in self.members.values() if role_of(member.name) != GATEWAY]

    def serving(self) -> list[str]:
        """Return the workers that are up, and that every ready gateway can use."""
        views = [self._views.get(gateway.name, set()) for gateway in self.gateways if gateway.is_ready]
        if not views:
            return []
        usable = set.intersection(*views)
        return [w.name for w in self.workers if w.plan.url in usable and w.pids and not w.suspended]

    def ready_gateways(self) -> list[str]:
        return [gateway.name for gateway in self.gateways if gateway.is_ready and not gateway.suspended]

    # ------------------------------------------------------------ life

    def start(self) -> None:
        for member in self.members.values():
            self._start(member)

    def _start(self, member: Member) -> None:
        member.num_starts += 1
        member.is_ready = False
        with member.log_path.open("ab") as log:
            log.write(f"---- start {member.num_starts}\n".encode())
            member.process = subprocess.Popen(
                member.plan.argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self._environ, **member.plan.environ},
            )
        self._sessions.add(member.process.pid)

    async def supervise(self) -> None:
        """Restart what has ended, and probe what is not ready. Runs until cancelled; raises `ChaosFailure`."""
        async with asyncio.TaskGroup() as group:
            for member in self.members.values():
                group.create_task(self._watch(member))

    async def _watch(self, member: Member) -> None:
        while True:
            self._restart_if_ended(member)
            if member.process is not None and not member.suspended and not self._stopping:
                await self._probe(member)
            await asyncio.sleep(PROBE_INTERVAL_S)

    def _restart_if_ended(self, member: Member) -> None:
        if self._stopping:
            return
        if member.process is not None:
            status = member.process.poll()
            if status is None:
                return
            if not member.is_ready and status > 0:
                member.num_failed_starts += 1
                if member.num_failed_starts >= MAX_FAILED_STARTS:
                    raise ChaosFailure(f"{member.name} does not start; the end of its log:\n{tail(member.log_path)}")
            member.is_ready = False
            member.process = None
            member.dead_until_s = max(member.dead_until_s, time.monotonic() + RESTART_WAIT_S)
        if time.monotonic() >= member.dead_until_s:
            self._start(member)

    async def _probe(self, member: Member) -> None:
        num_faults, process = member.num_faults, member.process
        client = self._clients[member.name]
        with contextlib.suppress(HttpFailure, msgspec.DecodeError, LookupError):
            if not member.is_ready and process is not member.ending:
                status, _ = await read_whole(client, "/ready", timeout_s=PROBE_TIMEOUT_S)
                if status == 200 and member.num_faults == num_faults and member.process is process:
                    member.is_ready, member.num_failed_starts = True, 0
            if role_of(member.name) == GATEWAY:
                _, body = await read_whole(client, "/workers", timeout_s=PROBE_TIMEOUT_S)
                workers = msgspec.json.decode(body)["workers"]
                self._views[member.name] = {worker["url"] for worker in workers if worker["is_healthy"]}

    async def wait_ready(self, within_s: float) -> None:
        """Wait until every process is ready. Raises `ChaosFailure`."""
        began_s = time.monotonic()
        while not all(member.is_ready for member in self.members.values()):
            if time.monotonic() - began_s > within_s:
                missing = [member.name for member in self.members.values() if not member.is_ready]
                raise ChaosFailure(f"not ready within {within_s:g} s: {', '.join(missing)}")
            await asyncio.sleep(0.05)

    async def wait_all_serve(self, within_s: float) -> float:
        """Wait until every process is ready and every gateway can use every worker; return the seconds. Raises
        `ChaosFailure`."""
        began_s = time.monotonic()
        while len(self.serving()) < len(self.workers) or len(self.ready_gateways()) < len(self.gateways):
            if time.monotonic() - began_s > within_s:
                missing = set(self.members) - set(self.serving()) - set(self.ready_gateways())
                raise ChaosFailure(f"not ready within {within_s:g} s: {', '.join(sorted(missing))}")
            await asyncio.sleep(0.05)
        if not self.descriptors_before:
            for member in self.members.values():
                self.descriptors_before |= {pid: (member.name, num_open_files(pid)) for pid in member.pids}
        return time.monotonic() - began_s

    async def stop(self, within_s: float) -> None:
        """End all processes in order, gateways first, and kill those that have not ended in time."""
        self._stopping = True
        for group in (self.gateways, self.workers):
            running = [m for m in group if m.process is not None and m.process.poll() is None]
            for member in running:
                assert member.process is not None
                member.process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + within_s
            for member in running:
                assert member.process is not None
                while member.process.poll() is None and time.monotonic() < deadline_s:
                    await asyncio.sleep(0.05)
                status = member.process.poll()
                self.exit_statuses.append((member.name, -signal.SIGKILL if status is None else status))
        self.kill_all()

    def kill_all(self) -> None:
        """Kill every process of every session that was started here."""
        self._stopping = True
        for client in self._clients.values():
            client.close()
        for pid in processes_of(self._sessions):
            _signal(pid, signal.SIGKILL)
        for member in self.members.values():
            if member.process is not None:
                member.process.wait(10)
                if member.process.stdin is not None:
                    member.process.stdin.close()

    def leftovers(self) -> list[int]:
        """Return the processes of our sessions whose leader has ended."""
        living = {member.process.pid for member in self.members.values() if member.pids and member.process is not None}
        return processes_of(self._sessions - living)

    # ------------------------------------------------------------ faults

    def can_begin(self, planned: PlannedFault) -> bool:
        """Return whether a victim is alive, and another worker and gateway can serve meanwhile."""
        is_alive = any(self._targets(self.members[name], planned.fault) for name in planned.victims)
        return is_alive and may_begin(planned, serving=self.serving(), ready_gateways=self.ready_gateways())

    def begin(self, planned: PlannedFault) -> None:
        """Apply the fault; its end comes by itself."""
        for name in planned.victims:
            self._hit(self.members[name], planned)

    async def settle_faults(self) -> None:
        """Wait until every suspended process goes on."""
        while self._pending:
            await asyncio.wait(self._pending)

    @staticmethod
    def _targets(member: Member, fault: Fault) -> list[int]:
        """Return the processes that get the signal."""
        match fault:
            case Fault.KILL_ENGINE | Fault.STOP_ENGINE:
                return member.pids[1:]
            case Fault.KILL_HTTP | Fault.RESTART:
                return member.pids[:1]
            case _:
                return member.pids

    def _hit(self, member: Member, planned: PlannedFault) -> None:
        fault, pids = planned.fault, self._targets(member, planned.fault)
        member.num_faults += 1
        member.num_ends += not fault.is_stop or fault is Fault.STOP_KILL
        if fault is not Fault.STOP_BOTH or role_of(member.name) != GATEWAY:
            member.is_ready = False
        if fault is Fault.BLACKOUT:
            member.dead_until_s = time.monotonic() + planned.for_s
        if fault.is_stop:
            self._suspend(member, pids, planned)
        elif fault is Fault.RESTART:
            member.ending = member.process
            for pid in pids:
                _signal(pid, signal.SIGTERM)
        else:
            self._kill(pids)

    def _kill(self, pids: Sequence[int]) -> None:
        for pid in pids:
            self.num_kills += _signal(pid, signal.SIGKILL)

    def _suspend(self, member: Member, pids: Sequence[int], planned: PlannedFault) -> None:
        stopped = [pid for pid in pids if _signal(pid, signal.SIGSTOP)]
        self.num_stops += bool(stopped)
        member.suspended.update(stopped)
        task = asyncio.create_task(self._go_on(member, stopped, planned))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _go_on(self, member: Member, pids: list[int], planned: PlannedFault) -> None:
        began_s = time.monotonic()
        try:
            await asyncio.sleep(planned.for_s)
        finally:
            if planned.fault is Fault.STOP_KILL:
                self._kill(pids)
            for pid in pids:
                _signal(pid, signal.SIGCONT)
            member.suspended.difference_update(pids)
            of_gateway = role_of(member.name) == GATEWAY
            self.suspensions.append(Suspension(begin_s=began_s, end_s=time.monotonic(), of_gateway=of_gateway))

    # ------------------------------------------------------------ counts

    async def metrics(self, name: str) -> str:
        """Return the text of /metrics of a process. Raises `HttpFailure`."""
        _, body = await read_whole(self._clients[name], "/metrics", timeout_s=10.0)
        return body.decode()


def family_of(pid: int) -> list[int]:
    """Return the process and its descendants, parents first; without those that have just ended."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for word in words for one in family_of(int(word)))]


def processes_of(sessions: set[int]) -> list[int]:
    """Return the living processes of these sessions."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _parent, _group, session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
                if int(session) in sessions and state != "Z":
                    found.append(int(path.name))
    return found


def num_open_files(pid: int, folder: Path = Path("/proc")) -> int:
    """Return the number of open files of a process, without those of the GPU's driver, which opens them on demand."""
    count = 0
    for path in (folder / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            count += not os.readlink(path).startswith(_GPU_DEVICES)
    return count


def tail(path: Path, num_lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])


def with_gateways(plans: Sequence[ChildPlan], *, count: int) -> list[ChildPlan]:
    """Return the plans with `count` gateways "gateway-N" in place of the one router."""
    *workers, router = plans
    gateways = []
    for index, port in enumerate(free_ports(count)):
        flags = [word for word in router.argv if not word.startswith("--port=")]
        gateways.append(
            replace(router, name=f"{GATEWAY}-{index}", argv=(*flags, f"--port={port}"), url=f"http://127.0.0.1:{port}")
        )
    return [*workers, *gateways]


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True

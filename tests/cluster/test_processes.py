"""Children are supervised, restarted and stopped, and never outlive their parent. Here they are one-line programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.errors import ConfigError, Timeout, Unavailable
from kvist.supervisor.child import ALIVE, NO_ANSWER, READY, Answer, ChildPlan, ChildState
from kvist.supervisor.engine_process import restart_wait_s

STAYS = "import sys; print('up', flush=True); sys.stdin.readline()"
DIES = "import sys; print('no such model', flush=True); sys.exit(3)"
DEAF = "import time; print('up', flush=True); time.sleep(60)"


class Lines:
    """Collects the lines of the children; a test can wait for a line."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self._more = threading.Condition()

    def __call__(self, name: str, line: str) -> None:
        with self._more:
            self.seen.append((name, line))
            self._more.notify_all()

    def wait_for(self, text: str, times: int = 1) -> None:
        with self._more:
            assert self._more.wait_for(lambda: sum(text in line for _name, line in self.seen) >= times, timeout=60), (
                self.seen
            )


def ready(_url: str, _instance_id: str) -> Answer:
    return READY


def alive(_url: str, _instance_id: str) -> Answer:
    return ALIVE


def plan(name: str, program: str) -> ChildPlan:
    return ChildPlan(name=name, argv=(sys.executable, "-c", program), url=name)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # ProcessLookupError if the process ends while its file is open
        return False


def test_the_wait_before_a_restart_doubles_up_to_a_limit() -> None:
    assert [restart_wait_s(deaths) for deaths in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 30.0]


def test_children_are_started_their_output_relayed_and_stopped() -> None:
    lines = Lines()
    with Processes([plan("a", STAYS), plan("b", STAYS)], probe=ready, sink=lines) as processes:
        processes.wait_ready(60)
        lines.wait_for("up", times=2)
        pids = [child.pid for child in processes.children.values()]
    assert sorted(lines.seen) == [("a", "up"), ("b", "up")]
    assert not any(is_alive(pid) for pid in pids if pid is not None)


def test_a_child_gets_its_own_environment_settings_and_none_of_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIST_PORT", "8000")  # a setting of the parent; the child's is on its command line
    says = "import os; print(*sorted(k for k in os.environ if k.startswith('KVIST_')), flush=True); input()"
    child = ChildPlan(name="a", argv=(sys.executable, "-c", says), url="a", environ={"KVIST_API_KEY": "hush"})
    lines = Lines()
    with Processes([child], probe=ready, sink=lines):
        lines.wait_for("KVIST_API_KEY")
    assert lines.seen == [("a", "KVIST_API_KEY KVIST_INSTANCE_ID")]


def test_a_killed_child_is_reported_and_started_again() -> None:
    lines = Lines()
    with Processes([plan("a", STAYS)], probe=ready, sink=lines) as processes:
        processes.wait_ready(60)
        lines.wait_for("up")
        first = processes.children["a"].pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        lines.wait_for("was killed by signal 9")
        lines.wait_for("up", times=2)
        processes.wait_ready(60)
        assert processes.children["a"].num_restarts == 1
        assert processes.children["a"].pid != first


def test_a_child_that_cannot_start_fails_the_wait_and_its_last_lines_are_quoted() -> None:
    with (
        Processes([plan("a", DIES)], probe=alive, sink=Lines()) as processes,
        pytest.raises(Unavailable, match="no such model"),
    ):
        processes.wait_ready(60)


def test_waiting_for_a_child_that_never_gets_ready_times_out() -> None:
    with (
        Processes([plan("a", STAYS)], probe=alive, sink=Lines()) as processes,
        pytest.raises(Timeout, match="not ready after 0 s: a"),
    ):
        processes.wait_ready(0.2)


def test_a_child_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.cluster.processes.STOP_GRACE_S", 0.5)
    lines = Lines()
    processes = Processes([plan("a", DEAF)], probe=ready, sink=lines)
    processes.start()
    lines.wait_for("up")
    pid = processes.children["a"].pid
    processes.stop()
    assert pid is not None
    assert not is_alive(pid)
    assert processes.children["a"].state is ChildState.STOPPED


def test_nothing_is_left_behind_when_the_parent_is_killed() -> None:
    program = textwrap.dedent(f"""
        import os, sys, time
        from kvist.cluster.processes import Processes
        from kvist.supervisor.child import READY, ChildPlan
        def say(line):  # one write a line, whole, from either thread
            os.write(1, line.encode() + bytes([10]))
        child = ChildPlan(name="a", argv=(sys.executable, "-c", {STAYS!r}), url="a")
        processes = Processes([child], probe=lambda url, instance_id: READY, sink=lambda name, line: say(line))
        processes.start()
        say(f"pid {{processes.children['a'].pid}}")
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    up, pid_line = sorted(parent.stdout.readline() for _ in range(2))[::-1]  # from two threads, in any order
    assert up == "up\n"
    pid = int(pid_line.removeprefix("pid "))
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # end of file: the child has also closed the pipe
    give_up_s = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < give_up_s, f"process {pid} outlived its parent"
        time.sleep(0.02)


REFUSES = "import sys; print('cannot listen on --port 1', flush=True); sys.exit(2)"
DRAINS = """
import sys
print("up", flush=True)
for line in sys.stdin:
    print("received", line.strip(), flush=True)
    if line == "hurry\\n":
        break
print("x" * 300_000, flush=True)  # more than a pipe holds: somebody must read it
print("last word", flush=True)
"""


@pytest.mark.case("port-of-another")
def test_a_child_that_refuses_its_settings_ends_the_start_and_is_not_restarted() -> None:
    lines = Lines()
    with Processes([plan("a", REFUSES)], probe=alive, sink=lines, lines_are_shown=True) as processes:
        with pytest.raises(ConfigError, match="a refused its settings") as caught:
            processes.wait_ready(60)
        assert processes.children["a"].state is ChildState.REFUSED
        assert processes.children["a"].num_restarts == 0
    shown = [line for _name, line in lines.seen] + [caught.value.message]
    assert sum("cannot listen" in line for line in shown) == 1


@pytest.mark.case("stopped-engine")
def test_a_ready_child_that_hangs_is_logged_killed_and_restarted() -> None:
    lines = Lines()

    def answers(_url: str, _instance_id: str) -> Answer:
        return NO_ANSWER if stopped else READY

    stopped = False
    timeouts = ChildTimeouts(stall_restart_s=1.0)
    with Processes([plan("a", STAYS)], probe=answers, sink=lines, timeouts=timeouts) as processes:
        processes.wait_ready(60)
        first = processes.children["a"].pid
        assert first is not None
        stopped = True
        os.kill(first, signal.SIGSTOP)
        lines.wait_for("has not answered for 1 s (--stall-restart-s)")
        lines.wait_for("was killed by signal 9")
        stopped = False
        processes.wait_ready(60)
        assert not is_alive(first)


@pytest.mark.case("shutdown-timeout-of-up")
def test_a_child_may_finish_its_open_requests_unless_the_stop_is_hurried() -> None:
    lines = Lines()
    processes = Processes([plan("a", DRAINS)], probe=ready, sink=lines, timeouts=ChildTimeouts(drain_s=3600))
    processes.start()
    lines.wait_for("up")
    stopping = threading.Thread(target=processes.stop)
    stopping.start()
    lines.wait_for("received stop")
    assert stopping.is_alive()
    processes.hurry()
    stopping.join(60)
    assert not stopping.is_alive()
    assert lines.seen[-1] == ("a", "last word")


@pytest.mark.case("shutdown-timeout-of-up")
def test_a_suspended_child_is_continued_so_that_it_can_end() -> None:
    lines = Lines()
    processes = Processes([plan("a", STAYS)], probe=ready, sink=lines, timeouts=ChildTimeouts(drain_s=3600))
    processes.start()
    lines.wait_for("up")
    pid = processes.children["a"].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    processes.stop()
    assert not is_alive(pid)


def test_children_start_after_and_stop_before_those_that_they_use(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"import sys; f = open({str(log)!r}, 'a', buffering=1)\n"
    program += "print(sys.argv[1], 'starts', file=f); sys.stdin.readline(); print(sys.argv[1], 'stops', file=f)"

    def logging_plan(name: str, *uses: str) -> ChildPlan:
        argv = (sys.executable, "-c", program, name)
        return ChildPlan(name=name, argv=argv, url=name, starts_after=uses, stops_before=uses)

    plans = [logging_plan("worker", "store"), logging_plan("store", "master"), logging_plan("master")]
    with Processes(plans, probe=ready_once_logged(log), sink=Lines()) as processes:
        processes.wait_ready(60)
    order = ["master", "store", "worker"]
    assert log.read_text().split("\n")[:-1] == [f"{name} starts" for name in order] + [
        f"{name} stops" for name in reversed(order)
    ]


def ready_once_logged(log: Path) -> Callable[[str, str], Answer]:
    def probe(url: str, _instance_id: str) -> Answer:
        return READY if log.exists() and f"{url} starts" in log.read_text() else NO_ANSWER

    return probe

"""A child process of `kvist up`, `kvist demo` or `kvist chat`: its plan, its state, and its current run.

A child is identified by the instance id that it was started with: another server on its port never counts as ready.
Processes (cluster/processes.py) owns the children, and changes them under its lock.
"""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

NUM_LAST_LINES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildPlan:
    """One process to run. `url` is the address of its HTTP server."""

    name: str  # "prefill-0", "router"
    argv: tuple[str, ...]
    url: str
    starts_after: tuple[str, ...] = ()  # children that must have been ready before the first start
    stops_before: tuple[str, ...] = ()  # children that this one uses, which end after it
    stop_s: float = 0.0  # time to end in order, if that may take longer than open requests
    listen_fd: int | None = None  # our socket, on which the child accepts connections after ACCEPT
    environ: dict[str, str] = field(
        default_factory=dict
    )  # added to our environment, which is passed on without KVIST_ variables


class ChildState(enum.Enum):
    PLANNED = "waiting for other processes"
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting to restart"
    REFUSED = "refused to start"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer of a child to a probe."""

    alive: bool = False
    ready: bool = False
    doing: str = ""  # current activity during the start, for people


NO_ANSWER, ALIVE, READY = Answer(), Answer(alive=True), Answer(alive=True, ready=True)

Probe = Callable[[str, str], Answer]  # (url, instance id) -> answer; blocks for about one second at most
Sink = Callable[[str, str], None]  # (child's name, one line of its output); must not block


def environment_of(plan: ChildPlan) -> dict[str, str]:
    """Return our environment without settings, and that of the plan: the settings of a child are on its command line or
    in its plan."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}
    return inherited | plan.environ


class Child:
    """One planned process, through all its restarts. Mutable; changed only by `Processes`, under its lock."""

    def __init__(self, plan: ChildPlan, label: str | None = None) -> None:
        """`label` distinguishes the child from another one of the same name, in its lines and in errors."""
        self.plan = plan
        self.label = label or plan.name
        self.is_spare = False  # started beside another child of its name, which still has its place
        self.is_leaving = False  # its end is asked for: it is not restarted
        self.state = ChildState.STOPPED
        self.num_restarts = 0
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self.process: subprocess.Popen[bytes] | None = None
        self.instance_id = ""  # of the current run
        self.doing = ""  # current activity during the start, for people
        self.was_ready = False  # in any run
        self.started_s = 0.0
        self.last_answer_s = 0.0
        self.silence_reported = False
        self.restart_at_s = 0.0
        self.num_deaths_in_a_row = 0
        self.partial_line = b""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def start(self, now_s: float) -> None:
        self.instance_id = secrets.token_hex(8)
        inherited = () if self.plan.listen_fd is None else (self.plan.listen_fd,)
        self.process = subprocess.Popen(
            self.plan.argv,
            pass_fds=inherited,
            stdin=subprocess.PIPE,  # for the lines of stop_requests.py; end of file means that this process is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment_of(self.plan) | {"KVIST_INSTANCE_ID": self.instance_id},
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the children in order
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.partial_line = b""
        self.state, self.started_s, self.silence_reported = ChildState.STARTING, now_s, False

    def send(self, word: bytes) -> None:
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(
                    self.process.stdin.fileno(), word + b"\n"
                )  # a few bytes: they fit into the pipe of a living child
            self.process.send_signal(signal.SIGCONT)  # a suspended process would not read the line

    def signal_group(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def reap(self) -> None:
        """Clean up after the process has died: kill the rest of its process group and close its pipes."""
        self.signal_group(signal.SIGKILL)
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1.0)
        self.process = None

    def take_lines(self, chunk: bytes) -> list[str]:
        *lines, self.partial_line = (self.partial_line + chunk).split(b"\n")
        texts = [line.decode("utf-8", "replace").rstrip() for line in lines]
        self.last_lines.extend(texts)
        return texts

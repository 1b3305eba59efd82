"""Child processes of one `kvist up` or `kvist demo`: started, watched, restarted, stopped; none left behind.

Life cycle of a child: STARTING until its `/ready` answers 200, then READY. When it dies on its own it is reported and
started again after a wait that doubles with each death in a row (a minute of health forgives the past). `stop` asks
every child to end, waits, and kills what is left, each with its whole process group.

Nothing outlives us even if we are killed with -9: each child holds the read end of a pipe as its standard input, runs
with `--stop-with-stdin`, and stops when our end closes.

One thread relays output, notices deaths and probes readiness, so that the caller may block on other things. It does not
decide what to run: that is the plan (plan.py).
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

from kvist.clock import MonotonicClock
from kvist.errors import Timeout, Unavailable
from kvist.worker.child import FORGIVE_AFTER_S, restart_wait_s

PROBE_INTERVAL_S = 0.25
STOP_GRACE_S = 10.0
NUM_LAST_LINES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildPlan:
    """What to run. `url` is where its HTTP answers once it is up."""

    name: str  # "prefill-0", "router"
    argv: tuple[str, ...]
    url: str
    environ: dict[str, str] = field(default_factory=dict)  # added to ours, less our own KVIST_ variables


class ChildState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting to restart"
    STOPPED = "stopped"


Probe = Callable[[str], bool]  # url -> does it say it is ready; must not block for more than a second or so
Sink = Callable[[str, str], None]  # (child's name, one line of its output)


def _inherited() -> dict[str, str]:
    """Our environment without settings: what a child must know of them is on its command line or in its plan."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}


class Child:
    """One planned process through all its lives. Changed only by `Processes`: its watching thread, then `stop`."""

    def __init__(self, plan: ChildPlan) -> None:
        self.plan = plan
        self.state = ChildState.STOPPED
        self.num_restarts = 0
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self.process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0
        self.restart_at_s = 0.0
        self.num_deaths_in_a_row = 0
        self.partial_line = b""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def start(self, now_s: float) -> None:
        self.process = subprocess.Popen(
            self.plan.argv,
            stdin=subprocess.PIPE,  # held open and never written: its end is the sign to stop
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**_inherited(), **self.plan.environ},
            start_new_session=True,  # Ctrl-C reaches us alone; we stop children in order
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.partial_line = b""
        self.state, self.started_s = ChildState.STARTING, now_s

    def signal_group(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def reap(self) -> None:
        """After death: whatever of its group is left goes too, and our ends of its pipes are closed."""
        self.signal_group(signal.SIGKILL)
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()

    def take_lines(self, chunk: bytes) -> list[str]:
        *lines, self.partial_line = (self.partial_line + chunk).split(b"\n")
        texts = [line.decode("utf-8", "replace").rstrip() for line in lines]
        self.last_lines.extend(texts)
        return texts


class Processes:
    """Starts every planned child and keeps it running until `stop`. Use as a context manager."""

    def __init__(self, plans: Sequence[ChildPlan], *, probe: Probe, sink: Sink) -> None:
        self.children = {plan.name: Child(plan) for plan in plans}
        self._probe = probe
        self._sink = sink
        self._clock = MonotonicClock()
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="watch-children", daemon=True)
        self._next_probe_s = 0.0

    def __enter__(self) -> Processes:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        for child in self.children.values():
            self._start_child(child)
        self._thread.start()

    def wait_ready(self, timeout_s: float, *, each_second: Callable[[], None] = lambda: None) -> None:
        """Until every child is ready. Raises `Timeout`, or `Unavailable` with its last lines if one died twice."""
        deadline_s = self._clock.now_s() + timeout_s
        while True:
            with self._changed:
                self._changed.wait(timeout=1.0)
            each_second()
            waiting = [child for child in self.children.values() if child.state is not ChildState.READY]
            if not waiting:
                return
            for child in waiting:
                if child.num_deaths_in_a_row >= 2:
                    raise Unavailable(f"{child.plan.name} does not start. It said last:\n" + _quoted(child))
            if self._clock.now_s() > deadline_s:
                names = ", ".join(child.plan.name for child in waiting)
                quoted = "\n".join(_quoted(child) for child in waiting)
                raise Timeout(f"after {timeout_s:.0f} s not ready: {names}. They said last:\n{quoted}")

    def stop(self) -> None:
        """The last child first, as it leans on the others; then those together. Each gets SIGTERM, and SIGKILL with its
        whole group when `STOP_GRACE_S` have passed. Harmless when already stopped."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_GRACE_S)
        deadline_s = self._clock.now_s() + STOP_GRACE_S
        *others, last = self.children.values()
        for children in ((last,), others):
            for child in children:
                if child.process is not None:
                    child.process.terminate()
            for child in children:
                self._bury(child, deadline_s)
        self._selector.close()

    def _bury(self, child: Child, deadline_s: float) -> None:
        if child.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=max(0.1, deadline_s - self._clock.now_s()))
            child.signal_group(signal.SIGKILL)
            child.process.wait()
            self._drain(child)
            child.reap()
        child.process, child.state = None, ChildState.STOPPED

    # ---- the watching thread

    def _watch(self) -> None:
        while not self._stopping.is_set():
            for key, _events in self._selector.select(timeout=0.1):
                child = key.data
                if not self._relay(child, key.fileobj):
                    self._selector.unregister(key.fileobj)
            now_s = self._clock.now_s()
            for child in self.children.values():
                self._tend(child, now_s)
            if now_s >= self._next_probe_s:
                self._next_probe_s = now_s + PROBE_INTERVAL_S
                self._probe_one()

    def _relay(self, child: Child, pipe: object) -> bool:
        """Pass on what the child wrote. False at end of file."""
        assert hasattr(pipe, "fileno")
        chunk = os.read(pipe.fileno(), 1 << 16)
        for line in child.take_lines(chunk):
            self._sink(child.plan.name, line)
        return bool(chunk)

    def _drain(self, child: Child) -> None:
        pipe: IO[bytes] | None = child.process.stdout if child.process is not None else None
        if pipe is None or pipe.closed:
            return
        with contextlib.suppress(BlockingIOError, OSError):
            while self._relay(child, pipe):
                pass

    def _tend(self, child: Child, now_s: float) -> None:
        if child.state is ChildState.WAITING:
            if now_s >= child.restart_at_s:
                child.num_restarts += 1
                self._start_child(child)
            return
        assert child.process is not None
        if child.state is ChildState.READY and now_s - child.started_s > FORGIVE_AFTER_S:
            child.num_deaths_in_a_row = 0
        status = child.process.poll()
        if status is None:
            return
        self._drain(child)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.process.stdout)  # type: ignore[arg-type]
        child.reap()
        child.num_deaths_in_a_row += 1
        wait_s = restart_wait_s(child.num_deaths_in_a_row)
        child.state, child.restart_at_s = ChildState.WAITING, now_s + wait_s
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        self._say(child, f"{how}; starting it again in {wait_s:g} s")

    def _start_child(self, child: Child) -> None:
        child.start(self._clock.now_s())
        assert child.process is not None
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)

    def _probe_one(self) -> None:
        """Ask the children that are starting whether they are ready."""
        for child in self.children.values():
            if child.state is ChildState.STARTING and self._probe(child.plan.url):
                child.state = ChildState.READY
                with self._changed:
                    self._changed.notify_all()

    def _say(self, child: Child, text: str) -> None:
        self._sink(child.plan.name, text)
        with self._changed:
            self._changed.notify_all()


def _quoted(child: Child) -> str:
    return "\n".join(f"  [{child.plan.name}] {line}" for line in child.last_lines) or f"  [{child.plan.name}] nothing"

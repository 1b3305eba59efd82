"""Child processes of one `kvist up` or `kvist demo`: started, watched, restarted, stopped; none left behind.

Life cycle of a child: STARTING until its own `/ready` answers 200, then READY. A child is known by the instance id that
it was started with: a port that another server holds is never ready. A child that dies is reported and started again
after a wait that doubles with each death in a row (a minute of health forgives the past), but for one that says, before
it was ever ready, that its settings are wrong (exit status 2): REFUSED, since a restart would not heal that. A child
that was ready and answers nothing for `stall_restart_s`, stopped or blocked, is killed, which starts it again.

`stop` asks every child to end, waits as long as their requests may take, and kills what is left, each with its whole
process group. Children run with `--stop-with-stdin`: what they are told comes by a pipe, so that nothing outlives us
even if we are killed with -9.

One thread relays output and notices deaths, one for each child asks whether it answers, and the caller may block on
other things. They do not decide what to run: that is the plan (plan.py).
"""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import selectors
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

from kvist.clock import MonotonicClock, Oversleep
from kvist.cluster.lifeline import HURRY, STOP
from kvist.errors import ConfigError, Timeout, Unavailable
from kvist.worker.child import BACKOFF_RESET_S, restart_wait_s

CHECK_INTERVAL_S = 0.1
PROBE_INTERVAL_S = 0.25  # of a child that is starting
HEALTH_INTERVAL_S = 1.0  # of one that was ready
SILENT_AFTER_S = 5.0  # then it is said
STALL_RESTART_S = 30.0
STOP_GRACE_S = 15.0  # for a child to end, beyond what its open requests may take
HURRY_GRACE_S = 8.0
KILL_TIMEOUT_S = 10.0  # for the kernel to end a process that was killed
NUM_LAST_LINES = 60
REFUSED_STATUS = 2  # cli.py's for a mistake in the settings


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
    REFUSED = "refused to start"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a child answers when it is asked for its state."""

    alive: bool = False
    ready: bool = False
    doing: str = ""  # while it starts, for people


NO_ANSWER, ALIVE, READY = Answer(), Answer(alive=True), Answer(alive=True, ready=True)

Probe = Callable[[str, str], Answer]  # (url, instance id) -> how it answers; blocks for no more than a second or so
Sink = Callable[[str, str], None]  # (child's name, one line of its output); must not block


def _inherited() -> dict[str, str]:
    """Our environment without settings: what a child must know of them is on its command line or in its plan."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}


class Child:
    """One planned process through all its lives. Changed only by `Processes`, under its lock."""

    def __init__(self, plan: ChildPlan) -> None:
        self.plan = plan
        self.state = ChildState.STOPPED
        self.num_restarts = 0
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self.process: subprocess.Popen[bytes] | None = None
        self.instance_id = ""  # of this life
        self.doing = ""  # while it starts, for people
        self.was_ready = False  # in any life
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
        self.process = subprocess.Popen(
            self.plan.argv,
            stdin=subprocess.PIPE,  # for lifeline.py's words; its end means that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**_inherited(), **self.plan.environ, "KVIST_INSTANCE_ID": self.instance_id},
            start_new_session=True,  # Ctrl-C reaches us alone; we stop children in order
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.partial_line = b""
        self.state, self.started_s, self.silence_reported = ChildState.STARTING, now_s, False

    def send(self, word: bytes) -> None:
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self.process.stdin.fileno(), word + b"\n")  # a few bytes: the pipe takes them, or it is dead
            self.process.send_signal(signal.SIGCONT)  # a process that is stopped would not hear

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
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1.0)
        self.process = None

    def take_lines(self, chunk: bytes) -> list[str]:
        *lines, self.partial_line = (self.partial_line + chunk).split(b"\n")
        texts = [line.decode("utf-8", "replace").rstrip() for line in lines]
        self.last_lines.extend(texts)
        return texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long children may take."""

    drain_s: float = 0.0  # to finish their open requests when they are asked to end
    stall_restart_s: float = STALL_RESTART_S  # to answer again


class Processes:
    """Starts every planned child and keeps it running until `stop`. Use as a context manager."""

    def __init__(
        self,
        plans: Sequence[ChildPlan],
        *,
        probe: Probe,
        sink: Sink,
        limits: Limits | None = None,
        lines_are_shown: bool = False,
    ) -> None:
        """`lines_are_shown`: the sink puts them before the user's eyes, so that no error need repeat them."""
        self.children = {plan.name: Child(plan) for plan in plans}
        self._probe = probe
        self._sink = sink
        self._limits = limits or Limits()
        self._lines_are_shown = lines_are_shown
        self._clock = MonotonicClock()
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._watch, name="watch-children", daemon=True)]
        self._threads += [
            threading.Thread(target=self._probe_child, args=(child,), name=f"ask-{child.plan.name}", daemon=True)
            for child in self.children.values()
        ]

    def __enter__(self) -> Processes:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def start(self) -> None:
        with self._changed:
            for child in self.children.values():
                self._start_child(child)
        for thread in self._threads:
            thread.start()

    def wait_ready(self, timeout_s: float, *, each_second: Callable[[], None] = lambda: None) -> None:
        """Until every child is ready. Raises `ConfigError` when one refuses its settings, `Unavailable` when one died
        twice, `Timeout`; with the child's last lines, where they are not shown."""
        deadline_s = self._clock.now_s() + timeout_s
        while True:
            with self._changed:
                self._changed.wait(timeout=1.0)
            each_second()
            waiting = [child for child in self.children.values() if child.state is not ChildState.READY]
            if not waiting:
                return
            for child in waiting:
                if child.state is ChildState.REFUSED:
                    raise ConfigError(f"{child.plan.name} refused its settings{self._quote_last_lines(child)}")
                if child.num_deaths_in_a_row >= 2:
                    raise Unavailable(f"{child.plan.name} does not start{self._quote_last_lines(child)}")
            if self._clock.now_s() > deadline_s:
                names = ", ".join(child.plan.name for child in waiting)
                quoted = "".join(map(self._quote_last_lines, waiting))
                raise Timeout(f"after {timeout_s:.0f} s not ready: {names}{quoted}")

    def _quote_last_lines(self, child: Child) -> str:
        if self._lines_are_shown:
            return f": see the lines of {child.plan.name} above"
        name = child.plan.name
        return "; its last lines:\n" + ("\n".join(f"  [{name}] {line}" for line in child.last_lines) or "  none")

    def stop(self) -> None:
        """The last child first, as it leans on the others; then those together. Each is asked to end, and killed with
        its whole group when its time is over. Harmless when already stopped."""
        self._stopping.set()
        *others, last = self.children.values()
        for children in ((last,), others):
            with self._changed:
                for child in children:
                    child.send(STOP)
            self._wait_ended(children)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=STOP_GRACE_S)
        with self._changed:
            for child in self.children.values():  # those whose watching thread never ran
                child.reap()
                child.state = ChildState.STOPPED
        self._selector.close()

    def hurry(self) -> None:
        """Shorten a stop that is under way. Safe in a signal handler."""
        self._hurried.set()

    def _wait_ended(self, children: Sequence[Child]) -> None:
        end_s = self._clock.now_s() + self._limits.drain_s + STOP_GRACE_S
        hurried = False
        while self._threads[0].is_alive() and any(child.process is not None for child in children):
            now_s = self._clock.now_s()
            if self._hurried.is_set() and not hurried:
                hurried, end_s = True, min(end_s, now_s + HURRY_GRACE_S)
                with self._changed:
                    for child in children:
                        child.send(HURRY)
            if now_s > end_s:
                with self._changed:
                    for child in children:
                        child.signal_group(signal.SIGKILL)
            if now_s > end_s + KILL_TIMEOUT_S:
                return
            with self._changed:
                self._changed.wait(timeout=CHECK_INTERVAL_S)

    # ---- the watching thread

    def _watch(self) -> None:
        oversleep = Oversleep(self._clock.now_s(), longest_s=1.0)
        while not (self._stopping.is_set() and all(child.process is None for child in self.children.values())):
            ready = self._selector.select(timeout=CHECK_INTERVAL_S)
            with self._changed:
                for key, _events in ready:
                    if not self._relay(key.data, key.fileobj):
                        self._selector.unregister(key.fileobj)
                now_s = self._clock.now_s()
                late_s = oversleep.look(now_s)
                for child in self.children.values():
                    child.last_answer_s += late_s
                    self._supervise(child, now_s)

    def _relay(self, child: Child, pipe: object) -> bool:
        """Pass on what the child wrote. False at end of file."""
        assert hasattr(pipe, "fileno")
        chunk = os.read(pipe.fileno(), 1 << 16)
        for line in child.take_lines(chunk):
            self._sink(child.plan.name, line)
        return bool(chunk)

    def _relay_rest(self, child: Child) -> None:
        pipe: IO[bytes] | None = child.process.stdout if child.process is not None else None
        if pipe is None or pipe.closed:
            return
        with contextlib.suppress(BlockingIOError, OSError):
            while self._relay(child, pipe):
                pass

    def _supervise(self, child: Child, now_s: float) -> None:
        if child.process is None:
            if child.state is ChildState.WAITING and now_s >= child.restart_at_s and not self._stopping.is_set():
                child.num_restarts += 1
                self._start_child(child)
            return
        status = child.process.poll()
        if status is not None:
            self._handle_exit(child, status, now_s)
        elif child.state is ChildState.READY and not self._stopping.is_set():
            if now_s - child.started_s > BACKOFF_RESET_S:
                child.num_deaths_in_a_row = 0
            self._check_silence(child, now_s - child.last_answer_s)

    def _handle_exit(self, child: Child, status: int, now_s: float) -> None:
        assert child.process is not None
        self._relay_rest(child)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.process.stdout)  # type: ignore[arg-type]
        child.reap()
        if self._stopping.is_set():
            child.state = ChildState.STOPPED
        elif status == REFUSED_STATUS and not child.was_ready:
            child.state = ChildState.REFUSED
        else:
            child.num_deaths_in_a_row += 1
            wait_s = restart_wait_s(child.num_deaths_in_a_row)
            child.state, child.restart_at_s = ChildState.WAITING, now_s + wait_s
            how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
            self._sink(child.plan.name, f"{how}; starting it again in {wait_s:g} s")
        self._changed.notify_all()

    def _check_silence(self, child: Child, silent_s: float) -> None:
        if silent_s >= self._limits.stall_restart_s:
            self._sink(child.plan.name, f"has answered nothing for {silent_s:.0f} s (--stall-restart-s): it is killed")
            child.signal_group(signal.SIGKILL)
        elif (silent_s >= SILENT_AFTER_S) is not child.silence_reported:
            child.silence_reported = not child.silence_reported
            text = f"has answered nothing for {silent_s:.0f} s: it is stopped or blocked"
            self._sink(child.plan.name, text if child.silence_reported else "answers again")

    def _start_child(self, child: Child) -> None:
        child.start(self._clock.now_s())
        assert child.process is not None
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)

    # ---- a thread for each child

    def _probe_child(self, child: Child) -> None:
        """Ask it for its state: until it is ready, and then whether it still answers."""
        while not self._stopping.wait(HEALTH_INTERVAL_S if child.state is ChildState.READY else PROBE_INTERVAL_S):
            instance_id = child.instance_id
            answer = self._probe(child.plan.url, instance_id) if child.process is not None else NO_ANSWER
            with self._changed:
                if not answer.alive or child.process is None or child.instance_id != instance_id:
                    continue
                child.last_answer_s = self._clock.now_s()
                is_news = answer.doing != child.doing
                child.doing = answer.doing
                if answer.ready and child.state is ChildState.STARTING:
                    child.state, child.was_ready, is_news = ChildState.READY, True, True
                if is_news:
                    self._changed.notify_all()

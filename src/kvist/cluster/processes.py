"""The child processes of `kvist up` and `kvist demo`: started, supervised, restarted, stopped; none is left behind.

Life cycle of a child: STARTING until its own `/ready` answers 200, then READY. A child is identified by the instance id
that it was started with: another server on its port never counts as ready. A child that dies is reported and restarted
after a wait that doubles with each death in a row; a minute of health resets the wait. The exception is a child that
exits with status 2 (wrong settings) before it was ever ready: its state becomes REFUSED, because a restart would not
help. A child that was ready and does not answer for `stall_restart_s`, suspended or blocked, is killed and restarted.

A child is started when all children of its `starts_after` have been ready. `stop` asks the children to end, each before
those of its `stops_before`, waits as long as open requests may take, and then kills the remaining children, each with
its whole process group. Children run with `--stop-with-stdin` and receive stop requests through a pipe, so that
they end even if this process is killed with SIGKILL.

A child is replaced in steps (upgrade/): `start_one` starts another child with its name or a new one, `wait_one` waits
until that child is ready, `take_place` gives it the place of the old one, `end_one` ends a child for good.

One thread relays output and notices deaths, and one thread per child probes the child; the caller may block. The
processes to run are decided in plan.py.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from kvist.clock import MonotonicClock, PauseMeter
from kvist.cluster.stop_requests import ACCEPT, HURRY, STOP
from kvist.errors import ConfigError, Timeout, Unavailable
from kvist.supervisor.child import NO_ANSWER, Child, ChildPlan, ChildState, Probe, Sink
from kvist.supervisor.engine_process import BACKOFF_RESET_S, restart_wait_s

CHECK_INTERVAL_S = 0.1
PROBE_INTERVAL_S = 0.25  # of a child that is starting
HEALTH_INTERVAL_S = 1.0  # of a child that was ready
SILENT_AFTER_S = 5.0  # then the silence is reported
STALL_RESTART_S = 30.0
STOP_GRACE_S = 15.0  # for a child to end, added to the time of its open requests
HURRY_GRACE_S = 8.0
KILL_TIMEOUT_S = 10.0  # for the kernel to end a process that was killed
REFUSED_STATUS = 2  # exit status of cli.py for a mistake in the settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildTimeouts:
    """Time limits of the children."""

    drain_s: float = 0.0  # for open requests at a stop
    stall_restart_s: float = STALL_RESTART_S  # without an answer, until a restart


class Processes:
    """Starts every planned child and keeps it running until `stop`. Use as a context manager."""

    def __init__(
        self,
        plans: Sequence[ChildPlan],
        *,
        probe: Probe,
        sink: Sink,
        timeouts: ChildTimeouts | None = None,
        lines_are_shown: bool = False,
    ) -> None:
        """`lines_are_shown`: the sink shows all lines to the user, so that errors do not quote them."""
        self.children = {plan.name: Child(plan) for plan in plans}
        self._probe = probe
        self._sink = sink
        self._timeouts = timeouts or ChildTimeouts()
        self._lines_are_shown = lines_are_shown
        self._clock = MonotonicClock()
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._watch, name="watch-children", daemon=True)]
        self._threads += [self._prober(child) for child in self.children.values()]

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
                child.state = ChildState.PLANNED
                self._start_if_due(child)
        for thread in self._threads:
            thread.start()

    def _prober(self, child: Child) -> threading.Thread:
        return threading.Thread(target=self._probe_child, args=(child,), name=f"probe-{child.plan.name}", daemon=True)

    def wait_ready(self, timeout_s: float, *, each_second: Callable[[], None] = lambda: None) -> None:
        """Wait until every child is ready. Raises `ConfigError` when a child refuses its settings, `Unavailable` when a
        child died twice, and `Timeout`; the error quotes the child's last lines unless they are shown anyway."""
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
                raise Timeout(f"not ready after {timeout_s:.0f} s: {names}{quoted}")

    def _quote_last_lines(self, child: Child) -> str:
        name = child.label
        if self._lines_are_shown:
            return f": see the lines of {name} above"
        return "; its last lines:\n" + ("\n".join(f"  [{name}] {line}" for line in child.last_lines) or "  none")

    # ---- one child after another, while the others run

    def start_one(self, plan: ChildPlan) -> Child:
        """Start another child, beside the one of its name if there is one: until `take_place`, the child is labelled as
        the new one, and its listening socket is not used. Raises `Unavailable` during a
        stop, and for a program that cannot be started."""
        with self._changed:
            self._check_not_stopping()
            is_spare = plan.name in self.children
            child = Child(plan, f"{plan.name}+" if is_spare else plan.name)
            assert child.label not in self.children, "one replacement at a time"
            child.is_spare = is_spare
            try:
                self._start_child(child)
            except OSError as error:
                raise Unavailable(f"{plan.argv[0]} cannot be started: {error.strerror}") from error
            self.children[child.label] = child
            prober = self._prober(child)
            self._threads.append(prober)
        prober.start()
        return child

    def wait_one(self, child: Child, timeout_s: float) -> None:
        """Wait until the child is ready. Raises `Unavailable` when it has died once or a stop has begun, `ConfigError`
        when it refuses its settings, and `Timeout`; errors quote its last lines."""
        deadline_s = self._clock.now_s() + timeout_s
        with self._changed:
            while child.state is not ChildState.READY:
                self._check_not_stopping()
                if child.state is ChildState.REFUSED:
                    raise ConfigError(f"{child.label} refused its settings{self._quote_last_lines(child)}")
                if child.num_deaths_in_a_row:
                    raise Unavailable(f"{child.label} does not start{self._quote_last_lines(child)}")
                if self._clock.now_s() > deadline_s:
                    raise Timeout(f"{child.label} is not ready after {timeout_s:g} s{self._quote_last_lines(child)}")
                self._changed.wait(timeout=CHECK_INTERVAL_S)

    def take_place(self, child: Child) -> Child:
        """Give the spare child the place of the one with its name, which is returned: it is not restarted when it
        ends, and `end_one` ends it. From now on both accept connections, if they share a listening socket."""
        with self._changed:
            self._check_not_stopping()
            old = self.children[child.plan.name]
            del self.children[child.label]
            old.label, old.is_leaving = f"{child.plan.name}-", True
            child.label, child.is_spare = child.plan.name, False
            self.children |= {child.label: child, old.label: old}
            self._let_accept(child)
        return old

    def end_one(
        self,
        child: Child,
        *,
        word: bytes = STOP,
        within_s: float | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Ask the child to end by `word`, wait for its end, and forget the child. A child that has not ended after
        `within_s`, by default the time of open requests and a grace period, is killed. `before` runs first, as a
        part of this time: the child is no longer restarted then."""
        began_s = self._clock.now_s()
        with self._changed:
            child.is_leaving = True
        if before is not None:
            before()
        with self._changed:
            if child.process is None:
                child.state = ChildState.STOPPED
            child.send(word)
        self._wait_ended([child], None if within_s is None else within_s - (self._clock.now_s() - began_s))
        with self._changed:
            self.children = {label: each for label, each in self.children.items() if each is not child}

    def _check_not_stopping(self) -> None:
        if self.stopping:
            raise Unavailable("kvist up is stopping")

    def _let_accept(self, child: Child) -> None:
        if child.plan.listen_fd is not None and not child.is_spare:
            child.send(ACCEPT)

    # ---- the end

    def stop(self) -> None:
        """Stop the children in their order. A child that does not end in time is killed with its whole process group.
        Harmless when already stopped."""
        self._stopping.set()
        for children in self._stop_order():
            with self._changed:
                for child in children:
                    child.send(STOP)
            self._wait_ended(children)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=STOP_GRACE_S)
        with self._changed:
            for child in self.children.values():  # relevant if the watching thread never ran
                child.reap()
                child.state = ChildState.STOPPED
        self._selector.close()

    def _stop_order(self) -> list[list[Child]]:
        """Return the children in groups: the children of one group end together."""
        with self._changed:
            left, groups = dict(self.children), list[list[Child]]()
        while left:
            needed = {name for child in left.values() for name in child.plan.stops_before}
            groups.append([left.pop(label) for label, child in list(left.items()) if child.plan.name not in needed])
            assert groups[-1], "children that each stop before the other"
        return groups

    def hurry(self) -> None:
        """Shorten the stop in progress. Safe in a signal handler."""
        self._hurried.set()

    def _wait_ended(self, children: Sequence[Child], within_s: float | None = None) -> None:
        if within_s is None:
            stop_s = max((child.plan.stop_s for child in children), default=0.0)
            within_s = max(self._timeouts.drain_s, stop_s) + STOP_GRACE_S
        end_s = self._clock.now_s() + within_s
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
        pauses = PauseMeter(self._clock.now_s(), max_interval_s=1.0)
        while not (self._stopping.is_set() and all(child.process is None for child in self.children.values())):
            ready = self._selector.select(timeout=CHECK_INTERVAL_S)
            with self._changed:
                for key, _events in ready:
                    if not self._relay(key.data, key.fileobj):
                        self._selector.unregister(key.fileobj)
                now_s = self._clock.now_s()
                late_s = pauses.measure_s(now_s)
                for child in self.children.values():
                    child.last_answer_s += late_s
                    self._supervise(child, now_s)

    def _relay(self, child: Child, pipe: object) -> bool:
        """Pass on the output of the child. Returns False at end of file."""
        assert hasattr(pipe, "fileno")
        chunk = os.read(pipe.fileno(), 1 << 16)
        for line in child.take_lines(chunk):
            self._sink(child.label, line)
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
            self._start_if_due(child)
            if child.state is ChildState.WAITING and now_s >= child.restart_at_s and not self._stopping.is_set():
                child.num_restarts += 1
                self._start_child(child)
            return
        status = child.process.poll()
        if status is not None:
            self._handle_exit(child, status, now_s)
        elif child.state is ChildState.READY and not child.is_leaving and not self._stopping.is_set():
            if now_s - child.started_s > BACKOFF_RESET_S:
                child.num_deaths_in_a_row = 0
            self._check_silence(child, now_s - child.last_answer_s)

    def _handle_exit(self, child: Child, status: int, now_s: float) -> None:
        assert child.process is not None
        self._relay_rest(child)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.process.stdout)  # type: ignore[arg-type]
        child.reap()
        if self._stopping.is_set() or child.is_leaving:
            child.state = ChildState.STOPPED
        elif status == REFUSED_STATUS and not child.was_ready:
            child.state = ChildState.REFUSED
        else:
            child.num_deaths_in_a_row += 1
            wait_s = restart_wait_s(child.num_deaths_in_a_row)
            child.state, child.restart_at_s = ChildState.WAITING, now_s + wait_s
            how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
            self._sink(child.label, f"{how}; the next start is in {wait_s:g} s")
        self._changed.notify_all()

    def _check_silence(self, child: Child, silent_s: float) -> None:
        if silent_s >= self._timeouts.stall_restart_s:
            self._sink(child.label, f"has not answered for {silent_s:.0f} s (--stall-restart-s) and is killed")
            child.signal_group(signal.SIGKILL)
        elif (silent_s >= SILENT_AFTER_S) is not child.silence_reported:
            child.silence_reported = not child.silence_reported
            text = f"has not answered for {silent_s:.0f} s: the process is suspended or blocked"
            self._sink(child.label, text if child.silence_reported else "answers again")

    def _start_if_due(self, child: Child) -> None:
        """Start a planned child if the children that it waits for have been ready."""
        if child.state is not ChildState.PLANNED or self._stopping.is_set():
            return
        if all(self.children[name].was_ready for name in child.plan.starts_after):
            self._start_child(child)

    def _start_child(self, child: Child) -> None:
        child.start(self._clock.now_s())
        assert child.process is not None
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)
        self._let_accept(child)

    # ---- a thread for each child

    def _probe_child(self, child: Child) -> None:
        """Probe the child: until it is ready, and then whether it still answers."""
        while not self._stopping.wait(HEALTH_INTERVAL_S if child.state is ChildState.READY else PROBE_INTERVAL_S):
            if child.is_leaving:
                return
            instance_id = child.instance_id
            answer = self._probe(child.plan.url, instance_id) if child.process is not None else NO_ANSWER
            with self._changed:
                if not answer.alive or child.process is None or child.instance_id != instance_id:
                    continue
                child.last_answer_s = self._clock.now_s()
                has_changed = answer.doing != child.doing
                child.doing = answer.doing
                if answer.ready and child.state is ChildState.STARTING:
                    child.state, child.was_ready, has_changed = ChildState.READY, True, True
                if has_changed:
                    self._changed.notify_all()

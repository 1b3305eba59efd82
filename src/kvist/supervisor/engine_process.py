"""The parent's side of an engine process (`kvist serve`): start, supervise, restart, stop.

    STARTING ──Ready──► RUNNING ──died, or killed──► WAITING ──backoff──► STARTING     cancelled: ──► STOPPED
        └──StartFailed, or too slow──► the first time: run() raises; later: WAITING

`EngineProcess` is one run of an engine; `EngineSupervisor` starts one run after another. Each run has its own epoch, so
messages to an earlier run are never mistaken for messages to a later one. The engine logs to our standard error and
sends its announcements through a pipe.

A running engine sends a heartbeat twice a second (engine/watchdog.py). `health` has the time without progress, from the
heartbeats or from their absence; after `--stall-restart-s` without progress the engine is killed and restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from kvist.clock import MonotonicClock, PauseMeter
from kvist.engine.config import EngineConfig
from kvist.engine.messages import DRAIN, STOP, Beat, Progress, Ready, StartFailed, decode_line
from kvist.errors import ConfigError, EngineError, KvistError, Timeout, WorkerLost, error_from_wire
from kvist.memory.runtime_dir import remove_leftovers, runtime_dir
from kvist.request import Role
from kvist.wire import EngineHealth, EngineSpec

FIRST_RESTART_WAIT_S = 0.5
LONGEST_RESTART_WAIT_S = 30.0
BACKOFF_RESET_S = 60.0  # a run of this length resets the wait before the next start
STOP_GRACE_S = 10.0
CHECK_INTERVAL_S = 0.5  # between two checks of the engine's progress
_SELF_EXIT_GRACE_S = 2.0  # at the limit the engine first gets time to exit by itself, because it logs where it hangs
_MAX_LINE_BYTES = 1 << 20
ENGINE_COMMAND = (sys.executable, "-m", "kvist.engine")

logger = logging.getLogger(__name__)


class EngineProcess:
    """One run of an engine. `start` returns when the engine is ready; then `wait` for its end, or `stop` it."""

    def __init__(self, process: asyncio.subprocess.Process, ready: Ready) -> None:
        self.spec = ready.spec
        self._process = process
        self._clock = MonotonicClock()
        now_s = self._clock.now_s()
        self._last_beat_s, self._beat = now_s, Beat(turn_s=0.0, stalled_s=0.0)
        self.present_role: Role | None = None  # None: not reported yet
        self._pauses = PauseMeter(now_s, max_interval_s=2 * CHECK_INTERVAL_S)
        self._reader = asyncio.create_task(self._read_messages(), name="engine's beats")

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None],
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineProcess:
        """Start an engine and wait until it is ready. Raises the error that the engine reported (`ConfigError`,
        `ModelLoadError`, ...), `EngineError` if the engine died without a report, and `Timeout` after
        `--engine-start-timeout-s`. Leaves no process behind after an error or when cancelled."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_MAX_LINE_BYTES
        )
        try:
            async with asyncio.timeout(config.options.watch.engine_start_timeout_s):
                return cls(process, await _await_ready(process, config, on_progress))
        except BaseException as error:
            await _end(process, grace_s=0.0)
            if isinstance(error, TimeoutError):
                raise Timeout(
                    f"the engine was not ready within {config.options.watch.engine_start_timeout_s:g} s: "
                    "raise --engine-start-timeout-s, or see the log of the engine"
                ) from error
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        return await self._process.wait()

    def check_health(self) -> EngineHealth:
        """Return the current health. Must be called every `CHECK_INTERVAL_S`."""
        now_s = self._clock.now_s()
        self._last_beat_s += self._pauses.measure_s(now_s)
        silent_s = now_s - self._last_beat_s
        turn_s, stalled_s = self._beat.turn_s + silent_s, self._beat.stalled_s + silent_s
        return EngineHealth(turn_s=turn_s, stalled_s=stalled_s, silent_s=silent_s, place=self._beat.place)

    def drain(self) -> None:
        """Request that the engine takes no new request and ends after its last request."""
        _send_line(self._process, DRAIN)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Request that the engine ends now; send SIGKILL after `grace_s`. Harmless if the engine has ended."""
        await _end(self._process, grace_s=grace_s)
        await self._reader

    async def _read_messages(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        while line := await _read_line(stdout):
            match decode_line(line):
                case Beat() as beat:
                    self._beat, self._last_beat_s = beat, self._clock.now_s()
                    self.present_role = beat.role
                case None:
                    logger.warning("the engine printed %r", line)


async def _await_ready(
    process: asyncio.subprocess.Process, config: EngineConfig, on_progress: Callable[[str], None]
) -> Ready:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):  # the engine died at once, which is reported below
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        await process.stdin.drain()
    while line := await _read_line(process.stdout):
        match decode_line(line):
            case Progress(text=text):
                on_progress(text)
            case Ready() as ready:
                return ready
            case StartFailed(code=code, message=message):
                raise error_from_wire(code, message)
            case None:
                logger.warning("the engine printed %r", line)
    raise EngineError(
        f"the engine ended with status {await process.wait()} before it was ready: see the log of the engine"
    )


async def _end(process: asyncio.subprocess.Process, *, grace_s: float) -> None:
    if process.returncode is None and grace_s > 0:
        _send_line(process, STOP)
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _send_line(process: asyncio.subprocess.Process, word: bytes) -> None:
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(word + b"\n")  # a few bytes: they fit into the pipe of a living engine


async def _read_line(stdout: asyncio.StreamReader) -> bytes:
    """Read the next line, without lines over `_MAX_LINE_BYTES`; return b"" at end of file."""
    while True:
        try:
            return await stdout.readline()
        except ValueError:  # a line over the limit, which the reader has dropped
            continue


class EngineState(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting to restart"
    STOPPED = "stopped"


class EngineSupervisor:
    """Keeps one engine running. Mutable; owned by the task that runs `run`; others call `drain` and read the
    attributes.

    `on_progress` is called with each stage of a start, which is also in `health.doing`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None] = lambda _text: None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.state = EngineState.STOPPED
        self.spec: EngineSpec | None = None
        self.failure: KvistError | None = None  # why the last run ended
        self.num_restarts = 0
        self.health = EngineHealth()
        self._config = config
        self._command = command
        self._on_progress = on_progress
        self._clock = MonotonicClock()
        self._engine: EngineProcess | None = None
        self._draining = False

    def drain(self) -> bool:
        """Request that the engine takes no new request and ends after its last one; `run` then returns. Return False if
        no engine is running."""
        self._draining = True
        if self._engine is not None:
            self._engine.drain()
        return self._engine is not None

    async def run(self) -> None:
        """Run the engine until cancelled or drained, then stop it. Raises `KvistError` if the first start fails,
        because a retry is unlikely to succeed. Later starts are retried without limit; the waits between them grow up
        to `LONGEST_RESTART_WAIT_S`."""
        num_early_exits = 0
        try:
            while True:
                started_s = self._clock.now_s()
                try:
                    await self._run_once()
                except KvistError as error:
                    if self.num_restarts == 0 and self.failure is None:
                        raise
                    self._record_failure(error)
                if self._draining:
                    return
                lived_s = self._clock.now_s() - started_s
                num_early_exits = 1 if lived_s >= BACKOFF_RESET_S else num_early_exits + 1
                wait_s = restart_wait_s(num_early_exits)
                logger.error("%s; the next start is in %g s", self.failure, wait_s)
                self.state = EngineState.WAITING
                await asyncio.sleep(wait_s)
                self.num_restarts += 1
        finally:
            self.state = EngineState.STOPPED

    async def _run_once(self) -> None:
        try:
            await self._start_and_watch()
        finally:  # a killed engine could not remove its files
            await asyncio.shield(asyncio.to_thread(self._remove_leftovers))

    def _remove_leftovers(self) -> None:
        with contextlib.suppress(ConfigError, OSError):  # the engine has reported a problem of the folder
            remove_leftovers(runtime_dir(self._config.options.runtime.runtime_dir))

    async def _start_and_watch(self) -> None:
        self.state = EngineState.STARTING
        engine = await EngineProcess.start(self._config, on_progress=self._starting, command=self._command)
        try:
            self.state, self._engine = EngineState.RUNNING, engine
            self.health = EngineHealth()
            self.spec = engine.spec
            self._record_failure(WorkerLost(await self._watch(engine)))
        finally:
            self._engine = None
            self.spec = None
            await asyncio.shield(engine.stop())
            if engine.present_role is not None:  # the next process goes on in the role of this one
                self._config = replace(self._config, present_role=engine.present_role)

    async def _watch(self, engine: EngineProcess) -> str:
        """Wait until the engine has ended; kill it if it makes no progress. Return how the engine ended."""
        if self._draining:
            engine.drain()
        ending = asyncio.create_task(engine.wait(), name="engine's end")
        limit_s = self._config.options.watch.stall_restart_s + _SELF_EXIT_GRACE_S
        killed = ""
        while not ending.done():
            await asyncio.wait((ending,), timeout=CHECK_INTERVAL_S)
            self.health = engine.check_health()
            if self.health.stalled_s >= limit_s and not killed:
                killed = f", killed because it made no progress for {self.health.stalled_s:.0f} s (--stall-restart-s)"
                engine.kill()
        return f"the engine (pid {engine.pid}) ended with status {ending.result()}{killed}"

    def _starting(self, text: str) -> None:
        self.health = EngineHealth(doing=text)
        self._on_progress(text)

    def _record_failure(self, error: KvistError) -> None:
        self.failure, self.health = error, EngineHealth(problem=error.message)


def restart_wait_s(num_early_exits: int) -> float:
    """Return the wait before the next start: 0.5, 1, 2, ... 30 s."""
    return float(min(LONGEST_RESTART_WAIT_S, FIRST_RESTART_WAIT_S * 2.0 ** min(num_early_exits - 1, 16)))

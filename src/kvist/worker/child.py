"""The engine process as its parent (`kvist serve`) sees it: started, watched, restarted, stopped.

    STARTING ──Ready──► RUNNING ──it died──► WAITING ──backoff──► STARTING         stop(): from any state ──► STOPPED
        └──StartFailed, or too slow──► the first time: run() raises; later: WAITING

`EngineProcess` is one life; `EngineSupervisor` is all of them. Each life has its own epoch, so nothing that was sent to
one can be taken for the next one's. The engine's log goes to our own standard error; its announcements come by pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import sys
from collections.abc import Callable, Sequence

import msgspec

from kvist.clock import Clock, MonotonicClock
from kvist.cores import bind_process, usable_cores
from kvist.errors import EngineError, KvistError, Timeout, WorkerLost, error_from_wire
from kvist.wire import EngineSpec
from kvist.worker.config import EngineConfig
from kvist.worker.messages import Progress, Ready, StartFailed, decode_line

FIRST_RESTART_WAIT_S = 0.5
LONGEST_RESTART_WAIT_S = 30.0
FORGIVE_AFTER_S = 60.0  # a life this long makes the next wait short again
STOP_GRACE_S = 10.0
_MAX_LINE_BYTES = 1 << 20
ENGINE_COMMAND = (sys.executable, "-m", "kvist.worker")

log = logging.getLogger(__name__)


class EngineProcess:
    """One life. `start` returns when it serves; then `wait` for its end, or `stop` it."""

    def __init__(self, process: asyncio.subprocess.Process, ready: Ready) -> None:
        self.spec = ready.spec
        self.gateway_cores = ready.gateway_cores
        self._process = process
        assert process.stdout is not None
        self._drain = asyncio.create_task(_drain(process.stdout))

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None],
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineProcess:
        """Raises what the engine reported (`ConfigError`, `ModelLoadError`, ...), `EngineError` if it died without a
        word, `Timeout` after `config.engine_start_timeout_s`. Leaves no process behind then, nor when cancelled."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_MAX_LINE_BYTES
        )
        try:
            async with asyncio.timeout(config.engine_start_timeout_s):
                return cls(process, await _await_ready(process, config, on_progress))
        except BaseException as error:
            await _end(process, grace_s=0.0)
            if isinstance(error, TimeoutError):
                raise Timeout(
                    f"the engine did not get ready within {config.engine_start_timeout_s:g} s: "
                    "raise --engine-start-timeout-s, or look at its log"
                ) from error
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        return await self._process.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, then SIGKILL after `grace_s`. Harmless when it has ended."""
        await _end(self._process, grace_s=grace_s)
        await self._drain


async def _await_ready(
    process: asyncio.subprocess.Process, config: EngineConfig, on_progress: Callable[[str], None]
) -> Ready:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it died at once: its silence is reported below
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        await process.stdin.drain()
    while line := await process.stdout.readline():
        match decode_line(line):
            case Progress(text=text):
                on_progress(text)
            case Ready() as ready:
                return ready
            case StartFailed(code=code, message=message):
                raise error_from_wire(code, message)
            case None:
                log.warning("the engine printed %r", line)
    raise EngineError(f"the engine ended with status {await process.wait()} before it was ready: see its log")


async def _end(process: asyncio.subprocess.Process, *, grace_s: float) -> None:
    if process.returncode is None and grace_s > 0:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()


async def _drain(stdout: asyncio.StreamReader) -> None:
    while await stdout.read(1 << 16):
        pass


class EngineState(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting to restart"
    STOPPED = "stopped"


class EngineSupervisor:
    """Keeps one engine alive. Mutable; owned by the task that runs `run`; others read `state` and `spec`.

    `on_change` is called whenever `spec` becomes another life's, or None: the gateway then connects or lets go.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_change: Callable[[EngineSpec | None], None],
        command: Sequence[str] = ENGINE_COMMAND,
        clock: Clock | None = None,
    ) -> None:
        self.state = EngineState.STOPPED
        self.spec: EngineSpec | None = None
        self.failure: KvistError | None = None  # why the last life ended
        self.num_restarts = 0
        self._config = config
        self._command = command
        self._on_change = on_change
        self._clock = clock or MonotonicClock()
        self._cores = usable_cores()

    async def run(self) -> None:
        """Until cancelled; the engine is stopped then. Raises `KvistError` when the very first start fails: trying
        again would hardly help. What has worked once is tried again for ever, every `LONGEST_RESTART_WAIT_S`."""
        num_quick_deaths = 0
        try:
            while True:
                started_s = self._clock.now_s()
                try:
                    await self._one_life()
                except KvistError as error:
                    if self.num_restarts == 0 and self.failure is None:
                        raise
                    self.failure = error
                lived_s = self._clock.now_s() - started_s
                num_quick_deaths = 1 if lived_s >= FORGIVE_AFTER_S else num_quick_deaths + 1
                wait_s = restart_wait_s(num_quick_deaths)
                log.error("%s; the next start is in %g s", self.failure, wait_s)
                self.state = EngineState.WAITING
                await asyncio.sleep(wait_s)
                self.num_restarts += 1
        finally:
            self.state = EngineState.STOPPED

    async def _one_life(self) -> None:
        self.state = EngineState.STARTING
        engine = await EngineProcess.start(self._config, on_progress=lambda _text: None, command=self._command)
        try:
            self.state = EngineState.RUNNING
            if engine.gateway_cores:
                bind_process(engine.gateway_cores)
            self._set_spec(engine.spec)
            status = await engine.wait()
            self.failure = WorkerLost(f"the engine (pid {engine.pid}) ended with status {status}")
        finally:
            self._set_spec(None)
            if engine.gateway_cores:
                bind_process(self._cores)  # which the next engine inherits, and loads on
            await asyncio.shield(engine.stop())

    def _set_spec(self, spec: EngineSpec | None) -> None:
        self.spec = spec
        self._on_change(spec)


def restart_wait_s(num_quick_deaths: int) -> float:
    """0.5, 1, 2, ... 30 s."""
    return float(min(LONGEST_RESTART_WAIT_S, FIRST_RESTART_WAIT_S * 2.0 ** min(num_quick_deaths - 1, 16)))

"""The parent's side of an engine process, tested with small scripts in place of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import pytest

from kvist.engine.config import EngineConfig
from kvist.errors import EngineError, ModelLoadError, Timeout
from kvist.options import compose
from kvist.supervisor import engine_process as child
from kvist.supervisor.engine_process import EngineProcess, EngineState, EngineSupervisor, restart_wait_s
from kvist.wire import EngineSpec

pytestmark = pytest.mark.e2e

# Reads its settings as the engine does; `model_path` selects the behaviour.
SCRIPT = """
import os, select, signal, sys, time
from kvist.testing.specs import make_spec
from kvist.engine.messages import DRAIN, Beat, Progress, Ready, StartFailed, encode_line
from kvist.engine.process import parse_config
from kvist.request import Role
config = parse_config(sys.stdin.buffer.readline())
play = config.options.model.model_path
def say(announcement):
    sys.stdout.buffer.write(encode_line(announcement))
    sys.stdout.buffer.flush()
if play == "refuse":
    say(StartFailed(code="model_load_error", message="no such model"))
    sys.exit(1)
if play == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if play == "hang":
    time.sleep(60)
say(Progress(text="loading weights 40%"))
print("a library says hello", flush=True)
say(Ready(spec=make_spec(epoch=str(os.getpid()), model_name=str(config.present_role))))
if play == "switched":
    say(Beat(turn_s=0.0, stalled_s=0.0, role=Role.DECODE))
while play in ("beating", "blocked"):
    say(Beat(turn_s=9.0, stalled_s=9.0 if play == "blocked" else 0.0))
    if select.select([0], [], [], 0.05)[0]:
        break
if play == "stubborn":
    time.sleep(60)
for line in sys.stdin.buffer:
    if line == DRAIN + b"\\n":
        break
"""
COMMAND = (sys.executable, "-c", SCRIPT)


def config(play: str, **more: float) -> EngineConfig:
    return compose(EngineConfig, {"model_path": play, **more})


async def start(play: str, progress: list[str] | None = None, **more: float) -> EngineProcess:
    reported = progress if progress is not None else []
    return await EngineProcess.start(config(play, **more), on_progress=reported.append, command=COMMAND)


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_starting_an_engine_relays_progress_and_returns_the_spec() -> None:
    progress: list[str] = []
    engine = await start("well", progress)
    assert progress == ["loading weights 40%"]
    assert engine.spec.epoch == str(engine.pid)
    await engine.stop()
    assert not is_running(engine.pid)


async def test_an_engine_error_at_start_is_raised_in_the_parent() -> None:
    with pytest.raises(ModelLoadError, match="no such model"):
        await start("refuse")


async def test_an_engine_that_dies_at_start_raises_with_its_exit_status() -> None:
    with pytest.raises(EngineError, match="status -9"):
        await start("crash")


async def test_a_start_over_its_timeout_fails_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    ended = child._end

    async def note_and_end(process: asyncio.subprocess.Process, *, grace_s: float) -> None:
        pids.append(process.pid)
        await ended(process, grace_s=grace_s)

    monkeypatch.setattr(child, "_end", note_and_end)
    with pytest.raises(Timeout, match="engine-start-timeout-s"):
        await start("hang", engine_start_timeout_s=0.5)
    assert len(pids) == 1
    assert not is_running(pids[0])


async def test_an_engine_that_does_not_end_is_killed() -> None:
    engine = await start("stubborn")
    await engine.stop(grace_s=0.2)
    assert await engine.wait() == -9


async def spec_of(supervisor: EngineSupervisor, *, not_of: EngineSpec | None = None) -> EngineSpec:
    """Wait until an engine runs, another one than `not_of`; return its spec."""
    async with asyncio.timeout(60):
        while supervisor.spec is None or supervisor.spec is not_of:
            await asyncio.sleep(0.005)
    return supervisor.spec


async def until_ended(supervisor: EngineSupervisor) -> None:
    async with asyncio.timeout(60):
        while supervisor.spec is not None:
            await asyncio.sleep(0.005)


async def test_an_engine_that_is_restarted_keeps_the_role_that_it_was_switched_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "FIRST_RESTART_WAIT_S", 0.01)
    supervisor = EngineSupervisor(config("switched"), command=COMMAND)
    running = asyncio.create_task(supervisor.run())
    first = await spec_of(supervisor)
    assert first.model_name == "None", "the script shows the role of its settings"
    async with asyncio.timeout(60):
        while supervisor._engine is None or supervisor._engine.present_role is None:
            await asyncio.sleep(0.005)
    os.kill(int(first.epoch), signal.SIGKILL)
    second = await spec_of(supervisor, not_of=first)
    assert second.model_name == "decode"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_supervisor_restarts_a_dead_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "FIRST_RESTART_WAIT_S", 0.01)
    doings: list[str] = []

    def on_progress(_text: str) -> None:
        doings.append(supervisor.health.doing)

    supervisor = EngineSupervisor(config("well"), on_progress=on_progress, command=COMMAND)
    running = asyncio.create_task(supervisor.run())
    first = await spec_of(supervisor)
    assert supervisor.state is EngineState.RUNNING
    assert (doings, supervisor.health.doing) == (["loading weights 40%"], "")
    os.kill(int(first.epoch), 9)
    second = await spec_of(supervisor, not_of=first)
    assert second.epoch != first.epoch
    assert supervisor.num_restarts == 1
    assert "status -9" in str(supervisor.failure)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert supervisor.state is EngineState.STOPPED
    assert not is_running(int(second.epoch))


async def test_a_failed_first_start_is_not_retried() -> None:
    supervisor = EngineSupervisor(config("refuse"), command=COMMAND)
    with pytest.raises(ModelLoadError):
        await supervisor.run()
    assert supervisor.state is EngineState.STOPPED


def test_restart_waits_double_up_to_a_limit() -> None:
    assert [restart_wait_s(deaths) for deaths in (1, 2, 3, 7, 1000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


async def until_killed(play: str, stop_it: bool) -> tuple[EngineSupervisor, EngineSpec]:
    supervisor = EngineSupervisor(config(play, stall_restart_s=1.0), command=COMMAND)
    running = asyncio.create_task(supervisor.run())
    first = await spec_of(supervisor)
    if stop_it:
        os.kill(int(first.epoch), signal.SIGSTOP)
    await until_ended(supervisor)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return supervisor, first


@pytest.mark.case("stopped-engine")
@pytest.mark.parametrize(("play", "stop_it"), [("beating", True), ("blocked", False)])
async def test_the_supervisor_kills_and_logs_an_engine_without_progress(
    play: str, stop_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_SELF_EXIT_GRACE_S", 0.0)
    supervisor, first = await until_killed(play, stop_it)
    assert "made no progress" in str(supervisor.failure)
    assert supervisor.health.problem == str(supervisor.failure)
    assert not is_running(int(first.epoch))


@pytest.mark.case("signal-to-all")
async def test_a_draining_supervisor_drains_its_engine_and_starts_no_other() -> None:
    supervisor = EngineSupervisor(config("well"), command=COMMAND)
    running = asyncio.create_task(supervisor.run())
    await spec_of(supervisor)
    supervisor.drain()
    await asyncio.wait_for(running, 60)
    assert supervisor.num_restarts == 0

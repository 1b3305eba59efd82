"""A real engine process whose runner hangs: it lives, but makes no progress."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from kvist.channel import ChannelConfig
from kvist.engine.config import EndpointOptions, EngineConfig, EngineOptions, ModelOptions, RuntimeOptions
from kvist.errors import WorkerLost
from kvist.router import LinkOptions, RouterConfig, WorkerUrls, build_router
from kvist.runner.config import RunnerOptions
from kvist.supervisor.engine_process import EngineSupervisor
from kvist.testing.specs import make_request

pytestmark = pytest.mark.e2e

KEY = "the key of this cluster"
# The runner blocks at the third step without using the CPU: as a device that does not answer.
HANG = """
import threading
from kvist.engine.loop import EngineLoop
from kvist.runner.runner import Runner
launch, run, serving = Runner.launch, EngineLoop.run, []
def hang(self, batch):
    if serving and batch.step_id == 3:
        threading.Event().wait()
    return launch(self, batch)
def serve(self):
    serving.append(True)  # not the steps that warm up
    run(self)
Runner.launch, EngineLoop.run = hang, serve
from kvist.engine.process import main
main()
"""


@pytest.mark.case("stopped-engine")
async def test_a_runner_that_hangs_makes_its_worker_unready_with_the_place_and_loses_its_streams_in_time(
    tiny_model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bound: `--worker-timeout-s`, here 2.5 s, and the time of two questions to the worker."""
    options = EngineOptions(
        model=ModelOptions(model_path=str(tiny_model_path)),
        runner=RunnerOptions(load_format="dummy", max_total_tokens=1024, num_threads=1),
        runtime=RuntimeOptions(runtime_dir=str(tmp_path / "run")),
        channel=ChannelConfig(cluster_key=KEY),
    )
    config = EngineConfig(options=options, endpoint=EndpointOptions())
    supervisor = EngineSupervisor(config, command=(sys.executable, "-c", HANG))
    running = asyncio.create_task(supervisor.run())

    def info(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, content=msgspec.json.encode({"engine": supervisor.spec, "engine_health": supervisor.health})
        )

    links = LinkOptions(keepalive_s=0.1, worker_timeout_s=2.5, migration_limit=0)
    dispatcher = build_router(
        RouterConfig(urls=WorkerUrls(worker_urls=("http://127.0.0.1:1",)), links=links),
        ChannelConfig(cluster_key=KEY),
        transport=httpx.MockTransport(info),
    ).dispatcher
    await dispatcher.start()
    try:
        async with asyncio.timeout(60):
            while not dispatcher.ready():
                await asyncio.sleep(0.02)
        times_s = [asyncio.get_running_loop().time()]

        async def stream() -> None:
            async for _ in dispatcher.generate(make_request("r", (1, 2, 3), max_tokens=200, ignore_eos=True)):
                times_s.append(asyncio.get_running_loop().time())

        with pytest.raises(WorkerLost, match="no progress") as lost:
            await stream()
        assert asyncio.get_running_loop().time() - times_s[-1] < 10.0
        assert not dispatcher.ready()
        assert "hangs in " in lost.value.message
        assert "(loop.py:" in lost.value.message or "(in_flight.py:" in lost.value.message
    finally:
        await dispatcher.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    printed = capfd.readouterr().err
    assert "the stacks follow" in printed
    assert "in hang" in printed, "the dump names the function that blocks"

"""A real worker at three times its capacity: admitted requests keep their latency, and one key's flood spares another.

Two phases of one run are compared, so a slow machine slows both."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from kvist.cluster.ports import free_ports
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.supervisor.child import ChildPlan
from kvist.supervisor.probe import probe_child
from kvist.testing.rounds import check_time, in_rounds
from tests.e2e.conftest import START_TIMEOUT_S

NUM_PLACES, PHASE_S = 8, 2.0
BOUND = 1.6  # 1.3 by the simulation; the clients take a part of this machine's two cores; 3 without overload control


@pytest.fixture
def worker() -> Iterator[str]:
    port = free_ports(1)[0]
    argv = (
        *(sys.executable, "-m", "kvist", "serve", "--stop-with-stdin", "--num-threads=1", f"--port={port}"),
        *("--max-total-tokens=16384", f"--max-running-requests={NUM_PLACES}", "--max-queue-wait-s=0.05"),
        *("--api-key", "mine", "flood"),
    )
    plan = ChildPlan(name="worker", argv=argv, url=f"http://127.0.0.1:{port}")
    timeouts = ChildTimeouts(stall_restart_s=60.0)
    with Processes([plan], probe=probe_child, sink=lambda _name, _line: None, timeouts=timeouts) as processes:
        processes.wait_ready(START_TIMEOUT_S)
        yield plan.url


class Phase:
    """Clients that ask again and again until the phase ends."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.latencies_s: list[float] = []  # for one token
        self.refused: list[httpx.Response] = []
        self.num_served: Counter[str] = Counter()

    async def run(self, *, num_mine: int, num_flood: int) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=60.0, limits=limits, trust_env=False) as client:
            until_s = time.monotonic() + PHASE_S
            keys = ["mine"] * num_mine + ["flood"] * num_flood
            await asyncio.gather(*(self._ask(client, key, number, until_s) for number, key in enumerate(keys)))

    async def _ask(self, client: httpx.AsyncClient, key: str, number: int, until_s: float) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        while time.monotonic() < until_s:
            number += 100
            body = {"prompt": [number % 1000, number % 7, 3, 4], "max_tokens": 12 + number % 9, "ignore_eos": True}
            began_s = time.monotonic()
            response = await client.post("/v1/completions", json=body, headers=headers)
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                self.refused.append(response)
                await asyncio.sleep(0.1)
                continue
            assert response.status_code == httpx.codes.OK, response.text
            self.num_served[key] += 1
            self.latencies_s.append((time.monotonic() - began_s) / (12 + number % 9))


@in_rounds(4)  # other work on this machine can slow one phase of a round
async def test_at_three_times_the_capacity_the_latency_of_admitted_requests_stays_and_others_get_a_429(
    worker: str,
) -> None:
    full, over = Phase(worker), Phase(worker)
    await full.run(num_mine=2, num_flood=NUM_PLACES - 2)
    await over.run(num_mine=2, num_flood=3 * NUM_PLACES - 2)
    assert over.refused
    assert all(int(response.headers["retry-after"]) >= 1 for response in over.refused)
    assert over.num_served["mine"] > 0, "the flood took every place"
    ratio = statistics.median(over.latencies_s) / statistics.median(full.latencies_s)
    check_time(ratio < BOUND, f"latencies are {ratio:.2f} times as long")

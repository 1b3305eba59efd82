"""/server_info lists how each pair of a prefill and a decode worker hands pages over."""

from __future__ import annotations

import msgspec

from kvist.request import Role, WorkerId
from kvist.router.stream import WorkerSnapshot
from kvist.server.pairs import MAX_PAIRS, pair_infos
from kvist.testing.gateway_bench import GatewayBench
from kvist.testing.specs import make_spec


def worker(name: str, role: Role, host_id: str = "h", *, alive: bool = True) -> WorkerSnapshot:
    spec = make_spec(worker_id=name, role=role, host_id=host_id)
    return WorkerSnapshot(worker_id=WorkerId(name), role=role, alive=alive, spec=spec, load=None)


def test_each_pair_has_its_transport_or_the_reason_why_it_has_none() -> None:
    workers = [
        worker("p", Role.PREFILL),
        worker("near", Role.DECODE),
        worker("far", Role.DECODE, "i"),
        worker("lost", Role.DECODE, alive=False),
        worker("u", Role.UNIFIED),
    ]
    near, far = pair_infos(workers)
    reason = "shm: both pools are in the memory of host h"
    assert near == {"prefill": "p", "decode": "near", "transport": "shm", "reason": reason}
    assert (far["decode"], far["transport"]) == ("far", None)
    assert "worker p is on h, worker far on i" in str(far["reason"])


def test_the_list_of_pairs_is_bounded() -> None:
    workers = [worker(f"{role}{index}", role) for role in (Role.PREFILL, Role.DECODE) for index in range(10)]
    assert len(pair_infos(workers)) == MAX_PAIRS


async def test_server_info_has_the_pairs(bench: GatewayBench) -> None:
    info = (await bench.client.get("/server_info")).json()
    assert info["pairs"] == msgspec.to_builtins(pair_infos(bench.dispatcher.snapshot().workers))

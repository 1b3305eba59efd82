"""/v1/leases over a scripted dispatcher: what workers are asked, responses, and errors."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.errors import LeaseNotFound, Unavailable, UnknownWorker
from kvist.lease_messages import LeaseAnswer, LeaseCommand, LeaseStatus
from kvist.prompt_work.leases import LeaseName
from kvist.request import Role, WorkerId
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.testing.scripted_dispatcher import DECODE, PREFILL

STATUS = LeaseStatus(lease_id="ab12", num_pages=3, num_tokens=12, left_s=30.0)
NAME = str(LeaseName(lease_id="ab12", worker_id=PREFILL))


async def test_a_prompt_is_leased_on_the_worker_that_computed_it(bench: GatewayBench) -> None:
    response = await bench.post("/v1/leases", {"prompt": "hello world", "ttl_s": 90, "kvist": {"role": "prefill"}})
    answer = response.json()
    (request,) = bench.dispatcher.requests
    assert request.lease is not None
    assert (request.lease.ttl_s, request.sampling.max_tokens, request.background) == (90.0, 0, False)
    name = LeaseName.parse(answer.pop("id"))
    assert (name.lease_id, name.worker_id) == (request.lease.lease_id, PREFILL)
    assert answer.pop("expires_at") == answer.pop("created") + 90
    assert answer == {
        "object": "lease",
        "model": "tiny",
        "worker": "p:1",
        "num_pages": 2,
        "num_tokens": 8,
        "left_s": 90.0,
        "cached_tokens": {"device": 1, "host": 2, "storage": 1},
        "computed_tokens": 7,
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 0,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    assert bench.dispatcher.placements[0].role is Role.PREFILL


async def test_a_lease_is_shown_renewed_and_ended_at_its_worker(bench: GatewayBench) -> None:
    bench.dispatcher.lease_answers = {PREFILL: LeaseAnswer(call_id="", leases=(STATUS,))}
    shown = await bench.client.get(f"/v1/leases/{NAME}")
    renewed = await bench.post(f"/v1/leases/{NAME}/renew", {"ttl_s": 300})
    by_default = await bench.client.post(f"/v1/leases/{NAME}/renew")
    ended = await bench.client.delete(f"/v1/leases/{NAME}")
    for response in (shown, renewed, by_default):
        body = response.json()
        assert (body["id"], body["worker"], body["num_pages"], body["left_s"]) == (NAME, "p:1", 3, 30.0)
    assert ended.json() == {"id": NAME, "object": "lease", "deleted": True}
    command = LeaseCommand(call_id="", action="list", owner="", lease_id="ab12")
    assert bench.dispatcher.commands == [
        command,
        LeaseCommand(call_id="", action="renew", owner="", lease_id="ab12", ttl_s=300.0),
        LeaseCommand(call_id="", action="renew", owner="", lease_id="ab12", ttl_s=60.0),
        LeaseCommand(call_id="", action="end", owner="", lease_id="ab12"),
    ]


async def test_the_leases_of_all_workers_are_listed(bench: GatewayBench) -> None:
    other = LeaseStatus(lease_id="cd34", num_pages=1, num_tokens=4, left_s=2.5)
    bench.dispatcher.lease_answers = {
        PREFILL: LeaseAnswer(call_id="", leases=(STATUS,)),
        DECODE: LeaseAnswer(call_id="", leases=(other,)),
    }
    body = (await bench.client.get("/v1/leases")).json()
    assert [(each["worker"], each["num_pages"]) for each in body["data"]] == [("d:1", 1), ("p:1", 3)]
    assert LeaseName.parse(body["data"][1]["id"]) == LeaseName(lease_id="ab12", worker_id=PREFILL)


async def test_the_owner_is_the_api_key_and_not_the_host() -> None:
    owners: list[str] = []
    made = gateway_bench(config=ServerConfig(api_key=("one", "two"), api_key_weights=(1, 4)))
    async with made.client:
        made.dispatcher.lease_answers = {PREFILL: LeaseAnswer(call_id="", leases=(STATUS,))}
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            taken = await made.client.post("/v1/leases", json={"prompt": "hello"}, headers=headers)
            assert taken.status_code == 200, taken.text
            await made.client.delete(f"/v1/leases/{NAME}", headers=headers)
            command, request = made.dispatcher.commands[-1], made.dispatcher.requests[-1]
            assert isinstance(command, LeaseCommand)
            assert command.owner == request.client.split("/")[0]
            owners.append(command.owner)
        assert (await made.client.get("/v1/leases")).status_code == 401
    assert "" not in owners
    assert len(set(owners)) == 2


@pytest.mark.parametrize("error", [UnknownWorker("no worker"), Unavailable("it is lost")])
@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
async def test_a_lease_whose_worker_is_gone_is_not_found(bench: GatewayBench, error: Exception, method: str) -> None:
    bench.dispatcher.error = error
    path = f"/v1/leases/{NAME}" + ("/renew" if method == "POST" else "")
    response = await bench.client.request(method, path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "lease_not_found"
    assert "lease the prompt again" in response.json()["error"]["message"]


async def test_the_refusal_of_a_worker_is_passed_on(bench: GatewayBench) -> None:
    refused = LeaseAnswer(call_id="", error_code=LeaseNotFound.code, message="it has ended")
    bench.dispatcher.lease_answers = {PREFILL: refused}
    response = await bench.client.get(f"/v1/leases/{NAME}")
    assert (response.status_code, response.json()["error"]["message"]) == (404, "it has ended")


@pytest.mark.parametrize(
    "name", ["x", "lease-", "lease-ab12", "lease-ab12.", "lease-.cDox", "lease-ab12.é", "lease-a.__"]
)
async def test_an_id_that_is_not_of_a_lease_is_not_found(bench: GatewayBench, name: str) -> None:
    response = await bench.client.get(f"/v1/leases/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "lease_not_found"
    assert not bench.dispatcher.commands


@pytest.mark.parametrize("ttl_s", [0, 0.5, -1, 601, "60", [60]])
@pytest.mark.parametrize("path", ["/v1/leases", f"/v1/leases/{NAME}/renew"])
async def test_a_time_out_of_range_is_refused(bench: GatewayBench, path: str, ttl_s: object) -> None:
    body: dict[str, Any] = {"ttl_s": ttl_s} | ({} if path.endswith("renew") else {"prompt": "hello"})
    response = await bench.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "ttl_s")
    assert not bench.dispatcher.requests
    assert not bench.dispatcher.commands


@pytest.mark.parametrize("worker_id", ["127.0.0.1:30001", "a", "wörker/1?x", "pod-0.kvist.svc:8000"])
def test_the_id_of_a_lease_names_its_worker(worker_id: str) -> None:
    name = LeaseName(lease_id="0f" * 8, worker_id=WorkerId(worker_id))
    assert LeaseName.parse(str(name)) == name
    assert str(name).isascii()
    assert not set(str(name)) & set("/?#%")

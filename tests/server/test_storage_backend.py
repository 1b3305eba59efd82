"""/hicache/storage-backend: the commands sent to the workers, and the handling of their answers."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.request import WorkerId
from kvist.testing.gateway_bench import GatewayBench
from kvist.wire import AttachStore, StorageAnswer, StorageCommand, StorageStatus

URL = "/hicache/storage-backend"
STATUS = StorageStatus(
    backend="file",
    options={"path": "/pages", "size": 2.0},
    prefetch_policy="timeout",
    state="attached",
    breaker="closed",
    num_quarantined_pages=0,
    stored_bytes=5,
    errors={},
)


def answers(**refused: tuple[str, str, str]) -> dict[WorkerId, StorageAnswer]:
    """The answers of workers p and d; a refusal is (code, message, param)."""
    made = {WorkerId(name): StorageAnswer(call_id="c", status=STATUS) for name in ("p", "d")}
    for name, (code, message, param) in refused.items():
        made[WorkerId(name)] = StorageAnswer(call_id="c", error_code=code, message=message, param=param)
    return made


@pytest.mark.parametrize(("method", "action"), [("GET", "status"), ("DELETE", "detach")])
async def test_get_returns_the_storage_of_every_worker_with_sglangs_names(
    bench: GatewayBench, method: str, action: str
) -> None:
    bench.dispatcher.storage_answers = answers()
    body = (await bench.client.request(method, URL)).json()
    assert body["success"] is True
    assert set(body["workers"]) == {"p", "d"}
    assert body["workers"]["p"]["hicache_storage_backend"] == "file"
    assert body["workers"]["p"]["hicache_storage_prefetch_policy"] == "timeout"
    assert body["workers"]["p"]["hicache_storage_path"] == "/pages"
    assert body["workers"]["p"]["hicache_storage_size"] == 2.0
    assert body["workers"]["p"]["state"] == "attached"
    assert [asked.action for asked in bench.dispatcher.storage_commands] == [action]


async def test_put_sends_the_given_fields_and_leaves_the_others_to_the_flags(bench: GatewayBench) -> None:
    bench.dispatcher.storage_answers = answers()
    wanted: dict[str, Any] = {
        "hicache_storage_backend": "file",
        "hicache_storage_path": "/pages",
        "hicache_storage_size": 2,
    }
    assert (await bench.client.put(URL, json=wanted)).status_code == 200
    assert (await bench.client.put(URL, json={})).status_code == 200
    assert bench.dispatcher.storage_commands == [
        StorageCommand(
            call_id="", action="attach", store=AttachStore(backend="file", options={"path": "/pages", "size": 2.0})
        ),
        StorageCommand(call_id="", action="attach"),
    ]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"hicache_storage_size": "64"}, "hicache_storage_size"),
        ({"hicache_storage_backend": 7}, "hicache_storage_backend"),
        ({"hicache_storage_pfad": "/x"}, "hicache_storage_pfad"),
        ({"hicache_storage_backend_extra_config_json": '{"a": 1}'}, "hicache_storage_backend_extra_config_json"),
        ({"hicache_write_policy": "write_back"}, "hicache_write_policy"),
    ],
)
async def test_an_invalid_body_is_a_400_that_names_the_field(bench: GatewayBench, body: object, field: str) -> None:
    answer = await bench.client.put(URL, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert bench.dispatcher.storage_commands == []


@pytest.mark.parametrize(("code", "status"), [("invalid_request", 400), ("conflict", 409)])
async def test_a_refusal_names_the_worker_its_reason_and_how_many_workers_succeeded(
    bench: GatewayBench, code: str, status: int
) -> None:
    bench.dispatcher.storage_answers = answers(d=(code, "no such folder", "path"))
    answer = await bench.client.put(URL, json={"hicache_storage_backend": "file"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("hicache_storage_path", code)
    assert error["message"] == "worker d: no such folder (1 of 2 workers succeeded)"


async def test_the_loss_of_every_worker_during_the_call_is_an_error(bench: GatewayBench) -> None:
    assert (await bench.client.delete(URL)).status_code == 503


async def test_other_methods_are_refused(bench: GatewayBench) -> None:
    answer = await bench.client.post(URL, json={})
    assert answer.status_code == 405
    assert "PUT" in answer.headers["allow"]

"""POST /v1/prefill, and the fields that say where a request runs."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.request import Role
from kvist.router.placement import Placement
from kvist.router.stream import ClusterSnapshot, WorkerSnapshot
from kvist.testing.gateway_bench import GatewayBench
from kvist.testing.scripted_dispatcher import BYTE_MODEL, DECODE

MESSAGES = [{"role": "user", "content": "hi"}]


def with_a_worker(bench: GatewayBench) -> None:
    worker = WorkerSnapshot(
        worker_id=DECODE, role=Role.DECODE, alive=False, spec=BYTE_MODEL, load=None, url="http://d:1"
    )
    bench.dispatcher.snapshots = ClusterSnapshot(workers=(worker,))


async def test_a_prompt_is_computed_in_the_background_and_nothing_is_generated(bench: GatewayBench) -> None:
    response = await bench.post("/v1/prefill", {"prompt": "hello", "cache_salt": "s"})
    answer = response.json()
    assert answer | {"id": "", "created": 0} == {
        "id": "",
        "object": "prefill",
        "created": 0,
        "model": "tiny",
        "worker": "p:1",
        "cached_tokens": {"device": 1, "host": 2, "storage": 1},
        "computed_tokens": 1,
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 0,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    (request,) = bench.dispatcher.requests
    assert request.background
    assert request.sampling.max_tokens == 0
    assert request.sampling.prompt_logprobs is None
    assert request.num_shared_tokens == 0
    assert request.cache_salt


@pytest.mark.parametrize("path", ["/v1/prefill", "/v1/leases"])
@pytest.mark.parametrize(("num_tokens", "num_sent"), [(15, 15), (16, 16), (17, 17), (31, 17), (32, 32), (40, 33)])
async def test_tokens_after_the_last_whole_page_are_not_computed(
    bench: GatewayBench, path: str, num_tokens: int, num_sent: int
) -> None:
    response = await bench.post(path, {"prompt": "a" * num_tokens})
    (request,) = bench.dispatcher.requests
    assert len(request.prompt_token_ids) == num_sent
    assert response.json()["usage"]["prompt_tokens"] == num_tokens


async def test_a_priority_takes_a_prompt_out_of_the_background(bench: GatewayBench) -> None:
    response = await bench.post("/v1/prefill", {"messages": MESSAGES, "priority": 3})
    assert response.headers["x-kvist-ignored"] == "priority"
    (request,) = bench.dispatcher.requests
    assert not request.background
    assert request.priority == 0, "the workers do not honour it"
    assert bench.dispatcher.tokenizer.decode(request.prompt_token_ids) == "<user>hi"


@pytest.mark.parametrize("path", ["/v1/prefill", "/v1/completions", "/generate"])
@pytest.mark.parametrize("name", ["d:1", "http://d:1"])
async def test_a_request_may_name_its_worker(bench: GatewayBench, path: str, name: str) -> None:
    with_a_worker(bench)
    body: dict[str, Any] = {"kvist": {"worker": name, "role": "decode"}}
    body |= {"text": "a"} if path == "/generate" else {"prompt": "a"}
    response = await bench.post(path, body)
    assert response.status_code == 200, response.text
    assert "x-kvist-ignored" not in response.headers
    assert bench.dispatcher.placements == [Placement(worker=name, role=Role.DECODE)]


async def test_a_worker_that_has_left_is_named_in_the_header(bench: GatewayBench) -> None:
    with_a_worker(bench)
    response = await bench.chat(kvist={"worker": "gone:1"}, user="u")
    assert response.headers["x-kvist-ignored"] == "user, kvist.worker"
    assert bench.dispatcher.placements == [Placement()]


async def test_a_header_names_the_session_of_a_request_that_names_none(bench: GatewayBench) -> None:
    await bench.chat(session_id="a")
    for headers in ({"X-Session-Id": "a"}, {"X-SMG-Routing-Key": "a"}, {"X-Session-Id": "a", "X-SMG-Routing-Key": "b"}):
        await bench.post("/v1/chat/completions", {"messages": MESSAGES}, **headers)
    await bench.post("/v1/prefill", {"prompt": "x", "prompt_cache_key": "a"}, **{"X-Session-Id": "b"})
    found = {placement.session for placement in bench.dispatcher.placements}
    assert len(found) == 1
    assert found != {""}
    response = await bench.post("/v1/prefill", {"prompt": "x"}, **{"X-Session-Id": "y" * 257})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Session-Id")

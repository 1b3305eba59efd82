"""The `priority` field of a request: sent to the engines if they use it, named in the header if they do not."""

from __future__ import annotations

import httpx
import msgspec
import pytest

from kvist.request import PRIORITY
from kvist.testing.gateway_bench import GatewayBench
from kvist.testing.scripted_dispatcher import BYTE_MODEL
from tests.server.conftest import MakeBench

PROMPTS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi", "user": "me"},
    "/generate": {"text": "hi"},
}
PATHS = tuple(PROMPTS)


async def ask(bench: GatewayBench, path: str, **fields: object) -> httpx.Response:
    return await bench.post(path, PROMPTS[path] | fields)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("priority", [-5, 3])
async def test_the_priority_of_a_request_reaches_engines_that_use_priorities(
    make_bench: MakeBench, path: str, priority: int
) -> None:
    bench = make_bench()
    bench.dispatcher.spec = msgspec.structs.replace(BYTE_MODEL, scheduling_policy=PRIORITY)
    response = await ask(bench, path, priority=priority)
    assert response.status_code == 200
    assert "priority" not in response.headers.get("x-kvist-ignored", "")
    assert [request.priority for request in bench.dispatcher.requests] == [priority]


@pytest.mark.parametrize("path", PATHS)
async def test_a_priority_without_effect_is_named_in_the_header(make_bench: MakeBench, path: str) -> None:
    bench = make_bench()
    response = await ask(bench, path, priority=3)
    assert response.status_code == 200
    assert response.headers["x-kvist-ignored"].split(", ")[-1] == "priority"
    assert response.headers.get_list("x-kvist-ignored") == [response.headers["x-kvist-ignored"]]
    assert [request.priority for request in bench.dispatcher.requests] == [0]
    assert "priority" not in (await ask(bench, path, priority=0)).headers.get("x-kvist-ignored", "")


@pytest.mark.parametrize("path", PATHS)
async def test_a_priority_out_of_range_is_refused_by_name(make_bench: MakeBench, path: str) -> None:
    response = await ask(make_bench(), path, priority=-(2**40))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"

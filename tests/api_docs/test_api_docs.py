"""/openapi.json and /docs describe every endpoint, and their schemas are those of the answers."""

from __future__ import annotations

import re
from typing import Any

import httpx
import jsonschema_rs
import msgspec
import pytest

from kvist.api_docs.document import openapi_document
from kvist.api_docs.operations import OPERATIONS
from kvist.server.not_served import NOT_SERVED
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from tests.agents_api.conftest import tool_bench

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "tools": [TOOL], "logprobs": True, "return_token_ids": True},
    "/v1/completions": {"prompt": "a", "max_tokens": 3, "echo": True, "logprobs": 1},
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", "name": "now"}]},
    "/v1/messages": {"messages": [USER], "max_tokens": 300, "tools": [{"name": "now"}]},
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(openapi_document()))
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    jsonschema_rs.validator_for({**schema, "components": document["components"]}).validate(value)


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    app: Any = gateway_bench().app
    routes = app._inner._router.routes
    served = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in routes
        if route.path not in NOT_SERVED and route.methods is not None
        for method in route.methods - {"HEAD"}
    }
    assert served == {(method, operation.path) for operation in OPERATIONS for method in operation.methods}


async def test_the_document_and_the_page_need_no_key_and_no_other_server() -> None:
    made = gateway_bench(config=tool_bench(api_key=("k",)).config)
    async with made.client:
        document = (await made.client.get("/openapi.json")).json()
        page = await made.client.get("/docs")
    assert document["openapi"] == "3.1.0"
    names = set(document["components"]["schemas"])
    assert {"ChatRequest", "MessagesRequest", "ResponsesRequest", "ResponseObject", "Message"} <= names
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"<script|<link|(src|href|url)\W*https?:", page.text)
    assert {f'id="{name}"' for name in names} <= set(re.findall(r'id="\w+"', page.text))
    assert set(re.findall(r'href="#(\w+)"', page.text)) <= names


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_have_the_schema_of_the_document(document: dict[str, Any], path: str, stream: bool) -> None:
    made = tool_bench()
    async with made.client:
        body = {**REQUESTS[path], "stream": stream}
        operation = document["paths"][path]["post"]
        check(document, operation["requestBody"]["content"]["application/json"]["schema"], body)
        response = await made.post(path, body)
    assert response.status_code == 200, response.text
    content = operation["responses"]["200"]["content"]
    for value in streamed(response) if stream else [response.json()]:
        check(document, content["text/event-stream" if stream else "application/json"]["schema"], value)


def streamed(response: httpx.Response) -> list[Any]:
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    assert data
    return [msgspec.json.decode(one) for one in data]


async def test_errors_have_the_schema_of_the_document(bench: GatewayBench, document: dict[str, Any]) -> None:
    for path in REQUESTS:
        response = await bench.post(path, {"odd": 1})
        assert response.status_code == 400
        default = document["paths"][path]["post"]["responses"]["default"]
        check(document, default["content"]["application/json"]["schema"], response.json())


def test_a_wrong_answer_does_not_have_the_schema(document: dict[str, Any]) -> None:
    schema = document["paths"]["/v1/messages"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    with pytest.raises(jsonschema_rs.ValidationError):
        check(document, schema, {"id": "x", "type": "message"})


def test_refused_fields_are_left_out_and_others_have_their_effect(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert "best_of" not in fields
    assert fields["temperature"]["description"] == "below 0.00001: greedy; over 2 is allowed"
    assert fields["user"]["description"].startswith("without effect: ")

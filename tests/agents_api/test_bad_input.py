"""Bodies that are far too large, deep or long: a 400 with its path, in bounded time, for both APIs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvist.testing.gateway_bench import GatewayBench
from tests.agents_api.conftest import tool_bench

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
LIMIT_S = 60.0  # a stalled machine needs a few seconds; without a limit these bodies take minutes


def deep(num_levels: int) -> Any:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(num_levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def messages_with(schema: object) -> dict[str, object]:
    config = {"format": {"type": "json_schema", "schema": schema}}
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "output_config": config}


def responses_with(schema: object) -> dict[str, object]:
    return {"input": "x", "text": {"format": {"type": "json_schema", "schema": schema, "strict": True}}}


WIDE = {"type": "object", "properties": {f"field_{number}": {"type": "string"} for number in range(40_000)}}
ENDLESS = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
CONTRADICTION = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 1}},
    "required": ["a"],
}
CALL = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
USE = {"type": "tool_use", "id": "c", "name": "now", "input": {}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (MESSAGES, messages_with(WIDE), "output_config.format.schema"),
        (RESPONSES, responses_with(WIDE), "text.format.schema"),
        (MESSAGES, messages_with(deep(150)), "output_config.format.schema"),
        (RESPONSES, responses_with(deep(150)), "text.format.schema"),
        (MESSAGES, messages_with(ENDLESS), "output_config.format.schema"),
        (RESPONSES, responses_with(ENDLESS), "text.format.schema"),
        (MESSAGES, messages_with(CONTRADICTION), "output_config.format.schema"),
        (RESPONSES, responses_with(CONTRADICTION), "text.format.schema"),
        (RESPONSES, {"input": [CALL] * 4097}, "input"),
        (MESSAGES, {"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 70_000}]}, None),
        (RESPONSES, {"input": "x", "metadata": {str(number): "" for number in range(1000)}}, "metadata"),
        (RESPONSES, {"input": "x", "previous_response_id": "r" * 100_000}, "previous_response_id"),
        (RESPONSES, {"input": "x", "tools": [{"type": "function", "name": f"f{n}"} for n in range(1025)]}, "tools"),
        (MESSAGES, {"messages": [{"role": "user", "content": "x" * 3_000_000}]}, "messages"),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [{**USE, "name": "n" * 1000, "id": "i" * 9}]},
                                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "j" * 9999}]}]},
         "messages[1].content[0].tool_use_id"),
    ],
)  # fmt: skip
async def test_a_body_that_is_far_too_large_is_an_error_with_its_path(
    bench: GatewayBench, path: str, body: dict[str, Any], param: str | None
) -> None:
    start_s = time.monotonic()
    response = await bench.post(path, body)
    assert time.monotonic() - start_s < LIMIT_S
    error = response.json()["error"]
    assert response.status_code in (400, 404), error
    assert error["param"] is None if param is None else error["param"].startswith(param), error
    assert len(response.content) < 10_000
    assert not bench.dispatcher.requests
    plain: dict[str, object] = {"messages": [{"role": "user", "content": "x"}]} if path == MESSAGES else {"input": "x"}
    assert (await bench.post(path, plain)).status_code == 200


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("where", ['"tools":[{"name":"f","type":"function","input":', '"tool_choice":', '"input":'])
async def test_ten_thousand_levels_are_a_400(path: str, where: str) -> None:
    made = tool_bench()
    async with made.client:
        body = b"{" + where.encode() + b'{"a":' * 10_000 + b"1" + b"}" * 10_000
        body += b"]}}" if b"[" in where.encode() else b"}"
        response = await made.client.post(path, content=body)
    assert response.status_code == 400, response.text


async def test_levels_below_the_limit_of_the_decoder_are_answered() -> None:
    made = tool_bench()
    nested: Any = 1
    for _ in range(400):
        nested = {"type": "allowed_tools", "tools": [nested]}
    arguments: Any = {}
    for _ in range(400):
        arguments = {"a": arguments}
    async with made.client:
        for body in (
            {"input": "x", "tool_choice": nested},
            {"input": "x", "chat_template_kwargs": {"a": arguments}},
        ):
            assert (await made.post(RESPONSES, body)).status_code in (200, 400)
        calls = [{"role": "assistant", "content": [{**USE, "input": arguments}]}]
        assert (await made.post(MESSAGES, {"messages": calls, "max_tokens": 5})).status_code in (200, 400)

"""OpenAI's Responses API: answers, streams, conversations, background, errors; and its stored responses."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import BaseModel

from kvist.api.response_objects import (
    FunctionCall,
    OutputMessage,
    ReasoningItem,
    ResponseEvent,
    ResponseFailed,
    ResponseObject,
)
from kvist.errors import EngineError
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from tests.agents_api.conftest import prompt_of, tool_bench

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
NOW = {"type": "function", "name": "now", "parameters": None, "description": "the time"}
ASKED: dict[str, Any] = {"input": "hi", "tools": [WEATHER, NOW]}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "x"}
ITEMS = [
    ("reasoning", "Which city?"),
    ("message", "I look.\n"),
    ("function_call", '{"city": "Tromsø"}'),
    ("function_call", "{}"),
]


def response_of(response: httpx.Response) -> ResponseObject:
    """Decode a response, check that it has no other fields than its schema, and that OpenAI's library accepts it."""
    from openai.types.responses import Response  # half a second, which a collection saves

    assert response.status_code == 200, response.text
    found = msgspec.json.decode(response.content, type=ResponseObject)
    assert msgspec.json.decode(msgspec.json.encode(found)) == response.json()
    Response.model_validate(response.json(), strict=True)
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(response: httpx.Response) -> list[Any]:
    """Decode a stream, and check the names and numbers of its events."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for number, event in enumerate(response.text.removesuffix("\n\n").split("\n\n")):
        name, data = event.split("\n")
        decoded = msgspec.json.decode(data.removeprefix("data: "))
        assert name == f"event: {decoded['type']}"
        assert decoded["sequence_number"] == number
        found.append(msgspec.convert(decoded, ResponseEvent))
        assert msgspec.json.decode(msgspec.json.encode(found[-1])) == decoded
    return found


def items_of(response: ResponseObject) -> list[tuple[str, str]]:
    found = []
    for item in response.output:
        if isinstance(item, FunctionCall):
            found.append(("function_call", item.arguments))
        elif isinstance(item, ReasoningItem):
            found.append(("reasoning", item.content[0].text))
        else:
            assert isinstance(item, OutputMessage)
            found.append(("message", item.content[0].text))
    return found


def joined(events: list[Any]) -> list[Any]:
    """Add up the items of a stream, and check its order: at most one item is open, and its events agree."""
    created, in_progress, *middle, last = [msgspec.json.decode(msgspec.json.encode(event)) for event in events]
    assert [created["type"], in_progress["type"]] == ["response.created", "response.in_progress"]
    assert created["response"]["output"] == []
    items: list[Any] = []
    open_item: Any = None
    text = ""
    for event in middle:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None
            assert event["output_index"] == len(items)
            open_item, text = event["item"], ""
            continue
        assert open_item is not None
        assert event["output_index"] == len(items)
        if kind == "output_item.done":
            assert event["item"]["id"] == open_item["id"]
            items.append(event["item"])
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        if kind.endswith(".delta"):
            text += event["delta"]
        elif kind == "content_part.done":
            assert event["part"]["text"] == text
        elif kind.endswith(".done"):
            assert event.get("text", event.get("arguments")) == text
    assert open_item is None
    assert last["response"]["output"] == items
    return items


async def test_an_answer_has_reasoning_text_and_calls(bench: GatewayBench) -> None:
    body = {**ASKED, "metadata": {"a": "b"}, "instructions": "be brief", "temperature": 0.5}
    response = response_of(await bench.post(PATH, body))
    assert items_of(response) == ITEMS
    assert response.id.startswith("resp_")
    assert (response.status, response.metadata, response.temperature) == ("completed", {"a": "b"}, 0.5)
    assert {item.status for item in response.output} == {"completed"}
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert response.usage.input_tokens == len(bench.dispatcher.requests[-1].prompt_token_ids)
    assert response.usage.output_tokens_details.reasoning_tokens == len("Which city?")  # a byte is a token
    assert prompt_of(bench) == "weather?now?<system>be brief<user>hi<assistant>"
    counted = await bench.post(f"{PATH}/input_tokens", body)
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": response.usage.input_tokens}


@pytest.mark.parametrize("cuts", [(), (3, 50, 7, 31), (500,), (40, 1, 1, 60)])
async def test_a_stream_that_another_worker_continues_adds_up_to_the_whole_answer(
    bench: GatewayBench, cuts: tuple[int, ...]
) -> None:
    bench.dispatcher.cuts = cuts
    events = events_of(await bench.post(PATH, {**ASKED, "stream": True}))
    joined(events)
    assert items_of(events[-1].response) == ITEMS
    assert events[-1].response.status == "completed"
    stored = await bench.client.get(f"{PATH}/{events[-1].response.id}")
    assert stored.json() == msgspec.json.decode(msgspec.json.encode(events[-1].response))


async def test_an_answer_that_is_cut_is_incomplete(bench: GatewayBench) -> None:
    for stream in (False, True):
        reply = await bench.post(PATH, {**ASKED, "max_output_tokens": 90, "stream": stream})
        response = events_of(reply)[-1].response if stream else response_of(reply)
        assert response.incomplete_details is not None
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert [item.status for item in response.output] == ["completed", "completed", "incomplete"]
    full = response_of(await bench.post(PATH, {**ASKED, "max_output_tokens": 100_000}))
    assert full.status == "completed"


async def test_vllm_33089_a_conversation_continues_a_stored_response(bench: GatewayBench) -> None:
    first = response_of(await bench.post(PATH, {**ASKED, "instructions": "be brief"}))
    assert "kvist:stored_responses 1.0" in (await bench.client.get("/metrics")).text
    calls = [item for item in first.output if isinstance(item, FunctionCall)]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in calls]
    asked = {"tools": [WEATHER], "previous_response_id": first.id, "input": results}
    second = response_of(await bench.post(PATH, asked))
    assert second.previous_response_id == first.id
    weather = '<tool_call>{"name": "weather", "arguments": {"city": "Tromsø"}}</tool_call>'
    now = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    told = "".join(f"<tool>7={call.call_id} of {call.name}" for call in calls)
    answered = f"<user>hi<assistant>I look.\n{weather}{now}{told}"
    assert prompt_of(bench) == f"weather?{answered}<assistant>"  # the instructions are not repeated
    deleted = await bench.client.delete(f"{PATH}/{first.id}")
    assert deleted.json() == {"id": first.id, "object": "response", "deleted": True}
    assert (await bench.client.get(f"{PATH}/{first.id}")).status_code == 404
    third = await bench.post(PATH, {"previous_response_id": second.id, "input": [{"role": "user", "content": "so?"}]})
    response_of(third)
    assert prompt_of(bench).startswith(answered)
    listed = (await bench.client.get(f"{PATH}/{second.id}/input_items?order=asc")).json()
    assert [item["call_id"] for item in listed["data"]] == [call.call_id for call in calls]
    assert listed["has_more"] is False
    page = (await bench.client.get(f"{PATH}/{second.id}/input_items?limit=1")).json()
    assert (page["data"][0]["call_id"], page["has_more"]) == (calls[1].call_id, True)
    after = (await bench.client.get(f"{PATH}/{second.id}/input_items?after={page['last_id']}")).json()
    assert [item["call_id"] for item in after["data"]] == [calls[0].call_id]


async def test_the_same_conversation_can_be_sent_as_items(bench: GatewayBench) -> None:
    first = (await bench.post(PATH, ASKED)).json()
    call_ids = [item["call_id"] for item in first["output"] if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": one, "output": "7"} for one in call_ids]
    await bench.post(PATH, {"tools": [NOW], "previous_response_id": first["id"], "input": results})
    stored = prompt_of(bench)
    question = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    sent = await bench.post(PATH, {"tools": [NOW], "store": False, "input": [question, *first["output"], *results]})
    assert prompt_of(bench) == stored
    assert "x-kvist-ignored" not in sent.headers
    assert response_of(sent).store is False
    assert (await bench.client.get(f"{PATH}/{response_of(sent).id}")).status_code == 404


async def test_each_api_key_sees_its_own_responses_only() -> None:
    made = tool_bench(api_key=("k1", "k2"))
    async with made.client:
        mine, others = {"authorization": "Bearer k1"}, {"authorization": "Bearer k2"}
        first = response_of(await made.post(PATH, ASKED, **mine))
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            refused = await made.client.request(method, f"{PATH}/{first.id}{path}", headers=others)
            assert (refused.status_code, error_of(refused)["code"]) == (404, "response_not_found")
        continued = await made.post(PATH, {"input": "x", "previous_response_id": first.id}, **others)
        assert (continued.status_code, error_of(continued)["param"]) == (404, "previous_response_id")
        assert (await made.client.get(f"{PATH}/{first.id}", headers=mine)).json()["id"] == first.id


async def test_a_background_response_is_polled(bench: GatewayBench) -> None:
    bench.dispatcher.hold = asyncio.Event()
    opened = response_of(await bench.post(PATH, {**ASKED, "background": True}))
    assert (opened.status, opened.output) == ("in_progress", [])
    path = f"{PATH}/{opened.id}"
    assert (await bench.client.get(path)).json()["status"] == "in_progress"
    early = await bench.post(PATH, {"input": "x", "previous_response_id": opened.id})
    assert (early.status_code, error_of(early)["param"]) == (409, "previous_response_id")
    bench.dispatcher.hold.set()
    while (await bench.client.get(path)).json()["status"] == "in_progress":
        await asyncio.sleep(0)
    assert items_of(response_of(await bench.client.get(path))) == ITEMS
    assert response_of(await bench.client.post(f"{path}/cancel")).status == "completed"
    assert response_of(await bench.post(PATH, {"input": "x", "previous_response_id": opened.id})).status == "completed"
    assert "kvist:gateway_requests_in_flight 0.0" in (await bench.client.get("/metrics")).text


@pytest.mark.parametrize("num_turns", [0, 30])
async def test_a_background_response_is_cancelled_at_every_engine(bench: GatewayBench, num_turns: int) -> None:
    bench.dispatcher.hold = asyncio.Event()  # never set
    opened = response_of(await bench.post(PATH, {**ASKED, "background": True}))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    cancelled = response_of(await bench.client.post(f"{PATH}/{opened.id}/cancel"))
    assert cancelled.status == "cancelled"
    assert bench.dispatcher.num_open == 0
    assert "kvist:gateway_requests_in_flight 0.0" in (await bench.client.get("/metrics")).text
    assert response_of(await bench.client.get(f"{PATH}/{opened.id}")).status == "cancelled"
    refused = await bench.post(PATH, {"input": "x", "previous_response_id": opened.id})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "previous_response_id")
    assert "cancelled" in error_of(refused)["message"]
    again = response_of(await bench.post(PATH, {**ASKED, "background": True}))
    assert (await bench.client.delete(f"{PATH}/{again.id}")).json()["deleted"] is True
    assert bench.dispatcher.num_open == 0


async def test_only_background_responses_can_be_cancelled(bench: GatewayBench) -> None:
    first = response_of(await bench.post(PATH, ASKED))
    refused = await bench.client.post(f"{PATH}/{first.id}/cancel")
    assert (refused.status_code, "background" in error_of(refused)["message"]) == (400, True)


async def test_an_error_after_the_first_token_is_a_failed_response(bench: GatewayBench) -> None:
    bench.dispatcher.error, bench.dispatcher.error_after = EngineError("broken"), 30
    *_, last = events_of(await bench.post(PATH, {**ASKED, "stream": True}))
    assert isinstance(last, ResponseFailed)
    assert last.response.error is not None
    assert (last.response.status, last.response.error.message) == ("failed", "broken")
    assert (await bench.client.get(f"{PATH}/{last.response.id}")).json()["status"] == "failed"
    assert (await bench.post(PATH, ASKED)).status_code == 500
    opened = response_of(await bench.post(PATH, {**ASKED, "background": True}))
    while (found := (await bench.client.get(f"{PATH}/{opened.id}")).json())["status"] == "in_progress":
        await asyncio.sleep(0)
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")


async def test_logprobs_are_in_the_text_or_in_the_deltas_of_a_stream(bench: GatewayBench) -> None:
    asked = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": True}
    assert error_of(await bench.post(PATH, asked))["param"] == "include"  # this model may reason
    plain = gateway_bench()
    plain.dispatcher.answer = "ab"
    async with plain.client:
        whole = (await plain.post(PATH, {**asked, "stream": False})).json()
        logprobs = whole["output"][0]["content"][0]["logprobs"]
        assert [one["token"] for one in logprobs][:2] == ["a", "b"]
        assert [top["logprob"] for top in logprobs[0]["top_logprobs"]] == [-0.5, -9999.0]
        streamed = events_of(await plain.post(PATH, asked))
        deltas = [event for event in streamed if type(event).__name__ == "OutputTextDelta"]
        assert [event.logprobs[0]["token"] for event in deltas] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", "Expected"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role", "'critic'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"content": "x"}]}, "input[0].role", "missing"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "send the item itself"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
            "only text",
        ),
        ({"input": [{"role": "user", "content": [{"type": "odd"}]}]}, "input[0].content[0].type", "'odd'"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "now"}]}, "input[0].arguments", "missing"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "now", "arguments": "{"}]},
            "input[0].arguments",
            "is not JSON",
        ),
        (
            {
                "input": [
                    {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
                    {"type": "function_call", "call_id": "d", "name": "now", "arguments": "[]"},
                ]
            },
            "input[1].arguments",
            "JSON object",
        ),
        ({"input": [RESULT]}, "input[0].call_id", "no message"),
        ({"input": [RESULT | {"call_id": None}]}, "input[0].call_id", "missing"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "another tool"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "no tools run in the server"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        (
            {"text": {"format": {"type": "json_schema", "strict": True, "schema": {"properties": {"a": {"type": 5}}}}}},
            "text.format.schema.properties.a",
            "",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"include": ["file_search_call.results"]}, "include", "supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `include`"),
        ({"background": True, "stream": True}, "background", "poll"),
        ({"background": True, "store": False}, "store", "lost"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata", "at most 16"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "no response 'resp_x'"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "x"}}, "prompt", "not supported"),
        ({"instructionss": "x"}, "instructionss", "did you mean `instructions`?"),
        ({"messages": []}, "messages", "/v1/chat/completions"),
    ],
)  # fmt: skip
async def test_a_fault_is_an_error_with_its_path_in_the_clients_own_request(
    bench: GatewayBench, fields: dict[str, object], param: str, expected: str
) -> None:
    response = await bench.post(PATH, {**ASKED, **fields})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (404 if "resp_x" in str(fields) else 400, param), error
    assert expected in error["message"]
    assert not bench.dispatcher.requests


async def test_faulty_queries_are_a_400(bench: GatewayBench) -> None:
    first = response_of(await bench.post(PATH, ASKED))
    for query in ("stream=true", "streem=1", "include[]=file_search_call.results"):
        assert (await bench.client.get(f"{PATH}/{first.id}?{query}")).status_code == 400
    for query in ("limit=0", "limit=x", "limit=101", "limit=%C2%B2", "order=up", "after=x", "include=x"):
        refused = await bench.client.get(f"{PATH}/{first.id}/input_items?{query}")
        assert (refused.status_code, error_of(refused)["param"]) == (400, query.partition("=")[0])
    assert (await bench.client.get(f"{PATH}/{first.id}?include[]=reasoning.encrypted_content")).status_code == 200


async def test_a_conversation_that_grows_over_the_limit_of_a_request_is_a_400() -> None:
    made = tool_bench(max_body_bytes=3000)
    async with made.client:
        last = response_of(await made.post(PATH, {"input": "x"}))
        for _ in range(3):  # each response has about a kilobyte
            reply = await made.post(PATH, {"input": "x", "previous_response_id": last.id})
            if reply.status_code != 200:
                break
            last = response_of(reply)
        assert (reply.status_code, error_of(reply)["param"]) == (400, "previous_response_id")
        assert "--max-body-bytes" in error_of(reply)["message"]


class Weather(BaseModel):
    city: str


async def test_openais_client_streams_parses_and_continues(bench: GatewayBench) -> None:
    from openai import AsyncOpenAI  # half a second, which a collection saves

    http_client: Any = bench.client  # of another httpx than the library declares
    client = AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http_client)
    tools: Any = [WEATHER, NOW]
    async with client.responses.stream(model="tiny", input="hi", tools=tools) as stream:
        final = await stream.get_final_response()
    assert [item.type for item in final.output] == [kind for kind, _ in ITEMS]
    assert final.output_text == "I look.\n"
    results: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "7"}
        for item in final.output
        if item.type == "function_call"
    ]
    second = await client.responses.create(model="tiny", previous_response_id=final.id, input=results, tools=tools)
    assert second.status == "completed"
    listed = await client.responses.input_items.list(second.id)
    assert [item.type for item in listed.data] == ["function_call_output"] * 2
    bench.dispatcher.answer = '{"city": "Oslo"}'
    parsed = await client.responses.parse(model="tiny", input="hi", text_format=Weather)
    assert parsed.output_parsed == Weather(city="Oslo")
    counted = await client.responses.input_tokens.count(model="tiny", input="hi")
    assert counted.input_tokens == len("<user>hi<assistant>")
    await client.responses.delete(second.id)

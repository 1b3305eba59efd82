"""Anthropic's Messages API: answers, streams, tools, thinking, errors, token counts."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from kvist.api.messages import Message, MessagesErrorBody, MessagesEvent
from kvist.errors import EngineError
from kvist.request import AFTER_REASONING, AfterReasoning
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from tests.agents_api.conftest import prompt_of, tool_bench

PATH = "/v1/messages"
USER = {"role": "user", "content": "hi"}
WEATHER = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {}}}}
NOW = {"name": "now", "input_schema": {"type": "object"}}
ASKED: dict[str, Any] = {"max_tokens": 400, "messages": [USER], "tools": [WEATHER, NOW]}
BLOCKS = [
    ("thinking", "Which city?"),
    ("text", "I look.\n"),
    ("tool_use", {"city": "Tromsø"}),
    ("tool_use", {}),
]
CALL = {"type": "tool_use", "id": "c1", "name": "now", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "noon"}]}


def message_of(response: httpx.Response) -> Message:
    """Decode a whole answer, and check that it has no other fields than its schema."""
    assert response.status_code == 200, response.text
    message = msgspec.json.decode(response.content, type=Message)
    assert msgspec.to_builtins(message) == response.json()
    return message


def error_of(response: httpx.Response) -> Any:
    body = msgspec.json.decode(response.content, type=MessagesErrorBody)
    assert msgspec.to_builtins(body) == response.json()
    assert body.request_id == response.headers["x-request-id"]
    return body.error


def events_of(response: httpx.Response) -> list[Any]:
    """Decode a stream, and check that each event is named after its type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(msgspec.json.decode(data.removeprefix("data: "), type=MessagesEvent))
        assert name == f"event: {msgspec.to_builtins(found[-1])['type']}"
        assert msgspec.to_builtins(found[-1]) == msgspec.json.decode(data.removeprefix("data: "))
    return found


def joined(events: list[Any]) -> Message:
    """Add up a stream as Anthropic's client does, and check its order: at most one block is open."""
    first, ping, *middle, delta, stop = [msgspec.to_builtins(event) for event in events]
    assert [first["type"], ping["type"], delta["type"], stop["type"]] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]
    message, is_open = first["message"], False
    for event in middle:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "json": ""})
            is_open = True
            continue
        assert is_open
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        for name, text in event["delta"].items():
            if name != "type":
                block["json" if name == "partial_json" else name] += text
    assert not is_open
    for block in message["content"]:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = msgspec.json.decode(text)
    message |= delta["delta"] | {"usage": delta["usage"]}
    return msgspec.convert(message, Message)


def blocks_of(message: Message) -> list[tuple[str, object]]:
    shown = [msgspec.to_builtins(block) for block in message.content]
    names = {"thinking": "thinking", "text": "text", "tool_use": "input"}
    return [(block["type"], block[names[block["type"]]]) for block in shown]


async def test_an_answer_has_thinking_text_and_tool_use(bench: GatewayBench) -> None:
    message = message_of(await bench.post(PATH, ASKED))
    assert blocks_of(message) == BLOCKS
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert message.id.startswith("msg_")
    assert message.model == "tiny"
    assert prompt_of(bench) == "weather?now?<user>hi<assistant>"
    usage = message.usage
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (4, 0)
    assert usage.input_tokens + 4 == len(bench.dispatcher.requests[-1].prompt_token_ids)
    counted = await bench.post(f"{PATH}/count_tokens", ASKED)
    assert counted.json() == {"input_tokens": usage.input_tokens + 4}


@pytest.mark.parametrize("cuts", [(), (3, 50, 7, 31), (500,), (40, 1, 1, 60)])
async def test_a_stream_that_another_worker_continues_adds_up_to_the_whole_answer(
    bench: GatewayBench, cuts: tuple[int, ...]
) -> None:
    whole = message_of(await bench.post(PATH, ASKED))
    bench.dispatcher.cuts = cuts
    found = joined(events_of(await bench.post(PATH, {**ASKED, "stream": True})))
    ids = {"id": whole.id, "content": [msgspec.to_builtins(block) for block in whole.content]}
    for mine, its in zip(ids["content"], found.content, strict=True):
        if mine["type"] == "tool_use":  # ids are drawn
            mine["id"] = msgspec.to_builtins(its)["id"]
    assert msgspec.to_builtins(found) == msgspec.to_builtins(whole) | ids | {"id": found.id}


async def test_calls_results_and_thinking_in_the_history_reach_the_template(bench: GatewayBench) -> None:
    answer = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, CALL]}
    messages = [USER, answer, {"role": "user", "content": [RESULT, {"type": "text", "text": "and?"}]}]
    body = {**ASKED, "system": [{"type": "text", "text": "be brief"}], "messages": messages}
    response = await bench.post(PATH, body)
    assert response.headers["x-kvist-ignored"] == "messages[].content[].signature"
    message_of(response)
    call = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
    expected = f"<system>be brief<user>hi<assistant>{call}<tool>noon=c1 of now<user>and?<assistant>"
    assert prompt_of(bench) == f"weather?now?{expected}"


async def test_a_last_message_of_the_assistant_is_continued(bench: GatewayBench) -> None:
    messages = [USER, {"role": "assistant", "content": "I th"}]
    message_of(await bench.post(PATH, {"max_tokens": 5, "messages": messages}))
    assert prompt_of(bench) == "<user>hi<assistant>I th"


async def test_the_reasons_of_an_end(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "one two three"
    plain = {"messages": [USER], "max_tokens": 50}
    assert message_of(await bench.post(PATH, plain)).stop_reason == "end_turn"
    stopped = message_of(await bench.post(PATH, {**plain, "stop_sequences": [" tw"]}))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " tw")
    assert blocks_of(stopped) == [("text", "one")]
    cut = message_of(await bench.post(PATH, {**plain, "max_tokens": 5}))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    bench.dispatcher.answer = "x" * 2000
    full = message_of(await bench.post(PATH, {**plain, "max_tokens": 100_000}))
    assert full.stop_reason == "model_context_window_exceeded"


async def test_a_call_that_max_tokens_cuts_has_no_input(bench: GatewayBench) -> None:
    message = message_of(await bench.post(PATH, {**ASKED, "max_tokens": 90}))
    assert message.stop_reason == "max_tokens"
    assert blocks_of(message)[-1] == ("tool_use", {})


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "(True)"),
        ({"thinking": {"type": "disabled"}}, "(False)"),
        ({"output_config": {"effort": "low"}}, "(Truelow)"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}}, "(True)"),
    ],
)
async def test_thinking_and_effort_reach_the_template(bench: GatewayBench, fields: Any, shown: str) -> None:
    message_of(await bench.post(PATH, {**ASKED, **fields}))
    assert prompt_of(bench).endswith(f"<assistant>{shown}")


async def test_a_budget_of_thinking_is_a_constraint_where_reasoning_is_recognised(bench: GatewayBench) -> None:
    asked = {**ASKED, "thinking": {"type": "enabled", "budget_tokens": 7}}
    response = await bench.post(PATH, asked)
    message_of(response)
    constraint = bench.dispatcher.requests[-1].sampling.constraint
    assert constraint is not None
    assert constraint.kind == "after_reasoning"
    assert "x-kvist-ignored" not in response.headers
    wrong = error_of(await bench.post(PATH, {**ASKED, "thinking": {"type": "enabled", "budget_tokens": -5}}))
    assert wrong.param == "thinking.budget_tokens"
    plain = gateway_bench()
    async with plain.client:
        response = await plain.post(PATH, {**asked, "tools": None})
    message_of(response)
    assert response.headers["x-kvist-ignored"] == "thinking.budget_tokens, thinking.type"


@pytest.mark.parametrize(
    ("choice", "names"),
    [({"type": "any"}, ["weather", "now"]), ({"type": "tool", "name": "now"}, ["now"])],
)
async def test_a_choice_of_tools_is_a_constraint(bench: GatewayBench, choice: dict[str, str], names: list[str]) -> None:
    message_of(await bench.post(PATH, {**ASKED, "tool_choice": choice}))
    constraint = bench.dispatcher.requests[-1].sampling.constraint
    assert constraint is not None
    assert [name for name in ("weather", "now") if name in constraint.text] == names
    strict = {**WEATHER, "strict": True, "input_schema": {"type": "object", "properties": {"city": {"type": "odd"}}}}
    error = error_of(await bench.post(PATH, {**ASKED, "tools": [strict]}))
    assert (error.code, error.param) == ("invalid_constraint", "tools[0].input_schema.properties.city")


async def test_thinking_may_be_omitted(bench: GatewayBench) -> None:
    omitted = {"thinking": {"type": "adaptive", "display": "omitted"}}
    assert blocks_of(message_of(await bench.post(PATH, {**ASKED, **omitted}))) == BLOCKS[1:]


async def test_parallel_tool_use_can_be_disabled(bench: GatewayBench) -> None:
    choice = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    assert blocks_of(message_of(await bench.post(PATH, {**ASKED, **choice}))) == BLOCKS[:3]
    message = message_of(await bench.post(PATH, {**ASKED, "tool_choice": {"type": "none"}}))
    assert [kind for kind, _ in blocks_of(message)] == ["thinking", "text"]


async def test_an_output_format_is_a_constraint(bench: GatewayBench) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    config = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    message_of(await bench.post(PATH, {"max_tokens": 5, "messages": [USER], **config}))
    constraint = bench.dispatcher.requests[-1].sampling.constraint
    assert constraint is not None
    then = msgspec.json.decode(constraint.text, type=AfterReasoning).then
    assert then is not None
    assert (constraint.kind, then.kind, then.strict) == (AFTER_REASONING, "json_schema", True)
    config["output_config"]["format"]["schema"] = {"type": "object", "properties": {"a": {"type": "odd"}}}
    error = error_of(await bench.post(PATH, {"max_tokens": 5, "messages": [USER], **config}))
    assert (error.code, error.param) == ("invalid_constraint", "output_config.format.schema.properties.a")


async def test_an_error_in_the_middle_of_a_stream_is_an_event(bench: GatewayBench) -> None:
    bench.dispatcher.error, bench.dispatcher.error_after = EngineError("broken"), 10
    *_, last = events_of(await bench.post(PATH, {**ASKED, "stream": True}))
    assert isinstance(last, MessagesErrorBody)
    assert (last.error.type, last.error.message) == ("api_error", "broken")
    response = await bench.post(PATH, ASKED)
    assert (response.status_code, error_of(response).type) == (500, "api_error")


def answer_with(*blocks: object) -> dict[str, object]:
    return {"messages": [USER, {"role": "assistant", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "user, assistant, system"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "Expected"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0].type", "'tool_use'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source",
            "only text",
        ),
        (answer_with({"type": "tool_use", "id": "c"}), "messages[1].content[0].name", "missing"),
        (answer_with({"type": "tool_use", "name": "now"}), "messages[1].content[0].id", "missing"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id", "no message"),
        (
            {"messages": [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [
                {**RESULT, "content": [{"type": "image"}]}]}]},
            "messages[2].content[0].content[0].type",
            "only text",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "another tool"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name", "letters"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "custom"),
        ({"tool_choice": {"type": "odd"}}, "tool_choice.type", "auto, any"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "missing"),
        ({"thinking": {"type": "odd"}}, "thinking.type", "enabled"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"stop_sequences": [""]}, "stop_sequences", "1 to 256"),
        ({"mesages": 1}, "mesages", "did you mean `messages`?"),
        ({"system": [{"type": "image"}]}, "system[0].type", "only text"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type", "json_schema"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "no tools run in the server"),
    ],
)  # fmt: skip
async def test_a_fault_is_a_400_with_its_path_in_the_clients_own_request(
    bench: GatewayBench, fields: dict[str, object], param: str, expected: str
) -> None:
    response = await bench.post(PATH, {**ASKED, **fields})
    error = error_of(response)
    assert (response.status_code, error.type, error.param) == (400, "invalid_request_error", param), error
    assert expected in error.message
    assert f"`{param}" in error.message or error.message.startswith("Expected")
    assert not bench.dispatcher.requests


async def test_errors_before_the_endpoint_have_anthropics_shape_too() -> None:
    made = tool_bench(api_key=("k1", "k2"))
    async with made.client:
        refused = await made.post(PATH, ASKED)
        assert (refused.status_code, error_of(refused).type) == (401, "authentication_error")
        assert "x-api-key" in error_of(refused).message
        assert (await made.post(PATH, ASKED, **{"x-api-key": "k2"})).status_code == 200
        assert (await made.post(PATH, ASKED, authorization="Bearer none", **{"x-api-key": "k2"})).status_code == 200
        assert (await made.post(PATH, ASKED, **{"x-api-key": "k3"})).status_code == 401
        missing = await made.post(PATH, {**ASKED, "model": "other"}, **{"x-api-key": "k1"})
        assert (missing.status_code, error_of(missing).type) == (404, "not_found_error")
        assert (await made.client.get(PATH, headers={"x-api-key": "k1"})).status_code == 405


async def test_beta_requests_of_the_client_are_messages(bench: GatewayBench) -> None:
    beta = {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}
    response = await bench.post(
        f"{PATH}?beta=true", {**ASKED, **beta}, **{"anthropic-beta": "x", "anthropic-version": "2023-06-01"}
    )
    message_of(response)
    assert response.headers["x-kvist-ignored"] == "context_management"

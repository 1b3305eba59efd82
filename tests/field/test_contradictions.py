"""No part of a request is lost silently: fields of another type, two values of one field, fields without
effect on this model, and answers that end inside of a call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from tests.agents_api.conftest import tool_bench

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES, GENERATE = "/v1/messages", "/v1/responses", "/generate"
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
NAMED = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
ITEM_CALL = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
USE = {"type": "tool_use", "id": "c", "name": "now", "input": {}}
ALLOWED = {"mode": "auto", "tools": [NAMED]}


@pytest.fixture
async def bench() -> AsyncIterator[GatewayBench]:
    """The model calls tools in Hermes' format, and reasons."""
    made = tool_bench()
    async with made.client:
        yield made


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHATS, {"messages": [USER], **fields}


def history(*calls: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHATS, {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": list(calls)}], **fields}


def messages(**fields: Any) -> tuple[str, dict[str, Any]]:
    return MESSAGES, {"messages": [USER], "max_tokens": 5, **fields}


def blocks(role: str, *given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return messages(messages=[USER, {"role": role, "content": list(given)}])


def responses(**fields: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": "hi", **fields}


@pytest.mark.parametrize(
    ("request_", "param", "expected"),
    [
        # fields that objects of the type do not have
        (chat(response_format={"type": "text", "json_schema": {"schema": SCHEMA}}), "response_format.json_schema",
         "text"),
        (chat(response_format={"type": "json_object", "json_schema": {"schema": SCHEMA}}),
         "response_format.json_schema", "json_object"),
        (chat(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}, "triggers": ["x"]}),
         "response_format.triggers", "json_schema"),
        (chat(response_format={"type": "structural_tag", "format": {"type": "const_string", "value": "x"}, "triggers":
         ["x"]}), "response_format.format", "only one"),
        (chat(tools=[{"type": "custom", "custom": {"name": "now"}}]), "tools[0].custom", "function"),
        (responses(text={"format": {"type": "text", "schema": SCHEMA}}), "text.format.schema", "text"),
        (responses(input=[{**ITEM_CALL, "output": "lost"}]), "input[0].output", "function_call"),
        (responses(input=[{**USER, "call_id": "c"}]), "input[0].call_id", "message"),
        (responses(tools=[TOOL]), "tools[0].function", "a field of chats"),
        (responses(tools=[{"type": "code_interpreter", "container": {"type": "auto"}}]), "tools[0].container",
         "of the type 'code_interpreter'"),
        (blocks("user", {"type": "text", "text": "x", "tool_use_id": "c"}), "messages[1].content[0].tool_use_id",
         "text"),
        (blocks("assistant", {**USE, "thinking": "x"}), "messages[1].content[0].thinking", "tool_use"),
        (messages(tools=[TOOL]), "tools[0].function", "unknown field `tools[0].function` of the type 'function'"),
        (messages(tools=[{"name": "now"}], tool_choice={"type": "auto", "name": "now"}), "tool_choice.name", "auto"),
        (messages(thinking={"type": "disabled", "budget_tokens": 5}), "thinking.budget_tokens", "disabled"),
        (messages(thinking={"type": "enabled", "display": "loud"}), "thinking.display", "omitted"),
        # unknown fields inside of a choice, in the words of each API
        (chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "now", "mood": 1}}),
         "tool_choice.function.mood", "unknown"),
        (chat(tools=[TOOL], tool_choice={**NAMED, "mood": 1}), "tool_choice.mood", "unknown"),
        (chat(tools=[TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mood": 1}}),
         "tool_choice.allowed_tools.mood", "unknown"),
        (chat(tools=[TOOL], tool_choice={"type": "allowed_tools", **ALLOWED}), "tool_choice.allowed_tools", "object"),
        (responses(tools=[{"type": "function", **FUNCTION}], tool_choice=NAMED), "tool_choice.name", "missing"),
        (responses(tools=[{"type": "function", **FUNCTION}], tool_choice={"type": "function", "name": "x"}),
         "tool_choice.name", "`tool_choice.name` is 'x'"),
        (responses(tools=[{"type": "function", **FUNCTION}], tool_choice={"type": "allowed_tools", "mode": "auto",
         "tools": [{"type": "function", "name": "x"}]}), "tool_choice.tools[0].name", "`tool_choice.tools[0].name`"),
        (responses(tools=[{"type": "function", **FUNCTION}], tool_choice={"type": "allowed_tools", "mode": "auto",
         "tools": [{"type": "function", "name": "now"}], "mood": 1}), "tool_choice.mood", "unknown"),
        # two values of one field
        (chat(include_stop_str_in_output=True, no_stop_trim=False), "no_stop_trim", "differ"),
        (chat(request_id="a", rid="b"), "rid", "differ"),
        (chat(messages=[USER, {"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]),
         "messages[1].reasoning_content", "differ"),
        ((COMPLETIONS, {"prompt": "x", "request_id": "a", "rid": "b"}), "rid", "differ"),
        ((GENERATE, {"text": "x", "sampling_params": {"include_stop_str_in_output": True, "no_stop_trim": False}}),
         "sampling_params.no_stop_trim", "differ"),
        # fields that need another one
        (chat(structured_outputs={"regex": "a", "whitespace_pattern": " "}), "structured_outputs.whitespace_pattern",
         "`structured_outputs.json`"),
        (chat(structured_outputs={"choice": ["a"], "disable_any_whitespace": True}),
         "structured_outputs.disable_any_whitespace", "`structured_outputs.json`"),
        (chat(guided_whitespace_pattern=" "), "guided_whitespace_pattern", "`guided_json`"),
        (chat(truncation_side="right"), "truncation_side", "truncate_prompt_tokens"),
        # a call and another form at once; a schema that no document satisfies, beside calls
        (chat(tools=[TOOL], tool_choice="required", ebnf='root ::= "x"'), "ebnf", "exclude each other"),
        (chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_schema", "json_schema": {"schema":
         {"type": "x"}}}), "response_format.json_schema.schema", "x"),
        # calls in the history
        (history(CALL, CALL), "messages[1].tool_calls[1].id", "another call"),
        (history({**CALL, "function": {"name": "", "arguments": "{}"}}), "messages[1].tool_calls[0].function.name",
         "empty"),
        (history(CALL, continue_final_message=True), "continue_final_message", "tool_calls"),
        (blocks("assistant", {**USE, "name": ""}), "messages[1].content[0].name", "empty"),
        (blocks("assistant", {**USE, "id": ""}), "messages[1].content[0].id", "empty"),
        (blocks("assistant", USE, USE), "messages[1].content[1].id", "another call"),
        (responses(input=[ITEM_CALL, {**ITEM_CALL, "call_id": ""}]), "input[1].call_id", "empty"),
        (responses(input=[ITEM_CALL, {**ITEM_CALL, "call_id": "d", "arguments": "{"}]), "input[1].arguments", "JSON"),
        (responses(input=[{**ITEM_CALL, "name": ""}]), "input[0].name", "empty"),
        # parts of a content
        (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "missing"),
        (chat(messages=[{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]),
         "messages[0].content[0].type", "input_text"),
    ],
)  # fmt: skip
async def test_a_contradiction_is_a_400_that_names_the_field(
    bench: GatewayBench, request_: tuple[str, dict[str, Any]], param: str, expected: str
) -> None:
    response = await bench.post(*request_)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert expected in error["message"], error
    assert not bench.dispatcher.requests


@pytest.mark.parametrize(
    "request_",
    [
        chat(response_format={"type": "text", "json_schema": None}),
        chat(include_stop_str_in_output=True, no_stop_trim=True),
        chat(include_stop_str_in_output=True, no_stop_trim=None),
        chat(structured_outputs={"regex": "a", "disable_any_whitespace": False}),
        chat(truncation_side="left"),
        chat(messages=[USER, {"role": "assistant", "reasoning": "a", "reasoning_content": "a"}, USER]),
        chat(tools=[TOOL], tool_choice={**NAMED, "mood": None}),
        blocks("user", {"type": "text", "text": "x", "input": None, "content": []}),
        messages(thinking={"type": "enabled", "display": "summarized"}),
    ],
)
async def test_empty_and_equal_values_are_accepted(bench: GatewayBench, request_: tuple[str, dict[str, Any]]) -> None:
    response = await bench.post(*request_)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("request_", "ignored"),
    [
        (chat(chat_template_kwargs={"enable_thinking": True}), "chat_template_kwargs.enable_thinking"),
        (chat(chat_template_kwargs={"a, b": 1, "\r\nx-y": 2}), "chat_template_kwargs"),
        (chat(reasoning_effort="high"), "reasoning_effort"),
        (responses(reasoning={"effort": "high"}), "reasoning.effort"),
        (messages(output_config={"effort": "high"}), "output_config.effort"),
        (messages(thinking={"type": "adaptive"}), "thinking.type"),
        (chat(chat_template_kwargs={"m": 1}), None),  # a name in the template
        (chat(chat_template_kwargs={"enable_thinking": False}), None),  # the model does not reason
        (chat(reasoning_effort="none"), None),
        (messages(thinking={"type": "disabled"}), None),
    ],
)
async def test_a_field_that_this_model_does_not_know_is_named_in_the_header(
    request_: tuple[str, dict[str, Any]], ignored: str | None
) -> None:
    made = gateway_bench()
    async with made.client:
        response = await made.post(*request_)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-kvist-ignored") == ignored


CALLING = '<tool_call>\n{"name": "now", "arguments": {"place": "Tromsø"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("stop", "reason", "arguments"),
    [
        ("omsø", "stop", '{"place": "Tr'),
        ("</tool_call>", "tool_calls", '{"place": "Tromsø"}'),
        ("never", "tool_calls", '{"place": "Tromsø"}'),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_inside_of_a_call_does_not_end_with_tool_calls(
    bench: GatewayBench, stop: str, reason: str, arguments: str, stream: bool
) -> None:
    bench.dispatcher.answer = CALLING
    response = await bench.post(*chat(tools=[TOOL], stop=stop, stream=stream))
    if stream:
        assert f'"finish_reason":"{reason}"' in response.text
        return
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == reason
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments
    assert not choice["message"]["content"]

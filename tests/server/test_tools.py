"""Tool calls and reasoning in chats: requests, whole answers and streams."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from kvist import settings
from kvist.errors import ConfigError
from kvist.grammar.backend import Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.reasoning import ReasoningBackend
from kvist.request import AFTER_REASONING, AfterReasoning, Constraint, EngineRequest, FinishReason, WorkerId
from kvist.router.stream import StreamPart
from kvist.testing.gateway_bench import GatewayBench, events_of, gateway_bench
from kvist.testing.scripted_dispatcher import BYTE_MODEL, ScriptedDispatcher
from kvist.testing.tokenizers import END, byte_tokenizer
from kvist.text.chat import CallArguments, ChatTemplate
from kvist.text.template_source import find_chat_template
from kvist.tools import find_formats
from tests.tools.writing import write

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}?{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}={{ m.tool_call_id }} of {{ m.name }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if opens %}<think>\n{% endif %}{% endif %}{# </think> #}"
)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
ANSWER = (
    "<think>\nWhich city?\n</think>\n\nI look.\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Tromsø"}}\n</tool_call>\n<tool_call>{"name": "now"}</tool_call>'
)
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}


@dataclass
class FailingOver(ScriptedDispatcher):
    """Another worker continues each answer after 40 tokens."""

    def _part(
        self, request: EngineRequest, position: int, token_ids: tuple[int, ...], reason: FinishReason | None
    ) -> StreamPart:
        part = super()._part(request, position, token_ids, reason)
        return part if position < 40 else replace(part, num_failovers=1, decode_worker=WorkerId("d:2"))


@pytest.fixture
async def bench() -> AsyncIterator[GatewayBench]:
    tokenizer = byte_tokenizer(chat_template=TEMPLATE, special_tokens=(END, "<tool_call>", "</tool_call>"))
    spec = spec_with(max_model_len=1000)
    made = gateway_bench(dispatcher=FailingOver(tokenizer, answer=ANSWER, spec=spec))
    async with made.client:
        yield made


def spec_with(**fields: Any) -> Any:
    return msgspec.structs.replace(BYTE_MODEL, **fields)


def prompt_of(bench: GatewayBench) -> str:
    return bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[-1].prompt_token_ids, skip_special_tokens=False)


def joined(chunks: list[Any]) -> dict[str, Any]:
    """Add up the deltas of a stream as OpenAI's client does."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        entries = delta.get("tool_calls", [])
        assert len({entry["index"] for entry in entries}) == len(entries)
        for entry in entries:
            if "id" in entry:
                assert entry["index"] == len(message["calls"])
                message["calls"].append([entry["function"]["name"], ""])
            message["calls"][entry["index"]][1] += entry["function"]["arguments"]
    return message


async def test_an_answer_is_divided_into_reasoning_content_and_calls(bench: GatewayBench) -> None:
    choice = (await bench.chat(tools=[WEATHER, TOOL])).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning"]) == ("I look.\n", "Which city?")
    assert message["reasoning_content"] == message["reasoning"]
    functions = [
        (call["type"], call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]
    ]
    assert functions == [("function", "weather", '{"city": "Tromsø"}'), ("function", "now", "{}")]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert prompt_of(bench) == "weather?now?<user>hi<assistant>"


@pytest.mark.parametrize("cuts", [(), (3, 50, 7, 31), (500,), (40, 1, 1, 60)])
async def test_a_stream_that_another_worker_continues_has_the_same_deltas(
    bench: GatewayBench, cuts: tuple[int, ...]
) -> None:
    bench.dispatcher.cuts = cuts
    *chunks, done = events_of(await bench.chat(tools=[WEATHER, TOOL], stream=True))
    assert done == "[DONE]"
    assert joined(chunks) == {
        "content": "I look.\n",
        "reasoning": "Which city?",
        "calls": [["weather", '{"city": "Tromsø"}'], ["now", "{}"]],
    }
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [
        "tool_calls"
    ]


async def test_arguments_that_max_tokens_cuts_end_with_length(bench: GatewayBench) -> None:
    num_tokens = 2 + len(ANSWER[: ANSWER.index("Trom")]) - len("<tool_call>")
    choice = (await bench.chat(tools=[WEATHER], max_tokens=num_tokens)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert '{"city": "Trom'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_without_tools_or_with_none_calls_stay_in_the_text(bench: GatewayBench) -> None:
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = (await bench.chat(**fields)).json()["choices"][0]
        assert "tool_calls" not in choice["message"]
        assert '{"name": "now"}' in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert prompt_of(bench) == "<user>hi<assistant>"


async def test_parallel_tool_calls_false_returns_the_first_call(bench: GatewayBench) -> None:
    message = (await bench.chat(tools=[WEATHER], parallel_tool_calls=False)).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def strict(parameters: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}


def constraint_of(bench: GatewayBench) -> Constraint | None:
    """Return the constraint of the last request, without the rule about reasoning."""
    found = bench.dispatcher.requests[-1].sampling.constraint
    return found if found is None or found.kind != AFTER_REASONING else reasoning_of(bench).then


def reasoning_of(bench: GatewayBench) -> AfterReasoning:
    found = bench.dispatcher.requests[-1].sampling.constraint
    assert found is not None
    assert found.kind == AFTER_REASONING
    return msgspec.json.decode(found.text, type=AfterReasoning)


async def answers(bench: GatewayBench, *, most: int = 12, **fields: Any) -> list[Any]:
    """Return the choices of answers that the request's constraint allows."""
    bench.dispatcher.answer = ANSWER
    asked = await bench.chat(**fields)
    assert asked.status_code == 200, asked.text
    constraint = bench.dispatcher.requests[-1].sampling.constraint
    assert constraint is not None
    tokenizer = bench.dispatcher.tokenizer
    ends = (tokenizer.special_tokens[END],)
    vocabulary = Vocabulary(tokens=tokenizer, size=tokenizer.vocab_size, end_token_ids=ends)
    grammar = ReasoningBackend(GRAMMAR_BACKENDS["llguidance"].make({}, vocabulary)).compile(constraint)
    found = []
    for seed in range(most):
        text = write(grammar, tokenizer, random.Random(seed))
        if text is not None:
            bench.dispatcher.answer = text
            found += (await bench.chat(**fields)).json()["choices"]
    assert found
    return found


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"f", "now"}),
        (named("f"), {"f"}),
        (allowed("required", "now"), {"now"}),
        (allowed("required", "now", "f"), {"f", "now"}),
    ],
)
@pytest.mark.parametrize("parallel", [True, False])
async def test_an_answer_that_must_call_tools_has_valid_calls_only(
    bench: GatewayBench, choice: Any, names: set[str], parallel: bool
) -> None:
    tools = [TOOL, strict(CITY)]
    seen, most = set(), 0
    for answer in await answers(bench, tools=tools, tool_choice=choice, parallel_tool_calls=parallel):
        assert answer["finish_reason"] == "tool_calls"
        calls = answer["message"]["tool_calls"]
        most = max(most, len(calls))
        for call in calls:
            seen.add(call["function"]["name"])
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "f":
                assert jsonschema_rs.validator_for(CITY).is_valid(arguments)
    assert seen == names
    assert (most > 1) == parallel


async def test_a_strict_tool_is_enforced_where_the_model_decides_whether_to_call(bench: GatewayBench) -> None:
    found = await answers(bench, most=80, tools=[strict(CITY)])
    assert {answer["finish_reason"] for answer in found} == {"tool_calls", "stop"}
    for answer in found:
        for call in answer["message"].get("tool_calls", ()):
            assert jsonschema_rs.validator_for(CITY).is_valid(json.loads(call["function"]["arguments"]))


async def test_an_answer_is_constrained_only_where_something_is_promised(bench: GatewayBench) -> None:
    for fields, is_constrained in (
        ({}, False),
        ({"parallel_tool_calls": True}, False),
        ({"parallel_tool_calls": False}, True),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": allowed("auto", "now")}, True),
        ({"tool_choice": "none", "parallel_tool_calls": False}, False),
        ({"tools": [strict({})]}, True),
    ):
        assert (await bench.chat(**{"tools": [TOOL, WEATHER], **fields})).status_code == 200
        assert (constraint_of(bench) is not None) == is_constrained, fields


async def test_with_tools_a_response_format_is_the_alternative_to_calls(bench: GatewayBench) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"enum": ["yes", 7]}}}
    contents = set()
    for answer in await answers(bench, tools=[TOOL], response_format=form):
        message = answer["message"]
        contents.add((message["content"] or "").strip())
        assert ("tool_calls" in message) == (message["content"] is None)
    assert contents & {'"yes"', "7"}
    assert "" in contents
    for answer in await answers(bench, tools=[TOOL], response_format=form, tool_choice="required"):
        assert answer["message"]["tool_calls"]


async def test_parts_of_a_schema_that_is_not_strict_are_ignored_and_named(bench: GatewayBench) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    response = await bench.chat(tools=[tool], tool_choice="required")
    assert response.status_code == 200
    assert response.headers["x-kvist-ignored"].startswith("tools[0].function.parameters (not supported")


async def test_parts_of_a_schema_that_a_format_of_tags_cannot_enforce_are_named() -> None:
    template = TEMPLATE + "{# <tool_call> <function= <parameter= #}"
    tokenizer = byte_tokenizer(chat_template=template, special_tokens=(END,))
    made = gateway_bench(dispatcher=ScriptedDispatcher(tokenizer, answer=ANSWER, spec=spec_with(max_model_len=1000)))
    parts = {
        "a": {"type": "string", "pattern": "x"},
        "é,\r\nb": {"anyOf": [{"format": "date", "type": "string"}, {"type": "null"}]},
        "days": {"type": "integer", "minimum": 1},
    }
    schema: dict[str, Any] = {"type": "object", "properties": parts, "minProperties": 1}
    function: dict[str, Any] = {"name": "f", "parameters": schema}
    async with made.client:
        response = await made.chat(tools=[{"type": "function", "function": function}], tool_choice="required")
        where = "tools[0].function.parameters"
        assert response.headers["x-kvist-ignored"].endswith(
            f", {where}.minProperties, {where}.properties.a.pattern, {where}.properties.    b.anyOf[0].format"
        )
        schema["properties"] = {f"p{index}": parts["a"] for index in range(50)}
        response = await made.chat(tools=[{"type": "function", "function": function}], tool_choice="required")
        assert response.headers["x-kvist-ignored"].endswith("p14.pattern, and 35 more")
        refused = await made.chat(tools=[{"type": "function", "function": {**function, "strict": True}}])
        assert refused.json()["error"]["param"] == f"{where}.minProperties"


@pytest.mark.parametrize(("last", "reason"), [("{}", "tool_calls"), ('{"a": ', "stop")])
async def test_the_finish_reason_depends_on_the_last_call_alone(last: str, reason: str) -> None:
    begin = '<tool_call>{"name": "now", "arguments": '
    answer = f'{begin}{{"a": [1}}}}}}</tool_call>{begin}{last}'
    tokenizer = byte_tokenizer(chat_template=TEMPLATE, special_tokens=(END, "<tool_call>", "</tool_call>"))
    made = gateway_bench(dispatcher=ScriptedDispatcher(tokenizer, answer=answer, spec=spec_with(max_model_len=1000)))
    async with made.client:
        choice = (await made.chat(tools=[TOOL])).json()["choices"][0]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a": [1}}}', last]
    assert choice["finish_reason"] == reason


async def test_a_constraint_holds_after_the_reasoning(bench: GatewayBench) -> None:
    for opens in (True, False):
        assert (await bench.chat(regex="x", chat_template_kwargs={"opens": opens})).status_code == 200
        rule = reasoning_of(bench)
        assert (rule.is_open, rule.then, rule.max_tokens) == (opens, Constraint(kind="regex", text="x"), None)
    assert (await bench.chat()).status_code == 200
    assert constraint_of(bench) is None


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"thinking_token_budget": 20}, 20),
        ({"thinking_budget": 0}, 0),
        ({"max_thinking_tokens": 7, "thinking_budget": 7, "thinking_token_budget": -1}, 7),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "high"}, None),
        ({"thinking_budget": -1}, None),
    ],
)
async def test_a_budget_ends_the_reasoning(bench: GatewayBench, fields: dict[str, Any], budget: int | None) -> None:
    assert (await bench.chat(**fields)).status_code == 200
    if budget is None:
        assert bench.dispatcher.requests[-1].sampling.constraint is None
    else:
        assert (reasoning_of(bench).max_tokens, reasoning_of(bench).then) == (budget, None)


async def test_reasoning_in_the_history_has_the_name_that_the_template_reads() -> None:
    template = "{% for m in messages %}{{ m.thinking }},{{ m.reasoning }},{{ m.reasoning_content }};{% endfor %}"
    made = gateway_bench(dispatcher=ScriptedDispatcher(byte_tokenizer(chat_template=template)))
    said = {"role": "assistant", "reasoning": "r"}
    messages: list[Any] = [said, {**said, "content": "c"}, {**said, "tool_calls": [CALL]}]
    messages.append({**said, "content": "c", "tool_calls": [CALL]})
    async with made.client:
        assert (await made.post("/v1/chat/completions", {"messages": messages})).status_code == 200
    assert prompt_of(made) == "r,r,r;" * 3 + ",r,r;"


HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|call|>", "<|return|>")


async def test_gpt_oss_answers_in_channels() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}<|start|>assistant{# tools <|channel|> <|constrain|> #}"
    )
    tokenizer = byte_tokenizer(chat_template=template, special_tokens=(END, *HARMONY_TOKENS))
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    made = gateway_bench(dispatcher=ScriptedDispatcher(tokenizer, spec=spec_with(max_model_len=1000)))
    async with made.client:
        made.dispatcher.answer = f"{analysis}<|channel|>final<|message|>Yes."
        assert (await made.chat()).status_code == 200
        message = (await made.chat(tools=[TOOL])).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning"]) == ("Yes.", "Hm.")
        message = (await made.chat(regex="Yes.")).json()["choices"][0]["message"]
        rule = reasoning_of(made)
        assert (message["content"], rule.begin, rule.end) == ("Yes.", "", "<|channel|>final<|message|>")
        for choice in ("required", named("now")):
            found = await answers(made, tools=[TOOL], tool_choice=choice)
            assert {call["function"]["name"] for each in found for call in each["message"]["tool_calls"]} == {"now"}


async def test_a_budget_needs_a_model_whose_reasoning_is_recognised() -> None:
    made = gateway_bench()
    async with made.client:
        error = (await made.chat(thinking_budget=9)).json()["error"]
    assert error["param"] == "thinking_budget"
    assert "--reasoning-parser" in error["message"]


async def test_reasoning_can_be_left_in_the_content_or_out(bench: GatewayBench) -> None:
    message = (await bench.chat(include_reasoning=False)).json()["choices"][0]["message"]
    assert "reasoning" not in message
    assert message["content"].startswith("I look.")
    message = (await bench.chat(separate_reasoning=False)).json()["choices"][0]["message"]
    assert "reasoning" not in message
    assert message["content"].startswith("<think>")


async def test_reasoning_that_the_prompt_opens_needs_no_tag(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "So.\n</think>\n\nYes."
    message = (await bench.chat(chat_template_kwargs={"opens": True})).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("So.", "Yes.")
    message = (await bench.chat()).json()["choices"][0]["message"]
    assert message["content"] == "So.\n</think>\n\nYes."


async def test_calls_and_results_in_the_history_reach_the_template(bench: GatewayBench) -> None:
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert (await bench.post("/v1/chat/completions", {"messages": history, "tools": [TOOL]})).status_code == 200
    call = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
    assert prompt_of(bench) == f"now?<user>hi<assistant>{call}<tool>noon=c1 of now<assistant>"
    tokens = (await bench.post("/tokenize", {"messages": history, "tools": [TOOL]})).json()["tokens"]
    assert tokens == list(bench.dispatcher.requests[-1].prompt_token_ids)


def with_call(**changes: Any) -> list[Any]:
    return [USER, {"role": "assistant", "tool_calls": [CALL | changes]}]


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", "missing required field `name`"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "1 to 256"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "supported: function"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "another tool"),
        ({"tool_choice": "required"}, "tool_choice", "`tools` is empty"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "supported"),
        ({"tools": [TOOL], "tool_choice": 3}, "tool_choice", "must be"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type", "supported"),
        ({"tools": [TOOL], "tool_choice": named("x")}, "tool_choice.function.name", "no tool of the request"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "now"}}, "tool_choice.function.name", "missing"),
        ({"tools": [TOOL], "tool_choice": allowed("often", "now")}, "tool_choice.allowed_tools.mode", "auto"),
        ({"tools": [TOOL], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "at least one"),
        (
            {"tools": [TOOL], "tool_choice": allowed("auto", "now", "x")},
            "tool_choice.allowed_tools.tools[1].function.name",
            "no tool",
        ),
        (
            {"tools": [TOOL, strict({"properties": {"a": {"type": "string", "not": {}}}})]},
            "tools[1].function.parameters.properties.a",
            "not",
        ),
        ({"tools": [strict({"type": "array"})]}, "tools[0].function.parameters.type", "object"),
        (
            {"tools": [TOOL], "tool_choice": "required", "regex": "x", "thinking_budget": -2},
            "thinking_budget",
            "from 0",
        ),
        ({"thinking_budget": 5, "thinking_token_budget": 6}, "thinking_token_budget", "differ"),
        ({"tools": [TOOL], "ebnf": 'root ::= "x"'}, "ebnf", "exclude each other"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "cannot be set"),
        (
            {"messages": with_call(function={"name": "now", "arguments": "{"})},
            "messages[1].tool_calls[0].function.arguments",
            "is not JSON",
        ),
        (
            {"messages": with_call(function={"name": "now", "arguments": "[1]"})},
            "messages[1].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ({"messages": with_call(id="")}, "messages[1].tool_calls[0].id", "empty"),
        ({"messages": with_call(type="custom")}, "messages[1].tool_calls[0].type", "supported: function"),
        (
            {"messages": [*with_call(), {"role": "tool", "content": "x", "tool_call_id": "c2"}]},
            "messages[2].tool_call_id",
            "no message before",
        ),
        ({"messages": [*with_call(), {"role": "tool", "content": "x"}]}, "messages[2].tool_call_id", "missing"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls", "role assistant"),
        ({"messages": [{**USER, "tool_call_id": "c1"}]}, "messages[0].tool_call_id", "role tool"),
    ],
)
async def test_a_faulty_tool_call_or_result_is_a_400_with_its_path(
    bench: GatewayBench, fields: dict[str, object], param: str, expected: str
) -> None:
    response = await bench.post("/v1/chat/completions", {"messages": [USER], **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert expected in error["message"]
    assert not bench.dispatcher.requests


@pytest.mark.parametrize(
    ("template", "expected"), [("{{ messages }}", "no place for `tools`"), ("{{ tools }}", "--tool-call-parser")]
)
async def test_tools_are_refused_where_the_model_cannot_call_them(template: str, expected: str) -> None:
    made = gateway_bench(dispatcher=ScriptedDispatcher(byte_tokenizer(chat_template=template)))
    async with made.client:
        error = (await made.chat(tools=[TOOL])).json()["error"]
    assert error["param"] == "tools"
    assert expected in error["message"]


async def test_a_stop_string_may_spell_a_token_of_the_format(bench: GatewayBench) -> None:
    choice = (await bench.chat(tools=[WEATHER], stop=["</tool_call>\n<tool_call>"])).json()["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
    choice = (await bench.chat(tools=[WEATHER], stop=["<tool_call>!"])).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 2


def test_arguments_are_an_object_or_a_text_as_the_template_reads_them() -> None:
    source = "{{ a.x }} {{ a | tojson }} {{ 'b' + a }} {{ a ~ '' }} {{ a is string }} {{ a + 'c' }}"
    given = {"a": CallArguments({"x": "é"})}
    text = ChatTemplate(source, special_tokens={}).render([], options=given)
    shown = json.dumps({"x": "é"}, ensure_ascii=False)
    assert text == f"é {shown} b{shown} {shown} False {shown}c"


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        ("<tool_call> </tool_call>", "hermes"),
        ("<tool_call><function=x><parameter=y>", "qwen3_coder"),
        ("<tool_call></tool_call><arg_key><arg_value>", "glm45"),
        ("</tool_call><arg_value><tool_call>{function-name}<arg_key>", "glm47"),
        ('<|header_start|> <|python_start|> {"name": ', "llama4_json"),
        ('<|start_header_id|> {"name": ', "llama3_json"),
        ("<|python_start|>", "llama4_pythonic"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜><｜tool▁sep｜>```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜><｜tool▁sep｜>", "deepseek_v31"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("<|channel|> <|constrain|>", "openai"),
        ("{{ tools }}", None),
    ],
)
def test_the_template_shows_the_format_of_calls(marks: str, name: str | None) -> None:
    found = find_formats(marks).tools
    assert (found.name if found else None) == name


def test_an_unknown_parser_is_an_error_that_names_the_option() -> None:
    with pytest.raises(ConfigError, match="--tool-call-parser"):
        find_formats("", tool_parser="odd")
    with pytest.raises(ConfigError, match="--reasoning-parser"):
        find_formats("", reasoning_parser="odd")


def test_flags_of_vllm_choose_the_parsers() -> None:
    flags = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--enable-auto-tool-choice")
    read = settings.read("serve", flags, {})
    assert isinstance(read, settings.ServeSettings)
    text = read.gateway.text
    template, _ = find_chat_template(text, "{{ messages }}", {})
    assert template is not None
    assert template.formats == find_formats("", tool_parser="hermes", reasoning_parser="qwen3")
    with pytest.raises(ConfigError, match="known are auto, none, deepseek_v3"):
        find_chat_template(replace(text, tool_call_parser="odd"), None, {})
    off, _ = find_chat_template(replace(text, enable_auto_tool_choice=False), "{{ messages }}", {})
    assert off is not None
    assert off.formats.tools is None


async def test_special_tokens_of_the_format_are_shown_to_the_parser_only(bench: GatewayBench) -> None:
    formats = find_formats('[TOOL_CALLS] [THINK] [/THINK] <|start_header_id|> {"name":')
    assert formats.special_among(["[TOOL_CALLS]", "[ARGS]", "[/THINK]", "<|start_header_id|>", END]) == {
        "[TOOL_CALLS]",
        "[ARGS]",
        "[/THINK]",
    }
    content = (await bench.chat()).json()["choices"][0]["message"]["content"]
    assert "tool_call>" not in content  # as in any other answer, its special tokens are not shown
    assert (await bench.chat(tools=[WEATHER])).json()["choices"][0]["finish_reason"] == "tool_calls"


async def test_openais_client_adds_up_the_stream_and_sends_the_call_back(bench: GatewayBench) -> None:
    from openai import AsyncOpenAI  # half a second, which a collection saves

    http_client: Any = bench.client  # of another httpx than the library declares
    client = AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http_client)
    tools: Any = [WEATHER, TOOL]
    async with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "hi"}], tools=tools
    ) as s:
        message = (await s.get_final_completion()).choices[0].message
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["weather", "now"]
    messages: Any = [USER, message.to_dict()]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in message.tool_calls]
    again = await client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert again.choices[0].finish_reason == "tool_calls"

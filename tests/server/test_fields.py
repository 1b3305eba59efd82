"""Every known request field is honoured, advisory or refused, at every endpoint."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvist.api import messages, responses, schemas
from kvist.api.fields import Advisory, Honoured, KnownFields, Refused, classes_of
from kvist.testing.gateway_bench import GatewayBench

USER = {"role": "user", "content": "hi"}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2}},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [65]},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"input": "a"},
}
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/completions": schemas.CompletionRequest,
    "/generate": schemas.NativeRequest,
    "/tokenize": schemas.TokenizeRequest,
    "/detokenize": schemas.DetokenizeRequest,
    "/v1/messages": messages.MessagesRequest,
    "/v1/messages/count_tokens": messages.MessagesRequest,
    "/v1/responses": responses.ResponsesRequest,
    "/v1/responses/input_tokens": responses.ResponsesRequest,
}
INSIDE: list[type[msgspec.Struct]] = [
    schemas.StreamOptions,
    schemas.KvistOptions,
    schemas.ChatMessage,
    schemas.ContentPart,
    schemas.NativeSampling,
    schemas.Tool,
    schemas.ToolFunction,
    schemas.ToolCall,
    schemas.CalledFunction,
    messages.ResultPart,
    messages.MessageBlock,
    messages.InputMessage,
    messages.MessagesTool,
    messages.MessagesToolChoice,
    messages.Thinking,
    messages.OutputFormat,
    messages.OutputConfig,
    responses.InputItem,
    responses.InputPart,
    responses.ResponsesTool,
    responses.TextOptions,
    responses.TextFormat,
    responses.ReasoningOptions,
    responses.ResponseStreamOptions,
]


def ignored(response: Any) -> set[str]:
    named: str = response.headers.get("x-kvist-ignored", "")
    return set(named.split(", ")) - {""}


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_null_is_accepted_for_every_known_field_at_every_endpoint(bench: GatewayBench, path: str) -> None:
    nulls = {name: None for struct in STRUCTS.values() for name in classes_of(struct) if name not in ENDPOINTS[path]}
    assert len(nulls) > 150
    response = await bench.post(path, nulls | ENDPOINTS[path])
    assert response.status_code == 200, response.text
    assert ignored(response) == set()


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_neutral_values_are_accepted_at_every_endpoint(bench: GatewayBench, path: str) -> None:
    for name, cls in classes_of(KnownFields).items():
        if name in ENDPOINTS[path] or isinstance(cls, Honoured):
            continue
        for value in cls.neutral:
            if not isinstance(classes_of(STRUCTS[path])[name], Honoured):
                response = await bench.post(path, {**ENDPOINTS[path], name: value})
                assert response.status_code == 200, (name, value, response.text)
                assert ignored(response) == set()


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_refusals_name_an_alternative_and_the_header_names_ignored_fields(bench: GatewayBench, path: str) -> None:
    for name, cls in classes_of(STRUCTS[path]).items():
        response = await bench.post(path, {**ENDPOINTS[path], name: {"odd": 1}})
        if isinstance(cls, Refused):
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, name)
            assert cls.instead in error["message"]
        elif isinstance(cls, Advisory):
            assert response.status_code == 200, response.text
            assert ignored(response) == {name}


async def test_null_inside_an_object_equals_absent(bench: GatewayBench) -> None:
    for value in ({"type": "text", "json_schema": None}, {"type": "text"}):
        assert (await bench.chat(response_format=value)).status_code == 200
    assert (await bench.chat(structured_outputs={"json": None, "regex": None})).status_code == 200
    assert (await bench.chat(structured_outputs={"json": "{", "regex": None})).status_code == 400


def test_every_field_of_openais_library_is_known() -> None:
    from openai.types import chat  # half a second, which a collection saves
    from openai.types import completion_create_params as completion_params
    from openai.types.responses import response_create_params as responses_params

    params = [chat.completion_create_params.CompletionCreateParamsBase, completion_params.CompletionCreateParamsBase]
    params.append(responses_params.ResponseCreateParamsBase)
    assert {name for kind in params for name in kind.__annotations__} <= set(KnownFields.__struct_fields__)
    assert set(chat.ChatCompletionAssistantMessageParam.__annotations__) <= set(schemas.ChatMessage.__struct_fields__)
    assert set(chat.ChatCompletionContentPartTextParam.__annotations__) <= set(schemas.ContentPart.__struct_fields__)
    assert set(chat.ChatCompletionStreamOptionsParam.__annotations__) <= set(schemas.StreamOptions.__struct_fields__)


def test_every_field_has_a_class() -> None:
    for struct in [*STRUCTS.values(), *INSIDE]:
        assert set(classes_of(struct)) == set(struct.__struct_fields__), struct

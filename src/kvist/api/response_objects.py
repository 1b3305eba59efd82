"""The objects that OpenAI's Responses API returns: the response with its items, the events of a stream, lists."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvist.api.responses import InputItem, ReasoningOptions, ResponsesTool, TextOptions

Json = object  # any value; the name `object` is a field below
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(msgspec.Struct, tag="output_text"):
    text: str
    annotations: list[Json] = []
    logprobs: list[Json] = []


class OutputMessage(msgspec.Struct, tag="message", kw_only=True):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningText(msgspec.Struct, tag="reasoning_text"):
    text: str


class ReasoningItem(msgspec.Struct, tag="reasoning", kw_only=True):
    id: str
    status: ItemStatus
    summary: list[Json] = []
    content: list[ReasoningText]
    encrypted_content: None = None


class FunctionCall(msgspec.Struct, tag="function_call", kw_only=True):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | ReasoningItem | FunctionCall


class CachedTokens(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0  # every prefix is cached, at no price


class ReasoningTokens(msgspec.Struct):
    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseProblem(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: bool
    error: ResponseProblem | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | int | None
    reasoning: ReasoningOptions
    safety_identifier: None = None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: Json
    tools: list[ResponsesTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: None = None


class DeletedResponse(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(msgspec.Struct):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


# ---------------------------------------------------------------- events of a stream


class Numbered(msgspec.Struct, kw_only=True):
    sequence_number: int


class ResponseCreated(Numbered, tag="response.created", kw_only=True):
    response: ResponseObject


class ResponseInProgress(Numbered, tag="response.in_progress", kw_only=True):
    response: ResponseObject


class ResponseCompleted(Numbered, tag="response.completed", kw_only=True):
    response: ResponseObject


class ResponseIncomplete(Numbered, tag="response.incomplete", kw_only=True):
    response: ResponseObject


class ResponseFailed(Numbered, tag="response.failed", kw_only=True):
    response: ResponseObject


class OutputItemAdded(Numbered, tag="response.output_item.added", kw_only=True):
    output_index: int
    item: OutputItem


class OutputItemDone(Numbered, tag="response.output_item.done", kw_only=True):
    output_index: int
    item: OutputItem


class InItem(Numbered, kw_only=True):
    item_id: str
    output_index: int


class InPart(InItem, kw_only=True):
    content_index: int = 0


class ContentPartAdded(InPart, tag="response.content_part.added", kw_only=True):
    part: OutputText | ReasoningText


class ContentPartDone(InPart, tag="response.content_part.done", kw_only=True):
    part: OutputText | ReasoningText


class OutputTextDelta(InPart, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[Json] = []


class OutputTextDone(InPart, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[Json] = []


class ReasoningTextDelta(InPart, tag="response.reasoning_text.delta", kw_only=True):
    delta: str


class ReasoningTextDone(InPart, tag="response.reasoning_text.done", kw_only=True):
    text: str


class ArgumentsDelta(InItem, tag="response.function_call_arguments.delta", kw_only=True):
    delta: str


class ArgumentsDone(InItem, tag="response.function_call_arguments.done", kw_only=True):
    name: str
    arguments: str


ResponseEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | OutputItemAdded
    | OutputItemDone
    | ContentPartAdded
    | ContentPartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
)

"""The responses of /v1/chat/completions and /v1/completions, for /openapi.json and for tests. server/ writes the same
fields faster than from these structs."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Json = object  # any value; the name `object` is a field below


class FunctionDelta(msgspec.Struct, kw_only=True):
    """In a stream, the first part of a call has the name; further parts add to the arguments."""

    name: str | UnsetType = UNSET
    arguments: str


class CallObject(msgspec.Struct, kw_only=True):
    index: int | UnsetType = UNSET  # in streams only
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class MessageObject(msgspec.Struct, kw_only=True):
    """The message of a chat, or what an event of a stream adds to it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallObject] | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class _Choice(msgspec.Struct, kw_only=True):
    index: int
    logprobs: dict[str, Json] | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | UnsetType | None = UNSET
    matched_stop: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChoice(_Choice, kw_only=True):
    message: MessageObject


class ChunkChoice(_Choice, kw_only=True):
    delta: MessageObject


class CompletionChoice(_Choice, kw_only=True):
    text: str
    prompt_logprobs: list[Json] | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    kvist: dict[str, Json] | UnsetType = UNSET


class _Body(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    kvist: dict[str, Json] | UnsetType = UNSET


class ChatCompletion(_Body, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[Json] | UnsetType = UNSET


class ChatChunk(_Body, kw_only=True):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Completion(_Body, kw_only=True):
    """A whole response, or an event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ErrorDetails(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    error: ErrorDetails

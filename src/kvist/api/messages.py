"""Anthropic's Messages API: the request of /v1/messages and of /v1/messages/count_tokens, its answers and its events.

Requests are strict, as in schemas.py. Answers and events are written from the structs of this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kvist.api.fields import Advisory, Honoured, Refused
from kvist.api.schemas import Priority, Randomness, Salt, Session, Strict, TemplateOptions

_CACHED = Advisory("prefixes are always cached")
_NO_MEDIA = Refused("only text is supported")
_NO_SERVER_TOOLS = Refused("no tools run in the server")


class ResultPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of `system`, or of a tool's result."""

    type: Annotated[str, Honoured('"text"')]
    text: Annotated[str | None, Honoured("several parts are joined with newlines")] = None
    cache_control: Annotated[object, _CACHED] = None
    citations: Annotated[object, Advisory("only the text is used", ([],))] = None
    source: Annotated[object, _NO_MEDIA] = None


class MessageBlock(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A block of a message. Its type decides which of the fields it has."""

    type: Annotated[str, Honoured('"text", "thinking", "redacted_thinking", "tool_use" or "tool_result"')]
    text: Annotated[str | None, Honoured("several texts are joined with newlines")] = None
    thinking: Annotated[str | None, Honoured("passed to the chat template as the reasoning of the message")] = None
    id: Annotated[str | None, Honoured("of tool_use: names the call for its result")] = None
    name: Annotated[str | None, Honoured("of tool_use: the function, passed to the chat template")] = None
    input: Annotated[dict[str, object] | None, Honoured("of tool_use: passed to the chat template")] = None
    tool_use_id: Annotated[str | None, Honoured("of tool_result: the call that has this result")] = None
    content: Annotated[str | list[ResultPart] | None, Honoured("of tool_result: text, or a list of text parts")] = None
    is_error: Annotated[object, Advisory("the text of the result says it", (False,))] = None
    signature: Annotated[object, Advisory("signatures are not checked")] = None
    data: Annotated[object, Advisory("the model cannot read it")] = None
    cache_control: Annotated[object, _CACHED] = None
    citations: Annotated[object, Advisory("only the text is used", ([],))] = None
    caller: Annotated[object, Advisory("calls come from the model", ({"type": "direct"},))] = None
    source: Annotated[object, _NO_MEDIA] = None
    toolset_name: Annotated[object, _NO_SERVER_TOOLS] = None


class InputMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: Annotated[str, Honoured("user, assistant or system")]
    content: Annotated[str | list[MessageBlock], Honoured("text, or a list of blocks; see `messages[].content[].*`")]


class MessagesTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, Honoured("names the function; no two tools have one name")]
    type: Annotated[str | None, Honoured('"custom": the client runs the tool')] = None
    description: Annotated[str | None, Honoured("passed to the chat template")] = None
    input_schema: Annotated[
        dict[str, object] | None, Honoured("JSON Schema, passed to the chat template; gives arguments their types")
    ] = None
    strict: Strict = None
    cache_control: Annotated[object, _CACHED] = None
    eager_input_streaming: Annotated[object, Advisory("arguments are always streamed", (True, False))] = None
    input_examples: Annotated[object, Advisory("examples are not shown to the model", ([],))] = None
    defer_loading: Annotated[object, Refused("no tools run in the server", (False,))] = None
    allowed_callers: Annotated[object, Refused("no tools run in the server", (["direct"], []))] = None


class MessagesToolChoice(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[str, Honoured('"auto", "any", "tool" or "none", as `tool_choice` of chats')]
    name: Annotated[str | None, Honoured("of the type tool: the function")] = None
    disable_parallel_tool_use: Annotated[bool | None, Honoured("true: an answer has one call at most")] = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[
        str,
        Honoured('"enabled", "adaptive" or "disabled": sets `enable_thinking` for a chat template that reads it'),
    ]
    display: Annotated[str | None, Honoured('"summarized", or "omitted": the response lacks the reasoning')] = None
    budget_tokens: Annotated[
        int | None, Honoured("most tokens of the reasoning, of a model whose reasoning is recognised")
    ] = None


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[str, Honoured('"json_schema"')]
    schema: Annotated[object, Honoured("the JSON schema that the answer satisfies")]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    format: Annotated[OutputFormat | None, Honoured("see `output_config.format.*`")] = None
    effort: Annotated[str | None, Honoured("the same as `reasoning_effort` of chats")] = None
    task_budget: Annotated[object, Advisory("`max_tokens` bounds the answer")] = None


class MessagesRequest(Randomness, forbid_unknown_fields=True, kw_only=True):
    """`count_tokens` takes the same request, and uses what is part of the prompt."""

    messages: Annotated[
        Annotated[list[InputMessage], msgspec.Meta(max_length=4096)],
        Honoured("see `messages[].*`; the answer continues a last message with the role assistant"),
    ]
    system: Annotated[str | list[ResultPart] | None, Honoured("text, or a list of text parts")] = None
    max_tokens: Annotated[
        int | None, Honoured("maximum number of tokens of the answer; the context may end the answer before")
    ] = None
    stop_sequences: Annotated[list[str] | None, Honoured("up to 16 strings")] = None
    stream: Annotated[bool | None, Honoured("server-sent events, in the form of the API")] = None
    seed: Annotated[int | None, Honoured("the same seed gives the same answer; -1 or absent: drawn at random")] = None
    tools: Annotated[
        Annotated[list[MessagesTool], msgspec.Meta(max_length=1024)] | None,
        Honoured("tools that the client runs, up to 1024; see `tools[].*` and [tools](tools.md)"),
    ] = None
    tool_choice: Annotated[MessagesToolChoice | None, Honoured("see `tool_choice.*`")] = None
    thinking: Annotated[Thinking | None, Honoured("see `thinking.*`")] = None
    output_config: Annotated[OutputConfig | None, Honoured("see `output_config.*`")] = None
    chat_template_kwargs: TemplateOptions = None
    cache_salt: Salt = None
    session_id: Session = None
    prompt_cache_key: Session = None
    priority: Priority = None


# ---------------------------------------------------------------- answers


class TextBlock(msgspec.Struct, tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(msgspec.Struct, tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: dict[str, object]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesUsage(msgspec.Struct, kw_only=True):
    """The three counts of input tokens add up to the tokens of the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


# ---------------------------------------------------------------- events of a stream


class MessageStart(msgspec.Struct, tag="message_start"):
    message: Message


class Ping(msgspec.Struct, tag="ping"):
    pass


class ContentBlockStart(msgspec.Struct, tag="content_block_start"):
    index: int
    content_block: AnswerBlock


class TextDelta(msgspec.Struct, tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, tag="signature_delta"):
    signature: str


class InputJsonDelta(msgspec.Struct, tag="input_json_delta"):
    partial_json: str


class ContentBlockDelta(msgspec.Struct, tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(msgspec.Struct, tag="content_block_stop"):
    index: int


class MessageEnding(msgspec.Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag="message_delta"):
    delta: MessageEnding
    usage: MessagesUsage


class MessageStop(msgspec.Struct, tag="message_stop"):
    pass


class MessagesError(msgspec.Struct, kw_only=True):
    type: str
    message: str
    param: str | None
    code: str


class MessagesErrorBody(msgspec.Struct, tag="error", omit_defaults=True):
    """The body of an error, and the event that ends a stream after an error."""

    error: MessagesError
    request_id: str | None = None


MessagesEvent = (
    MessageStart
    | Ping
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | MessagesErrorBody
)

"""OpenAI's Responses API: the request of /v1/responses, and the items of a conversation.

Requests are strict, as in schemas.py. The objects that are returned are in response_objects.py.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvist.api.fields import Advisory, Honoured, Refused
from kvist.api.schemas import Priority, Randomness, Salt, Session, Strict, TemplateOptions

_NO_MEDIA = Refused("only text is supported")
_NO_SERVER_TOOLS = Refused("no tools run in the server; the client runs functions")
MAX_ITEMS = 4096  # of one conversation, with the items of previous responses


class InputPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    type: Annotated[str, Honoured('"input_text", "output_text" or "text"; in items of reasoning "reasoning_text"')]
    text: Annotated[str | None, Honoured("several parts are joined with newlines")] = None
    annotations: Annotated[object, Advisory("only the text is used", ([],))] = None
    logprobs: Annotated[object, Advisory("only the text is used", ([],))] = None
    prompt_cache_breakpoint: Annotated[object, Advisory("prefixes are always cached")] = None
    parsed: Annotated[object, Advisory("OpenAI's client adds this; `text` is used")] = None
    refusal: Annotated[object, Refused("write it as text")] = None
    image_url: Annotated[object, _NO_MEDIA] = None
    detail: Annotated[object, _NO_MEDIA] = None
    file_id: Annotated[object, _NO_MEDIA] = None
    file_data: Annotated[object, _NO_MEDIA] = None
    file_url: Annotated[object, _NO_MEDIA] = None
    filename: Annotated[object, _NO_MEDIA] = None


class InputItem(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An item of a conversation. Its type decides which of the fields it has."""

    type: Annotated[str | None, Honoured('"message", "function_call", "function_call_output" or "reasoning"')] = None
    role: Annotated[str | None, Honoured("of a message: system, developer (as system), user or assistant")] = None
    content: Annotated[
        str | list[InputPart] | None, Honoured("of a message: text, or a list of text parts; of reasoning: its text")
    ] = None
    call_id: Annotated[str | None, Honoured("names a call, and the result of that call")] = None
    name: Annotated[str | None, Honoured("of function_call: the function")] = None
    arguments: Annotated[str | None, Honoured("of function_call: a JSON object, written as a text")] = None
    output: Annotated[
        str | list[InputPart] | None, Honoured("of function_call_output: text, or a list of text parts")
    ] = None
    id: Annotated[str | None, Honoured("names the item in the list of a response's items")] = None
    status: Annotated[object, Advisory("items are used as they are", ("completed", "incomplete", "in_progress"))] = None
    phase: Annotated[object, Advisory("no model served here has phases")] = None
    summary: Annotated[object, Advisory("the text of reasoning is its `content`", ([],))] = None
    encrypted_content: Annotated[object, Advisory("the text of reasoning is its `content`", ("",))] = None
    caller: Annotated[object, Advisory("calls come from the model", ({"type": "direct"},))] = None
    parsed_arguments: Annotated[object, Advisory("OpenAI's client adds this; `arguments` is used")] = None
    namespace: Annotated[object, _NO_SERVER_TOOLS] = None


class ResponsesTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    type: Annotated[str, Honoured('"function"')]
    name: Annotated[str | None, Honoured("names the function; no two tools have one name")] = None
    description: Annotated[str | None, Honoured("passed to the chat template")] = None
    parameters: Annotated[
        dict[str, object] | None, Honoured("JSON Schema, passed to the chat template; gives arguments their types")
    ] = None
    strict: Strict = None
    function: Annotated[object, Refused("a field of chats; tools have `name` and `parameters`")] = None
    output_schema: Annotated[object, Advisory("results are not shown to the model by schema")] = None
    defer_loading: Annotated[object, Refused("no tools run in the server", (False,))] = None
    allowed_callers: Annotated[object, Refused("no tools run in the server", (["direct"], []))] = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    type: Annotated[str, Honoured('"text", "json_object" or "json_schema"')]
    name: Annotated[str | None, Advisory("the name is not shown to the model")] = None
    description: Annotated[str | None, Advisory("the description is not shown to the model")] = None
    schema: Annotated[object, Honoured("the JSON schema that the answer satisfies")] = None
    strict: Annotated[
        bool | None,
        Honoured("true: a schema that cannot be enforced completely is refused; else such parts are ignored"),
    ] = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    format: Annotated[TextFormat | None, Honoured("see `text.format.*`")] = None
    verbosity: Annotated[object, Advisory("no model served here has this setting", ("medium",))] = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    effort: Annotated[str | None, Honoured("the same as `reasoning_effort` of chats")] = None
    summary: Annotated[object, Advisory("the reasoning itself is returned", ("auto",))] = None
    generate_summary: Annotated[object, Advisory("the reasoning itself is returned", ("auto",))] = None
    context: Annotated[object, Advisory("the chat template decides which reasoning it shows", ("auto",))] = None
    mode: Annotated[object, Advisory("there is one mode", ("standard",))] = None


class ResponseStreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_obfuscation: Annotated[object, Advisory("events are not padded", (False,))] = None


class ResponsesRequest(Randomness, forbid_unknown_fields=True, kw_only=True):
    input: Annotated[str | list[InputItem] | None, Honoured("text, or a list of items; see `input[].*`")] = None
    instructions: Annotated[
        str | None, Honoured("the first message, with the role system; `previous_response_id` does not repeat it")
    ] = None
    previous_response_id: Annotated[
        str | None, Honoured("the conversation so far: input and output of this stored response come before `input`")
    ] = None
    store: Annotated[bool | None, Honoured("default true: kept in the gateway's memory, for the next request")] = None
    background: Annotated[bool | None, Honoured("true: answered at once, and generated meanwhile")] = None
    stream: Annotated[bool | None, Honoured("server-sent events, in the form of the API")] = None
    stream_options: Annotated[ResponseStreamOptions | None, Honoured("see `stream_options.*`")] = None
    max_output_tokens: Annotated[
        int | None, Honoured("maximum number of tokens of the answer; the context may end the answer before")
    ] = None
    seed: Annotated[int | None, Honoured("the same seed gives the same answer; -1 or absent: drawn at random")] = None
    tools: Annotated[
        Annotated[list[ResponsesTool], msgspec.Meta(max_length=1024)] | None,
        Honoured("functions that the answer may call, up to 1024; see `tools[].*` and [tools](tools.md)"),
    ] = None
    tool_choice: Annotated[object, Honoured("as in chats; a function is named as {type, name}")] = None
    parallel_tool_calls: Annotated[bool | None, Honoured("false: an answer has one call at most")] = None
    reasoning: Annotated[ReasoningOptions | None, Honoured("see `reasoning.*`")] = None
    text: Annotated[TextOptions | None, Honoured("see `text.*`")] = None
    include: Annotated[
        list[str] | None, Honoured('"message.output_text.logprobs"; "reasoning.encrypted_content" adds nothing')
    ] = None
    top_logprobs: Annotated[int | None, Honoured("0 to 20 of the likeliest tokens beside each")] = None
    truncation: Annotated[
        object, Advisory("a conversation over the context is a 400: nothing is left out", ("disabled",))
    ] = None
    metadata: Annotated[dict[str, str] | None, Honoured("up to 16 texts, returned with the response")] = None
    chat_template_kwargs: TemplateOptions = None
    cache_salt: Salt = None
    session_id: Session = None
    prompt_cache_key: Session = None
    priority: Priority = None

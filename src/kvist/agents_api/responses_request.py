"""Converts a request of OpenAI's Responses API, with the conversation before it, into a chat. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.agents_api.paths import RequestPaths
from kvist.api.responses import MAX_ITEMS, InputItem, InputPart, ResponsesRequest, ResponsesTool, TextFormat
from kvist.api.schemas import (
    CalledFunction,
    ChatMessage,
    ChatRequest,
    JsonSchemaFormat,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolFunction,
)
from kvist.checking.kinds import check_kind
from kvist.errors import RequestError, UnsupportedField

LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")  # encrypted_content: reasoning is sent as it is
_MAX_METADATA, _MAX_METADATA_CHARS = 16, 512
_FIXED_PATHS = {
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.type": "text.format.type",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
    "messages": "input",
}
_ROLES = ("system", "developer", "user", "assistant")
_TYPES = ("message", "function_call", "function_call_output", "reasoning")
_FIELDS = {  # by type of item
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("content",),
}
_FORMATS = {"text": (), "json_object": (), "json_schema": ("schema", "strict")}
_TEXTS = ("input_text", "output_text", "text")


def check_request(request: ResponsesRequest) -> None:
    """Raise `RequestError` for fields that contradict each other, or have values that are not supported."""
    for value in request.include or ():
        check_includable(value)
    if request.background and request.stream:
        raise UnsupportedField(
            "`background` and `stream` together are not supported: poll GET /v1/responses/{id} without `stream`, or "
            "stream without `background`",
            param="background",
        )
    if request.background and request.store is False:
        raise RequestError("`background` needs `store`: the answer would be lost", param="store")
    metadata = request.metadata or {}
    longest = max((len(text) for pair in metadata.items() for text in pair), default=0)
    if len(metadata) > _MAX_METADATA or longest > _MAX_METADATA_CHARS:
        rule = f"at most {_MAX_METADATA} texts of {_MAX_METADATA_CHARS} characters"
        raise RequestError(f"`metadata` may have {rule}", param="metadata")
    if request.input is None:
        raise RequestError("`input` is missing", param="input")


def check_includable(value: str) -> None:
    """Raise `UnsupportedField` for a value of `include` that names nothing here."""
    if value not in _INCLUDABLE:
        raise UnsupportedField(f"`include` has {value[:64]!r}; supported: {', '.join(_INCLUDABLE)}", param="include")


def items_of(request: ResponsesRequest) -> list[InputItem]:
    """Return the items of `input`; a text is the message of a user."""
    if isinstance(request.input, str):
        return [InputItem(type="message", role="user", content=[InputPart(type="input_text", text=request.input)])]
    return list(request.input or ())


def chat_of_responses(
    request: ResponsesRequest, earlier: Sequence[InputItem], items: Sequence[InputItem]
) -> tuple[ChatRequest, RequestPaths]:
    """Return the chat of the `earlier` items and of the request's own `items`, and the names of its fields in the
    request. Raises `RequestError` with the path of the fault."""
    paths = RequestPaths(_FIXED_PATHS)
    if len(earlier) + len(items) > MAX_ITEMS:
        raise RequestError(f"the conversation has over {MAX_ITEMS} items, which is the limit", param="input")
    chat = _Chat(paths)
    if request.instructions is not None:
        chat.add(ChatMessage(role="system", content=request.instructions), "instructions")
    for item in earlier:
        chat.take(item, "previous_response_id")
    for index, item in enumerate(items):
        chat.take(item, f"input[{index}]")
    has_logprobs = LOGPROBS in (request.include or ())
    if request.top_logprobs and not has_logprobs:
        raise RequestError(f"`top_logprobs` needs `include` to have {LOGPROBS}", param="top_logprobs")
    reasoning, text = request.reasoning, request.text
    return ChatRequest(
        model=request.model,
        messages=chat.messages(),
        tools=[_tool(tool, f"tools[{index}]", paths) for index, tool in enumerate(request.tools or ())] or None,
        tool_choice=_tool_choice(request.tool_choice, paths),
        parallel_tool_calls=request.parallel_tool_calls,
        max_tokens=request.max_output_tokens,
        stream=request.stream,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        logprobs=has_logprobs,
        top_logprobs=request.top_logprobs,
        response_format=None if text is None or text.format is None else _response_format(text.format),
        reasoning_effort=None if reasoning is None else reasoning.effort,
        chat_template_kwargs=request.chat_template_kwargs,
        cache_salt=request.cache_salt,
        session_id=request.session_id,
        prompt_cache_key=request.prompt_cache_key,
        priority=request.priority,
    ), paths


class _Chat:
    """Groups items into messages: reasoning, text and calls that follow one another are one message of the
    assistant."""

    def __init__(self, paths: RequestPaths) -> None:
        self._messages: list[ChatMessage] = []
        self._paths = paths
        self._answer: ChatMessage | None = None  # the message of the assistant that further items belong to

    def messages(self) -> list[ChatMessage]:
        return self._messages

    def add(self, message: ChatMessage, where: str) -> None:
        name = f"messages[{len(self._messages)}]"
        self._paths.add(name, where)
        self._paths.add(f"{name}.tool_call_id", f"{where}.call_id")
        self._messages.append(message)
        self._answer = message if message.role == "assistant" else None

    def take(self, item: InputItem, where: str) -> None:
        kind = item.type or "message"
        check_kind(item, kind, _FIELDS, where)
        if kind == "message":
            self._take_message(item, where)
        elif kind == "reasoning":
            text = "" if item.content is None else _text_of(item.content, f"{where}.content", ("reasoning_text",))
            if text:
                self._continue(ChatMessage(role="assistant", reasoning=text), where)
        elif kind == "function_call":
            self._take_call(item, where)
        elif kind == "function_call_output":
            call_id = _required(item.call_id, f"{where}.call_id")
            output = "" if item.output is None else _text_of(item.output, f"{where}.output", _TEXTS)
            self.add(ChatMessage(role="tool", tool_call_id=call_id, content=output), where)
        elif kind == "item_reference":
            problem = f"`{where}` is a reference to an item: send the item itself, or `previous_response_id`"
            raise UnsupportedField(problem, param=where)
        else:
            known = ", ".join(_TYPES)
            raise UnsupportedField(f"`{where}.type` is {kind[:64]!r}; supported: {known}", param=f"{where}.type")

    def _take_message(self, item: InputItem, where: str) -> None:
        role = _required(item.role, f"{where}.role")
        if role not in _ROLES:
            known = ", ".join(_ROLES)
            raise UnsupportedField(f"`{where}.role` is {role[:64]!r}; supported: {known}", param=f"{where}.role")
        if item.content is None:
            raise RequestError(f"`{where}.content` is missing", param=f"{where}.content")
        message = ChatMessage(role=role, content=_text_of(item.content, f"{where}.content", _TEXTS))
        if role == "assistant":
            self._continue(message, where)
        else:
            self.add(message, where)

    def _take_call(self, item: InputItem, where: str) -> None:
        arguments = _required(item.arguments, f"{where}.arguments")
        function = CalledFunction(name=_required(item.name, f"{where}.name"), arguments=arguments)
        call = ToolCall(id=_required(item.call_id, f"{where}.call_id"), function=function)
        if self._answer is None:
            self.add(ChatMessage(role="assistant", tool_calls=[call]), where)
        else:
            self._answer.tool_calls = [*(self._answer.tool_calls or ()), call]
        assert self._answer is not None
        assert self._answer.tool_calls
        name = f"messages[{len(self._messages) - 1}].tool_calls[{len(self._answer.tool_calls) - 1}]"
        self._paths.add(f"{name}.id", f"{where}.call_id")
        self._paths.add(f"{name}.function", where)

    def _continue(self, message: ChatMessage, where: str) -> None:
        """Add reasoning or text to the open message of the assistant, if it has neither calls nor a text yet."""
        answer = self._answer
        if answer is None or answer.tool_calls or answer.content is not None:
            self.add(message, where)
        elif message.content is not None:
            answer.content = message.content
        else:
            answer.reasoning = f"{answer.reasoning}\n{message.reasoning}"


def _text_of(content: str | Sequence[InputPart], where: str, types: Sequence[str]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        path = f"{where}[{index}]"
        if part.type not in types:
            problem = f"`{path}.type` is {part.type[:64]!r}; supported: {', '.join(types)}"
            raise UnsupportedField(problem, param=f"{path}.type")
        texts.append(_required(part.text, f"{path}.text"))
    return "\n".join(texts)


def _required(value: str | None, param: str) -> str:
    if value is None:
        raise RequestError(f"`{param}` is missing", param=param)
    return value


def _tool(tool: ResponsesTool, where: str, paths: RequestPaths) -> Tool:
    if tool.type != "function":
        raise UnsupportedField(
            f"`{where}.type` is {tool.type[:64]!r}: no tools run in the server; supported: function",
            param=f"{where}.type",
        )
    paths.add(f"{where}.function", where)
    name = _required(tool.name, f"{where}.name")
    function = ToolFunction(name=name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _tool_choice(given: object, paths: RequestPaths) -> object:
    """Return `tool_choice` in the form of chats, which has the other fields one level deeper."""
    if not isinstance(given, dict) or given.get("type") != "allowed_tools":
        return _named_tool(given)
    allowed = {name: value for name, value in given.items() if name != "type"}
    if isinstance(tools := given.get("tools"), list):
        allowed["tools"] = [_named_tool(tool) for tool in tools]
        for index in range(len(tools)):
            paths.add(f"tool_choice.allowed_tools.tools[{index}].function", f"tool_choice.tools[{index}]")
    return {"type": "allowed_tools", "allowed_tools": allowed}


def _named_tool(given: object) -> object:
    if not isinstance(given, dict) or given.get("type") != "function":
        return given
    return {"type": "function", "function": {name: value for name, value in given.items() if name != "type"}}


def _response_format(given: TextFormat) -> ResponseFormat:
    if given.type not in _FORMATS:
        param = "text.format.type"
        problem = f"`{param}` is {given.type[:64]!r}; supported: {', '.join(_FORMATS)}"
        raise UnsupportedField(problem, param=param)
    check_kind(given, given.type, _FORMATS, "text.format")
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    if given.schema is None:
        raise RequestError("`text.format.schema` is missing", param="text.format.schema")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=given.schema, strict=given.strict))

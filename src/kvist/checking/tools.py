"""Checks the tools of a request and the calls in its history, and gives both to the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from kvist.api.schemas import ChatMessage, ChatRequest, PromptRequest, TokenizeRequest, Tool, ToolCall
from kvist.checking.chat_constraint import WantedCalls
from kvist.checking.tool_choice import ToolChoice, read_tool_choice
from kvist.errors import RequestError, UnsupportedField
from kvist.text import Tokenizer
from kvist.text.chat import CallArguments
from kvist.tools import ToolFormat, is_name
from kvist.tools.constrained import CallableTool

Protect = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The tools that the answer may call. All are empty when it may call none."""

    for_template: Sequence[Mapping[str, object]] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)  # JSON Schemas, by name of the function
    wanted: WantedCalls | None = None


def offered_tools(request: ChatRequest | TokenizeRequest | PromptRequest, tokenizer: Tokenizer) -> OfferedTools:
    """Raises `RequestError` for a faulty tool or choice, and for a model whose calls cannot be recognised."""
    tools = request.tools or []
    parameters: dict[str, object] = {}
    for index, tool in enumerate(tools):
        _check(tool, f"tools[{index}]", parameters)
    choice = read_tool_choice(request.tool_choice, parameters)
    if choice.mode == "none" or not tools:
        return OfferedTools()
    template = tokenizer.chat_template
    if template is None or "tools" not in template.source:
        raise UnsupportedField(
            "the chat template of this model has no place for `tools`: describe the tools in the messages, or start "
            "the server with another --chat-template",
            param="tools",
        )
    if template.formats.tools is None:
        raise UnsupportedField(
            "the format in which this model writes tool calls is unknown: start the server with --tool-call-parser",
            param="tools",
        )
    shown = [_protected(_plain(tool), tokenizer.protect, "tools") for tool in tools]
    parallel = not isinstance(request, ChatRequest) or request.parallel_tool_calls is not False
    wanted = _wanted(tools, choice, template.formats.tools, parallel=parallel)
    return OfferedTools([one for one in shown if isinstance(one, dict)], parameters, wanted)


def _wanted(tools: Sequence[Tool], choice: ToolChoice, form: ToolFormat, *, parallel: bool) -> WantedCalls:
    functions = [(f"tools[{index}].function.parameters", tool.function) for index, tool in enumerate(tools)]
    callable_tools = [
        CallableTool(
            name=function.name, parameters=function.parameters or {}, strict=bool(function.strict), param=where
        )
        for where, function in functions
        if function is not None and (choice.names is None or function.name in choice.names)
    ]
    required = choice.mode == "required"
    is_strict = any(tool.strict for tool in callable_tools)
    return WantedCalls(
        form=form,
        tools=callable_tools,
        required=required,
        parallel=parallel,
        is_free=not required and parallel and not is_strict and choice.names is None,
    )


def _check(tool: Tool, where: str, parameters: dict[str, object]) -> None:
    if tool.type != "function":
        raise UnsupportedField(f"`{where}.type` is {tool.type!r}; supported: function", param=f"{where}.type")
    if tool.function is None:
        raise RequestError(f"`{where}.function` is missing", param=f"{where}.function")
    name, param = tool.function.name, f"{where}.function.name"
    if not is_name(name):
        rule = "must be 1 to 256 letters, digits, and any of _ - . : /"
        raise RequestError(f"`{param}` {rule}, not {name[:64]!r}", param=param)
    if name in parameters:
        raise RequestError(f"`{param}` is {name!r}, which another tool has too", param=param)
    kind, param = (tool.function.parameters or {}).get("type", "object"), f"{where}.function.parameters.type"
    if kind != "object":
        raise RequestError(f"`{param}` is {str(kind)[:64]!r}: arguments are an object", param=param)
    parameters[name] = tool.function.parameters or {}


def _plain(tool: Tool) -> dict[str, object]:
    assert tool.function is not None
    function: dict[str, object] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


class CallHistory:
    """The calls of the messages so far: a result belongs to one of them. Owned by the rendering of one chat."""

    def __init__(self, protect: Protect) -> None:
        self._protect = protect
        self._names: dict[str, str] = {}  # call id → name of the function

    def fields_of(self, message: ChatMessage, where: str) -> dict[str, object]:
        """Return what the template reads of calls and results in this message. Raises `RequestError`."""
        if message.role == "tool":
            return self._result(message, f"{where}.tool_call_id")
        if message.tool_call_id:
            param = f"{where}.tool_call_id"
            raise RequestError(f"`{param}` is a field of messages with the role tool", param=param)
        if not message.tool_calls:
            return {}
        if message.role != "assistant":
            param = f"{where}.tool_calls"
            raise RequestError(f"`{param}` is a field of messages with the role assistant", param=param)
        ids = [call.id for call in message.tool_calls]
        for index, call_id in enumerate(ids):
            if call_id in ids[:index]:
                param = f"{where}.tool_calls[{index}].id"
                raise RequestError(f"`{param}` is {call_id!r}, which another call of the message has too", param=param)
        calls = enumerate(message.tool_calls)
        return {"tool_calls": [self._call(call, f"{where}.tool_calls[{index}]") for index, call in calls]}

    def _result(self, message: ChatMessage, param: str) -> dict[str, object]:
        if not message.tool_call_id:
            raise RequestError(f"`{param}` is missing: it is the id of the call that has this result", param=param)
        if message.tool_call_id not in self._names:
            raise RequestError(f"`{param}` is {message.tool_call_id!r}: no message before has this call", param=param)
        name = message.name or self._names[message.tool_call_id]
        return {"tool_call_id": self._protect(message.tool_call_id), "name": self._protect(name)}

    def _call(self, call: ToolCall, where: str) -> dict[str, object]:
        if call.type != "function":
            raise UnsupportedField(f"`{where}.type` is {call.type!r}; supported: function", param=f"{where}.type")
        if not call.id:
            raise RequestError(f"`{where}.id` is empty", param=f"{where}.id")
        if not call.function.name:
            raise RequestError(f"`{where}.function.name` is empty", param=f"{where}.function.name")
        param = f"{where}.function.arguments"
        try:
            arguments = msgspec.json.decode(call.function.arguments or "{}")
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"`{param}` is not JSON: {error}", param=param) from error
        found = _protected(arguments, self._protect, param)
        if not isinstance(found, dict):
            raise RequestError(f"`{param}` must be a JSON object, written as a text", param=param)
        self._names[call.id] = call.function.name
        function = {"name": self._protect(call.function.name), "arguments": CallArguments(found)}
        return {"id": self._protect(call.id), "type": "function", "function": function}


def _protected(value: object, protect: Protect, param: str) -> object:
    """Return a JSON value in which no text acts as a control token."""
    try:
        return _protect_all(value, protect)
    except RecursionError as error:
        raise RequestError(f"`{param}` is nested too deeply", param=param) from error


def _protect_all(value: object, protect: Protect) -> object:
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, dict):
        return {protect(name): _protect_all(one, protect) for name, one in value.items()}
    return [_protect_all(one, protect) for one in value] if isinstance(value, list) else value

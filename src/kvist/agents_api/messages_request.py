"""Converts a request of Anthropic's Messages API into a chat. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvist.agents_api.paths import RequestPaths
from kvist.api.messages import (
    InputMessage,
    MessageBlock,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    OutputConfig,
    ResultPart,
    Thinking,
)
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

_FIXED_PATHS = {
    "stop": "stop_sequences",
    "response_format.json_schema.schema": "output_config.format.schema",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning_effort": "output_config.effort",
    "tool_choice.function.name": "tool_choice.name",
    "thinking_token_budget": "thinking.budget_tokens",
}
_BLOCKS = {  # by role
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
_FIELDS = {  # by type of block
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id", "content"),
}
_CHOICE_FIELDS = {"tool": ("name",), "auto": (), "any": (), "none": ()}
_THINKING_FIELDS = {"enabled": ("budget_tokens", "display"), "adaptive": ("budget_tokens", "display"), "disabled": ()}
_DISPLAYS = (None, "summarized", "omitted")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKS = {"enabled": True, "adaptive": True, "disabled": False}


def chat_of_messages(request: MessagesRequest, *, limits_thinking: bool = False) -> tuple[ChatRequest, RequestPaths]:
    """Return the chat, and the names of its fields in the request. `limits_thinking`: the model's reasoning is
    recognised, so that it can have a budget. Raises `RequestError` with the path of the fault."""
    paths = RequestPaths(_FIXED_PATHS)
    chat = _Chat(paths)
    if request.system:
        system = [request.system] if isinstance(request.system, str) else _texts(request.system, "system")
        chat.add("system", "system", content="\n".join(system))
    if not request.messages:
        raise RequestError("`messages` is empty", param="messages")
    for index, message in enumerate(request.messages):
        _add_message(chat, message, f"messages[{index}]")
    thinking = request.thinking
    options, shows_thinking = _thinking(thinking)
    for name in options.keys() - (request.chat_template_kwargs or {}).keys():
        paths.add(f"chat_template_kwargs.{name}", "thinking.type")
    config = request.output_config or OutputConfig()
    choice, parallel = _tool_choice(request.tool_choice)
    last = chat.messages[-1]
    return ChatRequest(
        model=request.model,
        messages=chat.messages,
        continue_final_message=last.role == "assistant" and bool(last.content) and not last.tool_calls,
        tools=[_tool(tool, f"tools[{index}]", paths) for index, tool in enumerate(request.tools or ())] or None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        stream=request.stream,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        response_format=_response_format(config),
        reasoning_effort=config.effort,
        include_reasoning=shows_thinking,
        thinking_token_budget=None if thinking is None or not limits_thinking else thinking.budget_tokens,
        chat_template_kwargs=options | (request.chat_template_kwargs or {}),
        cache_salt=request.cache_salt,
        session_id=request.session_id,
        prompt_cache_key=request.prompt_cache_key,
        priority=request.priority,
    ), paths


class _Chat:
    """The messages of the chat so far, with their paths in the request."""

    def __init__(self, paths: RequestPaths) -> None:
        self.messages: list[ChatMessage] = []
        self._paths = paths

    def add(
        self,
        role: str,
        where: str,
        *,
        content: str,
        reasoning: str | None = None,
        calls: list[ToolCall] | None = None,
        call_paths: Sequence[str] = (),
        tool_call_id: str | None = None,
    ) -> None:
        name = f"messages[{len(self.messages)}]"
        self._paths.add(name, where)
        for index, path in enumerate(call_paths):
            self._paths.add(f"{name}.tool_calls[{index}]", path)
            self._paths.add(f"{name}.tool_calls[{index}].function", path)
            self._paths.add(f"{name}.tool_calls[{index}].function.arguments", f"{path}.input")
        self._paths.add(f"{name}.tool_call_id", f"{where}.tool_use_id")
        self.messages.append(
            ChatMessage(role=role, content=content, reasoning=reasoning, tool_calls=calls, tool_call_id=tool_call_id)
        )


def _add_message(chat: _Chat, message: InputMessage, where: str) -> None:
    if message.role not in _BLOCKS:
        known = ", ".join(_BLOCKS)
        raise UnsupportedField(f"`{where}.role` is {message.role[:64]!r}; supported: {known}", param=f"{where}.role")
    if isinstance(message.content, str):
        chat.add(message.role, where, content=message.content)
        return
    for index, block in enumerate(message.content):
        if block.type not in _BLOCKS[message.role]:
            param, known = f"{where}.content[{index}].type", ", ".join(_BLOCKS[message.role])
            problem = f"`{param}` is {block.type[:64]!r}; supported with the role {message.role}: {known}"
            raise UnsupportedField(problem, param=param)
        check_kind(block, block.type, _FIELDS, f"{where}.content[{index}]")
    if message.role == "assistant":
        _add_answer(chat, message.content, where)
    else:
        _add_texts_and_results(chat, message.role, message.content, where)


def _add_texts_and_results(chat: _Chat, role: str, blocks: Sequence[MessageBlock], where: str) -> None:
    """Add a message for each result of a tool, and one for each sequence of texts between them."""
    texts: list[str] = []
    for index, block in enumerate(blocks):
        path = f"{where}.content[{index}]"
        if block.type == "text":
            texts.append(_required(block.text, f"{path}.text"))
            continue
        if texts:
            chat.add(role, where, content="\n".join(texts))
            texts = []
        content = block.content or ""
        if not isinstance(content, str):
            content = "\n".join(_texts(content, f"{path}.content"))
        chat.add("tool", path, content=content, tool_call_id=_required(block.tool_use_id, f"{path}.tool_use_id"))
    if texts or not blocks:
        chat.add(role, where, content="\n".join(texts))


def _add_answer(chat: _Chat, blocks: Sequence[MessageBlock], where: str) -> None:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    call_paths: list[str] = []
    for index, block in enumerate(blocks):
        path = f"{where}.content[{index}]"
        if block.type == "text":
            texts.append(_required(block.text, f"{path}.text"))
        elif block.type == "thinking":
            thoughts.append(_required(block.thinking, f"{path}.thinking"))
        elif block.type == "tool_use":
            arguments = msgspec.json.encode(block.input or {}).decode()
            function = CalledFunction(name=_required(block.name, f"{path}.name"), arguments=arguments)
            calls.append(ToolCall(id=_required(block.id, f"{path}.id"), function=function))
            call_paths.append(path)
    reasoning = "\n".join(thoughts) if thoughts else None
    content = "\n".join(texts)
    chat.add("assistant", where, content=content, reasoning=reasoning, calls=calls or None, call_paths=call_paths)


def _texts(parts: Sequence[ResultPart], where: str) -> list[str]:
    found = []
    for index, part in enumerate(parts):
        path = f"{where}[{index}]"
        if part.type != "text":
            problem = f"`{path}.type` is {part.type[:64]!r}; only text is supported"
            raise UnsupportedField(problem, param=f"{path}.type")
        found.append(_required(part.text, f"{path}.text"))
    return found


def _required(value: str | None, param: str) -> str:
    if value is None:
        raise RequestError(f"`{param}` is missing", param=param)
    return value


def _tool(tool: MessagesTool, where: str, paths: RequestPaths) -> Tool:
    if tool.type not in (None, "custom"):
        raise UnsupportedField(
            f"`{where}.type` is {tool.type[:64]!r}: no tools run in the server; supported: custom",
            param=f"{where}.type",
        )
    paths.add(f"{where}.function", where)
    paths.add(f"{where}.function.parameters", f"{where}.input_schema")
    function = ToolFunction(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _tool_choice(given: MessagesToolChoice | None) -> tuple[object, bool | None]:
    """Return `tool_choice` and `parallel_tool_calls` of the chat."""
    if given is None:
        return None, None
    check_kind(given, given.type, _CHOICE_FIELDS, "tool_choice")
    parallel = None if given.disable_parallel_tool_use is None else not given.disable_parallel_tool_use
    if given.type == "tool":
        name = _required(given.name, "tool_choice.name")
        return {"type": "function", "function": {"name": name}}, parallel
    if given.type not in _CHOICES:
        problem = f"`tool_choice.type` is {given.type[:64]!r}; supported: auto, any, tool, none"
        raise RequestError(problem, param="tool_choice.type")
    return _CHOICES[given.type], parallel


def _thinking(given: Thinking | None) -> tuple[dict[str, object], bool]:
    """Return the variables for the chat template, and whether the response has the reasoning."""
    if given is None:
        return {}, True
    if given.type not in _THINKS:
        problem = f"`thinking.type` is {given.type[:64]!r}; supported: {', '.join(_THINKS)}"
        raise RequestError(problem, param="thinking.type")
    check_kind(given, given.type, _THINKING_FIELDS, "thinking")
    if given.display not in _DISPLAYS:
        problem = f"`thinking.display` is {given.display[:64]!r}; supported: summarized, omitted"
        raise RequestError(problem, param="thinking.display")
    return {"enable_thinking": _THINKS[given.type]}, given.display != "omitted"


def _response_format(config: OutputConfig) -> ResponseFormat | None:
    if config.format is None:
        return None
    if config.format.type != "json_schema":
        param = "output_config.format.type"
        raise RequestError(f"`{param}` is {config.format.type[:64]!r}; supported: json_schema", param=param)
    schema = JsonSchemaFormat(schema=config.format.schema, strict=True)
    return ResponseFormat(type="json_schema", json_schema=schema)

"""Reads the messages of a chat, and its variables for the chat template, into what a template renders."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.api.schemas import ChatMessage, ChatRequest, PromptRequest, TokenizeRequest
from kvist.checking.chat_constraint import EFFORT_BUDGETS
from kvist.checking.kinds import check_equal
from kvist.checking.tools import CallHistory
from kvist.errors import RequestError, UnsupportedField
from kvist.text import Tokenizer
from kvist.text.chat import ChatTemplate

_OWN_NAMES = frozenset({"messages", "add_generation_prompt", "tools"})
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SHOWN_NAME_CHARS = 64


def template_options(request: ChatRequest | TokenizeRequest | PromptRequest) -> dict[str, object]:
    """Return the extra variables for the chat template. Raises `RequestError` for one that has a field of its own."""
    own = request.chat_template_kwargs or {}
    for name in sorted(_OWN_NAMES & own.keys()):
        where = f"chat_template_kwargs.{name}"
        raise RequestError(f"`{where}` cannot be set: the request has a field for it", param=where)
    effort = request.reasoning_effort
    options: dict[str, object] = (
        {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    )
    return options | own


def unread_options(request: ChatRequest, template: ChatTemplate) -> list[str]:
    """Return the fields that ask for something that neither the template nor the server knows for this model. A
    template reads a variable only if its name is in the template's text."""
    unread = []
    reasons = template.formats.reasoning is not None
    for name, value in (request.chat_template_kwargs or {}).items():
        is_so = name == "enable_thinking" and value is reasons  # without a switch
        if name not in template.source and not is_so:
            is_shown = name.isascii() and name.isidentifier() and len(name) <= _SHOWN_NAME_CHARS
            unread.append(f"chat_template_kwargs.{name}" if is_shown else "chat_template_kwargs")
    effort = request.reasoning_effort
    is_read = "reasoning_effort" in template.source or "enable_thinking" in template.source
    is_met = effort in EFFORT_BUDGETS if reasons else effort == "none"
    if effort is not None and not is_read and not is_met:
        unread.append("reasoning_effort")
    return list(dict.fromkeys(unread))


def continues_text(request: ChatRequest | TokenizeRequest | PromptRequest, last: ChatMessage) -> bool:
    """Return whether the answer continues the last message. Raises `RequestError` if it cannot."""
    if not request.continue_final_message:
        return False
    param = "continue_final_message"
    if request.add_generation_prompt:
        problem = f"`{param}` continues the last turn and `add_generation_prompt` opens a new turn"
        raise RequestError(f"{problem}; set only one of them", param=param)
    if last.tool_calls:
        problem = f"`{param}` continues a text, and the last message ends with `tool_calls`"
        raise RequestError(f"{problem}: send their results, or omit one of the fields", param=param)
    return True


def plain_messages(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Return the messages for the template. Raises `RequestError` that names the faulty one."""
    history = CallHistory(tokenizer.protect)
    return [_plain_message(each, f"messages[{index}]", tokenizer, history) for index, each in enumerate(messages)]


def _plain_message(message: ChatMessage, where: str, tokenizer: Tokenizer, history: CallHistory) -> dict[str, object]:
    if message.role not in _ROLES:
        known = ", ".join(_ROLES)
        raise UnsupportedField(f"`{where}.role` is {message.role!r}; supported: {known}", param=f"{where}.role")
    content = tokenizer.protect(_text_of(message, f"{where}.content"))
    plain: dict[str, object] = {"role": _ROLES[message.role], "content": content}
    if message.name is not None:
        plain["name"] = tokenizer.protect(message.name)
    check_equal(message, "reasoning", "reasoning_content", f"{where}.")
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if reasoning is not None:  # vLLM's and SGLang's names: templates read one of the two
        reasoning = tokenizer.protect(reasoning)
        plain |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if not (content and message.tool_calls):  # gpt-oss's name; its template refuses both before a call
            plain["thinking"] = reasoning
    return plain | history.fields_of(message, where)


def num_chars_of(message: ChatMessage) -> int:
    content = message.content or ""
    texts = [content] if isinstance(content, str) else [part.text or "" for part in content]
    texts += [call.function.arguments for call in message.tool_calls or ()]
    return sum(map(len, texts)) + len(message.reasoning or message.reasoning_content or "")


def _text_of(message: ChatMessage, where: str) -> str:
    """Return the content as one text; several text parts are joined with newlines."""
    if message.content is None:
        if message.role == "assistant":  # with tool calls, or an answer that ended before its first token
            return ""
        raise RequestError(f"`{where}` is missing", param=where)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        if part.type != "text":
            param = f"{where}[{index}].type"
            raise UnsupportedField(f"`{param}` is {part.type[:64]!r}; only text is supported", param=param)
        if part.text is None:
            param = f"{where}[{index}].text"
            raise RequestError(f"`{param}` is missing", param=param)
        texts.append(part.text)
    return "\n".join(texts)

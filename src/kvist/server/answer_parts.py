"""Divides the answers of a chat into content, reasoning and tool calls, in OpenAI's form."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvist.api.schemas import ChatRequest
from kvist.checking.tools import OfferedTools
from kvist.request import FinishReason
from kvist.text import Tokenizer
from kvist.tools import (
    AnswerFormats,
    ArgumentsPiece,
    CallEnded,
    CallIds,
    CallStarted,
    ContentPiece,
    ParserEvent,
    ReasoningPiece,
    answer_parser,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerParsing:
    """How the answers of one request are divided."""

    formats: AnswerFormats
    parameters: Mapping[str, object]  # of the functions
    reasoning_open: bool  # the prompt has opened the reasoning
    shows_reasoning: bool
    parallel: bool  # False: only the first call is shown

    @staticmethod
    def of(request: ChatRequest, tools: OfferedTools, tokenizer: Tokenizer, prompt: str) -> AnswerParsing | None:
        """Return None when the whole answer is content."""
        assert tokenizer.chat_template is not None
        known = tokenizer.chat_template.formats
        formats = AnswerFormats(
            known.tools if tools.for_template else None,
            None if request.separate_reasoning is False else known.reasoning,
        )
        if formats.tools is None and formats.reasoning is None:
            return None
        return AnswerParsing(
            formats=formats,
            parameters=tools.parameters,
            reasoning_open=formats.reasoning is not None and formats.reasoning.is_open(prompt),
            shows_reasoning=request.include_reasoning is not False,
            parallel=request.parallel_tool_calls is not False,
        )


class AnswerParts:
    """The message of one answer while its text arrives. Owned by the format of its response."""

    def __init__(self, parsing: AnswerParsing) -> None:
        formats = parsing.formats
        self._parsing = parsing
        self._ids = CallIds.OPENAI if formats.tools is None else formats.tools.ids
        self._parser = answer_parser(formats, reasoning_open=parsing.reasoning_open, parameters=parsing.parameters)
        self._is_open = False  # the arguments of the last call are not complete
        self._has_calls = False

    def events(self, text: str, *, finished: bool) -> list[ParserEvent]:
        """Return what the text adds to the message, without the parts that the request does not want. Each call has an
        id. The door for every API whose answers have calls or reasoning."""
        events = self._parser.push(text)
        if finished:
            events += self._parser.finish()
        return [self._with_id(event) for event in events if self._is_shown(event)]

    def _is_shown(self, event: ParserEvent) -> bool:
        if isinstance(event, ReasoningPiece):
            return self._parsing.shows_reasoning
        return isinstance(event, ContentPiece) or event.index == 0 or self._parsing.parallel

    def _with_id(self, event: ParserEvent) -> ParserEvent:
        if isinstance(event, CallEnded):
            self._is_open = False
        if not isinstance(event, CallStarted):
            return event
        self._has_calls = self._is_open = True
        return CallStarted(event.index, event.name, event.call_id or _new_call_id(self._ids))

    def delta(self, text: str, *, finished: bool) -> dict[str, object]:
        """Return the events in the form of OpenAI's chat deltas: at most one entry for each call."""
        return _chat_fields(self.events(text, finished=finished))

    def whole(self, text: str) -> dict[str, object]:
        """Return the fields of a message that is not streamed."""
        fields = self.delta(text, finished=True)
        calls = fields.get("tool_calls")
        if isinstance(calls, list):
            fields["tool_calls"] = [{name: one for name, one in call.items() if name != "index"} for call in calls]
        has_others = bool(calls) or "reasoning" in fields
        return {"content": None if has_others else ""} | fields

    def finish_reason(self, reason: str | None) -> str | None:
        """A stop string inside of a call ends the answer with "stop": the arguments are cut off."""
        is_called = self._has_calls and not self._is_open
        return "tool_calls" if is_called and reason == FinishReason.STOP.value else reason


def _chat_fields(events: Sequence[ParserEvent]) -> dict[str, object]:
    content, reasoning = "", ""
    calls: dict[int, CallStarted] = {}
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, ContentPiece):
            content += event.text
        elif isinstance(event, ReasoningPiece):
            reasoning += event.text
        elif isinstance(event, CallStarted):
            calls[event.index] = event
            arguments[event.index] = ""
        elif isinstance(event, ArgumentsPiece):
            arguments[event.index] = arguments.get(event.index, "") + event.text
    found: dict[str, object] = {"content": content} if content else {}
    if reasoning:  # the newer name, and the one before
        found |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if arguments:
        found["tool_calls"] = [_entry(index, calls.get(index), text) for index, text in arguments.items()]
    return found


def _entry(index: int, start: CallStarted | None, arguments: str) -> dict[str, object]:
    if start is None:
        return {"index": index, "function": {"arguments": arguments}}
    function = {"name": start.name, "arguments": arguments}
    return {"index": index, "id": start.call_id, "type": "function", "function": function}


def _new_call_id(ids: CallIds) -> str:
    drawn = uuid.uuid4().hex
    return drawn[:9] if ids is CallIds.MISTRAL else f"call_{drawn[:24]}"

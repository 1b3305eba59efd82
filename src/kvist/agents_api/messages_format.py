"""Writes the answers of Anthropic's Messages API: whole messages, and the events of a stream.

A stream is: message_start, ping; for each block its start, deltas and stop, never overlapping; message_delta with the
reason of the end and the final usage; message_stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import msgspec

from kvist.agents_api.blocks import AnswerBlocks, Block, BlockEnded, BlockEvent, BlockKind, BlockStarted
from kvist.agents_api.chat_job import shown_id
from kvist.api.messages import (
    AnswerBlock,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageEnding,
    MessagesError,
    MessagesErrorBody,
    MessagesEvent,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Ping,
    SignatureDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from kvist.errors import KvistError
from kvist.http.asgi import shown_error
from kvist.request import FinishReason
from kvist.server.generation import ChoiceState, Delta
from kvist.server.openai import ChatRun

_json = msgspec.json.Encoder().encode
_SIGNATURE_BYTES = 16
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesFormat:
    """The format of one response. Mutable while it streams."""

    def __init__(self, run: ChatRun, *, model_name: str, max_tokens: int | None) -> None:
        """`max_tokens`: as the request has it; the context may have room for fewer."""
        self._run = run
        self._model_name = model_name
        self._max_tokens = max_tokens
        self._blocks = AnswerBlocks(run.parsing)
        self._is_started = False

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        return b"".join(_encoded(event) for event in self._events(choice, delta))

    def _events(self, choice: ChoiceState, delta: Delta) -> Iterator[MessagesEvent]:
        if not self._is_started:
            self._is_started = True
            usage = _usage(choice, len(delta.token_ids))
            yield MessageStart(self._message([], stop_reason=None, stop_sequence=None, usage=usage))
            yield Ping()
        for event in self._blocks.push(delta.text, finished=delta.finished):
            yield from _block_events(event)
        if delta.finished:
            reason, sequence = self._ending(choice)
            yield MessageDelta(MessageEnding(reason, sequence), _usage(choice, len(choice.token_ids)))

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        del choices
        return _encoded(MessageStop())

    def failure(self, error: KvistError) -> bytes:
        return _encoded(error_body(error))

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        choice = choices[0]
        self._blocks.push(choice.text, finished=True)
        reason, sequence = self._ending(choice)
        content = [_whole_block(block) for block in self._blocks.blocks]
        usage = _usage(choice, len(choice.token_ids))
        return _json(self._message(content, stop_reason=reason, stop_sequence=sequence, usage=usage))

    def _message(
        self, content: list[AnswerBlock], *, stop_reason: str | None, stop_sequence: str | None, usage: MessagesUsage
    ) -> Message:
        return Message(
            id=shown_id(self._run),
            model=self._model_name,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=usage,
        )

    def _ending(self, choice: ChoiceState) -> tuple[str, str | None]:
        """Return `stop_reason` and `stop_sequence`."""
        if choice.finish_reason == FinishReason.LENGTH.value:
            fewer = self._max_tokens is not None and choice.request.sampling.max_tokens < self._max_tokens
            return ("model_context_window_exceeded" if fewer else "max_tokens"), None
        if isinstance(choice.matched, str):
            return "stop_sequence", choice.matched
        return ("tool_use" if self._blocks.has_calls else "end_turn"), None


def error_body(error: KvistError, request_id: str | None = None) -> MessagesErrorBody:
    """Return an error in Anthropic's shape, with `param` and `code` of OpenAI's shape in addition."""
    status = error.http_status
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    message, param = shown_error(error)
    found = MessagesError(type=kind, message=message, param=param, code=error.code)
    return MessagesErrorBody(found, request_id)


def _encoded(event: MessagesEvent) -> bytes:
    name = str(type(event).__struct_config__.tag)
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _json(event))


def _usage(choice: ChoiceState, num_output: int) -> MessagesUsage:
    return MessagesUsage(
        input_tokens=choice.request.num_prompt_tokens - choice.num_cached_tokens,
        cache_creation_input_tokens=0,  # pages are cached without being asked for, at no price
        cache_read_input_tokens=choice.num_cached_tokens,
        output_tokens=num_output,
    )


def _block_events(event: BlockEvent) -> Iterator[MessagesEvent]:
    block = event.block
    if isinstance(event, BlockStarted):
        yield ContentBlockStart(block.index, _empty_block(block))
    elif isinstance(event, BlockEnded):
        if block.kind is BlockKind.REASONING:
            yield ContentBlockDelta(block.index, SignatureDelta(_signature(block.text)))
        yield ContentBlockStop(block.index)
    elif block.kind is BlockKind.TEXT:
        yield ContentBlockDelta(block.index, TextDelta(event.text))
    elif block.kind is BlockKind.REASONING:
        yield ContentBlockDelta(block.index, ThinkingDelta(event.text))
    else:
        yield ContentBlockDelta(block.index, InputJsonDelta(event.text))


def _empty_block(block: Block) -> AnswerBlock:
    if block.kind is BlockKind.TEXT:
        return TextBlock("")
    if block.kind is BlockKind.REASONING:
        return ThinkingBlock("", "")
    return ToolUseBlock(id=block.call_id, name=block.name, input={})


def _whole_block(block: Block) -> AnswerBlock:
    if block.kind is BlockKind.TEXT:
        return TextBlock(block.text)
    if block.kind is BlockKind.REASONING:
        return ThinkingBlock(block.text, _signature(block.text))
    return ToolUseBlock(id=block.call_id, name=block.name, input=_input(block))


def _input(block: Block) -> dict[str, object]:
    """Return the arguments of a call; nothing when they break off, since half of a JSON text is none."""
    try:
        return msgspec.json.decode(block.text, type=dict[str, object])
    except msgspec.DecodeError:
        return {}


def _signature(thinking: str) -> str:
    """Return a name of the text. Some clients send back only thinking that has a signature."""
    return blake2b(thinking.encode(), digest_size=_SIGNATURE_BYTES).hexdigest()

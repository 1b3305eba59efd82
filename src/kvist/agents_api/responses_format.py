"""Writes the answers of OpenAI's Responses API: whole responses, and the events of a stream.

A stream is: created, in_progress; for each item its added, deltas and done, never overlapping; completed, incomplete or
failed with the whole response. Every event is numbered.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kvist.agents_api.blocks import AnswerBlocks, Block, BlockEnded, BlockEvent, BlockKind, BlockStarted
from kvist.agents_api.chat_job import shown_id
from kvist.api.response_objects import (
    ArgumentsDelta,
    ArgumentsDone,
    CachedTokens,
    ContentPartAdded,
    ContentPartDone,
    FunctionCall,
    IncompleteDetails,
    OutputItem,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ReasoningTokens,
    ResponseCompleted,
    ResponseCreated,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseProblem,
    ResponsesUsage,
)
from kvist.api.responses import ReasoningOptions, ResponsesRequest, TextFormat, TextOptions
from kvist.clock import unix_time_s
from kvist.errors import KvistError
from kvist.http.asgi import shown_error
from kvist.request import FinishReason, TokenLogprobs
from kvist.server.generation import ChoiceState, Delta
from kvist.server.logprobs import chat_logprobs
from kvist.server.openai import ChatRun
from kvist.text import Tokenizer

_json = msgspec.json.Encoder().encode
_PREFIXES = {BlockKind.TEXT: "msg", BlockKind.REASONING: "rs", BlockKind.CALL: "fc"}
_ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}  # of failed responses; the others are server_error


def opened_response(request: ResponsesRequest, run: ChatRun, model_name: str) -> ResponseObject:
    """Return the response before its first token."""
    sampling, text, asked = run.choices[0].request.sampling, request.text or TextOptions(), request.reasoning
    return ResponseObject(
        id=shown_id(run),
        created_at=unix_time_s(),
        status="in_progress",
        background=bool(request.background),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        model=model_name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=ReasoningOptions(effort=None if asked is None else asked.effort),
        store=request.store is not False,
        temperature=sampling.temperature,
        text=TextOptions(format=text.format or TextFormat(type="text"), verbosity=text.verbosity),
        tool_choice="auto" if request.tool_choice is None else request.tool_choice,
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=sampling.top_p,
    )


class ResponsesFormat:
    """The format of one response. Mutable while it streams."""

    def __init__(
        self, response: ResponseObject, run: ChatRun, tokenizer: Tokenizer, keep: Callable[[ResponseObject], None]
    ) -> None:
        """`keep` gets the response at its end, before its last byte is sent."""
        self.response = response
        self._tokenizer = tokenizer
        self._keep = keep
        self._blocks = AnswerBlocks(run.parsing)
        self._has_logprobs = run.choices[0].request.sampling.num_logprobs is not None
        self._pending_logprobs: list[object] = []  # of a stream: of tokens whose text is not sent yet
        self._logprobs: list[object] = []  # of a whole answer; in a stream they are in the deltas alone
        self._ids: list[str] = []  # of the items, by index
        self._num_events = 0

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        sent: list[bytes] = []  # encoded at once: the response changes
        if not self._num_events:
            sent += (self._lifecycle(ResponseCreated), self._lifecycle(ResponseInProgress))
        if self._has_logprobs:
            self._pending_logprobs += self._shown_logprobs(choice, delta.token_ids, delta.logprobs)
        for event in self._blocks.push(delta.text, finished=delta.finished):
            sent += self._block_events(event, choice)
        if delta.finished:
            self._end(choice)
            is_complete = self.response.status == "completed"
            sent.append(self._lifecycle(ResponseCompleted if is_complete else ResponseIncomplete))
        return b"".join(sent)

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        del choices  # the last event is complete
        return b""

    def failure(self, error: KvistError) -> bytes:
        self._fail(error)
        return self._lifecycle(ResponseFailed)

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        choice = choices[0]
        self._blocks.push(choice.text, finished=True)
        self._logprobs = self._shown_logprobs(choice, choice.token_ids, choice.logprobs) if self._has_logprobs else []
        self._end(choice)
        return _json(self.response)

    def fail_whole(self, choices: Sequence[ChoiceState], error: KvistError) -> None:
        """Keep the response, which is not streamed, as failed."""
        self._blocks.push(choices[0].text, finished=True)
        self._fail(error)

    def cancel_whole(self, choices: Sequence[ChoiceState]) -> None:
        """Keep the response, which is not streamed, as cancelled."""
        self._blocks.push(choices[0].text, finished=True)
        self._stop("cancelled")

    def _fail(self, error: KvistError) -> None:
        message, _ = shown_error(error)
        self.response.error = ResponseProblem(_ERROR_CODES.get(error.http_status, "server_error"), message)
        self._stop("failed")

    def _stop(self, status: Any) -> None:
        self.response.status = status
        last = len(self._blocks.blocks) - 1
        self.response.output = [self._item(each, is_cut=each.index == last) for each in self._blocks.blocks]
        self._keep(self.response)

    def _end(self, choice: ChoiceState) -> None:
        """Complete the response. Takes time that grows with its reasoning, which is tokenised in order to count it."""
        response, is_cut = self.response, choice.finish_reason == FinishReason.LENGTH.value
        if is_cut:
            response.status, response.incomplete_details = "incomplete", IncompleteDetails("max_output_tokens")
        else:
            response.status, response.completed_at = "completed", unix_time_s()
        last = len(self._blocks.blocks) - 1
        response.output = [self._item(each, is_cut=is_cut and each.index == last) for each in self._blocks.blocks]
        if not response.output:
            response.output = [
                OutputMessage(id=self._id(0, BlockKind.TEXT), status="completed", content=[OutputText("")])
            ]
        thoughts = [block.text for block in self._blocks.blocks if block.kind is BlockKind.REASONING]
        num_reasoning = sum(len(self._tokenizer.encode(text)) for text in thoughts)
        num_input, num_output = choice.request.num_prompt_tokens, len(choice.token_ids)
        response.usage = ResponsesUsage(
            input_tokens=num_input,
            input_tokens_details=CachedTokens(choice.num_cached_tokens),
            output_tokens=num_output,
            output_tokens_details=ReasoningTokens(min(num_reasoning, num_output)),
            total_tokens=num_input + num_output,
        )
        self._keep(response)

    # ---------------------------------------------------------------- items and events

    def _id(self, index: int, kind: BlockKind) -> str:
        while len(self._ids) <= index:
            self._ids.append(f"{_PREFIXES[kind]}_{uuid.uuid4().hex}")
        return self._ids[index]

    def _item(self, block: Block, *, is_cut: bool) -> OutputItem:
        item_id, text = self._id(block.index, block.kind), block.text
        status: Any = "completed" if block.is_complete and not is_cut else "incomplete"
        if block.kind is BlockKind.CALL:
            return FunctionCall(id=item_id, status=status, call_id=block.call_id, name=block.name, arguments=text)
        if block.kind is BlockKind.REASONING:
            return ReasoningItem(id=item_id, status=status, content=[ReasoningText(text)])
        return OutputMessage(id=item_id, status=status, content=[OutputText(text, [], self._logprobs)])

    def _empty_item(self, block: Block) -> OutputItem:
        item_id = self._id(block.index, block.kind)
        if block.kind is BlockKind.CALL:
            name = block.name
            return FunctionCall(id=item_id, status="in_progress", call_id=block.call_id, name=name, arguments="")
        if block.kind is BlockKind.REASONING:
            return ReasoningItem(id=item_id, status="in_progress", content=[])
        return OutputMessage(id=item_id, status="in_progress", content=[])

    def _block_events(self, event: BlockEvent, choice: ChoiceState) -> Iterator[bytes]:
        block = event.block
        index, item_id, kind = block.index, self._id(block.index, block.kind), block.kind
        is_text, is_call = kind is BlockKind.TEXT, kind is BlockKind.CALL

        def in_item(event_type: Callable[..., ResponseEvent], **fields: object) -> bytes:
            return self._encoded(event_type, output_index=index, item_id=item_id, **fields)

        if isinstance(event, BlockStarted):
            yield self._encoded(OutputItemAdded, output_index=index, item=self._empty_item(block))
            if not is_call:
                yield in_item(ContentPartAdded, part=OutputText("") if is_text else ReasoningText(""))
        elif isinstance(event, BlockEnded):
            text = block.text
            if is_call:
                yield in_item(ArgumentsDone, name=block.name, arguments=text)
            else:
                yield in_item(OutputTextDone if is_text else ReasoningTextDone, text=text)
                yield in_item(ContentPartDone, part=OutputText(text) if is_text else ReasoningText(text))
            is_cut = choice.finish_reason == FinishReason.LENGTH.value and block is self._blocks.blocks[-1]
            yield self._encoded(OutputItemDone, output_index=index, item=self._item(block, is_cut=is_cut))
        elif is_text:
            logprobs, self._pending_logprobs = self._pending_logprobs, []
            yield in_item(OutputTextDelta, delta=event.text, logprobs=logprobs)
        else:
            yield in_item(ArgumentsDelta if is_call else ReasoningTextDelta, delta=event.text)

    def _lifecycle(self, event_type: Callable[..., ResponseEvent]) -> bytes:
        return self._encoded(event_type, response=self.response)

    def _encoded(self, event_type: Callable[..., ResponseEvent], **fields: object) -> bytes:
        event = event_type(sequence_number=self._num_events, **fields)
        self._num_events += 1
        name = str(type(event).__struct_config__.tag)
        return b"event: %s\ndata: %s\n\n" % (name.encode(), _json(event))

    def _shown_logprobs(
        self, choice: ChoiceState, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> list[object]:
        return list(chat_logprobs(self._tokenizer, token_ids, logprobs, choice.request.sampling))

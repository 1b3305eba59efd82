"""Writes the responses of /v1/chat/completions and /v1/completions: events of a stream, and whole responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvist.api.schemas import ChatRequest, CompletionRequest, KvistOptions, StreamOptions
from kvist.checking.kinds import check_equal
from kvist.checking.sampling import check_shown_id
from kvist.clock import unix_time_s
from kvist.errors import KvistError, RequestError
from kvist.http.asgi import error_event
from kvist.request import TokenLogprobs
from kvist.server.answer_parts import AnswerParsing, AnswerParts
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState, Delta
from kvist.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs, prompt_offsets
from kvist.server.reporting import kvist_field, usage, usage_so_far
from kvist.text import Tokenizer

_json = msgspec.json.Encoder().encode


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all events of one response share."""

    head: dict[str, object]  # id, created, model
    kind: str  # the `object` of a whole response
    include_usage: bool  # in an event of its own at the end
    continuous_usage: bool  # in every event
    include_report: bool
    by_tier: bool

    @staticmethod
    def of(gateway: GatewayContext, request: ChatRequest | CompletionRequest, job_id: str, kind: str) -> Envelope:
        asked = request.stream_options or StreamOptions()
        ours = request.kvist or KvistOptions()
        if ours.usage and request.stream and not asked.include_usage:
            message = "`kvist.usage` extends `usage`: in a stream, set `stream_options.include_usage` too"
            raise RequestError(message, param="kvist.usage")
        return Envelope(
            head={"id": _shown_id(request, job_id), "created": unix_time_s(), "model": gateway.model_name},
            kind=kind,
            include_usage=bool(asked.include_usage),
            continuous_usage=bool(asked.continuous_usage_stats),
            by_tier=bool(ours.usage),
            include_report=bool(ours.report),
        )

    def event_ends(self, kind: str, choice_head: bytes) -> tuple[bytes, bytes]:
        """Return the bytes before and after the part that changes from event to event; the part follows
        `choice_head`."""
        before = b"data: " + _json({**self.head, "object": kind})[:-1] + b',"choices":[' + choice_head
        return before, b"}]" + (b',"usage":null' if self.include_usage else b"") + b"}\n\n"

    def closing(self, kind: str, choices: Sequence[ChoiceState]) -> bytes:
        last: dict[str, object] = {**self.head, "object": kind, "choices": []}
        if self.include_usage:
            last["usage"] = usage(choices, by_tier=self.by_tier)
        ours = kvist_field(choices, include_report=self.include_report)
        has_content = self.include_usage or bool(ours)
        return (b"data: " + _json(last | ours) + b"\n\n" if has_content else b"") + b"data: [DONE]\n\n"

    def whole(
        self, choices: Sequence[ChoiceState], answers: list[dict[str, object]], more: dict[str, object] | None = None
    ) -> bytes:
        """`more`: further fields of the response."""
        body = {**self.head, "object": self.kind, "choices": answers, "usage": usage(choices, by_tier=self.by_tier)}
        body |= more or {}
        return _json(body | kvist_field(choices, include_report=self.include_report))


def _shown_id(request: ChatRequest | CompletionRequest, job_id: str) -> str:
    """Return the client's own id (SGLang's `rid` or vLLM's `request_id`), else the job's id."""
    check_equal(request, "request_id", "rid")
    if request.rid is not None:
        return check_shown_id(request.rid, "rid") or job_id
    if request.request_id is not None:
        return f"{job_id.partition('-')[0]}-{check_shown_id(request.request_id, 'request_id')}"
    return job_id


class AnswerFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields beside the text that a request asks for, in each answer."""

    logprobs: bool
    token_ids: bool
    num_prompt_logprobs: int | None = None  # vLLM's `prompt_logprobs`, which no stream has


class _Format:
    """The format shared by chats and completions."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, fields: AnswerFields) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._fields = fields
        self._only_text = not fields.logprobs and not fields.token_ids and not envelope.continuous_usage
        self._ends: dict[int, tuple[bytes, bytes, bytes]] = {}  # by choice: before, after, after plain text
        self._num_sent: dict[int, int] = {}  # tokens sent so far, by choice; counted for continuous usage

    def failure(self, error: KvistError) -> bytes:
        return error_event(error)

    def _end(self, choice: ChoiceState, after: bytes, num_new_tokens: int) -> bytes:
        """Return the end of one event."""
        if not self._envelope.continuous_usage:
            return after
        num_sent = self._num_sent[choice.index] = self._num_sent.get(choice.index, 0) + num_new_tokens
        return b'}],"usage":' + _json(usage_so_far(choice, num_sent)) + b"}\n\n"

    def _rest(self, choice: ChoiceState, delta: Delta, *, first: bool) -> dict[str, object]:
        """Return the fields of an event's choice other than text and logprobs."""
        rest: dict[str, object] = {"logprobs": None, "finish_reason": None}
        if delta.finished:
            rest |= _ending(choice)
        if self._fields.token_ids:
            rest["token_ids"] = delta.token_ids
            if first:
                rest["prompt_token_ids"] = choice.request.prompt_token_ids
        return rest

    def _whole_ids(self, choice: ChoiceState) -> dict[str, object]:
        if not self._fields.token_ids:
            return {}
        return {"token_ids": choice.token_ids, "prompt_token_ids": choice.request.prompt_token_ids}

    def _prompt_logprobs(self, choice: ChoiceState) -> dict[str, object]:
        if self._fields.num_prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._tokenizer, choice, self._fields.num_prompt_logprobs)}


def _ending(choice: ChoiceState) -> dict[str, object]:
    """Return why an answer ended. `stop_reason` is vLLM's field (null for an end-of-sequence token), `matched_stop`
    is SGLang's."""
    asked_for = isinstance(choice.matched, str) or choice.matched in choice.request.sampling.stop_token_ids
    return {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.matched if asked_for else None,
        "matched_stop": choice.matched,
    }


class ChatFormat(_Format):
    _CHUNK = "chat.completion.chunk"

    def __init__(
        self, envelope: Envelope, tokenizer: Tokenizer, fields: AnswerFields, *, parsing: AnswerParsing | None = None
    ) -> None:
        """`parsing`: how answers are divided; None: the whole text is content."""
        super().__init__(envelope, tokenizer, fields)
        self._parsing = parsing
        self._parts: dict[int, AnswerParts] = {}  # of streams, by choice

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        ends = self._ends.get(choice.index)
        first, opening = ends is None, b""
        if ends is None:
            before, after = self._envelope.event_ends(self._CHUNK, b'{"index":%d,"delta":' % choice.index)
            ends = self._ends[choice.index] = (before, after, b'},"logprobs":null,"finish_reason":null' + after)
            role = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            opening = before + role + self._end(choice, after, 0)
        before, after, after_text = ends
        if not delta.finished and self._only_text and self._parsing is None:
            return b"".join((opening, before, b'{"content":', _json(delta.text), after_text))
        rest = self._rest(choice, delta, first=first)
        if self._fields.logprobs:
            rest["logprobs"] = {"content": self._content_logprobs(choice, delta.token_ids, delta.logprobs)}
        content: dict[str, object] = {"content": delta.text} if delta.text else {}
        if self._parsing is not None:
            if choice.index not in self._parts:
                self._parts[choice.index] = AnswerParts(self._parsing)
            parts = self._parts[choice.index]
            content = parts.delta(delta.text, finished=delta.finished)
            if delta.finished:
                rest["finish_reason"] = parts.finish_reason(choice.finish_reason)
        end = self._end(choice, after, len(delta.token_ids))
        return b"".join((opening, before, _json(content), b",", _json(rest)[1:-1], end))

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        return self._envelope.closing(self._CHUNK, choices)

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        answers = [self._answer(choice) for choice in choices]
        return self._envelope.whole(choices, answers, self._prompt_logprobs(choices[0]))

    def _content_logprobs(
        self, choice: ChoiceState, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> list[msgspec.Raw]:
        return chat_logprobs(self._tokenizer, token_ids, logprobs, choice.request.sampling)

    def _answer(self, choice: ChoiceState) -> dict[str, object]:
        logprobs = None
        if self._fields.logprobs:
            logprobs = {"content": self._content_logprobs(choice, choice.token_ids, choice.logprobs)}
        message: dict[str, object] = {"content": choice.text}
        ending = _ending(choice)
        if self._parsing is not None:
            parts = AnswerParts(self._parsing)
            message = parts.whole(choice.text)
            ending["finish_reason"] = parts.finish_reason(choice.finish_reason)
        return {
            "index": choice.index,
            "message": {"role": "assistant", **message, "refusal": None},
            "logprobs": logprobs,
            **ending,
            **self._whole_ids(choice),
        }


class _PendingTokens:
    """Tokens of a stream with logprobs that no event contains yet. A token waits until its `text_offset` is certain,
    which is when the text before it is sent: that text may be withheld as a possible beginning of a stop string."""

    def __init__(self) -> None:
        self._tokens: list[tuple[int, TokenLogprobs | None, int]] = []
        self._num_echoed = 0  # characters of the prompt before the answer
        self._num_chars = 0  # sent so far

    def add_prompt(self, tokens: Iterable[tuple[int, TokenLogprobs | None, int]], num_chars: int) -> None:
        """Add the tokens of an echoed prompt of `num_chars` characters."""
        self._tokens.extend(tokens)
        self._num_echoed = self._num_chars = num_chars

    def add(self, delta: Delta) -> None:
        offsets = (self._num_echoed + offset for offset in delta.text_offsets)
        self._tokens.extend(zip(delta.token_ids, delta.logprobs, offsets, strict=True))
        self._num_chars += len(delta.text)

    def take(self, *, finished: bool) -> tuple[list[int], list[TokenLogprobs | None], list[int]]:
        ready, limit = self._tokens, self._num_chars
        if not finished:
            ready = [token for token in self._tokens if token[2] <= limit]  # offsets never decrease
        self._tokens = self._tokens[len(ready) :]
        return [token[0] for token in ready], [token[1] for token in ready], [min(token[2], limit) for token in ready]


class CompletionFormat(_Format):
    def __init__(
        self, envelope: Envelope, tokenizer: Tokenizer, fields: AnswerFields, *, echoes: Sequence[str] = ()
    ) -> None:
        """`echoes` has, by choice, the prompt with which its text begins; empty when `echo` is off."""
        super().__init__(envelope, tokenizer, fields)
        self._echoes = echoes
        self._pending: dict[int, _PendingTokens] = {}  # with logprobs

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        ends = self._ends.get(choice.index)
        first = ends is None
        if ends is None:
            before, after = self._envelope.event_ends(self._envelope.kind, b'{"index":%d,"text":' % choice.index)
            ends = self._ends[choice.index] = (before, after, b',"logprobs":null,"finish_reason":null' + after)
        before, after, after_text = ends
        text = self._echoes[choice.index] + delta.text if first and self._echoes else delta.text
        if not delta.finished and self._only_text:
            return before + _json(text) + after_text  # an event is sent for every token, even without text
        rest = self._rest(choice, delta, first=first)
        if self._fields.logprobs:
            rest["logprobs"] = self._logprobs_of(choice, delta)
        end = self._end(choice, after, len(delta.token_ids))
        return b"".join((before, _json(text), b",", _json(rest)[1:-1], end))

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        return self._envelope.closing(self._envelope.kind, choices)

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        return self._envelope.whole(choices, [self._answer(choice) for choice in choices])

    def _answer(self, choice: ChoiceState) -> dict[str, object]:
        logprobs = None
        if self._fields.logprobs:
            everything = Delta(
                choice.text, tuple(choice.token_ids), tuple(choice.logprobs), True, tuple(choice.text_offsets)
            )
            logprobs = self._logprobs_of(choice, everything)
        return {
            "index": choice.index,
            "text": self._echoes[choice.index] + choice.text if self._echoes else choice.text,
            "logprobs": logprobs,
            **_ending(choice),
            **self._whole_ids(choice),
            **self._prompt_logprobs(choice),
        }

    def _logprobs_of(self, choice: ChoiceState, delta: Delta) -> dict[str, object]:
        """Return the logprobs of the tokens whose offset is certain after `delta`, first those of an echoed prompt."""
        pending = self._pending.get(choice.index)
        if pending is None:
            pending = self._pending[choice.index] = _PendingTokens()
            if self._echoes:
                text, prompt_ids = self._echoes[choice.index], choice.request.prompt_token_ids
                offsets = prompt_offsets(self._tokenizer, prompt_ids, text)
                found = (None, *choice.prompt_logprobs)
                pending.add_prompt(zip(prompt_ids, found, offsets, strict=True), len(text))
        pending.add(delta)
        token_ids, logprobs, offsets = pending.take(finished=delta.finished)
        return completion_logprobs(self._tokenizer, token_ids, logprobs, offsets, choice.request.sampling)

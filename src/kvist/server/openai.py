"""/v1/chat/completions and /v1/completions: request → job, and the two response formats."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvist.clock import unix_time_s
from kvist.errors import RequestError
from kvist.request import TokenLogprobs
from kvist.server.caller import Caller
from kvist.server.decoding import BodyDecoder
from kvist.server.gateway import Gateway
from kvist.server.generation import Choice, Delta
from kvist.server.jobs import Plan, Prompt, make_choices, new_job_id
from kvist.server.reporting import chat_logprobs, completion_logprobs, report, usage
from kvist.server.respond import Job
from kvist.server.sampling import (
    check_num_logprobs,
    check_seed,
    check_token_ids,
    num_choices,
    output_limit,
    token_lists,
)
from kvist.server.schemas import ChatRequest, CompletionRequest
from kvist.text import Tokenizer

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_CHAT = BodyDecoder(ChatRequest)
_COMPLETION = BodyDecoder(CompletionRequest)
_json = msgspec.json.Encoder().encode

# ---------------------------------------------------------------- requests


async def chat_job(gateway: Gateway, body: bytes, caller: Caller) -> Job:
    """Raises `RequestError` for anything the request has wrong."""
    tokenizer = gateway.require_tokenizer()
    request = _CHAT.decode(body)
    gateway.check_model(request.model)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    num_logprobs = check_num_logprobs(request.top_logprobs or 0, "top_logprobs") if request.logprobs else None
    text = gateway.chat_prompt(request.messages, options=request.chat_template_kwargs)
    token_ids = await gateway.encode(text, add_special_tokens=False, param="messages")
    prompts = [_prompt(gateway, request, token_ids, default=None, name="messages")]
    job_id = new_job_id("chatcmpl")
    choices = _choices(gateway, request, caller, prompts, job_id, num_logprobs)
    shape = _Shape.of(gateway, request, job_id, "chat.completion")
    form = ChatFormat(shape, tokenizer, logprobs=num_logprobs is not None)
    return Job(choices=choices, format=form, stream=bool(request.stream))


async def completion_job(gateway: Gateway, body: bytes, caller: Caller) -> Job:
    """Raises `RequestError` for anything the request has wrong."""
    tokenizer = gateway.require_tokenizer()
    request = _COMPLETION.decode(body)
    gateway.check_model(request.model)
    num_logprobs = check_num_logprobs(request.logprobs, "logprobs")
    prompts = [
        _prompt(gateway, request, token_ids, default=_DEFAULT_COMPLETION_TOKENS, name="prompt")
        for token_ids in await _prompt_token_ids(gateway, request)
    ]
    job_id = new_job_id("cmpl")
    choices = _choices(gateway, request, caller, prompts, job_id, num_logprobs)
    shape = _Shape.of(gateway, request, job_id, "text_completion")
    form = CompletionFormat(
        shape, tokenizer, logprobs=num_logprobs is not None, token_ids=bool(request.return_token_ids)
    )
    return Job(choices=choices, format=form, stream=bool(request.stream))


async def _prompt_token_ids(gateway: Gateway, request: CompletionRequest) -> list[list[int]]:
    """A text, several texts, token ids, or several lists of them; never a mixture."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [await gateway.encode(prompt, add_special_tokens=True, param="prompt")]
    if not prompt:
        raise RequestError("`prompt` is an empty list", param="prompt")
    num_choices(request.n, 1 if isinstance(prompt[0], int) else len(prompt), gateway.config.max_choices)
    found = token_lists(prompt)
    if found is None:
        texts = [item for item in prompt if isinstance(item, str)]
        if len(texts) < len(prompt):
            raise RequestError("`prompt` mixes texts, token ids and lists of token ids; use one kind", param="prompt")
        return [await gateway.encode(text, add_special_tokens=True, param="prompt") for text in texts]
    for one in found:
        check_token_ids(one, gateway.vocab_size(), "prompt")
    return found


def _prompt(
    gateway: Gateway,
    request: ChatRequest | CompletionRequest,
    token_ids: list[int],
    *,
    default: int | None,
    name: str,
) -> Prompt:
    asked, param = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if asked is not None and asked != request.max_completion_tokens:
            raise RequestError("`max_tokens` and `max_completion_tokens` disagree; give one", param="max_tokens")
        asked, param = request.max_completion_tokens, "max_completion_tokens"
    limit = gateway.max_model_len()
    max_tokens = output_limit(len(token_ids), limit, asked=asked, default=default, param=param, prompt=name)
    return Prompt(token_ids=tuple(token_ids), max_tokens=max_tokens)


def _choices(
    gateway: Gateway,
    request: ChatRequest | CompletionRequest,
    caller: Caller,
    prompts: list[Prompt],
    job_id: str,
    num_logprobs: int | None,
) -> list[Choice]:
    if request.stream_options is not None and not request.stream:
        raise RequestError("`stream_options` needs `stream` to be true", param="stream_options")
    plan = Plan(
        caller=caller,
        job_id=job_id,
        prompts=prompts,
        fields=request,
        seed=check_seed(request.seed),
        cache_salt=request.cache_salt,
        min_tokens=request.min_tokens,
        num_logprobs=num_logprobs,
    )
    return make_choices(gateway, plan)


# ---------------------------------------------------------------- responses


class _Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What all events of a response share."""

    head: dict[str, object]  # id, created, model
    kind: str  # the `object` of a whole response
    include_usage: bool
    include_report: bool
    by_tier: bool

    @staticmethod
    def of(gateway: Gateway, request: ChatRequest | CompletionRequest, job_id: str, kind: str) -> _Shape:
        include_usage = request.stream_options is not None and request.stream_options.include_usage
        by_tier = request.kvist is not None and request.kvist.usage
        if by_tier and request.stream and not include_usage:
            message = "`kvist.usage` says more in `usage`, which a stream has with `stream_options.include_usage`"
            raise RequestError(message, param="kvist.usage")
        return _Shape(
            head={"id": job_id, "created": unix_time_s(), "model": gateway.model_name},
            kind=kind,
            include_usage=include_usage,
            by_tier=by_tier,
            include_report=request.kvist is not None and request.kvist.report,
        )

    def event_ends(self, kind: str, choice_head: bytes) -> tuple[bytes, bytes]:
        """Bytes before and after what changes from event to event, which goes at the end of `choice_head`."""
        before = b"data: " + _json({**self.head, "object": kind})[:-1] + b',"choices":[' + choice_head
        return before, b"}]" + (b',"usage":null' if self.include_usage else b"") + b"}\n\n"

    def closing(self, kind: str, choices: Sequence[Choice]) -> bytes:
        last: dict[str, object] = {**self.head, "object": kind, "choices": []}
        if self.include_usage:
            last["usage"] = usage(choices, by_tier=self.by_tier)
        if self.include_report:
            last["kvist"] = report(choices)
        told = self.include_usage or self.include_report
        return (b"data: " + _json(last) + b"\n\n" if told else b"") + b"data: [DONE]\n\n"

    def whole(self, choices: Sequence[Choice], answers: list[dict[str, object]]) -> bytes:
        told = usage(choices, by_tier=self.by_tier)
        body = {**self.head, "object": self.kind, "choices": answers, "usage": told}
        if self.include_report:
            body["kvist"] = report(choices)
        return _json(body)


class ChatFormat:
    _CHUNK = "chat.completion.chunk"

    def __init__(self, shape: _Shape, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._shape = shape
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._ends: dict[int, tuple[bytes, bytes, bytes]] = {}  # by choice: before, after, after plain text

    def event(self, choice: Choice, delta: Delta) -> bytes:
        ends = self._ends.get(choice.index)
        opening = b""
        if ends is None:
            before, after = self._shape.event_ends(self._CHUNK, b'{"index":%d,"delta":' % choice.index)
            ends = self._ends[choice.index] = (before, after, b'},"logprobs":null,"finish_reason":null' + after)
            role = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            opening = before + role + after
        before, after, after_text = ends
        if not delta.finished and not self._logprobs:
            return b"".join((opening, before, b'{"content":', _json(delta.text), after_text))
        rest: dict[str, object] = {"logprobs": None, "finish_reason": choice.finish_reason if delta.finished else None}
        if self._logprobs:
            rest["logprobs"] = {"content": chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs)}
        content = {"content": delta.text} if delta.text else {}
        return b"".join((opening, before, _json(content), b",", _json(rest)[1:-1], after))

    def closing(self, choices: Sequence[Choice]) -> bytes:
        return self._shape.closing(self._CHUNK, choices)

    def whole(self, choices: Sequence[Choice]) -> bytes:
        return self._shape.whole(choices, [self._answer(choice) for choice in choices])

    def _answer(self, choice: Choice) -> dict[str, object]:
        logprobs = None
        if self._logprobs:
            logprobs = {"content": chat_logprobs(self._tokenizer, choice.token_ids, choice.logprobs)}
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }


class _Untold:
    """Tokens of a stream with logprobs that no event has told. A token is told once its `text_offset` is certain: with
    the text before it, which may be withheld because a stop string may begin there."""

    def __init__(self) -> None:
        self._tokens: list[tuple[int, TokenLogprobs, int]] = []
        self._num_chars = 0  # told

    def add(self, delta: Delta) -> None:
        self._tokens.extend(zip(delta.token_ids, delta.logprobs, delta.text_offsets, strict=True))
        self._num_chars += len(delta.text)

    def take(self, *, finished: bool) -> tuple[list[int], list[TokenLogprobs], list[int]]:
        told, limit = self._tokens, self._num_chars
        if not finished:
            told = [token for token in self._tokens if token[2] <= limit]  # offsets never shrink
        self._tokens = self._tokens[len(told) :]
        return [token[0] for token in told], [token[1] for token in told], [min(token[2], limit) for token in told]


class CompletionFormat:
    def __init__(self, shape: _Shape, tokenizer: Tokenizer, *, logprobs: bool, token_ids: bool) -> None:
        self._shape = shape
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._only_text = not logprobs and not token_ids
        self._ends: dict[int, tuple[bytes, bytes, bytes]] = {}
        self._untold: dict[int, _Untold] = {}  # with logprobs

    def event(self, choice: Choice, delta: Delta) -> bytes:
        ends = self._ends.get(choice.index)
        first = ends is None
        if ends is None:
            before, after = self._shape.event_ends(self._shape.kind, b'{"index":%d,"text":' % choice.index)
            ends = self._ends[choice.index] = (before, after, b',"logprobs":null,"finish_reason":null' + after)
        before, after, after_text = ends
        if not delta.finished and self._only_text:
            return before + _json(delta.text) + after_text  # without text too: a token is told when it is there
        rest: dict[str, object] = {"logprobs": None, "finish_reason": choice.finish_reason if delta.finished else None}
        if self._logprobs:
            untold = self._untold.setdefault(choice.index, _Untold())
            untold.add(delta)
            rest["logprobs"] = completion_logprobs(self._tokenizer, *untold.take(finished=delta.finished))
        if self._token_ids:
            rest["token_ids"] = delta.token_ids
            if first:
                rest["prompt_token_ids"] = choice.request.prompt_token_ids
        return b"".join((before, _json(delta.text), b",", _json(rest)[1:-1], after))

    def closing(self, choices: Sequence[Choice]) -> bytes:
        return self._shape.closing(self._shape.kind, choices)

    def whole(self, choices: Sequence[Choice]) -> bytes:
        return self._shape.whole(choices, [self._answer(choice) for choice in choices])

    def _answer(self, choice: Choice) -> dict[str, object]:
        logprobs = None
        if self._logprobs:
            num_chars = len(choice.text)
            offsets = [min(offset, num_chars) for offset in choice.text_offsets]
            logprobs = completion_logprobs(self._tokenizer, choice.token_ids, choice.logprobs, offsets)
        answer: dict[str, object] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
        if self._token_ids:
            answer |= {"token_ids": choice.token_ids, "prompt_token_ids": choice.request.prompt_token_ids}
        return answer

"""Any server with OpenAI's API as a backend.

Chats go to /v1/chat/completions; a state without roles goes to /v1/completions. A message that has begun and not ended
is continued with `continue_final_message`, which vLLM, SGLang and Kvist know. The server renders the chat template, and
the prompts of one state are beginnings of one another wherever the template allows it. A select becomes one request
for each choice, for the log probabilities of the prompt (`prompt_logprobs`, as in vLLM).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from kvist.errors import EngineError, KvistError, Overloaded, RequestError, Unavailable, error_from_wire
from kvist.execution.argument_names import named
from kvist.execution.backend import GenerateRequest, Hints, Leased, Scored, ScoreRequest, prompt_fields, total
from kvist.execution.choices import ScoredChoice
from kvist.execution.results import Answer, Served
from kvist.execution.sampling import Sampling
from kvist.http_client import EventLines, HttpClient, HttpFailure, HttpReply, OnBody
from kvist.planning.fleet import Fleet, unknown_fleet
from kvist.planning.prompt import Prompt

_CHATS, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEUTRAL = Prompt("\n")  # the prompt of a likelihood without the prompt
_CONNECT_TIMEOUT_S = 10.0


class Http(Protocol):
    """The part of `HttpClient` that a server needs."""

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> HttpReply: ...

    def close(self) -> None: ...


class OpenAIServer:
    """Mutable (its connections); used in one event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        http: Http | None = None,
    ) -> None:
        """`timeout_s`: longest wait for the next bytes. `http`: in place of connections, for tests."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model, self._timeout_s = model, timeout_s
        self._http = http or HttpClient(self.url, api_key=api_key, connect_timeout_s=_CONNECT_TIMEOUT_S)

    async def fleet(self) -> Fleet:
        return unknown_fleet(self.url)

    async def generate(self, request: GenerateRequest, push: Callable[[str], None] | None) -> Answer:
        path, body = self._generation(request)
        with named(_arguments(request)):
            return await self._generate(request.sampling, path, body, push)

    async def _generate(
        self, sampling: Sampling, path: str, body: Mapping[str, object], push: Callable[[str], None] | None
    ) -> Answer:
        scores_prompt = sampling.logprob_start_len is not None
        patterns = [re.compile(pattern) for pattern in sampling.stop_patterns()]
        streams = bool(push or patterns) and not scores_prompt and (sampling.n or 1) == 1
        if patterns and not streams:
            raise RequestError("`stop_regex` needs one answer, and no logprobs of the prompt", param="stop_regex")
        if not streams:
            answer = await self._post(path, body)
            return self._answer(answer, sampling.logprob_start_len)
        return await self._stream(path, body, push or _ignore, patterns)

    def _generation(self, request: GenerateRequest) -> tuple[str, dict[str, object]]:
        path, body = self._prompt(request.prompt)
        sampling = request.sampling
        fields: dict[str, object] = {
            "model": self._model,
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "n": sampling.n,
            "stop": list(sampling.stops()) or None,
            "stop_token_ids": list(sampling.stop_token_ids) if sampling.stop_token_ids else None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "ignore_eos": sampling.ignore_eos or None,
            "seed": sampling.seed,
        }
        if sampling.return_logprob:
            top = sampling.top_logprobs_num or 0
            fields |= {"logprobs": True, "top_logprobs": top} if path == _CHATS else {"logprobs": top}
            fields["prompt_logprobs"] = top if sampling.logprob_start_len is not None else None
        if request.form == "regex":
            fields["structured_outputs"] = {"regex": request.form_source}
        elif request.form == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": json.loads(request.form_source)}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        body |= {name: value for name, value in fields.items() if value is not None}
        body |= self.hint_fields(request.hints)
        return path, body

    def hint_fields(self, hints: Hints) -> dict[str, object]:
        """Return the fields of a generation that carry the plan's hints; other servers refuse what they do not know."""
        del hints
        return {}

    def _prompt(self, prompt: Prompt) -> tuple[str, dict[str, object]]:
        path = _CHATS if prompt.is_chat else _COMPLETIONS
        return path, prompt_fields(prompt)

    async def score(self, request: ScoreRequest) -> Scored:
        """One request a choice, one after the other; without hints, which other servers do not know."""
        scored: list[ScoredChoice] = []
        served: list[Served] = []
        for choice in request.choices:
            with_choice = Prompt(request.prompt.outline + choice)
            token_ids, logprobs, figures = await self._prompt_logprobs(with_choice, choice)
            served.append(figures)
            unconditional: tuple[float, ...] = ()
            if request.unconditional:
                _, unconditional, figures = await self._prompt_logprobs(Prompt(NEUTRAL.outline + choice), choice)
                served.append(figures)
            scored.append(ScoredChoice(token_ids=token_ids, logprobs=logprobs, unconditional=unconditional))
        return Scored(choices=tuple(scored), served=total(served))

    async def _prompt_logprobs(self, prompt: Prompt, ending: str) -> tuple[tuple[int, ...], tuple[float, ...], Served]:
        """Return the tokens of `ending`, their log probabilities, and the request's figures. The first token of the
        ending may begin before it, where the tokenizer joins both."""
        path, body = self._prompt(prompt)
        body |= {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        if self._model is not None:
            body["model"] = self._model
        answer = await self._post(path, body)
        entries = answer.get("prompt_logprobs") or answer["choices"][0].get("prompt_logprobs")
        if not entries:
            raise RequestError(
                "this server returns no logprobs of a prompt, which select() needs: use gen() with a `regex` of the "
                "choices"
            )
        token_ids: list[int] = []
        logprobs: list[float] = []
        num_chars = 0
        for entry in reversed(entries):
            if num_chars >= len(ending) or not entry:
                break
            token_id, found = next(iter(entry.items()))
            token_ids.insert(0, int(token_id))
            logprobs.insert(0, float(found["logprob"]))
            num_chars += len(found.get("decoded_token") or "")
        return tuple(token_ids), tuple(logprobs), served_of(answer)

    async def prefill(self, prompt: Prompt, hints: Hints) -> Served:
        del prompt, hints
        raise AssertionError("a plan asks for no prefill that the fleet lacks")

    async def lease(self, prompt: Prompt, lease_id: str | None, ttl_s: float, hints: Hints) -> Leased | None:
        del prompt, lease_id, ttl_s, hints
        raise AssertionError("a plan asks for no lease that the fleet lacks")

    async def close(self) -> None:
        self._http.close()

    # -- HTTP

    async def _post(self, path: str, body: Mapping[str, object]) -> Any:
        return await self._whole("POST", path, msgspec.json.encode(body))

    async def _get(self, path: str) -> Any:
        return await self._whole("GET", path, b"")

    async def _delete(self, path: str) -> Any:
        return await self._whole("DELETE", path, b"")

    async def _whole(self, method: str, path: str, body: bytes) -> Any:
        pieces: list[bytes] = []
        reply = await self._send(method, path, body, lambda _, piece: pieces.append(piece))
        content = b"".join(pieces)
        _check(reply, content)
        return _decoded(content)

    async def _send(self, method: str, path: str, body: bytes, on_body: OnBody) -> HttpReply:
        """Return after the last piece. Raises `Unavailable`, and what `on_body` raises."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s) as limit:

                def on_piece(status: int, piece: bytes) -> None:
                    limit.reschedule(loop.time() + self._timeout_s)
                    on_body(status, piece)

                return await self._http.request(method, path, body, on_piece)
        except HttpFailure as error:
            raise Unavailable(f"{self.url} does not answer ({error}): check that it runs") from error
        except TimeoutError as error:
            problem = f"{self.url} has sent nothing for {self._timeout_s:g} s: check that it runs"
            raise Unavailable(problem) from error

    async def _stream(
        self,
        path: str,
        body: Mapping[str, object],
        push: Callable[[str], None],
        patterns: list[re.Pattern[str]],
    ) -> Answer:
        reading = _Reading(push, patterns)
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            reply = await self._send("POST", path, msgspec.json.encode(streamed), reading.feed)
            _check(reply, bytes(reading.refusal))
        except _Ended:
            pass  # the connection is closed, which ends the request on the server
        return reading.answer(self.url)

    def _answer(self, answer: Any, logprob_start: int | None) -> Answer:
        choices = sorted(answer["choices"], key=lambda one: one["index"])
        texts = tuple((one["message"]["content"] if "message" in one else one["text"]) or "" for one in choices)
        meta: dict[str, object] = {"finish_reason": choices[0].get("finish_reason")}
        if choices[0].get("logprobs"):
            meta["logprobs"] = choices[0]["logprobs"]
        if logprob_start is not None:
            scored = answer.get("prompt_logprobs") or choices[0].get("prompt_logprobs") or []
            meta["input_token_logprobs"] = scored[max(logprob_start, 0) :] if logprob_start != -1 else scored[-1:]
        return Answer(texts=texts, served=served_of(answer), meta=meta | _figures(answer))


def _arguments(request: GenerateRequest) -> dict[str, str]:
    """Return the argument of the program for each field of `_generation` that has another name."""
    form = request.form_argument or request.form
    top = "top_logprobs_num" if request.sampling.top_logprobs_num is not None else "return_logprob"
    fields = {"response_format": form, "structured_outputs": form} if form else {}
    return fields | {"logprobs": top, "top_logprobs": top, "prompt_logprobs": "logprob_start_len"}


class _Ended(Exception):
    """Raised to end a stream whose rest is not needed."""


class _Reading:
    """The state of one streamed answer. Mutable; `feed` gets the pieces of the body."""

    def __init__(self, push: Callable[[str], None], patterns: list[re.Pattern[str]]) -> None:
        self.refusal = bytearray()  # the body of a response that is an error
        self._push, self._patterns = push, patterns
        self._events = EventLines()
        self._text = ""
        self._finish_reason: str | None = None
        self._usage: dict[str, object] = {}
        self._report: object = None
        self._logprobs: list[object] = []

    def feed(self, status: int, piece: bytes) -> None:
        """Raises `_Ended` where a pattern ends the answer, and the error of an event that is one."""
        if status != HTTPStatus.OK:
            self.refusal += piece
            return
        for _, content in self._events.feed(piece):
            if content != b"[DONE]":
                self._take(_decoded(content))

    def _take(self, event: Any) -> None:
        if "error" in event:
            raise _error_of(event, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._usage = event.get("usage") or self._usage
        self._report = event.get("kvist") or self._report
        if not event.get("choices"):
            return
        choice = event["choices"][0]
        piece = (choice["delta"].get("content") if "delta" in choice else choice.get("text")) or ""
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._logprobs += [choice["logprobs"]] if choice.get("logprobs") else []
        num_old = len(self._text)
        self._text += piece
        end = _first_end(self._text, num_old, self._patterns)
        if end is not None:
            self._text, self._finish_reason = self._text[:end], "stop"
            raise _Ended
        if piece and not self._patterns:
            self._push(piece)

    def answer(self, url: str) -> Answer:
        """Raises `Unavailable` for a stream that ended early."""
        if self._finish_reason is None:
            raise Unavailable(f"{url} ended the stream before the answer was complete")
        meta: dict[str, object] = {"finish_reason": self._finish_reason}
        if self._logprobs:
            meta["logprobs"] = self._logprobs
        whole = {"usage": self._usage, "kvist": self._report}
        return Answer(texts=(self._text,), served=served_of(whole), meta=meta | _figures(whole))


def _first_end(text: str, num_old: int, patterns: list[re.Pattern[str]]) -> int | None:
    """Return where the first match begins in the shortest beginning of `text` that has a match: so the end does not
    depend on how the text was cut into pieces."""
    for length in range(num_old + 1, len(text) + 1) if patterns else ():
        starts = [found.start() for pattern in patterns if (found := pattern.search(text, 0, length))]
        if starts:
            return min(starts)
    return None


def _ignore(piece: str) -> None:
    del piece


def _decoded(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise EngineError(f"the server's answer is not JSON: {content[:200]!r}") from error


def _check(reply: HttpReply, content: bytes) -> None:
    """Raise the server's error as a `KvistError`."""
    if reply.status == HTTPStatus.OK:
        return
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        body = {"error": {"message": content[:200].decode(errors="replace")}}
    error = _error_of(body, reply.status)
    retry_after = reply.headers.get("retry-after", "")
    error.retry_after_s = float(retry_after) if retry_after.isdigit() else None
    raise error


def _error_of(body: Any, status: int) -> KvistError:
    described = body.get("error") if isinstance(body, dict) else None
    described = described if isinstance(described, dict) else {"message": str(described or body)}
    message, code = str(described.get("message")), str(described.get("code"))
    found = error_from_wire(code, message)
    if type(found) is not EngineError or code == EngineError.code:
        found.param = described.get("param")
        return found
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Overloaded(message)
    if status in (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT):
        return Unavailable(message)
    return RequestError(message) if 400 <= status < 500 else EngineError(f"{message} (status {status})")


def served_of(answer: Mapping[str, Any]) -> Served:
    """Return the figures of an answer; what the server does not report is 0 or None."""
    usage = answer.get("usage") or {}
    report = answer.get("kvist") or {}
    return Served(
        num_prompt_tokens=usage.get("prompt_tokens") or 0,
        num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        num_output_tokens=usage.get("completion_tokens") or 0,
        prefill_worker=report.get("prefill_worker"),
        decode_worker=report.get("decode_worker"),
    )


def _figures(answer: Mapping[str, Any]) -> dict[str, object]:
    served = served_of(answer)
    return {
        "prompt_tokens": served.num_prompt_tokens,
        "cached_tokens": served.num_cached_tokens,
        "completion_tokens": served.num_output_tokens,
    }

"""Reads the fields that ask for logprobs, which have other names and forms at each endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.api.schemas import ChatRequest, CompletionRequest, NativeRequest
from kvist.checking.sampling import check_num_logprobs, check_token_ids
from kvist.errors import RequestError

MAX_KEPT_LOGPROBS = 1 << 20  # per request: about 150 MB, as numbers and then as JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedLogprobs:
    """The logprobs that a request asks for. A number counts the likeliest tokens beside each; None: no logprobs."""

    num_output: int | None = None
    num_prompt: int | None = None
    prompt_start: int = 1  # first scored position of the prompt; the token at position 0 has no logprob
    token_ids: tuple[int, ...] = ()  # reported, too, at every position
    prompt_param: str = "prompt_logprobs"  # the field that asks for the prompt's logprobs, for errors

    def num_prompt_logprobs(self, num_prompt_tokens: int) -> int:
        """Return the number of logprobs of one prompt, the likeliest tokens included."""
        if self.num_prompt is None:
            return 0
        return max(0, num_prompt_tokens - self.prompt_start) * (1 + self.num_prompt + len(self.token_ids))

    def params(self) -> dict[str, object]:
        """Return the values of `SamplingParams`, without those that ask for nothing."""
        found: dict[str, object] = {} if self.num_output is None else {"num_logprobs": self.num_output}
        if self.num_prompt is not None:
            found |= {"prompt_logprobs": self.num_prompt, "prompt_logprobs_start": self.prompt_start}
        return found | ({"logprob_token_ids": self.token_ids} if self.token_ids else {})


def of_chat(request: ChatRequest, vocab_size: int) -> RequestedLogprobs:
    """Raises `RequestError`."""
    if request.top_logprobs and not request.logprobs:
        raise RequestError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    asked = _prompt_logprobs(request)
    return RequestedLogprobs(
        num_output=check_num_logprobs(request.top_logprobs or 0, "top_logprobs") if request.logprobs else None,
        num_prompt=asked,
        token_ids=_token_ids(request, vocab_size, has_logprobs=bool(request.logprobs) or asked is not None),
    )


def of_completion(request: CompletionRequest, vocab_size: int) -> RequestedLogprobs:
    """With `echo`, `logprobs` asks for those of the prompt, too. Raises `RequestError`."""
    num_output, asked = check_num_logprobs(request.logprobs, "logprobs"), _prompt_logprobs(request)
    counts = [count for count in (asked, num_output if request.echo else None) if count is not None]
    return RequestedLogprobs(
        num_output=num_output,
        num_prompt=max(counts, default=None),
        token_ids=_token_ids(request, vocab_size, has_logprobs=num_output is not None or asked is not None),
        prompt_param="echo" if asked is None else "prompt_logprobs",
    )


def of_native(request: NativeRequest, prompts: Sequence[Sequence[int]], vocab_size: int) -> RequestedLogprobs:
    """Raises `RequestError`."""
    if not request.return_logprob:
        needy = {
            "top_logprobs_num": request.top_logprobs_num,
            "token_ids_logprob": request.token_ids_logprob,
            "logprob_start_len": request.logprob_start_len not in (None, -1),
        }
        for name in filter(needy.__getitem__, needy):
            raise RequestError(f"`{name}` needs `return_logprob` to be true", param=name)
        return RequestedLogprobs()
    count = check_num_logprobs(request.top_logprobs_num or 0, "top_logprobs_num")
    token_ids = request.token_ids_logprob or []
    check_token_ids(token_ids, vocab_size, "token_ids_logprob")
    start, shortest = request.logprob_start_len, min(map(len, prompts))
    if start is not None and not -1 <= start < shortest:
        message = f"must be -1 for the last token of the prompt, or 0 to {shortest - 1} for this prompt, not {start}"
        raise RequestError(f"`logprob_start_len` {message}", param="logprob_start_len")
    scored = start is not None and start >= 0
    return RequestedLogprobs(
        num_output=count,
        num_prompt=count if scored else None,
        prompt_start=1 if start is None else start + 1,  # the first token of the report has no logprob, as in SGLang
        token_ids=tuple(token_ids),
        prompt_param="logprob_start_len",
    )


def _prompt_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if request.prompt_logprobs is not None and request.stream:
        message = "`prompt_logprobs` cannot be streamed: set `stream` to false"
        raise RequestError(f"{message}, or use `echo` with `logprobs` of /v1/completions", param="prompt_logprobs")
    return check_num_logprobs(request.prompt_logprobs, "prompt_logprobs")


def _token_ids(request: ChatRequest | CompletionRequest, vocab_size: int, *, has_logprobs: bool) -> tuple[int, ...]:
    asked = request.logprob_token_ids or []
    if asked and not has_logprobs:
        raise RequestError("`logprob_token_ids` needs `logprobs` or `prompt_logprobs`", param="logprob_token_ids")
    check_token_ids(asked, vocab_size, "logprob_token_ids")
    return tuple(dict.fromkeys(asked))

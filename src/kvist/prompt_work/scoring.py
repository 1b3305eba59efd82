"""POST /v1/continuations/score: the logprobs of several continuations of one prompt.

    prompt + continuations → rows (continuations.py) → one group of engine requests on one worker → logprobs

The rows of a group share the pages of the prompt: these are computed once, and stay cached. If they are cached before,
all rows are scored in one step. A prefill or unified worker scores; nothing is generated. Scores of texts by other
kinds of models, which vLLM and SGLang offer as /score and /v1/score, are something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from starlette.types import Receive, Scope, Send

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import MAX_CONTINUATION_TOKENS, ScoreRequest
from kvist.checking.sampling import check_token_ids
from kvist.clock import unix_time_s
from kvist.errors import RequestError
from kvist.http.asgi import JSON_TYPE, Headers, send_bytes
from kvist.http.caller import Caller, caller_of
from kvist.prompt_work.continuations import ScorePlan, TokenIds, continuation_token_ids, tail_of
from kvist.prompt_work.prompts import (
    PROMPT_ALONE,
    check_fits,
    computed_and_cached,
    prompt_choice,
    prompt_token_ids,
    usage,
)
from kvist.server.gateway import MAX_CHARS_PER_TOKEN, GatewayContext
from kvist.server.generation import ChoiceState
from kvist.server.jobs import new_job_id
from kvist.server.logprobs import finite
from kvist.server.respond import compute, written
from kvist.server.routing_fields import Routing, checked_routing
from kvist.text import Tokenizer

_SCORE = BodyDecoder(ScoreRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Continuations after one prefix, and the engine requests that score them."""

    num_before: int  # tokens of the prefix; 0: a continuation's own first token is not scored
    plan: ScorePlan
    choices: Sequence[ChoiceState]

    def logprobs(self, continuation: TokenIds) -> list[float | None]:
        if not self.num_before and len(continuation) == 1:
            return [None]
        found = self.plan.logprobs(continuation, [choice.prompt_logprobs for choice in self.choices])
        known: list[float | None] = [finite(each) for each in found]
        return known if self.num_before else [None, *known]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    job_id: str
    num_prompt_tokens: int
    continuations: Sequence[TokenIds]
    scored: _Scored
    unconditional: _Scored | None
    headers: Headers

    @property
    def choices(self) -> list[ChoiceState]:
        return [*self.scored.choices, *(() if self.unconditional is None else self.unconditional.choices)]


class Scoring:
    """`score` is the endpoint, raw ASGI."""

    def __init__(self, gateway: GatewayContext) -> None:
        self._gateway = gateway

    async def score(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        gateway.lifecycle.check()
        work = await gateway.prepare(scope, receive, partial(self._work, caller_of(scope)))
        await compute(gateway, work.choices, scope, receive)
        answer = await written(gateway, work.choices, partial(_answer, gateway.model_name, work))
        await send_bytes(send, answer, headers=[JSON_TYPE, *work.headers])

    def _work(self, caller: Caller, body: bytes) -> _Work:
        gateway = self._gateway
        tokenizer = gateway.require_tokenizer()
        request, headers = _SCORE.decode(body)
        gateway.check_model(request.model)
        most = gateway.config.max_choices
        if len(request.continuations) > most:
            message = f"`continuations` has {len(request.continuations)} texts or lists; the limit is {most}"
            raise RequestError(f"{message} (--max-choices)", param="continuations")
        routing, headers = checked_routing(gateway, caller, request, headers)
        prompt_ids = prompt_token_ids(gateway, request, routing.salt)
        continuations = self._continuations(request, tokenizer, prompt_ids)
        job_id = new_job_id("score")
        rows = _Rows(gateway=gateway, caller=caller, routing=routing, group=job_id)
        scored = rows.scored(prompt_ids, continuations, f"{job_id}-")
        without = None
        if request.unconditional:
            without = rows.scored(start_token_ids(tokenizer), continuations, f"{job_id}-unconditional-")
        return _Work(
            job_id=job_id,
            num_prompt_tokens=len(prompt_ids),
            continuations=continuations,
            scored=scored,
            unconditional=without,
            headers=headers,
        )

    def _continuations(self, request: ScoreRequest, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[TokenIds]:
        """Return the token ids of each continuation. Raises `RequestError`, and `PromptTooLong`."""
        vocab_size, encode = self._gateway.vocab_size(), partial(tokenizer.encode, add_special_tokens=False)
        tail = tokenizer.decode(tail_of(prompt_ids), skip_special_tokens=False)
        found: list[TokenIds] = []
        for index, each in enumerate(request.continuations):
            param = f"continuations[{index}]"
            if isinstance(each, str) and len(each) > MAX_CONTINUATION_TOKENS * MAX_CHARS_PER_TOKEN:
                raise RequestError(f"`{param}` has {len(each)} characters, which is too long", param=param)
            token_ids = continuation_token_ids(encode, tail, each) if isinstance(each, str) else each
            if not 0 < len(token_ids) <= MAX_CONTINUATION_TOKENS:
                rule = f"must have 1 to {MAX_CONTINUATION_TOKENS} tokens, not {len(token_ids)}"
                raise RequestError(f"`{param}` {rule}", param=param)
            check_token_ids(token_ids, vocab_size, param)
            check_fits(self._gateway, len(prompt_ids) + len(token_ids), param)
            found.append(tuple(token_ids))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Makes the engine requests of one job."""

    gateway: GatewayContext
    caller: Caller
    routing: Routing
    group: str

    def scored(self, prefix: Sequence[int], continuations: Sequence[TokenIds], request_ids: str) -> _Scored:
        plan = ScorePlan.of(continuations) if prefix else ScorePlan.without_prefix(continuations)
        self.gateway.check_job_tokens(sum(len(prefix) + len(row) for row in plan.rows), "continuations")
        choices = [
            prompt_choice(
                self.gateway,
                self.caller,
                self.routing,
                (*prefix, *row),
                request_id=f"{request_ids}{index}",
                sampling=msgspec.structs.replace(
                    PROMPT_ALONE,
                    prompt_logprobs=0,
                    prompt_logprobs_start=max(1, len(prefix)),
                    logprob_token_ids=plan.beside if index == 0 else (),
                ),
                index=index,
                group=self.group,
                num_shared_tokens=max(1, len(prefix)),
            )
            for index, row in enumerate(plan.rows)
        ]
        return _Scored(num_before=len(prefix), plan=plan, choices=choices)


def start_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts before a text; most tokenizers put one, or none."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=adds) for adds in (False, True))
    return whole[: whole.index(bare[0])]


def _answer(model_name: str, work: _Work) -> bytes:
    answer = {
        "id": work.job_id,
        "object": "continuations.score",
        "created": unix_time_s(),
        "model": model_name,
        "results": [_result(work, index) for index in range(len(work.continuations))],
        **computed_and_cached(work.choices),
        "usage": usage(work.num_prompt_tokens + sum(map(len, work.continuations)), work.choices),
    }
    return msgspec.json.encode(answer)


def _result(work: _Work, index: int) -> dict[str, object]:
    continuation = work.continuations[index]
    logprobs = work.scored.logprobs(continuation)
    result: dict[str, object] = {
        "index": index,
        "token_ids": continuation,
        "logprobs": logprobs,
        "logprob": sum(each for each in logprobs if each is not None),
    }
    if work.unconditional is not None:
        result["unconditional_logprobs"] = work.unconditional.logprobs(continuation)
    return result

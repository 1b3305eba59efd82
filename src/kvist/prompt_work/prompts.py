"""Reads the prompt of a request that is not answered, and makes engine requests without output tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvist.api.schemas import PromptRequest
from kvist.checking.sampling import check_token_ids, output_limit
from kvist.checking.tools import offered_tools
from kvist.errors import RequestError
from kvist.http.asgi import Headers
from kvist.http.caller import Caller
from kvist.request import EngineRequest, LeaseTerms, RequestId, SamplingParams
from kvist.router.placement import Placement
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState
from kvist.server.jobs import new_job_id
from kvist.server.routing_fields import Routing, checked_routing

PROMPT_ALONE = SamplingParams(max_tokens=0, temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptWork:
    """One prompt to compute, and the headers of the answer."""

    job_id: str
    num_prompt_tokens: int  # of the whole prompt; `choice` computes those that can stay cached
    choice: ChoiceState
    headers: Headers


def prompt_work(
    gateway: GatewayContext,
    caller: Caller,
    request: PromptRequest,
    headers: Headers,
    *,
    kind: str,
    background: bool = False,
    lease: LeaseTerms | None = None,
) -> PromptWork:
    """Return the work of a request for one prompt. `kind`: the beginning of its job id; `background`: after all other
    work; `lease`: see `EngineRequest`. Raises `RequestError` and `PromptTooLong`."""
    gateway.check_model(request.model)
    routing, headers = checked_routing(gateway, caller, request, headers)
    routing = replace(routing, background=background)
    token_ids, job_id = prompt_token_ids(gateway, request, routing.salt), new_job_id(kind)
    kept = token_ids[: _num_worth_computing(gateway, len(token_ids))]
    choice = prompt_choice(gateway, caller, routing, kept, request_id=f"{job_id}-0", lease=lease)
    return PromptWork(job_id=job_id, num_prompt_tokens=len(token_ids), choice=choice, headers=headers)


def _num_worth_computing(gateway: GatewayContext, num_tokens: int) -> int:
    """Return the tokens of the whole pages, which stay cached, and one more: a request computes its last token in any
    case, and would compute the last page again for it."""
    spec = gateway.dispatcher.model()
    if spec is None or num_tokens < spec.page_size:
        return num_tokens
    return min(num_tokens, num_tokens // spec.page_size * spec.page_size + 1)


def prompt_token_ids(gateway: GatewayContext, request: PromptRequest, salt: str) -> list[int]:
    """Return the token ids of `prompt` or of `messages`. Raises `RequestError` and `PromptTooLong`."""
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("set exactly one of `prompt` and `messages`", param="prompt")
    param = "prompt" if request.messages is None else "messages"
    adds = request.add_special_tokens
    if request.messages is not None:
        text = gateway.chat_prompt(request.messages, request, offered_tools(request, gateway.require_tokenizer()))
        token_ids = gateway.encode(text, add_special_tokens=bool(adds), param=param, salt=salt)
    elif isinstance(request.prompt, str):
        token_ids = gateway.encode(request.prompt, add_special_tokens=adds is not False, param=param, salt=salt)
    else:
        token_ids = request.prompt or []
        check_token_ids(token_ids, gateway.vocab_size(), param)
    check_fits(gateway, len(token_ids), param)
    return token_ids


def check_fits(gateway: GatewayContext, num_tokens: int, param: str) -> None:
    """Raise `RequestError` for no tokens, and `PromptTooLong` for more than the workers can hold."""
    output_limit(num_tokens, gateway.limit(), asked=0, default=None, param=param, prompt=param, least=0)


def prompt_choice(
    gateway: GatewayContext,
    caller: Caller,
    routing: Routing,
    token_ids: Sequence[int],
    *,
    request_id: str,
    sampling: SamplingParams = PROMPT_ALONE,
    index: int = 0,
    group: str = "",
    num_shared_tokens: int = 0,
    lease: LeaseTerms | None = None,
) -> ChoiceState:
    """Return the state of an engine request for these tokens. `group`: see `Placement`; `num_shared_tokens` and
    `lease`: see `EngineRequest`."""
    request = EngineRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(token_ids),
        sampling=sampling,
        cache_salt=routing.salt,
        priority=routing.priority,
        client=caller.tag,
        background=routing.background,
        num_shared_tokens=num_shared_tokens,
        lease=lease,
    )
    placement: Placement = replace(routing.placement, group=group)
    tokenizer = gateway.require_tokenizer()
    return ChoiceState(request, index=index, repeats_prompt=index > 0, tokenizer=tokenizer, placement=placement)


def computed_and_cached(choices: Sequence[ChoiceState]) -> dict[str, object]:
    """Return which worker computed the prompt, and how many of its tokens were cached there before, by tier.
    `computed_tokens` counts the tokens of all engine requests."""
    first = choices[0]
    num_tokens = sum(choice.request.num_prompt_tokens - choice.num_cached_tokens for choice in choices)
    return {"worker": first.prefill_worker, "cached_tokens": first.cached_by_tier, "computed_tokens": num_tokens}


def usage(num_prompt: int, choices: Sequence[ChoiceState]) -> dict[str, object]:
    """Return OpenAI's `usage` for a prompt without an answer."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": 0,
        "total_tokens": num_prompt,
        "prompt_tokens_details": {"cached_tokens": choices[0].num_cached_tokens},
    }

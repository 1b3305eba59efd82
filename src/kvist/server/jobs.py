"""Turns prompts and checked settings into the engine requests of one job."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from kvist.api.schemas import SamplingFields
from kvist.checking.constraints import RequestedConstraint
from kvist.checking.requested_logprobs import MAX_KEPT_LOGPROBS, RequestedLogprobs
from kvist.checking.sampling import (
    MAX_SEED,
    FieldNames,
    num_choices,
    sampling_params,
    stop_ids,
    stop_strings,
)
from kvist.checking.shaping import shaping
from kvist.errors import RequestError
from kvist.http.caller import Caller
from kvist.request import EngineRequest, RequestId, SamplingParams
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState
from kvist.server.routing_fields import Routing
from kvist.text import SamplingDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompt:
    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    caller: Caller
    job_id: str
    prompts: Sequence[TokenizedPrompt]
    fields: SamplingFields
    names: FieldNames
    seed: int | None  # of the first answer to each prompt; each further answer has the next seed. None: drawn at random
    routing: Routing
    min_tokens: int | None
    logprobs: RequestedLogprobs
    constraint: RequestedConstraint | None = None
    defaults: SamplingDefaults  # for fields that the request does not set
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    shown_special: Collection[str] = ()  # special tokens that the text of an answer has in any case
    keeps_logprobs: bool = True  # until the end of the answer; False for a stream that sends each logprob once


def new_job_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def make_choices(gateway: GatewayContext, spec: JobSpec) -> list[ChoiceState]:
    """Return the choices in the order of OpenAI's `index`: all answers to the first prompt, then to the second.
    Raises `RequestError` for an invalid field."""
    names = spec.names
    num_repeats = num_choices(spec.fields.n, len(spec.prompts), gateway.config.max_choices, names)
    gateway.check_job_tokens(num_repeats * sum(len(prompt.token_ids) for prompt in spec.prompts), names.inside + "n")
    tokenizer, stops = gateway.require_tokenizer(), stop_strings(spec.fields.stop, names)
    max_kept_logprobs = _max_kept_logprobs(spec, num_repeats)
    first_seed = gateway.draw_seed() if spec.seed is None else spec.seed
    choices: list[ChoiceState] = []
    for prompt, sampling in zip(spec.prompts, _samplings(gateway, spec), strict=True):
        for repeat in range(num_repeats):
            index = len(choices)
            request = EngineRequest(
                request_id=RequestId(f"{spec.job_id}-{index}"),
                prompt_token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(sampling, seed=(first_seed + repeat) % MAX_SEED),
                cache_salt=spec.routing.salt,
                priority=spec.routing.priority,
                client=spec.caller.tag,
            )
            choice = ChoiceState(
                request,
                placement=spec.routing.placement,
                index=index,
                repeats_prompt=repeat > 0,
                tokenizer=tokenizer,
                stops=stops,
                skip_special_tokens=spec.skip_special_tokens,
                include_stop_str_in_output=spec.include_stop_str_in_output,
                max_kept_logprobs=max_kept_logprobs,
                shown_special=spec.shown_special,
            )
            choices.append(choice)
    return choices


def _samplings(gateway: GatewayContext, spec: JobSpec) -> list[SamplingParams]:
    """Return the sampling parameters of each prompt, without the seed."""
    names, vocab_size, min_tokens = spec.names, gateway.vocab_size(), spec.min_tokens or 0
    stop_token_ids = stop_ids(spec.fields, vocab_size, names)
    tokenizer, suppressed = gateway.require_tokenizer(), stop_token_ids if min_tokens else ()
    changes = shaping(
        spec.fields,
        tokenizer,
        defaults=spec.defaults,
        vocab_size=vocab_size,
        stop_token_ids=suppressed,
        names=names,
    )
    changes |= spec.logprobs.params()
    if spec.constraint is not None:
        changes["constraint"] = spec.constraint.constraint
    samplings = [
        sampling_params(
            spec.fields,
            names=names,
            defaults=spec.defaults,
            max_tokens=prompt.max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
        )
        for prompt in spec.prompts
    ]
    return [msgspec.structs.replace(each, **changes) for each in samplings] if changes else samplings


def _max_kept_logprobs(spec: JobSpec, num_repeats: int) -> int:
    """Return how many logprobs of its answer a choice may keep. Raises `RequestError` when the prompts alone have too
    many logprobs."""
    num_prompt_logprobs = num_repeats * sum(spec.logprobs.num_prompt_logprobs(len(p.token_ids)) for p in spec.prompts)
    if num_prompt_logprobs > MAX_KEPT_LOGPROBS:
        raise RequestError(
            f"the prompts of this request, counted once for each answer, have {num_prompt_logprobs} logprobs; the "
            f"limit is {MAX_KEPT_LOGPROBS}: ask for fewer top logprobs, or send shorter or fewer prompts",
            param=spec.logprobs.prompt_param,
        )
    if not spec.keeps_logprobs:
        return 0
    return (MAX_KEPT_LOGPROBS - num_prompt_logprobs) // (num_repeats * len(spec.prompts))

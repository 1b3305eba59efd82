"""Prompts and checked settings → the engine requests of one job."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.request import EngineRequest, RequestId, SamplingParams
from kvist.server.generation import Choice
from kvist.server.sampling import MAX_SEED
from kvist.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    job_id: str
    prompts: Sequence[Prompt]
    num_choices: int  # for each prompt
    seed: int  # of the first answer to each prompt; the next ones count up
    cache_salt: str
    stops: tuple[str, ...]
    sampling: Callable[[int, int], SamplingParams]  # (max_tokens, seed) → params
    skip_special_tokens: bool = True


def new_job_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def make_choices(plan: Plan, tokenizer: Tokenizer) -> list[Choice]:
    """Answers in the order of OpenAI's `index`: all of the first prompt, then all of the second."""
    choices: list[Choice] = []
    for prompt_index, prompt in enumerate(plan.prompts):
        for repeat in range(plan.num_choices):
            index = len(choices)
            request = EngineRequest(
                request_id=RequestId(f"{plan.job_id}-{index}"),
                prompt_token_ids=prompt.token_ids,
                sampling=plan.sampling(prompt.max_tokens, (plan.seed + repeat) % MAX_SEED),
                cache_salt=plan.cache_salt,
            )
            choice = Choice(
                request,
                index=index,
                prompt_index=prompt_index,
                repeats_prompt=repeat > 0,
                tokenizer=tokenizer,
                stops=plan.stops,
                skip_special_tokens=plan.skip_special_tokens,
            )
            choices.append(choice)
    return choices

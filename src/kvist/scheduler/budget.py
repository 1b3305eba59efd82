"""Chooses how many tokens a step computes, from the number of running streams and of waiting prompt tokens.

Every stream waits for the prompt tokens that its step computes beside it. Small steps keep that wait short, and carry
the streams nearly for free, since a GPU reads its weights only once for a step of 512 tokens; but in small steps a
prompt pays the fixed cost of a step more often. As a rule a step takes `chunked_prefill_size` tokens. A step takes
more, up to `max_prefill_tokens`

- when few streams run: streams x tokens is bounded by `_STREAMS_PER_USUAL_STEP` x `chunked_prefill_size`;
- when many prompt tokens wait: a step takes a `_BACKLOG_STEPS`th of them, so that the prompts of a burst are not
  slowed down for the sake of streams that the burst has yet to become.

docs/performance.md has the gain of each rule.
"""

from __future__ import annotations

from kvist.request import SamplingParams
from kvist.scheduler.config import SchedulerConfig

_STREAMS_PER_USUAL_STEP = 16  # with fewer streams a step is larger than the usual one
_BACKLOG_STEPS = 16
_ROUND_TO = 128  # tokens: the tile size of a GPU's matrix products
_TAIL_FRACTION = 8  # a rest of up to 1/8 of a step is added to this step, not left to the next

# Logprobs of prompts in one step, the likeliest tokens included: bounds a step's messages (to 0.5 MB) and the time that
# other streams wait for them.
MAX_STEP_LOGPROBS = 1 << 15


def step_tokens(config: SchedulerConfig, *, num_decodes: int, backlog_tokens: int) -> int:
    """Return the size of a step, its `num_decodes` decodes included. `backlog_tokens` are the tokens of running and
    waiting prompts that are not computed yet."""
    usual, most = config.chunked_prefill_size, config.max_prefill_tokens
    by_streams = _STREAMS_PER_USUAL_STEP * usual // max(1, num_decodes)
    wanted = max(by_streams, backlog_tokens // _BACKLOG_STEPS) // _ROUND_TO * _ROUND_TO
    # the last term leaves tokens for prompts beside hundreds of decodes
    return min(most, max(usual, wanted, num_decodes + max(1, usual // 4)))


def chunk_tokens(left: int, budget: int, step: int, most: int) -> int:
    """Return how many of the `left` uncomputed tokens of a prompt a step of `step` tokens computes when `budget` of
    them are free. A prompt that is only slightly longer than the budget is finished, so that it needs no further step;
    `most` is the limit of a step."""
    return left if left <= budget + min(budget, step // _TAIL_FRACTION, most - step) else budget


def num_logprobs_of(sampling: SamplingParams) -> int:
    """Return the number of logprobs that one scored token of the prompt has."""
    return 1 + (sampling.prompt_logprobs or 0) + len(sampling.logprob_token_ids)

"""Chooses how many tokens a step computes, from the number of running streams and of waiting prompt tokens.

Every stream waits for the prompt tokens in its step. In small steps this wait is short, and the streams take almost no
extra time, since a GPU reads its weights once per step. But small steps divide a prompt into more steps, and each step
has a fixed cost. As a rule a step takes `chunked_prefill_size` tokens. A step takes more, up to `max_prefill_tokens`,

- when few streams run: streams x tokens is bounded by `_STREAMS_PER_USUAL_STEP` x `chunked_prefill_size`;
- when many prompt tokens wait: a step takes a `_BACKLOG_STEPS`th of them, so that a burst of prompts is not slowed down
  in favour of streams that do not exist yet.

docs/performance.md has the gain of each rule.
"""

from __future__ import annotations

from kvist.request import SamplingParams
from kvist.scheduler.config import SchedulerConfig

_STREAMS_PER_USUAL_STEP = 16  # with fewer streams a step is larger than the usual one
_BACKLOG_STEPS = 16
_ROUND_TO = 128  # tokens: the tile size of a GPU's matrix products
_TAIL_FRACTION = 8  # a remainder of up to 1/8 of a step is added to this step, not left for the next

# Logprobs of prompts in one step, those of the most likely tokens included. Bounds the messages of a step (to 0.5 MB),
# and the time that other streams wait for the step.
MAX_STEP_LOGPROBS = 1 << 15


def step_tokens(config: SchedulerConfig, *, num_decodes: int, backlog_tokens: int) -> int:
    """Return the size of a step in tokens, its `num_decodes` decodes included. `backlog_tokens`: the number of tokens
    of running and waiting prompts that are not computed yet."""
    usual, most = config.chunked_prefill_size, config.max_prefill_tokens
    by_streams = _STREAMS_PER_USUAL_STEP * usual // max(1, num_decodes)
    wanted = max(by_streams, backlog_tokens // _BACKLOG_STEPS) // _ROUND_TO * _ROUND_TO
    # the last term leaves tokens for prompts beside hundreds of decodes
    return min(most, max(usual, wanted, num_decodes + max(1, usual // 4)))


def chunk_tokens(left: int, budget: int, step: int, most: int) -> int:
    """Return how many of the `left` uncomputed tokens of a prompt are computed in a step of `step` tokens, of which
    `budget` are free. A prompt that is only slightly longer than the budget is finished, so that it needs no further
    step; `most` is the limit of a step."""
    return left if left <= budget + min(budget, step // _TAIL_FRACTION, most - step) else budget


def num_logprobs_of(sampling: SamplingParams) -> int:
    """Return the number of logprobs reported for each scored token of the prompt."""
    return 1 + (sampling.prompt_logprobs or 0) + len(sampling.logprob_token_ids)

"""How many tokens a step takes: what streams wait for, against what prompts wait for.

Every stream waits for the prompt tokens that its step computes beside it. Small steps keep that short, and carry the
streams along nearly for free, since a GPU reads its weights for a step of 512 tokens only once; but prompts pay each
step's fixed cost more often. So a step takes `chunked_prefill_size` tokens as a rule, and up to `max_prefill_tokens`

- when few streams wait for them: the product of streams and tokens is bounded, at `_PATIENCE` usual steps;
- when many prompts wait: a `_BACKLOG_STEPS`th of their tokens, so that a burst does not pay for the streams it has yet
  to become.

docs/performance.md has what each rule brings.
"""

from __future__ import annotations

from kvist.scheduler.config import SchedulerConfig

_PATIENCE = 16  # streams that wait for a step of the usual size; with fewer of them, the step is larger
_BACKLOG_STEPS = 16
_ROUND_TO = 128  # tokens; the tiles of a GPU's matrix products
_TAIL = 8  # an eighth of a step is not worth a step of its own


def step_tokens(config: SchedulerConfig, *, num_decodes: int, backlog_tokens: int) -> int:
    """The budget of a step that has so many decodes already, they included. `backlog_tokens`: of prompts that run or
    wait, not computed yet."""
    usual, most = config.chunked_prefill_size, config.max_prefill_tokens
    patient = _PATIENCE * usual // max(1, num_decodes)
    wanted = max(patient, backlog_tokens // _BACKLOG_STEPS) // _ROUND_TO * _ROUND_TO
    # with hundreds of decodes, too, prompts get on
    return min(most, max(usual, wanted, num_decodes + max(1, usual // 4)))


def chunk_tokens(left: int, budget: int, step: int, most: int) -> int:
    """Tokens of a prompt, of which `left` are not computed yet, in a step of `step` tokens that has `budget` to give.
    A little more than the budget ends the prompt, rather than leave that little to another step."""
    return left if left <= budget + min(budget, step // _TAIL, most - step) else budget

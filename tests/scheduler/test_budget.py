"""The token budget of a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvist.scheduler import SchedulerConfig
from kvist.scheduler.budget import chunk_tokens, step_tokens

CONFIG = SchedulerConfig(max_running_requests=256, chunked_prefill_size=512, max_prefill_tokens=2048)


def tokens(num_decodes: int, backlog_tokens: int) -> int:
    return step_tokens(CONFIG, num_decodes=num_decodes, backlog_tokens=backlog_tokens)


def test_a_step_has_the_usual_size_when_many_streams_run() -> None:
    assert tokens(num_decodes=20, backlog_tokens=4000) == 512


def test_a_step_is_larger_when_fewer_streams_run() -> None:
    sizes = [tokens(num_decodes, 4000) for num_decodes in (0, 4, 8, 12, 16)]
    assert sizes == [2048, 2048, 1024, 640, 512]


def test_a_burst_of_prompts_enlarges_steps_for_any_number_of_streams() -> None:
    assert tokens(num_decodes=100, backlog_tokens=20_000) == 1152
    assert tokens(num_decodes=100, backlog_tokens=200_000) == 2048


def test_a_step_leaves_tokens_for_prompts_when_decodes_exceed_the_usual_size() -> None:
    assert tokens(num_decodes=500, backlog_tokens=100) > 500


def test_a_chunk_slightly_above_the_budget_finishes_the_prompt() -> None:
    assert chunk_tokens(left=550, budget=500, step=512, most=2048) == 550
    assert chunk_tokens(left=600, budget=500, step=512, most=2048) == 500
    assert chunk_tokens(left=40, budget=10, step=512, most=2048) == 10, "a chunk is at most twice the budget"


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(0, 256), st.integers(0, 10**6), st.integers(1, 10**5))
def test_no_step_exceeds_the_limit_and_every_step_has_tokens_for_prompts(
    usual: int, more: int, num_decodes: int, backlog: int, left: int
) -> None:
    most = max(usual + more, 257)
    config = SchedulerConfig(max_running_requests=256, chunked_prefill_size=usual, max_prefill_tokens=most)
    step = step_tokens(config, num_decodes=num_decodes, backlog_tokens=backlog)
    assert num_decodes < step <= most
    chunk = chunk_tokens(left, step - num_decodes, step, most)
    assert 0 < chunk <= left
    assert num_decodes + chunk <= most

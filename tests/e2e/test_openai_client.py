"""The official `openai` client against the router: prefill and decode are two processes behind it."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.conftest import MODEL, Cluster

QUESTION: list[dict[str, str]] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(settled: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{settled.router}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_answer_counts_its_tokens(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 8


def test_the_model_list_names_the_served_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_stream_gives_the_text_of_the_whole_answer_in_pieces(client: Any) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert events[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": events[-1].usage.prompt_tokens_details}
    )
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_the_second_turn_finds_the_first_in_the_cache(client: Any) -> None:
    first = [{"role": "user", "content": "Tell me in two sentences how bread is made, and what yeast does in it."}]
    answer = client.chat.completions.create(model=MODEL, messages=first, temperature=0, max_tokens=40)
    second = [
        *first,
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "And without yeast?"},
    ]
    usage = client.chat.completions.create(model=MODEL, messages=second, temperature=0, max_tokens=8).usage
    assert usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens // 16 * 16 > 0


def test_two_choices_differ_by_seed_and_share_one_prompt(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, seed=7, temperature=1.5, max_tokens=24)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert texts[0] != texts[1]
    again = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, seed=7, temperature=1.5, max_tokens=24)
    assert [choice.message.content for choice in again.choices] == texts


def test_logprobs_come_for_every_token_with_the_likeliest_beside_them(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob == max(
            top.logprob for top in entry.top_logprobs
        )  # greedy sampling took the most likely token
        assert len(entry.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0 + 1e-6


def test_a_stop_string_ends_the_answer_before_it(client: Any) -> None:
    whole = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=24)
    stop = re.findall("[a-zA-Z]{3,}", whole.choices[0].text)[-1]
    stopped = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=24, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole.choices[0].text.split(stop)[0]


def test_a_text_completion_takes_token_ids(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt=[1, 504, 3575, 282, 4649, 314], max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens <= 4


async def test_thirty_two_streams_at_once_all_finish_and_leave_no_page_behind(settled: Cluster) -> None:
    client: Any
    async with AsyncOpenAI(base_url=f"{settled.router}/v1", api_key="none", max_retries=0, timeout=200) as client:

        async def one(index: int) -> tuple[int, str | None]:
            messages = [{"role": "user", "content": f"Count from {index} upwards, please."}]
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=12,
                seed=index,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            reason, num_tokens = None, 0
            async for event in stream:
                if event.choices:
                    reason = event.choices[0].finish_reason or reason
                if event.usage:
                    num_tokens = event.usage.completion_tokens
            return num_tokens, reason

        results = await asyncio.gather(*(one(index) for index in range(32)))
    assert results == [(12, "length")] * 32
    settled.wait_idle()

"""Separate prefill and decode workers give the same tokens as one unified worker."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Cluster

NUM_TOKENS = 12
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "sampling_seed": 11}
PROMPT = [504, 3575, 282, 4649, 314, 260, 1089, 327, 253, 6397, 28, 284, 451, 2373, 1441, 30]


def generate(url: str, input_ids: list[int], **sampling: object) -> list[int]:
    body = {"input_ids": input_ids, "sampling_params": {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, **sampling}}
    answer = httpx.post(f"{url}/generate", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["output_ids"]


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 600])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_pair_and_one_worker_agree_token_for_token(
    settled: Cluster, num_tokens: int, sampling: dict[str, Any]
) -> None:
    prompt = (PROMPT * 40)[:num_tokens]
    alone = generate(settled.unified, prompt, **sampling)
    assert len(alone) == NUM_TOKENS
    assert generate(settled.router, prompt, **sampling) == alone
    assert generate(settled.router, prompt, **sampling) == alone  # now with both caches filled


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_one_token_needs_no_handoff_and_two_need_one(settled: Cluster, num_tokens: int) -> None:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "kvist": {"report": True}}
    answer = httpx.post(f"{settled.router}/generate", json=body, timeout=120).json()
    assert len(answer["output_ids"]) == num_tokens
    assert (answer["kvist"]["handoff"] is not None) == (num_tokens == 2)

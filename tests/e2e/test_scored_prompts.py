"""Over HTTP, the router with its pair and one worker report the same logprobs of prompts, in every form.

Users of other systems missed the logprobs of the prompt and of the first token when prefill and decode were separate
(SGLang #40298, vLLM #27449).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from torch import Tensor

from kvist.checkpoint import find_checkpoint
from kvist.text import load_tokenizer
from tests.e2e.conftest import Cluster

TEXTS = ["The capital of France is Paris.", "Water boils at 100 degrees Celsius because"]
TOLERANCE = 2e-3  # between two batches of different shape, in fp32


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def from_both(cluster: Cluster, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """Return the answer of one worker, and the router's answer once the caches of its pair have the prompt."""
    post(cluster.router, path, body)
    return post(cluster.unified, path, body), post(cluster.router, path, body)


def assert_alike(found: Any, expected: Any) -> None:
    """Compare two JSON values; numbers with a fraction may differ a little."""
    assert type(found) is type(expected)
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=TOLERANCE)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for each, other in zip(found, expected, strict=True):
            assert_alike(each, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, other in expected.items():
            assert_alike(found[key], other)
    else:
        assert found == expected


def token_lists() -> list[list[int]]:
    tokenizer = load_tokenizer(find_checkpoint(None))
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echoed_prompts_have_equal_logprobs(settled: Cluster, max_tokens: int) -> None:
    body = {"prompt": TEXTS, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0}
    alone, pair = from_both(settled, "/v1/completions", body)
    for choice, other, text, token_ids in zip(alone["choices"], pair["choices"], TEXTS, token_lists(), strict=True):
        assert choice["text"].startswith(text)
        assert len(choice["logprobs"]["tokens"]) == len(token_ids) + max_tokens
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert_alike(other, choice)


@pytest.mark.parametrize("as_ids", [False, True])
def test_lm_evals_loglikelihood_requests_give_the_scores_of_the_model(
    settled: Cluster, logprobs_of: Callable[[list[int]], Tensor], as_ids: bool
) -> None:
    prompts, num_context = token_lists(), 3
    body = {
        "model": None,
        "prompt": prompts if as_ids else TEXTS,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    for answer in from_both(settled, "/v1/completions", body):
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        for token_ids, choice in zip(prompts, choices, strict=True):
            rows = logprobs_of(token_ids)
            scores = [float(rows[place - 1, token_ids[place]]) for place in range(num_context, len(token_ids))]
            found, top = (choice["logprobs"][name][num_context:-1] for name in ("token_logprobs", "top_logprobs"))
            assert sum(found) == pytest.approx(sum(scores), abs=len(scores) * TOLERANCE)
            greedy = [int(row.argmax()) for row in rows[num_context - 1 : -1]] == token_ids[num_context:]
            assert all(value == max(best.values()) for value, best in zip(found, top, strict=True)) == greedy


def test_prompt_logprobs_of_a_chat_are_equal(settled: Cluster) -> None:
    messages = [{"role": "user", "content": TEXTS[0]}]
    body = {"messages": messages, "prompt_logprobs": 1, "max_tokens": 4, "temperature": 0, "logprob_token_ids": [5]}
    alone, pair = from_both(settled, "/v1/chat/completions", body)
    assert alone["prompt_logprobs"][0] is None
    assert len(alone["prompt_logprobs"]) == alone["usage"]["prompt_tokens"]
    assert_alike(pair["prompt_logprobs"], alone["prompt_logprobs"])


def test_generate_reports_equal_logprobs_of_input_and_output(settled: Cluster) -> None:
    body = {
        "input_ids": token_lists(),
        "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 2,
        "top_logprobs_num": 2,
        "token_ids_logprob": [1, 7],
        "return_text_in_logprobs": True,
    }
    alone, pair = from_both(settled, "/generate", body)
    for answer, other, token_ids in zip(alone, pair, token_lists(), strict=True):
        meta = answer["meta_info"]
        assert [entry[1] for entry in meta["input_token_logprobs"]] == token_ids[2:]
        assert meta["input_token_logprobs"][0][0] is None
        names = [f"{side}_{kind}_logprobs" for side in ("input", "output") for kind in ("token", "top", "token_ids")]
        for name in names:
            assert_alike(other["meta_info"][name], meta[name])

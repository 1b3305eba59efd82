"""Continuations, prefills and leases through the router: exact scores, and no decode worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from torch import Tensor

from kvist.checkpoint import find_checkpoint
from kvist.text import load_tokenizer
from tests.e2e.conftest import Cluster

PROMPT = "The three largest cities of France are Paris, Marseille and Lyon. The capital of France is the city of"
LogprobsOf = Callable[[list[int]], Tensor]
CONTINUATIONS = [" Paris", " Marseille", " Lyon, I think", " Paris"]
TOLERANCE = 2e-3  # of a logprob in fp32, between batches of different shape


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    response = httpx.request(method, url + path, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def steps(cluster: Cluster, role: str) -> float:
    return cluster.metric("kvist:worker_steps_total", role=role)


def reported_steps(cluster: Cluster) -> float:
    """Return the steps of the prefill worker, once two reports have the same number."""
    numbers = [-1.0]

    def is_stable() -> bool:
        time.sleep(1.2)  # reports come once a second
        numbers.append(steps(cluster, "prefill"))
        return numbers[-1] == numbers[-2]

    cluster.wait_until(is_stable, within_s=30)
    return numbers[-1]


def expected_logprobs(logprobs_of: LogprobsOf, prompt_ids: list[int], token_ids: list[int]) -> list[float]:
    rows = logprobs_of([*prompt_ids, *token_ids])
    return [float(rows[len(prompt_ids) + place - 1, token_id]) for place, token_id in enumerate(token_ids)]


def test_continuations_have_the_scores_of_the_model_and_touch_no_decode_worker(
    settled: Cluster, logprobs_of: LogprobsOf
) -> None:
    tokenizer = load_tokenizer(find_checkpoint(None))
    prompt_ids = tokenizer.encode(PROMPT)
    body = {"prompt": PROMPT, "continuations": CONTINUATIONS, "unconditional": True}
    decoded = steps(settled, "decode")
    first, again = (ask(settled.router, "POST", "/v1/continuations/score", body) for _ in range(2))
    for text, result, other in zip(CONTINUATIONS[:3], first["results"], again["results"], strict=False):
        token_ids, found, without = result["token_ids"], result["logprobs"], result["unconditional_logprobs"]
        assert tokenizer.decode(token_ids) == text
        assert found == pytest.approx(expected_logprobs(logprobs_of, prompt_ids, token_ids), abs=TOLERANCE)
        assert result["logprob"] == pytest.approx(sum(found))
        expected = expected_logprobs(logprobs_of, token_ids[:1], token_ids[1:])
        assert without == [None, *(pytest.approx(each, abs=TOLERANCE) for each in expected)]
        assert other["logprobs"] == pytest.approx(found, abs=TOLERANCE)
        assert other["token_ids"] == token_ids
    assert first["results"][0] == first["results"][3] | {"index": 0}
    # a row for each continuation of several tokens, with and without the part of the prompt that fills no page
    num_full = len(prompt_ids) // 16 * 16
    rows = {tuple(each["token_ids"]) for each in first["results"] if len(each["token_ids"]) > 1}
    assert again["cached_tokens"]["device"] == num_full
    assert again["computed_tokens"] == sum(len(prompt_ids) - num_full + 2 * len(row) for row in rows)
    assert again["worker"] == first["worker"]
    before = reported_steps(settled)
    ask(settled.router, "POST", "/v1/continuations/score", body)
    assert reported_steps(settled) == before + 1, "the rows of one request are computed in one step"
    assert steps(settled, "decode") == decoded


def test_a_prompt_is_prefilled_leased_and_kept_while_the_lease_lasts(settled: Cluster) -> None:
    prompt = "Leases keep the pages of a prompt in the memory of one worker for a limited time. " * 4
    answer = ask(settled.router, "POST", "/v1/prefill", {"prompt": prompt})
    num_tokens = answer["usage"]["prompt_tokens"]
    assert answer["computed_tokens"] == num_tokens // 16 * 16 + 1  # no request finds tokens after the last whole page
    lease = ask(settled.router, "POST", "/v1/leases", {"prompt": prompt, "ttl_s": 30})
    assert lease["worker"] == answer["worker"]
    assert lease["num_tokens"] == num_tokens // 16 * 16 == 16 * lease["num_pages"]
    path = f"/v1/leases/{lease['id']}"
    ask(settled.router, "POST", "/flush_cache", {})
    again = ask(settled.router, "POST", "/v1/prefill", {"prompt": prompt, "kvist": {"worker": lease["worker"]}})
    assert again["cached_tokens"]["device"] == min(lease["num_tokens"], (num_tokens - 1) // 16 * 16)
    assert ask(settled.router, "POST", f"{path}/renew", {"ttl_s": 60})["left_s"] == pytest.approx(60, abs=1)
    assert [each["id"] for each in ask(settled.router, "GET", "/v1/leases")["data"]] == [lease["id"]]

    def leased_pages() -> list[int]:
        workers = ask(settled.router, "GET", "/server_info")["workers"]
        return sorted(worker["capacity"]["pages"]["device"].get("leased", 0) for worker in workers)

    settled.wait_until(lambda: leased_pages() == [0, lease["num_pages"]], within_s=10)
    assert ask(settled.router, "DELETE", path)["deleted"]
    gone = httpx.get(settled.router + path, timeout=60)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "lease_not_found")
    settled.wait_until(lambda: leased_pages() == [0, 0], within_s=10)


def test_a_decode_worker_leases_a_prompt_if_it_is_asked_to(settled: Cluster) -> None:
    body = {"prompt": "Only if it is asked to does a decode worker compute and keep a prompt.", "ttl_s": 5}
    lease = ask(settled.router, "POST", "/v1/leases", body | {"kvist": {"role": "decode"}})
    roles = {each["worker_id"]: each["role"] for each in ask(settled.router, "GET", "/server_info")["workers"]}
    assert roles[lease["worker"]] == "decode"
    assert ask(settled.router, "DELETE", f"/v1/leases/{lease['id']}")["deleted"]

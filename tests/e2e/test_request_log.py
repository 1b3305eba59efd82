"""Where the time of a request went, measured in real processes: its stages cover it, and name its workers."""

from __future__ import annotations

from typing import Any

import httpx

from tests.e2e.conftest import Cluster

LONG = "Tell me about the three largest cities of France, and about each of their rivers. " * 20
MAX_TOKENS = 60


def chat(url: str, *, stream: bool, **headers: str) -> httpx.Response:
    body = {
        "messages": [{"role": "user", "content": LONG}],
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "stream": stream,
        "cache_salt": f"{url}{stream}",
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    return response


def record_of(url: str, response: httpx.Response) -> Any:
    found = httpx.get(f"{url}/requests/{response.headers['x-request-id']}", timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def check(record: Any) -> list[tuple[str, str]]:
    """Check that the stages cover the time of the request, and that most of it is explained. Return their names and
    places."""
    duration_s, stages = record["duration_s"], record["stages"]
    assert record["status"] == "finished"
    assert record["completion_tokens"] == MAX_TOKENS
    assert abs(sum(stage["duration_s"] for stage in stages) - duration_s) <= max(0.001, 0.01 * duration_s)
    other_s = sum(stage["duration_s"] for stage in stages if stage["name"] == "other")
    assert other_s <= 0.2 * duration_s + 0.1, stages  # messages on their way, on a busy machine
    computed_s = sum(stage["duration_s"] for stage in stages if stage["name"] in ("prefill", "decode"))
    assert computed_s >= 0.3 * duration_s, stages
    ends = [stage for stage in stages if stage["name"] == "prefill"][-1]
    assert ends["start_s"] + ends["duration_s"] <= record["ttft_s"] + 0.001
    return list(dict.fromkeys((stage["name"], stage["where"]) for stage in stages))


def test_the_stages_of_a_handed_over_request_are_those_of_both_workers(settled: Cluster) -> None:
    for stream in (False, True):
        record = record_of(settled.router, chat(settled.router, stream=stream))
        places = check(record)
        prefill, decode = record["workers"]
        assert places[:2] == [("received", "gateway"), ("tokenised", "gateway")]
        assert ("prefill", prefill) in places
        assert ("handoff", decode) in places
        assert ("decode", decode) in places
        assert places[-1] == ("sent", "gateway")


def test_one_worker_shows_the_stages_of_its_request_in_the_response(settled: Cluster) -> None:
    response = chat(settled.unified, stream=False, **{"x-kvist-trace": "1"})
    trace = response.json()["kvist"]["trace"]
    (worker,) = trace["workers"]
    assert {("prefill", worker), ("decode", worker)} <= set(check(trace))
    kept = record_of(settled.unified, response)
    ends = [stage["name"] for stage in trace["stages"]].index("detokenised")  # the response is still being written
    assert kept["stages"][:ends] == trace["stages"][:ends]
    assert kept["stages"][-1]["name"] == "sent"

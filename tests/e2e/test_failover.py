"""Workers with streams are killed: every answer is that of one undisturbed worker, with all that belongs to it."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest

from kvist.testing.rounds import check_time, in_rounds
from tests.e2e.conftest import Cluster
from tests.e2e.test_lifetimes import children_of

PROMPT = "Once upon a time there was a small engine that"
LONG = "The quick brown fox jumps over the lazy dog, again and again and again. " * 400
NUM_TOKENS = 100
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# Requests with everything that shapes tokens, or is counted over all tokens of an answer.
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {**GREEDY, "logprobs": 2},
    "seeded": {**SEEDED, "logprobs": 1, "n": 2},
    "penalties": {**GREEDY, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "logit_bias": {"338": 3.0}},
    "stop string": {
        **SEEDED,
        "frequency_penalty": 0.5,
        "stop": [" zebra", ". The"],
        "include_stop_str_in_output": True,
    },
    "echo": {**GREEDY, "echo": True, "logprobs": 1, "prompt_logprobs": 1},
    "forced tokens": {
        **SEEDED,
        "structured_outputs": {"regex": r'(\{"name": "[a-z]{2,9}", "count": [0-9]{2,5}\},\n){30}'},
        "ignore_eos": False,
    },
    "tool calls": {
        **SEEDED,
        "messages": [{"role": "user", "content": "How warm are Oslo, Bergen and Reims?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": CITY}}],
        "tool_choice": "required",
        "ignore_eos": False,
    },
}


def complete(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    body = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "kvist": {"report": True}, **fields}
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    began_s = time.monotonic()
    answer = httpx.post(url + path, json=body if "messages" in fields else {"prompt": PROMPT, **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    found["kvist"]["client_s"] = time.monotonic() - began_s
    return found


def check_times(url: str, answer: dict[str, Any]) -> None:
    """The flight recorder's stages follow one another, and sum to the end-to-end time within 1% or 1 ms."""
    record = httpx.get(f"{url}/requests/{answer['id']}", timeout=60).json()
    stages, duration_s = record["stages"], record["duration_s"]
    assert abs(sum(stage["duration_s"] for stage in stages) - duration_s) <= max(0.001, 0.01 * duration_s), record
    for before, after in pairwise(stages):
        assert abs(before["start_s"] + before["duration_s"] - after["start_s"]) <= 0.001, record
    assert record["ttft_s"] < duration_s <= answer["kvist"]["client_s"] + 0.001
    if answer["kvist"]["failovers"] and record["answers"] == 1:
        pause = next(stage for stage in stages if stage["name"] == "failover")
        assert pause["where"] == "gateway"
        assert "worker" in pause["detail"], "the failure is named"


def stream(url: str) -> list[str]:
    """Return the lines of a streamed answer."""
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, **GREEDY}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        return [line for line in response.iter_lines() if line]


def text_of(lines: list[str]) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def comparable(value: Any) -> Any:
    """Return an answer without what differs from call to call; logprobs rounded to what fp32 promises."""
    if isinstance(value, dict):
        left_out = ("id", "created", "kvist", "prompt_tokens_details")
        return {key: comparable(each) for key, each in value.items() if key not in left_out}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return pytest.approx(value, abs=2e-3) if isinstance(value, float) else value


def kill(cluster: Cluster, name: str, victim: str) -> None:
    child = cluster.processes.children[name]
    assert child.pid is not None
    pids = [child.pid] if victim == "worker" else children_of(child.pid)[:1]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def all_begin(pool: ThreadPoolExecutor, url: str) -> dict[str, Future[dict[str, Any]]]:
    return {name: pool.submit(complete, url, fields) for name, fields in REQUESTS.items()}


@pytest.fixture(scope="module")
def twins(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The answers of the unified worker."""
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return {name: answer.result() for name, answer in all_begin(pool, cluster.unified).items()}


@in_rounds(3)  # on a busy machine, the answers can end before their worker is killed
def test_streams_of_a_killed_worker_go_on_with_the_same_answers(
    settled: Cluster, twins: dict[str, dict[str, Any]]
) -> None:
    """The engine of the decode worker is killed: the prefill worker serves alone until it is back, and new requests,
    too."""
    settled.wait_ready()
    failovers, resumed = settled.metric("kvist:failovers_total"), settled.metric("kvist:resumed_streams_total")
    done = settled.metric("kvist:generation_tokens_total")
    with ThreadPoolExecutor(len(REQUESTS) + 1) as pool:
        answers, lines = all_begin(pool, settled.router), pool.submit(stream, settled.router)
        settled.wait_until(lambda: settled.metric("kvist:generation_tokens_total") > done + 20, within_s=60)
        is_early = not answers["greedy"].done()
        kill(settled, "decode-0", "engine")
        assert complete(settled.router, {**GREEDY, "max_tokens": 20})["choices"], "another worker serves it"
        found = {key: answer.result() for key, answer in answers.items()}
    assert lines.result()[-1] == "data: [DONE]"
    assert text_of(lines.result()) == twins["greedy"]["choices"][0]["text"]
    for key, twin in twins.items():
        assert comparable(twin) == comparable(found[key]), key
        check_times(settled.router, found[key])
    settled.wait_ready()
    check_time(is_early, "an answer ended before its worker was killed")
    assert settled.metric("kvist:failovers_total") > failovers
    assert settled.metric("kvist:resumed_streams_total") > resumed
    assert any(answer["kvist"]["failovers"] for answer in found.values())
    assert any(answer["kvist"]["route"]["reason"] == "no_decode" for answer in found.values())
    assert settled.metric("kvist:unresumed_streams_total") == 0


def test_prefill_killed_while_it_computes_a_prompt_costs_a_pause(settled: Cluster) -> None:
    fields = {**GREEDY, "max_tokens": 8, "prompt": LONG}
    twin = complete(settled.unified, fields)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, settled.router, {**fields, "cache_salt": "new"})
        settled.wait_until(lambda: settled.metric("kvist:gateway_requests_in_flight") == 1, within_s=60)
        kill(settled, "prefill-0", "engine")
        found = answer.result()
    assert comparable(twin) == comparable(found)
    check_times(settled.router, found)
    settled.wait_ready()

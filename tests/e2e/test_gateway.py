"""Refusals, disconnects, cache and metrics of the router, with real processes."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Cluster

CHAT, NATIVE = "/v1/chat/completions", "/generate"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        (CHAT, b"not json", 400, "JSON"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, ""),
        (CHAT, b"[]", 400, ""),
        (CHAT, {}, 400, "messages"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": "hello"}, 400, "messages"),
        (CHAT, {"messages": HELLO, "temprature": 1}, 400, "temprature"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"messages": HELLO, "top_p": 1.5}, 400, "top_p"),
        (CHAT, {"messages": HELLO, "n": 0}, 400, "n"),
        (CHAT, {"messages": HELLO, "model": "gpt-4"}, 404, "gpt-4"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, 400, "response_format"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 20000}]}, 400, "tokens"),
        (CHAT, {"messages": [{"role": "robot", "content": "Hello"}]}, 400, "role"),
        ("/v1/completions", {"prompt": [10**9]}, 400, "prompt"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        (NATIVE, {"sampling_params": {}}, 400, "text"),
        (NATIVE, {"text": "a", "input_ids": [1]}, 400, "text"),
        (NATIVE, {"text": "a", "sampling_params": {"regex": "a("}}, 400, "regex"),
        ("/v1/nothing", {}, 404, ""),
    ],
)
def test_bad_input_is_a_clear_4xx_in_openais_shape(
    settled: Cluster, path: str, body: bytes | dict[str, Any], status: int, word: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(settled.router + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert word in json.dumps(error)


def test_a_body_over_the_limit_is_refused(settled: Cluster) -> None:
    answer = httpx.post(settled.router + CHAT, content=b" " * (9 << 20))
    assert answer.status_code == 413


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_prefill_or_decode_worker_refuses_generation_and_names_the_router(settled: Cluster, role: str) -> None:
    answer = httpx.post(getattr(settled, role) + CHAT, json={"messages": HELLO})
    assert 400 <= answer.status_code < 500
    assert "router" in answer.json()["error"]["message"]


def test_every_process_is_healthy_and_reports_its_role(settled: Cluster) -> None:
    for name in ("router", "prefill", "decode", "unified"):
        url = getattr(settled, name)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 200
        engine = httpx.get(f"{url}/server_info").json()["engine"]
        assert engine is None if name == "router" else engine["role"] == name


def test_a_disconnect_aborts_at_every_worker_long_before_the_answer_ends(settled: Cluster) -> None:
    def num_tokens() -> float:
        return settled.metric("kvist:worker_generation_tokens_total", url=settled.decode)

    body = {"messages": HELLO, "max_tokens": 12_000, "ignore_eos": True, "stream": True}
    before = num_tokens()
    with httpx.Client(timeout=60) as client, client.stream("POST", settled.router + CHAT, json=body) as response:
        pieces = response.iter_lines()
        for _event in range(10):
            next(pieces)
        assert settled.num_running() > 0
    settled.wait_until(lambda: settled.metric("kvist:gateway_requests_in_flight") == 0, within_s=60)
    settled.wait_until(lambda: num_tokens() > before, within_s=60)  # a load report after this answer
    for url in (settled.prefill, settled.decode):  # as reported by each engine, through its own gateway
        settled.wait_until(partial(is_idle, settled, url), within_s=60)
    settled.wait_until(lambda: settled.num_pages("in_flight") == 0, within_s=60)
    assert num_tokens() - before < 6000, "tokens, not seconds: a machine slow to abort is slow to decode, too"


def is_idle(cluster: Cluster, url: str) -> bool:
    return cluster.metric("kvist:num_requests_running", url=url) == 0


def test_a_disconnect_during_prefill_aborts_at_every_worker(settled: Cluster) -> None:
    prompt = {"text": "word " * 1800, "sampling_params": {"max_new_tokens": 64, "ignore_eos": True}}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(settled.router + NATIVE, json=prompt, timeout=0.3)
    settled.wait_idle()


def test_flush_cache_empties_every_worker(settled: Cluster) -> None:
    ask = {
        "text": "A page of text that is surely longer than sixteen tokens, " * 4,
        "sampling_params": {"max_new_tokens": 2},
    }
    assert httpx.post(settled.router + NATIVE, json=ask, timeout=60).status_code == 200
    settled.wait_idle()
    settled.wait_until(lambda: settled.num_pages("cached") > 0, within_s=60)
    assert httpx.post(settled.router + "/flush_cache").status_code == 200
    settled.wait_until(lambda: settled.num_pages("cached") == 0, within_s=60)


def test_metrics_count_what_was_answered(settled: Cluster) -> None:
    before = settled.metric("kvist:generation_tokens_total")
    ask = {"text": "One two three", "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
    assert httpx.post(settled.router + NATIVE, json=ask, timeout=60).status_code == 200
    assert settled.metric("kvist:generation_tokens_total") == before + 5
    assert settled.metric("kvist:worker_up") == 2
    assert settled.metric("kvist:time_to_first_token_seconds_count") > 0


def test_detokenize_is_the_inverse_of_tokenize(settled: Cluster) -> None:
    text = "Kvist: en gren, två löv — 枝 🌿"
    tokens = httpx.post(settled.router + "/tokenize", json={"prompt": text}).json()["tokens"]
    assert len(tokens) > 3
    back = httpx.post(settled.router + "/detokenize", json={"tokens": tokens}).json()
    assert text in json.dumps(back, ensure_ascii=False)


def test_workers_without_a_host_tier_refuse_a_store_and_name_the_flag(settled: Cluster) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = httpx.request(method, settled.router + "/hicache/storage-backend", json={}, timeout=60)
        assert answer.status_code == 400
        assert "start the worker with --enable-hierarchical-cache" in answer.json()["error"]["message"]

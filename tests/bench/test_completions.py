"""One streamed answer becomes one row; an answer that differs from the request is a failure with a kind."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kvist.bench.completions import GREEDY, BenchRequest, CompletionClient, RequestResult, Row
from kvist.bench.config import TargetConfig
from kvist.clock import MonotonicClock
from kvist.errors import ConfigError
from kvist.http_client import HttpClient
from tests.bench.fake_server import Behaviour, FakeServer, answer_ids

ASK = BenchRequest(prompt=b"[3,4,5]", row=Row(index=7, num_input=3, num_output=4))


async def ask(
    server: FakeServer,
    request: BenchRequest = ASK,
    *,
    timeout_s: float = 20.0,
    sampling_fields: Mapping[str, object] = GREEDY,
) -> RequestResult:
    client = HttpClient(server.url, api_key=None)
    completions = CompletionClient(
        client, model="m", clock=MonotonicClock(), timeout_s=timeout_s, sampling_fields=sampling_fields
    )
    answer = await completions.send(request, start_s=MonotonicClock().now_s())
    client.close()
    return answer


async def test_the_request_is_greedy_streamed_and_of_exact_length(server: FakeServer) -> None:
    await ask(server)
    assert server.received[0].body == {
        "model": "m",
        "prompt": [3, 4, 5],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_extra_fields_are_sent_and_replace_the_temperature(server: FakeServer) -> None:
    fields = TargetConfig(extra_body='{"temperature": 0.8, "top_p": 0.95}').sampling_fields
    await ask(server, sampling_fields=fields)
    body = server.received[0].body
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 0.95, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "must be a JSON object"), ("{", "must be a JSON object"), ('{"prompt": "x"}', "cannot set prompt")],
)
def test_invalid_extra_bodies_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TargetConfig(extra_body=text)


async def test_a_good_answer_has_times_and_the_servers_counts(server: FakeServer) -> None:
    server.default = Behaviour(cached_tokens=2, pace_s=0.01)
    answer = await ask(server)
    row = answer.row
    assert (row.index, row.failure, row.num_prompt_tokens, row.num_cached_tokens) == (7, None, 3, 2)
    assert (row.num_output_tokens, row.num_events) == (4, 4)
    assert row.ttft_s is not None
    assert row.tpot_s is not None
    assert row.e2e_s is not None
    assert len(answer.gaps_s) == 3
    assert sum(answer.gaps_s) == pytest.approx(3 * row.tpot_s)
    assert row.tpot_s > 0.005
    assert row.ttft_s + 3 * row.tpot_s <= row.e2e_s
    assert answer.token_ids == []


async def test_token_ids_are_asked_for_and_read_only_when_wanted(server: FakeServer) -> None:
    wanted = BenchRequest(prompt=b"[3,4]", row=Row(index=0, num_input=2, num_output=3), wants_ids=True)
    assert (await ask(server, wanted)).token_ids == answer_ids([3, 4], 3)
    assert server.received[0].body["return_token_ids"] is True


async def test_a_server_that_does_not_report_cached_tokens_has_unknown_not_zero(server: FakeServer) -> None:
    server.default = Behaviour(cached_tokens=None)
    row = (await ask(server)).row
    assert (row.failure, row.num_cached_tokens) == (None, None)


async def test_an_answer_of_one_token_has_no_tpot(server: FakeServer) -> None:
    row = (await ask(server, BenchRequest(prompt=b"[3]", row=Row(index=0, num_input=1, num_output=1)))).row
    assert (row.failure, row.tpot_s) == (None, None)
    assert row.ttft_s is not None


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        (Behaviour(status=429), "http_429", "later"),
        (Behaviour(status=500, error_body=b"<html>oops"), "http_500", "oops"),
        (Behaviour(num_extra_tokens=-1), "wrong_output_count", "3 output tokens, 4"),
        (Behaviour(num_extra_tokens=1), "wrong_output_count", "5 output tokens, 4"),
        (Behaviour(num_extra_prompt_tokens=1), "wrong_input_count", "4 prompt tokens, 3"),
        (Behaviour(cut_after_events=2), "cut", "middle of the response"),
        (Behaviour(die_before_byte=True), "dropped", "before the response"),
        (Behaviour(done=False), "cut", "[DONE]"),
        (Behaviour(usage=False), "no_usage", "usage"),
        (Behaviour(instead=b"data: [DONE]\n\n"), "empty", "no token"),
        (Behaviour(instead=b'event: error\ndata: {"message": "worker lost"}\n\n'), "error_event", "worker lost"),
        (Behaviour(instead=b'data: {"error": {"message": "no memory"}}\n\n'), "error_event", "no memory"),
        (Behaviour(instead=b"data: {not json\n\n"), "bad_stream", "{not json"),
        (Behaviour(instead=b'data: {"choices": 3}\n\n'), "bad_stream", "choices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_each_failure_has_its_own_kind(server: FakeServer, behaviour: Behaviour, kind: str, words: str) -> None:
    server.behaviours = [behaviour]
    row = (await ask(server)).row
    assert row.failure == kind
    assert words in (row.message or "")
    assert row.sent_s is not None
    assert (row.ttft_s, row.tpot_s, row.e2e_s) == (None, None, None)


async def test_a_missing_first_byte_is_a_timeout(server: FakeServer) -> None:
    server.behaviours = [Behaviour(never_answer=True)]
    assert (await ask(server, timeout_s=0.05)).row.failure == "timeout"


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_events_are_read_wherever_the_network_cuts_them(server: FakeServer, size: int) -> None:
    server.default = Behaviour(split_bytes=size)
    row = (await ask(server)).row
    assert (row.failure, row.num_events) == (None, 4)

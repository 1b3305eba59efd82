"""Connections are reused; only a request lost on a closing idle connection is sent twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Coroutine, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.http_client import EventLines, HttpClient, HttpFailure
from tests.bench.fake_server import Behaviour, FakeServer, running

BODY = json.dumps({"prompt": [1, 2], "max_tokens": 2}).encode()
DIES = Behaviour(die_before_byte=True)

Post = Callable[[], Coroutine[object, object, tuple[int, bool, bytes]]]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as started:
        yield started


@pytest.fixture
def client(server: FakeServer) -> HttpClient:
    return HttpClient(server.url, api_key="hush")


@pytest.fixture
def post(client: HttpClient) -> Post:
    async def post() -> tuple[int, bool, bytes]:
        pieces: list[bytes] = []
        reply = await client.post("/v1/completions", BODY, lambda _, piece: pieces.append(piece))
        return reply.status, reply.retried, b"".join(pieces)

    return post


async def test_a_connection_is_used_again(server: FakeServer, client: HttpClient, post: Post) -> None:
    assert (await post())[0] == 200
    assert (await post())[2].endswith(b"data: [DONE]\n\n")
    assert [request.nth_on_connection for request in server.received] == [1, 2]
    assert client.num_connections == 1
    assert "Authorization: Bearer hush\r\n" in server.received[0].head
    client.close()


async def test_a_reply_has_its_headers_by_names_in_lower_case(server: FakeServer, client: HttpClient) -> None:
    server.behaviours = [Behaviour(), Behaviour(status=429)]
    first, second = [await client.post("/v1/completions", BODY, lambda *_: None) for _ in range(2)]
    assert first.headers == {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
    assert (second.status, second.headers) == (429, {"content-length": str(len(Behaviour().error_body))})
    client.close()


async def test_a_request_on_a_closing_idle_connection_is_sent_once_more(
    server: FakeServer, client: HttpClient, post: Post
) -> None:
    server.behaviours = [Behaviour(), DIES]
    await post()
    assert (await post())[:2] == (200, True)
    assert [request.connection for request in server.received] == [1, 1, 2]
    assert client.num_retries == 1
    client.close()


async def test_a_request_is_never_sent_a_third_time(server: FakeServer, post: Post) -> None:
    server.behaviours = [Behaviour(), DIES, DIES]
    await post()
    with pytest.raises(HttpFailure) as caught:
        await post()
    assert caught.value.kind == "dropped"
    assert len(server.received) == 3


async def test_a_new_connection_that_closes_early_is_a_failure_without_retry(server: FakeServer, post: Post) -> None:
    server.behaviours = [DIES]
    with pytest.raises(HttpFailure) as caught:
        await post()
    assert caught.value.kind == "dropped"
    assert len(server.received) == 1


async def test_a_reused_connection_that_closes_in_the_response_is_not_retried(server: FakeServer, post: Post) -> None:
    server.behaviours = [Behaviour(), Behaviour(cut_after_events=1)]
    await post()
    with pytest.raises(HttpFailure) as caught:
        await post()
    assert caught.value.kind == "cut"
    assert len(server.received) == 2


async def test_a_connection_that_the_server_closes_is_not_kept(
    server: FakeServer, client: HttpClient, post: Post
) -> None:
    server.default = Behaviour(close_header=True)
    await post()
    await post()
    assert (client.num_connections, client.num_retries) == (2, 0)


async def test_a_body_without_framing_ends_with_its_connection(
    server: FakeServer, client: HttpClient, post: Post
) -> None:
    server.default = Behaviour(until_eof=True)
    assert (await post())[2].endswith(b"data: [DONE]\n\n")
    await post()
    assert (client.num_connections, client.num_retries) == (2, 0)


async def test_a_response_that_is_not_http_is_a_failure(server: FakeServer, post: Post) -> None:
    server.default = Behaviour(status=999, error_body=b"")
    assert (await post())[0] == 999
    server.default = Behaviour(status=0)  # "HTTP/1.1 0": no status has one digit
    with pytest.raises(HttpFailure) as caught:
        await post()
    assert caught.value.kind == "bad_response"


async def test_a_refused_connection_is_a_failure_that_names_the_address() -> None:
    with pytest.raises(HttpFailure, match=r"127\.0\.0\.1:1") as caught:
        await HttpClient("http://127.0.0.1:1", api_key=None).get("/", lambda *_: None)
    assert caught.value.kind == "connect"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_a_base_url_may_end_in_v1(server: FakeServer, suffix: str) -> None:
    client = HttpClient(server.url + suffix, api_key=None)
    await client.post("/v1/completions", BODY, lambda *_: None)
    assert server.received[0].head.startswith("POST /v1/completions HTTP/1.1\r\n")
    client.close()


STREAM = b": ping\r\n\r\ndata: one\r\n\r\ndata:two\ndata: three\n\nevent: error\nid: 4\ndata: four\n\ndata: [DONE]\n\n"
EVENTS = [(b"", b"one"), (b"", b"two\nthree"), (b"error", b"four"), (b"", b"[DONE]")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_the_events_of_a_stream_do_not_depend_on_where_it_is_cut(cuts: list[int]) -> None:
    places = sorted({0, *cuts, len(STREAM)})
    lines = EventLines()
    found = [event for low, high in itertools.pairwise(places) for event in lines.feed(STREAM[low:high])]
    assert found == EVENTS


def test_an_event_without_end_is_refused_above_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.http_client.MAX_EVENT_BYTES", 100)
    lines = EventLines()
    assert lines.feed(b"data: x\n" * 50) == []
    assert lines.feed(b"data: x\n" * 100) == []
    with pytest.raises(HttpFailure, match="longer than 100"):
        lines.feed(b"data: x\n")

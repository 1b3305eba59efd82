"""The gateway's work for one request is bounded in time and memory, and does not delay other clients' streams."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from kvist import wire
from kvist.checkpoint import find_checkpoint
from kvist.flight.timeline import Timeline
from kvist.kv.keys import page_digests
from kvist.request import EngineRequest, TokenLogprobs
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.stream import StreamPart
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.scripted_dispatcher import LogprobsAt, ScriptedDispatcher
from kvist.testing.specs import make_spec, submit_full
from kvist.testing.tokenizers import byte_tokenizer
from kvist.text import load_tokenizer
from kvist.text.tokenizer import Tokenizer
from kvist.wire import EngineSpec

BODY_BYTES = 8 << 20
MAX_HOLD_S = 0.05
JSON = {"content-type": "application/json"}
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SPEC = make_spec(
    model_name="tiny",
    vocab_size=300,
    max_model_len=8192,
    num_pages=1000,
    max_running_requests=8,
    max_queued_requests=8,
)


def many_logprobs(request: EngineRequest, _position: int, _token_id: int) -> TokenLogprobs:
    count = request.sampling.num_logprobs or 0
    return TokenLogprobs(logprob=-0.5, top_token_ids=tuple(range(40, 40 + count)), top_logprobs=(-0.5,) * count)


@dataclass
class Engine(ScriptedDispatcher):
    """Answers with three tokens."""

    tokenizer: Tokenizer = field(default_factory=lambda: byte_tokenizer(chat_template=CHAT_TEMPLATE))
    answer: str | Sequence[int] = (65,) * 3
    ends: bool = False
    logprobs_at: LogprobsAt = many_logprobs
    spec: EngineSpec | None = SPEC
    blocked_until: threading.Event | None = None  # `model` blocks until it is set
    sends: bool = False  # encode the prompt as a real dispatcher does

    async def generate(
        self, request: EngineRequest, placement: Placement = ANYWHERE, timeline: Timeline | None = None
    ) -> AsyncGenerator[StreamPart, None]:
        if self.sends:
            page_digests(request.prompt_token_ids, 4, "namespace")
            wire.encode(submit_full(request))
        async for part in super().generate(request, placement, timeline):
            yield part

    def model(self) -> EngineSpec | None:
        if self.blocked_until is not None:
            self.blocked_until.wait(30)
        return self.spec


@asynccontextmanager
async def server(
    engine: Engine | None = None, *, tokenizer: Tokenizer | None = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    engine = engine or Engine()
    if tokenizer is not None:
        engine.tokenizer = tokenizer
    app = build_app(
        dispatcher=engine,
        tokenizer=engine.tokenizer,
        config=replace(ServerConfig(), **settings),
        model_name="tiny",
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", headers=JSON, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage() -> Iterator[None]:
    """Unfreeze at the end what `loop_watch` freezes: in between, a collection need not look at all test modules."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class LoopWatch:
    """The longest time for which the event loop could not run, due to this process itself: time in which other
    processes used the CPUs is not counted."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def watch(self) -> None:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        while True:
            await asyncio.sleep(0.001)
            now_s, now_cpu_s = time.perf_counter(), time.process_time()
            self.longest_s = max(self.longest_s, min(now_s - wall_s, now_cpu_s - cpu_s))
            wall_s, cpu_s = now_s, now_cpu_s


@asynccontextmanager
async def loop_watch() -> AsyncIterator[LoopWatch]:
    watch = LoopWatch()
    gc.collect()
    gc.freeze()  # as a server does; otherwise a collection of all imported test modules would be counted
    task = asyncio.create_task(watch.watch())
    await asyncio.sleep(0.01)
    try:
        yield watch
        await asyncio.sleep(0.005)
    finally:
        task.cancel()


CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    num_bytes: int = 0


@contextmanager
def peak_of_memory() -> Iterator[Peak]:
    """Measure the peak growth of this process's memory."""
    peak = Peak()
    gc.collect()
    CLEAR_REFS.write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    yield peak
    peak.num_bytes = status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


async def post_unnoticed(
    client: httpx.AsyncClient, path: str, max_share: float = 0.0, **request: Any
) -> httpx.Response:
    """Send a request and assert that it does not block the loop, or for at most `max_share` of its time: machines
    differ. On a busy machine, one attempt may count the time of another thread; a request that blocks the loop does so
    in every attempt."""
    holds_s = []
    for _ in range(3):
        async with loop_watch() as watch:
            start_s = time.monotonic()
            response = await client.post(path, **request)
            took_s = time.monotonic() - start_s
        holds_s.append(watch.longest_s)
        if watch.longest_s < max(MAX_HOLD_S, max_share * took_s):
            return response
    pytest.fail(f"the event loop was held for {holds_s} s")


async def test_the_watch_notices_a_blocked_event_loop() -> None:
    async with loop_watch() as watch:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        while min(time.perf_counter() - wall_s, time.process_time() - cpu_s) < 0.06:
            pass  # leftover threads of other tests also use processor time of this process
    assert watch.longest_s > MAX_HOLD_S


def filled(start: str, item: str, end: str, num_bytes: int = BODY_BYTES) -> bytes:
    """Return JSON of about `num_bytes` bytes: `item` repeated between `start` and `end`."""
    count = (num_bytes - len(start) - len(end)) // len(item.encode())
    return (start + item * count).encode().rstrip(b",") + end.encode()


EMPTY_MESSAGE = '{"role":"user","content":""},'
ONE_MESSAGE = '{"messages":[{"role":"user","content":"'
IDS = '{"prompt":"x","n":128,"stop_token_ids":['
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "stop ids": ("/v1/completions", lambda: filled(IDS, "5,", "]}", 3 << 20)),
    "some stop ids": ("/v1/completions", lambda: filled(IDS, "5,", "]}", 2000)),
    "empty messages": ("/v1/chat/completions", lambda: filled('{"messages":[', EMPTY_MESSAGE, "]}")),
    "some messages": ("/v1/chat/completions", lambda: filled('{"messages":[', EMPTY_MESSAGE, "]}", 1 << 20)),
    "ids to detokenize": ("/detokenize", lambda: filled('{"tokens":[', "1,", "]}")),
    "some ids to detokenize": ("/detokenize", lambda: filled('{"tokens":[', "1,", "]}", 1 << 20)),
    "prompts of one token": ("/v1/completions", lambda: filled('{"prompt":[', "[1],", "]}")),
    "batch of one token": ("/generate", lambda: filled('{"input_ids":[', "[1],", "]}")),
    "texts": ("/v1/completions", lambda: filled('{"prompt":[', '"ab",', "]}")),
    "logit bias": ("/v1/completions", lambda: bias(700_000)),
    "empty lists": ("/v1/completions", lambda: filled('{"prompt":"x","logit_bias":[', "[],", "]}")),
    "template options": ("/v1/chat/completions", lambda: filled('{"chat_template_kwargs":{', '"a":1,', "}}", 1 << 19)),
    "depth": ("/v1/completions", lambda: b'{"prompt":' + b"[" * (BODY_BYTES - 20)),
    "emoji": ("/v1/completions", lambda: filled('{"prompt":"', "😀", '"}')),
    "emoji to tokenize": ("/tokenize", lambda: filled('{"prompt":"', "😀", '"}')),
    "digits": ("/tokenize", lambda: filled('{"prompt":"', "7", '"}', 2 << 20)),
    "quotes": ("/v1/completions", lambda: filled('{"prompt":"', '\\"', '"}')),
    "one message": ("/v1/chat/completions", lambda: filled(ONE_MESSAGE, "é", '"}]}')),
}  # fmt: skip


def bias(count: int) -> bytes:
    return b'{"prompt":"x","logit_bias":{' + b",".join(b'"%d":1' % one for one in range(count)) + b"}}"


@pytest.mark.case("stop-ids-amplified")
@pytest.mark.case("large-bodies")
@pytest.mark.case("tokenise-unbounded")
@pytest.mark.parametrize("kind", HOSTILE)
async def test_an_expensive_body_is_refused_without_delaying_other_requests(kind: str) -> None:
    path, make = HOSTILE[kind]
    body = make()
    assert len(body) <= BODY_BYTES
    engine = Engine()
    async with server(engine) as client:
        await client.post("/v1/completions", json={"prompt": "x"})
        engine.requests.clear()
        response = await post_unnoticed(client, path, content=body)
    assert response.status_code == 400, response.text[:200]
    assert len(response.content) < 1000
    assert not engine.requests


class Upload:
    """A client without sockets whose body arrives when the test sends it."""

    def __init__(self, app: Any, path: str, declared: int | None, pieces: list[bytes]) -> None:
        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        if declared is not None:
            headers.append((b"content-length", str(declared).encode()))
        self.sent: list[dict[str, Any]] = []
        self._pieces = pieces
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
        }
        self.task = asyncio.create_task(app(self._scope, self._receive, self._send))

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    async def _receive(self) -> dict[str, Any]:
        if not self._pieces:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self._pieces.pop(0), "more_body": True}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


@pytest.mark.case("large-bodies")
@pytest.mark.parametrize("is_declared", [True, False])
async def test_open_bodies_share_a_budget_and_small_requests_are_still_accepted(is_declared: bool) -> None:
    budget_bytes = 64 << 20
    async with server(max_total_body_bytes=budget_bytes, body_timeout_s=30.0) as client:
        app = client._transport.app  # type: ignore[attr-defined]
        piece = b" " * (1 << 20)
        declared = BODY_BYTES if is_declared else None
        uploads = [Upload(app, "/v1/completions", declared, [piece] * 7 + [piece[:-8192]]) for _ in range(60)]
        await asyncio.sleep(0.1)
        refused = [upload for upload in uploads if upload.sent]
        assert {upload.status for upload in refused} == {429}
        assert b"retry-after" in dict(refused[0].sent[0]["headers"])
        held_bytes = (len(uploads) - len(refused)) * (BODY_BYTES - 8192)
        assert budget_bytes / 2 < held_bytes <= budget_bytes + len(uploads) * (64 << 10)
        small = await client.post("/v1/completions", json={"prompt": "x" * 1000})
        assert small.status_code == 200
        large = await client.post("/v1/completions", json={"prompt": "x" * (1 << 20)})
        assert large.status_code == 429
        for upload in uploads:
            upload.task.cancel()
        await asyncio.gather(*(upload.task for upload in uploads), return_exceptions=True)
        large = await client.post("/v1/completions", json={"prompt": "x" * (1 << 20)})
        assert large.status_code == 400  # read, and far too long for the model


@pytest.mark.case("large-bodies")
async def test_a_stalled_body_is_a_408_and_returns_its_bytes_to_the_budget() -> None:
    async with server(max_total_body_bytes=BODY_BYTES, body_timeout_s=0.05) as client:
        app = client._transport.app  # type: ignore[attr-defined]
        upload = Upload(app, "/v1/completions", BODY_BYTES, [b" " * 1024])
        await upload.task
        assert upload.status == 408
        assert b"--body-timeout-s" in upload.sent[1]["body"]
        response = await client.post("/v1/completions", content=b'{"prompt":"' + b"x" * (BODY_BYTES - 100) + b'"}')
        assert response.status_code == 400


@pytest.mark.case("salt-length")
async def test_a_cache_salt_is_at_most_256_bytes_and_engines_get_a_hash_of_one_length() -> None:
    engine = Engine()
    async with server(engine) as client:
        for salt in ("a", "é" * 128, "b" * 256):
            assert (await client.post("/v1/completions", json={"prompt": "x", "cache_salt": salt})).status_code == 200
        native = await client.post("/generate", json={"text": "x", "cache_salt": "a"})
        assert native.status_code == 200
        for salt in ("c" * 257, "é" * 129, "d" * (BODY_BYTES - 100)):
            refused = await client.post("/v1/completions", json={"prompt": "x", "cache_salt": salt})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "cache_salt"
    salts = [request.cache_salt for request in engine.requests]
    assert {len(salt) for salt in salts} == {64}
    assert salts[0] == salts[3]
    assert len(set(salts)) == 3


@pytest.mark.case("stop-ids-amplified")
async def test_lists_are_checked_once_per_job_and_shared_by_its_answers() -> None:
    engine = Engine()
    async with server(engine) as client:
        response = await client.post(
            "/v1/completions", json={"prompt": [[1, 2, 3]], "n": 16, "seed": 7, "stop_token_ids": [5] * 200 + [6]}
        )
    assert response.status_code == 200
    requests = sorted(engine.requests, key=lambda request: request.sampling.seed)
    assert [request.sampling.seed for request in requests] == list(range(7, 23))
    assert {request.sampling.stop_token_ids for request in requests} == {(5, 6)}
    assert len({id(request.sampling.stop_token_ids) for request in requests}) == 1
    assert len({id(request.prompt_token_ids) for request in requests}) == 1


async def test_prompts_times_answers_are_bounded_in_tokens() -> None:
    engine = Engine(spec=msgspec.structs.replace(SPEC, max_model_len=1 << 17))
    async with server(engine) as client:
        response = await client.post("/v1/completions", json={"prompt": [1] * 100_000, "n": 11})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "n"
        assert not engine.requests
        response = await client.post("/v1/completions", json={"prompt": ["a" * 100_000] * 11})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
        assert (await client.post("/v1/completions", json={"prompt": [1] * 100_000, "n": 10})).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_a_long_answer_with_logprobs_does_not_delay_other_requests(path: str, stream: bool) -> None:
    body = {
        "/v1/completions": {"prompt": "x", "logprobs": 20, "max_tokens": 6000},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": "x"}],
            "logprobs": True,
            "top_logprobs": 20,
            "max_tokens": 6000,
        },
        "/generate": {
            "text": "x",
            "return_logprob": True,
            "top_logprobs_num": 20,
            "sampling_params": {"max_new_tokens": 6000},
        },
    }[path]
    async with server(Engine(answer=(65,) * 6000, tokens_per_part=100)) as client:
        response = await post_unnoticed(client, path, json={**body, "stream": stream})
    assert response.status_code == 200
    assert len(response.content) > 1_000_000


async def test_kept_logprobs_are_bounded_and_streams_keep_none() -> None:
    body = {"prompt": "x", "logprobs": 20, "max_tokens": 500, "n": 128}
    async with server(Engine(answer=(65,) * 500, tokens_per_part=100)) as client:
        whole = await client.post("/v1/completions", json=body)
        assert whole.status_code == 400
        assert whole.json()["error"]["param"] == "logprobs"
        assert "`max_tokens`" in whole.json()["error"]["message"]
        streamed = await client.post("/v1/completions", json={**body, "n": 2, "stream": True})
        assert streamed.status_code == 200
        assert "event: error" not in streamed.text
        assert (await client.post("/v1/completions", json={**body, "n": 90})).status_code == 200


async def test_long_prompts_of_many_answers_are_sent_between_events_of_other_streams() -> None:
    engine = Engine(sends=True, answer=(65,) * 1, spec=msgspec.structs.replace(SPEC, max_model_len=1 << 17))
    async with server(engine) as client:
        body = {"prompt": [1] * 60_000, "n": 16}
        response = await post_unnoticed(client, "/v1/completions", max_share=0.3, json=body)
    assert response.status_code == 200
    assert len(engine.requests) % 16 == 0


@pytest.mark.case("tokenise-unbounded")
@pytest.mark.case("large-bodies")
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak memory of a process can be read on Linux only")
@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_body_costs_at_most_64_mb(kind: str) -> None:
    path, make = HOSTILE[kind]
    body = make()
    async with server() as client:
        await client.post(path, json={"prompt": "x"})
        with peak_of_memory() as peak:
            response = await client.post(path, content=body)
    assert response.status_code == 400
    assert peak.num_bytes < 64 << 20


async def test_long_events_for_a_slow_client_are_encoded_on_a_thread() -> None:
    body = {"prompt": "x", "logprobs": 20, "max_tokens": 6000, "stream": True}
    async with server(Engine(answer=(65,) * 6000, tokens_per_part=3000)) as client:
        response = await post_unnoticed(client, "/v1/completions", json=body)
    assert response.status_code == 200


async def test_waiting_for_a_tokenizer_thread_counts_against_the_request_timeout() -> None:
    go = threading.Event()
    engine = Engine()
    async with server(engine, tokenizer_threads=1, request_timeout_s=0.05) as client:
        engine.blocked_until = go  # blocks the worker thread when it reads the model's limits
        try:
            response = await client.post("/v1/completions", json={"prompt": "x" * 5000})
        finally:
            go.set()
    assert response.status_code == 504
    assert "--request-timeout-s" in response.json()["error"]["message"]


@pytest.mark.model
@pytest.mark.case("tokenise-unbounded")
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak memory of a process can be read on Linux only")
@pytest.mark.parametrize("kind", ["emoji", "emoji to tokenize", "digits", "one message"])
async def test_the_real_tokenizer_takes_at_most_64_mb_for_each_of_six_hostile_texts(kind: str) -> None:
    path, make = HOSTILE[kind]
    body = make()
    tokenizer = load_tokenizer(find_checkpoint(None))
    async with server(tokenizer=tokenizer) as client:
        await client.post(path, json={"prompt": "x"})
        with peak_of_memory() as peak:
            responses = await asyncio.gather(*(client.post(path, content=body) for _ in range(6)))
    assert [response.status_code for response in responses] == [400] * 6
    assert peak.num_bytes < 6 * (64 << 20)

"""A dispatcher with scripted answers, and an HTTP client that calls the app without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import httpx
import msgspec
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvist.errors import KvistError
from kvist.request import EngineRequest, EpochId, FinishReason, Role, TokenLogprobs, WorkerId
from kvist.router.stream import ClusterSnapshot, StreamPart, WorkerSnapshot
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_spec
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import Alphabet, Tokenizer
from kvist.wire import (
    EngineSpec,
    FlushTier,
    HandoffReport,
    LoadReport,
    StorageAnswer,
    StorageCommand,
    StorageStatus,
    TokenChunk,
)

PREFILL, DECODE = WorkerId("p:1"), WorkerId("d:1")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('user first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)
HANDOFF = HandoffReport(num_pages=3, num_pages_reused=2, num_bytes=4096, duration_s=0.0125, wait_s=0.001)


def letters_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, and `<|end|>` as end of sequence."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return Tokenizer(
        backend,
        alphabet=Alphabet.BYTE_LEVEL,
        chat_template=ChatTemplate(TEMPLATE, special_tokens={}),
    )


EOS = 256
SPEC = make_spec(
    worker_id=DECODE,
    epoch=EpochId("e1"),
    model_name="tiny",
    vocab_size=300,
    max_model_len=200,
    num_pages=10,
    dtype="fp32",
    max_running_requests=8,
    max_queued_requests=8,
)


STORAGE = StorageStatus(
    hicache_storage_backend="file",
    hicache_storage_path="/pages",
    hicache_storage_size=64.0,
    hicache_storage_prefetch_policy="timeout",
    state="attached",
    breaker="open",
    num_quarantined_pages=128,
    stored_bytes=1000,
    errors={"EIO": 3},
)


@dataclass
class FakeDispatcher:
    """Answers every request with the bytes of `answer` and then EOS, or until max_tokens.

    Raises `error` after `error_after` tokens. Waits for the event `hold` before each token except the first.
    """

    tokenizer: Tokenizer
    answer: str = "hello"
    cuts: Sequence[int] = ()  # tokens in each part; default: one token per part
    error: KvistError | None = None
    error_after: int = 0
    hold: asyncio.Event | None = None
    can_serve: bool = True
    spec: EngineSpec | None = SPEC
    snapshots: ClusterSnapshot = field(default_factory=lambda: ClusterSnapshot(workers=()))
    requests: list[EngineRequest] = field(default_factory=list)
    num_open: int = 0
    num_closed_early: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    flushed: list[FlushTier | None] = field(default_factory=list)
    storage_asked: list[StorageCommand] = field(default_factory=list)
    storage_answers: dict[WorkerId, StorageAnswer] = field(default_factory=dict)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[StreamPart, None]:
        self.requests.append(request)
        self.num_open += 1
        complete = False
        try:
            for part in self._parts(request):
                if self.error is not None and part.chunk.position >= self.error_after:
                    raise self.error
                if self.hold is not None and part.chunk.position > 0:
                    await self.hold.wait()
                complete = part.chunk.finish_reason is not None
                yield part
        finally:
            self.num_open -= 1
            self.num_closed_early += not complete
            self.closed.set()

    def _parts(self, request: EngineRequest) -> list[StreamPart]:
        sampling = request.sampling
        tokens = self.tokenizer.encode(self.answer)
        tokens = tokens if sampling.ignore_eos else [*tokens, EOS]
        reason = FinishReason.STOP if len(tokens) <= sampling.max_tokens else FinishReason.LENGTH
        tokens = tokens[: sampling.max_tokens]
        cuts = list(self.cuts)
        parts: list[StreamPart] = []
        position = 0
        while position < len(tokens):
            token_ids = tuple(tokens[position : position + (cuts.pop(0) if cuts else 1)])
            last = position + len(token_ids) == len(tokens)
            chunk = TokenChunk(
                request_id=request.request_id,
                position=position,
                token_ids=token_ids,
                logprobs=tuple(map(_logprobs, token_ids)) if sampling.num_logprobs is not None else None,
                finish_reason=reason if last else None,
                num_cached_tokens=4 if position == 0 else None,
                num_cached_host_tokens=2 if position == 0 else 0,
                num_cached_storage_tokens=1 if position == 0 else 0,
                handoff=HANDOFF if position == 1 else None,
            )
            parts.append(StreamPart(chunk=chunk, prefill_worker=PREFILL, decode_worker=DECODE))
            position += len(token_ids)
        return parts

    def ready(self) -> bool:
        return self.can_serve

    def model(self) -> EngineSpec | None:
        return self.spec

    async def flush_cache(self, tier: FlushTier | None = None) -> dict[WorkerId, int]:
        self.flushed.append(tier)
        return {PREFILL: 5, DECODE: 7}

    async def send_storage_command(self, ask: StorageCommand) -> dict[WorkerId, StorageAnswer]:
        self.storage_asked.append(ask)
        return self.storage_answers

    def snapshot(self) -> ClusterSnapshot:
        return self.snapshots


def _logprobs(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-0.5, top_token_ids=(token_id, 65), top_logprobs=(-0.5, float("-inf")))


def busy_worker() -> WorkerSnapshot:
    load = LoadReport(
        sequence=1,
        num_running=3,
        num_waiting=2,
        num_free_pages=4,
        num_cached_pages=1,
        num_owned_pages=3,
        num_in_flight_pages=2,
        totals={"handoffs_received": 9.0},
        storage=STORAGE,
    )
    return WorkerSnapshot(worker_id=DECODE, role=Role.DECODE, alive=True, spec=SPEC, load=load)


@dataclass
class Bench:
    """The app under test with its dispatcher, tokenizer and client."""

    dispatcher: FakeDispatcher
    client: httpx.AsyncClient
    app: Callable[..., object]
    config: ServerConfig

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return await self.client.post(path, content=msgspec.json.encode(body), headers=headers)

    async def chat(self, content: str = "hi", **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", {"model": "tiny", "messages": messages, **fields})


def events_of(response: httpx.Response) -> list[object]:
    """Return the decoded `data:` of each server-sent event; "[DONE]" stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found: list[object] = []
    for event in response.text.split("\n\n"):
        for line in event.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(data if data == "[DONE]" else msgspec.json.decode(data))
    return found


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    return letters_tokenizer()


@pytest.fixture
def make_bench(letters: Tokenizer) -> Callable[..., Bench]:
    def make(
        *,
        tokenizer: Tokenizer | None = letters,
        own_role: Role | None = None,
        own_engine: EngineSpec | None = None,
        **settings: object,
    ) -> Bench:
        dispatcher = FakeDispatcher(letters)
        config = replace(ServerConfig(), **settings)
        app = build_app(
            dispatcher=dispatcher,
            tokenizer=tokenizer,
            config=config,
            model_name="tiny",
            own_role=own_role,
            own_engine=lambda: own_engine,
            clock=FakeClock(),
            draw_seed=lambda: 1000,
        )
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
        return Bench(dispatcher, client, app, config)

    return make


@pytest.fixture
async def bench(make_bench: Callable[..., Bench]) -> AsyncIterator[Bench]:
    made = make_bench()
    async with made.client:
        yield made


@pytest.fixture(scope="session")
def read_events() -> Callable[[httpx.Response], list[object]]:
    return events_of


@pytest.fixture
def busy() -> ClusterSnapshot:
    return ClusterSnapshot(workers=(busy_worker(),))

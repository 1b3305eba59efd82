"""Workers of unequal pools or context lengths in one fleet: a request runs where it fits, or is refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from kvist import wire
from kvist.request import FinishReason, Mode, Outcome, Role, WorkerId
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.dispatch import Dispatcher
from kvist.router.registry import Registry, Worker
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.clocks import FakeClock
from kvist.testing.router_bench import MemoryEngines
from kvist.text import Tokenizer
from kvist.wire import StepOutputs, Submit, TokenChunk

PAGE_SIZE = 16
TRAINED_FOR = 8192


class Engines(MemoryEngines):
    """Engines that answer at once. A request beyond the limits of their spec fails the test."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self.used: list[tuple[WorkerId, Mode]] = []
        self.full: set[str] = set()  # these engines refuse every request
        self.on_submit = self._take

    def add(self, name: str, role: Role, *, pool: int, context: int = TRAINED_FOR) -> Worker:
        return self.join(
            name,
            role=role,
            model_name="tiny",
            vocab_size=300,
            max_model_len=min(pool, context),
            page_size=PAGE_SIZE,
            num_pages=pool // PAGE_SIZE,
            max_running_requests=64,
            max_queued_requests=64,
        )

    def _take(self, worker: Worker, submit: Submit) -> None:
        spec, request = worker.spec, submit.request
        assert spec is not None
        needed = request.num_prompt_tokens + (1 if submit.mode is Mode.PREFILL else request.sampling.max_tokens)
        assert needed <= spec.max_model_len, f"{spec.worker_id} cannot hold {needed} tokens"
        self.used.append((spec.worker_id, submit.mode))
        asyncio.get_running_loop().call_soon(self._answer, worker, submit)

    def _answer(self, worker: Worker, submit: Submit) -> None:
        request_id, count = submit.request.request_id, submit.request.sampling.max_tokens
        if worker.worker_id in self.full:
            refused = wire.Ended(request_id=request_id, outcome=Outcome.FAILED, error_code="overloaded")
            self.events.on_outputs(worker, StepOutputs(ended=(refused,)))
            return
        first, last = submit.mode is Mode.DECODE, 1 if submit.mode is Mode.PREFILL else count
        finish = FinishReason.LENGTH if last == count else None
        chunk = TokenChunk(
            request_id=request_id, position=first, token_ids=(65,) * (last - first), finish_reason=finish
        )
        ended = wire.Ended(request_id=request_id, outcome=Outcome.FINISHED)
        self.events.on_outputs(worker, StepOutputs(chunks=(chunk,), ended=(ended,)))


class Fleet:
    def __init__(self, tokenizer: Tokenizer) -> None:
        config = RouterConfig(routing=RoutingOptions(policy="round_robin"))
        registry = Registry(config)
        self.engines = Engines(registry)
        dispatcher = Dispatcher(config=config, registry=registry, engines=self.engines, clock=FakeClock())
        self.engines.start(dispatcher)
        app = build_app(dispatcher=dispatcher, tokenizer=tokenizer, config=ServerConfig(), model_name="tiny")
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://127.0.0.1",
            headers={"content-type": "application/json"},
        )

    async def complete(self, num_prompt: int, max_tokens: int | None) -> httpx.Response:
        body = {"prompt": [65] * num_prompt, "max_tokens": max_tokens}
        return await self.client.post("/v1/completions", content=msgspec.json.encode(body))

    async def max_model_len(self) -> int:
        return int((await self.client.get("/v1/models")).json()["data"][0]["max_model_len"])


@pytest.fixture
async def fleet(letters: Tokenizer) -> AsyncIterator[Fleet]:
    made = Fleet(letters)
    async with made.client:
        yield made


def error_of(response: httpx.Response) -> str:
    assert response.json()["error"]["code"] == "context_length_exceeded"
    return str(response.json()["error"]["message"])


@pytest.mark.case("unequal-pools")
async def test_an_answer_that_decode_cannot_hold_is_refused_before_anything_runs(fleet: Fleet) -> None:
    fleet.engines.add("p", Role.PREFILL, pool=2048)
    fleet.engines.add("d", Role.DECODE, pool=1024)
    response = await fleet.complete(1000, 100)
    assert response.status_code == 400
    assert "1024" in error_of(response)
    assert not fleet.engines.used
    assert (await fleet.complete(1000, 24)).status_code == 200
    assert await fleet.max_model_len() == 1024


@pytest.mark.case("unequal-pools")
@pytest.mark.parametrize(
    ("prefills", "decodes", "used"),
    [
        ([4096], [1024, 4096], {"p0", "d1"}),
        ([1024, 4096], [4096], {"p1", "d0"}),
        ([1024, 4096], [4096, 1024], {"p1", "d0"}),
    ],
)
async def test_the_router_uses_only_workers_that_the_request_fits(
    fleet: Fleet, prefills: list[int], decodes: list[int], used: set[str]
) -> None:
    for role, pools in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
        for index, pool in enumerate(pools):
            fleet.engines.add(f"{str(role)[0]}{index}", role, pool=pool)
    for _ in range(4):  # in turn
        response = await fleet.complete(1200, 100)
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 100
    assert {worker for worker, _ in fleet.engines.used} == used
    assert await fleet.max_model_len() == 4096
    await fleet.complete(100, 10)
    await fleet.complete(100, 10)
    assert len({worker for worker, _ in fleet.engines.used}) == len(prefills) + len(decodes), (
        "short requests run on every worker"
    )


@pytest.mark.case("unequal-pools")
async def test_a_prompt_too_long_for_every_prefill_worker_runs_unified_or_at_decode_alone(fleet: Fleet) -> None:
    fleet.engines.add("p", Role.PREFILL, pool=1024)
    fleet.engines.add("d", Role.DECODE, pool=4096)
    assert (await fleet.complete(2000, 10)).status_code == 200
    assert fleet.engines.used == [("d", Mode.FULL)]
    assert "this server holds at most 4096 tokens" in error_of(await fleet.complete(4090, 10))
    assert (await fleet.complete(1000, 2000)).status_code == 200
    fleet.engines.add("u", Role.UNIFIED, pool=2048)
    assert (await fleet.complete(2000, 10)).status_code == 200
    assert fleet.engines.used[-1] == ("u", Mode.FULL)
    assert await fleet.max_model_len() == 4096


@pytest.mark.case("unequal-pools")
async def test_a_retry_goes_to_a_worker_that_the_request_fits(fleet: Fleet) -> None:
    for name, pool in (("a", 2048), ("b", 1024), ("c", 2048)):
        fleet.engines.add(name, Role.UNIFIED, pool=pool)
    fleet.engines.full = {"a"}
    assert (await fleet.complete(1500, 10)).status_code == 200
    assert [worker for worker, _ in fleet.engines.used] == ["a", "c"]
    fleet.engines.full = {"a", "c"}
    assert (await fleet.complete(1500, 10)).status_code == 429


@pytest.mark.case("unequal-pools")
async def test_a_request_that_fits_only_a_lost_worker_is_refused_as_retryable(fleet: Fleet) -> None:
    fleet.engines.add("small", Role.UNIFIED, pool=1024)
    large = fleet.engines.add("large", Role.UNIFIED, pool=4096)
    assert (await fleet.complete(1000, None)).status_code == 200
    fleet.engines.lose(large)
    for max_tokens, status in ((10, 200), (100, 503)):
        response = await fleet.complete(1000, max_tokens)
        assert response.status_code == status
    assert "is lost or stopping" in response.json()["error"]["message"]
    assert "retry-after" in response.headers
    assert (await fleet.complete(1000, 5000)).status_code == 400, "too long for the lost worker as well"


@pytest.mark.case("limit-named")
@pytest.mark.parametrize(
    ("pool", "context", "limit", "option"),
    [(1024, 8192, 1024, "page pool (--max-total-tokens)"), (4096, 512, 512, "context length (--context-length)")],
)
@pytest.mark.parametrize("prompt", [[65] * 2000, "A" * 2000, "A" * 300_000, [[65], [65] * 2000]])
async def test_the_error_for_a_long_prompt_names_the_binding_limit_and_its_option(
    fleet: Fleet, pool: int, context: int, limit: int, option: str, prompt: object
) -> None:
    fleet.engines.add("u", Role.UNIFIED, pool=pool, context=context)
    response = await fleet.client.post("/v1/completions", content=msgspec.json.encode({"prompt": prompt}))
    message = error_of(response)
    assert f" {limit} tokens" in message
    assert option in message

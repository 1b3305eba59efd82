"""The gateway's HTTP application over a scripted dispatcher, called without sockets.

bench = gateway_bench()
async with bench.client:
    bench.dispatcher.answer = "Paris"
    response = await bench.chat("the capital of France?")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from kvist.agents_api import agent_apis
from kvist.api_docs import docs_api
from kvist.clock import Clock
from kvist.dashboard import dashboard_api
from kvist.flight.flight_log import FlightLog
from kvist.prompt_work import prompt_api
from kvist.request import Role
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.server.middleware import TrafficMiddleware
from kvist.testing.clocks import FakeClock
from kvist.testing.scripted_dispatcher import ScriptedDispatcher
from kvist.testing.tokenizers import byte_tokenizer
from kvist.tracing import tracing_api
from kvist.wire import EngineSpec

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SEED = 1000  # that the gateway draws for requests without one


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayBench:
    """The application under test, its dispatcher and its client, which the test closes."""

    dispatcher: ScriptedDispatcher
    client: httpx.AsyncClient
    app: TrafficMiddleware
    config: ServerConfig

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return await self.client.post(path, content=msgspec.json.encode(body), headers=headers)

    async def chat(self, content: str = "hi", /, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", {"model": "tiny", "messages": messages, **fields})


def gateway_bench(
    *,
    dispatcher: ScriptedDispatcher | None = None,
    config: ServerConfig | None = None,
    own_engine: EngineSpec | None = None,
    own_role: Role | None = None,
    model_name: str = "tiny",
    flights: FlightLog | None = None,
    clock: Clock | None = None,
) -> GatewayBench:
    """Build the application of a router, or, with `own_role`, of a worker: prefill and decode have no tokenizer."""
    dispatcher = dispatcher or ScriptedDispatcher(byte_tokenizer(chat_template=CHAT_TEMPLATE))
    config = config or ServerConfig()
    app = build_app(
        dispatcher=dispatcher,
        tokenizer=dispatcher.tokenizer if own_role is None or own_role.serves_alone else None,
        config=config,
        model_name=model_name,
        apis=(*agent_apis(), prompt_api, docs_api, dashboard_api, tracing_api),
        flights=flights,
        own_role=own_role,
        own_engine=lambda: own_engine,
        clock=clock or FakeClock(),
        draw_seed=lambda: SEED,
    )
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://localhost",
    )
    return GatewayBench(dispatcher=dispatcher, client=client, app=app, config=config)


def events_of(response: httpx.Response) -> list[Any]:
    """Return the decoded `data:` of each server-sent event; "[DONE]" stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for event in response.text.split("\n\n") for line in event.splitlines()]
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [data if data == "[DONE]" else msgspec.json.decode(data) for data in found]

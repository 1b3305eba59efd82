"""The application over a scripted dispatcher (kvist.testing), with the settings that a test names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Protocol

import pytest

from kvist.request import Role
from kvist.router.stream import ClusterSnapshot, WorkerSnapshot
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.testing.scripted_dispatcher import BYTE_MODEL, DECODE, ScriptedDispatcher
from kvist.testing.specs import make_load
from kvist.testing.tokenizers import byte_tokenizer
from kvist.text.tokenizer import Tokenizer
from kvist.wire import EngineSpec, StorageStatus

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('user first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)
STORAGE = StorageStatus(
    backend="file",
    options={"path": "/pages", "size": 64.0},
    prefetch_policy="timeout",
    state="attached",
    breaker="open",
    num_quarantined_pages=128,
    stored_bytes=1000,
    errors={"EIO": 3},
)


def busy_worker() -> WorkerSnapshot:
    load = make_load(
        num_running=3,
        num_waiting=2,
        num_free_pages=4,
        num_cached_pages=1,
        num_owned_pages=3,
        num_in_flight_pages=2,
        totals={"handoffs_received": 9.0},
        storage=STORAGE,
    )
    return WorkerSnapshot(worker_id=DECODE, role=Role.DECODE, alive=True, spec=BYTE_MODEL, load=load)


class MakeBench(Protocol):
    """Build the application; `settings` are fields of `ServerConfig`."""

    def __call__(
        self,
        *,
        own_role: Role | None = None,
        own_engine: EngineSpec | None = None,
        model_name: str = "tiny",
        **settings: Any,
    ) -> GatewayBench: ...


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    return byte_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def make_bench(letters: Tokenizer) -> MakeBench:
    def make(
        *,
        own_role: Role | None = None,
        own_engine: EngineSpec | None = None,
        model_name: str = "tiny",
        **settings: Any,
    ) -> GatewayBench:
        return gateway_bench(
            dispatcher=ScriptedDispatcher(letters),
            config=replace(ServerConfig(), **settings),
            own_engine=own_engine,
            own_role=own_role,
            model_name=model_name,
        )

    return make


@pytest.fixture
async def bench(make_bench: MakeBench) -> AsyncIterator[GatewayBench]:
    made = make_bench()
    async with made.client:
        yield made


@pytest.fixture
def busy() -> ClusterSnapshot:
    return ClusterSnapshot(workers=(busy_worker(),))

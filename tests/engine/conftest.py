"""A simulated cluster for engine tests: real schedulers, runner, pages and transport; messages pass through memory, and
the test moves the clock.

`World` steps its engines in turn. Messages are encoded and decoded in between, as on a socket.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from kvist import wire
from kvist.attention import build_attention
from kvist.channel.engine import Inbound, Outbound
from kvist.checkpoint import find_checkpoint
from kvist.engine.assembly import make_storage
from kvist.engine.loop import EngineLoop, LoopParts
from kvist.engine.reports import LoadReports
from kvist.kv.cache import PageCache
from kvist.kv.layout import PageLayout, namespace
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.kv.tiers.storage import StorageTier
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool
from kvist.memory.page_copier import PageMover
from kvist.models import load_model_config
from kvist.models.decoder import CausalLM
from kvist.models.load import load_model
from kvist.models.parallel import TensorParallel
from kvist.request import (
    EngineRequest,
    EpochId,
    FinishReason,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    Role,
    SamplingParams,
    TokenLogprobs,
    WorkerId,
    needs_known_token,
)
from kvist.runner.runner import Runner
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.scheduler import Scheduler, SchedulerConfig, build_scheduler
from kvist.store.config import StorageConfig
from kvist.store.control import StorageControl
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_spec
from kvist.transfer import Transport, make_transport
from kvist.transfer.epoch import EpochLock

PAGE_SIZE = 4
CHUNK = 8
GIVE_UP_S = 60.0  # of real time: generous, for busy machines
GATEWAY = b"gateway"
TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "hidden_act": "silu",
}


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(TINY_MODEL))
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_model_path: Path) -> CausalLM:
    torch.set_num_threads(1)
    checkpoint = find_checkpoint(str(tiny_model_path))
    return load_model(
        checkpoint,
        load_model_config(checkpoint),
        dtype=torch.float32,
        device=torch.device("cpu"),
        tp=TensorParallel(),
        load_format="dummy",
        seed=3,
    )


@dataclass
class Stream:
    """The gateway's state of one request."""

    waits_for: set[EpochId]  # the engines that still have to send their one `Ended`; dead engines are removed
    num_submits: int
    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position
    finish: FinishReason | None = None
    cached: int | None = None
    handoff: wire.HandoffReport | None = None
    ended: list[wire.Ended] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(len(self.tokens))), "a position is missing"
        return [self.tokens[position] for position in range(len(self.tokens))]


class MemoryChannel:
    def __init__(self, world: World, epoch: EpochId, endpoint: str) -> None:
        self.num_undecodable = self.num_unexpected = self.num_refused = 0
        self.waiting: list[tuple[bytes, Inbound]] = []
        self.epoch, self.endpoint = epoch, endpoint
        self._world = world

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]:
        assert timeout_s >= 0
        received, self.waiting = self.waiting, []
        return received

    def send(self, identity: bytes, message: Outbound) -> bool:
        if identity == GATEWAY:
            self._world.heard_at_gateway(self.epoch, wire.Decoder(wire.EngineToGateway).decode(wire.encode(message)))
            return True
        peer = self._world.by_epoch(identity.decode())
        if peer is None:
            return False
        peer.channel.waiting.append(
            (self.endpoint.encode(), wire.Decoder(wire.SourceToTarget).decode(wire.encode(message)))
        )
        return True

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        for peer in self._world.engines:
            if peer.channel.endpoint == endpoint:
                decoded = wire.Decoder(wire.ToEngine).decode(wire.encode(message))
                peer.channel.waiting.append((self.epoch.encode(), decoded))
        return True  # queued, as in a socket, whether or not the peer listens

    def wakeup(self) -> None:
        self._world.woken.set()


@dataclass
class SmallEngine:
    channel: MemoryChannel
    loop: EngineLoop
    scheduler: Scheduler
    transport: Transport
    pool: DevicePool
    lock: EpochLock
    mover: PageMover | None = None
    storage: StorageControl | None = None
    namespace: str = ""

    @property
    def idle(self) -> bool:
        host = self.scheduler.load().host_pages
        return (
            not self.scheduler.has_work()
            and (host is None or host.in_flight == 0)
            and not self.channel.waiting
            and not self.loop._in_flight
            and not self.loop._pending_events
        )

    @property
    def sleeps(self) -> bool:
        return not self.channel.waiting and self.loop.idle_s() > 0.0

    @property
    def threads_work(self) -> bool:
        """Return whether threads may be copying pages. Pages also stay in flight until a peer answers."""
        load = self.scheduler.load()
        if load.pages.in_flight or (load.host_pages is not None and load.host_pages.in_flight):
            return True
        if self.storage is None:
            return False
        stores = self.storage._mover._stores()
        asked = any(queue.waiting or queue.calls for each in stores for queue in (each._reads, each._writes))
        return asked or self.storage.status().state in ("attaching", "detaching")

    def die(self) -> None:
        if self.storage is not None:
            self.storage.close()
        if self.mover is not None:
            self.mover.close()
        self.transport.close()
        self.pool.close()
        self.lock.close()


class World:
    """One gateway and any number of engines. `run` steps them until every request has ended and no page is in flight.

    Real threads copy pages while the test moves the clock. Engines without work wait for these threads, as in a real
    sleep, so that the clock does not run ahead of a thread that is slow on a busy machine.
    """

    def __init__(self, model: CausalLM, runtime_dir: Path, *, overlap: bool = False) -> None:
        self._overlap = overlap
        self.clock = FakeClock(1.0)
        self.woken = threading.Event()
        self.engines: list[SmallEngine] = []
        self.streams: dict[str, Stream] = {}
        self.storage_answers: dict[str, wire.StorageAnswer] = {}
        self._model = model
        self._runtime_dir = runtime_dir
        self._num_made = 0

    # ------------------------------------------------------------ engines

    def engine(
        self,
        role: str,
        *,
        num_pages: int = 64,
        num_host_pages: int = 0,
        storage: StorageConfig | None = None,
        fingerprint: str = "tiny",
        **config: float,
    ) -> SmallEngine:
        """Start an engine. `storage` needs host pages; requests then wait until all pages are fetched, in spite of the
        settings."""
        self._num_made += 1
        epoch = EpochId(f"{role}{self._num_made}")
        lock = EpochLock(self._runtime_dir, epoch)
        model = self._model.config
        layout = PageLayout(
            num_kv_heads=model.num_kv_heads,
            num_layers=model.num_layers,
            page_size=PAGE_SIZE,
            head_dim=model.head_dim,
            dtype="float32",
        )
        pool = DevicePool.create(layout, num_pages, device=torch.device("cpu"), directory=self._runtime_dir)
        pool.tensor.fill_(float("nan"))  # pages that were never written must not matter
        attention = build_attention("torch", pool.tensor.device)
        attention.bind(pool.tensor)
        host_tier = HostTier(num_host_pages) if num_host_pages else None
        prefetch = PrefetchConfig(policy="wait_complete", threshold_tokens=1)
        cache = PageCache(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            namespace=namespace(fingerprint, layout),
            host=host_tier,
            storage=None if host_tier is None else StorageTier(host_tier, prefetch, page_size=PAGE_SIZE),
        )
        scheduler_config = replace(
            SchedulerConfig(
                chunked_prefill_size=CHUNK,
                max_prefill_tokens=16,
                max_running_requests=16,
                max_model_len=min(256, num_pages * PAGE_SIZE),
                eos_token_ids=model.eos_token_ids,
                overlap=self._overlap,
            ),
            **config,  # type: ignore[arg-type]
        )
        scheduler = build_scheduler(
            Role(role), scheduler_config, cache, epoch, pool.address, needs_known_token=needs_known_token
        )
        channel = MemoryChannel(self, epoch, f"mem://{epoch}")
        transport = make_transport(pool, runtime_dir=self._runtime_dir, wakeup=channel.wakeup)
        mover, engine_storage = None, None
        if num_host_pages:
            host_pool = HostPool(num_host_pages, layout.page_bytes, pinned=False)
            mover = PageMover(pool, host_pool, wakeup=channel.wakeup, clock=self.clock)
            engine_storage = make_storage(
                storage or StorageConfig(), host_pool, namespace(fingerprint, layout), channel.wakeup, self.clock
            )
            engine_storage.open_configured()
        parts = LoopParts(
            spec=self._spec(role, epoch, channel.endpoint, num_pages),
            scheduler=scheduler,
            runner=Runner(
                model=self._model,
                pool=pool,
                attention=attention,
                table=SlotTable(
                    table_sizes(
                        scheduler_config.max_running_requests,
                        vocab_size=model.vocab_size,
                        context_len=scheduler_config.max_model_len,
                    ),
                    pool.tensor.device,
                ),
            ),
            channel=channel,
            transport=transport,
            reports=LoadReports(snapshot=cache.snapshot),
            clock=self.clock,
            gateway_timeout_s=1e9,
            mover=mover,
            storage=engine_storage,
            overlap=bool(scheduler_config.overlap),
        )
        made = SmallEngine(
            channel, EngineLoop(parts), scheduler, transport, pool, lock, mover, engine_storage, cache._namespace
        )
        self.engines.append(made)
        return made

    def _spec(self, role: str, epoch: EpochId, endpoint: str, num_pages: int) -> wire.EngineSpec:
        return make_spec(
            worker_id=WorkerId(epoch),
            epoch=epoch,
            role=Role(role),
            endpoint=endpoint,
            model_fingerprint="tiny",
            model_name="tiny",
            vocab_size=self._model.config.vocab_size,
            max_model_len=256,
            page_size=PAGE_SIZE,
            num_pages=num_pages,
            max_running_requests=16,
            max_queued_requests=16,
        )

    def by_epoch(self, epoch: str) -> SmallEngine | None:
        return next((engine for engine in self.engines if engine.channel.epoch == epoch), None)

    def kill(self, engine: SmallEngine) -> None:
        """Kill the engine, like SIGKILL: it takes no further step, and its locks and files are released."""
        self.engines.remove(engine)
        engine.die()
        for stream in self.streams.values():
            stream.waits_for.discard(engine.channel.epoch)

    # ------------------------------------------------------------ the gateway

    def submit_full(self, engine: SmallEngine, request: EngineRequest) -> Stream:
        stream = self.streams[request.request_id] = Stream({engine.channel.epoch}, num_submits=1)
        engine.channel.waiting.append((GATEWAY, wire.Submit(request=request, mode=Mode.FULL)))
        return stream

    def submit_pair(self, prefill: SmallEngine, decode: SmallEngine, request: EngineRequest) -> Stream:
        epochs = {prefill.channel.epoch, decode.channel.epoch}
        stream = self.streams[request.request_id] = Stream(epochs, num_submits=2)
        handoff = HandoffId(f"handoff-{request.request_id}")
        peer = wire.PrefillPeer(
            worker_id=WorkerId(prefill.channel.epoch),
            endpoint=prefill.channel.endpoint,
            epoch=prefill.channel.epoch,
        )
        to_prefill = wire.Submit(
            request=request, mode=Mode.PREFILL, handoff_id=handoff, target_epoch=decode.channel.epoch
        )
        to_decode = wire.Submit(request=request, mode=Mode.DECODE, handoff_id=handoff, prefill=peer)
        prefill.channel.waiting.append((GATEWAY, to_prefill))
        decode.channel.waiting.append((GATEWAY, to_decode))
        return stream

    def abort(self, request_id: str) -> None:
        for engine in self.engines:
            engine.channel.waiting.append((GATEWAY, wire.Abort(request_id=RequestId(request_id))))

    def ask_storage(
        self, engine: SmallEngine, action: str, step_s: float = 0.001, **fields: object
    ) -> wire.StorageAnswer:
        """Send a storage command and step until it is answered."""
        call_id = self.ask_later(engine, action, **fields)
        self.step_until(lambda: call_id in self.storage_answers, step_s)
        return self.storage_answers[call_id]

    def ask_later(self, engine: SmallEngine, action: str, **fields: object) -> str:
        """Send a storage command without a step; return the id of the call."""
        self._num_made += 1
        own = {name: fields.pop(name, None) for name in ("backend", "prefetch_policy")}
        store = wire.AttachStore(**own, options=fields)  # type: ignore[arg-type]
        call = wire.StorageCommand(call_id=str(self._num_made), action=action, store=store)  # type: ignore[arg-type]
        engine.channel.waiting.append((GATEWAY, call))
        return call.call_id

    def heard_at_gateway(self, epoch: EpochId, message: object) -> None:
        if isinstance(message, wire.StorageAnswer):
            self.storage_answers[message.call_id] = message
        if not isinstance(message, wire.StepOutputs):
            return
        for chunk in message.chunks:
            stream = self.streams[chunk.request_id]
            for offset, token_id in enumerate(chunk.token_ids):
                position = chunk.position + offset
                assert position not in stream.tokens, f"{chunk.request_id}: position {position} came twice"
                stream.tokens[position] = token_id
                if chunk.logprobs is not None:
                    stream.logprobs[position] = chunk.logprobs[offset]
            for position, found in enumerate(chunk.prompt_logprobs, chunk.prompt_position):
                assert not stream.tokens, f"{chunk.request_id}: logprobs of the prompt after a token"
                assert position not in stream.prompt_logprobs, (
                    f"{chunk.request_id}: position {position} is scored twice"
                )
                stream.prompt_logprobs[position] = found
            stream.finish = chunk.finish_reason or stream.finish
            stream.handoff = chunk.handoff or stream.handoff
            if chunk.num_cached_tokens is not None:
                stream.cached = chunk.num_cached_tokens
        for ended in message.ended:
            stream = self.streams[ended.request_id]
            assert epoch in stream.waits_for, f"{ended.request_id} ended twice at {epoch}"
            stream.waits_for.remove(epoch)
            stream.ended.append(ended)

    # ------------------------------------------------------------ time

    def step(self, step_s: float = 0.001) -> None:
        for engine in self.engines:
            engine.loop.iterate(0.0)
        if all(each.sleeps for each in self.engines) and any(each.threads_work for each in self.engines):
            self.woken.wait(0.001)
            self.woken.clear()
        self.clock.advance(step_s)

    def step_until(self, condition: Callable[[], object], step_s: float = 0.001) -> None:
        """Step until the condition holds. The limit is in real seconds, because transfers take real time."""
        give_up_s = time.monotonic() + GIVE_UP_S
        while not condition():
            assert time.monotonic() < give_up_s, f"stuck: {self.streams}, {[e.scheduler.load() for e in self.engines]}"
            self.step(step_s)

    def run(self, step_s: float = 0.001) -> None:
        def is_over() -> bool:
            return not any(each.waits_for for each in self.streams.values()) and all(each.idle for each in self.engines)

        self.step_until(is_over, step_s)

    def check_ledgers(self) -> None:
        """Check that no page is owned: every page is free or cached."""
        for engine in self.engines:
            pages = engine.scheduler.load().pages
            assert (pages.owned, pages.in_flight) == (0, 0), pages
            assert pages.free + pages.cached == pages.total
            assert pages.evictable == pages.cached

    def answer(self, engine: SmallEngine, request: EngineRequest) -> Stream:
        stream = self.submit_full(engine, request)
        self.run()
        assert [ended.outcome for ended in stream.ended] == [Outcome.FINISHED], stream.ended
        return stream

    def close(self) -> None:
        for engine in self.engines:
            engine.die()


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def world(tiny_model: CausalLM, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(tiny_model, tmp_path.resolve(), overlap=request.param)
    yield made
    made.close()


def make_request(request_id: str, prompt: tuple[int, ...], **sampling: object) -> EngineRequest:
    params = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    return EngineRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=prompt,
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
    )


@pytest.fixture
def request_of():  # type: ignore[no-untyped-def]
    return make_request

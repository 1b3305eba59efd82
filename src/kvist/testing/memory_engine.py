"""A whole engine in one process and one thread: real scheduler, runner, pages, tiers and transport, and a tiny model.

Its channel is memory: messages are encoded and decoded, as on a socket, and given to a `Network`. Only the copies of
pages use threads, as in any engine. memory_cluster.py connects engines with a gateway, and steps them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from kvist import wire
from kvist.attention import build_attention
from kvist.channel.engine import Inbound, Outbound
from kvist.clock import Clock
from kvist.engine.assembly import make_storage, store_context
from kvist.engine.grammar_jobs import GrammarJobs
from kvist.engine.in_flight import LaunchedStep
from kvist.engine.loop import EngineLoop, LoopParts
from kvist.engine.page_events import PageEventLog
from kvist.engine.reports import LoadReports
from kvist.engine.roles import RoleSwitch
from kvist.grammar.compiler import GrammarCompiler
from kvist.kv.cache import PageCache
from kvist.kv.layout import PageLayout, namespace
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.kv.tiers.storage import StorageTier
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool
from kvist.memory.page_copier import PageMover
from kvist.memory.runtime_dir import host_id
from kvist.models.decoder import CausalLM
from kvist.plan.tiers import CancelFetch, StorageAttached, StoreJob, StoreReport
from kvist.plan.transfers import VerifyPages
from kvist.request import EpochId, Role
from kvist.runner.runner import Runner
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.scheduler import Scheduler, SchedulerConfig, build_scheduler
from kvist.store.config import StorageConfig
from kvist.store.control import StorageControl
from kvist.testing.specs import make_peer_spec, make_spec
from kvist.testing.tiny_model import MAX_MODEL_LEN
from kvist.transfer import make_transports
from kvist.transfer.epoch import EpochLock

PAGE_SIZE = 4
GATEWAY = b"gateway"


class Network(Protocol):
    """Delivers the messages of engines."""

    def to_gateway(self, epoch: EpochId, message: object) -> None: ...

    def to_epoch(self, epoch: str, sender: bytes, message: object) -> bool:
        """Return False if no engine of this epoch lives."""

    def to_endpoint(self, endpoint: str, sender: bytes, message: object) -> None: ...

    def wake(self) -> None:
        """End the sleep of all engines. Called from any thread."""


class MemoryChannel:
    """The engine's `Channel` over a network in memory. Mutable; the loop's, but `waiting` is filled by the network."""

    def __init__(self, network: Network, epoch: EpochId) -> None:
        self.num_undecodable = self.num_unexpected = self.num_refused = 0
        self.waiting: list[tuple[bytes, Inbound]] = []
        self.epoch, self.endpoint = epoch, f"mem://{epoch}"
        self._network = network

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]:
        assert timeout_s >= 0
        received, self.waiting = self.waiting, []
        return received

    def send(self, identity: bytes, message: Outbound) -> bool:
        if identity == GATEWAY:
            self._network.to_gateway(self.epoch, wire.Decoder(wire.EngineToGateway).decode(wire.encode(message)))
            return True
        decoded = wire.Decoder(wire.SourceToTarget).decode(wire.encode(message))
        return self._network.to_epoch(identity.decode(), self.endpoint.encode(), decoded)

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        decoded = wire.Decoder(wire.ToEngine).decode(wire.encode(message))
        self._network.to_endpoint(endpoint, self.epoch.encode(), decoded)
        return True  # queued, as in a socket, whether or not the peer listens

    def wakeup(self) -> None:
        self._network.wake()


class WatchedStorage:
    """The loop's storage, which counts the jobs, and those that the store has not answered. Mutable; the loop's."""

    def __init__(self, storage: StorageControl) -> None:
        self.num_started = self.num_open = 0
        self._storage = storage
        self.on_command, self.answers = storage.on_command, storage.answers
        self.status, self.totals = storage.status, storage.totals

    def start(self, job: StoreJob) -> None:
        self.num_started += 1
        self.num_open += not isinstance(job, CancelFetch)
        self._storage.start(job)

    def poll(self) -> list[StoreReport | StorageAttached]:
        reports = self._storage.poll()
        self.num_open -= sum(not isinstance(report, StorageAttached) for report in reports)
        return reports


_WAIT_COMPLETE = PrefetchConfig(policy="wait_complete", threshold_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The sizes and settings of an engine. By default requests wait until all pages are fetched from the store."""

    role: Role = Role.UNIFIED
    num_pages: int = 64
    num_host_pages: int = 0  # a host tier, and with it a storage tier, if more than 0
    storage: StorageConfig = field(default_factory=StorageConfig)
    write_policy: str = "write_through"
    prefetch: PrefetchConfig = _WAIT_COMPLETE
    fingerprint: str = "tiny"  # of the model: engines with another one share no pages
    overlap: bool = False
    grammars: GrammarCompiler | None = None  # None: no request may have a constraint
    queue_timeout_s: float = 60.0
    transports: str = "auto"  # that the engine offers


class MemoryEngine:
    """One engine. `loop.iterate` runs it; `die` ends it like SIGKILL: locks, files and threads are released."""

    def __init__(
        self, model: CausalLM, shape: EngineShape, epoch: EpochId, network: Network, runtime_dir: Path, clock: Clock
    ) -> None:
        self.shape = shape
        self.channel = MemoryChannel(network, epoch)
        self._lock = EpochLock(runtime_dir, epoch)
        layout = layout_of(model)
        self.namespace = namespace(shape.fingerprint, layout)
        self._pool = DevicePool.create(layout, shape.num_pages, device=torch.device("cpu"), directory=runtime_dir)
        self._pool.tensor.fill_(float("nan"))  # pages that were never written must not matter
        cache = make_cache(shape, self.namespace)
        config = scheduler_config(model, shape)
        wakeup = self.channel.wakeup
        self._transport = make_transports(self._pool, runtime_dir=runtime_dir, wakeup=wakeup, names=shape.transports)
        self.as_peer = make_peer_spec(
            *self._transport.addresses,
            worker_id=epoch,
            model_fingerprint=shape.fingerprint,
            dtype=layout.dtype,
            page_size=layout.page_size,
            host_id=host_id(runtime_dir),
        )
        self.scheduler: Scheduler = build_scheduler(shape.role, config, cache, epoch, self.as_peer)
        self._mover: PageMover | None = None
        self._storage: StorageControl | None = None
        self._watched: WatchedStorage | None = None
        if shape.num_host_pages:
            host_pool = HostPool(shape.num_host_pages, layout.page_bytes, pinned=False)
            self._mover = PageMover(self._pool, host_pool, wakeup=wakeup, clock=clock)
            context = store_context(shape.storage, host_pool, self.namespace, advertised_host="127.0.0.1")
            storage_config = dataclasses.replace(shape.storage, hicache_storage_read_processes=0)
            self._storage = make_storage(storage_config, host_pool, context, wakeup, clock)
            self._watched = WatchedStorage(self._storage)
            self._storage.open_configured()
        attention = build_attention("torch", self._pool.tensor.device)
        attention.bind(self._pool.tensor)
        sizes = table_sizes(
            config.max_running_requests, vocab_size=model.config.vocab_size, context_len=config.max_model_len
        )
        table = SlotTable(sizes, self._pool.tensor.device, shape.grammars)
        runner = Runner(model=model, pool=self._pool, attention=attention, table=table)
        self._grammars = None if shape.grammars is None else GrammarJobs(shape.grammars, wakeup)
        parts = LoopParts(
            spec=self._spec(model, config),
            scheduler=self.scheduler,
            runner=runner,
            channel=self.channel,
            transport=self._transport,
            reports=LoadReports(),
            page_events=PageEventLog(list_pages=cache.list_pages),
            clock=clock,
            gateway_timeout_s=1e9,
            watch_step=_computed_at_launch,
            roles=RoleSwitch(shape.role),
            mover=self._mover,
            storage=self._watched,
            grammars=self._grammars,
            overlap=shape.overlap,
        )
        self.loop = EngineLoop(parts)

    def _spec(self, model: CausalLM, config: SchedulerConfig) -> wire.EngineSpec:
        return make_spec(
            worker_id=self.channel.epoch,
            epoch=self.channel.epoch,
            role=self.shape.role,
            endpoint=self.channel.endpoint,
            model_fingerprint="tiny",
            model_name="tiny",
            vocab_size=model.config.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            page_size=PAGE_SIZE,
            num_pages=self.shape.num_pages,
            num_host_pages=self.shape.num_host_pages,
            max_running_requests=config.max_running_requests,
            max_queued_requests=config.max_queued_requests,
        )

    @property
    def storage(self) -> StorageControl:
        """The storage tier; the engine must have host pages."""
        assert self._storage is not None, "an engine without host pages has no storage tier"
        return self._storage

    @property
    def num_store_jobs(self) -> int:
        """Number of jobs that the loop has given to the storage tier."""
        return 0 if self._watched is None else self._watched.num_started

    @property
    def num_host_pages_in_flight(self) -> int:
        host = self.scheduler.status().host_pages
        return 0 if host is None else host.in_flight

    @property
    def idle(self) -> bool:
        """Whether every request and every copy is over, and no message waits."""
        return (
            not self.scheduler.has_work()
            and not self.num_host_pages_in_flight
            and not self.channel.waiting
            and not self.loop.has_pending
        )

    @property
    def sleeps(self) -> bool:
        """Whether the loop would sleep in `recv` now."""
        return not self.channel.waiting and self.loop.idle_s() > 0.0

    @property
    def threads_work(self) -> bool:
        """Whether threads may be copying pages or compiling. Pages also stay in flight until a peer answers."""
        if self._grammars is not None and self._grammars.num_open:
            return True
        if self.scheduler.status().pages.in_flight or self.num_host_pages_in_flight:
            return True
        if self._watched is None:
            return False
        return self._watched.num_open > 0 or self._watched.status().state in ("attaching", "detaching")

    def change_next_arrival(self) -> None:
        """Change a byte of the first page of the next pages that arrive, before they are verified."""
        verify = self._transport.verify

        def change_and_verify(job: VerifyPages) -> None:
            self._pool.bytes[job.page_ids[0], 0] ^= 1
            self._transport.verify = verify  # type: ignore[method-assign]
            verify(job)

        self._transport.verify = change_and_verify  # type: ignore[method-assign]

    def die(self) -> None:
        if self._storage is not None:
            self._storage.close()
        if self._mover is not None:
            self._mover.close()
        self._transport.close()
        self._pool.close()
        self._lock.close()


def _computed_at_launch(_step: LaunchedStep) -> None:
    raise AssertionError("the runner of a CPU computes a step when it launches it")


def layout_of(model: CausalLM) -> PageLayout:
    return PageLayout(
        num_kv_heads=model.config.num_kv_heads,
        num_layers=model.config.num_layers,
        page_size=PAGE_SIZE,
        head_dim=model.config.head_dim,
        dtype="float32",
    )


def make_cache(shape: EngineShape, model_namespace: str) -> PageCache:
    host = HostTier(shape.num_host_pages) if shape.num_host_pages else None
    storage = None if host is None else StorageTier(host, shape.prefetch, page_size=PAGE_SIZE)
    return PageCache(
        num_pages=shape.num_pages,
        page_size=PAGE_SIZE,
        namespace=model_namespace,
        host=host,
        write_policy=shape.write_policy,
        storage=storage,
    )


def scheduler_config(model: CausalLM, shape: EngineShape) -> SchedulerConfig:
    return SchedulerConfig(
        chunked_prefill_size=8,
        max_prefill_tokens=16,
        max_running_requests=16,
        max_model_len=min(MAX_MODEL_LEN, shape.num_pages * PAGE_SIZE),
        eos_token_ids=model.config.eos_token_ids,
        overlap=shape.overlap,
        queue_timeout_s=shape.queue_timeout_s,
    )

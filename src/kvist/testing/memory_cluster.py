"""A cluster in one process: any number of engines (memory_engine.py) and a gateway, stepped by a test.

    cluster = MemoryCluster(load_tiny_model(folder), runtime_dir)
    prefill, decode = cluster.start(role=Role.PREFILL), cluster.start(role=Role.DECODE)
    stream = cluster.submit_pair(prefill, decode, make_request("r", range(3, 20)))
    cluster.run()                                         # until every request has ended
    stream.token_ids                                      # what the client gets
    cluster.close()

Real threads copy pages while the test moves the clock. Engines without work wait for these threads, as in a real sleep,
so that the clock does not run ahead of a thread that is slow on a busy machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack, cast

import msgspec

from kvist import wire
from kvist.channel.engine import Inbound
from kvist.flight.handoff_report import HandoffReport
from kvist.grammar.compiler import GrammarCompiler
from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.models.decoder import CausalLM
from kvist.request import EngineRequest, EpochId, FinishReason, Outcome, RequestId, Role, TokenLogprobs
from kvist.store.config import StorageConfig
from kvist.testing.clocks import FakeClock
from kvist.testing.memory_engine import GATEWAY, EngineShape, MemoryEngine
from kvist.testing.specs import make_peer, submit_decode, submit_full, submit_prefill, submit_stored, submit_storing
from kvist.testing.tiny_model import tiny_grammars

GIVE_UP_S = 60.0  # of real time: generous, for busy machines
StorageAction = Literal["status", "attach", "detach"]


class ShapeFields(TypedDict, total=False):
    """The fields of `memory_engine.EngineShape`."""

    role: Role
    num_pages: int
    num_host_pages: int
    storage: StorageConfig
    write_policy: str
    prefetch: PrefetchConfig
    fingerprint: str
    overlap: bool
    queue_timeout_s: float
    transports: str
    grammars: GrammarCompiler | None


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
    handoff: HandoffReport | None = None
    ended: list[wire.Ended] = field(default_factory=list)
    request: EngineRequest | None = None  # with a handoff through the store
    then: MemoryEngine | None = None  # gets the request when prefill has ended

    @property
    def last_token(self) -> int:
        return self.tokens[max(self.tokens)]

    @property
    def token_ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(len(self.tokens))), "a position is missing"
        return [self.tokens[position] for position in range(len(self.tokens))]


class MemoryCluster:
    """Mutable; owned by one test, which closes it."""

    def __init__(self, model: CausalLM, runtime_dir: Path, *, overlap: bool = False) -> None:
        """`overlap` is the default of the engines."""
        self.clock = FakeClock(1.0)
        self.engines: list[MemoryEngine] = []
        self.streams: dict[str, Stream] = {}
        self.storage_answers: dict[str, wire.StorageAnswer] = {}
        self._default = EngineShape(overlap=overlap, grammars=tiny_grammars())
        self._woken = threading.Event()
        self._model = model
        self._runtime_dir = runtime_dir
        self._num_made = 0

    # ------------------------------------------------------------ engines

    def start(self, **shape: Unpack[ShapeFields]) -> MemoryEngine:
        self._num_made += 1
        chosen = replace(self._default, **shape)
        epoch = EpochId(f"{chosen.role}{self._num_made}")
        engine = MemoryEngine(self._model, chosen, epoch, self, self._runtime_dir, self.clock)
        self.engines.append(engine)
        return engine

    def by_epoch(self, epoch: str) -> MemoryEngine | None:
        return next((engine for engine in self.engines if engine.channel.epoch == epoch), None)

    def kill(self, engine: MemoryEngine) -> None:
        """Kill the engine, like SIGKILL: it takes no further step, and its locks and files are released."""
        self.engines.remove(engine)
        engine.die()
        for stream in self.streams.values():
            if engine.channel.epoch in stream.waits_for:
                stream.waits_for.remove(engine.channel.epoch)
                self._go_on(stream)

    # ------------------------------------------------------------ the gateway

    def submit_full(self, engine: MemoryEngine, request: EngineRequest) -> Stream:
        stream = self.streams[request.request_id] = Stream({engine.channel.epoch}, num_submits=1)
        engine.channel.waiting.append((GATEWAY, submit_full(request)))
        return stream

    def submit_pair(self, prefill: MemoryEngine, decode: MemoryEngine, request: EngineRequest) -> Stream:
        epochs = {prefill.channel.epoch, decode.channel.epoch}
        stream = self.streams[request.request_id] = Stream(epochs, num_submits=2)
        handoff = f"handoff-{request.request_id}"
        source, target = prefill.channel, decode.channel
        peer = make_peer(source.epoch, endpoint=source.endpoint, worker_id=source.epoch, spec=prefill.as_peer)
        to_prefill = submit_prefill(request, handoff_id=handoff, target_epoch=target.epoch)
        to_decode = submit_decode(request, handoff_id=handoff, prefill=peer)
        prefill.channel.waiting.append((GATEWAY, to_prefill))
        decode.channel.waiting.append((GATEWAY, to_decode))
        return stream

    def submit_through_store(self, prefill: MemoryEngine, decode: MemoryEngine, request: EngineRequest) -> Stream:
        """Submit to prefill, and to decode once prefill has ended after the first token, as a gateway does."""
        stream = self.streams[request.request_id] = Stream({prefill.channel.epoch}, num_submits=1)
        stream.then = decode
        stream.request = request
        prefill.channel.waiting.append((GATEWAY, submit_storing(request)))
        return stream

    def _go_on(self, stream: Stream) -> None:
        """Submit the request to decode, if the first token did not end the answer."""
        decode, request = stream.then, stream.request
        if decode is None or request is None or stream.finish is not None or not stream.tokens:
            return
        stream.then = None
        stream.num_submits += 1
        stream.waits_for.add(decode.channel.epoch)
        request = msgspec.structs.replace(request, output_token_ids=(*request.output_token_ids, stream.last_token))
        decode.channel.waiting.append((GATEWAY, submit_stored(request)))

    def abort(self, request_id: str) -> None:
        for engine in self.engines:
            engine.channel.waiting.append((GATEWAY, wire.Abort(request_id=RequestId(request_id))))

    def on_storage_command(
        self, engine: MemoryEngine, action: StorageAction, step_s: float = 0.001, **options: wire.StoreOptionValue
    ) -> wire.StorageAnswer:
        """Send a storage command and step until it is answered."""
        call_id = self.ask_later(engine, action, **options)
        self.step_until(lambda: call_id in self.storage_answers, step_s)
        return self.storage_answers[call_id]

    def storage_status(
        self, engine: MemoryEngine, action: StorageAction, step_s: float = 0.001, **options: wire.StoreOptionValue
    ) -> wire.StorageStatus:
        """Return the status in the answer to a command that is not refused."""
        answer = self.on_storage_command(engine, action, step_s, **options)
        assert answer.status is not None, answer.message
        return answer.status

    def ask_later(self, engine: MemoryEngine, action: StorageAction, **options: wire.StoreOptionValue) -> str:
        """Send a storage command without a step; return the id of the call. `options` are those of the store, and
        `backend` and `prefetch_policy`."""
        self._num_made += 1
        own = {name: options.pop(name, None) for name in ("backend", "prefetch_policy")}
        store = msgspec.structs.replace(wire.AttachStore(options=options), **own)
        call = wire.StorageCommand(call_id=str(self._num_made), action=action, store=store)
        engine.channel.waiting.append((GATEWAY, call))
        return call.call_id

    # ------------------------------------------------------------ the network

    def to_gateway(self, epoch: EpochId, message: object) -> None:
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
            self._go_on(stream)

    def to_epoch(self, epoch: str, sender: bytes, message: object) -> bool:
        engine = self.by_epoch(epoch)
        if engine is None:
            return False
        engine.channel.waiting.append((sender, cast(Inbound, message)))
        return True

    def to_endpoint(self, endpoint: str, sender: bytes, message: object) -> None:
        for engine in self.engines:
            if engine.channel.endpoint == endpoint:
                engine.channel.waiting.append((sender, cast(Inbound, message)))

    def wake(self) -> None:
        self._woken.set()

    # ------------------------------------------------------------ time

    def step(self, step_s: float = 0.001) -> None:
        for engine in self.engines:
            engine.loop.iterate(0.0)
        if all(each.sleeps for each in self.engines) and any(each.threads_work for each in self.engines):
            self._woken.wait(0.001)
            self._woken.clear()
        self.clock.advance(step_s)

    def step_until(self, condition: Callable[[], object], step_s: float = 0.001) -> None:
        """Step until the condition holds. The limit is in real seconds, because transfers take real time."""
        give_up_s = time.monotonic() + GIVE_UP_S
        while not condition():
            assert time.monotonic() < give_up_s, (
                f"stuck: {self.streams}, {[e.scheduler.status() for e in self.engines]}"
            )
            self.step(step_s)

    def run(self, step_s: float = 0.001) -> None:
        def is_over() -> bool:
            return not any(each.waits_for for each in self.streams.values()) and all(each.idle for each in self.engines)

        self.step_until(is_over, step_s)

    def check_ledgers(self) -> None:
        """Check that no page is owned: every page is free or cached."""
        for engine in self.engines:
            pages = engine.scheduler.status().pages
            assert (pages.owned, pages.in_flight) == (0, 0), pages
            assert pages.free + pages.cached == pages.total
            assert pages.evictable == pages.cached

    def answer(self, engine: MemoryEngine, request: EngineRequest) -> Stream:
        stream = self.submit_full(engine, request)
        self.run()
        assert [ended.outcome for ended in stream.ended] == [Outcome.FINISHED], stream.ended
        return stream

    def close(self) -> None:
        for engine in self.engines:
            engine.die()

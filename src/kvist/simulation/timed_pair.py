"""A prefill and a decode engine in simulated time: real loops and schedulers; devices, copies and sockets take time.

    pair = TimedPair(Timing())
    pair.submit(make_request("r", prompt, max_tokens=64), at_s=0.5)
    pair.run(until_s=10.0)
    pair.token_times_s["r"]        # when each token was sent
    pair.reports["r"]              # the parts of the second token, as decode reports them

Time goes from one event to the next. The loops themselves take no time, so this is the least time that any engine with
these devices needs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from kvist import wire
from kvist.channel.engine import Outbound
from kvist.flight.handoff_report import HandoffReport
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch
from kvist.plan.transfers import PagesVerified, StopWrites, VerifyPages, WritePages, WritesCompleted
from kvist.request import EngineRequest, EpochId, HandoffId, RequestId, Role
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.loop_bench import FakeChannel, FakeDevice, FakeTransport, LoopBench
from kvist.testing.specs import make_peer, make_peer_spec, make_pool, make_spec, submit_decode, submit_prefill
from kvist.transfer import TransferReport

PAGE_SIZE = 16
VOCAB = 100
GATEWAY = b"gateway"
_NEVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The times of a 7B model on two H200s with NVLink (docs/benchmarks.md)."""

    weights_s: float = 3.7e-3  # to read all weights once
    decode_s: float = 22e-6  # of one stream in a step
    chunk_s: float = 1.4e-3  # of a step with prompt tokens
    prompt_token_s: float = 20.5e-6
    copy_s: float = 0.4e-3  # of a job
    copy_page_s: float = 4.5e-6
    verify_s: float = 0.3e-3  # of a job
    verify_page_s: float = 2.5e-6
    wire_s: float = 0.2e-3  # a message on its way

    def step_s(self, batch: Batch) -> float:
        """Return the time of a step: of reading the weights or of computing the chunks, and of the streams."""
        num_decodes = sum(item.num_tokens == 1 for item in batch.items)
        num_prompt_tokens = batch.num_tokens - num_decodes
        chunks_s = self.chunk_s + self.prompt_token_s * num_prompt_tokens if num_prompt_tokens else 0.0
        return max(self.weights_s, chunks_s) + self.decode_s * num_decodes


class TimedTransport(FakeTransport):
    """One worker: each job takes its time after the job before it. Mutable; the engine's."""

    def __init__(self, clock: FakeClock, timing: Timing) -> None:
        super().__init__()
        self._clock, self._timing = clock, timing
        self._free_s = 0.0
        self._due: deque[tuple[float, TransferReport]] = deque()
        self._num_written: defaultdict[HandoffId, int] = defaultdict(int)

    def write(self, job: WritePages) -> None:
        self._num_written[job.handoff_id] += len(job.page_ids)
        report = WritesCompleted(
            handoff_id=job.handoff_id, num_pages=self._num_written[job.handoff_id], checksum="equal"
        )
        self._take(self._timing.copy_s + self._timing.copy_page_s * len(job.page_ids), report)

    def verify(self, job: VerifyPages) -> None:
        report = PagesVerified(handoff_id=job.handoff_id, checksum="equal")
        self._take(self._timing.verify_s + self._timing.verify_page_s * len(job.page_ids), report)

    def stop(self, handoff_id: HandoffId) -> None:
        raise AssertionError(f"no test stops a handoff: {StopWrites(handoff_id=handoff_id)}")

    def poll(self) -> list[TransferReport]:
        reports = []
        while self._due and self._due[0][0] <= self._clock.now_s():
            reports.append(self._due.popleft()[1])
        return reports

    @property
    def next_report_s(self) -> float:
        return self._due[0][0] if self._due else _NEVER

    def _take(self, duration_s: float, report: TransferReport) -> None:
        self._free_s = max(self._free_s, self._clock.now_s()) + duration_s
        self._due.append((self._free_s, report))


class TimedChannel(FakeChannel):
    """Hands messages for the other engine to `to_peer`, and those for the gateway to `to_gateway`."""

    def __init__(
        self,
        clock: FakeClock,
        to_gateway: Callable[[Outbound], None],
        to_peer: Callable[[wire.PeerMessage], None],
    ) -> None:
        super().__init__(clock)
        self._to_gateway, self._to_peer = to_gateway, to_peer

    def send(self, identity: bytes, message: Outbound) -> bool:
        if identity == GATEWAY:
            self._to_gateway(message)
        else:
            assert isinstance(message, wire.SourceToTarget)
            self._to_peer(message)
        return True

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        assert endpoint
        self._to_peer(message)
        return True


class TimedEngine:
    """One engine with overlap, as on a GPU."""

    def __init__(self, role: Role, config: SchedulerConfig, timing: Timing, clock: FakeClock, channel: TimedChannel):
        self.epoch, self.channel = EpochId(role.value), channel
        self.endpoint = f"tcp://{role.value}"
        self.spec = make_peer_spec(make_pool(num_pages=_NUM_PAGES), page_size=PAGE_SIZE)
        self.device = FakeDevice(clock, timing.step_s)
        self.transport = TimedTransport(clock, timing)
        cache = PageCache(num_pages=_NUM_PAGES, page_size=PAGE_SIZE, namespace="timed")
        self.loop = LoopBench(
            spec=make_spec(
                epoch=self.epoch,
                endpoint=self.endpoint,
                role=role,
                vocab_size=VOCAB,
                max_model_len=config.max_model_len,
                page_size=PAGE_SIZE,
                num_pages=_NUM_PAGES,
            ),
            scheduler=build_scheduler(role, config, cache, self.epoch, self.spec),
            runner=self.device,
            transport=self.transport,
            channel=channel,
            clock=clock,
            overlap=True,
            gateway_timeout_s=1e9,
        ).loop
        channel.sleeps = False  # `TimedPair` advances the clock
        self._clock = clock

    def iterate(self) -> None:
        """Do all that is to be done at this time."""
        self.loop.iterate(0.0)
        while self.loop.idle_s() == 0.0:
            self.loop.iterate(0.0)

    @property
    def next_s(self) -> float:
        """The time at which the loop is woken next."""
        now_s = self._clock.now_s()
        due = [now_s + self.loop.idle_s(), self.device.next_end_s(), self.transport.next_report_s]
        return min(*due, self.channel.next_message_s)


_NUM_PAGES = 40_000
_LIMITS = {Role.PREFILL: (2048, 2048), Role.DECODE: (512, 2048)}  # of engine/limits.py, for GPUs


class TimedPair:
    """A pair, a gateway that records what it gets, and the clock. Mutable; owned by one test or benchmark.

    `blocks`: the loop handles nothing until the oldest step has ended, as before the change of ADR 25."""

    def __init__(self, timing: Timing, *, blocks: bool = False) -> None:
        self.clock = FakeClock(1.0)
        self.token_times_s: defaultdict[str, list[float]] = defaultdict(list)
        self.reports: dict[str, HandoffReport] = {}
        self._blocks = blocks
        self._timing = timing
        self._coming: deque[tuple[float, EngineRequest]] = deque()
        self.prefill = self._start(Role.PREFILL, lambda message: self._to(self.decode, self.prefill, message))
        self.decode = self._start(Role.DECODE, lambda message: self._to(self.prefill, self.decode, message))

    def _start(self, role: Role, to_peer: Callable[[wire.PeerMessage], None]) -> TimedEngine:
        usual, most = _LIMITS[role]
        config = SchedulerConfig(
            max_running_requests=256,
            chunked_prefill_size=usual,
            max_prefill_tokens=most,
            max_model_len=32_768,
            overlap=True,
        )
        channel = TimedChannel(self.clock, self._to_gateway, to_peer)
        return TimedEngine(role, config, self._timing, self.clock, channel)

    def submit(self, request: EngineRequest, at_s: float) -> None:
        """Let the request arrive at this time; call in the order of the times."""
        self._coming.append((at_s, request))

    def run(self, until_s: float) -> None:
        engines = (self.prefill, self.decode)
        while self.clock.now_s() < until_s:
            while self._coming and self._coming[0][0] <= self.clock.now_s():
                self._deliver(self._coming.popleft()[1])
            for engine in engines:
                if not self._is_blocked(engine):
                    engine.iterate()
            next_s = min(map(self._next_s, engines))
            if self._coming:
                next_s = min(next_s, self._coming[0][0])
            self.clock.advance(max(1e-9, min(next_s, until_s) - self.clock.now_s()))

    def _is_blocked(self, engine: TimedEngine) -> bool:
        return self._blocks and engine.device.computes

    def _next_s(self, engine: TimedEngine) -> float:
        return engine.device.next_end_s() if self._is_blocked(engine) else engine.next_s

    def _deliver(self, request: EngineRequest) -> None:
        handoff_id, prefill, decode = f"h-{request.request_id}", self.prefill, self.decode
        peer = make_peer(prefill.epoch, endpoint=prefill.endpoint, spec=prefill.spec)
        to_prefill = submit_prefill(request, handoff_id=handoff_id, target_epoch=decode.epoch)
        prefill.channel.deliver(GATEWAY, to_prefill)
        decode.channel.deliver(GATEWAY, submit_decode(request, handoff_id=handoff_id, prefill=peer))

    def _to(self, engine: TimedEngine, sender: TimedEngine, message: wire.PeerMessage) -> None:
        identity = sender.endpoint if isinstance(message, wire.SourceToTarget) else sender.epoch
        engine.channel.deliver(identity.encode(), message, at_s=self.clock.now_s() + self._timing.wire_s)

    def _to_gateway(self, message: Outbound) -> None:
        if not isinstance(message, wire.StepOutputs):
            return
        for chunk in message.chunks:
            self.token_times_s[chunk.request_id] += [self.clock.now_s()] * len(chunk.token_ids)
            if chunk.handoff is not None:
                self.reports[chunk.request_id] = chunk.handoff
        for ended in message.ended:
            assert ended.error_code is None, ended

    def gaps_s(self, request_id: str) -> list[float]:
        """Return the times between the tokens of a request."""
        times_s = self.token_times_s[RequestId(request_id)]
        return [later - earlier for earlier, later in pairwise(times_s)]

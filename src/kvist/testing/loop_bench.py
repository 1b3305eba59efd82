"""The engine's loop with fakes around it: a channel, a scheduler with a script, a runner, a transport and a store.

    bench = LoopBench()
    bench.iterate((b"gateway", submit_full(make_request())))   # one iteration; returns the scheduler's events
    bench.iterate(plan=Plan(batch=...))                        # the scheduler returns this plan
    bench.steps                                                # ["launch 1", "read 1"]

Time stands still except where a fake says otherwise. Everything runs in the thread of the test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvist import wire
from kvist.channel.engine import Inbound, Outbound
from kvist.engine.in_flight import LaunchedStep, StepRunner
from kvist.engine.loop import EngineLoop, LoopParts, Storage
from kvist.engine.page_events import PageEventLog
from kvist.engine.reports import LoadReports
from kvist.engine.roles import RoleSwitch
from kvist.kv.pages import PageCounts
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens
from kvist.plan.plan import Plan
from kvist.plan.slots import OpenSlots
from kvist.plan.tiers import FindPages, PagesFound, StorageAttached, StoreJob, StoreReport
from kvist.plan.transfers import StopWrites, VerifyPages, WritePages
from kvist.request import EpochId, HandoffId
from kvist.scheduler import Scheduler
from kvist.scheduler.status import SchedulerStatus
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_pool, make_spec
from kvist.transfer import TransferReport, Transport

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A message that the loop has sent."""

    at_s: float
    to: bytes
    message: Outbound


class FakeChannel:
    """The engine's sockets. A test puts messages in with `deliver`, and reads what was sent in `sent` and `to_peers`.

    Mutable; a test may set the public fields. Peers in `unreachable` (gateways by address, engines by endpoint) take no
    message. With `sleeps`, a `recv` advances the clock by its timeout, or only to the next message or wakeup."""

    def __init__(self, clock: FakeClock, order: list[str] | None = None) -> None:
        self.num_undecodable = self.num_unexpected = self.num_refused = 0
        self.sent: list[Sent] = []
        self.to_peers: list[tuple[str, wire.TargetToSource]] = []
        self.unreachable: set[bytes | str] = set()
        self.timeouts: list[float] = []  # of every recv
        self.num_wakeups = 0
        self.sleeps = False
        self.next_wakeup_s: Callable[[], float] = lambda: float("inf")
        self._clock = clock
        self._order = order if order is not None else []
        self._coming: list[tuple[float, bytes, Inbound]] = []

    def deliver(self, identity: bytes, message: Inbound, *, at_s: float = 0.0) -> None:
        """Let the message arrive at the first `recv` from `at_s` on."""
        self._coming.append((at_s, identity, message))

    @property
    def next_message_s(self) -> float:
        return min((at_s for at_s, _, _ in self._coming), default=float("inf"))

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]:
        self.timeouts.append(timeout_s)
        if self.sleeps:
            now_s = self._clock.now_s()
            self._clock.advance(max(0.0, min(now_s + timeout_s, self.next_message_s, self.next_wakeup_s()) - now_s))
        now_s = self._clock.now_s()
        arrived = [(identity, message) for at_s, identity, message in self._coming if at_s <= now_s]
        self._coming = [each for each in self._coming if each[0] > now_s]
        return arrived

    def send(self, identity: bytes, message: Outbound) -> bool:
        if identity in self.unreachable:
            return False
        self._order.append(f"send {type(message).__name__}")
        self.sent.append(Sent(at_s=self._clock.now_s(), to=identity, message=message))
        return True

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        if endpoint in self.unreachable:
            return False
        self.to_peers.append((endpoint, message))
        return True

    def wakeup(self) -> None:
        self.num_wakeups += 1


class ScriptedScheduler:
    """Returns the plans of `script`, then empty plans; records the events of every step. Mutable; the test's."""

    def __init__(self) -> None:
        self.script: list[Plan] = []
        self.seen: list[list[Event]] = []
        self.with_batch: list[bool] = []
        self.on_step: Callable[[], None] = lambda: None  # called before each step

    def step(self, now_s: float, events: Sequence[Event], *, with_batch: bool = True) -> Plan:
        assert now_s >= 0.0
        self.on_step()
        self.seen.append(list(events))
        self.with_batch.append(with_batch)
        return self.script.pop(0) if self.script else Plan()

    def has_work(self) -> bool:
        return bool(self.script)

    def status(self) -> SchedulerStatus:
        pages = PageCounts(free=1, cached=2, owned=1, in_flight=0, evictable=2, total=4)
        return SchedulerStatus(num_running=3, num_waiting=5, pages=pages, totals={"steps": 7.0})


class FakeRunner:
    """Samples token 9 for every row. `fails` raises `error` at the launch, `fails_late` when the result is read."""

    def __init__(self, order: list[str] | None = None) -> None:
        self.batches: list[Batch] = []
        self.fails = self.fails_late = False
        self.invalid_rows: frozenset[int] = frozenset()
        self.error: Exception = RuntimeError("the device is on fire")
        self._order = order if order is not None else []

    def launch(self, batch: Batch) -> FakeLaunched:
        self.batches.append(batch)
        self._order.append(f"launch {batch.step_id}")
        if self.fails:
            raise self.error
        return FakeLaunched(lambda: self._result(batch), self.fails_late, self.error)

    def _result(self, batch: Batch) -> SampledTokens:
        self._order.append(f"read {batch.step_id}")
        num_rows = sum(item.samples for item in batch.items)
        return SampledTokens(token_ids=[9] * num_rows, invalid_rows=self.invalid_rows)


class FakeLaunched:
    """A batch in flight."""

    def __init__(self, result: Callable[[], SampledTokens], fails: bool, error: Exception) -> None:
        self._result, self._fails, self._error = result, fails, error

    def is_done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> SampledTokens:
        sampled = self._result()
        if self._fails:
            raise self._error
        return sampled


class DeviceHangs(BaseException):
    """The loop waits for ever for a `FakeDevice`."""


class FakeDevice:
    """A runner whose device computes beside the loop, one step after the other, as a GPU does. Its time is that of the
    clock; `step_s` returns the duration of a step. Samples token 9 for every row.

    Mutable; the test's. `ends` has the end of each step by its id. `hangs`: no further step ends, and a wait for one
    raises `DeviceHangs`. `fails`: every call for a step raises."""

    def __init__(self, clock: FakeClock, step_s: Callable[[Batch], float]) -> None:
        self.order: list[str] = []  # launches and reads
        self.batches: list[Batch] = []
        self.ends: dict[int, float] = {}
        self.hangs = False
        self.fails = False
        self._steps: deque[FakeStep] = deque()  # launched, not read
        self._clock, self._step_s = clock, step_s
        self._free_s = 0.0  # when the device has ended all steps

    def launch(self, batch: Batch) -> FakeStep:
        self.batches.append(batch)
        self.order.append(f"launch {batch.step_id}")
        self._free_s = max(self._free_s, self._clock.now_s()) + self._step_s(batch)
        self.ends[batch.step_id] = self._free_s
        self._steps.append(FakeStep(self, batch, self._free_s))
        return self._steps[-1]

    def watch(self, step: LaunchedStep) -> None:
        assert step is self._steps[-1], "each step is watched when it is launched"

    def next_end_s(self) -> float:
        """Return when the loop is woken next by the end of a step, as by `engine.step_waiter`."""
        now_s = self._clock.now_s()
        ends = (step.end_s for step in self._steps if step.end_s > now_s)
        return float("inf") if self.hangs else next(ends, float("inf"))

    @property
    def computes(self) -> bool:
        """Whether the oldest step that was not read is still computed."""
        return bool(self._steps) and not self.is_done(self._steps[0])

    def wait(self, step: FakeStep) -> None:
        if self.hangs:
            raise DeviceHangs
        self._clock.advance(max(0.0, step.end_s - self._clock.now_s()))

    def is_done(self, step: FakeStep) -> bool:
        return not self.hangs and self._clock.now_s() >= step.end_s

    def read(self, step: FakeStep) -> SampledTokens:
        self.order.append(f"read {step.batch.step_id}")
        assert self._steps.popleft() is step, "steps are read in the order of their launches"
        if self.fails:
            raise RuntimeError("an illegal memory access")
        assert self.is_done(step), "the loop would wait for the device"
        return SampledTokens(token_ids=[9] * sum(item.samples for item in step.batch.items))


@dataclass(frozen=True, slots=True)
class FakeStep:
    """A step of a `FakeDevice`."""

    device: FakeDevice
    batch: Batch
    end_s: float

    def is_done(self) -> bool:
        if self.device.fails:
            raise RuntimeError("an illegal memory access")
        return self.device.is_done(self)

    def wait(self) -> None:
        self.device.wait(self)

    def result(self) -> SampledTokens:
        return self.device.read(self)


class SlowRunner:
    """Computes in the thread of the loop, as on a CPU: each layer advances the clock, after a call of `between_layers`
    (`EngineLoop.between_layers`)."""

    def __init__(self, clock: FakeClock, *, layer_s: float, num_layers: int) -> None:
        self.between_layers: Callable[[], None] = lambda: None
        self.began: list[tuple[float, list[str]]] = []  # time and requests of every batch
        self._clock, self._layer_s, self._num_layers = clock, layer_s, num_layers
        self._slots = OpenSlots()

    def launch(self, batch: Batch) -> FakeLaunched:
        self._slots.update(batch)
        self.began.append((self._clock.now_s(), [str(request_id) for request_id in self._slots.running(batch)]))
        for _ in range(self._num_layers):
            self.between_layers()
            self._clock.advance(self._layer_s)
        sampled = SampledTokens(token_ids=[9] * sum(item.samples for item in batch.items))
        return FakeLaunched(lambda: sampled, False, RuntimeError())


class FakeTransport:
    """Records its jobs; `reports` are returned by the next `poll`, and epochs in `dead` have ended."""

    def __init__(self) -> None:
        self.jobs: list[WritePages | VerifyPages | StopWrites] = []
        self.reports: list[TransferReport] = []
        self.dead: set[EpochId] = set()
        self.asked: list[EpochId] = []
        self.address = make_pool()

    def write(self, job: WritePages) -> None:
        self.jobs.append(job)

    def verify(self, job: VerifyPages) -> None:
        self.jobs.append(job)

    def stop(self, handoff_id: HandoffId) -> None:
        self.jobs.append(StopWrites(handoff_id=handoff_id))

    def poll(self) -> list[TransferReport]:
        reports, self.reports = self.reports, []
        return reports

    def peer_is_dead(self, epoch: EpochId) -> bool:
        self.asked.append(epoch)
        return epoch in self.dead

    def close(self) -> None: ...


class FakeStorage:
    """Records its jobs. While `finds`, a `poll` answers one lookup: one page is found."""

    def __init__(self, *, finds: bool) -> None:
        self.finds = finds
        self.jobs: list[StoreJob] = []
        self._waiting: list[FindPages] = []

    def start(self, job: StoreJob) -> None:
        self.jobs.append(job)
        if isinstance(job, FindPages):
            self._waiting.append(job)

    def poll(self) -> list[StoreReport | StorageAttached]:
        if not self.finds or not self._waiting:
            return []
        return [PagesFound(job_id=self._waiting.pop(0).job_id, num_pages=1)]

    def on_command(self, identity: bytes, call: wire.StorageCommand) -> None:
        raise AssertionError(f"no test asks: {identity!r}, {call}")

    def answers(self) -> list[tuple[bytes, wire.StorageAnswer]]:
        return []

    def status(self) -> wire.StorageStatus:
        return wire.StorageStatus(
            backend="memory",
            options={"size": 1.0},
            prefetch_policy="timeout",
            state="attached",
            breaker="closed",
            num_quarantined_pages=0,
            stored_bytes=0,
            errors={},
        )

    def totals(self) -> dict[str, float]:
        return {}


def _computed_at_launch(_step: LaunchedStep) -> None:
    raise AssertionError("a step of this runner has ended when it is launched")


class LoopBench:
    """The loop with fakes around it; a real scheduler or another runner may take the place of a fake.

    Mutable; the test's. `order` has the launches, reads and sends of the fakes, in their order."""

    def __init__(
        self,
        *,
        spec: wire.EngineSpec | None = None,
        overlap: bool = False,
        storage: Storage | None = None,
        scheduler: Scheduler | None = None,
        runner: StepRunner | FakeDevice | None = None,
        transport: Transport | None = None,
        channel: FakeChannel | None = None,
        clock: FakeClock | None = None,
        gateway_timeout_s: float = 10.0,
    ) -> None:
        self.order: list[str] = []
        self.clock = clock or FakeClock(100.0)
        self.channel = channel or FakeChannel(self.clock, self.order)
        self.scheduler, self.runner, self.transport = ScriptedScheduler(), FakeRunner(self.order), FakeTransport()
        if isinstance(runner, FakeDevice):
            self.channel.next_wakeup_s, self.channel.sleeps = runner.next_end_s, True
        self.cached_pages: list[wire.ListedPages] = [wire.ListedPages(tier="device", first_piece=0)]  # by piece
        spec = spec or make_spec()
        parts = LoopParts(
            spec=spec,
            scheduler=scheduler or self.scheduler,
            runner=runner or self.runner,
            channel=self.channel,
            transport=transport or self.transport,
            reports=LoadReports(),
            page_events=PageEventLog(list_pages=lambda piece: self.cached_pages[piece]),
            clock=self.clock,
            gateway_timeout_s=gateway_timeout_s,
            watch_step=runner.watch if isinstance(runner, FakeDevice) else _computed_at_launch,
            storage=storage,
            roles=RoleSwitch(spec.role),
            overlap=overlap,
        )
        self.loop = EngineLoop(parts)

    def iterate(self, *messages: tuple[bytes, Inbound], plan: Plan | None = None) -> list[Event]:
        """Run one iteration with these messages; the scripted scheduler returns `plan`. Return the events it got."""
        for identity, message in messages:
            self.channel.deliver(identity, message)
        if plan is not None:
            self.scheduler.script.append(plan)
        self.loop.iterate(0.0)
        return self.scheduler.seen[-1] if self.scheduler.seen else []

    @property
    def steps(self) -> list[str]:
        """The launches and reads in `order`."""
        return [each for each in self.order if not each.startswith("send")]

    def sent(self, kind: type[Message], to: bytes | None = None) -> list[Message]:
        """Return the sent messages of this kind, to one peer or to all."""
        return [each.message for each in self.channel.sent if isinstance(each.message, kind) and to in (None, each.to)]

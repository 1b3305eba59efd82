"""The executor: takes the requests of programs, has them planned, and carries the plans out.

    submit (any thread) -> waiting (its prompt has holes) -> ready -> placed -> in flight -> result

A tick gathers what became ready and asks the planner once. Ready requests go out in the plan's order, as many at once
as the width allows. A result fills the holes of the requests that wait for it. Without a plan, each program has one
request out at a time, and nothing is computed ahead or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from kvist.clock import Clock, thread_cpu_s
from kvist.errors import KvistError, ProgramError
from kvist.execution.backend import Backend, Hints
from kvist.execution.job import ExecutionConfig, Job
from kvist.execution.leases import Leases
from kvist.execution.report import Done, DoneWarm, Report
from kvist.execution.requests import Carried, Carrier
from kvist.execution.results import Answer, Served
from kvist.planning.fleet import Fleet, Native, Role, Running, unknown_fleet
from kvist.planning.graph import Generate, Graph, Operation, Tool
from kvist.planning.plan import Pin, Placement, Plan, Warm, Work
from kvist.planning.planner import plan
from kvist.planning.prefixes import RememberedPrefixes
from kvist.planning.prompt import Prompt
from kvist.planning.width import Width

_MAX_REMEMBERED = 512  # prefixes whose worker is known
_WARM_TIMEOUT_S = 30.0  # a request does not wait longer for a prefix that is computed ahead
_MAX_WIDTH = 256
_CALIBRATION = 0.2  # share of a new measurement in the average


@dataclass(slots=True, order=True)
class _Queued:
    """A ready request: the queue is a heap in the plan's order, depth first, and without a plan in the given order."""

    outline: str
    operation_id: int
    job: Job = field(compare=False)
    placement: Placement | None = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Sent:
    job: Job
    task: asyncio.Task[None]


class Executor:
    """`submit`, `starts`, `waits`, `resumes` and `ends` may be called by any thread; all else runs in the loop."""

    def __init__(
        self, backend: Backend, config: ExecutionConfig, *, loop: asyncio.AbstractEventLoop, clock: Clock
    ) -> None:
        self.report = Report()
        self._backend, self._config, self._loop, self._clock = backend, config, loop, clock
        self._start_s = clock.now_s()
        self._carrier = Carrier(backend, config)
        self._leases = Leases(backend, ttl_s=config.lease_ttl_s)
        self._fleet: Fleet = unknown_fleet("server")
        self._fleet_s = float("-inf")
        self._width = Width(limit=float(config.width or _MAX_WIDTH), most=config.width or _MAX_WIDTH)
        # shared with other threads
        self._lock = threading.Lock()
        self._incoming: deque[Job] = deque()
        self._tools: dict[int, Tool] = {}
        self._num_active = 0  # programs that run and may add requests
        self._wanted = False  # a tick is on its way
        # of the loop
        self._texts: dict[int, str] = {}  # results, by operation
        self._failed: dict[int, BaseException] = {}
        self._waiting: dict[int, Job] = {}
        self._waits_for: dict[int, list[int]] = {}  # operation -> the waiting ones that need it
        self._queue: list[_Queued] = []
        self._busy_programs: set[int] = set()  # without a plan
        self._in_flight: dict[int, _Sent] = {}
        self._warms: dict[str, asyncio.Task[None]] = {}
        self._cached = RememberedPrefixes(_MAX_REMEMBERED)
        self._timer: asyncio.TimerHandle | None = None
        self._fleet_task: asyncio.Task[None] | None = None
        self._closed = False

    # -- from the threads of programs

    def submit(self, job: Job) -> None:
        with self._lock:
            closed = self._closed
            if not closed:
                self._incoming.append(job)
            wanted, self._wanted = self._wanted, True
        if closed:
            _refuse(job)
        elif not wanted:
            self._call(self._tick_soon)

    def starts(self) -> None:
        """A program runs, and may add requests until it waits or ends."""
        with self._lock:
            self._num_active += 1

    resumes = starts

    def ends(self) -> None:
        with self._lock:
            self._num_active -= 1
            hurry = self._num_active <= 0 and self._wanted
        if hurry:
            self._call(self._tick)

    waits = ends

    def tool_starts(self, tool: Tool) -> None:
        with self._lock:
            self._tools[tool.operation_id] = tool
        self._call(self._tick)

    def tool_ends(self, operation_id: int) -> None:
        with self._lock:
            self._tools.pop(operation_id, None)

    def cancel(self, program: int) -> None:
        """End the requests of a program whose function raised."""
        self._call(self._cancel, program)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the backend was closed, and with it this executor
            self._loop.call_soon_threadsafe(function, *arguments)

    # -- in the loop

    async def open(self) -> None:
        """Learn about the fleet. Raises `KvistError` if the server does not answer."""
        self._fleet = await self._backend.fleet()
        self._fleet_s = self._clock.now_s()
        most = self._config.width or min(sum(each.max_running for each in self._fleet.workers) or 1, _MAX_WIDTH)
        self._width = Width(limit=float(most), most=most)

    async def close(self) -> None:
        """Cancel what is out, let all other requests fail, and end all leases. Takes bounded time."""
        with self._lock:
            self._closed = True
            incoming, self._incoming = list(self._incoming), deque()
        for job in (*incoming, *(queued.job for queued in self._queue), *self._waiting.values()):
            _refuse(job)
        self._queue, self._waiting = [], {}
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*(sent.task for sent in self._in_flight.values()), *self._warms.values()]
        tasks += [] if self._fleet_task is None else [self._fleet_task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_WARM_TIMEOUT_S)
        await self._leases.close()
        for problem in self._leases.problems:
            self.report.notes[problem] = None

    def _tick_soon(self) -> None:
        with self._lock:
            active = self._num_active > 0
        if not active:
            self._tick()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._config.gather_s, self._tick)

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            incoming, self._incoming = list(self._incoming), deque()
            tools = list(self._tools.values())
            self._wanted = False
        if self._closed:
            return
        ready = [job for job in incoming if self._register(job)]
        self._schedule(ready, [job for job in incoming if job.operation.operation_id in self._waiting], tools)

    def _register(self, job: Job) -> bool:
        """Return whether the job is ready; otherwise remember what it waits for, or let it fail."""
        missing = [each for each in job.operation.needs if each not in self._texts]
        failed = next((self._failed[each] for each in missing if each in self._failed), None)
        if failed is not None:
            self._fail(job, failed)
            return False
        for each in missing:
            self._waits_for.setdefault(each, []).append(job.operation.operation_id)
        if missing:
            self._waiting[job.operation.operation_id] = job
        return not missing

    def _filled(self, job: Job) -> Job:
        if job.operation.prompt.is_known:
            return job
        return replace(job, operation=replace(job.operation, prompt=job.operation.prompt.filled(self._texts)))

    def _schedule(self, ready: Iterable[Job], waiting: Iterable[Job], tools: Iterable[Tool]) -> None:
        jobs = [self._filled(job) for job in ready]
        if not self._config.planned:
            for job in jobs:
                heapq.heappush(self._queue, _Queued("", job.operation.operation_id, job, None))
            self._admit()
            return
        placements: dict[int, Placement] = {}
        known = (self._filled(job) for job in waiting)  # with the results that are there
        operations: list[Operation] = [*(job.operation for job in (*jobs, *known)), *tools]
        if operations:
            try:
                placements = {each.operation_id: each for each in self._plan(operations).placements}
            except Exception as error:  # a bug of the planner: its requests fail, and no program waits for them
                for job in (*jobs, *waiting):
                    self._waiting.pop(job.operation.operation_id, None)
                    self._fail(job, error)
                return
        for job in jobs:
            prompt, placement = job.operation.prompt, placements[job.operation.operation_id]
            if placement.prefill_worker is not None:
                self._cached.add(placement.prefill_worker, prompt)  # soon: no later plan computes it a second time
            heapq.heappush(self._queue, _Queued(prompt.outline, job.operation.operation_id, job, placement))
        self._admit()

    def _plan(self, operations: Sequence[Operation]) -> Plan:
        start_s, start_cpu_s = self._clock.now_s(), thread_cpu_s()
        ordered = sorted(operations, key=lambda one: one.operation_id)
        running = Running(
            num_in_flight=len(self._in_flight),
            width=self._width.requests,
            cached=self._cached.snapshot(),
            warmed=frozenset(self._warms),
            pinned=self._leases.outlines,
            num_pinned_tokens=self._leases.num_tokens,
        )
        made = plan(Graph(operations=tuple(ordered)), self._fleet.after(start_s - self._fleet_s), running)
        pins = {(pin.prompt.outline, pin.worker): pin for pin in made.pin}
        for warm in made.warm:
            pin = pins.pop((warm.prompt.outline, warm.worker), None)
            leased = None if pin is None else self._hold(pin, ahead=True, after=warm.after_warm)
            self._warms[warm.prompt.outline] = asyncio.create_task(self._warm(warm, leased))
        for pin in pins.values():
            self._hold(pin, ahead=False)
        self.report.notes |= dict.fromkeys(made.notes)
        self.report.num_planned += len(ordered)
        self.report.planning_s += self._clock.now_s() - start_s
        self.report.planning_cpu_s += thread_cpu_s() - start_cpu_s
        return made

    def _hold(self, pin: Pin, *, ahead: bool, after: str | None = None) -> asyncio.Future[Served | None]:
        """Lease a prefix for its uses that are not done, once the prefix `after`, if any, is computed ahead."""
        self.report.pins.append(pin)
        unfinished = [each for each in pin.until if each not in self._texts and each not in self._failed]
        warm = None if after is None else self._warms.get(after)
        return self._leases.hold(pin, unfinished=unfinished, ahead=ahead, after=warm)

    def _admit(self) -> None:
        width = self._width.requests if self._config.planned else self._config.width or _MAX_WIDTH
        held = []
        while self._queue and len(self._in_flight) < width:
            queued = heapq.heappop(self._queue)
            program = queued.job.operation.place.program
            if not self._config.planned and program in self._busy_programs:
                held.append(queued)
                continue
            self._busy_programs.add(program)
            task = asyncio.create_task(self._carry(queued.job, queued.placement))
            self._in_flight[queued.operation_id] = _Sent(queued.job, task)
        for queued in held:
            heapq.heappush(self._queue, queued)
        if self._in_flight and self._config.planned:
            self._refresh_fleet()

    async def _carry(self, job: Job, placement: Placement | None) -> None:
        carried: Carried | None = None
        problem = ""
        start_s = self._now_s()
        try:
            await self._computed(None if placement is None else placement.after_warm)
            start_s = self._now_s()
            carried = await self._carrier.carry(job, _hints(placement, separate=self._fleet.separates))
        except KvistError as error:
            problem = error.message
            self._fail(job, error)
        except asyncio.CancelledError:
            problem = "cancelled"
            self._fail(job, _cancelled(job))
            raise
        except Exception as error:  # a bug of ours: the request fails, and no program waits for it
            problem = f"{type(error).__name__}: {error}"
            error.add_note(f"in the request of {job.operation.position}")
            self._fail(job, error)
        finally:
            self._in_flight.pop(job.operation.operation_id, None)
            self._busy_programs.discard(job.operation.place.program)
            self._leases.used(job.operation.operation_id)
            self.report.requests.append(
                Done(
                    operation=job.operation,
                    placement=placement,
                    start_s=start_s,
                    end_s=self._now_s(),
                    served=None if carried is None else carried.answer.served,
                    problem=problem,
                    num_attempts=1 if carried is None else carried.num_attempts,
                )
            )
        if carried is not None:
            self._learn(job, carried.answer)
            self._texts[job.operation.operation_id] = carried.answer.texts[0]
            job.result.finish(carried.answer)
            self._continue(job.operation.operation_id)

    async def _computed(self, outline: str | None) -> None:
        """Wait until a prefix is computed ahead, for a bounded time; the request works without it."""
        task = None if outline is None else self._warms.get(outline)
        if task is not None:
            await asyncio.wait([task], timeout=_WARM_TIMEOUT_S)

    def _continue(self, operation_id: int) -> None:
        """Schedule the requests that waited for this result."""
        ready = []
        for waiting_id in self._waits_for.pop(operation_id, []):
            job = self._waiting.get(waiting_id)
            if job is not None and all(each in self._texts for each in job.operation.needs):
                ready.append(self._waiting.pop(waiting_id))
        self._schedule(ready, [], [])

    def _fail(self, job: Job, error: BaseException) -> None:
        operation_id = job.operation.operation_id
        self._failed[operation_id] = error
        self._leases.used(operation_id)
        job.result.fail(error)
        for waiting_id in self._waits_for.pop(operation_id, []):
            waiting = self._waiting.pop(waiting_id, None)
            if waiting is not None:
                self._fail(waiting, error)
        if not self._closed:
            self._loop.call_soon(self._admit)

    def _cancel(self, program: int) -> None:
        waiting = [job for job in self._waiting.values() if job.operation.place.program == program]
        queued = [each for each in self._queue if each.job.operation.place.program == program]
        self._queue = [each for each in self._queue if each.job.operation.place.program != program]
        heapq.heapify(self._queue)
        for job in (*waiting, *(each.job for each in queued)):
            self._waiting.pop(job.operation.operation_id, None)
            self._fail(job, _cancelled(job))
        for sent in list(self._in_flight.values()):
            if sent.job.operation.place.program == program:
                sent.task.cancel()

    async def _warm(self, warm: Warm, leased: asyncio.Future[Served | None] | None) -> None:
        """Compute a prefix ahead: its lease does so, if there is one."""
        await self._computed(warm.after_warm)
        start_s, served, problem = self._now_s(), None, ""
        try:
            role = Role.PREFILL if self._fleet.separates else None
            hints = Hints(worker=warm.worker, role=role, in_background=not warm.users)
            async with asyncio.timeout(_WARM_TIMEOUT_S):
                served = None if leased is None else await asyncio.shield(leased)
                if served is None:
                    served = await self._backend.prefill(warm.prompt, hints)
            if warm.worker is not None:
                self._cached.add(served.prefill_worker or warm.worker, warm.prompt)
        except (KvistError, TimeoutError) as error:
            problem = str(error) or "timeout"  # the prefix is then computed with the first request that has it
            self.report.notes[f"a prefix could not be computed ahead: {problem}"] = None
        self.report.warms.append(
            DoneWarm(warm=warm, start_s=start_s, end_s=self._now_s(), served=served, problem=problem)
        )

    def _learn(self, job: Job, answer: Answer) -> None:
        """Take over what the answer says about the cache, the tokenizer and the queue."""
        served: Served = answer.served
        prompt = job.operation.prompt
        for worker in {served.prefill_worker, served.decode_worker} - {None}:
            assert worker is not None
            self._cached.add(worker, Prompt(prompt.outline + answer.texts[0]))
        if served.num_prompt_tokens and served.num_requests == 1:
            self._calibrate(job, served)
        self._width = self._width.after_answer(min((each.queue_s for each in self._fleet.workers), default=0.0))
        while self.report.num_refusals < self._carrier.num_refusals:
            self.report.num_refusals += 1
            self._width = self._width.after_refusal()

    def _calibrate(self, job: Job, served: Served) -> None:
        fleet, operation = self._fleet, job.operation
        chars = fleet.chars_per_token
        chars += _CALIBRATION * (operation.prompt.num_chars / served.num_prompt_tokens - chars)
        fraction = fleet.answer_fraction
        if isinstance(operation, Generate):
            most = operation.max_tokens * operation.num_answers
            fraction += _CALIBRATION * (min(served.num_output_tokens / most, 1.0) - fraction)
        self._fleet = fleet.measured(chars_per_token=chars, answer_fraction=fraction)

    def _refresh_fleet(self) -> None:
        is_due = self._clock.now_s() - self._fleet_s >= self._config.fleet_interval_s
        if is_due and Native.SCORE in self._fleet.native and (self._fleet_task is None or self._fleet_task.done()):
            self._fleet_s = self._clock.now_s()
            self._fleet_task = asyncio.create_task(self._read_fleet())

    async def _read_fleet(self) -> None:
        try:
            fleet = await self._backend.fleet()
        except KvistError:
            return  # the requests themselves say what is wrong
        old = self._fleet
        self._fleet = fleet.measured(chars_per_token=old.chars_per_token, answer_fraction=old.answer_fraction)

    def _now_s(self) -> float:
        return self._clock.now_s() - self._start_s


def _refuse(job: Job) -> None:
    job.result.fail(ProgramError(f"{job.operation.position}: the run has ended"))


def _hints(placement: Placement | None, *, separate: bool) -> Hints:
    if placement is None:
        return Hints()
    if not separate:
        return Hints(worker=placement.prefill_worker, session=placement.session)
    role = {Work.PREFILL: Role.PREFILL, Work.DECODE: Role.DECODE, Work.SPLIT: Role.PREFILL}.get(placement.work)
    return Hints(worker=placement.prefill_worker, role=role, session=placement.session)


def _cancelled(job: Job) -> ProgramError:
    return ProgramError(f"{job.operation.position}: cancelled, because the program has ended")

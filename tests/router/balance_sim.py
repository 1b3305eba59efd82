"""A simulated fleet of prefill and decode workers under a load whose mix changes, for the balance of roles.

A prefill worker computes prompts one after another. A decode worker generates the answers of a number of requests at
once. A request goes to the prefill worker with the fewest queued tokens, then to the decode worker with the fewest
requests. A switched worker finishes the work of its earlier role before it begins with that of the new one.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvist.request import Role, WorkerId
from kvist.router.balance import BalancedWorker, BalanceRules, BalanceState, balance

PREFILL_TOKENS_PER_S = 8000.0
DECODE_TOKENS_PER_S = 40.0  # of each stream
PLACES = 16  # streams of a decode worker
TTFT_LIMIT_S = 5.0
CHECK_S = 0.5
SERVICE_MEMORY = 8  # requests whose mean time is the reported one


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    at_s: float
    phase: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(eq=False)
class Request:
    arrival: Arrival
    begun_s: float = 0.0
    first_token_s: float = 0.0  # decode has a place for the stream


@dataclass(eq=False)
class SimWorker:
    """Mutable; owned by the simulation."""

    worker_id: WorkerId
    role: Role
    prompts: deque[Request] = field(default_factory=deque)
    prompt: Request | None = None  # that is computed
    waiting: deque[Request] = field(default_factory=deque)  # for a place
    num_streams: int = 0
    times: dict[Role, deque[float]] = field(default_factory=lambda: {r: deque(maxlen=SERVICE_MEMORY) for r in Role})

    def num_queued_tokens(self) -> int:
        computing = [] if self.prompt is None else [self.prompt]
        return sum(each.arrival.num_prompt_tokens for each in (*self.prompts, *computing))

    def _queue_wait_s(self) -> float:
        """The queue over the rate at which it becomes shorter, as a worker measures it."""
        if self.role is Role.PREFILL:
            return sum(each.arrival.num_prompt_tokens for each in self.prompts) / PREFILL_TOKENS_PER_S
        times = self.times[Role.DECODE]
        return len(self.waiting) * sum(times) / len(times) / PLACES if times else 0.0

    def report(self) -> BalancedWorker:
        is_prefill = self.role is Role.PREFILL
        return BalancedWorker(
            worker_id=self.worker_id,
            role=self.role,
            num_running=int(self.prompt is not None) if is_prefill else self.num_streams,
            num_waiting=len(self.prompts) if is_prefill else len(self.waiting),
            queue_wait_s=self._queue_wait_s(),
        )


def arrivals(seed: int, *, phase_s: float, rates: Sequence[float], mixes: Sequence[tuple[int, int]]) -> list[Arrival]:
    """Return requests at random times: in phase i at `rates[i]` per second, with about `mixes[i]` tokens of prompt and
    answer."""
    draws, found = random.Random(seed), []
    for phase, (rate, (prompt, output)) in enumerate(zip(rates, mixes, strict=True)):
        now_s = phase * phase_s
        while (now_s := now_s + draws.expovariate(rate)) < (phase + 1) * phase_s:
            factor = draws.uniform(0.5, 1.5)
            found.append(
                Arrival(
                    at_s=now_s,
                    phase=phase,
                    num_prompt_tokens=int(prompt * factor),
                    num_output_tokens=int(output * factor),
                )
            )
    return found


class Simulation:
    """Mutable; runs once."""

    def __init__(self, num_prefill: int, num_decode: int, rules: BalanceRules | None) -> None:
        roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
        self.workers = [SimWorker(WorkerId(f"w{number}"), role) for number, role in enumerate(roles)]
        self.rules = rules
        self.state = BalanceState()
        self.now_s = 0.0
        self.switches: list[tuple[float, Role]] = []
        self.good: dict[int, int] = {}  # requests whose first token came in time, by phase
        self._events: list[tuple[float, int, str, SimWorker, Request]] = []
        self._num_events = 0

    def run(self, requests: Sequence[Arrival]) -> dict[int, int]:
        coming, next_check_s = deque(requests), 0.0
        while coming or self._events:
            arrives_s = coming[0].at_s if coming else float("inf")
            ends_s = self._events[0][0] if self._events else float("inf")
            self.now_s = min(arrives_s, ends_s)
            if self.now_s >= next_check_s:
                next_check_s = self.now_s + CHECK_S
                self._balance()
            if arrives_s <= ends_s:
                self._arrive(Request(coming.popleft()))
            else:
                _, _, what, worker, request = heapq.heappop(self._events)
                (self._prompt_done if what == "prompt" else self._stream_done)(worker, request)
        return self.good

    def _balance(self) -> None:
        for worker in self.workers:
            assert worker.role in (Role.PREFILL, Role.DECODE)
        if self.rules is None:
            return
        self.state, shift = balance([each.report() for each in self.workers], self.state, self.rules, self.now_s)
        if shift is not None:
            worker = next(each for each in self.workers if each.worker_id == shift.worker_id)
            worker.role = shift.role
            self.switches.append((self.now_s, shift.role))
        assert {each.role for each in self.workers} == {Role.PREFILL, Role.DECODE}, "a role has no worker"

    def _after(self, seconds: float, what: str, worker: SimWorker, request: Request) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now_s + seconds, self._num_events, what, worker, request))

    def _arrive(self, request: Request) -> None:
        worker = min((w for w in self.workers if w.role is Role.PREFILL), key=SimWorker.num_queued_tokens)
        worker.prompts.append(request)
        self._go_on(worker)

    def _prompt_done(self, worker: SimWorker, request: Request) -> None:
        worker.prompt = None
        worker.times[Role.PREFILL].append(self.now_s - request.begun_s)
        decode = min((w for w in self.workers if w.role is Role.DECODE), key=lambda w: w.num_streams + len(w.waiting))
        decode.waiting.append(request)
        self._go_on(worker)
        self._go_on(decode)

    def _stream_done(self, worker: SimWorker, request: Request) -> None:
        worker.num_streams -= 1
        worker.times[Role.DECODE].append(self.now_s - request.first_token_s)
        self._go_on(worker)

    def _go_on(self, worker: SimWorker) -> None:
        """Begin what the worker can begin."""
        finishes_prompts = worker.role is Role.PREFILL and not worker.waiting and not worker.num_streams
        if worker.prompts and worker.prompt is None and (finishes_prompts or worker.role is Role.DECODE):
            request = worker.prompt = worker.prompts.popleft()
            request.begun_s = self.now_s
            self._after(request.arrival.num_prompt_tokens / PREFILL_TOKENS_PER_S, "prompt", worker, request)
        may_stream = worker.role is Role.PREFILL or (worker.prompt is None and not worker.prompts)
        while worker.waiting and worker.num_streams < PLACES and may_stream:
            request = worker.waiting.popleft()
            request.first_token_s = self.now_s
            phase = request.arrival.phase
            self.good[phase] = self.good.get(phase, 0) + (self.now_s - request.arrival.at_s <= TTFT_LIMIT_S)
            worker.num_streams += 1
            self._after(request.arrival.num_output_tokens / DECODE_TOKENS_PER_S, "stream", worker, request)

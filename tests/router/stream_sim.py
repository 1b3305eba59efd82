"""A fleet of simulated workers for the dispatcher's pure decisions: links that lose messages, and a time that moves.

A token is a hash of prompt and position, and its logprob a function of both: a stream that went on elsewhere is
compared with its undisturbed twin. Each life of a worker takes messages in order, computes when the test says so, and
answers in order; what is on its way when the worker or its link dies is lost.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvist import wire
from kvist.engine.roles import RoleSwitch
from kvist.errors import KvistError
from kvist.options import compose
from kvist.request import (
    EngineRequest,
    FinishReason,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    Role,
    SamplingParams,
    TokenLogprobs,
)
from kvist.router.config import RouterConfig
from kvist.router.open_stream import OpenStream
from kvist.router.placement import Placement
from kvist.router.registry import Registry, Worker
from kvist.router.route import Router
from kvist.router.streams import Streams
from kvist.testing.specs import make_load, make_request, make_roomy_spec

VOCAB = 1000


def token_at(prompt: tuple[int, ...], position: int) -> int:
    return zlib.crc32(repr((prompt, position)).encode()) % VOCAB


def logprobs_at(prompt: tuple[int, ...], position: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(token_at(prompt, position) + position))


@dataclass(slots=True)
class Job:
    """A request at one life of a worker."""

    submit: wire.Submit
    position: int

    @property
    def request(self) -> EngineRequest:
        return self.submit.request


@dataclass(eq=False)
class Life:
    """One process of a worker, and its link to the gateway. Mutable; owned by the fleet."""

    worker: Worker
    epoch: str
    roles: RoleSwitch
    known_role: Role  # that the gateway follows; the worker learns it late
    inbox: deque[wire.Submit | wire.Abort | wire.Hello] = field(default_factory=deque)
    outbox: deque[wire.StepOutputs | wire.LoadReport] = field(default_factory=deque)
    jobs: dict[RequestId, Job] = field(default_factory=dict)
    num_submits: Counter[RequestId] = field(default_factory=Counter)
    refuses: bool = False  # new requests, as if its queue were full
    alive: bool = True


class SimFleet:
    """The decisions of a gateway, and its workers. Mutable; owned by one test."""

    def __init__(self, **config: Any) -> None:
        self.config = compose(RouterConfig, {"retry_after_s": 1.0, **config})
        self.now_s = 1000.0
        self.registry = Registry(self.config)
        ids = itertools.count()
        self.streams = Streams(self.config.links, Router(self.config, self.registry), new_id=lambda: f"id{next(ids)}")
        self.lives: dict[str, Life] = {}
        self.granted: set[HandoffId] = set()  # handoffs whose pages have arrived
        self.readers: dict[str, Reader] = {}
        self.unreachable: set[str] = set()
        self.is_old = False  # the gateway knows nothing of switched roles
        self.num_lives = 0

    # ------------------------------------------------------------ workers

    def start(self, name: str, role: Role = Role.UNIFIED) -> Life:
        """Start a worker, or a new life of one that was lost."""
        self.num_lives += 1
        worker = self.registry.find(name) or self.registry.add(name, None, self.now_s)
        worker.endpoint = f"tcp://{name}"
        role = worker.spec.role if worker.spec is not None else role
        life = self.lives[name] = Life(worker, f"{name}#{self.num_lives}", RoleSwitch(role), role)
        spec = make_roomy_spec(worker_id=name, epoch=life.epoch, role=role, vocab_size=VOCAB, writes_alone=True)
        self.registry.on_welcome(worker, wire.Welcome(spec=spec), self.now_s)
        return life

    def switch(self, name: str, role: Role) -> None:
        """Switch a worker's role. The gateway learns it from a report, which is on its way."""
        life = self.lives[name]
        if life.alive:
            life.roles.request(role)
            life.outbox.append(make_load(role=role))

    def kill(self, name: str) -> None:
        """End the process of a worker. The gateway has not noticed yet."""
        self.lives[name].alive = False

    def lose(self, name: str, *, num_delivered: int = 0) -> None:
        """Let the gateway notice that a worker, or the link to it, is gone; what is on its way is lost."""
        life = self.lives[name]
        for _ in range(num_delivered):
            self.deliver(name)
        life.inbox.clear()
        life.outbox.clear()
        life.jobs.clear()  # for a link: the process aborts the requests of a gateway that reconnects
        life.alive = False
        self.registry.on_lost(life.worker, "it is gone")
        self.streams.on_lost(life.worker, "it is gone", self.now_s)
        self.carry_out()

    def is_ready(self, name: str) -> bool:
        return self.lives[name].worker.state.value == "ready"

    # ------------------------------------------------------------ messages

    def carry_out(self) -> None:
        streams = self.streams
        while streams.sends:
            sends, streams.sends = streams.sends, []
            for worker, message in sends:
                life = self.lives[worker.url]
                if worker.url in self.unreachable and isinstance(message, wire.Submit):
                    streams.on_unsent(worker, message, self.now_s)
                else:
                    life.inbox.append(message)
        woken, streams.woken = streams.woken, []
        for stream in woken:
            self.readers[stream.request.request_id].woken = True

    def deliver(self, name: str) -> None:
        """Deliver one message of a worker to the gateway."""
        life = self.lives[name]
        if not life.outbox:
            return
        message = life.outbox.popleft()
        if isinstance(message, wire.StepOutputs):
            self.streams.on_outputs(life.worker, message, self.now_s)
            self.carry_out()
        elif not self.is_old and self.registry.on_report(life.worker, message, self.now_s):
            life.inbox.append(wire.Hello(gateway_id="g", known_role=life.worker.present_role))

    def step(self, name: str, num_tokens: int = 1) -> None:
        """Let a worker read its messages and compute some tokens of each request."""
        life = self.lives[name]
        if not life.alive:
            return
        while life.inbox:
            self._read(life, life.inbox.popleft())
        for job in list(life.jobs.values()):
            self._compute(life, job, num_tokens)

    def _read(self, life: Life, message: wire.Submit | wire.Abort | wire.Hello) -> None:
        if isinstance(message, wire.Hello):
            assert message.known_role is not None
            life.known_role = message.known_role
            life.roles.update([life.known_role])
            return
        if isinstance(message, wire.Abort):
            if life.jobs.pop(message.request_id, None) is not None:
                self._end(life, message.request_id, Outcome.ABORTED)
            return
        request = message.request
        life.num_submits[request.request_id] += 1
        life.roles.update([life.known_role])
        admitted = life.roles.role.modes.union(*(role.modes for role in life.roles.earlier_roles))
        assert message.mode in admitted, "a request is refused for its role"
        if life.refuses:
            self._end(life, request.request_id, Outcome.FAILED, "overloaded")
        else:
            life.jobs[request.request_id] = Job(message, len(request.output_token_ids))

    def _compute(self, life: Life, job: Job, num_tokens: int) -> None:
        submit, request = job.submit, job.request
        if submit.mode is Mode.DECODE:
            assert submit.handoff_id is not None
            assert submit.prefill is not None
            if submit.handoff_id not in self.granted:
                if not self._lives(submit.prefill.epoch):
                    self.fail(life, request.request_id, "worker_lost")
                return
            if job.position == len(request.output_token_ids):
                job.position += 1  # prefill sends the first token
        elif submit.mode is Mode.PREFILL and submit.handoff == "direct":
            target = self._life(submit.target_epoch)
            if target is None or not target.alive:
                self.fail(life, request.request_id, "worker_lost")
                return
            if not any(other.submit.handoff_id == submit.handoff_id for other in target.jobs.values()):
                return  # no grant yet
            assert submit.handoff_id is not None
            self.granted.add(submit.handoff_id)
            num_tokens = 1
        elif submit.mode is Mode.PREFILL:
            num_tokens = 1
        self._emit(life, job, num_tokens)
        done = job.position >= request.sampling.max_tokens
        if done or submit.mode is Mode.PREFILL:
            del life.jobs[request.request_id]
            self._end(life, request.request_id, Outcome.FINISHED)

    def _emit(self, life: Life, job: Job, num_tokens: int) -> None:
        prompt, first = job.request.prompt_token_ids, job.position
        job.position = end = min(first + num_tokens, job.request.sampling.max_tokens)
        if first == end:
            return
        places = range(first, end)
        chunk = wire.TokenChunk(
            request_id=job.request.request_id,
            position=first,
            token_ids=tuple(token_at(prompt, place) for place in places),
            logprobs=tuple(logprobs_at(prompt, place) for place in places),
            finish_reason=FinishReason.LENGTH if end == job.request.sampling.max_tokens else None,
            num_cached_tokens=0 if first == 0 else None,
        )
        life.outbox.append(wire.StepOutputs(chunks=(chunk,)))

    def fail(self, life: Life, request_id: RequestId, code: str) -> None:
        """Let a worker fail a request that it has."""
        if life.jobs.pop(request_id, None) is not None:
            self._end(life, request_id, Outcome.FAILED, code)

    def _end(self, life: Life, request_id: RequestId, outcome: Outcome, code: str | None = None) -> None:
        ended = wire.Ended(request_id=request_id, outcome=outcome, error_code=code, message="as told")
        life.outbox.append(wire.StepOutputs(ended=(ended,)))

    def _life(self, epoch: str | None) -> Life | None:
        return next((life for life in self.lives.values() if life.epoch == epoch), None)

    def _lives(self, epoch: str) -> bool:
        life = self._life(epoch)
        return life is not None and life.alive

    # ------------------------------------------------------------ streams and time

    def begin(self, prompt: tuple[int, ...], *, max_tokens: int) -> Reader | KvistError:
        request_id = f"r{len(self.readers)}"
        sampling = SamplingParams(max_tokens=max_tokens, num_logprobs=0)
        request = make_request(request_id, prompt, max_tokens=max_tokens, num_logprobs=sampling.num_logprobs)
        try:
            stream = self.streams.begin(request, self.now_s, Placement(session=f"s{prompt[0]}"))
        except KvistError as error:
            return error
        reader = self.readers[request_id] = Reader(self, stream, began_s=self.now_s)
        self.carry_out()
        return reader

    def advance(self, seconds: float) -> None:
        """Move the time to each deadline in turn, as a timer does, and then to the end."""
        end_s = self.now_s + seconds
        while (next_s := self.streams.next_deadline_s) is not None and next_s <= end_s:
            self.now_s = max(self.now_s, next_s)
            self.streams.on_time(self.now_s)
            self.carry_out()
        self.now_s = end_s
        for reader in self.readers.values():
            reader.check_bounds()

    def settle(self, *, until: Callable[[], bool] | None = None) -> None:
        """Let every worker that lives compute, and every reader read, until nothing is open."""
        for _ in range(400):
            if until is not None and until():
                return
            for name in self.lives:
                self.step(name, 4)
                while self.lives[name].outbox:
                    self.deliver(name)
            for reader in self.readers.values():
                reader.read()
            if until is None and all(reader.ended for reader in self.readers.values()) and not self.streams.num_open:
                return
            self.advance(0.25)
        raise AssertionError(f"stuck: {self.streams.num_open} open")

    def check_settled(self) -> None:
        assert self.streams.num_open == 0
        assert self.streams.next_deadline_s is None, "a deadline is left"
        assert self.streams.counts.num_cancelled_held == 0
        for life in self.lives.values():
            worker = life.worker
            assert not worker.in_flight, "a request leaks at a worker"
            assert (worker.num_pending_tokens, len(worker.coming), len(worker.callers)) == (0, 0, 0)
            assert all(count == 1 for count in life.num_submits.values())


class Reader:
    """The reader of one stream. Mutable; owned by the fleet."""

    def __init__(self, fleet: SimFleet, stream: OpenStream, *, began_s: float) -> None:
        self.fleet = fleet
        self.stream = stream
        self.began_s = began_s
        self.woken = False
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finished = self.left = False
        self.error: KvistError | None = None

    @property
    def ended(self) -> bool:
        return self.finished or self.left or self.error is not None

    def read(self) -> None:
        """Take all that is ready, as the shell does."""
        while not self.ended:
            part = self.stream.take()
            if part is not None:
                assert part.chunk.position == len(self.tokens), "a gap or a repeat"
                self.tokens += part.chunk.token_ids
                self.logprobs += part.chunk.logprobs or ()
                self.check_tokens()
            elif self.stream.error is not None:
                self.error = self.stream.error
                self._close()
            elif self.stream.merger.complete:
                self.finished = True
                assert len(self.tokens) == self.stream.request.sampling.max_tokens
                self._close()
            else:
                return

    def leave(self) -> None:
        if not self.ended:
            self.left = True
            self._close()

    def _close(self) -> None:
        self.fleet.streams.on_reader_gone(self.stream, self.fleet.now_s)
        self.fleet.carry_out()

    def check_tokens(self) -> None:
        prompt = self.stream.request.prompt_token_ids
        assert self.tokens == [token_at(prompt, place) for place in range(len(self.tokens))]
        assert self.logprobs == [logprobs_at(prompt, place) for place in range(len(self.tokens))]

    def check_bounds(self) -> None:
        """Check that no deadline of the stream has passed."""
        stream, links, now_s = self.stream, self.fleet.config.links, self.fleet.now_s
        if stream.settled:
            return
        assert now_s < self.began_s + links.request_timeout_s, "over its time limit"
        if stream in self.fleet.streams._waiting:
            assert now_s <= stream.trouble.wait_until_s, "waits too long"

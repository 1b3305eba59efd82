"""A dispatcher without engines: the server's `EngineClient`, with answers that a test writes.

A test sets the public fields at any time. Each request is answered with the tokens of `answer`, cut into parts, and
then with the end token unless the request ignores it; at most `max_tokens` tokens in all.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvist.flight.handoff_report import HandoffReport
from kvist.flight.timeline import SentTo, Timeline
from kvist.lease_messages import LeaseAnswer, LeaseCommand, LeaseStatus
from kvist.request import EngineRequest, FinishReason, TokenLogprobs, WorkerId
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.policy import Reason
from kvist.router.stream import ClusterSnapshot, StreamPart
from kvist.testing.specs import make_spec
from kvist.text.tokenizer import Tokenizer
from kvist.wire import (
    Answer,
    AnswerT,
    Command,
    EngineSpec,
    FlushCache,
    Flushed,
    FlushTier,
    RoleAnswer,
    SetRole,
    StorageCommand,
    TokenChunk,
)

PREFILL, DECODE = WorkerId("p:1"), WorkerId("d:1")
FLUSHED = {PREFILL: 5, DECODE: 7}  # pages that a flush drops
BYTE_MODEL = make_spec(
    worker_id=DECODE,
    model_name="tiny",
    vocab_size=300,
    max_model_len=200,
    num_pages=10,
    dtype="fp32",
    max_running_requests=8,
    max_queued_requests=8,
)
HANDOFF = HandoffReport(
    num_pages=3,
    num_pages_reused=2,
    num_bytes=4096,
    duration_s=0.0125,
    wait_s=0.001,
    transport="shm",
    transport_reason="both are near",
)
LogprobsAt = Callable[[EngineRequest, int, int], TokenLogprobs]  # request, position of the output token, its id
PromptLogprobsAt = Callable[[EngineRequest, int], TokenLogprobs]  # request, position in the prompt


def chosen_and_a_certain_other(request: EngineRequest, _position: int, token_id: int) -> TokenLogprobs:
    """Return logprobs with the chosen token first, and one that is impossible."""
    return TokenLogprobs(
        logprob=-0.5,
        top_token_ids=(token_id, 65),
        top_logprobs=(-0.5, float("-inf")),
        requested_logprobs=_minus_the_ids(request),
    )


def minus_the_position(request: EngineRequest, position: int) -> TokenLogprobs:
    """Return the negative position as the logprob of a prompt token; token 70 is likeliest everywhere, then 71."""
    count = request.sampling.prompt_logprobs
    return TokenLogprobs(
        logprob=-float(position),
        top_token_ids=(70, 71)[:count],
        top_logprobs=(-0.25, -0.75)[:count],
        requested_logprobs=_minus_the_ids(request),
        rank=position + 2,
    )


def _minus_the_ids(request: EngineRequest) -> tuple[float, ...]:
    return tuple(-float(token_id) for token_id in request.sampling.logprob_token_ids)


def _leased(request: EngineRequest) -> LeaseStatus | None:
    """Return the lease that a worker with pages of 4 tokens would grant."""
    terms, num_pages = request.lease, request.num_prompt_tokens // 4
    if terms is None:
        return None
    return LeaseStatus(lease_id=terms.lease_id, num_pages=num_pages, num_tokens=4 * num_pages, left_s=terms.ttl_s)


@dataclass
class ScriptedDispatcher:
    """Mutable; owned by one test and used in its event loop."""

    tokenizer: Tokenizer
    answer: str | Sequence[int] = "hello"
    end_token_id: int = 256  # of `byte_tokenizer()`
    ends: bool = True  # the end token follows the answer, unless the request ignores it
    cuts: Sequence[int] = ()  # tokens in the first parts
    tokens_per_part: int = 1  # in all others
    logprobs_at: LogprobsAt = chosen_and_a_certain_other
    prompt_logprobs_at: PromptLogprobsAt = minus_the_position
    error: Exception | None = None  # raised after `error_after` tokens
    error_after: int = 0
    hold: asyncio.Event | None = None  # awaited before each part but the first
    can_serve: bool = True
    spec: EngineSpec | None = BYTE_MODEL
    snapshots: ClusterSnapshot = field(default_factory=lambda: ClusterSnapshot(workers=()))
    storage_answers: Mapping[WorkerId, Answer] = field(default_factory=dict)
    lease_answers: Mapping[WorkerId, LeaseAnswer] = field(default_factory=dict)
    # the calls so far
    requests: list[EngineRequest] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    num_open: int = 0
    num_closed_early: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)  # set when a stream ends

    async def generate(
        self, request: EngineRequest, placement: Placement = ANYWHERE, timeline: Timeline | None = None
    ) -> AsyncGenerator[StreamPart, None]:
        self.requests.append(request)
        self.placements.append(placement)
        if timeline is not None:
            timeline.on_submit(timeline.end_s, SentTo(prefill=PREFILL, decode=DECODE))
        self.num_open += 1
        complete = False
        try:
            for part in self._parts(request):
                if self.error is not None and part.chunk.position >= self.error_after:
                    raise self.error
                if self.hold is not None and part.chunk.position > 0:
                    await self.hold.wait()
                complete = part.chunk.finish_reason is not None
                yield part
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1
            self.num_closed_early += not complete
            self.closed.set()

    def ready(self) -> bool:
        return self.can_serve

    def model(self) -> EngineSpec | None:
        return self.spec

    async def ask_workers(self, command: Command, answer_type: type[AnswerT]) -> dict[WorkerId, AnswerT]:
        self.commands.append(command)
        flushed: dict[WorkerId, Answer] = {worker: Flushed(call_id="", num_pages=n) for worker, n in FLUSHED.items()}
        answers = self.storage_answers if isinstance(command, StorageCommand) else flushed
        answers = self.lease_answers if isinstance(command, LeaseCommand) else answers
        return {worker: answer for worker, answer in answers.items() if isinstance(answer, answer_type)}

    async def ask_worker(self, name: str | None, command: Command, answer_type: type[AnswerT]) -> AnswerT:
        self.commands.append(command)
        if self.error is not None:
            raise self.error
        answer: Answer | None = RoleAnswer(call_id="") if isinstance(command, SetRole) else None
        if isinstance(command, LeaseCommand):
            answer = self.lease_answers.get(WorkerId(name or ""))
        assert isinstance(answer, answer_type), f"no answer to {command} for {name}"
        return answer

    @property
    def flushed(self) -> list[FlushTier | None]:
        """The tiers of the flushes so far."""
        return [command.tier for command in self.commands if isinstance(command, FlushCache)]

    @property
    def storage_commands(self) -> list[StorageCommand]:
        return [command for command in self.commands if isinstance(command, StorageCommand)]

    def snapshot(self) -> ClusterSnapshot:
        return self.snapshots

    def _parts(self, request: EngineRequest) -> Iterator[StreamPart]:
        token_ids, reason = self._answer_to(request)
        cuts = itertools.chain(self.cuts, itertools.repeat(self.tokens_per_part))
        position = 0
        while position < len(token_ids) or not token_ids:  # without tokens: one part that ends the answer
            stop = min(position + next(cuts), len(token_ids))
            yield self._part(
                request, position, tuple(token_ids[position:stop]), reason if stop == len(token_ids) else None
            )
            if not token_ids:
                return
            position = stop

    def _answer_to(self, request: EngineRequest) -> tuple[Sequence[int], FinishReason]:
        sampling = request.sampling
        token_ids = self.tokenizer.encode(self.answer) if isinstance(self.answer, str) else self.answer
        if self.ends and not sampling.ignore_eos:
            token_ids = [*token_ids, self.end_token_id]
        whole = len(token_ids) <= sampling.max_tokens
        token_ids = token_ids[: sampling.max_tokens]
        stopped = whole and bool(token_ids) and not sampling.ignore_eos and token_ids[-1] == self.end_token_id
        return token_ids, FinishReason.STOP if stopped else FinishReason.LENGTH

    def _part(
        self, request: EngineRequest, position: int, token_ids: tuple[int, ...], reason: FinishReason | None
    ) -> StreamPart:
        logprobs = (
            tuple(self.logprobs_at(request, position + offset, token_id) for offset, token_id in enumerate(token_ids))
            if request.sampling.num_logprobs is not None
            else None
        )
        first = position == 0
        chunk = TokenChunk(
            request_id=request.request_id,
            position=position,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            num_cached_tokens=4 if first else None,
            num_cached_host_tokens=2 if first else 0,
            num_cached_storage_tokens=1 if first else 0,
            handoff=HANDOFF if position == 1 else None,
            lease=_leased(request),
            prompt_logprobs=self._prompt_logprobs(request) if first else (),
            prompt_position=max(1, request.sampling.prompt_logprobs_start),
        )
        return StreamPart(chunk=chunk, prefill_worker=PREFILL, decode_worker=DECODE, reason=Reason.SPLIT, cost_ms=1.5)

    def _prompt_logprobs(self, request: EngineRequest) -> tuple[TokenLogprobs, ...]:
        if request.sampling.prompt_logprobs is None:
            return ()
        first = max(1, request.sampling.prompt_logprobs_start)
        return tuple(self.prompt_logprobs_at(request, place) for place in range(first, request.num_prompt_tokens))

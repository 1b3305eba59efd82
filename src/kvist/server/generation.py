"""From engine tokens to text: one `Choice` for each engine request, and the merged stream of all of a job's choices.

The dispatcher yields tokens (router/stream.py); a choice detokenizes them, looks for stop strings, and remembers what
the response will report. Leaving `run_choices` early (a stop string, a client that left, a timeout) closes the
dispatcher's iterators, and they abort at every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.clock import Clock
from kvist.errors import EngineError
from kvist.metrics import GatewayMetrics
from kvist.request import EngineRequest, FinishReason, TokenLogprobs, WorkerId
from kvist.router.stream import ClusterSnapshot, StreamPart
from kvist.text import IncrementalDetokenizer, StopMatcher, Tokenizer
from kvist.wire import AskStorage, EngineSpec, FlushTier, HandoffReport, StorageAnswer

_QUEUE_PARTS = 64  # parts that may wait between the choices of one job and its reader


class Dispatcher(Protocol):
    """What the server needs of the router (router/dispatch.py)."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[StreamPart, None]:
        """Raises `KvistError`. `aclose()` aborts the request everywhere."""

    def ready(self) -> bool:
        """True when a token can really be produced now."""

    def model(self) -> EngineSpec | None:
        """What the workers serve; None while no worker is ready."""

    async def flush_cache(self, tier: FlushTier | None = None) -> dict[WorkerId, int]:
        """Drops every cached page (of this tier) that no request uses; the number of pages dropped, by worker."""

    async def ask_storage(self, ask: AskStorage) -> dict[WorkerId, StorageAnswer]:
        """What every worker answers."""

    def snapshot(self) -> ClusterSnapshot: ...


@dataclass(slots=True)  # not frozen: one is made for every part, and freezing doubles its cost
class Delta:
    """What one part adds to a choice. `finished` is true for the last one."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finished: bool


class Choice:
    """One answer in the making. Owned by the job that runs it; `absorb` is its only writer."""

    def __init__(
        self,
        request: EngineRequest,
        *,
        index: int,
        repeats_prompt: bool,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self.request = request
        self.index = index
        self.repeats_prompt = repeats_prompt  # another choice already counts this prompt in `usage`
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopMatcher(stops) if stops else None
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.matched: int | str | None = None  # the stop token or stop string
        self.num_cached_tokens = 0
        self.cached_by_tier = {"device": 0, "host": 0, "storage": 0}  # their sum is `num_cached_tokens`
        self.prefill_worker: str | None = None
        self.decode_worker: str | None = None
        self.handoff: HandoffReport | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def absorb(self, part: StreamPart) -> Delta:
        chunk = part.chunk
        if self.prefill_worker is None or chunk.handoff is not None or chunk.num_cached_tokens is not None:
            self._remember_route(part)
        token_ids = chunk.token_ids
        logprobs = chunk.logprobs or ()
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        reason = chunk.finish_reason
        if reason is None and self._stops is None:  # nearly every part
            text = self._detokenizer.push(token_ids)
            self.texts.append(text)
            return Delta(text, token_ids, logprobs, False)
        stopped = reason is FinishReason.STOP
        # the token that ended the answer is no part of it
        text = self._detokenizer.push(token_ids[:-1] if stopped else token_ids)
        if reason is not None:
            self.finish_reason = reason.value
            self.matched = token_ids[-1] if stopped else None
            text += self._detokenizer.flush()
        text = self._cut_at_stop(text)
        self.texts.append(text)
        return Delta(text, token_ids, logprobs, self.finish_reason is not None)

    def _cut_at_stop(self, text: str) -> str:
        if self._stops is None:
            return text
        text = self._stops.push(text)
        if self._stops.matched is not None:
            self.finish_reason, self.matched = FinishReason.STOP.value, self._stops.matched
        elif self.finish_reason is not None:
            text += self._stops.flush()
        return text

    def _remember_route(self, part: StreamPart) -> None:
        self.prefill_worker, self.decode_worker = part.prefill_worker, part.decode_worker
        if part.chunk.handoff is not None:
            self.handoff = part.chunk.handoff
        if part.chunk.num_cached_tokens is not None:
            host, storage = part.chunk.num_cached_host_tokens, part.chunk.num_cached_storage_tokens
            self.num_cached_tokens = part.chunk.num_cached_tokens
            device = self.num_cached_tokens - host - storage
            self.cached_by_tier = {"device": device, "host": host, "storage": storage}


async def run_choices(
    dispatcher: Dispatcher, choices: Sequence[Choice], metrics: GatewayMetrics, clock: Clock
) -> AsyncGenerator[tuple[Choice, Delta], None]:
    """Every delta of every choice, in order within a choice. Raises the first `KvistError` of any of them."""
    if len(choices) == 1:
        choice = choices[0]
        async with contextlib.aclosing(_run(dispatcher, choice, metrics, clock)) as deltas:
            async for delta in deltas:
                yield choice, delta
        return
    queue: asyncio.Queue[tuple[Choice, Delta | BaseException]] = asyncio.Queue(_QUEUE_PARTS)
    tasks = [asyncio.create_task(_feed(queue, dispatcher, choice, metrics, clock)) for choice in choices]
    try:
        num_open = len(choices)
        while num_open:
            choice, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            num_open -= found.finished
            yield choice, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    queue: asyncio.Queue[tuple[Choice, Delta | BaseException]],
    dispatcher: Dispatcher,
    choice: Choice,
    metrics: GatewayMetrics,
    clock: Clock,
) -> None:
    try:
        async with contextlib.aclosing(_run(dispatcher, choice, metrics, clock)) as deltas:
            async for delta in deltas:
                await queue.put((choice, delta))
    except Exception as error:  # carried to the reader, which raises it
        await queue.put((choice, error))


async def _run(
    dispatcher: Dispatcher, choice: Choice, metrics: GatewayMetrics, clock: Clock
) -> AsyncGenerator[Delta, None]:
    start_s = clock.now_s()
    async with contextlib.aclosing(dispatcher.generate(choice.request)) as parts:
        async for part in parts:
            delta = choice.absorb(part)
            now_s = clock.now_s()
            if choice.last_token_s is not None:
                metrics.inter_token_latency_s.observe(now_s - choice.last_token_s)
            else:
                choice.first_token_s = now_s
                metrics.time_to_first_token_s.observe(now_s - start_s)
            choice.last_token_s = now_s
            metrics.num_generation_tokens += len(delta.token_ids)
            if delta.finished:
                _count_finished(choice, metrics, start_s)
                yield delta
                return
            yield delta
    raise EngineError("the engine's stream ended without a finish reason; this is a bug in Kvist")


def _count_finished(choice: Choice, metrics: GatewayMetrics, start_s: float) -> None:
    assert choice.first_token_s is not None
    assert choice.last_token_s is not None
    assert choice.finish_reason is not None
    metrics.num_finished[choice.finish_reason] += 1
    metrics.num_prompt_tokens += choice.request.num_prompt_tokens
    metrics.num_cached_prompt_tokens += choice.num_cached_tokens
    metrics.e2e_latency_s.observe(choice.last_token_s - start_s)
    if len(choice.token_ids) > 1:
        after_first_s = choice.last_token_s - choice.first_token_s
        metrics.time_per_output_token_s.observe(after_first_s / (len(choice.token_ids) - 1))

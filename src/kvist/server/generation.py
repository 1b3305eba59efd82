"""From engine tokens to text: one `ChoiceState` per engine request, and the merged stream of all choices of a job.

The dispatcher yields tokens (router/stream.py). A choice detokenizes its tokens, searches for stop strings, and keeps
what the response will report. Leaving `run_choices` early (a stop string, a disconnected client, a timeout) closes the
dispatcher's iterators, which aborts the requests at every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.clock import Clock
from kvist.errors import EngineError, RequestError
from kvist.flight.flight import Flight
from kvist.flight.handoff_report import HandoffReport, StoredPages
from kvist.flight.stages import DETOKENISED
from kvist.flight.timeline import Timeline
from kvist.lease_messages import LeaseStatus
from kvist.metrics import GatewayMetrics
from kvist.request import EngineRequest, FinishReason, TokenLogprobs, WorkerId
from kvist.router.handoff_ways import HandoffWay
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.sent_together import MOST_TOKENS_TOGETHER
from kvist.router.stream import ClusterSnapshot, StreamPart
from kvist.text import IncrementalDetokenizer, StopMatcher, Tokenizer, special_token_marks
from kvist.wire import AnswerT, Command, EngineSpec, TokenChunk

_LONG_PROMPT_TOKENS = 512  # routing and sending a longer prompt takes 0.1 ms or more
_QUEUE_PARTS = 64  # parts that may wait between the choices of one job and the reader of the job


class EngineClient(Protocol):
    """The interface between the server and the router (implemented by router/dispatch.py)."""

    def generate(
        self, request: EngineRequest, placement: Placement = ANYWHERE, timeline: Timeline | None = None
    ) -> AsyncGenerator[StreamPart, None]:
        """Stream the tokens of one request, and note its stages in `timeline`. Raises `KvistError`. `aclose()` aborts
        the request at every engine."""

    def ready(self) -> bool:
        """Return whether a token can be generated now."""

    def model(self) -> EngineSpec | None:
        """Return the model that the workers serve, or None while no worker is ready."""

    async def ask_worker(self, name: str | None, command: Command, answer_type: type[AnswerT]) -> AnswerT:
        """Send the command to the worker with this URL or id (None: the only one), and return its answer."""

    async def ask_workers(self, command: Command, answer_type: type[AnswerT]) -> dict[WorkerId, AnswerT]:
        """Send the command, with a new `call_id`, to every worker and return the answers by worker."""

    def snapshot(self) -> ClusterSnapshot: ...


@dataclass(slots=True)  # not frozen: built for every part, and freezing doubles the cost
class Delta:
    """The text and tokens that one part adds to a choice. `finished` marks the last delta of the choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finished: bool
    text_offsets: tuple[int, ...] = ()  # with logprobs: see `ChoiceState.text_offsets`
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # in the first delta: see `ChoiceState.prompt_logprobs`


class ChoiceState:
    """One answer while tokens arrive. Mutable; owned by the job that runs it, and changed by `absorb` only."""

    def __init__(
        self,
        request: EngineRequest,
        *,
        index: int,
        repeats_prompt: bool,
        tokenizer: Tokenizer,
        placement: Placement = ANYWHERE,
        stops: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        max_kept_logprobs: int = 0,
        shown_special: Collection[str] = (),
    ) -> None:
        """`stops` take effect after `min_tokens` of the request, like its stop tokens. `max_kept_logprobs` limits the
        logprobs in `logprobs`, top logprobs included; 0 keeps none. `shown_special`: special tokens that the text has
        in any case."""
        self.request = request
        self.placement = placement
        self.index = index
        self.repeats_prompt = repeats_prompt  # another choice already counts this prompt in `usage`
        marks = special_token_marks(stops, tokenizer.special_token_pattern) if skip_special_tokens else {}
        in_text = dict(zip(shown_special, shown_special, strict=True)) | marks
        self._marks = {tokenizer.special_tokens[token]: text for token, text in in_text.items()}
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, marks=self._marks
        )
        self._stops = None
        if stops:
            include = include_stop_str_in_output
            self._stops = StopMatcher(stops, marks=marks, shown=shown_special, include_match=include)
        self._shows_stop_token = include_stop_str_in_output
        self._counts_chars = request.sampling.num_logprobs is not None
        self._max_kept_logprobs = max_kept_logprobs
        self._num_chars = 0  # of the text so far, with text that a stop string may cut off later
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's last tokens, as many as requested
        # With logprobs: the number of complete characters before each token. The offset of a token that belongs to a
        # stop string may lie beyond the end of the text.
        self.text_offsets: list[int] = []
        self.finish_reason: str | None = None
        self.matched: int | str | None = None  # the stop token or stop string
        self.num_cached_tokens = 0
        self.cached_by_tier = {"device": 0, "host": 0, "storage": 0}  # tokens; the sum is `num_cached_tokens`
        self.prefill_worker: str | None = None
        self.decode_worker: str | None = None
        self.route: dict[str, object] = {}  # why these workers
        self.num_failovers = 0
        self.handoff: HandoffReport | None = None
        self.lease: LeaseStatus | None = None  # of its prompt, once it is computed
        self.handoff_way: HandoffWay | None = None
        self.stored: StoredPages | None = None
        self.second_token_gap_s: float | None = None  # of a request that was handed over
        self.flight: Flight | None = None  # of the HTTP request, if it is recorded
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def absorb(self, part: StreamPart) -> Delta:
        chunk = part.chunk
        if self.prefill_worker is None and self.request.sampling.prompt_logprobs is not None:
            self._keep_prompt_logprobs(chunk)
        if (
            self.prefill_worker is None
            or chunk.handoff is not None
            or chunk.num_cached_tokens is not None
            or part.num_failovers != self.num_failovers
        ):
            self._remember_route(part)
        if chunk.finish_reason is not None or self._stops is not None or self._counts_chars:
            return self._absorb_each(chunk)
        token_ids = chunk.token_ids  # the usual case
        self.token_ids.extend(token_ids)
        text = self._detokenizer.push(token_ids)
        self.texts.append(text)
        return Delta(text, token_ids, (), False, (), chunk.prompt_logprobs)

    def _absorb_each(self, chunk: TokenChunk) -> Delta:
        """Absorb token by token, so that tokens after a stop string in the same part are dropped."""
        reason, num_before, self.lease = chunk.finish_reason, len(self.token_ids), chunk.lease
        shown: list[str] = []
        offsets: list[int] = []
        for place, token_id in enumerate(chunk.token_ids):
            self.token_ids.append(token_id)
            offsets.append(self._num_chars)
            is_stop_token = reason is FinishReason.STOP and place == len(chunk.token_ids) - 1
            if not is_stop_token or self._shows_stop_token:
                shown.append(self._show(self._detokenizer.push((token_id,)), is_mark=token_id in self._marks))
            if self._cut_at_stop():
                break
        if reason is not None and self.finish_reason is None:
            shown.append(self._show(self._detokenizer.flush()))
            if not self._cut_at_stop():
                self.finish_reason = reason.value
                self.matched = chunk.token_ids[-1] if reason is FinishReason.STOP else None
                shown.append("" if self._stops is None else self._stops.flush())
        token_ids = chunk.token_ids[: len(self.token_ids) - num_before]
        logprobs = (chunk.logprobs or ())[: len(token_ids)]
        if self._max_kept_logprobs:
            self._keep(logprobs, offsets)
        text = "".join(shown)
        self.texts.append(text)
        finished = self.finish_reason is not None
        return Delta(text, token_ids, logprobs, finished, tuple(offsets), chunk.prompt_logprobs)

    def _keep_prompt_logprobs(self, chunk: TokenChunk) -> None:
        first, num_prompt_tokens = self.request.sampling.prompt_logprobs_start, self.request.num_prompt_tokens
        self.prompt_logprobs = chunk.prompt_logprobs
        if len(self.prompt_logprobs) != num_prompt_tokens - min(max(first, 1), num_prompt_tokens):
            raise EngineError("an engine has not sent all logprobs of the prompt; this is a bug in Kvist")

    def _keep(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> None:
        self.logprobs.extend(logprobs)
        self.text_offsets.extend(offsets)
        if self.num_logprobs > self._max_kept_logprobs:
            raise RequestError(
                f"the answer has over {self._max_kept_logprobs} logprobs, which is the limit for one answer of this "
                "request: lower `max_tokens`, ask for fewer answers or fewer top logprobs, or stream the answer",
                param="logprobs",
            )

    @property
    def num_logprobs(self) -> int:
        """The number of logprobs in `logprobs`, top logprobs included."""
        return len(self.logprobs) * self.num_logprobs_per_token

    @property
    def num_logprobs_per_token(self) -> int:
        """The number of logprobs of one token, of the answer or of the prompt."""
        sampling = self.request.sampling
        most_top = max(sampling.num_logprobs or 0, sampling.prompt_logprobs or 0)
        return 1 + most_top + len(sampling.logprob_token_ids)

    def _show(self, text: str, *, is_mark: bool = False) -> str:
        """Return the part of the withheld text and `text` that certainly belongs to the answer."""
        self._num_chars += 0 if is_mark else len(text)
        if self._stops is None:
            return text
        return self._stops.push(text, armed=len(self.token_ids) > self.request.sampling.min_tokens)

    def _cut_at_stop(self) -> bool:
        if self._stops is None or self._stops.matched is None:
            return False
        self.finish_reason, self.matched = FinishReason.STOP.value, self._stops.matched
        return True

    def _remember_route(self, part: StreamPart) -> None:
        self.prefill_worker, self.decode_worker = part.prefill_worker, part.decode_worker
        self.num_failovers = part.num_failovers
        if part.handoff is not None or not self.num_failovers:  # one worker alone may have gone on after a handoff
            self.handoff_way, self.stored = part.handoff, part.stored
        cost_ms = None if part.cost_ms is None else round(part.cost_ms, 3)
        self.route = {"reason": part.reason.value, "cost_ms": cost_ms}
        if part.chunk.handoff is not None:
            self.handoff = part.chunk.handoff
        if part.chunk.num_cached_tokens is not None:
            host, storage = part.chunk.num_cached_host_tokens, part.chunk.num_cached_storage_tokens
            self.num_cached_tokens = part.chunk.num_cached_tokens
            device = self.num_cached_tokens - host - storage
            self.cached_by_tier = {"device": device, "host": host, "storage": storage}


async def run_choices(
    dispatcher: EngineClient, choices: Sequence[ChoiceState], metrics: GatewayMetrics, clock: Clock
) -> AsyncGenerator[tuple[ChoiceState, Delta], None]:
    """Yield every delta of every choice, in order within a choice. Raise the first `KvistError` of any choice."""
    if len(choices) == 1:
        choice = choices[0]
        async with contextlib.aclosing(_run(dispatcher, choice, metrics, clock)) as deltas:
            async for delta in deltas:
                yield choice, delta
        return
    num_tokens = sum(choice.request.num_prompt_tokens for choice in choices)
    together = bool(choices[0].placement.group) and num_tokens <= MOST_TOKENS_TOGETHER
    queue: asyncio.Queue[tuple[ChoiceState, Delta | BaseException]] = asyncio.Queue(_QUEUE_PARTS)
    tasks: list[asyncio.Task[None]] = []
    try:
        for choice in choices:
            tasks.append(asyncio.create_task(_feed(queue, dispatcher, choice, metrics, clock)))
            if choice.request.num_prompt_tokens > _LONG_PROMPT_TOKENS and not together:
                await asyncio.sleep(0)  # send the prompt now, and let other tasks run before the next prompt
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
    queue: asyncio.Queue[tuple[ChoiceState, Delta | BaseException]],
    dispatcher: EngineClient,
    choice: ChoiceState,
    metrics: GatewayMetrics,
    clock: Clock,
) -> None:
    try:
        async with contextlib.aclosing(_run(dispatcher, choice, metrics, clock)) as deltas:
            async for delta in deltas:
                await queue.put((choice, delta))
    except Exception as error:  # the reader raises it
        await queue.put((choice, error))


async def _run(
    dispatcher: EngineClient, choice: ChoiceState, metrics: GatewayMetrics, clock: Clock
) -> AsyncGenerator[Delta, None]:
    start_s = clock.now_s()
    timeline = None if choice.flight is None else choice.flight.open_answer()
    async with contextlib.aclosing(dispatcher.generate(choice.request, choice.placement, timeline)) as parts:
        async for part in parts:
            if timeline is not None and part.chunk.finish_reason is not None:
                timeline.on_taken(clock.now_s())
            delta = choice.absorb(part)
            now_s = clock.now_s()
            if choice.last_token_s is not None:
                metrics.inter_token_latency_s.observe(now_s - choice.last_token_s)
                if choice.handoff is not None and choice.second_token_gap_s is None and not choice.num_failovers:
                    choice.second_token_gap_s = now_s - choice.last_token_s
                    metrics.second_token_s.observe(choice.second_token_gap_s)
            else:
                choice.first_token_s = now_s
                if choice.request.sampling.max_tokens:
                    metrics.time_to_first_token_s.observe(now_s - start_s)
            choice.last_token_s = now_s
            metrics.num_generation_tokens += len(delta.token_ids)
            if delta.finished:
                _count_finished(choice, metrics, start_s)
                if timeline is not None:
                    timeline.on_last_token()  # that the client sees
                    timeline.advance(DETOKENISED, now_s)
                yield delta
                return
            yield delta
    raise EngineError("the engine's stream ended without a finish reason; this is a bug in Kvist")


def _count_finished(choice: ChoiceState, metrics: GatewayMetrics, start_s: float) -> None:
    assert choice.first_token_s is not None
    assert choice.last_token_s is not None
    assert choice.finish_reason is not None
    metrics.num_finished[choice.finish_reason] += 1
    metrics.num_prompt_tokens += choice.request.num_prompt_tokens
    metrics.num_cached_prompt_tokens += choice.num_cached_tokens
    metrics.num_cached_by_tier.update(choice.cached_by_tier)
    metrics.e2e_latency_s.observe(choice.last_token_s - start_s)
    if len(choice.token_ids) > 1:
        after_first_s = choice.last_token_s - choice.first_token_s
        metrics.time_per_output_token_s.observe(after_first_s / (len(choice.token_ids) - 1))

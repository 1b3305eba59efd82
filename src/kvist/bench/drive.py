"""Sends a scenario's requests when they are due, and checks that this process is fast enough to measure them.

closed    at most `parallel` in flight, in order (single, offline)
open      each at its own time, without waiting for answers (rate, mixed)
turns     conversations: at most `parallel` in flight, the next client drawn (multiturn)
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from kvist.bench.completions import BenchRequest, CompletionClient, RequestResult, Row
from kvist.bench.config import (
    DRAWN,
    MIXED_REQUESTS,
    SERVER,
    Load,
    MixedConfig,
    MultiturnConfig,
    RateConfig,
    Scenario,
    SingleConfig,
)
from kvist.bench.goodput import LONG
from kvist.bench.infinite_cache import InfiniteCache
from kvist.bench.load import DrawKind, Source, TokenHistory, Turns
from kvist.bench.progress import ProgressLine
from kvist.clock import Clock, cpu_s
from kvist.http_client import HttpFailure

PROBE_INTERVAL_S = 0.01  # between samples of the event loop's lag

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """Resources that the measurement took from this process."""

    cpu_s: float
    lags_s: list[float]  # samples of the event loop's delay
    num_connections: int
    num_retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    scenario: Scenario
    answer_source: str | None  # multiturn only: config.SERVER or config.DRAWN
    rows: list[Row]
    gaps_s: list[list[float]]  # ITLs of each row
    wall_s: float  # first request sent to last answer ended
    client: ClientLoad
    interrupted: bool = False  # by Ctrl-C; the rows are the requests that had ended


@dataclass(slots=True, kw_only=True)
class _Results:
    """Mutable; owned by `_measure`, filled while a scenario runs."""

    answers: list[RequestResult] = field(default_factory=list)
    num_done: int = 0  # sent requests; `answers` also has the requests that a failure left unsent
    lags_s: list[float] = field(default_factory=list)

    def add(self, answer: RequestResult) -> None:
        self.answers.append(answer)
        self.num_done += 1


class Driver:
    """Runs a scenario against one server."""

    def __init__(self, client: CompletionClient, source: Source, clock: Clock, *, warmup: int) -> None:
        self._client = client
        self._source = source
        self._clock = clock
        self._warmup = warmup

    async def run(self, scenario: Scenario) -> Measured:
        """Run the scenario. Cancelling ends the measurement: the answers so far are returned.

        Raises `HttpFailure` if every warm-up request fails; later failures are rows.
        """
        load = scenario.load
        answer_source = None
        if isinstance(load, MultiturnConfig):
            answer_source = await self._find_answer_source(load)
        await self._warm_up(scenario)
        if isinstance(load, MultiturnConfig):
            turns = self._turns(load, from_server=answer_source == SERVER)
            return await self._measure(scenario, load.clients * load.rounds, turns, answer_source)
        if isinstance(load, RateConfig | MixedConfig):
            times_s = self._arrivals_s(load)
            requests = self._requests(load, len(times_s), DrawKind.PROMPT)
            return await self._measure(scenario, len(requests), self._open(requests, times_s))
        requests = self._requests(load, load.requests, DrawKind.PROMPT)
        parallel = 1 if isinstance(load, SingleConfig) else load.parallel or load.requests
        return await self._measure(scenario, len(requests), self._closed(requests, parallel))

    # ------------------------------------------------------------ before

    async def _warm_up(self, scenario: Scenario) -> None:
        if not self._warmup:
            return
        load = scenario.load
        requests = self._requests(load, self._warmup, DrawKind.WARM_UP)
        parallel = 1 if isinstance(load, SingleConfig) else self._warmup
        results = _Results()
        await self._closed(requests, parallel)(results)
        failed = [answer.row for answer in results.answers if answer.row.failure]
        if len(failed) == len(results.answers):
            raise HttpFailure(failed[0].failure or "", f"every warm-up request failed, the first: {failed[0].message}")
        if failed:
            logger.warning("%d of %d warm-up requests failed: %s", len(failed), len(results.answers), failed[0].message)

    async def _find_answer_source(self, load: MultiturnConfig) -> str:
        """Return SERVER if a short request shows that the server gives the token ids of its answers; else DRAWN."""
        if load.answers == DRAWN:
            return DRAWN
        request = self._request(0, 16, 2, DrawKind.PROBE, wants_ids=True)
        answer = await self._client.send(request, start_s=self._clock.now_s())
        if len(answer.token_ids) == request.row.num_output:
            return SERVER
        why = answer.row.message or "it ignored return_token_ids"
        if load.answers == SERVER:
            raise HttpFailure("no_token_ids", f"--answers server: the server gives no token ids: {why}")
        logger.warning("conversations append drawn token ids, whose K/V the server cannot have cached: %s", why)
        return DRAWN

    def _arrivals_s(self, load: RateConfig | MixedConfig) -> list[float]:
        if isinstance(load, MixedConfig) and load.seconds is not None:
            return self._source.arrivals_before_s(load.rate, load.seconds)
        return self._source.arrivals_s(load.rate, load.requests or MIXED_REQUESTS)

    def _lengths(self, load: Load, count: int) -> tuple[list[int], list[int]]:
        """Return the lengths of prompts and of answers."""
        num_input = self._source.lengths(load.input_range, count, DrawKind.INPUT_LENGTHS)
        return num_input, self._source.lengths(load.output_range, count, DrawKind.OUTPUT_LENGTHS)

    def _requests(self, load: Load, count: int, what: DrawKind) -> list[BenchRequest]:
        lengths = [*zip(*self._lengths(load, count), strict=True)]
        if not isinstance(load, MixedConfig):
            return [self._request(index, *num_tokens, what) for index, num_tokens in enumerate(lengths)]
        long_input = self._source.lengths(load.long_input_range, count, DrawKind.LONG_INPUT_LENGTHS)
        long_output = self._source.lengths(load.long_output_range, count, DrawKind.LONG_OUTPUT_LENGTHS)
        requests = []
        for index in range(count):
            name = load.class_of(index)
            num_tokens = (long_input[index], long_output[index]) if name == LONG else lengths[index]
            request = self._request(index, *num_tokens, what)
            requests.append(dataclasses.replace(request, row=replace(request.row, request_class=name)))
        return requests

    def _request(
        self, index: int, num_input: int, num_output: int, what: DrawKind, *, wants_ids: bool = False
    ) -> BenchRequest:
        conversation = TokenHistory()
        conversation.append(self._source.token_ids(num_input, what, index))
        row = Row(index=index, num_input=num_input, num_output=num_output)
        return BenchRequest(prompt=conversation.as_json(), row=row, wants_ids=wants_ids)

    # ------------------------------------------------------------ while

    def _closed(self, requests: Sequence[BenchRequest], parallel: int) -> Callable[[_Results], Awaitable[None]]:
        async def drive(results: _Results) -> None:
            start_s = self._clock.now_s()
            left = iter(requests)

            async def one_after_another() -> None:
                for request in left:
                    results.add(await self._client.send(request, start_s=start_s))

            await asyncio.gather(*(one_after_another() for _ in range(min(parallel, len(requests)))))

        return drive

    def _open(
        self, requests: Sequence[BenchRequest], times_s: Sequence[float]
    ) -> Callable[[_Results], Awaitable[None]]:
        async def drive(results: _Results) -> None:
            start_s = self._clock.now_s()

            async def at(request: BenchRequest, planned_s: float) -> None:
                results.add(await self._client.send(request, start_s=start_s, planned_s=planned_s))

            tasks = []
            for request, time_s in zip(requests, times_s, strict=True):
                if (wait_s := start_s + time_s - self._clock.now_s()) > 0:
                    await asyncio.sleep(wait_s)
                tasks.append(asyncio.create_task(at(request, start_s + time_s)))
            await asyncio.gather(*tasks)

        return drive

    def _turns(self, load: MultiturnConfig, *, from_server: bool) -> Callable[[_Results], Awaitable[None]]:
        count = load.clients * load.rounds
        num_input, num_output = self._lengths(load, count)
        conversations = [TokenHistory() for _ in range(load.clients)]
        infinite_cache = InfiniteCache(load.clients, load.page_size)
        turns = Turns(
            clients=load.clients,
            rounds=load.rounds,
            parallel=load.parallel,
            generator=self._source.generator(DrawKind.TURNS),
        )

        def make(client: int, turn: int) -> BenchRequest:
            index = client * load.rounds + turn
            token_ids = self._source.token_ids(num_input[index], DrawKind.PROMPT, client, turn)
            conversations[client].append(token_ids)
            infinite_cache.append(client, token_ids)
            num_tokens = conversations[client].num_tokens
            row = Row(index=index, client=client, turn=turn, num_input=num_tokens, num_output=num_output[index])
            return BenchRequest(prompt=conversations[client].as_json(), row=row, wants_ids=from_server)

        async def drive(results: _Results) -> None:
            start_s = self._clock.now_s()
            tasks: set[asyncio.Task[RequestResult]] = set()
            while True:
                while (turn := turns.start()) is not None:
                    request = make(*turn)
                    row = replace(request.row, num_ceiling_tokens=infinite_cache.record_prompt(turn[0]))
                    request = dataclasses.replace(request, row=row)
                    tasks.add(asyncio.create_task(self._client.send(request, start_s=start_s)))
                if not tasks:
                    return
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.result().row.index):
                    answer = _checked(task.result(), from_server=from_server)
                    results.add(answer)
                    results.answers += self._next_turn(answer, turns, conversations, make, infinite_cache)

        return drive

    def _next_turn(
        self,
        answer: RequestResult,
        turns: Turns,
        conversations: list[TokenHistory],
        make: Callable[[int, int], BenchRequest],
        infinite_cache: InfiniteCache,
    ) -> list[RequestResult]:
        """Append the answer to its conversation. After a failure, return the unsent turns as failures."""
        row = answer.row
        assert row.client is not None
        assert row.turn is not None
        left = turns.end(row.client, ok=row.failure is None)
        if row.failure is not None:
            why = f"turn {row.turn} of this conversation failed ({row.failure})"
            unsent = [make(row.client, turn).row for turn in left]
            return [RequestResult(row=replace(each, failure="not_sent", message=why)) for each in unsent]
        drawn = answer.token_ids or self._source.token_ids(row.num_output, DrawKind.ANSWER, row.client, row.turn)
        conversations[row.client].append(drawn)
        infinite_cache.append(row.client, drawn)
        if answer.token_ids:  # drawn ids are in no cache before they are sent
            infinite_cache.record_answer(row.client)
        return []

    async def _measure(
        self,
        scenario: Scenario,
        count: int,
        drive: Callable[[_Results], Awaitable[None]],
        answer_source: str | None = None,
    ) -> Measured:
        client = self._client.client
        connections, retries = client.num_connections, client.num_retries
        results, interrupted = _Results(), False
        progress = ProgressLine(scenario.name, count, start_s=self._clock.now_s())
        prober = asyncio.create_task(self._probe(results, progress))
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would look like a pause of the server
        start_s, start_cpu_s = self._clock.now_s(), cpu_s()
        try:
            await drive(results)
        except asyncio.CancelledError:
            interrupted = True
        finally:
            spent_cpu_s, wall_s = cpu_s() - start_cpu_s, self._clock.now_s() - start_s
            gc.enable()
            gc.unfreeze()
            prober.cancel()
            progress.close()
        answers = sorted(results.answers, key=lambda answer: answer.row.index)
        return Measured(
            scenario=scenario,
            answer_source=answer_source,
            rows=[_with_gaps(answer) for answer in answers],
            gaps_s=[answer.gaps_s for answer in answers],
            wall_s=wall_s,
            interrupted=interrupted,
            client=ClientLoad(
                cpu_s=spent_cpu_s,
                lags_s=results.lags_s,
                num_connections=client.num_connections - connections,
                num_retries=client.num_retries - retries,
            ),
        )

    async def _probe(self, results: _Results, progress: ProgressLine) -> None:
        while True:
            before_s = self._clock.now_s()
            await asyncio.sleep(PROBE_INTERVAL_S)
            now_s = self._clock.now_s()
            results.lags_s.append(max(0.0, now_s - before_s - PROBE_INTERVAL_S))
            progress.show(results.num_done, now_s)


def _with_gaps(answer: RequestResult) -> Row:
    if answer.row.failure is not None or not answer.gaps_s:
        return answer.row
    return replace(answer.row, itl_p99_s=float(np.quantile(answer.gaps_s, 0.99)), max_gap_s=max(answer.gaps_s))


def _checked(answer: RequestResult, *, from_server: bool) -> RequestResult:
    """Turn the answer into a failure if the server returned fewer token ids than tokens, unlike in the probe."""
    row = answer.row
    if not from_server or row.failure is not None or len(answer.token_ids) == row.num_output:
        return answer
    message = f"the server gave {len(answer.token_ids)} token ids for {row.num_output} tokens"
    failed = replace(row, ttft_s=None, tpot_s=None, e2e_s=None, num_events=0, failure="no_token_ids", message=message)
    return RequestResult(row=failed)

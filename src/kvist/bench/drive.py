"""Sends a scenario's requests when they are due, and watches whether this process was quick enough to measure.

closed    at most `parallel` in flight, in order (single, offline)
open      each at its own time, whatever came back so far (rate)
turns     conversations: at most `parallel` in flight, the next client drawn (multiturn)
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from kvist.bench.ceiling import Ceiling
from kvist.bench.completions import Answer, Ask, Asker, Row
from kvist.bench.config import DRAWN, SERVER, Load, MultiturnConfig, RateConfig, Scenario, SingleConfig
from kvist.bench.http import HttpFailure
from kvist.bench.load import Conversation, Drawn, Source, Turns
from kvist.bench.progress import Progress
from kvist.clock import Clock, cpu_s

PROBE_INTERVAL_S = 0.01  # how often the event loop is asked how late it is

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """What measuring cost this process."""

    cpu_s: float
    lags_s: list[float]  # how late the event loop woke up, sampled
    num_connections: int
    num_retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    scenario: Scenario
    answers_by: str | None  # of multiturn: config.SERVER or config.DRAWN
    rows: list[Row]
    gaps_s: list[float]
    wall_s: float  # first request sent to last answer ended
    client: ClientLoad
    interrupted: bool = False  # by Ctrl-C: these are the requests that had ended


@dataclass(slots=True, kw_only=True)
class _Watch:
    """Owned by `_watched`; counts while a scenario runs."""

    answers: list[Answer] = field(default_factory=list)
    num_done: int = 0  # requests that were sent; those that a failure left unsent are answers, too
    lags_s: list[float] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.num_done += 1


class Driver:
    """Runs a scenario against one server."""

    def __init__(self, asker: Asker, source: Source, clock: Clock, *, warmup: int) -> None:
        self._asker = asker
        self._source = source
        self._clock = clock
        self._warmup = warmup

    async def run(self, scenario: Scenario) -> Measured:
        """Raises `HttpFailure` if not even a warm-up request succeeds; later failures are rows. Cancelling it ends the
        measurement: what has been answered is returned."""
        load = scenario.load
        answers_by = None
        if isinstance(load, MultiturnConfig):
            answers_by = await self._who_answers(load)
        await self._warm_up(scenario)
        if isinstance(load, MultiturnConfig):
            turns = self._turns(load, from_server=answers_by == SERVER)
            return await self._watched(scenario, load.clients * load.rounds, turns, answers_by)
        asks = self._asks(load, load.requests, Drawn.PROMPT)
        if isinstance(load, RateConfig):
            return await self._watched(scenario, len(asks), self._open(asks, load.rate))
        parallel = 1 if isinstance(load, SingleConfig) else load.parallel or load.requests
        return await self._watched(scenario, len(asks), self._closed(asks, parallel))

    # ------------------------------------------------------------ before

    async def _warm_up(self, scenario: Scenario) -> None:
        if not self._warmup:
            return
        load = scenario.load
        asks = self._asks(load, self._warmup, Drawn.WARM_UP)
        parallel = 1 if isinstance(load, SingleConfig) else self._warmup
        watch = _Watch()
        await self._closed(asks, parallel)(watch)
        failed = [answer.row for answer in watch.answers if answer.row.failure]
        if len(failed) == len(watch.answers):
            raise HttpFailure(failed[0].failure or "", f"every warm-up request failed, the first: {failed[0].message}")
        if failed:
            log.warning("%d of %d warm-up requests failed: %s", len(failed), len(watch.answers), failed[0].message)

    async def _who_answers(self, load: MultiturnConfig) -> str:
        """Whether the server gives the ids of its answers, asked with a short request."""
        if load.answers == DRAWN:
            return DRAWN
        ask = self._ask(0, 16, 2, Drawn.PROBE, wants_ids=True)
        answer = await self._asker.ask(ask, start_s=self._clock.now_s())
        if len(answer.token_ids) == ask.row.num_output:
            return SERVER
        why = answer.row.message or "it ignored return_token_ids"
        if load.answers == SERVER:
            raise HttpFailure("no_token_ids", f"--answers server: the server gives no token ids: {why}")
        log.warning("conversations append drawn ids for answers, whose K/V cannot be cached: %s", why)
        return DRAWN

    def _lengths(self, load: Load, count: int) -> tuple[list[int], list[int]]:
        """Of prompts and answers."""
        num_input = self._source.lengths(load.input_span, count, Drawn.INPUT_LENGTHS)
        return num_input, self._source.lengths(load.output_span, count, Drawn.OUTPUT_LENGTHS)

    def _asks(self, load: Load, count: int, what: Drawn) -> list[Ask]:
        lengths = zip(*self._lengths(load, count), strict=True)
        return [self._ask(index, *num_tokens, what) for index, num_tokens in enumerate(lengths)]

    def _ask(self, index: int, num_input: int, num_output: int, what: Drawn, *, wants_ids: bool = False) -> Ask:
        conversation = Conversation()
        conversation.append(self._source.token_ids(num_input, what, index))
        row = Row(index=index, num_input=num_input, num_output=num_output)
        return Ask(prompt=conversation.as_json(), row=row, wants_ids=wants_ids)

    # ------------------------------------------------------------ while

    def _closed(self, asks: Sequence[Ask], parallel: int) -> Callable[[_Watch], Awaitable[None]]:
        async def drive(watch: _Watch) -> None:
            start_s = self._clock.now_s()
            left = iter(asks)

            async def one_after_another() -> None:
                for ask in left:
                    watch.add(await self._asker.ask(ask, start_s=start_s))

            await asyncio.gather(*(one_after_another() for _ in range(min(parallel, len(asks)))))

        return drive

    def _open(self, asks: Sequence[Ask], rate: float) -> Callable[[_Watch], Awaitable[None]]:
        times_s = self._source.arrivals_s(rate, len(asks))

        async def drive(watch: _Watch) -> None:
            start_s = self._clock.now_s()

            async def at(ask: Ask, planned_s: float) -> None:
                watch.add(await self._asker.ask(ask, start_s=start_s, planned_s=planned_s))

            tasks = []
            for ask, time_s in zip(asks, times_s, strict=True):
                if (wait_s := start_s + time_s - self._clock.now_s()) > 0:
                    await asyncio.sleep(wait_s)
                tasks.append(asyncio.create_task(at(ask, start_s + time_s)))
            await asyncio.gather(*tasks)

        return drive

    def _turns(self, load: MultiturnConfig, *, from_server: bool) -> Callable[[_Watch], Awaitable[None]]:
        count = load.clients * load.rounds
        num_input, num_output = self._lengths(load, count)
        conversations = [Conversation() for _ in range(load.clients)]
        ceiling = Ceiling(load.clients, load.page_size)
        turns = Turns(
            clients=load.clients,
            rounds=load.rounds,
            parallel=load.parallel,
            generator=self._source.generator(Drawn.TURNS),
        )

        def make(client: int, turn: int) -> Ask:
            index = client * load.rounds + turn
            token_ids = self._source.token_ids(num_input[index], Drawn.PROMPT, client, turn)
            conversations[client].append(token_ids)
            ceiling.append(client, token_ids)
            num_tokens = conversations[client].num_tokens
            row = Row(index=index, client=client, turn=turn, num_input=num_tokens, num_output=num_output[index])
            return Ask(prompt=conversations[client].as_json(), row=row, wants_ids=from_server)

        async def drive(watch: _Watch) -> None:
            start_s = self._clock.now_s()
            tasks: set[asyncio.Task[Answer]] = set()
            while True:
                while (turn := turns.start()) is not None:
                    ask = make(*turn)
                    row = replace(ask.row, num_ceiling_tokens=ceiling.sent(turn[0]))
                    ask = dataclasses.replace(ask, row=row)
                    tasks.add(asyncio.create_task(self._asker.ask(ask, start_s=start_s)))
                if not tasks:
                    return
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.result().row.index):
                    answer = _checked(task.result(), from_server=from_server)
                    watch.add(answer)
                    watch.answers += self._next_turn(answer, turns, conversations, make, ceiling)

        return drive

    def _next_turn(
        self,
        answer: Answer,
        turns: Turns,
        conversations: list[Conversation],
        make: Callable[[int, int], Ask],
        ceiling: Ceiling,
    ) -> list[Answer]:
        """Append the answer; if there is none, the turns that cannot be sent, as failures."""
        row = answer.row
        assert row.client is not None
        assert row.turn is not None
        left = turns.end(row.client, ok=row.failure is None)
        if row.failure is not None:
            why = f"turn {row.turn} of this conversation failed ({row.failure})"
            unsent = [make(row.client, turn).row for turn in left]
            return [Answer(row=replace(each, failure="not_sent", message=why)) for each in unsent]
        drawn = answer.token_ids or self._source.token_ids(row.num_output, Drawn.ANSWER, row.client, row.turn)
        conversations[row.client].append(drawn)
        ceiling.append(row.client, drawn)
        if answer.token_ids:  # no cache has drawn ones before they are sent
            ceiling.answered(row.client)
        return []

    async def _watched(
        self,
        scenario: Scenario,
        count: int,
        drive: Callable[[_Watch], Awaitable[None]],
        answers_by: str | None = None,
    ) -> Measured:
        client = self._asker.client
        connections, retries = client.num_connections, client.num_retries
        watch, interrupted = _Watch(), False
        progress = Progress(scenario.name, count, start_s=self._clock.now_s())
        prober = asyncio.create_task(self._probe(watch, progress))
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would be taken for a pause of the server
        start_s, start_cpu_s = self._clock.now_s(), cpu_s()
        try:
            await drive(watch)
        except asyncio.CancelledError:
            interrupted = True
        finally:
            spent_cpu_s, wall_s = cpu_s() - start_cpu_s, self._clock.now_s() - start_s
            gc.enable()
            gc.unfreeze()
            prober.cancel()
            progress.close()
        answers = sorted(watch.answers, key=lambda answer: answer.row.index)
        return Measured(
            scenario=scenario,
            answers_by=answers_by,
            rows=[answer.row for answer in answers],
            gaps_s=[gap_s for answer in answers for gap_s in answer.gaps_s],
            wall_s=wall_s,
            interrupted=interrupted,
            client=ClientLoad(
                cpu_s=spent_cpu_s,
                lags_s=watch.lags_s,
                num_connections=client.num_connections - connections,
                num_retries=client.num_retries - retries,
            ),
        )

    async def _probe(self, watch: _Watch, progress: Progress) -> None:
        while True:
            before_s = self._clock.now_s()
            await asyncio.sleep(PROBE_INTERVAL_S)
            now_s = self._clock.now_s()
            watch.lags_s.append(max(0.0, now_s - before_s - PROBE_INTERVAL_S))
            progress.show(watch.num_done, now_s)


def _checked(answer: Answer, *, from_server: bool) -> Answer:
    """A server that gave ids to the probe must give all of them each time."""
    row = answer.row
    if not from_server or row.failure is not None or len(answer.token_ids) == row.num_output:
        return answer
    message = f"the server gave {len(answer.token_ids)} token ids for {row.num_output} tokens"
    failed = replace(row, ttft_s=None, tpot_s=None, e2e_s=None, num_events=0, failure="no_token_ids", message=message)
    return Answer(row=failed)

"""Thousands of mutated messages end neither an engine nor a gateway, and all pages and requests are released.

To test with more messages, run it as a script: python tests/field/test_mutated_messages.py --messages 400000 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import logging
import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from kvist import wire
from kvist.channel import EngineChannel, Member
from kvist.engine.gateways import Gateways
from kvist.engine.inbox import Inbox
from kvist.engine.loop import EngineLoop, LoopParts
from kvist.engine.page_events import PageEventLog
from kvist.engine.reports import LoadReports
from kvist.engine.roles import RoleSwitch
from kvist.errors import ConfigError, KvistError, WireError
from kvist.kv.cache import PageCache
from kvist.lease_messages import LeaseAnswer, LeaseCommand
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens, StepFailed, StepFinished
from kvist.plan.plan import Plan
from kvist.plan.transfers import PagesVerified, PeerDied, StopWrites, VerifyPages, WritePages, WritesCompleted
from kvist.request import (
    EpochId,
    FinishReason,
    HandoffId,
    LeaseTerms,
    Mode,
    Outcome,
    RequestId,
    Role,
    SampledToken,
    WorkerId,
)
from kvist.router.config import RouterConfig
from kvist.router.dispatch import Dispatcher
from kvist.router.registry import Registry
from kvist.runner.columns import PersistentBatch
from kvist.runner.inputs import sampling_rows
from kvist.runner.sampler import noise_key_words
from kvist.runner.slots import SlotTable
from kvist.scheduler import Scheduler, SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.loop_bench import FakeTransport
from kvist.testing.router_bench import MemoryEngines
from kvist.testing.specs import make_load, make_peer_spec, make_request, make_spec
from tests.runner.tables import small_table

VOCAB, NUM_PAGES, PAGE_SIZE = 50, 24, 4
LATER_S = 1e4  # after every time-out
EPOCHS = {Role.UNIFIED: EpochId("P"), Role.PREFILL: EpochId("P"), Role.DECODE: EpochId("D")}
POOL = wire.PoolAddress(transport="shm", location="/pool", num_pages=NUM_PAGES, page_bytes=64, layout="l")
WEIRD: tuple[Any, ...] = (
    *(0, 1, -1, 49, 50, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0, 0.5),
    *("", "\0", "h0", "r0", "D", "P", "x" * 5000, b"", b"\xff" * 40, None, True, False),
    *([], {}, [[]], [0] * 300, [-1], {"type": "Hello"}, ["stop"]),
)  # fmt: skip


def spec_of(role: Role, name: str = "w") -> wire.EngineSpec:
    return make_spec(
        worker_id=WorkerId(name),
        epoch=EPOCHS[role],
        role=role,
        vocab_size=VOCAB,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        max_running_requests=8,
        max_queued_requests=8,
    )


def scheduler_of(role: Role) -> Scheduler:
    config = SchedulerConfig(
        max_running_requests=8, max_queued_requests=8, chunked_prefill_size=8, max_prefill_tokens=16, max_model_len=64
    )
    cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace="n")
    return build_scheduler(role, config, cache, EPOCHS[role], make_peer_spec(POOL))


# ---------------------------------------------------------------- valid and mutated messages


class Messages:
    """Valid messages with few distinct ids, so that they interact, and mutations of them."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def _name(self, kind: str, count: int = 12) -> str:
        return f"{kind}{self.dice.randrange(count)}"

    def to_engine(self) -> Any:
        dice, handoff, request = self.dice, HandoffId(self._name("h")), RequestId(self._name("r"))
        target, source = EpochId(dice.choice(("D", "D", "E"))), EpochId(dice.choice(("P", "P", "Q")))
        kind = dice.randrange(17)
        if kind < 8:
            return self._submit(request, handoff, target, source)
        if kind == 16:
            names = (RequestId(self._name("r")) for _ in range(dice.randrange(3)))
            return wire.SubmitTogether(submits=tuple(self._submit(name, handoff, target, source) for name in names))
        page_ids = tuple(dice.sample(range(NUM_PAGES), dice.randint(0, 6)))
        done = wire.Done(
            handoff_id=handoff, target_epoch=target, source_epoch=source, num_pages=len(page_ids), checksum="s",
            first_token=SampledToken(token_id=dice.randrange(VOCAB)),
            finish_reason=dice.choice((None, FinishReason.STOP)), transport="shm",
        )  # fmt: skip
        grant = wire.Grant(
            handoff_id=handoff,
            request_id=request,
            target_epoch=target,
            source_epoch=source,
            target=make_peer_spec(POOL),
            first_page=0,
            page_ids=page_ids,
        )
        return (
            dice.choice((wire.Hello(gateway_id="g"), wire.ListPages(first_piece=dice.randrange(-1, 3)))),
            wire.Abort(request_id=request),
            dice.choice(
                (
                    wire.FlushCache(call_id="c"),
                    wire.StorageCommand(call_id="c", action="attach"),
                    LeaseCommand(
                        call_id="c", action="renew", owner="", lease_id=self._name("l", 2), ttl_s=dice.random()
                    ),
                    LeaseCommand(
                        call_id="c", action=dice.choice(("end", "list")), owner="", lease_id=self._name("l", 2)
                    ),
                )
            ),
            grant,
            wire.Ack(handoff_id=handoff, target_epoch=target),
            wire.Revoke(handoff_id=handoff, target_epoch=target, reason="x"),
            done,
            wire.Closed(handoff_id=handoff, target_epoch=target, source_epoch=source, error_code="overloaded"),
        )[kind - 8]

    def _submit(self, request_id: RequestId, handoff: HandoffId, target: EpochId, source: EpochId) -> wire.Submit:
        dice = self.dice
        request = make_request(
            request_id,
            tuple(dice.randrange(3) for _ in range(dice.randint(1, 20))),
            max_tokens=dice.randint(1, 8) if (answers := dice.random() < 0.9) else 0,
            temperature=dice.random(),
            seed=dice.randrange(2**63),
            num_logprobs=dice.choice((None, 0, 3)),
            stop_token_ids=(7,),
            min_tokens=dice.randrange(3),
            top_k=dice.randrange(3),
            repetition_penalty=1.0 + dice.random(),
            frequency_penalty=dice.random(),
            logit_bias=((3, dice.random()),),
            allowed_token_ids=(3, 4, 7),
            bad_words=((3,), (4, 5), (1,) * 9),
            cache_salt=dice.choice(("", "s")),
            background=dice.random() < 0.2,
            num_shared_tokens=dice.choice((0, 0, 5, 100)),
            lease=None if answers else LeaseTerms(lease_id=self._name("l", 2), ttl_s=dice.random()),
        )
        peer = wire.PrefillPeer(worker_id=WorkerId("p"), endpoint="tcp://p", epoch=source)
        return wire.Submit(
            request=request,
            mode=dice.choice(tuple(Mode)),
            handoff_id=handoff,
            prefill=peer,
            target_epoch=target,
            num_uncomputed_tokens=dice.choice((None, 0, 1)),
        )

    def to_gateway(self, request_id: RequestId) -> Any:
        dice = self.dice
        chunk = wire.TokenChunk(request_id=request_id, position=dice.randrange(3), token_ids=(dice.randrange(VOCAB),))
        ended = wire.Ended(request_id=request_id, outcome=dice.choice(tuple(Outcome)), error_code="overloaded")
        report = make_load(
            num_running=1,
            num_waiting=1,
            num_free_pages=1,
            num_cached_pages=1,
            num_owned_pages=1,
            totals={"steps": 1.0},
        )
        digests = dice.randbytes(wire.DIGEST_BYTES * dice.randrange(4))
        events = wire.PageEvents(
            sequence=dice.randrange(9),
            changes=(wire.TierChanges(tier="host", stored=digests, removed=digests[: wire.DIGEST_BYTES]),),
            listed=(wire.ListedPages(tier="device", digests=digests, first_piece=dice.randrange(2)),),
            sums=(wire.TierSum(tier="host", num_pages=1, xor=bytes(wire.DIGEST_BYTES)),),
        )
        outputs = wire.StepOutputs(chunks=(chunk,), ended=(ended,) if dice.random() < 0.2 else ())
        flushed, leases = wire.Flushed(call_id="c", num_pages=1), LeaseAnswer(call_id="c", error_code="lease_not_found")
        return dice.choice(
            (outputs, outputs, outputs, report, events, wire.Welcome(spec=spec_of(Role.UNIFIED)), flushed, leases)
        )

    def mutated(self, message: Any) -> bytes:
        payload = wire.encode(message)
        kind = self.dice.random()
        if kind < 0.4:
            return payload
        return self._values(payload) if kind < 0.85 else self._bytes(payload)

    def _values(self, payload: bytes) -> bytes:
        tree = msgspec.msgpack.decode(payload)
        for _ in range(self.dice.choice((1, 1, 1, 2, 4))):
            place = self.dice.choice(list(_places(tree)))
            holder, key = place
            if isinstance(holder, dict) and self.dice.random() < 0.1:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(self.dice.choice(WEIRD))
            if not tree:
                break
        return msgspec.msgpack.encode(tree)

    def _bytes(self, payload: bytes) -> bytes:
        dice, content = self.dice, bytearray(payload)
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(len(content) + 1)
            match dice.randrange(5):
                case 0 if at < len(content):
                    content[at] ^= 1 << dice.randrange(8)
                case 1:
                    content[at:at] = dice.randbytes(dice.randint(1, 9))
                case 2:
                    del content[at : at + dice.randint(1, 9)]
                case 3:
                    del content[at:]
                case _:
                    content[at:at] = content[dice.randrange(len(content) + 1) :][:400]
        return bytes(content)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


# ---------------------------------------------------------------- an engine without sockets


class OfflineEngine:
    """Decoder, inbox and scheduler of one role, with a fake runner, transport and clock."""

    def __init__(self, role: Role, seed: int) -> None:
        self.dice = random.Random(seed)
        self.gateways = Gateways(timeout_s=1e9, role=role)
        self.inbox = Inbox(spec=spec_of(role), gateways=self.gateways, roles=RoleSwitch(role), on_storage_command=None)
        self.scheduler = scheduler_of(role)
        self.table = small_table(8, vocab_size=VOCAB)
        union: object = wire.ToEngine | wire.SourceToTarget
        self.decoder, self.now_s, self.num_decoded = wire.Decoder(union), 1.0, 0
        self.plan = Plan()
        self.reports: list[Event] = []
        self.num_written: dict[HandoffId, int] = {}
        self.answers: list[Any] = []  # of a well-behaved peer; mutated before they are sent

    def take(self, payload: bytes) -> None:
        received = []
        try:
            received.append((b"gateway", self.decoder.decode(payload)))
            self.num_decoded += 1
        except WireError:
            pass
        if received and isinstance(submit := received[0][1], wire.Submit) and submit.mode is Mode.PREFILL:
            self.answers.append(grant_for(submit))
        events, replies = self.inbox.translate(received, self.now_s)  # type: ignore[arg-type]
        for reply in replies:
            wire.encode(reply.message)
        self.step(events)

    def step(self, events: list[Event]) -> None:
        self.now_s += self.dice.choice((0.001, 0.01, 0.2))
        self.plan = self.scheduler.step(self.now_s, [*self.reports, *events])
        self.reports = []
        self._carry_out(self.plan)

    def _carry_out(self, plan: Plan) -> None:
        for ended in plan.ended:
            self.gateways.end_request(ended.request_id)
        wire.encode(wire.StepOutputs(chunks=plan.chunks, ended=plan.ended))
        for order in plan.messages:
            wire.encode(order.message)
            if isinstance(order.message, wire.Grant):
                assert all(0 <= page_id < NUM_PAGES for page_id in order.message.page_ids)
                self.answers.append(done_for(order.message))
            elif isinstance(order.message, wire.Done):
                self.answers.append(wire.Ack(handoff_id=order.message.handoff_id, target_epoch=EpochId("D")))
        for job in plan.transfers:
            self._transfer(job)
        if plan.batch is not None:
            self.reports.append(self._computed(plan.batch))

    def _transfer(self, job: WritePages | VerifyPages | StopWrites) -> None:
        written = self.num_written
        if isinstance(job, VerifyPages):
            self.reports.append(PagesVerified(handoff_id=job.handoff_id, checksum=self.dice.choice("sx")))
            return
        if isinstance(job, WritePages):
            assert len(job.page_ids) == len(job.peer_page_ids)
            assert all(0 <= page_id < NUM_PAGES for page_id in job.page_ids)
            assert all(0 <= page_id < job.pool.num_pages for page_id in job.peer_page_ids)
            written[job.handoff_id] = written.get(job.handoff_id, 0) + len(job.page_ids)
        count = written.get(job.handoff_id, 0)
        self.reports.append(WritesCompleted(handoff_id=job.handoff_id, num_pages=count, checksum="s"))

    def _computed(self, batch: Batch) -> Event:
        check_computable(batch, self.table)
        if self.dice.random() < 0.02:
            return StepFailed(step_id=batch.step_id, message="the device is on fire")
        num_tokens = sum(item.samples for item in batch.items)
        token_ids = [self.dice.randrange(VOCAB) for _ in range(num_tokens)]
        return StepFinished(step_id=batch.step_id, sampled=SampledTokens(token_ids=token_ids))

    def settle(self) -> None:
        """Abort every request and let every peer die; then check that no page is in use."""
        self.step([wire.Abort(request_id=request_id) for request_id, _ in self.gateways.all_requests()])
        for _ in range(4):
            self.now_s += LATER_S
            self.step([PeerDied(epoch=epoch) for epoch in sorted(self.plan.watched_epochs)])
        # Quarantined pages are free again. Prefill keeps pages until decode has answered Done.
        pages = self.scheduler.status().pages
        assert (pages.owned, pages.in_flight) == (0, 0), pages
        assert pages.free + pages.cached == pages.total
        assert not self.scheduler.has_work()


def grant_for(submit: wire.Submit) -> wire.Grant:
    num_tokens = len(submit.request.prompt_token_ids) + len(submit.request.output_token_ids)
    return wire.Grant(
        handoff_id=submit.handoff_id or HandoffId(""),
        request_id=submit.request.request_id,
        target_epoch=EpochId("D"),
        source_epoch=EpochId("P"),
        target=make_peer_spec(POOL),
        first_page=0,
        page_ids=tuple(range(-(-num_tokens // PAGE_SIZE))),
    )


def done_for(grant: wire.Grant) -> wire.Done:
    return wire.Done(
        handoff_id=grant.handoff_id,
        target_epoch=grant.target_epoch,
        source_epoch=grant.source_epoch,
        num_pages=len(grant.page_ids),
        checksum="s",
        first_token=SampledToken(token_id=1),
        transport="shm",
    )


def check_computable(batch: Batch, table: SlotTable) -> None:
    """Check the batch as a runner would: one bad value would fail the whole batch."""
    table.update(batch)
    PersistentBatch.of([item.slot for item in batch.items], [item.samples for item in batch.items], table)
    rows = sampling_rows(batch.items, table)
    table.answers.accept_known(batch.items)
    table.shaping.before_choice(batch.items, table.answers.followed(batch.items))
    noise_key_words([row.params.seed for row in rows], [row.position for row in rows])
    assert all((row.params.num_logprobs or 0) >= 0 for row in rows)
    for item in batch.items:
        assert all(0 <= token_id < VOCAB for token_id in item.token_ids)
        assert all(0 <= page_id < NUM_PAGES for page_id in item.page_ids)
        assert len(item.page_ids) * PAGE_SIZE >= item.end


def fuzz_engine(role: Role, seed: int, num_messages: int) -> OfflineEngine:
    messages, engine = Messages(seed), OfflineEngine(role, seed)
    for number in range(num_messages):
        answers, engine.answers = engine.answers, []
        for message in [*answers[:4], messages.to_engine()]:
            engine.take(messages.mutated(message))
        if number % 500 == 499:
            engine.settle()
    engine.settle()
    return engine


# ---------------------------------------------------------------- a gateway without sockets


async def fuzz_gateway(seed: int, num_messages: int) -> int:
    """Send mutated messages to a gateway; return the number of decodable ones."""
    messages, registry = Messages(seed), Registry(RouterConfig())
    engines = MemoryEngines(registry)
    submitted: list[RequestId] = []
    engines.on_submit = lambda _worker, submit: submitted.append(submit.request.request_id)
    dispatcher = Dispatcher(config=RouterConfig(), registry=registry, engines=engines, clock=FakeClock())
    worker = registry.add("w", None, 0.0)
    registry.on_welcome(worker, wire.Welcome(spec=spec_of(Role.UNIFIED)), 0.0)
    decoder, num_decoded = wire.Decoder(wire.EngineToGateway), 0

    async def read(name: str) -> list[int]:
        request = make_request(name, (1,), max_tokens=3)
        return [token for part in [p async for p in dispatcher.generate(request)] for token in part.chunk.token_ids]

    def rejoin(number: int) -> None:
        """Do what fleet.py does after a restart of the engine."""
        registry.on_lost(worker, "it was restarted")
        dispatcher.on_lost(worker, "it was restarted")
        spec = msgspec.structs.replace(spec_of(Role.UNIFIED), epoch=EpochId(f"epoch{number}"))
        registry.on_welcome(worker, wire.Welcome(spec=spec), 0.0)

    reader: asyncio.Task[list[int]] | None = None
    for number in range(num_messages):
        if reader is None or reader.done():
            if reader is not None and (error := reader.exception()) is not None:
                assert isinstance(error, KvistError), error
            for request_id in submitted:  # a real engine sends Ended for each request
                over = wire.Ended(request_id=request_id, outcome=Outcome.ABORTED)
                dispatcher.on_outputs(worker, wire.StepOutputs(ended=(over,)))
            del submitted[:-1]
            reader = asyncio.create_task(read(f"r{number}"))
            for _ in range(4):
                await asyncio.sleep(0)
        payload = messages.mutated(messages.to_gateway(submitted[-1]))
        try:
            message: Any = decoder.decode(payload)
        except WireError:
            continue
        num_decoded += 1
        if isinstance(message, wire.StepOutputs):
            dispatcher.on_outputs(worker, message)
        elif isinstance(message, wire.LoadReport):
            registry.on_report(worker, message, 0.0)
        elif isinstance(message, wire.PageEvents):
            if worker.pages is not None:
                registry.on_page_events(worker, message, float(number))
        elif isinstance(message, wire.Welcome):
            with contextlib.suppress(ConfigError):  # the worker is refused
                registry.on_welcome(worker, message, 0.0)
            rejoin(number)
        else:
            dispatcher.on_answer(worker, message)
        await asyncio.sleep(0)
    rejoin(num_messages)
    last = asyncio.create_task(read("last"))
    for _ in range(4):
        await asyncio.sleep(0)
    chunk = wire.TokenChunk(
        request_id=submitted[-1], position=0, token_ids=(1, 2, 3), finish_reason=FinishReason.LENGTH
    )
    dispatcher.on_outputs(worker, wire.StepOutputs(chunks=(chunk,)))
    assert await last == [1, 2, 3]
    if reader is not None:
        reader.cancel()
    return num_decoded


# ---------------------------------------------------------------- a real loop behind real sockets


class FakeRunner:
    def __init__(self) -> None:
        self.table = small_table(8, vocab_size=VOCAB)

    def launch(self, batch: Batch) -> FakeStep:
        check_computable(batch, self.table)
        return FakeStep(batch)


class FakeStep:
    def __init__(self, batch: Batch) -> None:
        self._num_tokens = sum(item.samples for item in batch.items)

    def is_done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> SampledTokens:
        return SampledTokens(token_ids=[5] * self._num_tokens)


class AnsweringTransport(FakeTransport):
    """Reports every verification and every stop at once."""

    def verify(self, job: VerifyPages) -> None:
        self.reports.append(PagesVerified(handoff_id=job.handoff_id, checksum="s"))

    def stop(self, handoff_id: HandoffId) -> None:
        self.reports.append(WritesCompleted(handoff_id=handoff_id, num_pages=0, checksum=""))


def fuzz_loop(role: Role, seed: int, num_messages: int) -> float:
    """Send mutated messages to an engine loop through a member's socket, then a valid one, which must be answered.

    Return the number of undecodable messages that the engine reports."""
    member, messages, context = Member("the key of this cluster"), Messages(seed), zmq.Context()
    channel, clock = EngineChannel("tcp://127.0.0.1:0", member=Member("the key of this cluster")), FakeClock(1.0)
    scheduler = scheduler_of(role)
    parts = LoopParts(
        spec=spec_of(role),
        scheduler=scheduler,
        runner=FakeRunner(),
        channel=channel,
        transport=AnsweringTransport(),
        reports=LoadReports(),
        page_events=PageEventLog(list_pages=lambda piece: wire.ListedPages(tier="device", first_piece=piece)),
        clock=clock,
        gateway_timeout_s=1e9,
        watch_step=lambda _step: None,
        roles=RoleSwitch(role),
    )
    loop, decoder = EngineLoop(parts), wire.Decoder(wire.EngineToGateway)
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.setsockopt(zmq.IDENTITY, member.new_address())
        dealer.linger = 0
        dealer.sndhwm = dealer.rcvhwm = 0
        member.secure_client(dealer)
        dealer.connect(channel.endpoint)
        for number in range(num_messages):
            dealer.send(messages.mutated(messages.to_engine()))
            if number % 50 == 49:
                loop.iterate(0.0)
                clock.advance(0.01)
        dealer.send(wire.encode(wire.Hello(gateway_id="last")))
        deadline_s, report = time.monotonic() + 60.0, None
        welcomes = 0
        while report is None or not welcomes:
            assert time.monotonic() < deadline_s
            loop.iterate(0.0)
            clock.advance(0.02)
            while dealer.poll(0):
                message = decoder.decode(dealer.recv())
                welcomes += isinstance(message, wire.Welcome) and channel.num_undecodable > 0
                report = message if isinstance(message, wire.LoadReport) else report
        assert isinstance(report, wire.LoadReport)
        return report.totals["undecodable_messages"]
    finally:
        channel.close()
        context.destroy(linger=0)


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize(("role", "seed"), [(Role.UNIFIED, 1), (Role.PREFILL, 2), (Role.DECODE, 3)])
def test_an_engine_survives_mutated_messages_and_releases_everything_they_held(role: Role, seed: int) -> None:
    engine = fuzz_engine(role, seed, 1200)
    assert 400 < engine.num_decoded < 1600, "mutations must be wrong in many ways"
    totals = engine.scheduler.status().totals
    assert totals["requests_finished"] > 0
    if role is not Role.UNIFIED:
        assert totals["handoffs_sent" if role is Role.PREFILL else "handoffs_received"] > 0


async def test_a_gateway_survives_mutated_messages_and_serves_on() -> None:
    assert await fuzz_gateway(4, 1000) > 300


@pytest.mark.parametrize(("role", "seed"), [(Role.PREFILL, 5), (Role.DECODE, 6)])
def test_an_engine_loop_survives_mutated_messages_and_answers_the_next_valid_one(role: Role, seed: int) -> None:
    assert fuzz_loop(role, seed, 500) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    share = args.messages // 8
    for role in (Role.UNIFIED, Role.PREFILL, Role.DECODE):
        print(role, "offline:", fuzz_engine(role, args.seed, share).num_decoded, "of", share, "decoded", flush=True)
        print(role, "live:", fuzz_loop(role, args.seed, share), "of", share, "not decoded", flush=True)
    num_decoded = asyncio.run(fuzz_gateway(args.seed, 2 * share))
    print("gateway:", num_decoded, "of", 2 * share, "decoded", flush=True)


if __name__ == "__main__":
    main()

"""Batches encoded by rank 0 and decoded by another rank are equal, however requests join, grow and leave."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import torch

from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.request import EngineRequest, EpochId, RequestId, Role, SamplingParams, SlotId
from kvist.runner.batch_message import BatchDecoder, BatchEncoder
from kvist.runner.inputs import sampling_rows
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer_spec, submit_full
from kvist.wire import Abort, PoolAddress
from tests.runner.tables import small_table

SAMPLING = SamplingParams(max_tokens=9, temperature=0.5, seed=2**63 - 1, stop_token_ids=(7,), num_logprobs=2)


def item(slot: int, pages: list[int], *, start: int = 0, token_ids: tuple[int, ...] = (5,)) -> BatchItem:
    return BatchItem(slot=SlotId(slot), start=start, page_ids=pages, token_ids=token_ids, samples=True)


class Pair:
    """Both ends, and the last decoded batch."""

    def __init__(self) -> None:
        self.encoder, self.decoder = BatchEncoder(), BatchDecoder()
        self.num_bytes = 0

    def send(self, batch: Batch) -> Batch:
        message = self.encoder.encode(batch)
        self.num_bytes = len(message)
        return self.decoder.decode(message)

    def carry(self, *items: BatchItem) -> Batch:
        return self.send(Batch(step_id=1, items=items))


def same(found: BatchItem, sent: BatchItem) -> bool:
    if list(found.scored_token_ids) != list(sent.scored_token_ids):
        return False
    return all(getattr(found, name) == getattr(sent, name) for name in ("slot", "start", "samples", "score_from")) and (
        list(found.token_ids) == list(sent.token_ids) and list(found.page_ids) == list(sent.page_ids)
    )


def same_start(found: StartRequest, sent: StartRequest) -> bool:
    """The tokens are sent only to slots whose state is made of them."""
    token_ids = list(sent.token_ids) if sent.sampling.needs_history else []
    return found == msgspec.structs.replace(sent, token_ids=token_ids)


def test_every_rank_decodes_the_batches_and_has_the_slots_of_a_busy_scheduler() -> None:
    dice = random.Random(3)
    config = SchedulerConfig(
        max_running_requests=12, chunked_prefill_size=16, max_prefill_tokens=24, max_model_len=256, overlap=True
    )
    cache = PageCache(num_pages=70, page_size=4, namespace="t")  # too few for all requests, so some are preempted
    pool = PoolAddress(transport="none", location="", num_pages=70, page_bytes=1, layout="t")
    scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("e"), make_peer_spec(pool))
    pair, events, launched, seen = Pair(), list[Event](), list[Batch](), Counter[str]()
    tables = (small_table(12), small_table(12))
    for step in range(400):
        if step % 3 == 0 and step < 240:
            sampling = SamplingParams(
                max_tokens=dice.randrange(1, 40),
                min_tokens=3,
                stop_token_ids=(8,),
                seed=step,
                presence_penalty=dice.choice([0.0, 1.0]),
            )
            prompt = tuple(dice.randrange(100) for _ in range(dice.randrange(1, 60)))
            request = EngineRequest(request_id=RequestId(f"r{step}"), prompt_token_ids=prompt, sampling=sampling)
            events.append(submit_full(request))
            if dice.random() < 0.2:
                events.append(Abort(request_id=RequestId(f"r{dice.randrange(step + 1)}")))
        batch = scheduler.step(step * 0.001, events).batch
        events = []
        if batch is not None:
            found = pair.send(batch)
            assert (found.step_id, found.ended) == (batch.step_id, batch.ended)
            assert all(same_start(*both) for both in zip(found.started, batch.started, strict=True))
            assert all(same(*both) for both in zip(found.items, batch.items, strict=True))
            for table, each in zip(tables, (batch, found), strict=True):
                table.update(each)
            assert tables[0].open_slots == tables[1].open_slots
            assert torch.equal(*(table.shaping.tables.counts for table in tables))
            assert sampling_rows(batch.items, tables[0]) == sampling_rows(found.items, tables[1])
            seen["started"] += len(batch.started)
            seen["started in a slot that was ended"] += len({s.slot for s in batch.started} & {*batch.ended})
            seen["took a token unknown"] += sum(sent.takes_sampled for sent in batch.items)
            seen["chunks"] += sum(not sent.samples for sent in batch.items)
            launched.append(batch)
        if len(launched) > int(batch is not None):
            done = launched.pop(0)
            sampled = SampledTokens(token_ids=[dice.randrange(100) for each in done.items if each.samples])
            events = [StepFinished(step_id=done.step_id, sampled=sampled)]
    assert not scheduler.has_work()
    assert scheduler.status().totals["preemptions"]
    assert min(seen[what] for what in ("took a token unknown", "chunks")) > 100
    assert min(seen[what] for what in ("started", "started in a slot that was ended")) > 10, seen


def test_a_grown_page_list_keeps_its_identity_and_sends_only_the_new_pages() -> None:
    pair, pages = Pair(), list(range(1000, 2000))
    (first,) = pair.carry(item(0, pages)).items
    assert pair.num_bytes > 2000
    pages += [7, 8]
    (second,) = pair.carry(item(0, pages, start=1)).items
    assert second.page_ids is first.page_ids, "attention recognises a list by its identity"
    assert list(second.page_ids) == pages
    assert pair.num_bytes < 30


def test_a_replaced_page_list_is_a_new_list_at_the_receiver() -> None:
    pair = Pair()
    (first,) = pair.carry(item(0, [1, 2, 3])).items
    (second,) = pair.carry(item(0, [1, 2, 3, 4])).items
    assert second.page_ids is not first.page_ids
    assert (list(first.page_ids), list(second.page_ids)) == ([1, 2, 3], [1, 2, 3, 4])


def test_a_request_that_skipped_a_batch_sends_only_its_new_pages() -> None:
    pair, pages = Pair(), [1, 2]
    first, _ = pair.carry(item(0, pages), item(1, [3])).items
    pair.carry(item(1, [4]))
    pages.append(9)
    (again,) = pair.carry(item(0, pages, start=1)).items
    assert same(again, item(0, pages, start=1))
    assert again.page_ids is first.page_ids


def test_a_slot_that_is_started_again_gets_a_new_page_list() -> None:
    pair = Pair()
    (first,) = pair.carry(item(0, [1, 2])).items
    start = StartRequest(
        slot=SlotId(0), request_id=RequestId("b"), sampling=SAMPLING, token_ids=[1, 2, 3], num_prompt_tokens=2
    )
    pages = [3]
    found = pair.send(Batch(step_id=2, ended=(SlotId(0),), started=(start,), items=(item(0, pages),)))
    assert found.started == (msgspec.structs.replace(start, token_ids=[]),)
    assert (list(first.page_ids), list(found.items[0].page_ids)) == ([1, 2], [3])


def test_a_message_of_256_decodes_takes_a_few_bytes_per_request() -> None:
    pair, pages = Pair(), [list(range(index, index + 40)) for index in range(256)]
    for start in (600, 601):
        pair.carry(*(item(index, pages[index], start=start, token_ids=()) for index in range(256)))
    assert pair.num_bytes < 8 * 256

"""Batches encoded by rank 0 and decoded by another rank are equal, however requests join, grow and leave."""

from __future__ import annotations

import random
from collections import Counter

from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.request import EngineRequest, EpochId, Mode, RequestId, Role, SamplingParams
from kvist.runner.batch_message import BatchDecoder, BatchEncoder
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.wire import PoolAddress, Submit

SAMPLING = SamplingParams(max_tokens=9, temperature=0.5, seed=2**63 - 1, stop_token_ids=(7,), num_logprobs=2)


def item(name: str, pages: list[int], *, start: int = 0, **changes: object) -> BatchItem:
    settings = {"token_ids": (5,), "sampling": SAMPLING} | changes
    return BatchItem(request_id=RequestId(name), start=start, page_ids=pages, **settings)  # type: ignore[arg-type]


class Pair:
    """Both ends, and the last decoded batch."""

    def __init__(self) -> None:
        self.encoder, self.decoder = BatchEncoder(), BatchDecoder()
        self.num_bytes = 0

    def carry(self, *items: BatchItem, step_id: int = 1) -> Batch:
        message = self.encoder.encode(Batch(step_id=step_id, items=items))
        self.num_bytes = len(message)
        return self.decoder.decode(message)


def same(found: BatchItem, sent: BatchItem) -> bool:
    fields = ("start", "sampling", "suppressed_token_ids", "takes_sampled")
    return all(getattr(found, name) == getattr(sent, name) for name in fields) and (
        list(found.token_ids) == list(sent.token_ids) and list(found.page_ids) == list(sent.page_ids)
    )


def test_decoded_batches_of_a_busy_scheduler_equal_the_planned_ones() -> None:
    dice = random.Random(3)
    config = SchedulerConfig(
        max_running_requests=12, chunked_prefill_size=16, max_prefill_tokens=24, max_model_len=256, overlap=True
    )
    cache = PageCache(num_pages=70, page_size=4, namespace="t")  # too few for all requests, so some are preempted
    pool = PoolAddress(transport="none", location="", num_pages=70, page_bytes=1, layout="t")
    scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("e"), pool)
    pair, events, launched, seen = Pair(), list[Event](), list[Batch](), Counter[str]()
    names: dict[str, RequestId] = {}
    for step in range(400):
        if step % 3 == 0 and step < 240:
            sampling = SamplingParams(max_tokens=dice.randrange(1, 40), min_tokens=3, stop_token_ids=(8,), seed=step)
            prompt = tuple(dice.randrange(100) for _ in range(dice.randrange(1, 60)))
            request = EngineRequest(request_id=RequestId(f"r{step}"), prompt_token_ids=prompt, sampling=sampling)
            events.append(Submit(request=request, mode=Mode.FULL))
        batch = scheduler.step(step * 0.001, events).batch
        events = []
        if batch is not None:
            found = pair.carry(*batch.items, step_id=batch.step_id)
            assert found.step_id == batch.step_id
            assert len(found.items) == len(batch.items)
            assert all(same(*both) for both in zip(found.items, batch.items, strict=True))
            now = {sent.request_id: got.request_id for got, sent in zip(found.items, batch.items, strict=True)}
            assert len(set(now.values())) == len(now), "two requests got one id"
            assert all(now[name] == names[name] for name in now.keys() & names.keys()), "a request keeps its id"
            seen["went on"] += len(now.keys() & names.keys())
            seen["took a token unknown"] += sum(sent.takes_sampled for sent in batch.items)
            seen["chunks"] += sum(sent.sampling is None for sent in batch.items)
            names = now
            launched.append(batch)
        if len(launched) > int(batch is not None):
            done = launched.pop(0)
            sampled = SampledTokens(token_ids=[dice.randrange(100) for each in done.items if each.sampling])
            events = [StepFinished(step_id=done.step_id, sampled=sampled)]
    assert not scheduler.has_work()
    assert min(seen[what] for what in ("went on", "took a token unknown", "chunks")) > 100


def test_a_grown_page_list_keeps_its_identity_and_sends_only_the_new_pages() -> None:
    pair, pages = Pair(), list(range(1000, 2000))
    (first,) = pair.carry(item("a", pages)).items
    assert pair.num_bytes > 2000
    pages += [7, 8]
    (second,) = pair.carry(item("a", pages, start=1)).items
    assert second.page_ids is first.page_ids, "attention recognises a list by its identity"
    assert list(second.page_ids) == pages
    assert pair.num_bytes < 30


def test_a_replaced_page_list_is_a_new_list_at_the_receiver() -> None:
    pair = Pair()
    (first,) = pair.carry(item("a", [1, 2, 3])).items
    (second,) = pair.carry(item("a", [1, 2, 3, 4])).items
    assert second.page_ids is not first.page_ids
    assert (list(first.page_ids), list(second.page_ids)) == ([1, 2, 3], [1, 2, 3, 4])
    assert second.request_id == first.request_id


def test_a_request_that_skipped_a_batch_is_sent_again_in_full() -> None:
    pair, pages = Pair(), [1, 2]
    first, other = pair.carry(item("a", pages), item("b", [3])).items
    pair.carry(item("b", [4]))
    (again,) = pair.carry(item("a", pages, start=1)).items
    assert same(again, item("a", pages, start=1))
    assert again.request_id not in (first.request_id, other.request_id)


def test_sampling_parameters_are_sent_with_the_first_sampled_token() -> None:
    pair, pages = Pair(), [1, 2]
    (chunk,) = pair.carry(item("a", pages, token_ids=(1, 2, 3), sampling=None)).items
    assert chunk.sampling is None
    (last,) = pair.carry(item("a", pages, start=3, suppressed_token_ids=(7, 9))).items
    assert (last.sampling, last.suppressed_token_ids) == (SAMPLING, (7, 9))
    (decode,) = pair.carry(item("a", pages, start=4, token_ids=())).items
    assert (decode.sampling, decode.suppressed_token_ids, decode.takes_sampled) == (SAMPLING, (), True)
    (again,) = pair.carry(item("a", pages, start=3, token_ids=(4, 5), sampling=None)).items
    assert again.sampling is None, "computed again, no token sampled"


def test_a_message_of_256_decodes_takes_a_few_bytes_per_request() -> None:
    pair, pages = Pair(), [list(range(index, index + 40)) for index in range(256)]
    for start in (600, 601):
        pair.carry(*(item(str(index), pages[index], start=start, token_ids=()) for index in range(256)))
    assert pair.num_bytes < 8 * 256

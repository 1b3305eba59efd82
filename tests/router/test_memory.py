"""Routing remembers no more after many requests than after some. bench/bench_routing.py counts over a million."""

from __future__ import annotations

import gc
import random
from unittest import mock

from kvist.kv.keys import page_digests
from kvist.page_index import prompt_digests
from kvist.request import EpochId, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry
from kvist.router.route import Router
from kvist.testing.page_events import joined
from kvist.testing.specs import make_request, make_roomy_spec
from kvist.wire import ListedPages, PageEvents, TierChanges, Welcome

NUM_HELD = 500  # pages of the worker
ROUND = 600  # requests


def test_entries_chunks_and_objects_do_not_grow_with_the_number_of_requests() -> None:
    rng = random.Random(1)
    registry = Registry(RouterConfig())
    router = Router(RouterConfig(), registry)
    worker = registry.add("http://w", None, 0.0)
    registry.on_welcome(worker, Welcome(spec=make_roomy_spec(worker_id=WorkerId("w"), epoch=EpochId("e"))), 0.0)
    assert worker.pages is not None
    worker.pages.request(0.0)
    registry.on_page_events(worker, PageEvents(sequence=0, listed=(ListedPages(tier="device", first_piece=0),)), 0.0)
    held: list[bytes] = []
    sequence = 0

    def send_requests() -> tuple[int, int, int, int]:
        nonlocal held, sequence
        for _ in range(ROUND):
            prompt = tuple(rng.randrange(1 << 20) for _ in range(200))
            router.choose(make_request("r", prompt, max_tokens=10))
            new = page_digests(prompt, 16, "n")
            gone, held = held[:-NUM_HELD], [*held[-NUM_HELD:], *new]
            sequence += 1
            changes = TierChanges(tier="device", stored=joined(*new), removed=joined(*gone))
            registry.on_page_events(worker, PageEvents(sequence=sequence, changes=(changes,)), 0.0)
            while registry.index.has_work:
                registry.index.work(1 << 12)
        gc.collect()
        return len(gc.get_objects()), router.num_remembered_chunks, registry.index.num_entries, registry.index.num_bytes

    with mock.patch.object(prompt_digests, "MAX_CHUNKS", 100):
        send_requests()
        some, more = send_requests(), send_requests()
    assert more[0] - some[0] < ROUND // 10, "objects"
    assert more[1] == some[1] == 100
    assert more[2] == some[2] <= NUM_HELD + 2 * 12
    assert more[3] <= some[3] <= 1 << 19

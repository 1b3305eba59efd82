"""Bytes between device and host: whole pages, on the CPU, and the same on a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvist.clock import MonotonicClock
from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool, plan_host_pages
from kvist.memory.page_copier import MAX_JOBS_UNDER_WAY, PageMover, runs
from kvist.plan.tiers import BackUpPages, ForgetPages, LoadPages, PageReport, PagesBackedUp, PagesForgotten, PagesLoaded

LAYOUT = PageLayout(num_kv_heads=2, num_layers=3, page_size=4, head_dim=8, dtype="float32")
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


class Moving:
    def __init__(self, device: torch.device, directory: Path, num_host_pages: int = 16) -> None:
        self.pool = DevicePool.create(LAYOUT, 8, device=device, directory=directory)
        self.host = HostPool(num_host_pages, LAYOUT.page_bytes, pinned=device.type == "cuda")
        self.host.tensor.fill_(255)
        self.woken = threading.Event()
        self.mover = PageMover(self.pool, self.host, wakeup=self.woken.set, clock=MonotonicClock())
        self._unseen: list[PageReport] = []

    def reports(self, number: int = 1) -> list[PageReport]:
        found = self.first_reports(number)
        assert self._unseen == []
        return found

    def first_reports(self, number: int) -> list[PageReport]:
        give_up_s = time.monotonic() + 60
        while len(self._unseen) < number:
            assert time.monotonic() < give_up_s
            self.woken.wait(0.5)
            self.woken.clear()
            self._unseen += self.mover.poll()
        found, self._unseen = self._unseen[:number], self._unseen[number:]
        return found

    def close(self) -> None:
        self.mover.close()
        self.host.close()
        self.pool.close()


@pytest.fixture(params=DEVICES, ids=["cpu", "cuda"])
def moving(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Moving]:
    made = Moving(request.param, tmp_path, num_host_pages=32)
    yield made
    made.close()


def test_pages_come_back_from_the_host_byte_for_byte(moving: Moving) -> None:
    tensor = moving.pool.tensor
    tensor.copy_(torch.randn(tensor.shape))
    written = tensor.clone()
    moving.mover.start(BackUpPages(job_id=1, page_ids=(0, 1, 2, 5), host_slots=(7, 8, 9, 0)))
    assert moving.reports() == [PagesBackedUp(job_id=1, ok=True)]
    tensor.zero_()
    if tensor.is_cuda:
        torch.cuda.synchronize()
    moving.mover.start(LoadPages(job_id=2, host_slots=(0, 9, 8), page_ids=(3, 4, 5)))
    assert moving.reports() == [PagesLoaded(job_id=2, ok=True)]
    assert torch.equal(tensor[3], written[5])
    assert torch.equal(tensor[4], written[2])
    assert torch.equal(tensor[5], written[1])
    assert not tensor[[0, 1, 2, 6, 7]].any()
    assert (moving.host.tensor[[1, 2, 3, 4, 5, 6, 10]] == 255).all()
    totals = moving.mover.totals()
    assert (totals["host_loads"], totals["host_load_bytes"]) == (1, 3 * LAYOUT.page_bytes)
    assert (totals["host_backups"], totals["host_backup_bytes"]) == (1, 4 * LAYOUT.page_bytes)
    assert totals["host_backup_seconds"] > 0


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("offsets", [(0, 1, 2), (0, 1, 1), (0, 0, 0)], ids=["apart", "two share", "all share"])
def test_a_host_page_is_assembled_from_the_ranks_pieces_and_split_again_on_load(
    device: torch.device, offsets: tuple[int, ...]
) -> None:
    @dataclass
    class Ranks:
        tensors: list[torch.Tensor]

        def pieces(self) -> list[tuple[int, torch.Tensor]]:
            return [(64 * offset, tensor) for offset, tensor in zip(offsets, self.tensors, strict=True)]

    heads = torch.randint(0, 255, (3, 8, 64), dtype=torch.uint8)  # of each page; ranks at one offset have the same
    ranks = Ranks([heads[offset].clone().to(device) for offset in offsets])
    num_host_bytes = 64 * (max(offsets) + 1)
    host = HostPool(16, num_host_bytes, pinned=device.type == "cuda")
    host.tensor.fill_(255)
    woken = threading.Event()
    mover = PageMover(ranks, host, wakeup=woken.set, clock=MonotonicClock())  # type: ignore[arg-type]
    mover.start(BackUpPages(job_id=1, page_ids=(1, 2, 3, 6), host_slots=(4, 5, 6, 0)))
    assert woken.wait(60)
    woken.clear()
    for page, slot in ((1, 4), (2, 5), (3, 6), (6, 0)):
        assert torch.equal(host.tensor[slot], heads[: max(offsets) + 1, page].flatten())
    assert (host.tensor[[1, 2, 3, 7]] == 255).all()
    for tensor in ranks.tensors:
        tensor.zero_()
    if device.type == "cuda":
        torch.cuda.synchronize()
    mover.start(LoadPages(job_id=2, host_slots=(5, 6, 0), page_ids=(0, 1, 7)))
    assert woken.wait(60)
    assert [type(report) for report in mover.poll()] == [PagesBackedUp, PagesLoaded]
    for offset, tensor in zip(offsets, ranks.tensors, strict=True):
        assert torch.equal(tensor[[0, 1, 7]].cpu(), heads[offset, [2, 3, 6]])
        assert not tensor[2:7].any()
    assert mover.totals()["host_backup_bytes"] == 4 * num_host_bytes
    mover.close()
    host.close()


def test_a_copy_that_raises_is_reported_and_the_next_one_works(moving: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = moving.mover._loads
    real = copies._copy

    def broken(*_: object) -> None:
        monkeypatch.setattr(copies, "_copy", real)
        raise RuntimeError("a bus error")

    monkeypatch.setattr(copies, "_copy", broken)
    moving.mover.start(LoadPages(job_id=1, host_slots=(0,), page_ids=(0,)))
    moving.mover.start(LoadPages(job_id=2, host_slots=(1,), page_ids=(1,)))
    assert moving.reports(2) == [PagesLoaded(job_id=1, ok=False), PagesLoaded(job_id=2, ok=True)]
    assert moving.mover.totals()["host_loads"] == 1


def test_queued_jobs_are_reported_in_order_once_their_bytes_are_copied(moving: Moving) -> None:
    num_jobs = 3 * MAX_JOBS_UNDER_WAY
    moving.pool.tensor.copy_(torch.randn(moving.pool.tensor.shape))
    written = moving.pool.tensor.cpu().view(8, -1).view(torch.uint8)
    if moving.pool.tensor.is_cuda:
        torch.cuda.synchronize()
    for job_id in range(num_jobs):
        page_ids = (job_id % 8, (job_id + 3) % 8)
        moving.mover.start(BackUpPages(job_id=job_id, page_ids=page_ids, host_slots=(job_id, num_jobs + job_id)))
    moving.mover.start(ForgetPages(job_id=num_jobs, host_slots=(0,)))
    for job_id in range(num_jobs):
        [report] = moving.first_reports(1)
        assert report == PagesBackedUp(job_id=job_id, ok=True)
        assert torch.equal(moving.host.tensor[job_id], written[job_id % 8])
        assert torch.equal(moving.host.tensor[num_jobs + job_id], written[(job_id + 3) % 8])
    assert moving.reports() == [PagesForgotten(job_id=num_jobs)]
    assert moving.mover.totals()["host_backups"] == num_jobs


def test_close_ends_both_threads_and_drops_waiting_jobs(moving: Moving) -> None:
    moving.mover.close()
    moving.mover.start(LoadPages(job_id=1, host_slots=(0,), page_ids=(0,)))
    assert not moving.mover._loads._thread.is_alive()
    assert moving.mover.poll() == []


def test_pages_consecutive_on_both_sides_are_copied_at_once() -> None:
    assert list(runs((3, 4, 5, 9), (0, 1, 2, 3))) == [(3, 0, 3), (9, 3, 1)]
    assert list(runs((3, 4), (1, 0))) == [(3, 1, 1), (4, 0, 1)]
    assert list(runs((6,), (2,))) == [(6, 2, 1)]
    assert list(runs((3, 4, 5), (0, 1, 2), 2)) == [(3, 0, 2), (5, 2, 1)]


def plan(**changes: object) -> int:
    sizes: dict[str, object] = {"num_device_pages": 100, "ratio": 2.0, "size_gb": None, "available_bytes": 10**9}
    return plan_host_pages(1000, **{**sizes, **changes})  # type: ignore[arg-type]


def test_the_host_pool_size_is_a_multiple_of_the_device_pool_or_set_directly() -> None:
    assert plan() == 200
    assert plan(ratio=0.5) == 50
    assert plan(size_gb=0.5) == 500_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"available_bytes": 1000}, "--hicache-ratio 2: the host tier needs .* lower --hicache-ratio"),
        ({"size_gb": 2.0}, r"--hicache-size 2: .* but 0.93 GiB of host memory are free: lower --hicache-size"),
        ({"available_bytes": -5}, "0.00 GiB of host memory are free"),
        ({"ratio": 0.001}, "--hicache-ratio 0.001 is smaller than one page"),
    ],
)
def test_a_host_pool_that_does_not_fit_is_refused_with_flag_and_free_memory(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**changes)


@pytest.mark.gpu
def test_a_gpus_host_pool_is_pinned() -> None:
    pool = HostPool(3, 4096, pinned=True)
    assert pool.tensor.is_pinned()
    pool.close()

"""A step in flight on a GPU, with a fake in place of its event."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvist.runner.cuda_runner import CudaBatch

DEVICE = torch.device("cuda:1")


class FakeEvent:
    def __init__(self) -> None:
        self.is_over = False
        self.order: list[str] = []

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.order.append("synchronize")
        self.is_over = True


@pytest.fixture
def event(monkeypatch: pytest.MonkeyPatch) -> FakeEvent:
    made = FakeEvent()

    @contextlib.contextmanager
    def device(entered: torch.device) -> Iterator[None]:
        made.order.append(f"enter {entered}")
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    return made


def in_flight(event: Any) -> CudaBatch:
    tokens = torch.tensor([5, 6], dtype=torch.int32)
    return CudaBatch(tokens=tokens, logprobs=None, scores=None, constraint_errors={}, done=event, device=DEVICE)


def test_a_wait_in_another_thread_enters_the_gpu_of_the_step_first(event: FakeEvent) -> None:
    step = in_flight(event)
    assert not step.is_done()
    step.wait()
    assert event.order == ["enter cuda:1", "synchronize"]
    assert step.is_done()


def test_a_result_is_read_only_after_the_step_has_ended(event: FakeEvent) -> None:
    assert list(in_flight(event).result().token_ids) == [5, 6]
    assert event.is_over

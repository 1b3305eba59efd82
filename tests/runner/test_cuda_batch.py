"""A step in flight on a GPU, with fakes in place of its event, its answers and the step after it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from kvist.runner.answers import FollowedRows
from kvist.runner.cuda_runner import CudaBatch, StepOutputs

DEVICE = torch.device("cuda:1")


class World:
    """An event, and a record of what was done."""

    def __init__(self) -> None:
        self.is_over = False
        self.order: list[str] = []

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.order.append("synchronize")
        self.is_over = True

    def settle(self) -> None:
        self.order.append("settle")

    def read(self, _rows: FollowedRows, token_ids: Sequence[int]) -> None:
        self.order.append(f"accept {list(token_ids)}")

    def take_forced(self, _rows: FollowedRows) -> dict[int, list[int]]:
        return {1: [7, 8]}

    def launched(self) -> CudaBatch:
        answers: Any = self
        rows: Any = [contextlib.nullcontext()]
        return CudaBatch(rows, answers, self.settle)

    def outputs(self) -> StepOutputs:
        event: Any = self
        tokens = torch.tensor([5, 6], dtype=torch.int32)
        return StepOutputs(tokens=tokens, logprobs=None, scores=None, done=event, device=DEVICE)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    @contextlib.contextmanager
    def device(entered: torch.device) -> Iterator[None]:
        made.order.append(f"enter {entered}")
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    return made


def test_a_wait_in_another_thread_enters_the_gpu_of_the_step_first(world: World) -> None:
    step = world.launched()
    step.finish_launch(world.outputs())
    assert not step.is_done()
    step.wait()
    assert world.order == ["enter cuda:1", "synchronize"]
    assert step.is_done()


def test_a_step_without_its_choice_is_not_done_and_a_wait_for_it_goes_on(world: World) -> None:
    step = world.launched()
    waiter = threading.Thread(target=step.wait)
    waiter.start()
    assert not step.is_done()
    assert waiter.is_alive()
    step.finish_launch(world.outputs())
    waiter.join(60.0)
    assert not waiter.is_alive()


def test_the_next_step_chooses_before_the_forced_tokens_are_looked_for(world: World) -> None:
    step = world.launched()
    step.finish_launch(world.outputs())
    sampled = step.result()
    assert list(sampled.token_ids) == [5, 6]
    assert sampled.following == {1: [7, 8]}
    assert world.order[-2:] == ["accept [5, 6]", "settle"]
    step.read()
    assert world.order.count("accept [5, 6]") == 1


def test_an_error_of_the_choice_is_the_error_of_the_step_and_the_next_one_is_settled(world: World) -> None:
    step = world.launched()
    step.finish_launch(RuntimeError("no memory"))
    assert step.is_done()
    with pytest.raises(RuntimeError, match="no memory"):
        step.wait()
    with pytest.raises(RuntimeError, match="no memory"):
        step.result()
    assert world.order == ["settle"]

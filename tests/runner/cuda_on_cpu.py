"""The runner for GPUs on a CPU: kernels end before their launch returns, but no step is over until somebody waits.

Graphs are replaced by the steps that they would capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.attention.backend import Attend, Span
from kvist.attention.torch_reference import TorchAttention
from kvist.checkpoint import Checkpoint
from kvist.grammar.compiler import GrammarCompiler
from kvist.models import load_model_config
from kvist.runner.cuda_runner import CudaRunner, StepLimits
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from tests.runner.hand_driven import make_plain_runner

CPU = torch.device("cpu")


class Event:
    """A `torch.cuda.Event` that happens when somebody waits for it, or asks for the second time."""

    def __init__(self) -> None:
        self._is_recorded = self._is_over = self._was_asked = False

    def record(self) -> None:
        self._is_recorded = True

    def query(self) -> bool:
        self._is_over, self._was_asked = self._is_over or self._was_asked, True
        return self._is_over

    def synchronize(self) -> None:
        assert self._is_recorded, "a wait for an event before its record returns at once"
        self._is_over = True


class Plan:
    """A `GraphPlan` for replays without padding."""

    def __init__(self, attention: TorchAttention) -> None:
        self._attention = attention
        self._spans: Sequence[Span] = ()

    def fill(self, spans: Sequence[Span]) -> None:
        self._spans = spans

    def attend(self, num_rows: int) -> Attend:
        assert num_rows == len(self._spans)
        return self._attention.prepare(self._spans)


class Graphs:
    """`StepGraphs` that compute the step of a replay."""

    def __init__(self, plan: Plan | None, step: Callable[[int], Any]) -> None:
        self._plan = plan
        self._step = step
        self._results: dict[int, Any] = {}
        self.num_replays = 0

    def size_for(self, num_rows: int) -> int:
        return num_rows

    def result(self, size: int) -> Any:
        return self._results[size]

    def replay(self, size: int, spans: Sequence[Span]) -> Any:
        if self._plan is not None:
            self._plan.fill(spans)
        self.num_replays += 1
        self._results = {size: self._step(size)}
        return self._results[size]


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
        yield


def make_cuda_runner(
    checkpoint: Checkpoint, folder: Path, *, num_slots: int, grammars: GrammarCompiler | None = None
) -> CudaRunner:
    """Return a runner with the weights of `make_plain_runner`. Use it inside of `without_a_gpu`."""
    plain = make_plain_runner(checkpoint, folder)
    config = load_model_config(checkpoint)
    attention = TorchAttention(CPU)
    attention.bind(plain.pool.tensor)
    sizes = table_sizes(num_slots, vocab_size=config.vocab_size, context_len=config.max_position_embeddings)
    runner = CudaRunner(
        model=plain.model,
        pool=plain.pool,
        attention=attention,
        limits=StepLimits(max_requests=num_slots, max_tokens=256, max_pages=128),
        table=SlotTable(sizes, CPU, grammars),
        use_graphs=False,
    )
    plan = Plan(attention)
    decodes: Any = Graphs(plan, partial(runner._decode, plan))
    runner._decodes, runner._choices = decodes, Graphs(None, partial(runner._choose_decoded, decodes))  # type: ignore[assignment]
    return runner

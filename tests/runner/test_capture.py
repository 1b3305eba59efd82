"""The capture of CUDA graphs, on a CPU: torch's functions are replaced by ones that do nothing."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kvist.runner.cuda_runner import CudaRunner, StepLimits
from kvist.runner.graph_sizes import decode_sizes, mixed_sizes

LIMITS = StepLimits(max_requests=8, max_tokens=64, max_pages=4)


class Nothing:
    """Stands for a graph, a stream, or a plan: every method does nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_options: None


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDAGraph", "Stream", "current_stream", "synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))


@pytest.mark.parametrize("with_chunks", [True, False])
def test_a_capture_reports_its_share_after_each_graph(with_chunks: bool) -> None:
    attention = SimpleNamespace(
        plan_decode_graph=lambda *_sizes: Nothing(),
        plan_mixed_graph=lambda *_sizes: Nothing() if with_chunks else None,
    )
    steps: list[tuple[str, int]] = []
    runner = SimpleNamespace(
        _attention=attention,
        _begin=lambda _plan, size: steps.append(("chunks", size)),
        _decode=lambda _plan, size: steps.append(("decode", size)),
        _choose_decoded=lambda _decodes, size: steps.append(("choice", size)),
    )
    reported: list[tuple[int, int]] = []

    def on_captured(num_done: int, num_all: int) -> None:
        assert len(steps) == 2 * num_done, "each step runs once before its capture"
        reported.append((num_done, num_all))

    CudaRunner._capture(cast(Any, runner), LIMITS, on_captured)
    num_graphs = 2 * len(decode_sizes(8)) + (len(mixed_sizes(64)) if with_chunks else 0)
    assert reported == [(num_done, num_graphs) for num_done in range(num_graphs + 1)]

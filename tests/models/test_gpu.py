"""Whole models on a GPU, with its kernels and attention backends, against fp32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvist.attention import build_attention, choose_attention
from kvist.attention.backend import Span
from kvist.models.decoder import CausalLM
from tests.models.tiny_models import load_tiny, logits_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PAGE_SIZE = 16
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
}
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1100,
    "vocab_size": 2003,
}


class OnGpu:
    """A model and its pages; requests have pages 8 * i, 8 * i + 1, ..."""

    def __init__(self, model: CausalLM, head_dim: int, dtype: torch.dtype) -> None:
        self.model = model
        self.pool = torch.full((64, 2, 4, 2, PAGE_SIZE, head_dim), float("nan"), dtype=dtype, device=CUDA)
        self.attention = build_attention(choose_attention("auto", CUDA, dtype).name, CUDA)
        self.attention.bind(self.pool)

    @staticmethod
    def spans(ranges: list[tuple[int, int, int]]) -> list[Span]:
        return [Span(start=a, num_tokens=b - a, page_ids=range(8 * i, 8 * i + 8)) for i, a, b in ranges]

    def logits(self, token_ids: list[list[int]], ranges: list[tuple[int, int, int]]) -> Tensor:
        """Return the logits of every token of one batch; each range is (request, start, end)."""
        ids = torch.cat([torch.tensor(token_ids[i][a:b]) for i, a, b in ranges]).to(CUDA)
        positions = torch.cat([torch.arange(a, b) for _, a, b in ranges]).to(CUDA)
        attend = self.attention.prepare(self.spans(ranges))
        with torch.inference_mode():
            return self.model.logits(self.model.forward(ids, positions, attend)).cpu()


def error(got: Tensor, want: Tensor) -> float:
    assert got.dtype is torch.float32
    assert got.isfinite().all()
    return float((got - want).norm() / want.norm())


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FAMILIES[request.param] | SIZES


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 2003, (100,), generator=generator).tolist() for _ in range(3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_gpu_logits_are_close_to_the_fp32_reference(
    family: dict[str, Any],
    prompts: list[list[int]],
    write_model: Callable[..., Any],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    checkpoint, _ = write_model(**family)
    wanted = [logits_of(load_tiny(checkpoint), prompt) for prompt in prompts]
    gpu = OnGpu(load_tiny(checkpoint, dtype=dtype, device=CUDA), family.get("head_dim", 64), dtype)
    batches = [
        [(0, 0, 70)],
        [(0, 70, 71)],  # one row
        [(0, 71, 72), (1, 0, 90)],  # a decode beside a prompt
        [(0, 72, 73), (1, 90, 91), (2, 0, 33)],
        [(0, 73, 74), (1, 91, 92), (2, 33, 99)],  # a chunk after a prefix
        [(0, 74, 75), (1, 92, 93), (2, 99, 100)],  # a few rows
    ]
    for ranges in batches:
        want = torch.cat([wanted[i][a:b] for i, a, b in ranges])
        assert error(gpu.logits(prompts, ranges), want) < tolerance


def test_a_captured_step_gives_the_logits_of_an_eager_step(
    family: dict[str, Any],
    prompts: list[list[int]],
    write_model: Callable[..., Any],
) -> None:
    checkpoint, _ = write_model(**family)
    model = load_tiny(checkpoint, dtype=torch.bfloat16, device=CUDA)
    gpu = OnGpu(model, family.get("head_dim", 64), torch.bfloat16)
    plan = gpu.attention.plan_decode_graph(4, 8)
    if plan is None:
        pytest.skip(f"{gpu.attention.name} cannot be captured")
    gpu.logits(prompts, [(0, 0, 60), (1, 0, 3), (2, 0, 17)])
    ids, positions = (torch.zeros(4, dtype=torch.int64, device=CUDA) for _ in range(2))

    def step() -> Tensor:
        return model.logits(model.forward(ids, positions, plan.attend(4)))

    with torch.inference_mode():
        plan.fill([])
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    lengths = [60, 3, 17]
    for _ in range(20):  # crosses page boundaries
        ranges = [(i, length, length + 1) for i, length in enumerate(lengths)]
        ids[:3] = torch.tensor([prompts[i][a] for i, a, _ in ranges])
        positions[:3] = torch.tensor(lengths)
        plan.fill(gpu.spans(ranges))
        graph.replay()
        captured = out[:3].cpu()
        assert error(captured, gpu.logits(prompts, ranges)) < 1e-2
        lengths = [length + 1 for length in lengths]

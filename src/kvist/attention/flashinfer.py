"""FlashInfer over the page-first pool, for NVIDIA GPUs other than Hopper, in bf16 or fp16. Package: flashinfer-python,
which compiles its kernels at first use and so needs nvcc.

One call attends for decodes and chunks together. A layer's K and V are strided views [num_pages, num_kv_heads,
page_size, head_dim] (its "HND" order). Steps are not captured into graphs: the library plans each step on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvist.attention.backend import Attend, GraphPlan, Span
from kvist.attention.page_tables import upload
from kvist.attention.slots import written_slots
from kvist.errors import ConfigError
from kvist.kernels.rotary import Rotary, rotate_and_write

REMEDY = "pip install flashinfer-python (it compiles its kernels: nvcc must be on the PATH)"
_WORKSPACE_BYTES = 128 << 20  # what the library's documentation recommends


class FlashInferAttention:
    name = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"--attention-backend flashinfer needs an NVIDIA GPU, and this is {device}: use auto",
                param="attention_backend",
            )
        try:
            import flashinfer
        except ImportError as error:
            raise ConfigError(
                f"--attention-backend flashinfer: {error}. Install it with {REMEDY}, or use auto",
                param="attention_backend",
            ) from error
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        self._device = device

    def bind(self, pool: Tensor) -> None:
        if pool.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"--attention-backend flashinfer takes bfloat16 and float16, not {pool.dtype}: use --dtype bfloat16",
                param="attention_backend",
            )
        self._pool = pool

    def prepare(self, spans: Sequence[Span]) -> Attend:
        return _Step(self._wrapper, self._pool, spans, self._device)

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan | None:  # noqa: ARG002
        return None

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> GraphPlan | None:  # noqa: ARG002
        return None


class _Step:
    """One step's `RotatingAttend`."""

    def __init__(self, wrapper: object, pool: Tensor, spans: Sequence[Span], device: torch.device) -> None:
        self._wrapper = wrapper
        self._pool = pool
        size = pool.shape[4]
        counts = [-(-span.end // size) for span in spans]
        self._query_starts = torch.tensor([0, *accumulate(s.num_tokens for s in spans)], dtype=torch.int32)
        self._page_starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        self._last_page_lengths = torch.tensor([(span.end - 1) % size + 1 for span in spans], dtype=torch.int32)
        pages = [np.asarray(span.page_ids[:n], dtype=np.int32) for span, n in zip(spans, counts, strict=True)]
        self._pages = upload(np.concatenate(pages), device)
        self._slots = upload(np.asarray(written_slots(spans, size), dtype=np.int32), device)
        self._planned = False

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = rotate_and_write(torch.cat((q, k, v), dim=1), None, self._pool[:, :, layer], self._slots)
        return self._attend(layer, q)

    def rotated(self, layer: int, heads: Tensor, rotary: Rotary) -> Tensor:
        return self._attend(layer, rotate_and_write(heads, rotary, self._pool[:, :, layer], self._slots))

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        if not self._planned:
            self._plan(q)
        views = (self._pool[:, :, layer, 0], self._pool[:, :, layer, 1])
        out: Tensor = self._wrapper.run(q, views)  # type: ignore[attr-defined]
        return out

    def _plan(self, q: Tensor) -> None:
        """Once a step, when the number of query heads is known."""
        self._wrapper.plan(  # type: ignore[attr-defined]
            self._query_starts,
            self._page_starts,
            self._pages,
            self._last_page_lengths,
            q.shape[1],
            self._pool.shape[1],
            q.shape[2],
            self._pool.shape[4],
            causal=True,
            q_data_type=q.dtype,
            kv_data_type=self._pool.dtype,
        )
        self._planned = True

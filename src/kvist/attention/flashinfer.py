"""FlashInfer over the page-first pool, for NVIDIA GPUs other than Hopper (Ampere or newer), in bf16 or fp16. Package:
flashinfer-python. The library compiles its kernels with nvcc for each head size and dtype. This happens when a pool is
bound, so that a missing tool is reported at the start. Compiling takes a minute the first time; later starts load the
kernels from $FLASHINFER_WORKSPACE_BASE/.cache/flashinfer (the default of that variable is the home directory).

A layer's K and V are strided views [num_pages, num_kv_heads, page_size, head_dim] (the library's "HND" order): nothing
is gathered or copied. One call attends for decodes and chunks together. The library plans each step on the host: how
requests are split over the multiprocessors, and where partial results are stored. A plan has a fixed shape under a CUDA
graph, so each captured batch size has its own plan, over shared buffers.

The library's fa2 kernels are always used: they run on all these GPUs, and the tests run the same kernels on Hopper,
where "auto" chooses FlashAttention-3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.backend import Attend, AttentionKind, AttentionSizes, Captures, GraphPlan, Span, SpanColumns
from kvist.attention.page_tables import PageTables
from kvist.errors import ConfigError
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotate_and_write

logger = logging.getLogger(__name__)

REMEDY = (
    "pip install 'flashinfer-python>=0.6.12', which compiles its kernels: it needs nvcc (CUDA_HOME names the toolkit),"
    " ninja, a C++ compiler, and a home directory or FLASHINFER_WORKSPACE_BASE that it can write to"
)
_HEAD_DIMS = (64, 128, 256)
_GRAPH_PLAN_BYTES = 1 << 20  # 13 bytes per tile of queries and 8 per request: enough for tens of thousands
_EAGER_PLAN_BYTES = 8 << 20  # the library's default


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot run on this device with this dtype; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs an Ampere or newer NVIDIA GPU, and the device is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, and the dtype is {dtype}"
    if find_spec("flashinfer") is None:
        return f"is not installed ({REMEDY})"
    return None


class FlashInferAttention:
    name = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        try:
            import flashinfer
        except (ImportError, OSError, RuntimeError) as error:
            raise _refusal(f"cannot be imported: {error}. Install it with {REMEDY}; or use torch") from error
        self._library: ModuleType = flashinfer
        self._device = device

    def bind(self, pool: Tensor) -> None:
        if pool.shape[5] not in _HEAD_DIMS:
            raise _refusal(f"supports head sizes {_HEAD_DIMS}, not {pool.shape[5]}: use torch")
        self._pool = Pool(self._library, pool)
        self._planner: Planner | None = None
        self._compile(torch.zeros(1, pool.shape[1], pool.shape[5], dtype=pool.dtype, device=pool.device))

    def _compile(self, q: Tensor) -> None:
        """Compile the kernels by attending for one token over the first page."""
        logger.info("FlashInfer: compiling kernels for head size %d; the first time takes about a minute", q.shape[2])
        start_s = time.perf_counter()
        try:
            planner = Planner(self._pool, self._pool.workspace(q.shape[1]))
            planner.plan(self._pool.indices([Span(start=0, num_tokens=1, page_ids=[0])], 1), q.shape[1])
            planner.run(0, q)
            torch.cuda.synchronize(self._device)
        except Exception as error:  # any error would recur at every step
            reason = "; ".join(str(error).splitlines()[-5:])
            raise _refusal(f"cannot run here: {reason}. Install it with {REMEDY}; or use torch") from error
        logger.info("FlashInfer %s: ready after %.1f s", self._library.__version__, time.perf_counter() - start_s)

    def prepare(self, spans: Sequence[Span]) -> Attend:
        indices = self._pool.indices(spans, len(spans))
        return _Step(self._pool, indices.slots, partial(self._attend, indices))

    def _attend(self, indices: Indices, layer: int, q: Tensor) -> Tensor:
        if self._planner is None:
            self._planner = Planner(self._pool, self._pool.workspace(q.shape[1]))
        if self._planner.planned is not indices:  # the first layer: only now the number of query heads is known
            self._planner.plan(indices, q.shape[1])
        return self._planner.run(layer, q)

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan:
        return FlashInferPlan(self._pool, max_batch, max_pages)

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> None:  # noqa: ARG002
        return None  # the library plans a step of chunks for its lengths, so a graph would fit one step only


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"--attention-backend flashinfer {reason}", param="attention_backend")


@dataclass(frozen=True, slots=True)
class Indices:
    """The library's index tensors of a step, int32. Its planner reads pinned host memory."""

    query_starts: Tensor  # [num_rows + 1]: each request's first row in the batch
    page_starts: Tensor  # [num_rows + 1]: each request's first index in `pages`
    last_lengths: Tensor  # [num_rows]: tokens in the last page of each request
    lengths: Tensor  # [num_rows]: keys of each request, new tokens included
    slots: Tensor  # [num_tokens], on the device: the slot of new K and V; negative: not written
    pages: Tensor  # [page_starts[-1]], on the device
    longest: int = field(kw_only=True)  # new tokens of one request, at most


class Pool:
    """The library, and views of the pool for each layer."""

    def __init__(self, library: ModuleType, pool: Tensor) -> None:
        self.library = library
        self.num_kv_heads, self.page_size, self.head_dim = pool.shape[1], pool.shape[4], pool.shape[5]
        self.dtype, self.device = pool.dtype, pool.device
        self.layers = [pool[:, :, layer] for layer in range(pool.shape[2])]
        self.keys_values = [(layer[:, :, 0], layer[:, :, 1]) for layer in self.layers]
        self._tables = PageTables(torch.device("cpu"), self.page_size)  # the library reads the page lists on the host

    def indices(self, spans: Sequence[Span], num_rows: int) -> Indices:
        """Build the indices of a step. Rows beyond the spans are padding: one token each, which writes no page and
        attends to no key."""
        columns, size = SpanColumns.of(spans), self.page_size
        padding = np.zeros(num_rows - len(columns), dtype=np.int32)
        table_rows, num_pages = self._tables.assign_rows(columns), -(-columns.ends // size)
        num_tokens = np.concatenate((columns.counts, padding + 1))
        parts = (
            _starts(num_tokens),
            _starts(np.concatenate((num_pages, padding))),
            np.concatenate(((columns.ends - 1) % size + 1, padding)),
            np.concatenate((columns.ends, padding)),
            np.concatenate((self._tables.slots(columns, table_rows), padding - 1)),
            self._tables.pages(table_rows, num_pages),
        )
        packed = torch.from_numpy(np.concatenate(parts))
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        sizes = [len(part) for part in parts]
        *host, sent = torch.split(packed, [*sizes[:4], sum(sizes[4:])])
        slots_pages = torch.split(sent.to(self.device, non_blocking=True), sizes[4:])
        return Indices(*host, *slots_pages, longest=int(num_tokens.max()))

    def workspace(self, num_q_heads: int, num_decodes: int | None = None) -> Tensor:
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        num_bytes = workspace_bytes(num_q_heads, self.num_kv_heads, self.head_dim, num_sms, num_decodes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)


def _starts(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the start of each part and the end of the last, [len(counts) + 1]."""
    return np.append(np.int32(0), counts.cumsum(dtype=np.int32))


def workspace_bytes(
    num_q_heads: int, num_kv_heads: int, head_dim: int, num_sms: int, num_decodes: int | None = None
) -> int:
    """Return the upper bound of the workspace that the library's planner uses, by its own rule: partial results in fp32
    for every query head of every tile, with at most two tiles per multiprocessor. The workspace of a graph holds all
    tiles that its `num_decodes` requests could need."""
    tile, num_tiles = 128, max(1, 2 * num_sms // num_kv_heads)
    if num_decodes is not None:
        group = num_q_heads // num_kv_heads
        tile = 16 if group <= 16 else 64 if group <= 64 else 128
        num_tiles = max(num_tiles, -(-num_decodes * group // tile) + num_decodes - 1)
    return num_q_heads * num_tiles * tile * (head_dim + 1) * 4 + 256  # 256: alignment


def planners_bytes(sizes: AttentionSizes) -> int:
    """Return the device memory of this backend's workspaces, those of captured decodes included."""
    workspace = partial(workspace_bytes, sizes.num_q_heads, sizes.num_kv_heads, sizes.head_dim, sizes.num_sms)
    graphs = sizes.decode_graph_sizes
    of_graphs = workspace(max(graphs)) + len(graphs) * _GRAPH_PLAN_BYTES if graphs else 0
    return workspace() + _EAGER_PLAN_BYTES + of_graphs


FLASHINFER = AttentionKind(
    build=FlashInferAttention, unfit=unfit, captures=Captures.DECODES, reserve_bytes=planners_bytes
)


class Planner:
    """One wrapper of the library: planned once per step, on the host, and run once per layer."""

    def __init__(self, pool: Pool, workspace: Tensor, **buffers: Tensor) -> None:
        """`buffers`: the buffers of the library's CUDA graph mode, which fixes the number of rows."""
        self._pool = pool
        self.planned: Indices | None = None
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):  # its buffers are also written outside of inference mode
            self._wrapper = pool.library.BatchPrefillWithPagedKVCacheWrapper(
                workspace, "HND", use_cuda_graph=bool(buffers), backend="fa2", **buffers
            )
            if buffers:  # by default each wrapper allocates 8 MiB, twice
                plan = torch.empty(_GRAPH_PLAN_BYTES, dtype=torch.uint8, device=pool.device)
                self._wrapper.reset_workspace_buffer(workspace, plan)

    def plan(self, indices: Indices, num_q_heads: int) -> None:
        # The library writes each plan into the same pinned memory without waiting for the copy of the previous plan.
        # That copy precedes the kernels of its step, so this wait returns at once even if the device is one step
        # behind.
        self._sent.synchronize()
        self._wrapper.plan(
            indices.query_starts,
            indices.page_starts,
            indices.pages,
            indices.last_lengths,
            num_q_heads,
            self._pool.num_kv_heads,
            self._pool.head_dim,
            self._pool.page_size,
            causal=True,
            q_data_type=self._pool.dtype,
            kv_data_type=self._pool.dtype,
            seq_lens=indices.lengths,
            max_token_per_sequence=indices.longest,
        )
        self._sent.record()
        self.planned = indices

    def run(self, layer: int, q: Tensor) -> Tensor:
        out: Tensor = self._wrapper.run(q, self._pool.keys_values[layer], out=torch.empty_like(q))
        return out


class _Step:
    """One step's `Attend`."""

    def __init__(self, pool: Pool, slots: Tensor, attend: Callable[[int, Tensor], Tensor]) -> None:
        self._pool = pool
        self._slots = slots
        self._attend = attend

    def __call__(self, layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        return self._attend(layer, rotate_and_write(heads, rotary, self._pool.layers[layer], self._slots))


class FlashInferPlan:
    """`GraphPlan`: a planner for each batch size, made at its first run; slots, lengths and pages are shared."""

    def __init__(self, pool: Pool, max_batch: int, max_pages: int) -> None:
        self._pool = pool
        self._max_batch = max_batch
        self._slots = torch.full((max_batch,), -1, dtype=torch.int32, device=pool.device)
        self._query_starts, self._page_starts = self._slots.new_zeros(2, max_batch + 1).unbind()
        self._last_lengths = self._slots.new_zeros(max_batch)
        self._pages = self._slots.new_zeros(max_batch * max_pages)
        self._workspace: Tensor | None = None
        self._planners: dict[int, Planner] = {}  # by batch size
        self._num_q_heads = 0

    def fill(self, spans: Sequence[Span]) -> None:
        size = min((size for size in self._planners if size >= len(spans)), default=None)
        if size is not None:
            self._fill(size, spans)
        else:
            assert not spans, "a graph is captured for the largest batch it replays"

    def attend(self, batch_size: int) -> Attend:
        return _Step(self._pool, self._slots[:batch_size], partial(self._attend, batch_size))

    def _attend(self, batch_size: int, layer: int, q: Tensor) -> Tensor:
        if batch_size not in self._planners:
            self._make(batch_size, q.shape[1])
        return self._planners[batch_size].run(layer, q)

    def _make(self, batch_size: int, num_q_heads: int) -> None:
        assert not torch.cuda.is_current_stream_capturing(), "a batch size runs once before it is captured"
        if self._workspace is None:
            self._workspace = self._pool.workspace(num_q_heads, self._max_batch)
        self._num_q_heads = num_q_heads
        self._planners[batch_size] = Planner(
            self._pool,
            self._workspace,
            qo_indptr_buf=self._query_starts[: batch_size + 1],
            paged_kv_indptr_buf=self._page_starts[: batch_size + 1],
            paged_kv_indices_buf=self._pages,
            paged_kv_last_page_len_buf=self._last_lengths[:batch_size],
        )
        self._fill(batch_size, [])

    def _fill(self, batch_size: int, spans: Sequence[Span]) -> None:
        indices = self._pool.indices(spans, batch_size)
        self._slots[:batch_size].copy_(indices.slots)
        self._planners[batch_size].plan(indices, self._num_q_heads)

"""The FlashInfer backend on a CPU, over a stand-in for the library that accepts only documented arguments: checks the
arguments of each batch, in steps and in the buffers of captured sizes. tests/conformance tests the kernels, on a GPU.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvist.attention import build_attention, choose_attention
from kvist.attention.backend import Attend, Span
from kvist.attention.flashinfer import FlashInferAttention, workspace_bytes
from kvist.attention.torch_reference import TorchAttention
from kvist.errors import ConfigError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NUM_LAYERS, PAGE_SIZE, KV_HEADS, Q_HEADS, HEAD_DIM, NUM_SMS = 2, 4, 2, 6, 64, 100


class Event:
    """A CUDA event on a device that finishes no work before a call of `synchronize`."""

    latest: Event

    def __init__(self) -> None:
        self.is_pending = False
        Event.latest = self

    def record(self) -> None:
        self.is_pending = True

    def synchronize(self) -> None:
        self.is_pending = False


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`: attention by definition, from the arguments of `plan`."""

    def __init__(
        self, workspace: Tensor, layout: str, *, backend: str, use_cuda_graph: bool, **buffers: Tensor
    ) -> None:
        assert (layout, backend) == ("HND", "fa2")
        assert use_cuda_graph == bool(buffers)
        self.workspace, self.buffers, self.sent = workspace, buffers, Event.latest
        self.num_rows = len(buffers["paged_kv_last_page_len_buf"]) if buffers else None

    def reset_workspace_buffer(self, workspace: Tensor, plan: Tensor) -> None:
        assert workspace is self.workspace
        assert plan.dtype is torch.uint8

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        *shape: int,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        seq_lens: Tensor,
        max_token_per_sequence: int,
    ) -> None:
        assert not self.sent.is_pending, "the previous plan is still in the library's pinned memory"
        given = {
            "qo_indptr_buf": qo_indptr,
            "paged_kv_indptr_buf": paged_kv_indptr,
            "paged_kv_indices_buf": paged_kv_indices,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len,
        }
        assert all(tensor.dtype is torch.int32 for tensor in (*given.values(), seq_lens))
        assert (*shape[1:], q_data_type, kv_data_type) == (KV_HEADS, HEAD_DIM, PAGE_SIZE, *2 * (torch.bfloat16,))
        assert causal
        assert int(qo_indptr.diff().max()) == max_token_per_sequence
        assert self.num_rows in (None, len(paged_kv_last_page_len)), "the number of rows of a captured batch is fixed"
        for name, tensor in given.items():
            if self.buffers:
                self.buffers[name][: len(tensor)] = tensor
            else:
                setattr(self, name, tensor)
        self.num_q_heads, self.lengths = shape[0], seq_lens

    def run(self, q: Tensor, keys_values: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        read = SimpleNamespace(**(self.buffers or vars(self)))
        rows, page_starts = read.qo_indptr_buf.tolist(), read.paged_kv_indptr_buf.tolist()
        assert q.shape == (rows[-1], self.num_q_heads, HEAD_DIM)
        for i, last in enumerate(read.paged_kv_last_page_len_buf.tolist()):
            page_ids = read.paged_kv_indices_buf[page_starts[i] : page_starts[i + 1]].long()
            length = (len(page_ids) - 1) * PAGE_SIZE + last if len(page_ids) else 0
            assert length == self.lengths[i]
            k, v = (
                part[page_ids].transpose(1, 2).reshape(-1, KV_HEADS, HEAD_DIM)[:length].float() for part in keys_values
            )
            out[rows[i] : rows[i + 1]] = attention(q[rows[i] : rows[i + 1]].float(), k, v)
        return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not len(k):
        return torch.zeros_like(q)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    unseen = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    module: Any = ModuleType("flashinfer")
    module.__version__, module.BatchPrefillWithPagedKVCacheWrapper = "0", Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    properties = SimpleNamespace(multi_processor_count=NUM_SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class World:
    """A pool full of NaN for FlashInfer and a copy of it for the torch backend; both get the same steps."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(3)
        pool = torch.full((60, KV_HEADS, NUM_LAYERS, 2, PAGE_SIZE, HEAD_DIM), torch.nan, dtype=torch.bfloat16)
        self.pools = pool, pool.clone()
        self.tested, self.reference = FlashInferAttention(GPU), TorchAttention(CPU)
        self.tested.bind(self.pools[0])
        self.reference.bind(self.pools[1])
        pages = torch.randperm(60, generator=self.random).tolist()
        self.page_ids = [pages[10 * i : 10 * i + 10] for i in range(6)]

    def spans(self, ranges: Sequence[tuple[int, int, int]]) -> list[Span]:
        return [Span(start=a, num_tokens=b - a, page_ids=self.page_ids[i]) for i, a, b in ranges]

    def check(self, attend: Attend, ranges: Sequence[tuple[int, int, int]], num_rows: int = 0) -> None:
        """Check `attend` for these ranges, with rows padded to `num_rows`, against the reference."""
        wanted = self.reference.prepare(self.spans(ranges))
        count = sum(b - a for _, a, b in ranges)
        for layer in range(NUM_LAYERS):
            shape = (max(count, num_rows), Q_HEADS + 2 * KV_HEADS, HEAD_DIM)
            heads = torch.randn(shape, generator=self.random).bfloat16()
            want = wanted(layer, heads[:count], None)
            got = attend(layer, heads, None)
            torch.testing.assert_close(got[:count], want, rtol=2e-2, atol=2e-2)
            assert not got[count:].any(), "padding rows attend to no key"
        assert torch.equal(*(pool.view(torch.int16) for pool in self.pools)), "padding rows write no page"


PROMPTS = [(0, 0, 11), (1, 0, 33), (2, 0, 8), (3, 0, 1), (4, 0, 20)]


def test_flashinfer_steps_equal_the_torch_backend() -> None:
    world = World()
    for ranges in (PROMPTS, [(0, 11, 12), (1, 33, 34), (2, 8, 9), (5, 0, 7), (4, 20, 31)], [(3, 1, 2)]):
        world.check(world.tested.prepare(world.spans(ranges)), ranges)


def test_preparing_a_step_does_not_change_a_step_in_use() -> None:
    world = World()
    world.check(world.tested.prepare(world.spans(PROMPTS)), PROMPTS)
    first, second = [(0, 11, 12), (1, 33, 34)], [(2, 8, 9)]
    attends = [world.tested.prepare(world.spans(ranges)) for ranges in (first, second)]
    world.check(attends[0], first)
    world.check(attends[1], second)
    world.check(attends[0], first)


def test_replayed_steps_of_any_size_equal_the_torch_backend() -> None:
    world = World()
    world.check(world.tested.prepare(world.spans(PROMPTS)), PROMPTS)
    plan = world.tested.plan_decode_graph(5, 10)
    plan.fill([])
    replays = {}
    for size in (5, 4, 2):
        plan.attend(size)(0, torch.zeros(size, Q_HEADS + 2 * KV_HEADS, HEAD_DIM).bfloat16(), None)
        replays[size] = plan.attend(size)
    ends = {i: b for i, _, b in PROMPTS}
    for size, members in ((5, [0, 1, 2, 3, 4]), (2, [3]), (4, [4, 1, 0]), (2, [1, 2]), (5, [2, 3, 4, 0, 1])):
        ranges = [(i, ends[i], ends[i] + 1) for i in members]
        ends |= {i: ends[i] + 1 for i in members}
        plan.fill(world.spans(ranges))
        world.check(replays[size], ranges, num_rows=size)


def test_more_requests_than_the_largest_captured_size_fail_an_assertion() -> None:
    world = World()
    plan = world.tested.plan_decode_graph(2, 10)
    plan.attend(2)(0, torch.zeros(2, Q_HEADS + 2 * KV_HEADS, HEAD_DIM).bfloat16(), None)
    with pytest.raises(AssertionError, match="largest batch"):
        plan.fill(world.spans([(i, 0, 1) for i in range(3)]))


def test_pools_with_unsupported_head_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="not 80: use torch"):
        FlashInferAttention(GPU).bind(torch.zeros(2, 2, 2, 2, 4, 80, dtype=torch.float16))


def test_kernels_that_fail_to_compile_are_refused_at_start_with_the_end_of_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("Ninja build failed.\n" + "nvcc ...\n" * 50 + "ld: cannot find -lcuda\nninja: build stopped")

    monkeypatch.setattr(Wrapper, "plan", fail)
    with pytest.raises(
        ConfigError, match=r"cannot find -lcuda; ninja: build stopped.*CUDA_HOME.*or use torch"
    ) as raised:
        World()
    assert len(str(raised.value)) < 600


def test_a_library_that_cannot_be_imported_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="pip install 'flashinfer-python"):
        build_attention("flashinfer", GPU)


def test_gpus_older_than_ampere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    with pytest.raises(ConfigError, match="Ampere or newer"):
        choose_attention("flashinfer", GPU, torch.bfloat16)


@given(
    group=st.sampled_from([1, 4, 7, 16, 32]),
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    requests=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 4000)), min_size=1, max_size=40),
    is_graph=st.booleans(),
)
def test_the_workspace_is_as_large_as_the_library_requires(
    group: int, num_kv_heads: int, requests: list[tuple[int, int]], is_graph: bool
) -> None:
    """The library's planner (`PrefillSplitQOKVIndptr`, 0.6.12) in a few lines: requests of (new tokens, pages of
    16)."""
    if is_graph:
        requests = 8 * [(1, num_pages) for _, num_pages in requests]
    rows = [num_tokens * group for num_tokens, _ in requests]
    average = sum(rows) // len(rows)
    tile = 128 if average > 64 else 64 if average > 16 else 16
    most = 2 * NUM_SMS // num_kv_heads

    def num_tiles(chunk: int) -> int:
        return sum(-(-n // tile) * -(-max(pages, 1) // chunk) for n, (_, pages) in zip(rows, requests, strict=True))

    longest = max(1, *(num_pages for _, num_pages in requests))
    chunk = 8 + bisect_left(range(8, longest), True, key=lambda chunk: num_tiles(chunk) <= most)
    tiles = num_tiles(chunk)
    if is_graph:
        tiles = max(most, -(-sum(rows) // tile) + len(rows) - 1)
        assert num_tiles(chunk) <= tiles
    elif chunk >= longest:
        return  # not split: no partial results
    num_q_heads = group * num_kv_heads
    held = workspace_bytes(num_q_heads, num_kv_heads, HEAD_DIM, NUM_SMS, len(requests) if is_graph else None)
    assert num_q_heads * tiles * tile * (HEAD_DIM + 1) * 4 <= held

"""The requirements on every attention backend, against dense fp32 attention over plain K/V histories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from kvist.attention import ATTENTION, attention_kind, build_attention
from kvist.attention.backend import Attend, AttentionBackend, AttentionKind, Captures, Span
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotate, rotation_torch

NUM_LAYERS = 3


@dataclass(frozen=True)
class Backend:
    """A backend, and the device, dtype and head size with which it is tested."""

    name: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int

    @property
    def kind(self) -> AttentionKind:
        return attention_kind(self.name)

    def build(self) -> AttentionBackend:
        return build_attention(self.name, self.device)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def cases() -> Iterator[ParameterSet]:
    """Yield a case for each backend of the door: on a CPU where it runs there, and on a GPU."""
    for name in ATTENTION:
        if attention_kind(name).unfit(CPU, torch.float32) is None:
            yield pytest.param(Backend(name, CPU, torch.float32, 16), id=name)
            yield pytest.param(Backend(name, GPU, torch.float32, 16), id=f"{name}-gpu", marks=pytest.mark.gpu)
        else:
            for head_dim in (64, 128):
                case = Backend(name, GPU, torch.bfloat16, head_dim)
                yield pytest.param(case, id=f"{name}-{head_dim}", marks=pytest.mark.gpu)


@pytest.fixture(params=cases())
def backend(request: pytest.FixtureRequest) -> Backend:
    torch.set_num_threads(1)
    chosen: Backend = request.param
    problem = chosen.kind.unfit(chosen.device, chosen.dtype)
    if problem is not None:
        pytest.skip(f"{chosen.name} {problem}")
    return chosen


@dataclass
class Sequence_:
    """One request's whole history, made in advance; each step passes more of it to the backend."""

    q: Tensor  # [num_layers, num_tokens, num_q_heads, head_dim]
    k: Tensor  # [num_layers, num_tokens, num_kv_heads, head_dim]
    v: Tensor
    page_ids: list[int]


class World:
    """A pool full of garbage, random histories with shuffled pages, and the dense result."""

    def __init__(
        self,
        backend: Backend,
        *,
        lengths: list[int],
        q_heads: int = 4,
        kv_heads: int = 2,
        page_size: int = 4,
        dtype: torch.dtype | None = None,
        garbage: float = float("nan"),
    ) -> None:
        self.rng = torch.Generator().manual_seed(sum(lengths) + q_heads * 7 + page_size)
        needed = [-(-length // page_size) + 1 for length in lengths]
        num_pages = sum(needed) + 5
        self.device, head_dim, dtype = backend.device, backend.head_dim, dtype or backend.dtype
        self.exact = dtype is torch.float32
        shape = (num_pages, kv_heads, NUM_LAYERS, 2, page_size, head_dim)
        self.pool = torch.full(shape, garbage, dtype=dtype, device=self.device)
        self.backend = backend.build()
        self.backend.bind(self.pool)
        shuffled = torch.randperm(num_pages, generator=self.rng).tolist()
        self.sequences = []
        for length, count in zip(lengths, needed, strict=True):
            pages, shuffled = shuffled[:count], shuffled[count:]
            q = self._random(NUM_LAYERS, length, q_heads, head_dim).to(dtype)
            k = self._random(NUM_LAYERS, length, kv_heads, head_dim).to(dtype)
            v = self._random(NUM_LAYERS, length, kv_heads, head_dim).to(dtype)
            self.sequences.append(Sequence_(q=q, k=k, v=v, page_ids=pages))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def step(self, ranges: list[tuple[int, int, int]]) -> list[Tensor]:
        """Attend for each (sequence, start, end) in one batch; each result is [num_layers, end - start, q_heads,
        head_dim]."""
        spans = [Span(start=a, num_tokens=b - a, page_ids=self.sequences[i].page_ids) for i, a, b in ranges]
        attend = self.backend.prepare(spans)
        layers = []
        for layer in range(NUM_LAYERS):
            q, k, v = (
                torch.cat([getattr(self.sequences[i], name)[layer, a:b] for i, a, b in ranges]).to(self.device)
                for name in "qkv"
            )
            layers.append(attend(layer, torch.cat((q, k, v), dim=1), None))
        return list(torch.stack(layers).cpu().split([b - a for _, a, b in ranges], dim=1))

    def dense(self, index: int, start: int, end: int) -> Tensor:
        """Compute a naive masked softmax in fp32 over the whole history."""
        sequence = self.sequences[index]
        group = sequence.q.shape[2] // sequence.k.shape[2]
        q = sequence.q[:, start:end].float()
        k = sequence.k[:, :end].float().repeat_interleave(group, dim=2)
        v = sequence.v[:, :end].float().repeat_interleave(group, dim=2)
        scores = torch.einsum("lqhd,lkhd->lhqk", q, k) / q.shape[-1] ** 0.5
        visible = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        return torch.einsum("lhqk,lkhd->lqhd", weights, v)

    def check(self, ranges: list[tuple[int, int, int]], tolerance: float = 2e-5) -> None:
        for got, (index, start, end) in zip(self.step(ranges), ranges, strict=True):
            want = self.dense(index, start, end)
            if self.exact or self.device.type == "cpu":
                torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
            else:
                assert (got.float() - want).norm() / want.norm() < 2e-2


PAGE_EDGES = [1, 3, 4, 5, 8, 9, 23]


@pytest.mark.parametrize("length", PAGE_EDGES)
def test_a_whole_prompt_and_a_decode_equal_dense_attention(backend: Backend, length: int) -> None:
    world = World(backend, lengths=[length + 6])
    world.check([(0, 0, length)])
    for position in range(length, length + 6):
        world.check([(0, position, position + 1)])


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 8])
def test_prompt_chunks_equal_dense_attention(backend: Backend, chunk: int) -> None:
    world = World(backend, lengths=[21])
    for start in range(0, 21, chunk):
        world.check([(0, start, min(start + chunk, 21))])


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (4, 1), (9, 3), (14, 2)])
def test_grouped_query_heads_equal_dense_attention(backend: Backend, q_heads: int, kv_heads: int) -> None:
    world = World(backend, lengths=[13, 9], q_heads=q_heads, kv_heads=kv_heads)
    world.check([(0, 0, 11), (1, 0, 5)])
    world.check([(0, 11, 12), (1, 5, 9)])


@pytest.mark.parametrize("lengths", [[5, 5, 5], PAGE_EDGES, [1, 200, 2, 190, 3, 60, 64, 200, 4, 1]])
def test_batched_decodes_of_different_lengths_equal_dense_attention(backend: Backend, lengths: list[int]) -> None:
    world = World(backend, lengths=[length + 2 for length in lengths])
    world.check([(i, 0, length) for i, length in enumerate(lengths)])
    for step in range(2):
        world.check([(i, length + step, length + step + 1) for i, length in enumerate(lengths)])


def test_decodes_and_chunks_in_one_batch_equal_dense_attention(backend: Backend) -> None:
    world = World(backend, lengths=[12, 40, 17, 30, 6])
    world.check([(0, 0, 11), (1, 0, 33), (2, 0, 8)])
    # three decodes of different lengths, a chunk after a prefix, a whole prompt, and a last chunk of one token
    world.check([(0, 11, 12), (1, 33, 34), (2, 8, 9), (2, 9, 16), (3, 0, 30), (4, 0, 1)])


def test_chunks_longer_than_a_query_block_equal_dense_attention(backend: Backend) -> None:
    world = World(backend, lengths=[900], page_size=16)
    world.check([(0, 0, 300)])
    world.check([(0, 300, 813)])
    world.check([(0, 813, 900)])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_stale_bytes_beyond_the_length_of_a_request_do_not_change_the_result(backend: Backend, garbage: float) -> None:
    world = World(backend, lengths=[3, 10, 6], garbage=garbage)
    world.check([(0, 0, 2), (1, 0, 9), (2, 0, 5)])
    world.check([(0, 2, 3), (1, 9, 10), (2, 5, 6)])


def test_bf16_attention_is_within_bf16_rounding(backend: Backend) -> None:
    world = World(backend, lengths=[40, 18, 25], dtype=torch.bfloat16)
    world.check([(0, 0, 39), (1, 0, 17)], tolerance=3e-2)
    world.check([(0, 39, 40), (1, 17, 18), (2, 0, 25)], tolerance=3e-2)


def test_only_the_slots_of_new_tokens_are_written(backend: Backend) -> None:
    world = World(backend, lengths=[9], garbage=7.0)
    world.step([(0, 0, 6)])
    before = world.pool.clone()
    world.step([(0, 6, 7)])
    page, offset = world.sequences[0].page_ids[1], 2
    changed = (world.pool != before).flatten(2, 3).any(dim=-1).any(dim=1).any(dim=1).nonzero().tolist()
    assert changed == [[page, offset]]
    sequence = world.sequences[0]
    for layer in range(NUM_LAYERS):
        assert torch.equal(world.pool[page, :, layer, 0, offset].cpu(), sequence.k[layer, 6])
        assert torch.equal(world.pool[page, :, layer, 1, offset].cpu(), sequence.v[layer, 6])


def test_a_rank_reads_and_writes_only_its_own_heads_of_every_page(backend: Backend) -> None:
    whole = World(backend, lengths=[11, 7], q_heads=8, kv_heads=4)
    halves = World(backend, lengths=[11, 7], q_heads=8, kv_heads=4)
    for batch in ([(0, 0, 10), (1, 0, 6)], [(0, 10, 11), (1, 6, 7)]):
        expected = whole.step(batch)
        spans = [Span(start=a, num_tokens=b - a, page_ids=halves.sequences[i].page_ids) for i, a, b in batch]
        for rank in range(2):
            own = backend.build()
            own.bind(halves.pool[:, 2 * rank : 2 * rank + 2])
            attend = own.prepare(spans)
            for layer in range(NUM_LAYERS):
                q, k, v = (
                    torch.cat([getattr(halves.sequences[i], name)[layer, a:b] for i, a, b in batch])
                    .chunk(2, dim=1)[rank]
                    .to(halves.device)
                    for name in "qkv"
                )
                out = attend(layer, torch.cat((q, k, v), dim=1), None).cpu()
                want = torch.cat([part[layer] for part in expected]).chunk(2, dim=1)[rank]
                torch.testing.assert_close(out, want, rtol=1.6e-2 if not whole.exact else 1.3e-6, atol=1e-5)
    for index, sequence in enumerate(whole.sequences):
        length = (11, 7)[index]
        for page in sequence.page_ids[: length // 4]:
            assert torch.equal(whole.pool[page], halves.pool[page])


def test_rotated_attention_equals_rotation_by_the_torch_twin(backend: Backend) -> None:
    """A backend rotates q and k as the twin does, and takes q and k that are already rotated."""
    plain, fused = World(backend, lengths=[30, 9]), World(backend, lengths=[30, 9])
    for ranges in ([(0, 0, 29), (1, 0, 8)], [(0, 29, 30), (1, 8, 9)]):
        positions = torch.cat([torch.arange(a, b) for _, a, b in ranges])
        cos, sin = rotation_torch(positions, 1e-2 ** torch.linspace(0, 1, backend.head_dim // 2))
        rotary = Rotary(cos=cos.to(plain.device), sin=sin.to(plain.device))
        attends = [
            world.backend.prepare(
                [Span(start=a, num_tokens=b - a, page_ids=world.sequences[i].page_ids) for i, a, b in ranges]
            )
            for world in (plain, fused)
        ]
        for layer in range(NUM_LAYERS):
            q, k, v = (
                torch.cat([getattr(plain.sequences[i], name)[layer, a:b] for i, a, b in ranges]).to(plain.device)
                for name in "qkv"
            )
            rotated = rotate(q, rotary.cos, rotary.sin), rotate(k, rotary.cos, rotary.sin), v
            want = attends[0](layer, torch.cat(rotated, dim=1), None)
            got = attends[1](layer, torch.cat((q, k, v), dim=1), rotary)
            assert (got - want).float().norm() / want.float().norm() < 1e-2


def test_plans_are_made_for_exactly_the_steps_that_the_backend_says_it_captures(backend: Backend) -> None:
    made = World(backend, lengths=[4]).backend
    has_decodes, has_mixed = made.plan_decode_graph(4, 10), made.plan_mixed_graph(4, 10, 16)
    assert (has_decodes is not None) == (backend.kind.captures is not Captures.NOTHING)
    assert (has_mixed is not None) == (backend.kind.captures is Captures.ALL)


def test_a_captured_step_equals_a_prepared_step(backend: Backend) -> None:
    lengths = [17, 300, 5, 64, 2]
    world = World(backend, lengths=lengths)
    plan = world.backend.plan_decode_graph(8, 100)
    if plan is None:
        pytest.skip("this backend cannot be captured")
    world.step([(i, 0, length - 2) for i, length in enumerate(lengths)])
    shape = world.sequences[0].q.shape[2:]
    q = torch.zeros(NUM_LAYERS, 8, *shape, dtype=backend.dtype, device=world.device)
    k, v = (torch.zeros(NUM_LAYERS, 8, *world.sequences[0].k.shape[2:], dtype=q.dtype, device=q.device) for _ in "kv")

    def run(attend: Attend) -> Tensor:
        heads = torch.cat((q, k, v), dim=2)
        return torch.stack([attend(layer, heads[layer], None) for layer in range(NUM_LAYERS)])

    plan.fill([])
    run(plan.attend(8))  # compiles the kernels, which a capture cannot do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(plan.attend(8))
    for members in ([0, 1, 2, 3, 4], [3, 1]):  # the second step of 1 and 3 alone, in other rows
        step = 2 if len(members) > 2 else 1
        spans = []
        for row, i in enumerate(members):
            at = lengths[i] - step
            spans.append(Span(start=at, num_tokens=1, page_ids=world.sequences[i].page_ids))
            for static, name in ((q, "q"), (k, "k"), (v, "v")):
                static[:, row] = getattr(world.sequences[i], name)[:, at].to(q.device)
        before = world.pool.clone()
        plan.fill(spans)
        graph.replay()
        for row, i in enumerate(members):
            want = world.dense(i, lengths[i] - step, lengths[i] - step + 1)[:, 0]
            assert (out[:, row].cpu().float() - want).norm() / want.norm() < 2e-2
        written = (world.pool.view(torch.int16) != before.view(torch.int16)).flatten(1).any(dim=1).nonzero().flatten()
        assert set(written.tolist()) == {span.page_ids[span.start // 4] for span in spans}


def test_a_captured_step_of_chunks_and_decodes_equals_dense_attention(backend: Backend) -> None:
    lengths = [17, 300, 5, 64, 90]
    world = World(backend, lengths=lengths)
    plan = world.backend.plan_mixed_graph(8, 100, 128)
    if plan is None:
        pytest.skip("this backend cannot be captured")
    world.step([(0, 0, 16), (1, 0, 250), (3, 0, 40)])
    sequences = world.sequences
    q = torch.zeros(NUM_LAYERS, 128, *sequences[0].q.shape[2:], dtype=backend.dtype, device=world.device)
    k, v = (torch.zeros(NUM_LAYERS, 128, *sequences[0].k.shape[2:], dtype=q.dtype, device=q.device) for _ in "kv")

    def run(attend: Attend) -> Tensor:
        heads = torch.cat((q, k, v), dim=2)
        return torch.stack([attend(layer, heads[layer], None) for layer in range(NUM_LAYERS)])

    plan.fill([])
    run(plan.attend(128))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(plan.attend(128))
    # a decode, a later chunk, a first chunk, the last chunk of a prompt; then few rows after many
    for ranges in ([(0, 16, 17), (1, 250, 280), (4, 0, 60), (3, 40, 64)], [(1, 280, 300), (2, 0, 5)]):
        spans, row = [], 0
        for i, a, b in ranges:
            spans.append(Span(start=a, num_tokens=b - a, page_ids=sequences[i].page_ids))
            for static, name in ((q, "q"), (k, "k"), (v, "v")):
                static[:, row : row + b - a] = getattr(sequences[i], name)[:, a:b].to(q.device)
            row += b - a
        before = world.pool.clone()
        plan.fill(spans)
        graph.replay()
        row = 0
        for i, a, b in ranges:
            want = world.dense(i, a, b)
            got = out[:, row : row + b - a].cpu().float()
            assert (got - want).norm() / want.norm() < 2e-2
            row += b - a
        written = (world.pool.view(torch.int16) != before.view(torch.int16)).flatten(1).any(dim=1).nonzero().flatten()
        assert set(written.tolist()) == {s.page_ids[at // 4] for s in spans for at in range(s.start, s.end)}

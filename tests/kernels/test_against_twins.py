"""Every Triton kernel against its torch twin in float32, at shapes that fill blocks and at shapes that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvist.errors import EngineError
from kvist.kernels.activation import silu_mul, silu_mul_torch
from kvist.kernels.decode_attention import (
    decode_attention,
    decode_attention_torch,
    plan_decodes,
    plan_decodes_torch,
)
from kvist.kernels.norm import add_rms_norm, add_rms_norm_torch
from kvist.kernels.operands import Rotary, SamplingColumns
from kvist.kernels.page_lists import read_page_lists, read_page_lists_torch
from kvist.kernels.pages import copy_pages, sum_pages, sum_pages_torch
from kvist.kernels.rotary import rotate_and_write, rotate_and_write_torch, rotation, rotation_torch
from kvist.kernels.sampling import choose_tokens, choose_tokens_torch, gumbel_noise, hash_tokens
from kvist.kernels.skinny import GATED_ROWS, skinny_gated, skinny_gated_torch, skinny_linear, skinny_linear_torch
from kvist.transfer.device_pages import DevicePages

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def random(rng: torch.Generator, *shape: int) -> Tensor:
    """A bf16 tensor on the GPU with any strides that a caller may pass."""
    return torch.randn(*shape, generator=rng).to(CUDA, torch.bfloat16)


def assert_near(got: Tensor, want: Tensor, tolerance: float = 6e-3) -> None:
    assert got.isfinite().all()
    assert (got.float() - want.float()).norm() / want.float().norm() < tolerance


@pytest.mark.parametrize("num_rows", [1, 3, 200])
@pytest.mark.parametrize("width", [64, 576, 3584, 8192])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm_equals_the_torch_twin(
    rng: torch.Generator, num_rows: int, width: int, with_residual: bool
) -> None:
    x, weight = random(rng, num_rows, width), random(rng, width)
    residual = random(rng, num_rows, width) if with_residual else None
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    want, want_total = add_rms_norm_torch(
        x.float(), None if residual is None else residual.float(), weight.float(), 1e-6
    )
    assert_near(normed, want)
    assert_near(total, want_total)


@pytest.mark.parametrize("shape", [(1, 64), (5, 1536), (130, 18944)])
def test_silu_mul_equals_the_torch_twin(rng: torch.Generator, shape: tuple[int, int]) -> None:
    x = random(rng, shape[0], 2 * shape[1])
    assert_near(silu_mul(x), silu_mul_torch(x.float()))


def test_rotation_is_exact_at_large_positions() -> None:
    positions = torch.tensor([0, 1, 17, 4095, 32767, 131071, 1_000_000], device=CUDA)
    frequencies = 1.0 / 1e6 ** (torch.arange(0, 128, 2, device=CUDA).float() / 128)
    for got, want in zip(rotation(positions, frequencies), rotation_torch(positions, frequencies), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(28, 4, 128), (4, 2, 64), (9, 3, 64), (7, 1, 80)])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_rotate_and_write_equals_the_torch_twin(
    rng: torch.Generator, q_heads: int, kv_heads: int, head_dim: int, qk_norm: bool, turned: bool
) -> None:
    slots = torch.tensor([5, -1, 23, 0, 130], dtype=torch.int32, device=CUDA)
    heads = random(rng, 5, q_heads + 2 * kv_heads, head_dim)
    cos, sin = rotation_torch(torch.tensor([5, 0, 9000, 1, 2]), 1e-2 ** torch.linspace(0, 1, head_dim // 2))
    weight = random(rng, q_heads + kv_heads, head_dim) if qk_norm else None
    rotary = Rotary(cos=cos.to(CUDA), sin=sin.to(CUDA), qk_weight=weight, eps=1e-6)
    pool = torch.full((10, 2 * kv_heads, 3, 2, 16, head_dim), 7.0, dtype=torch.bfloat16, device=CUDA)
    want_pool = pool.float()
    q = rotate_and_write(heads, rotary if turned else None, pool[:, kv_heads:, 1], slots)
    want = rotate_and_write_torch(heads.float(), rotary if turned else None, want_pool[:, kv_heads:, 1], slots)
    assert_near(q, want)
    torch.testing.assert_close(pool.float(), want_pool, rtol=2e-2, atol=2e-2)
    assert (pool == 7.0).all(dim=-1).sum() == (want_pool == 7.0).all(dim=-1).sum()


def test_page_lists_are_read_from_host_memory(rng: torch.Generator) -> None:
    lists = torch.randint(0, 1 << 20, (9, 2500), dtype=torch.int32, generator=rng).pin_memory()
    rows = torch.tensor([4, 0, 8, 4, 0], dtype=torch.int32)
    lengths = torch.tensor([1, 16, 40_000, 16_385, 0], dtype=torch.int32)  # the last one is padding
    pages = torch.full((5, 2500), -7, dtype=torch.int32)
    got_pages = pages.to(CUDA)
    read_page_lists(lists, rows.to(CUDA), lengths.to(CUDA), 16, got_pages)
    read_page_lists_torch(lists, rows, pages)
    for row, length in enumerate(lengths.tolist()):
        used = -(-length // 16)
        assert torch.equal(got_pages[row, :used].cpu(), pages[row, :used])
        assert (got_pages[row, used:] == -7).all()


def test_a_replayed_graph_reads_the_page_lists_the_host_wrote_last() -> None:
    lists = torch.zeros(2, 8, dtype=torch.int32).pin_memory()
    rows, lengths = (
        torch.tensor([1], dtype=torch.int32, device=CUDA),
        torch.tensor([20], dtype=torch.int32, device=CUDA),
    )
    pages = torch.zeros(1, 8, dtype=torch.int32, device=CUDA)
    read_page_lists(lists, rows, lengths, 16, pages)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read_page_lists(lists, rows, lengths, 16, pages)
    for page in (5, 6):
        lists[1, :2] = torch.tensor([3, page])
        graph.replay()
        torch.cuda.synchronize()
        assert pages[0, :2].tolist() == [3, page]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 15, 16, 17, GATED_ROWS])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (576, 193), (3584, 4608), (18944, 3584), (960, 49152)])
def test_skinny_products_equal_the_torch_twin(rng: torch.Generator, num_rows: int, num_in: int, num_out: int) -> None:
    x, weight, bias = random(rng, num_rows, num_in), random(rng, num_out, num_in), random(rng, num_out)
    for own_bias in (bias, None):
        for dtype in (torch.bfloat16, torch.float32):
            got = skinny_linear(x, weight, own_bias, dtype)
            assert got.dtype is dtype
            assert_near(got, skinny_linear_torch(x, weight, own_bias, torch.float32))
    if num_out % 2 == 0:
        assert_near(skinny_gated(x, weight), skinny_gated_torch(x.float(), weight.float()))


def test_a_row_of_a_skinny_product_does_not_depend_on_its_neighbours(rng: torch.Generator) -> None:
    x, weight = random(rng, GATED_ROWS, 3584), random(rng, 4608, 3584)
    whole = skinny_linear(x, weight, None, torch.float32)
    for num_rows in range(1, GATED_ROWS):
        torch.testing.assert_close(
            skinny_linear(x[:num_rows], weight, None, torch.float32), whole[:num_rows], rtol=1e-4, atol=1e-3
        )


untruncated = SamplingColumns.untruncated


def random_keys(rng: torch.Generator, num_rows: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (num_rows, 2), dtype=torch.int32, generator=rng)


def test_the_hash_is_the_same_bits_on_both_devices(rng: torch.Generator) -> None:
    keys, tokens = random_keys(rng, 5), torch.arange(20_000)[None, :]
    assert torch.equal(hash_tokens(keys.to(CUDA), tokens.to(CUDA)).cpu(), hash_tokens(keys, tokens))


@pytest.mark.parametrize("vocab_size", [100, 49_152, 152_064])
def test_noise_alone_gives_the_cpus_tokens(rng: torch.Generator, vocab_size: int) -> None:
    """With equal logits the hash alone decides, so a single wrong bit changes a token."""
    keys = random_keys(rng, 64)
    logits, ones = torch.zeros(64, vocab_size), torch.ones(64)
    got = choose_tokens(logits.to(CUDA), untruncated(ones.to(CUDA), keys.to(CUDA)))
    assert torch.equal(got.cpu(), choose_tokens_torch(logits, untruncated(ones, keys)))


def test_rows_at_any_temperature_give_the_cpus_tokens(rng: torch.Generator) -> None:
    logits = torch.randn(40, 152_064, generator=rng) * 4
    temperatures = torch.tensor([0.0, 1e-6, 0.7, 1.0, 2.0]).repeat(8)
    keys = random_keys(rng, 40)
    got = choose_tokens(logits.to(CUDA), untruncated(temperatures.to(CUDA), keys.to(CUDA))).cpu()
    noisy = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures.clamp(min=1e-9)[:, None]
    noisy += gumbel_noise(keys, torch.arange(152_064)[None, :]) * (temperatures > 0)[:, None]
    best = noisy.amax(dim=-1)
    of_chosen = noisy.gather(1, got[:, None]).squeeze(1)
    assert (got == noisy.argmax(dim=-1)).float().mean() > 0.95
    # where the token differs, both logits are equally large
    torch.testing.assert_close(of_chosen, best, rtol=1e-4, atol=1e-4)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.full((3, 5000), -1.0, device=CUDA)
    logits[0, [4, 4999]] = 3.0
    logits[1, [2048, 2049]] = 3.0
    logits[2] = float("-inf")
    logits[2, 2047] = -9.0
    zeros = torch.zeros(3, device=CUDA)
    keys = torch.zeros(3, 2, dtype=torch.int32, device=CUDA)
    assert choose_tokens(logits, untruncated(zeros, keys)).tolist() == [4, 2048, 2047]
    assert choose_tokens(logits.bfloat16(), untruncated(zeros, keys)).tolist() == [4, 2048, 2047]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_nan_gets_no_token_and_does_not_change_other_rows(
    rng: torch.Generator, temperature: float, dtype: torch.dtype
) -> None:
    logits = torch.randn(8, 5000, generator=rng).to(dtype)
    temperatures, keys = torch.full((8,), temperature), random_keys(rng, 8)
    whole = choose_tokens(logits.to(CUDA), untruncated(temperatures.to(CUDA), keys.to(CUDA))).cpu()
    logits[1, 4999] = float("nan")
    logits[2, 2048] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("nan")
    logits[5, :4096] = float("-inf")
    got = choose_tokens(logits.to(CUDA), untruncated(temperatures.to(CUDA), keys.to(CUDA))).cpu()
    broken = torch.tensor([1, 2, 3, 4])
    assert got[broken].tolist() == [-1] * 4
    assert choose_tokens_torch(logits, untruncated(temperatures, keys))[broken].tolist() == [-1] * 4
    assert got[5] >= 4096
    assert torch.equal(got[[0, 6, 7]], whole[[0, 6, 7]])


LENGTHS = {
    "one short": [5],
    "one long": [9_000],
    "short and empty": [1, 0, 16, 17, 0, 127, 128, 129],
    "one long among many": [*[40 + i for i in range(60)], 20_000, *[300] * 30],
    "many": [(37 * i) % 1200 for i in range(256)],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_planned_decode_items_equal_the_torch_twin(lengths: list[int]) -> None:
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32)
    want, got = plan_decodes_torch(lengths_tensor), plan_decodes(lengths_tensor.to(CUDA))
    num_items = int(want.firsts[-2])
    assert got.firsts.tolist() == want.firsts.tolist()
    assert got.rows[:num_items].tolist() == want.rows[:num_items].tolist()


@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(28, 4, 128), (4, 2, 64), (9, 3, 64), (32, 1, 80)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_decode_attention_equals_the_torch_twin(
    rng: torch.Generator, lengths: list[int], q_heads: int, kv_heads: int, head_dim: int
) -> None:
    needed = [-(-length // 16) for length in lengths]
    num_pages = sum(needed) + 3
    pool = torch.full((num_pages, kv_heads, 2, 2, 16, head_dim), float("nan"), dtype=torch.bfloat16, device=CUDA)
    table = torch.full((len(lengths), max(needed) + 1), num_pages - 1, dtype=torch.int32)
    pages = iter(torch.randperm(num_pages - 1, generator=rng).tolist())
    for row, length in enumerate(lengths):  # pages after a context stay NaN
        for i in range(needed[row]):
            table[row, i] = page = next(pages)
            filled = min(16, length - 16 * i)
            pool[page, :, 1, :, :filled] = random(rng, kv_heads, 2, filled, head_dim)
    q = random(rng, len(lengths) + 2, q_heads, head_dim)
    out = torch.full_like(q, 3.0)
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32)
    decode_attention(q, pool[:, :, 1], table.to(CUDA), plan_decodes(lengths_tensor.to(CUDA)), out)
    want = torch.full_like(q, 3.0, dtype=torch.float32, device="cpu")
    decode_attention_torch(
        q.float().cpu(), pool[:, :, 1].float().cpu(), table, plan_decodes_torch(lengths_tensor), want
    )
    assert_near(out.cpu(), want)
    assert (out[len(lengths) :] == 3.0).all(), "rows that are not decodes are not written"
    assert all((out[row] == 3.0).all() for row, length in enumerate(lengths) if not length)


@pytest.mark.parametrize("num_words", [4, 2048, 2049, 5000, 114_688])
def test_gpu_page_sums_and_copies_equal_the_cpu(rng: torch.Generator, num_words: int) -> None:
    pages = torch.randint(-(2**63), 2**63 - 1, (9, num_words), generator=rng)
    on_gpu, target = pages.to(CUDA), torch.zeros(7, num_words, dtype=torch.int64, device=CUDA)
    want = sum_pages_torch(pages[[3, 0, 8]])
    assert torch.equal(sum_pages(on_gpu, (3, 0, 8)).cpu(), want)
    assert torch.equal(copy_pages(on_gpu, (3, 0, 8), target.data_ptr(), (6, 1, 2)).cpu(), want)
    assert torch.equal(target[[6, 1, 2]].cpu(), pages[[3, 0, 8]])
    assert not target[[0, 3, 4, 5]].any()


@pytest.mark.parametrize(("start", "end"), [(0, 2048), (2048, 5000), (1, 4097), (8, 10)])
def test_gpu_sums_and_copies_of_pieces_equal_the_cpu(rng: torch.Generator, start: int, end: int) -> None:
    pages = torch.randint(-(2**63), 2**63 - 1, (9, 5000), generator=rng)
    on_gpu, target = pages.to(CUDA)[:, start:end], torch.zeros(7, 6000, dtype=torch.int64, device=CUDA)
    want = sum_pages_torch(pages[[3, 0, 8], start:end], start)
    assert torch.equal(sum_pages(on_gpu, (3, 0, 8), first_word=start).cpu(), want)
    into = target[:, 10:].data_ptr()
    copied = copy_pages(on_gpu, (3, 0, 8), into, (6, 1, 2), target_page_bytes=6000 * 8, first_word=start)
    assert torch.equal(copied.cpu(), want)
    assert torch.equal(target[[6, 1, 2], 10 : 10 + end - start].cpu(), pages[[3, 0, 8], start:end])
    target[[6, 1, 2], 10 : 10 + end - start] = 0
    assert not target.any()


@dataclass
class PeerPart:
    """A peer's part of all pages, as `device_pages.MappedPart`."""

    offset: int
    words: Tensor  # [num_pages, words of the part]

    @property
    def num_bytes(self) -> int:
        return self.words.shape[1] * 8

    def address_on(self, device: torch.device) -> int:
        assert device.type == "cuda"
        return self.words.data_ptr()


@dataclass
class PeerPool:
    parts: Sequence[PeerPart]


WHOLE, HALVES, QUARTERS = [(0, 5000)], [(0, 2500), (2500, 5000)], [(1250 * i, 1250 * i + 1250) for i in range(4)]
UNEVEN, TWICE = [(0, 1), (1, 2049), (2049, 5000)], [(0, 5000), (0, 5000)]


@pytest.mark.parametrize("ours", [WHOLE, HALVES, UNEVEN, TWICE], ids=["whole", "halves", "uneven", "twice"])
@pytest.mark.parametrize("theirs", [WHOLE, HALVES, QUARTERS, TWICE], ids=["whole", "halves", "quarters", "twice"])
def test_gpu_pages_in_parts_are_copied_and_summed_like_whole_pages_on_the_cpu(
    rng: torch.Generator, ours: list[tuple[int, int]], theirs: list[tuple[int, int]]
) -> None:
    pages = torch.randint(-(2**63), 2**63 - 1, (9, 5000), generator=rng)
    parts = [(start * 8, pages[:, start:end].contiguous().to(CUDA)) for start, end in ours]
    source = DevicePages(parts[0][1], [(offset, part.view(torch.uint8)) for offset, part in parts[1:]])
    held = [torch.zeros(7, end - start, dtype=torch.int64, device=CUDA) for start, end in theirs]
    torch.cuda.synchronize()
    peer = PeerPool([PeerPart(start * 8, words) for (start, _), words in zip(theirs, held, strict=True)])
    want = DevicePages(pages).digests((3, 0, 8))
    assert source.copy((3, 0, 8), peer, (6, 1, 2)) == want
    for (start, end), words in zip(theirs, held, strict=True):
        assert torch.equal(words[[6, 1, 2]].cpu(), pages[[3, 0, 8], start:end])
        assert not words[[0, 3, 4, 5]].any()
    receiver = [(start * 8, words.view(torch.uint8)) for (start, _), words in zip(theirs, held, strict=True)]
    target = DevicePages(held[0], receiver[1:])
    assert target.digests((6, 1, 2)) == want
    if theirs is TWICE:
        held[1][1, 17] ^= 1
        torch.cuda.synchronize()
        with pytest.raises(EngineError, match="two ranks have different bytes"):
            target.digests((6, 1, 2))

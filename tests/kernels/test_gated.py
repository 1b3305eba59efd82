"""The gated product of many rows on Hopper, against its torch twin in float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvist.kernels.gated import make_gated_product
from kvist.kernels.gpu import cuda, gated
from kvist.kernels.skinny import skinny_gated_torch
from kvist.models.formats import PlainWeight
from kvist.models.linear import make_gated_linear

CUDA = torch.device("cuda")
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernel wants Hopper"
)
# n whose tiles fill the multiprocessors of an H100 or H200, and in_features that fill blocks or do not, in many or few
SHAPES = [(18_944, 3584), (12_608, 520), (6336, 64)]
ROWS = [1, 16, 33, 64, 65, 128, 130, 160, 192, 200, 255, 256]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (made * shape[-1] ** -0.5).to(CUDA, dtype)


def test_the_gated_kernel_is_made_on_hopper_only() -> None:
    assert make_gated_product(torch.zeros(64, 64, dtype=torch.bfloat16)) is None


H200_CLUSTERS = 66  # of two multiprocessors each, of 132


@pytest.mark.parametrize(
    ("n", "is_used"),
    [
        (18_944, True),  # Qwen2-7B: three full rounds
        (18_944 // 2, False),  # with --tp 2: one and a half rounds
        (18_944 // 4, False),  # with --tp 4: three quarters of a round
        (13_000, False),
        (12_608, True),  # exactly two rounds
        (12_680, False),  # one tile more starts a third round
        (5376, False),
        (5472, True),
        (8, False),
    ],
)
def test_the_gated_kernel_is_used_where_its_tiles_fill_the_multiprocessors(n: int, is_used: bool) -> None:
    assert gated.fills_gpu(2 * n, H200_CLUSTERS) == is_used


@pytest.mark.parametrize(
    ("n", "num_in", "dtype", "is_made"),
    [
        (18_944, 3584, torch.bfloat16, True),
        (18_944, 3584, torch.float16, True),
        (18_944, 3584, torch.float32, False),
        (18_944, 3580, torch.bfloat16, False),
        (18_944 // 4, 3584, torch.bfloat16, False),
        (13_000, 3584, torch.bfloat16, False),
    ],
)
def test_no_kernel_is_compiled_for_an_unsuitable_weight(
    n: int, num_in: int, dtype: torch.dtype, is_made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=dtype, shape=(2 * n, num_in))
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2 * H200_CLUSTERS)
    )
    monkeypatch.setattr(cuda, "missing_library", lambda: None)
    monkeypatch.setattr(gated, "GatedProduct", made.append)
    make_gated_product(weight)  # type: ignore[arg-type]
    assert made == [weight] * is_made


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "num_in"), SHAPES)
def test_the_gated_kernel_is_close_to_its_twin_and_deterministic_at_any_number_of_rows(
    n: int, num_in: int, dtype: torch.dtype
) -> None:
    weight = random(2 * n, num_in, dtype=dtype)
    product = make_gated_product(weight)
    assert product is not None
    for num_rows in ROWS:
        x = 8 * random(num_rows, num_in, dtype=dtype)
        got = product(x)
        assert got is not None
        want = skinny_gated_torch(x.float(), weight.float())
        assert (got.float() - want).norm() / want.norm() < 6e-3
        again = product(x)
        assert again is not None
        assert torch.equal(got, again)


@pytest.mark.gpu
@hopper
def test_strided_rows_of_a_wider_matrix_are_read_in_place() -> None:
    x, weight = random(100, 1024)[:, 512:], random(2 * 12_608, 512)
    product = make_gated_product(weight)
    assert product is not None
    got = product(x)
    assert got is not None
    contiguous = product(x.contiguous())
    assert contiguous is not None
    assert torch.equal(got, contiguous)


@pytest.mark.gpu
@hopper
def test_a_replayed_graph_equals_a_plain_launch() -> None:
    linear = make_gated_linear(PlainWeight(random(2 * 18_944, 3584)))
    x = 8 * random(192, 3584)
    want = linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = linear(x)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("num_rows", "n"), [(257, 18_944), (64, 13_000)])
def test_unsuitable_shapes_are_left_to_cublas(num_rows: int, n: int) -> None:
    weight = random(2 * n, 256)
    product = make_gated_product(weight)
    x = random(num_rows, 256)
    assert (product is None) == (n == 13_000)
    assert product is None or product(x) is None
    want = skinny_gated_torch(x.float(), weight.float())
    assert (make_gated_linear(PlainWeight(weight))(x).float() - want).norm() / want.norm() < 6e-3

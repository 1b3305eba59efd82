from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.models.formats import PlainWeight
from kvist.models.linear import PackedLinear, PlainLinear, make_linear


@pytest.fixture
def weight_and_bias() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("biased", [True, False])
def test_packed_product_equals_the_plain_product_at_any_number_of_rows(
    weight_and_bias: tuple[Tensor, Tensor], num_rows: int, biased: bool
) -> None:
    weight, bias = weight_and_bias
    own_bias = bias if biased else None
    x = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(2))
    packed = PackedLinear(weight, own_bias)(x)
    assert packed.shape == (num_rows, 96)
    torch.testing.assert_close(packed, F.linear(x, weight, own_bias), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it(weight_and_bias: tuple[Tensor, Tensor]) -> None:
    linear = make_linear(PlainWeight(weight_and_bias[0]), weight_and_bias[1])
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    whole = linear(x)
    for num_rows in (1, 2, 3, 4, 7, 16):
        torch.testing.assert_close(linear(x[:num_rows]), whole[:num_rows], rtol=1e-5, atol=1e-5)


def test_strided_input_gives_the_same_result(weight_and_bias: tuple[Tensor, Tensor]) -> None:
    linear = make_linear(PlainWeight(weight_and_bias[0]), weight_and_bias[1])
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(linear(x[:, ::2]), linear(x[:, ::2].contiguous()))


def test_cpu_weights_are_packed_and_other_devices_stay_plain(weight_and_bias: tuple[Tensor, Tensor]) -> None:
    weight, bias = weight_and_bias
    assert isinstance(make_linear(PlainWeight(weight), bias), PackedLinear)
    assert isinstance(make_linear(PlainWeight(weight.to("meta"))), PlainLinear)
    assert isinstance(make_linear(PlainWeight(weight.half())), PlainLinear)


def test_bf16_products_stay_bf16_and_close_to_fp32(weight_and_bias: tuple[Tensor, Tensor]) -> None:
    weight, bias = weight_and_bias
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    y = make_linear(PlainWeight(weight.bfloat16()), bias.bfloat16())(x.bfloat16())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x, weight, bias), rtol=0.05, atol=0.2)

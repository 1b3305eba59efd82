"""The page layout: sizes, its description, and the namespace made of it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout, namespace

LAYOUT = PageLayout(num_kv_heads=3, num_layers=30, page_size=16, head_dim=64, dtype="float32")

OTHER_LAYOUTS = [
    dataclasses.replace(LAYOUT, **change)
    for change in (
        {"num_kv_heads": 1},
        {"num_layers": 31},
        {"page_size": 32},
        {"head_dim": 128},
        {"dtype": "bfloat16"},
        {"num_kv_heads": 30, "num_layers": 3},
    )
]


def test_sizes_follow_from_the_shape() -> None:
    assert LAYOUT.shape == (3, 30, 2, 16, 64)
    assert LAYOUT.num_page_elements == 3 * 30 * 2 * 16 * 64
    assert LAYOUT.page_bytes == LAYOUT.num_page_elements * 4
    assert dataclasses.replace(LAYOUT, dtype="bfloat16").page_bytes == LAYOUT.page_bytes // 2


@pytest.mark.parametrize("other", OTHER_LAYOUTS)
def test_layouts_that_differ_describe_themselves_differently(other: PageLayout) -> None:
    assert other.describe() != LAYOUT.describe()
    assert namespace("model", other) != namespace("model", LAYOUT)


def test_equal_layouts_describe_themselves_equally() -> None:
    assert dataclasses.replace(LAYOUT).describe() == LAYOUT.describe()


def test_the_namespace_names_the_model_and_the_layout_and_stays_as_it_was() -> None:
    assert namespace("model", LAYOUT) != namespace("model-2", LAYOUT)
    assert namespace("model", LAYOUT) == f'["model","{LAYOUT.describe()}","tp=0/1",""]'


def test_no_name_can_pass_for_another_field() -> None:
    forged = f'm","{LAYOUT.describe()}'
    assert json.loads(namespace(forged, LAYOUT))[0] == forged


@pytest.mark.parametrize("field", ["num_kv_heads", "num_layers", "page_size", "head_dim"])
def test_a_size_below_one_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(LAYOUT, **{field: 0})  # type: ignore[arg-type]


def test_an_unknown_dtype_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match=r"int3.*bfloat16"):
        dataclasses.replace(LAYOUT, dtype="int3")

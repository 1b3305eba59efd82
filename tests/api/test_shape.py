from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.api import shape
from kvist.api.shape import MAX_CONTAINERS, MAX_TEXTS, MAX_VALUES, check_shape
from kvist.errors import RequestError


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"[" + b"1," * (MAX_VALUES + 1) + b"1]", "values"),
        (b"[" + b'"a",' * (MAX_TEXTS + 1) + b'"a"]', "texts"),
        (b"[" + b"{}," * (MAX_CONTAINERS + 1) + b"{}]", "lists and objects"),
        (b"[" * (MAX_CONTAINERS + 1), "lists and objects"),
        (b'["a' + b'\\"' * (MAX_TEXTS * 2) + b'",' + b"1," * (MAX_VALUES + 1) + b"1]", "values"),
    ],
)
def test_a_body_with_too_many_values_is_refused_and_the_limit_is_named(body: bytes, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        check_shape(body)


@pytest.mark.parametrize(
    "text", ["," * (MAX_VALUES + 1), "[{" * MAX_CONTAINERS, '"' * MAX_TEXTS * 3, "\\" * 99_999 + ',"']
)
def test_separators_inside_texts_are_not_counted(text: str) -> None:
    check_shape(msgspec.json.encode({"prompt": text, "n": 1}))
    check_shape(msgspec.json.encode({"prompt": [text, "x"], "n": 1}))


def test_the_largest_batch_of_token_ids_passes() -> None:
    check_shape(msgspec.json.encode({"prompt": [[49151] * 8000] * 128, "n": 1}))


@pytest.mark.parametrize("body", [b'"' * 100_000, b'{"a' + b"\\" * 100_000, b"\x00" * 100_000, b'"\\"' * 99_999])
def test_invalid_json_passes_the_shape_check(body: bytes) -> None:
    check_shape(body + b"," * MAX_VALUES if body[:1] == b"\x00" else body)


JSON = st.recursive(
    st.none() | st.integers(-9, 9) | st.text('ab,"\\[{', max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('k"\\', max_size=3), inner, max_size=4),
)


@given(JSON)
def test_the_exact_count_is_never_below_the_decoded_values(value: object) -> None:
    num_values, num_texts, num_containers = shape._count_outside_texts(msgspec.json.encode(value))
    texts, containers = count(value)
    assert (num_texts, num_containers) == (texts, containers)
    assert num_values >= 0


def count(value: object) -> tuple[int, int]:
    inner: list[object] = []
    if isinstance(value, dict):
        inner = [*value, *value.values()]
    elif isinstance(value, list):
        inner = value
    found = [count(one) for one in inner]
    own = (int(isinstance(value, str)), int(isinstance(value, list | dict)))
    return own[0] + sum(one[0] for one in found), own[1] + sum(one[1] for one in found)

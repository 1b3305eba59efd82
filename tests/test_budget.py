"""KVIST_TEST_PROFILE chooses how much random tests do."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.budget import budget, profile


@pytest.mark.parametrize(("value", "amount"), [("", 3), ("ordinary", 3), ("long", 50)])
def test_the_profile_chooses_the_amount(value: str, amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIST_TEST_PROFILE", value)
    assert budget(3, long=50) == amount


def test_an_unknown_profile_is_an_error_that_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIST_TEST_PROFILE", "lang")
    with pytest.raises(ValueError, match="'lang': set it to one of ordinary, long"):
        profile()


def test_hypothesis_has_the_examples_of_the_profile() -> None:
    assert settings().max_examples == budget(40, long=1000)

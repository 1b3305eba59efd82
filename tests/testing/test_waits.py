"""A wait ends when its condition holds, and says what it waited for when it fails."""

from __future__ import annotations

import itertools

import pytest

from kvist.testing.waits import until, wait_until


async def test_waits_end_when_their_condition_holds() -> None:
    calls = itertools.count()
    assert wait_until(lambda: next(calls) == 3) > 0.0
    await until(lambda: next(calls) == 7)
    assert next(calls) == 8


async def test_a_condition_that_never_holds_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the worker is ready"):
        wait_until(lambda: False, "the worker is ready", within_s=0.01)
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the last lines"):
        wait_until(lambda: False, lambda: "the last lines", within_s=0.01)
    with pytest.raises(TimeoutError):
        await until(lambda: False, within_s=0.01)

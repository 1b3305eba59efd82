"""Time limits in tests, on a machine that does other work, too: a round that took too long is repeated.

    @in_rounds(3)
    def test_a_killed_store_delays_a_read_by_less_than_half_a_second(pool):
        took_s = ...
        check_time(took_s < 0.5, f"the read took {took_s} s")

Other processes and the disk can hold up any round for seconds, but code that is slow by itself is slow in every round.
Only `check_time` asks for another round: an assertion about anything else than time fails the test at once. A round
begins with the fixtures that the round before has left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])


class SlowRound(AssertionError):
    """The time of one round is over its limit, or was too long for the round to show anything."""


def check_time(is_in_time: bool, problem: str) -> None:
    """Raise `SlowRound` with the problem, unless the condition, which depends on nothing but time, holds."""
    if not is_in_time:
        raise SlowRound(problem)


def in_rounds(num_rounds: int) -> Callable[[Test], Test]:
    """Return a decorator for a test, plain or async: after a `SlowRound`, the test is called again with the same
    fixtures, `num_rounds` times in all. The last round's `SlowRound` fails the test."""

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for number in range(1, num_rounds + 1):
                try:
                    test(*args, **kwargs)
                    return
                except SlowRound:
                    if number == num_rounds:
                        raise

        @functools.wraps(test)
        async def run_async(*args: Any, **kwargs: Any) -> None:
            for number in range(1, num_rounds + 1):
                try:
                    await test(*args, **kwargs)
                    return
                except SlowRound:
                    if number == num_rounds:
                        raise

        return run_async if inspect.iscoroutinefunction(test) else run

    return decorate

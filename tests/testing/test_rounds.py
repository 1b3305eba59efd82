"""A round that took too long is repeated; any other failure is not, and the last round counts."""

from __future__ import annotations

import pytest

from kvist.testing.rounds import SlowRound, check_time, in_rounds


class Rounds:
    """A test with a list of the seconds that its rounds take."""

    def __init__(self, *took_s: float) -> None:
        self.took_s = list(took_s)

    @in_rounds(3)
    def test(self) -> None:
        check_time(self.took_s.pop(0) < 1.0, "too slow")

    @in_rounds(3)
    async def test_async(self) -> None:
        self.test()

    @in_rounds(3)
    def test_wrong(self) -> None:
        self.took_s.pop(0)
        raise AssertionError("wrong bytes")


async def test_one_quick_round_is_enough() -> None:
    rounds = Rounds(2.0, 2.0, 0.5, 2.0)
    rounds.test()
    assert rounds.took_s == [2.0]
    rounds = Rounds(*[2.0] * 5, 0.5)
    await rounds.test_async()
    assert rounds.took_s == []


async def test_a_test_that_is_slow_in_every_round_fails() -> None:
    with pytest.raises(SlowRound, match="too slow"):
        Rounds(2.0, 2.0, 2.0, 0.5).test()
    with pytest.raises(SlowRound, match="too slow"):
        await Rounds(*[2.0] * 9, 0.5).test_async()


def test_a_failure_that_is_not_about_time_is_not_repeated() -> None:
    rounds = Rounds(0.5, 0.5)
    with pytest.raises(AssertionError, match="wrong bytes"):
        rounds.test_wrong()
    assert rounds.took_s == [0.5]


@pytest.mark.parametrize("value", [1, 2])
@in_rounds(2)
def test_fixtures_and_parameters_reach_a_test_in_rounds(value: int, tmp_path: object) -> None:
    assert value in (1, 2)
    assert tmp_path is not None

"""An explanation shows the error of its predictions after the run, and nothing of it before the run."""

from __future__ import annotations

import pytest

from kvist.planning.explanation import Explanation, Row


def _row(predicted_ms: float | None, took_ms: float | None) -> Row:
    return Row(
        what="Generate x",
        place="p.py:1",
        state="s",
        work="decode",
        start_ms=0.0,
        predicted_ms=predicted_ms,
        took_ms=took_ms,
    )


def test_a_plan_says_nothing_of_the_error_of_its_predictions() -> None:
    plan = Explanation(rows=(_row(100.0, None),), notes=(), happened=False)
    assert plan.error_ratio is None
    assert "predicted time" not in plan.table() + plan.html()


def test_a_run_shows_the_median_error_of_its_predictions_and_marks_those_that_are_twice_off() -> None:
    rows = (_row(100.0, 120.0), _row(100.0, 250.0), _row(100.0, 40.0), _row(None, 30.0), _row(2.0, 15.0))
    run = Explanation(rows=rows, notes=("a note",), happened=True)
    assert run.error_ratio == pytest.approx((1.2 + 2.5) / 2)
    marked = [line for line in run.table().splitlines() if line.rstrip().endswith("!")]
    assert len(marked) == run.num_off == 2  # the last one is 13 ms off, which is noise
    said = "the median request took 1.85 times its predicted time; 2 of 4 took twice their prediction or half of it"
    assert said in run.table()
    assert said in run.html()

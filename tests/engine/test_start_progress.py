"""The progress of an engine's start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from kvist.engine.assembly import in_tenths, warm_up
from kvist.plan.batch import Batch


def test_a_share_is_reported_once_for_each_tenth_of_each_stage() -> None:
    shown: list[str] = []
    report = in_tenths(shown.append)
    for num_done in range(1, 26):
        report("loading weights", num_done, 25)
    for num_done in range(3):
        report("capturing CUDA graphs", num_done, 2)
    assert shown[:11] == [f"loading weights {10 * tenth}%" for tenth in range(11)]
    assert shown[11:] == [f"capturing CUDA graphs {share}%" for share in (0, 50, 100)]


def test_the_warm_up_reports_its_share_before_each_step_and_at_its_end() -> None:
    seen: list[str | Batch] = []

    def launch(batch: Batch) -> SimpleNamespace:
        seen.append(batch)
        return SimpleNamespace(result=lambda: None)

    runner = SimpleNamespace(launch=launch, pool=SimpleNamespace(layout=SimpleNamespace(page_size=16)))
    warm_up(cast(Any, runner), seen.append)
    assert seen[::2] == [f"warming up {share}%" for share in (0, 20, 50, 70, 100)]
    batches = [each for each in seen[1::2] if isinstance(each, Batch)]
    assert [sum(len(item.token_ids) for item in batch.items) for batch in batches] == [0, 15, 1, 0]

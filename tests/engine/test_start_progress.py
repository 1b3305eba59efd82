"""The progress of an engine's start."""

from __future__ import annotations

from kvist.engine.assembly import in_tenths


def test_a_share_is_reported_once_for_each_tenth() -> None:
    shown: list[str] = []
    report = in_tenths("loading weights", shown.append)
    for num_done in range(1, 26):
        report(num_done, 25)
    assert shown == [f"loading weights {10 * tenth}%" for tenth in range(11)]

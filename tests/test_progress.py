"""The progress of one start, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from kvist import progress
from kvist.progress import REPORT_INTERVAL_S, StartProgress, with_bar
from kvist.testing.clocks import FakeClock


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("loading weights 0%", "loading weights ░░░░░░░░░░░░░░░░░░░░ 0%"),
        ("decode: loading weights 45%", "decode: loading weights █████████░░░░░░░░░░░ 45%"),
        ("downloading a/b (1.2 GB) 100%", "downloading a/b (1.2 GB) ████████████████████ 100%"),
        ("warming up", "warming up"),
        ("ready", "ready"),
    ],
)
def test_a_share_is_a_bar(text: str, shown: str) -> None:
    assert with_bar(text) == shown


def test_without_a_terminal_each_stage_is_one_line_and_a_long_one_several(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(progress, "MonotonicClock", lambda: clock)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show = StartProgress()
    with caplog.at_level(logging.INFO):
        for text in ("loading weights 0%", "loading weights 10%"):
            show(text)
        clock.advance(REPORT_INTERVAL_S)
        for text in ("loading weights 20%", "loading weights 30%", "warming up"):
            show(text)
    assert caplog.messages == ["loading weights", "loading weights 20%", "warming up"]

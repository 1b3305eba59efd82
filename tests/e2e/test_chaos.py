"""A short run of bench/chaos.py: every process of a small cluster dies, hangs and is restarted under load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chaos
from tests.budget import budget

SECONDS, SEED = budget(25, long=120), 5


@pytest.mark.timeout(600)
def test_streams_survive_a_short_run_of_chaos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two gateways and a worker of each role, host tiers and a common store; each role is once dead as a whole."""
    small = ["--prefill=1", "--decode=1", "--unified=1", "--cases=30", "--streams=5", "--pause-s=0.5"]
    run = [f"--seconds={SECONDS}", "--interval-s=2", f"--seed={SEED}", "--blackouts", "--tiers", "--verbose"]
    status = chaos.main([*small, *run, f"--json={tmp_path / 'report.json'}", f"--keep={tmp_path / 'logs'}"])
    output = capsys.readouterr()
    assert status == 0, output.out + output.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["streams"] >= 10, output.out
    assert report["kills"] >= 3, output.out

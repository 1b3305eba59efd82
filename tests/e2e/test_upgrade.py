"""`kvist upgrade` replaces a whole cluster under load: no error, no wrong token, and the pages are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import bench_upgrade

NEW_VERSION = "99.0"
# another version: this one, under another number
PYTHON = f"""#!{sys.executable}
import runpy, sys
import kvist
kvist.__version__ = {NEW_VERSION!r}
sys.argv = sys.argv[2:]  # without the interpreter and -m
runpy.run_module("kvist", run_name="__main__")
"""
MAX_PAUSE_S = 10.0  # seconds on an idle machine: 0.2


def test_every_process_is_replaced_under_load_without_an_error_or_a_wrong_token_and_pages_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prefill and decode keep their pages in folders, so each of them stops before its successor starts."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o700)
    small = ["--persist", "--streams=3", "--pause-s=0.8", "--cases=9", "--max-tokens=16-96"]
    files = [f"--json={tmp_path / 'report.json'}", f"--keep={tmp_path / 'logs'}"]
    status = bench_upgrade.main([*small, *files, f"--python={python}"])
    output = capsys.readouterr()
    assert status == 0, output.out + output.err + (tmp_path / "logs" / "up.log").read_text()[-20000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["streams"] >= 10, output.out
    assert report["longest_pause_s"] < MAX_PAUSE_S, output.out
    rows = {row[0]: row for row in map(str.split, report["report"].splitlines()) if row[2:3] == [NEW_VERSION]}
    assert list(rows) == ["prefill-0", "decode-0", "router"], output.out
    assert all(int(rows[name][4]) > 0 for name in ("prefill-0", "decode-0")), "pages are kept"
    assert rows["router"][4] == "-"

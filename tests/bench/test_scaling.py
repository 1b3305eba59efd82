"""bench/bench_scaling.py: which cells there are, what the tables say, and a rehearsal with tiny models."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scaling_plan
from scaling_plan import FULL, SHAPES, TINY, Fleet, all_cells, choose, obstacle, pair_cells, splits, weight_bytes
from scaling_table import efficiency

SCRIPT = Path(__file__).parents[2] / "bench/bench_scaling.py"
H200_BYTES = 143_771 << 20


def test_the_splits_of_each_host_are_those_of_the_docs() -> None:
    assert {count: sorted(splits(count)) for count in (1, 2, 4, 8)} == {
        1: [(1, 1)],
        2: [(1, 1)],
        4: [(1, 3), (2, 2), (3, 1)],
        8: [(2, 6), (4, 4), (6, 2)],
    }


@pytest.mark.parametrize("num_places", [1, 2, 4, 8])
def test_cells_have_names_of_their_own_and_fit_the_host(num_places: int) -> None:
    cells = [*all_cells(num_places), *pair_cells()]
    assert len({cell.name for cell in cells}) == len({(cell.fleet, cell.load) for cell in cells})
    assert len({cell.name for cell in all_cells(num_places)}) == len(all_cells(num_places))
    for cell in all_cells(num_places):
        if cell.fleet is not None:
            assert cell.fleet.num_workers * cell.fleet.tp == max(cell.fleet.places, 2 if cell.fleet.decode else 1)
    tp = {(cell.fleet.tp, cell.fleet.model) for cell in cells if cell.fleet is not None}
    assert {size for size, model in tp if model == "72b"} == {1, 2, 4, 8} & set(range(num_places + 1))


def test_cells_of_one_fleet_follow_one_another() -> None:
    names = [cell.name.partition("/")[0] for cell in all_cells(8)]
    starts = [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    assert len(starts) == len(set(starts))


def test_a_search_comes_before_the_loads_that_need_its_result() -> None:
    known: set[str] = set()
    for cell in all_cells(4):
        if cell.fleet is not None and cell.load.kind == "search":
            known.add(cell.fleet.model)
        if cell.fleet is not None and cell.load.needs_reference:
            assert cell.fleet.model in known, cell.name


def test_cells_are_chosen_by_preset_fleet_and_pattern() -> None:
    assert choose(["pair"], 2) == pair_cells()
    assert [cell.name for cell in choose(["links"], 2)] == ["links/handoff", "links/all_reduce"]
    assert [cell.name for cell in choose(["split-1:1/single", "pair"], 2)].count("split-1:1/single") == 1
    with pytest.raises(ValueError, match="'slpit' names no cell"):
        choose(["slpit"], 2)


def test_the_pair_takes_less_than_nine_minutes_on_gpus_with_its_starts() -> None:
    loads_s = sum(cell.load.estimate_s(FULL) for cell in pair_cells())
    starts_s = {cell.fleet: cell.fleet.start_s(FULL) + 6 for cell in pair_cells() if cell.fleet is not None}
    assert len(starts_s) == 3
    assert loads_s + sum(starts_s.values()) < 9 * 60


def _config(shape: str, folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((scaling_plan.write_shape(folder, shape) / "config.json").read_text())
    return read


def test_weights_that_do_not_fit_are_a_reason_to_skip(tmp_path: Path) -> None:
    small, large = (_config(shape, tmp_path / shape) for shape in ("7b", "72b"))
    assert weight_bytes(small) == pytest.approx(15.2e9, rel=0.01)
    assert weight_bytes(large) == pytest.approx(145e9, rel=0.01)
    whole = Fleet(name="x", unified=1, model="72b")
    why = obstacle(whole, large, num_places=2, place_bytes=H200_BYTES)
    assert why is not None
    assert "145 GB" in why
    assert obstacle(dataclasses.replace(whole, tp=2), large, num_places=2, place_bytes=H200_BYTES) is None
    assert obstacle(Fleet(name="x", prefill=1, decode=1), small, num_places=1, place_bytes=H200_BYTES) is None
    crowded = Fleet(name="x", unified=8)
    assert obstacle(crowded, small, num_places=1, place_bytes=H200_BYTES) is not None
    assert obstacle(dataclasses.replace(whole, unified=0, tp=4), large, num_places=2, place_bytes=None) is not None
    assert set(SHAPES) == {"7b", "72b", "tiny", "tiny72b"}


def _served(fleet: str, gpus: int, load: str, kind: str, value: float) -> dict[str, Any]:
    summary = {"output_tokens_per_s": value, "goodput": {"share": 0.5}}
    point = {"summary": summary, "rate": 2 * value}
    return {
        f"{fleet}/{load}": {"fleet": {"model": "7b"}, "gpus": gpus, "load": {"kind": kind}, "points": [point, point]}
    }


@given(st.floats(1, 1e6), st.integers(2, 8))
def test_workers_as_fast_as_one_alone_have_an_efficiency_of_one(rate: float, gpus: int) -> None:
    served = {
        **_served("unified-x1", 1, "offline", "offline", rate),
        **_served(f"unified-x{gpus}", gpus, "offline", "offline", gpus * rate),
        **_served("unified-x1", 1, "climb", "climb", rate),
        **_served(f"unified-x{gpus}", gpus, "mixed@80%", "mixed", gpus * rate / 2),
    }
    _, line = efficiency(served)
    assert line.startswith(f"unified-x{gpus}: ")
    assert "offline 100.0%" in line
    assert "best goodput 50.0%" in line


def _run(*arguments: str) -> tuple[str, dict[str, Any]]:
    path = next(word.partition("=")[2] for word in arguments if word.startswith("--json="))
    command = [sys.executable, str(SCRIPT), "--cpu", "--tiny", "--seconds=1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(Path(path).read_bytes())


@pytest.mark.timeout(600)
def test_a_rehearsal_runs_its_cells_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    chosen = (
        "--cells",
        "auto-1:1/search",
        "auto-1:1/mixed@80%",
        "auto-1:1/offline",
        "links/handoff",
        "unified-x2/climb",
    )
    shown, found = _run(f"--json={first}", "--budget-s=300", *chosen[:-1])
    assert {name: cell["status"] for name, cell in found["cells"].items()} == dict.fromkeys(chosen[1:-1], "done"), shown
    load = found["cells"]["auto-1:1/mixed@80%"]["points"][0]
    assert load["rate"] == pytest.approx(0.8 * found["best_goodput"]["7b"])
    assert load["router_cpu_s"] > 0
    assert sum(load["summary"]["routes"].values()) == load["summary"]["num_requests"]
    assert found["cells"]["links/handoff"]["links"]["at_once_gb_per_s"].keys() == {"0-1", "1-0"}
    assert "all pairs at once" in shown
    shown, again = _run(f"--json={second}", f"--resume={first}", "--budget-s=1", *chosen)
    assert again["cells"] == found["cells"]
    assert "not measured, for lack of time (--resume FILE measures them): unified-x2/climb" in shown


@pytest.mark.timeout(400)
def test_a_fleet_that_does_not_start_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    flags = ("--cells", "unified-x1/single", "links/all_reduce", "--places=1", "--up-flags=--page-size=0")
    shown, found = _run(f"--json={tmp_path / 'file.json'}", "--budget-s=300", *flags)
    assert {name: cell["status"] for name, cell in found["cells"].items()} == dict.fromkeys(flags[1:3], "failed")
    assert "--page-size" in found["cells"]["unified-x1/single"]["why"]
    assert "needs two places" in shown


def test_tiny_loads_fit_the_tiny_model() -> None:
    longest = max(TINY.book, TINY.long, (TINY.turn[0] * TINY.num_rounds, TINY.turn[1] * TINY.num_rounds))
    assert sum(longest) < 2048

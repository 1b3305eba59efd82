"""Figures follow from rows; failed requests are counted, and left out of the times and rates."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.bench import report as reports
from kvist.bench.completions import Row
from kvist.bench.config import OfflineConfig, Scenario
from kvist.bench.drive import ClientLoad, Measured
from kvist.bench.report import Report, Run, distribution, summarise, table, warnings_of

IDLE = ClientLoad(cpu_s=0.1, lags_s=[0.0, 0.001], num_connections=2, num_retries=1)


def good(index: int, *, cached: int | None = 25, ttft_s: float = 0.1) -> Row:
    return Row(
        index=index,
        num_input=100,
        num_output=11,
        sent_s=0.0,
        ttft_s=ttft_s,
        tpot_s=0.01,
        e2e_s=ttft_s + 0.1,
        num_prompt_tokens=100,
        num_cached_tokens=cached,
        num_output_tokens=11,
        num_events=11,
    )


def bad(index: int, kind: str = "timeout") -> Row:
    return Row(index=index, num_input=100, num_output=11, sent_s=0.0, failure=kind, message="no")


def measured(*rows: Row, client: ClientLoad = IDLE) -> Measured:
    scenario = Scenario(name="offline", kind="offline", load=OfflineConfig())
    gaps_s = [[0.01] * 10 if row.failure is None else [] for row in rows]
    return Measured(scenario=scenario, answer_source=None, rows=list(rows), gaps_s=gaps_s, wall_s=2.0, client=client)


def run_of(*rows: Row, kind: str = "offline", client: ClientLoad = IDLE) -> Run:
    summary = summarise(measured(*rows, client=client))
    return Run(
        name=kind,
        kind=kind,
        settings={"seed": 0},
        summary=summary,
        warnings=warnings_of(summary, kind),
        rows=list(rows),
    )


def test_percentiles_are_interpolated_between_neighbours() -> None:
    found = distribution([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.max) == (4, 2.5, 2.5, 4.0)
    assert (found.p90, found.p99) == (pytest.approx(3.7), pytest.approx(3.97))
    assert distribution([]) is None


@given(st.lists(st.sampled_from(["ok", "http_429", "timeout", "cut"]), max_size=30))
def test_every_row_is_a_success_or_a_failure_of_one_kind(kinds: list[str]) -> None:
    rows = [good(index) if kind == "ok" else bad(index, kind) for index, kind in enumerate(kinds)]
    summary = summarise(measured(*rows))
    assert summary.num_requests == len(kinds)
    assert summary.num_succeeded == kinds.count("ok")
    assert summary.failures == {kind: kinds.count(kind) for kind in set(kinds) - {"ok"}}
    assert (summary.ttft_s.count if summary.ttft_s else 0) == kinds.count("ok")


def test_throughput_counts_cached_input_and_reports_computed_input() -> None:
    summary = summarise(measured(good(0), good(1), bad(2)))
    assert summary.input_tokens_per_s == 200 / 2.0
    assert summary.computed_tokens_per_s == 150 / 2.0
    assert summary.output_tokens_per_s == 22 / 2.0
    assert summary.hit_rate == 50 / 200
    assert summary.client_cpu_s_per_token == pytest.approx(0.1 / 22)


def test_the_hit_rate_is_unknown_if_one_answer_does_not_report_it() -> None:
    summary = summarise(measured(good(0), good(1, cached=None)))
    assert summary.hit_rate is None
    assert summary.computed_tokens_per_s is None
    assert "not reported by the server" in table(run_of(good(0, cached=None)))


def test_the_report_warns_of_failures_a_busy_client_and_a_warm_cache() -> None:
    busy = ClientLoad(cpu_s=1.9, lags_s=[0.02] * 9, num_connections=1, num_retries=0)
    told = "\n".join(run_of(good(0), bad(1, "http_429"), bad(2, "http_429"), client=busy).warnings)
    assert "2 requests failed (2 http_429)" in told
    assert "the client was the limit: it used 95%" in told
    assert "20.0 ms late" in told
    assert "25% of the prompt tokens were cached" in told
    assert run_of(good(0, cached=0)).warnings == []
    assert run_of(good(0, cached=60), kind="multiturn").warnings == []


def test_the_report_warns_of_late_arrivals() -> None:
    late = msgspec.structs.replace(good(0, cached=0), late_s=0.5)
    assert any("500.0 ms after their planned time" in warning for warning in run_of(late).warnings)


def test_a_run_without_a_single_answer_has_a_table_too() -> None:
    shown = table(run_of(bad(0), bad(1)))
    assert "0 of 2 requests answered" in shown
    assert "2 timeout" in shown
    assert "the first timeout: no" in shown


def test_ratios_stand_beside_the_figures() -> None:
    shown = table(run_of(good(0, ttft_s=0.05)), run_of(good(0, ttft_s=0.1)))
    assert "50.00 ×0.50" in shown  # TTFT
    assert "10.00 ×1.00" in shown  # TPOT
    assert "×" not in table(run_of(good(0)))


def test_a_report_survives_its_file_and_other_files_are_refused() -> None:
    report = Report(commit=None, version="1", hardware={"cores": 2}, settings={}, runs=[run_of(good(0), bad(1))])
    assert reports.decode(reports.encode(report)) == report
    for other in (b"", b"[]", b'{"format": "kvist-bench-0"}', reports.encode(report).replace(b"bench-1", b"bench-2")):
        with pytest.raises(msgspec.DecodeError):
            reports.decode(other)


def test_settings_that_differ_from_the_baseline_are_named() -> None:
    run = run_of(good(0))
    other = msgspec.structs.replace(run, settings={"seed": 1})
    assert reports.differences(run, run) == []
    assert reports.differences(run, other) == ["seed 1 → 0"]

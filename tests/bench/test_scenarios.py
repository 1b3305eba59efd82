"""Runs whole scenarios against a server on a real socket; checks requests, concurrency and the written files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvist.bench import report as reports
from kvist.bench.config import (
    CustomConfig,
    Load,
    MultiturnConfig,
    OfflineConfig,
    RateConfig,
    SingleConfig,
    TargetConfig,
)
from kvist.bench.report import Report
from kvist.bench.verbs import read_scenarios, run_custom, run_scenario
from kvist.errors import ConfigError, Unavailable
from tests.bench.fake_server import Behaviour, FakeServer, answer_ids

SMALL = MultiturnConfig(clients=5, rounds=3, parallel=2, input_tokens="6", output_tokens="4")


@pytest.fixture
def target(server: FakeServer, tmp_path: Path) -> TargetConfig:
    return TargetConfig(base_url=server.url, warmup=0, json_path=tmp_path / "out.json", request_timeout_s=60.0)


def run(kind: str, load: Load, target: TargetConfig) -> tuple[int, Report]:
    status = run_scenario(kind, load, target)
    assert target.json_path is not None
    return status, reports.decode(target.json_path.read_bytes())


def test_default_options_equal_the_definitions_in_the_docs() -> None:
    single, offline, rate, turns = SingleConfig(), OfflineConfig(), RateConfig(), MultiturnConfig()
    assert (single.input_tokens, single.output_tokens) == ("128", "256")
    assert (offline.requests, offline.parallel) == (256, None)
    assert (offline.input_tokens, offline.output_tokens) == ("100-1024", "100-1024")
    assert (rate.rate, rate.requests, rate.input_tokens, rate.output_tokens) == (8.0, 120, "2048", "128")
    assert (turns.clients, turns.rounds, turns.parallel) == (80, 4, 16)
    assert (turns.input_tokens, turns.output_tokens) == ("2048", "64")
    assert TargetConfig().seed == 0


def test_single_sends_one_after_another_on_one_connection(
    server: FakeServer, target: TargetConfig, tmp_path: Path
) -> None:
    drawn = dataclasses.replace(target, plot=tmp_path / "picture.svg")
    status, report = run("single", SingleConfig(requests=3, input_tokens="8", output_tokens="4"), drawn)
    assert status == 0
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8").count("<circle") == 3
    assert server.max_in_flight == 1
    assert server.num_connections == 1
    assert [len(prompt) for prompt in server.prompts] == [8, 8, 8]
    assert len({tuple(prompt) for prompt in server.prompts}) == 3
    assert [row.num_output_tokens for row in report.runs[0].rows] == [4, 4, 4]


def test_offline_has_all_requests_in_flight_at_once(server: FakeServer, target: TargetConfig) -> None:
    server.default = Behaviour(until_in_flight=20)
    _, report = run("offline", OfflineConfig(requests=20, input_tokens="5-9", output_tokens="3-6"), target)
    assert server.max_in_flight == 20
    rows = report.runs[0].rows
    assert [row.index for row in rows] == list(range(20))
    assert {row.num_input for row in rows} <= set(range(5, 10))
    assert len({row.num_output for row in rows}) > 1


def test_offline_keeps_to_its_limit(server: FakeServer, target: TargetConfig) -> None:
    server.default = Behaviour(until_in_flight=3)
    run("offline", OfflineConfig(requests=9, parallel=3, input_tokens="5", output_tokens="3"), target)
    assert server.max_in_flight == 3
    assert len(server.received) == 9


def test_the_same_seed_sends_the_same_prompts_and_another_seed_others(server: FakeServer, target: TargetConfig) -> None:
    load = OfflineConfig(requests=4, parallel=1, input_tokens="5-50", output_tokens="3")
    for seed in (0, 0, 1):
        run("offline", load, replace(target, seed=seed))
    first, second, third = server.prompts[:4], server.prompts[4:8], server.prompts[8:]
    assert first == second
    assert first != third


def test_arrivals_do_not_wait_for_answers(server: FakeServer, target: TargetConfig) -> None:
    server.default = Behaviour(until_in_flight=12)
    _, report = run("rate", RateConfig(requests=12, rate=400.0, input_tokens="5", output_tokens="4"), target)
    assert server.max_in_flight == 12
    sent = [row.sent_s for row in report.runs[0].rows]
    assert sent == sorted(sent, key=lambda time_s: time_s or 0.0)
    assert max(time_s or 0.0 for time_s in sent) > 0.005


def test_a_turn_sends_the_whole_conversation_with_the_servers_own_answers(
    server: FakeServer, target: TargetConfig
) -> None:
    server.behaviours = [Behaviour()]  # for the probe
    server.default = Behaviour(until_in_flight=2)
    status, report = run("multiturn", SMALL, target)
    assert status == 0
    assert server.max_in_flight == 2
    _, *prompts = server.prompts  # the first one asked whether the server gives ids
    assert len(prompts) == 15
    for prompt in prompts:
        if len(prompt) > 6:
            before = prompt[: len(prompt) - 6 - 4]
            assert before in prompts
            assert prompt[len(before) : len(before) + 4] == answer_ids(before, 4)
    rows = report.runs[0].rows
    assert [(row.client, row.turn) for row in rows] == [(client, turn) for client in range(5) for turn in range(3)]
    assert [row.num_prompt_tokens for row in rows[:3]] == [6, 16, 26]
    assert report.runs[0].settings["answers"] == "server"


@pytest.mark.parametrize("behaviour", [Behaviour(knows_ids=False), Behaviour(status=400)], ids=["ignores", "refuses"])
def test_drawn_ids_replace_the_answer_if_the_server_gives_none(
    server: FakeServer, target: TargetConfig, behaviour: Behaviour
) -> None:
    server.behaviours = [behaviour]
    server.default = Behaviour(knows_ids=False)
    status, report = run("multiturn", SMALL, target)
    assert (status, report.runs[0].settings["answers"]) == (0, "drawn")
    longest = max(server.prompts, key=len)
    assert len(longest) == 26
    assert longest[6:10] != answer_ids(longest[:6], 4)
    assert all("return_token_ids" not in request.body for request in server.received[1:])


def test_answers_server_requires_the_servers_ids(server: FakeServer, target: TargetConfig) -> None:
    server.default = Behaviour(knows_ids=False)
    with pytest.raises(Unavailable, match="gives no token ids"):
        run_scenario("multiturn", replace(SMALL, answers="server"), target)


def test_a_conversation_that_fails_has_its_other_turns_counted_as_failures(
    server: FakeServer, target: TargetConfig
) -> None:
    server.behaviours = [Behaviour(), Behaviour(), Behaviour(status=503)]  # the probe, a good turn, a bad one
    load = replace(SMALL, parallel=1)
    status, report = run("multiturn", load, target)
    summary = report.runs[0].summary
    assert status == 1
    assert summary.num_requests == 15
    assert summary.failures["http_503"] == 1
    failed = next(row for row in report.runs[0].rows if row.failure == "http_503")
    assert failed.turn is not None
    assert summary.failures.get("not_sent", 0) == 2 - failed.turn
    assert summary.num_succeeded == 15 - 1 - (2 - failed.turn)
    skipped = [row for row in report.runs[0].rows if row.failure == "not_sent"]
    assert all(row.sent_s is None and row.client == failed.client for row in skipped)


def test_warm_up_requests_are_sent_first_and_not_counted(server: FakeServer, target: TargetConfig) -> None:
    load = SingleConfig(requests=2, input_tokens="8", output_tokens="4")
    _, report = run("single", load, replace(target, warmup=3))
    assert len(server.received) == 5
    assert len(report.runs[0].rows) == 2
    warm, measured = server.prompts[:3], server.prompts[3:]
    assert not {tuple(prompt) for prompt in warm} & {tuple(prompt) for prompt in measured}


def test_a_server_that_answers_no_warm_up_request_is_not_measured(server: FakeServer, target: TargetConfig) -> None:
    server.default = Behaviour(status=404)
    with pytest.raises(Unavailable, match="every warm-up request failed"):
        run_scenario("single", SingleConfig(), replace(target, warmup=2))
    assert target.json_path is not None
    assert not target.json_path.exists()


def test_failures_set_the_status_and_stay_in_the_file(
    server: FakeServer, target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviours = [Behaviour(status=429), Behaviour(cut_after_events=1)]
    status, report = run("single", SingleConfig(requests=4, input_tokens="8", output_tokens="4"), target)
    assert status == 1
    assert report.runs[0].summary.failures == {"cut": 1, "http_429": 1}
    assert "2 requests failed (1 cut, 1 http_429)" in capsys.readouterr().out


def test_the_json_file_names_commit_and_settings_but_no_secret(server: FakeServer, target: TargetConfig) -> None:
    _, report = run("single", SingleConfig(requests=1), replace(target, api_key="hush"))
    assert "hush" not in reports.encode(report).decode()
    assert report.settings["base_url"] == server.url
    assert report.runs[0].settings["model"] == "fake"  # the first of /v1/models
    assert report.hardware["cores"]
    row = json.loads(reports.encode(report))["runs"][0]["rows"][0]
    assert {"ttft_s", "tpot_s", "e2e_s", "num_cached_tokens", "failure"} <= set(row)


def test_a_baseline_gives_ratios_and_names_differing_settings(
    target: TargetConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    load = SingleConfig(requests=1, input_tokens="8", output_tokens="4")
    run("single", load, target)
    before = replace(target, baseline=target.json_path, json_path=tmp_path / "second.json")
    capsys.readouterr()
    run("single", replace(load, output_tokens="5"), before)
    shown = capsys.readouterr().out
    assert "×" in shown
    assert "output_tokens 4 → 5" in shown
    run("offline", OfflineConfig(requests=1, input_tokens="8", output_tokens="4"), before)
    assert "no run named 'offline'" in capsys.readouterr().out


def test_a_baseline_with_failures_is_reported(
    server: FakeServer, target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviours = [Behaviour(status=429)]
    load = SingleConfig(requests=3, input_tokens="8", output_tokens="4")
    run("single", load, target)
    capsys.readouterr()
    assert run("single", load, replace(target, baseline=target.json_path))[0] == 0
    assert "1 requests of the baseline failed" in capsys.readouterr().out


def test_unusable_files_are_refused_before_anything_is_sent(
    server: FakeServer, target: TargetConfig, tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_text("{}")
    for wrong in (
        replace(target, baseline=tmp_path / "other.json"),
        replace(target, baseline=tmp_path / "none.json"),
        replace(target, json_path=tmp_path / "no" / "such" / "folder.json"),
    ):
        with pytest.raises(ConfigError, match=r"--(baseline|json)"):
            run_scenario("single", SingleConfig(), wrong)
    assert server.received == []


def test_custom_scenarios_run_in_order_each_with_its_own_settings(server: FakeServer, target: TargetConfig) -> None:
    file = target.json_path
    assert file is not None
    scenarios = [
        {"scenario": "single", "name": "one", "requests": 1, "input_tokens": 7, "output_tokens": "2"},
        {"scenario": "offline", "requests": 2, "input_tokens": "3-4", "output_tokens": 2},
    ]
    file.with_name("mine.json").write_text(json.dumps(scenarios))
    assert run_custom(CustomConfig(file=file.with_name("mine.json")), target) == 0
    report = reports.decode(file.read_bytes())
    assert [(run.name, run.kind, len(run.rows)) for run in report.runs] == [
        ("one", "single", 1),
        ("2 offline", "offline", 2),
    ]
    assert len(server.prompts[0]) == 7


def test_scenarios_of_one_file_never_send_the_same_prompt(
    server: FakeServer, target: TargetConfig, tmp_path: Path
) -> None:
    lengths = {"input_tokens": 9, "output_tokens": 2}
    scenarios = [
        {"scenario": "single", "requests": 4, **lengths},
        {"scenario": "offline", "requests": 4, **lengths},
        {"scenario": "multiturn", "clients": 4, "rounds": 1, **lengths},
    ]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(scenarios))
    assert run_custom(CustomConfig(file=file), replace(target, warmup=2)) == 0
    prompts = [tuple(prompt) for prompt in server.prompts if len(prompt) == 9]
    assert len(prompts) == 3 * (2 + 4)
    assert len({prompt[:2] for prompt in prompts}) == len(prompts)
    first = server.prompts[2:6]
    server.received.clear()
    run("single", SingleConfig(requests=4, input_tokens="9", output_tokens="2"), target)
    assert server.prompts == first, "the first scenario of a file is the one of its verb"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "JSON list"),
        ("[", "mine.json"),
        ('[{"scenario": "ofline"}]', "did you mean offline"),
        ('[{"scenario": "rate", "rte": 3}]', "scenario 1.*--rate"),
        ('[{"scenario": "rate", "rate": -3}]', "scenario 1.*--rate"),
        ('[{"scenario": "rate", "input_tokens": "many"}]', "scenario 1.*--input-tokens"),
        ('[{"scenario": "rate", "name": "a"}, {"scenario": "single", "name": "a"}]', "same name"),
    ],
)
def test_errors_in_a_scenario_file_name_the_scenario(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_scenarios(tmp_path / "mine.json")


def test_the_ceiling_is_the_hit_rate_of_a_cache_without_eviction(
    target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    load = MultiturnConfig(clients=6, rounds=5, parallel=3, input_tokens="500", output_tokens="20", page_size=4)
    _, report = run("multiturn", load, target)
    ceiling = report.runs[0].summary.hit_rate_ceiling
    assert ceiling == pytest.approx((5 - 1) / (5 + 1), abs=0.02)
    shown = next(line for line in capsys.readouterr().out.splitlines() if "at most" in line)
    assert f"{ceiling:.1%}" in shown
    turns = [row.num_ceiling_tokens for row in report.runs[0].rows[:3]]
    assert turns == [0, 516, 1036]  # all but the page of the answer's last token, whose K/V was not computed


def test_drawn_answers_do_not_count_as_cached(target: TargetConfig) -> None:
    load = replace(SMALL, answers="drawn", page_size=3)
    _, report = run("multiturn", load, target)
    assert [row.num_ceiling_tokens for row in report.runs[0].rows[:3]] == [0, 6, 15]  # of 6, 16 and 26 tokens
    assert (
        run("single", SingleConfig(requests=1, input_tokens="8", output_tokens="4"), target)[1]
        .runs[0]
        .summary.hit_rate_ceiling
        is None
    )


def test_the_report_warns_of_more_hits_than_the_ceiling(
    server: FakeServer, target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    server.default = Behaviour(cached_tokens=6)
    run("multiturn", SMALL, target)
    assert "more tokens were cached than this run had sent" in capsys.readouterr().out


def test_only_kvist_servers_are_asked_for_hits_by_tier(
    server: FakeServer, target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    server.default = Behaviour(cached_tokens=4, cached_by_tier={"device": 3, "host": 1})
    server.model = {"id": "fake", "owned_by": "somebody"}
    _, report = run("multiturn", SMALL, target)
    assert report.runs[0].summary.hit_rate_by_tier is None
    assert not any("kvist" in request.body for request in server.received)
    server.model = {"id": "fake", "owned_by": "kvist"}
    _, report = run("multiturn", SMALL, target)
    summary = report.runs[0].summary
    assert summary.hit_rate is not None
    assert summary.hit_rate_by_tier == pytest.approx({"device": summary.hit_rate * 3 / 4, "host": summary.hit_rate / 4})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown if "of that" in line] == [
        ["of", "that", "device", f"{summary.hit_rate * 3 / 4:.1%},", "host", f"{summary.hit_rate / 4:.1%}"]
    ]

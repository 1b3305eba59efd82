"""`kvist bench mixed`: chats with long prompts among them, figures by class, goodput, and Kvist's own reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.bench import report as reports
from kvist.bench.completions import Row
from kvist.bench.config import CustomConfig, MixedConfig, SingleConfig, TargetConfig
from kvist.bench.goodput import count_good, parse_limits
from kvist.bench.report import Run
from kvist.bench.verbs import read_scenarios, run_custom, run_scenario
from kvist.errors import ConfigError, Unavailable
from tests.bench.fake_server import Behaviour, FakeServer

SMALL = MixedConfig(
    requests=8,
    rate=400.0,
    input_tokens="5-9",
    output_tokens="6",
    long_every=4,
    long_input_tokens="40",
    long_output_tokens="3",
)


@pytest.fixture
def target(server: FakeServer, tmp_path: Path) -> TargetConfig:
    return TargetConfig(base_url=server.url, warmup=0, json_path=tmp_path / "out.json", request_timeout_s=60.0)


def run(load: MixedConfig, target: TargetConfig) -> tuple[int, Run]:
    status = run_scenario("mixed", load, target)
    assert target.json_path is not None
    return status, reports.decode(target.json_path.read_bytes()).runs[0]


def test_default_options_equal_the_definition_in_the_docs() -> None:
    load = MixedConfig()
    assert (load.input_tokens, load.output_tokens) == ("512", "256")
    assert (load.long_every, load.long_input_tokens, load.long_output_tokens) == (4, "8192", "128")
    assert (load.rate, load.goodput) == (6.0, ("chat.ttft:500", "itl:25"))


def test_the_last_of_every_four_requests_has_the_long_prompt(server: FakeServer, target: TargetConfig) -> None:
    server.default = Behaviour(until_in_flight=8)  # arrivals do not wait for answers
    status, found = run(SMALL, target)
    assert status == 0
    assert [row.request_class for row in found.rows] == ["chat", "chat", "chat", "long"] * 2
    assert [row.num_output_tokens for row in found.rows] == [6, 6, 6, 3] * 2
    lengths = [row.num_prompt_tokens or 0 for row in found.rows]
    assert (lengths[3], lengths[7]) == (40, 40)
    assert {5, 6, 7, 8, 9} >= {*lengths[:3], *lengths[4:7]}
    sent = [row.sent_s or 0.0 for row in found.rows]
    assert sent == sorted(sent)


def test_the_same_seed_sends_the_same_load(server: FakeServer, target: TargetConfig) -> None:
    for seed in (0, 0, 1):
        run(SMALL, replace(target, seed=seed))
    first, second, third = (sorted(server.prompts[start : start + 8]) for start in (0, 8, 16))
    assert first == second
    assert first != third


@pytest.mark.parametrize(("long_every", "num_long"), [(0, 0), (1, 8), (3, 2)])
def test_long_every_sets_the_share_of_long_prompts(target: TargetConfig, long_every: int, num_long: int) -> None:
    _, found = run(replace(SMALL, long_every=long_every), target)
    assert sum(row.num_prompt_tokens == 40 for row in found.rows) == num_long
    assert {*found.summary.classes} == {row.request_class for row in found.rows}


def test_seconds_limit_the_arrivals_instead_of_a_number(target: TargetConfig) -> None:
    _, found = run(replace(SMALL, requests=None, seconds=0.1, rate=100.0), target)
    assert 2 <= len(found.rows) <= 40
    with pytest.raises(ConfigError, match=r"--requests and --seconds"):
        replace(SMALL, seconds=1.0)


def test_figures_are_given_by_class_and_together(
    server: FakeServer, target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviours = [Behaviour(pause_s=0.2), Behaviour(status=503)]
    status, found = run(replace(SMALL, rate=100.0, goodput=("chat.gap:150", "long.ttft:60000")), target)
    assert status == 1
    summary = found.summary
    chat, long = summary.classes["chat"], summary.classes["long"]
    assert (chat.num_requests + long.num_requests, chat.num_succeeded + long.num_succeeded) == (8, 7)
    assert (summary.failures, chat.num_requests) == ({"http_503": 1}, 6)
    assert chat.max_gap_s is not None
    assert long.itl_s is not None
    assert summary.max_gap_s is not None
    assert summary.max_gap_s.max > 0.15
    assert chat.max_gap_s.count == chat.num_succeeded
    assert long.itl_s.count == 2 * long.num_succeeded
    assert summary.goodput is not None
    assert summary.goodput.num_good == chat.num_good + long.num_good < 8
    assert summary.goodput.share == summary.goodput.num_good / 8
    assert summary.goodput.requests_per_s == pytest.approx(summary.goodput.num_good / summary.wall_s)
    shown = capsys.readouterr().out
    for label in ("chat TTFT", "chat largest gap", "long TPOT", "long ITL", "goodput: "):
        assert label in shown
    assert f"chat {chat.num_good} of 6; long {long.num_good} of 2" in shown
    assert "within chat.gap:150 long.ttft:60000" in shown


def test_handoff_parts_and_routes_are_summed_up(
    server: FakeServer, target: TargetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    server.model = {"id": "m", "owned_by": "kvist"}
    parts = {"gap_ms": 9.0, "grant_wait_ms": 1.5, "other_ms": None}
    server.default = Behaviour(report={"route": {"reason": "held", "cost_ms": None}, "handoff": None})
    server.behaviours = [
        Behaviour(report={"route": {"reason": "split", "cost_ms": 3.0}, "handoff": {"second_token": parts}}),
        Behaviour(
            report={
                "route": {"reason": "split", "cost_ms": 3.0},
                "handoff": {"second_token": parts | {"gap_ms": 19.0, "other_ms": 2.0}},
            }
        ),
    ]
    _, found = run(SMALL, replace(target, handoff_parts=True))
    assert all(request.body["kvist"] == {"usage": True, "report": True} for request in server.received)
    second = found.summary.second_token_ms
    assert found.summary.routes == {"split": 2, "held": 6}
    assert {name: (times.count, times.mean) for name, times in second.items()} == {
        "gap_ms": (2, 14.0),
        "grant_wait_ms": (2, 1.5),
        "other_ms": (1, 2.0),
    }
    shown = capsys.readouterr().out
    assert "routes: held 6, split 2" in shown
    assert next(line for line in shown.splitlines() if "2nd gap" in line).split()[2] == "14.00"


def test_handoff_parts_are_asked_of_kvist_only(server: FakeServer, target: TargetConfig) -> None:
    with pytest.raises(Unavailable, match="says that it is Kvist"):
        run_scenario("single", SingleConfig(requests=1), replace(target, handoff_parts=True))
    assert server.received == []


def test_mixed_is_a_scenario_of_custom_files(target: TargetConfig, tmp_path: Path) -> None:
    entry = {
        "scenario": "mixed",
        "name": "chats",
        "requests": 4,
        "rate": 400,
        "input_tokens": 5,
        "output_tokens": 4,
        "long_input_tokens": "30-40",
        "goodput": ["itl:25", "long.ttft:100"],
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([entry]))
    assert run_custom(CustomConfig(file=file), replace(target, request_timeout_s=60.0)) == 0
    assert target.json_path is not None
    found = reports.decode(target.json_path.read_bytes()).runs[0]
    assert (found.name, found.kind, len(found.rows)) == ("chats", "mixed", 4)
    assert found.settings["goodput"] == "itl:25 long.ttft:100"
    file.write_text(json.dumps([{**entry, "goodput": ["itl"]}]))
    with pytest.raises(ConfigError, match=r"scenario 1 \(chats\).*--goodput"):
        read_scenarios(file)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "ttft:x", "speed:5", "other.ttft:5", "-ttft:5", "ttft:5 "])
def test_invalid_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--goodput.*FIGURE:MILLISECONDS"):
        MixedConfig(goodput=(text,))


def _row(request_class: str, ttft_ms: float, gap_ms: float | None, *, failed: bool = False) -> Row:
    return Row(
        index=0,
        num_input=1,
        num_output=1,
        request_class=request_class,
        ttft_s=ttft_ms / 1e3,
        max_gap_s=None if gap_ms is None else gap_ms / 1e3,
        failure="cut" if failed else None,
    )


def test_a_limit_of_a_class_applies_to_that_class_alone() -> None:
    limits = parse_limits(["chat.ttft:500", "gap:25"])
    rows = [
        _row("chat", 499, 24),
        _row("chat", 501, 24),
        _row("chat", 499, 26),
        _row("long", 900, 24),
        _row("long", 900, 26),
        _row("chat", 1, None),
        _row("chat", 1, 1, failed=True),
    ]
    assert [count_good([row], limits) for row in rows] == [1, 0, 0, 1, 0, 1, 0]


@given(st.lists(st.tuples(st.sampled_from(["chat", "long"]), st.floats(0, 900), st.floats(0, 90))), st.integers(1, 900))
def test_one_more_limit_never_makes_more_requests_good(rows: list[tuple[str, float, float]], limit: int) -> None:
    made = [_row(*row) for row in rows]
    before = parse_limits(["gap:50"])
    assert count_good(made, [*before, *parse_limits([f"ttft:{limit}"])]) <= count_good(made, before) <= len(made)

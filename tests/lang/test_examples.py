"""The programs in examples/lang run, and give the same with and without a plan."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import kvist.lang as kv
from kvist.execution.fake_server import FAKE_PAIR, FakeServer
from kvist.planning.fleet import Role, Worker
from kvist.planning.prompt import common_length

FOLDER = Path(__file__).parents[2] / "examples" / "lang"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "texts")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    names = [request.param, "texts"]
    yield importlib.import_module(request.param)
    for name in names:
        sys.modules.pop(name, None)


def test_the_examples_are_the_seven_workloads_of_the_benchmark() -> None:
    assert len(PROGRAMS) == 7


@pytest.mark.parametrize("example", PROGRAMS, indirect=True)
def test_an_example_gives_the_same_with_and_without_a_plan(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "TOOL_S", 0.0, raising=False)
    program = getattr(example, example.__name__)
    outcomes = []
    for plan in (True, False):
        server = FakeServer()
        endpoint = kv.Endpoint(lambda server=server: server, name="fake")  # type: ignore[misc]
        states = program.run_batch(example.arguments(2), backend=endpoint, plan=plan, seed=1)
        outcomes.append([(state.text(), state.ret_value) for state in states])
        endpoint.close()
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("example", ["self_consistency"], indirect=True)
def test_the_command_line_of_an_example_runs_it_with_a_plan_or_without_one(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_backend = kv.set_default_backend
    shown = []
    for flags in ([], ["--no-plan"]):
        endpoint = kv.Endpoint(FakeServer, name="fake")
        monkeypatch.setattr(kv, "set_default_backend", lambda _url, used=endpoint: set_backend(used))
        monkeypatch.setattr(sys, "argv", ["self_consistency.py", "http://fake", "--seed=3", *flags])
        example.run_example(example.self_consistency, example.arguments(1), lambda state: state.text())
        endpoint.close()
        shown.append(capsys.readouterr().out)
    (texts_planned, plan), (texts_plain, one_by_one) = (text.split("operation  ", 1) for text in shown)
    assert texts_planned == texts_plain
    assert "one by one" in one_by_one
    assert "one by one" not in plan


@pytest.mark.parametrize("num_prefill", [1, 2])
@pytest.mark.parametrize("example", PROGRAMS, indirect=True)
def test_a_plan_of_an_example_computes_each_distinct_prefix_about_once(
    example: Any, num_prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "TOOL_S", 0.0, raising=False)
    more = [Worker(name=f"prefill-{n}", role=Role.PREFILL, max_answer_tokens=16) for n in range(1, num_prefill)]
    server = FakeServer(workers=(*FAKE_PAIR, *more))
    endpoint = kv.Endpoint(lambda: server, name="fake")
    states = getattr(example, example.__name__).run_batch(example.arguments(2), backend=endpoint, seed=1)
    endpoint.close()
    prompts = sorted(each.operation.prompt.outline for each in states[0].report.requests)
    num_chars = sum(len(text) - common_length(before, text) for before, text in pairwise(["", *prompts]))
    assert server.seen.num_computed_tokens <= 1.1 * num_chars / 4  # a token has four characters there
    assert len(server.seen.leased) <= 2, "requests that follow one another need no lease"

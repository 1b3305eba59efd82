"""The programs in examples/lang run, and give the same with and without a plan."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import kvist.lang as kv
from kvist.execution.fake_server import FakeServer

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

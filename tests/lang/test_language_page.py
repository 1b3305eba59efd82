"""Every example of docs/language.md runs, in the order of the page; what its tables name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kvist.lang as kv
from kvist.execution.fake_server import FakeServer
from kvist.lang.endpoint import _Default
from kvist.lang.program_state import ProgramState

PAGE = Path(__file__).parents[2] / "docs" / "language.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_page_run(
    endpoint: kv.Endpoint, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urls: list[str] = []
    monkeypatch.setattr(kv, "set_default_backend", urls.append)
    monkeypatch.setattr(_Default, "endpoint", endpoint)
    names: dict[str, Any] = {}
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        exec(compile(example, str(PAGE), "exec", dont_inherit=True), names)
        assert capsys.readouterr().out, "each example shows its result"
    assert urls == ["http://127.0.0.1:30000"]
    assert {"review", "largest_city", "answer"} <= names.keys()
    assert server.seen.generated


def test_the_names_of_the_page_exist() -> None:
    assert not [name for name in re.findall(r"\bkv\.(\w+)", TEXT) if not hasattr(kv, name)]
    methods = set(re.findall(r"`(?:await |with )?s\.(\w+)", TEXT))
    assert len(methods) > 8
    assert not [name for name in methods if not hasattr(ProgramState, name)]
    functions = set(re.findall(r"`f\.(\w+)", TEXT))
    assert {"run", "run_batch", "bind"} <= functions
    assert not [name for name in functions if not hasattr(kv.Function, name)]
    table = re.search(r"\| Parameter \| Meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXT)
    assert table is not None
    named = {name for row in table[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(kv.gen.__code__.co_varnames[: kv.gen.__code__.co_argcount]) - {"name"}

"""Every example of docs/testing.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/testing.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def module_of(example: str) -> str:
    return re.findall(r"from kvist\.(?:simulation|testing)\.(\w+)", example)[0]


def test_the_page_has_an_example_for_each_kind_of_fake() -> None:
    assert len({module_of(example) for example in EXAMPLES}) >= 7


@pytest.mark.parametrize("example", EXAMPLES, ids=module_of)
def test_an_example_of_the_page_runs(example: str) -> None:
    exec(compile(example, str(PAGE), "exec", dont_inherit=True), {})

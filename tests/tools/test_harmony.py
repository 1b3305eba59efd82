"""Our parser of gpt-oss's answers reads what openai-harmony reads (record_harmony.py)."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.tools.cases import parse
from tests.tools.record_harmony import RECORD

ANSWERS: list[Any] = json.loads(RECORD.read_text(encoding="utf-8"))["answers"]
FUNCTIONS = "functions."


@pytest.mark.parametrize("cut", [False, True])
def test_recorded_answers_are_read_as_openai_harmony_reads_them(cut: bool) -> None:
    draw = random.Random(3)
    kinds = set()
    for answer in ANSWERS:
        text, parts = answer["text"], {"analysis": "", "other": ""}
        calls = []
        for channel, recipient, content in answer["messages"]:
            kinds.add((channel, recipient is None))
            if recipient is not None:
                calls.append([recipient.removeprefix(FUNCTIONS), content])
            else:
                parts["analysis" if channel == "analysis" else "other"] += content
        cuts = sorted(draw.choices(range(len(text) + 1), k=5)) if cut else []
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = parse("openai", *pieces)
        assert (found.reasoning, found.content, found.calls) == (parts["analysis"], parts["other"], calls), text
        assert len(found.ended) == len(calls)
    assert kinds >= {("analysis", True), ("commentary", False), ("commentary", True), ("final", True)}

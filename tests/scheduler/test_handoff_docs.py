"""docs/handoff.md has the state machines of the code, and names only existing settings, messages and codes."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from kvist import errors, wire
from kvist.scheduler import SchedulerConfig
from kvist.scheduler.handoff.tables import (
    SOURCE_TRANSITIONS,
    TARGET_TRANSITIONS,
    SourceState,
    SourceTrigger,
    TargetState,
    TargetTrigger,
)

PAGE = (Path(__file__).parents[2] / "docs" / "handoff.md").read_text(encoding="utf-8")
DIAGRAMS = re.findall(r"```mermaid\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("index", "table"), [(0, SOURCE_TRANSITIONS), (1, TARGET_TRANSITIONS)])
def test_each_diagram_shows_exactly_the_transitions_of_its_table(
    index: int, table: Mapping[enum.Enum, Mapping[enum.Enum, enum.Enum]]
) -> None:
    drawn = set(re.findall(r"(\w+) --> (\w+) : (.+)", DIAGRAMS[index]))
    assert drawn == {
        (state.name, to.name, trigger.value) for state, row in table.items() for trigger, to in row.items()
    }
    (start,) = re.findall(r"\[\*\] --> (\w+)", DIAGRAMS[index])
    assert start == next(iter(table)).name


@pytest.mark.parametrize(
    ("states", "triggers", "table"),
    [(SourceState, SourceTrigger, SOURCE_TRANSITIONS), (TargetState, TargetTrigger, TARGET_TRANSITIONS)],
)
def test_every_state_can_close_and_every_trigger_is_used(
    states: type[enum.Enum], triggers: type[enum.Enum], table: Mapping[enum.Enum, Mapping[enum.Enum, enum.Enum]]
) -> None:
    assert set(table) == set(states)
    assert {trigger for row in table.values() for trigger in row} == set(triggers)
    for state in states:
        reached, new = set(), {state}
        while new:
            reached |= new
            new = {to for each in new for to in table[each].values()} - reached
        assert any(each.name == "CLOSED" for each in reached), f"{state.name} never closes"


def test_settings_messages_and_error_codes_that_the_page_names_exist() -> None:
    settings = {field.name for field in dataclasses.fields(SchedulerConfig)}
    named_settings = set(re.findall(r"\b\w+_timeout_s\b|\bmax_remembered_handoffs\b", PAGE))
    assert named_settings <= settings
    messages = {cls.__name__ for union in (wire.TargetToSource, wire.SourceToTarget) for cls in get_args(union)}
    assert messages == set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    codes = set(re.findall(r"Ended\(FAILED, (\w+)\)", PAGE))
    assert all(type(errors.error_from_wire(code, "")).code == code for code in codes)

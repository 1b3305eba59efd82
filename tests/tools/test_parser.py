from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.tools import TOOL_PARSERS, AnswerParser, ContentPiece, find_formats
from kvist.tools.cursor import HELD_CHARS
from kvist.tools.selection import FORMATS as TOOL_FORMATS
from tests.budget import budget
from tests.tools.cases import FOLDER, all_cases, make_parser, parse

CASES = all_cases()
NAMES = list(dict.fromkeys(form.name for form in TOOL_FORMATS))
PARTS = sorted(
    {
        *(mark for form in TOOL_FORMATS for mark in (*form.closings, *form.separators, *form.template_marks)),
        *(opening.text for form in TOOL_FORMATS for opening in form.openings),
        *("<think>", "</think>", "[THINK]", "[/THINK]", "[ARGS]", "</function>", "</parameter>", "</arg_value>"),
        *("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "<|tool_call_begin|>functions.now:0", "</arg_key>"),
        *("<|tool_call_argument_begin|>", "<parameter=city>", "<function=now>", "now", "get_weather", "city"),
        *('{"name": "now", "arguments": {}}', '{"name": "now"', ', "arguments": ', "{", "}", '"', "\\", "[", "(", ")"),
        *(
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|start|>assistant",
            "analysis",
            " to=functions.now",
            "<|constrain|>",
        ),
        *('{"city": "Oslo"}', "now()", "get_weather(city='x')", " ", "\n", "a", "é", "=", "'", "1"),
    }
)
texts = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    st.sampled_from([case["text"] for _, case in CASES]).flatmap(
        lambda text: st.tuples(
            st.just(text), st.integers(0, len(text)), st.integers(0, 12), st.sampled_from([*PARTS, ""])
        ).map(lambda cut: cut[0][: cut[1]] + cut[3] + cut[0][cut[1] + cut[2] :])
    ),
)


def test_every_format_has_a_conformance_file() -> None:
    assert {file.stem for file in FOLDER.glob("*.toml")} == set(NAMES)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_an_example_output_is_parsed(name: str, case: dict[str, Any]) -> None:
    found = parse(name, case["text"])
    assert (found.content, found.reasoning) == (case.get("content", ""), case.get("reasoning", ""))
    assert found.calls == case.get("calls", [])
    assert found.ids == case.get("ids", found.ids)
    complete = case.get("complete", True)
    assert (len(found.ended) == len(found.calls)) == complete
    for _, arguments in found.calls if complete else ():
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_cut_anywhere_and_single_characters_change_nothing(name: str, case: dict[str, Any]) -> None:
    text = case["text"]
    whole = parse(name, text)
    assert parse(name, *text) == whole
    for cut in range(len(text)):
        assert parse(name, text[:cut], text[cut:]) == whole


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=budget(40, long=2000))
@given(text=texts, seed=st.integers(0, 1 << 30))
def test_cuts_change_nothing_in_any_text(name: str, text: str, seed: int) -> None:
    whole = parse(name, text)
    assert parse(name, *text) == whole
    places = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    assert parse(name, *pieces) == whole
    for index in whole.ended:
        assert whole.calls[index][1].startswith("{")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "openai"])  # headers of messages are not content
@settings(max_examples=budget(40, long=2000))
@given(text=texts)
def test_text_without_calls_is_content_without_loss(name: str, text: str) -> None:
    parser = AnswerParser(TOOL_PARSERS[name], None)
    events = [*parser.push(text), *parser.finish()]
    if all(isinstance(event, ContentPiece) for event in events):
        assert "".join(event.text for event in events if isinstance(event, ContentPiece)) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_the_text_after_any_prefix_of_a_call_loses_nothing(name: str) -> None:
    for text in (case["text"] for form, case in CASES if form == name):
        whole = parse(name, text)
        for end in range(len(text)):
            found = parse(name, text[:end])
            assert len(found.calls) <= len(whole.calls)
            for (called, arguments), (expected, all_arguments) in zip(found.calls, whole.calls, strict=False):
                assert called == expected
                assert all_arguments.startswith(arguments) or name in ("qwen3_coder", "glm45", "glm47")
            if not found.calls and not found.reasoning and "think" not in text.lower() and name != "openai":
                assert found.content == text[:end]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_ends_inside_the_mark_after_a_call_has_no_other_text(name: str) -> None:
    form, num_cuts = TOOL_PARSERS[name], 0
    for text in (case["text"] for each, case in CASES if each == name and case.get("complete", True)):
        if len(parse(name, text).calls) != 1:
            continue
        for mark in form.closings:
            at = text.rfind(mark)
            for end in range(at + 1, at + len(mark)) if at > 0 and text.endswith(mark) else ():
                found = parse(name, text[:end])
                if len(found.ended) == 1:
                    assert found.content == parse(name, text[:at]).content
                    num_cuts += 1
    assert num_cuts or name not in ("hermes", "qwen3_coder", "openai")


def test_arguments_arrive_while_the_call_is_written() -> None:
    parser = make_parser("hermes")
    parser.push('<tool_call>{"name": "write_file", "arguments": {"text": "')
    assert len(parser.push("one line of many")) == 1
    parser = make_parser("qwen3_coder")
    parser.push("<tool_call><function=write_file><parameter=text>\n")
    assert len(parser.push("one line of many")) == 1


@pytest.mark.parametrize("name", NAMES)
def test_withheld_text_is_bounded(name: str) -> None:
    form = TOOL_PARSERS[name]
    for opening in form.openings:
        for call in form.calls:
            for filler in ("x", " ", "[", '"', "\\", "f(", '{"a":', opening.text):
                parser = make_parser(name)
                text = opening.text + call.begin * (not opening.part_of_call) + filler * (4 * HELD_CHARS // len(filler))
                for start in range(0, len(text), HELD_CHARS // 8):
                    parser.push(text[start : start + HELD_CHARS // 8])
                    assert len(parser._cursor.text) <= 3 * HELD_CHARS
                parser.finish()


@pytest.mark.parametrize("name", NAMES)
def test_work_is_linear_in_hostile_text(name: str) -> None:
    def num_calls(text: str) -> int:
        """Count the calls of functions, those of regular expressions and of strings included."""
        count = 0

        def see(_frame: object, event: str, _arg: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            parse(name, text)
        finally:
            sys.setprofile(None)
        return count

    opening = TOOL_PARSERS[name].openings[0].text
    for unit in (opening, opening + '{"name": "now", "x": "', " \n", "<", "[{("):
        short, long = (unit * (num_chars // len(unit)) for num_chars in (1 << 12, 1 << 15))
        assert num_calls(long) < 12 * num_calls(short) + 1000


def test_an_opened_reasoning_needs_no_opening_tag() -> None:
    form = find_formats("", reasoning_parser="deepseek_r1").reasoning
    parser = AnswerParser(None, form, reasoning_open=True)
    events = [*parser.push("so\n</th"), *parser.push("ink>\n\nHello <think>"), *parser.finish()]
    assert [(type(event).__name__, getattr(event, "text", "")) for event in events] == [
        ("ReasoningPiece", "so"),
        ("ContentPiece", "Hello <think>"),
    ]

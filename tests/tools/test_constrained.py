"""The parser of a format reads all texts that the grammar of the format allows as valid calls."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import ConfigError, InvalidConstraint
from kvist.grammar.backend import Grammar, GrammarBackend, Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.request import Constraint
from kvist.testing.tokenizers import END, byte_tokenizer
from kvist.tools import answer_parser
from kvist.tools.constrained import CallableTool, calls_tag
from kvist.tools.selection import FORMATS, AnswerFormats
from kvist.tools.tables import MISTRAL_V11, TaggedCall, ToolFormat
from tests.budget import budget
from tests.tools.cases import Answer
from tests.tools.test_response_template import OWN_FORMATS
from tests.tools.writing import write

SPECIAL = (
    *(END, "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
    *("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    *("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|call|>"),
)
TOKENIZER = byte_tokenizer(special_tokens=SPECIAL)
words = st.sampled_from(["a", "b-c", "on time", "é", "x.y", "<", "</parameter>", "null", "1", "", "\n"])
some_words = st.sets(words, min_size=1, max_size=3).filter(lambda some: some != {"</parameter>"})  # not writable
names = st.sampled_from(["city", "days", "x", "text_2", "lines", "mode"])
strings = st.one_of(
    st.just({"type": "string"}),
    st.just({}),
    st.builds(lambda some: {"type": "string", "enum": sorted(some)}, some_words),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more}, *[st.integers(0, 3)] * 2
    ),
    st.builds(lambda least: {"type": "string", "minLength": least}, st.integers(1, 3)),
    st.just({"type": ["string", "null"]}),
    st.just({"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]}),
)

others = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "number", "minimum": 0},
        {"type": "boolean"},
        {"type": ["integer", "null"]},
        {"enum": [1, 2, 3]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        {"$ref": "#/$defs/point"},
        {
            "type": "object",
            "properties": {"q": {"type": "string", "maxLength": 3}},
            "required": ["q"],
            "additionalProperties": False,
        },
    ]
)
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    named = draw(st.dictionaries(names, st.one_of(strings, others), max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(named)), unique=True)) if named else []
    found: dict[str, Any] = {"type": "object", "properties": named, "additionalProperties": False}
    return found | {"required": required, "$defs": {"point": POINT}}


tool_sets = st.dictionaries(
    st.sampled_from(["f", "get_weather", "now", "a.b:c", "x-1"]),
    st.one_of(parameters(), st.just({})),
    min_size=1,
    max_size=3,
)


@cache
def backend(name: str) -> GrammarBackend:
    vocabulary = Vocabulary(tokens=TOKENIZER, size=TOKENIZER.vocab_size, end_token_ids=(TOKENIZER.special_tokens[END],))
    return GRAMMAR_BACKENDS[name].make({}, vocabulary)


def compile_calls(
    form: ToolFormat,
    tools: dict[str, Any],
    *,
    required: bool,
    parallel: bool,
    using: str = "llguidance",
) -> Grammar:
    callable_tools = [
        CallableTool(name=name, parameters=schema, strict=True, param=f"tools[{index}]")
        for index, (name, schema) in enumerate(tools.items())
    ]
    tag, _ = calls_tag(form, callable_tools, required=required, parallel=parallel)
    return backend(using).compile(Constraint(kind="structural_tag", text=json.dumps(tag)))


def read(form: ToolFormat, tools: dict[str, Any], pieces: Sequence[str]) -> Answer:
    parser, answer = answer_parser(AnswerFormats(form, None), parameters=tools), Answer()
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.finish():
        answer.add(event)
    return answer


def check(form: ToolFormat, tools: dict[str, Any], text: str, draw: random.Random) -> Answer:
    answer = read(form, tools, [text])
    cuts = sorted(draw.choices(range(len(text) + 1), k=4))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, tools, pieces) == answer == read(form, tools, list(text))
    assert len(answer.ended) == len(answer.calls)
    for name, arguments in answer.calls:
        schema = tools[name] or {"type": "object", "maxProperties": 0}
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(arguments)), (text, arguments)
    return answer


each_format = pytest.mark.parametrize(
    "form", [*FORMATS, *OWN_FORMATS], ids=lambda form: f"{form.name}-{len(form.template_marks)}"
)


@each_format
@settings(max_examples=budget(4, long=100))
@given(tools=tool_sets, parallel=st.booleans(), seed=st.integers(0, 1 << 30))
def test_a_required_call_is_always_a_valid_call(
    form: ToolFormat, tools: dict[str, Any], parallel: bool, seed: int
) -> None:
    grammar = compile_calls(form, tools, required=True, parallel=parallel)
    draw = random.Random(seed)
    for _ in range(4):
        text = write(grammar, TOKENIZER, draw)
        if text is not None:
            answer = check(form, tools, text, draw)
            assert answer.content.strip() == ""
            assert answer.calls
            assert (parallel and not form.has_one_call) or len(answer.calls) == 1


@each_format
@settings(max_examples=budget(4, long=100))
@given(tools=tool_sets, parallel=st.booleans(), seed=st.integers(0, 1 << 30))
def test_a_call_that_the_model_decides_to_write_is_a_valid_call(
    form: ToolFormat, tools: dict[str, Any], parallel: bool, seed: int
) -> None:
    grammar = compile_calls(form, tools, required=False, parallel=parallel)
    draw = random.Random(seed)
    for _ in range(3):
        text = write(grammar, TOKENIZER, draw, 600)
        if text is not None:
            answer = check(form, tools, text, draw)
            assert parallel or len(answer.calls) <= 1
            if form is not MISTRAL_V11:  # has text between calls
                assert text.removeprefix(form.content_begin).startswith(answer.content)
    for opening in form.openings:  # after an opening, text is not free
        matcher = grammar.matcher()
        text = "" if opening.only_first else "Now: "
        assert not matcher.accept(TOKENIZER.encode(f"{text}{opening.text}no call at all {{"))


@each_format
def test_xgrammar_takes_the_grammar_of_every_format(form: ToolFormat) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"], "type": "string"},
        },
        "required": ["days"],
        "additionalProperties": False,
    }
    tools = {"get_weather": schema, "now": {}}
    draw, num_calls = random.Random(3), 0
    for required in (True, False):
        try:
            grammar = compile_calls(form, tools, required=required, parallel=True, using="xgrammar")
        except ConfigError as error:  # the package is not installed
            pytest.skip(error.message)
        for _ in range(6):
            text = write(grammar, TOKENIZER, draw)
            if text is not None:
                num_calls += len(check(form, tools, text, draw).calls)
    assert num_calls


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"required": [{}]}, ""),
        ({"properties": {"a": {}}, "anyOf": []}, ".anyOf"),
        ({"$ref": "#/$defs/x"}, ".$ref"),
        ({"properties": {"a": {"pattern": "x"}}}, ".properties.a.pattern"),
        ({"properties": {"a": {"type": "string", "enum": [1]}}}, ".properties.a"),
        ({"properties": {"a": {"type": "string", "enum": ["</parameter>"]}}}, ".properties.a"),
        ({"properties": {"a": {"enum": ["x<parameter=y"]}}}, ".properties.a"),
        ({"properties": {"a": {"enum": ["abc"], "maxLength": 2}}}, ".properties.a"),
        ({"properties": {"a": {"enum": ["a"], "anyOf": [{"const": "b"}]}}}, ".properties.a"),
        ({"properties": {"a>b": {"type": "integer"}}}, ".properties.a>b"),
        (
            {"properties": {"a": {"anyOf": [{"type": "string"}, {"enum": ["x"]}]}}},
            ".properties.a.anyOf",
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"anyOf": [{"$ref": "#/$defs/x"}]}}},
            ".properties.a" + ".anyOf[0]" * 8,
        ),
    ],
)
def test_a_format_of_tags_refuses_parts_that_it_cannot_enforce_with_their_path(
    schema: dict[str, Any], path: str
) -> None:
    form = next(form for form in FORMATS if form.name == "qwen3_coder")
    with pytest.raises(InvalidConstraint) as error:
        compile_calls(form, {"f": schema}, required=True, parallel=True)
    assert error.value.param == f"tools[0]{path}"


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "glm47"])
@pytest.mark.parametrize("least", [0, 2])
def test_no_text_between_tags_contains_a_mark_that_ends_it_for_the_parser(name: str, least: int) -> None:
    form = next(form for form in FORMATS if form.name == name)
    call = form.calls[-1]
    assert isinstance(call, TaggedCall)
    line = "\n" if call.newlines else ""
    tools = {"f": {"type": "object", "properties": {"a": {"minLength": least}}, "required": ["a"]}}
    grammar = compile_calls(form, tools, required=True, parallel=True)
    opening = form.written_opening
    begin = f"{opening.text}{opening.region.lead}{call.written.name_begin}f{call.written.name_end}"
    begin += f"{call.key_begin}a{call.key_end}{call.value_lead}{line}"
    for text in ("abc", "ab</p>", f"ab{call.end}", *(f"ab{mark}" for mark in call.value_breaks)):
        is_read = read(form, tools, [begin + text + line + call.value_end]).calls == [
            ["f", '{"a": ' + json.dumps(text)]
        ]
        assert grammar.matcher().accept(TOKENIZER.encode(begin + text + line + call.value_end)) == is_read
        assert is_read == (text not in {f"ab{mark}" for mark in call.value_breaks})

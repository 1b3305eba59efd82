"""The `response_template` of a checkpoint is read as its vendor means it, or it is named why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvist.errors import ModelLoadError
from kvist.testing.tokenizers import write_byte_tokenizer
from kvist.text.config import TextConfig
from kvist.text.hf import tokenizer_from_folder
from kvist.text.template_source import find_chat_template
from kvist.tools import AnswerFormats, NotReadError, answer_parser, find_formats, read_response_template
from kvist.tools.constrained import CallableTool, calls_tag
from kvist.tools.tables import HERMES, QWEN3_CODER, THINK
from tests.tools.cases import Answer

THINKING = {"open": "<think>", "close": "</think>", "content": "text"}
FUNCTION = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
JSON_CALLS = {
    "open": "<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": FUNCTION,
}
TAGGED = {
    "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<parameter=(?P<key>\w+)>\s*(?P<value>.*?)\s*</parameter>",
        "value_parser": {"name": "json", "args": {"allow_non_json": True}},
    },
    "transform": NAMED,
}
LIST = {
    "open": "<|START_ACTION|>",
    "close": "<|END_ACTION|>",
    "content": "json",
    "transform_each": True,
    "transform": {"type": "function", "function": {"name": "{tool_name}", "arguments": "{parameters}"}},
}
NAME_FIRST = {
    "open_pattern": r"\[CALL\](?P<name>[\w.-]+)\[WITH\]",
    "close": "[DONE]",
    "repeats": True,
    "content": "json",
    "transform": NAMED,
}
OWN_TAGS = {
    **TAGGED,
    "open_pattern": r"<run>\s*<tool=(?P<name>\w+)>",
    "close": "</run>",
    "content_args": {"tag_pattern": r"<arg=(?P<key>\w+)>(?P<value>.*?)</arg>"},
}


def template(**fields: object) -> dict[str, Any]:
    implicit = {"close": "<|im_end|>", "content": "text"}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {**fields, "content": implicit},
    }


def calls(field: dict[str, Any], **changes: object) -> dict[str, Any]:
    return template(tool_calls={**field, **changes})


def formats_of(value: object) -> AnswerFormats:
    return AnswerFormats(*read_response_template(value))


OWN_FORMATS = [formats_of(template(tool_calls=each)).tools for each in (LIST, NAME_FIRST, OWN_TAGS)]


def test_templates_like_known_formats_give_their_tables() -> None:
    assert formats_of(template(thinking=THINKING, tool_calls=JSON_CALLS)) == AnswerFormats(HERMES, THINK)
    assert formats_of(template(reasoning_content=THINKING, tool_calls=TAGGED)) == AnswerFormats(QWEN3_CODER, THINK)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (LIST, 'I look.<|START_ACTION|>[\n{"tool_name": "now", "parameters": {}}, {"parameters": {"a": 1},'
               ' "tool_name": "get"}\n]<|END_ACTION|>'),
        (NAME_FIRST, 'I look.[CALL]now[WITH]{}[DONE][CALL]get[WITH]{"a": 1}[DONE]'),
        (OWN_TAGS, "I look.<run><tool=now></tool></run><run>\n<tool=get><arg=a>1</arg>\n</tool></run>"),
        ({**JSON_CALLS, "open": ["<call>", "<tool>"], "close": "</>"},
         'I look.<tool>{"name": "now"}</><call>{"name": "get", "arguments": {"a": 1}}</>'),
    ],
)  # fmt: skip
def test_calls_in_a_format_of_the_vendors_own_are_read_whole_and_cut_anywhere(field: dict[str, Any], text: str) -> None:
    formats = formats_of(template(thinking={**THINKING, "open": "<r>", "close": "</r>"}, tool_calls=field))
    text = f"<r>hm</r>{text}"
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        parser, answer = (
            answer_parser(formats, parameters={"get": {"properties": {"a": {"type": "integer"}}}}),
            Answer(),
        )
        for event in (*(event for piece in pieces for event in parser.push(piece)), *parser.finish()):
            answer.add(event)
        assert [[name, json.loads(arguments)] for name, arguments in answer.calls] == [["now", {}], ["get", {"a": 1}]]
        assert (answer.content.strip(), answer.reasoning) == ("I look.", "hm")
    assert formats.tools is not None
    tools = [CallableTool(name="now", parameters={}, strict=True, param="tools[0]")]
    assert calls_tag(formats.tools, tools, required=True, parallel=True)[0]["format"]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ([], "response_template"),
        ({"fields": {}}, "start_anchor"),
        (calls(JSON_CALLS, open_pattern="x"), "fields.tool_calls"),
        (calls(JSON_CALLS, open=7), "fields[...].open"),
        (calls(JSON_CALLS, open=""), "fields.tool_calls.open"),
        (calls(JSON_CALLS, content="yaml"), "fields.tool_calls.content"),
        (calls(JSON_CALLS, transform={"a": ["x {content}"]}), "fields.tool_calls.transform.a.0"),
        (calls(NAME_FIRST, open_pattern="(?P<name>"), "fields.tool_calls.open_pattern"),
        (calls(TAGGED, content_args={}), "fields.tool_calls.content_args.tag_pattern"),
        (calls(TAGGED, content_args={"tag_pattern": "a"}), "content_args.tag_pattern"),
        (template(thinking={"close": "</think>"}), "fields"),
    ],
)
def test_a_faulty_template_ends_the_start_with_the_place_and_the_remedy(value: object, place: str) -> None:
    with pytest.raises(ModelLoadError) as found:
        find_chat_template(TextConfig(), "{{ messages }}", {}, value)
    assert place in found.value.message.replace("$.", "")
    assert "--tool-call-parser" in found.value.message
    named = replace(TextConfig(), tool_call_parser="hermes", reasoning_parser="none")
    chat, _ = find_chat_template(named, "{{ messages }}", {}, value)
    assert chat is not None
    assert chat.formats == AnswerFormats(HERMES, None)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (template(citations=THINKING), "fields.citations"),
        (calls(JSON_CALLS, close=None, close_pattern="</a>|</b>"), "fields.tool_calls.close"),
        (calls(NAME_FIRST, open_pattern=r"to=(?P<name>\w+).*?<m>"), "fields.tool_calls.open_pattern"),
        (calls(JSON_CALLS, content_args={"unquoted_keys": True}), "fields.tool_calls.content_args"),
        (calls(JSON_CALLS, content="kv-lines"), "fields.tool_calls"),
        (calls(JSON_CALLS, new_key=1), "fields.tool_calls.new_key"),
        ({**template(), "version": 3}, "version"),
    ],
)  # fmt: skip
def test_a_template_that_says_more_is_named_in_the_log_and_the_chat_template_decides(
    value: object, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotReadError, match=place):
        read_response_template(value)
    source = "{{ messages }} <tool_call> </tool_call>"
    chat, _ = find_chat_template(TextConfig(), source, {}, value)
    assert chat is not None
    assert chat.formats == find_formats(source)
    assert f"response_template.{place}" in caplog.text
    assert "tokenizer_config.json" in caplog.text


def test_a_checkpoint_with_a_response_template_is_read_by_it(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    own = {**config, "chat_template": "{{ messages }}", "response_template": template(tool_calls=LIST)}
    path.write_text(json.dumps(own))
    chat = tokenizer_from_folder(tmp_path, TextConfig()).chat_template
    assert chat is not None
    assert chat.formats.tools == formats_of(own["response_template"]).tools

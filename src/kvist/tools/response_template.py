"""Reads the `response_template` of a checkpoint: the vendor's own description of how the model writes its answers.

A template names the fields of a message and, for each, the texts around it and how what is between is read. Source:
https://huggingface.co/docs/transformers/main/chat_response_parsing. The result is the data of tables.py, so that calls
are streamed and enforced like those of all other formats:

    thinking, reasoning, reasoning_content  text between two marks
    tool_calls    JSON objects or a JSON list between marks; a name before JSON; a name before tags (`xml-inline`)
    content       everything else

A template that breaks the rules of that page is an error. A template that uses other parts of it is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvist.errors import ModelLoadError
from kvist.tools.tables import (
    MISTRAL_THINK,
    THINK,
    TOOL_FORMATS,
    Call,
    JsonCall,
    NamedCall,
    Opening,
    ReasoningFormat,
    Region,
    TaggedCall,
    ToolFormat,
    Written,
)

_CONTENT = ("text", "int", "float", "bool", "json", "xml-inline", "kv-lines")
_REASONING = ("thinking", "reasoning", "reasoning_content")
_GROUP = re.compile(r"\(\?P<(\w+)>(?:\\w|\[[^]]+\]|\.|\\S)[+*]\??\)")
_FUNCTION = {"type": "function"}


class NotReadError(Exception):
    """The template is valid, and says something that tables cannot express: the message names the place."""


class _Field(msgspec.Struct, frozen=True):
    open: str | list[str] | None = None
    open_pattern: str | None = None
    close: str | list[str] | None = None
    close_pattern: str | None = None
    repeats: bool = False
    optional: bool = True
    content: str = "text"
    content_args: dict[str, Any] = {}
    transform: dict[str, Any] | list[Any] | str | None = None
    transform_each: bool = False


class _Template(msgspec.Struct, frozen=True):
    fields: dict[str, _Field]
    defaults: dict[str, Any] = {}
    start_anchor: str | None = None
    start_anchor_pattern: str | None = None


def read_response_template(template: object) -> tuple[ToolFormat | None, ReasoningFormat | None]:
    """Return the formats of calls and of reasoning; None for a field that the template does not have. Raises
    `ModelLoadError` for a faulty template, and `NotReadError`."""
    found = _checked(template)
    assert isinstance(template, dict)
    _refuse_others(template, _Template, "")
    for name, field in found.fields.items():
        _refuse_others(template["fields"][name], _Field, f"fields.{name}.")
        if name not in ("content", "role", "tool_calls", *_REASONING):
            raise NotReadError(f"fields.{name}")
        if name == "content" and (field.open or field.open_pattern):
            raise NotReadError("fields.content.open")
    reasoning = next((name for name in _REASONING if name in found.fields), None)
    calls = found.fields.get("tool_calls")
    return (
        None if calls is None else _known(_tools(calls)),
        None if reasoning is None else _reasoning(found.fields[reasoning], f"fields.{reasoning}"),
    )


# ---------------------------------------------------------------- the rules of the page


def _checked(template: object) -> _Template:
    try:
        found = msgspec.convert(template, _Template)
    except msgspec.ValidationError as error:
        raise _fault("", str(error)) from error
    if (found.start_anchor is None) is (found.start_anchor_pattern is None):
        raise _fault("", "exactly one of start_anchor and start_anchor_pattern must be set")
    _check_pattern(found.start_anchor_pattern, "start_anchor_pattern")
    for name, field in found.fields.items():
        _check_field(field, f"fields.{name}")
    if sum(field.open is None and field.open_pattern is None for field in found.fields.values()) > 1:
        raise _fault("fields", "at most one field may have neither open nor open_pattern")
    return found


def _check_field(field: _Field, where: str) -> None:
    for one, other in (("open", "open_pattern"), ("close", "close_pattern")):
        if getattr(field, one) is not None and getattr(field, other) is not None:
            raise _fault(where, f"{one} and {other} exclude each other")
        _check_pattern(getattr(field, other), f"{where}.{other}")
        if "" in _texts(getattr(field, one)):
            raise _fault(f"{where}.{one}", "the text is empty")
    if field.content not in _CONTENT:
        raise _fault(f"{where}.content", f"{field.content!r} is unknown: {', '.join(_CONTENT)}")
    if field.content == "xml-inline":
        pattern = field.content_args.get("tag_pattern")
        if not isinstance(pattern, str):
            raise _fault(f"{where}.content_args.tag_pattern", "xml-inline needs it")
        groups = _check_pattern(pattern, f"{where}.content_args.tag_pattern")
        if not {"key", "value"} <= groups:
            raise _fault(f"{where}.content_args.tag_pattern", "it needs the groups key and value")
    _check_placeholders(field.transform, f"{where}.transform")


def _check_pattern(pattern: str | None, where: str) -> set[str]:
    """Return the names of the groups."""
    try:
        return set(re.compile(pattern or "", re.DOTALL).groupindex)
    except (re.error, RecursionError, OverflowError) as error:
        raise _fault(where, f"the regular expression is not valid: {error}") from error


def _check_placeholders(value: object, where: str) -> None:
    if isinstance(value, str):
        if re.search(r"\{[^{}]*\}", value) and not re.fullmatch(r"\{[^{}]+\}", value):
            raise _fault(where, f"{value!r}: a placeholder must be the whole text")
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        _check_placeholders(one, f"{where}.{name}")


def _fault(where: str, problem: str) -> ModelLoadError:
    path = f"response_template.{where}" if where else "response_template"
    return ModelLoadError(
        f"{path} in tokenizer_config.json: {problem}. Correct it, or choose both --tool-call-parser and "
        "--reasoning-parser by name: it is not read then"
    )


def _refuse_others(value: Mapping[str, object], known: type[msgspec.Struct], where: str) -> None:
    for name in value:
        if name not in known.__struct_fields__:
            raise NotReadError(f"{where}{name}")


# ---------------------------------------------------------------- tables


def _reasoning(field: _Field, where: str) -> ReasoningFormat:
    begins, ends = _texts(field.open), _texts(field.close)
    if len(begins) != 1 or len(ends) != 1:
        raise NotReadError(f"{where}: one text before it and one after it can be read")
    if field.content != "text" or field.transform is not None or field.repeats:
        raise NotReadError(f"{where}: only plain text can be read")
    known = (form for form in (THINK, MISTRAL_THINK) if (form.begin, form.end) == (begins[0], ends[0]))
    return next(known, ReasoningFormat(begin=begins[0], end=ends[0], closing=ends[0]))


def _tools(field: _Field) -> ToolFormat:
    where = "fields.tool_calls"
    closes = _texts(field.close)
    if field.close_pattern is not None or len(closes) > 1:
        raise NotReadError(f"{where}.close: one text can be read")
    close = closes[0] if closes else ""
    if field.content == "json" and field.open is not None:
        name_key, arguments_key = _keys(field, where)
        call: Call = JsonCall(
            name_key=name_key,
            argument_keys=(arguments_key,),
            written=Written(name_begin=f'{{"{name_key}": "', name_end=f'", "{arguments_key}": ', end="}"),
        )
        return _between(_texts(field.open), call, close, is_list=field.transform_each)
    if field.open_pattern is None or _function(field.transform) != {"name": "{name}", "arguments": "{content}"}:
        raise NotReadError(f"{where}: a call without the groups name and content of its transform")
    opening, begin, name_end = _around_name(field.open_pattern, f"{where}.open_pattern")
    if field.content == "json":
        written = Written(name_begin=begin, name_end=name_end)
        return _between((opening,), NamedCall(begin=begin, arguments_begin=name_end, written=written), close)
    if field.content != "xml-inline":
        raise NotReadError(f"{where}.content")
    return _between((opening,), _tagged(field, begin, name_end, where), close)


def _between(openings: Sequence[str], call: Call, close: str, *, is_list: bool = False) -> ToolFormat:
    """Return the format of calls between one of `openings` and `close`."""
    region = Region(between=close + openings[0], end=close)
    if is_list:
        region = Region(lead="[", between=", ", end="]" + close)
    return ToolFormat(
        name="response_template",
        template_marks=(),
        openings=tuple(Opening(text=text, region=region) for text in openings),
        leads=("[",) if is_list else (),
        separators=(",",) if is_list else (),
        closings=tuple(filter(None, ("]", f"]{close}", f"]\n{close}", close) if is_list else (close,))),
        calls=(call,),
    )


def _tagged(field: _Field, begin: str, name_end: str, where: str) -> TaggedCall:
    pattern = field.content_args["tag_pattern"]
    found = re.fullmatch(r"(.*?)\(\?P<key>[^()]*\)(.*?)\(\?P<value>[^()]*\)(.*)", pattern, re.DOTALL)
    tag = re.fullmatch(r"<(\w+)[=:]", begin)
    if found is None or tag is None:
        raise NotReadError(f"{where}.content_args.tag_pattern")
    key_begin, key_end, value_end = (_literal(part.strip(), where) for part in found.groups())
    newlines = any(r"\s" in part for part in found.groups())
    end = f"</{tag[1]}>"
    blank = "\n" if newlines else ""
    return TaggedCall(
        begin=begin,
        name_end=name_end,
        key_begin=key_begin,
        key_end=key_end,
        value_end=value_end,
        newlines=newlines,
        end=end,
        written=Written(name_begin=begin, name_end=name_end + blank, end=end),
        value_tail=blank,
    )


def _around_name(pattern: str, where: str) -> tuple[str, str, str]:
    """Return the opening of the region, the text before the name and the text after it."""
    found = _GROUP.search(pattern)
    if found is None or found[1] != "name":
        raise NotReadError(where)
    before, after = pattern[: found.start()], pattern[found.end() :]
    opening, blank, begin = before.partition(r"\s*")
    return _literal(opening, where), _literal(begin, where) if blank else "", _literal(after, where)


def _literal(pattern: str, where: str) -> str:
    """Return the only text that the pattern matches, but for blanks at its ends."""
    text = pattern.removeprefix(r"\s*").removesuffix(r"\s*")
    if re.search(r"(?<!\\)(?:\\\\)*(?:[][.*+?(){}^$|]|\\[A-Za-z0-9])", text):
        raise NotReadError(where)
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _keys(field: _Field, where: str) -> tuple[str, str]:
    """Return the keys of name and arguments in the JSON of a call."""
    if field.content_args.keys() - {"allow_non_json"}:
        raise NotReadError(f"{where}.content_args")
    function = _function(field.transform)
    if function == "{content}" and not field.transform_each:
        return "name", "arguments"
    if field.transform_each and isinstance(function, dict) and function.keys() == {"name", "arguments"}:
        name, arguments = (str(function[key]).strip("{}") for key in ("name", "arguments"))
        return name, arguments
    raise NotReadError(f"{where}.transform")


def _function(transform: object) -> object:
    if not isinstance(transform, dict) or transform.keys() != {"type", "function"} or transform["type"] != "function":
        return None
    return transform["function"]


def _texts(value: str | list[str] | None) -> Sequence[str]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _known(form: ToolFormat) -> ToolFormat:
    """Return the table with the same marks, which also knows the blanks that the model writes; else `form`."""

    def marks(of: ToolFormat) -> object:
        call = of.calls[-1]
        keys = (call.key_begin, call.value_end, call.end) if isinstance(call, TaggedCall) else ()
        begin = "" if isinstance(call, JsonCall) else call.begin
        return of.openings[0].text, of.closings, bool(of.leads), type(call), begin, keys

    return next((table for table in TOOL_FORMATS if marks(table) == marks(form)), form)

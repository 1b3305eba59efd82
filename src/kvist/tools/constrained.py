"""Writes the grammar of an answer that calls tools, as a structural tag: calls in the format of the model, of the given
functions, with arguments that satisfy their schemas. `AnswerParser` reads every such answer as these calls.

    required:  opening and calls
    auto:      text without an opening ─► nothing, or opening and calls
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvist.errors import InvalidConstraint
from kvist.tools.tables import Call, Opening, PythonCall, Region, TaggedCall, ToolFormat
from kvist.tools.tagged_values import NOTES, Frame, Unenforced, embedded, tagged_value
from kvist.tools.tags import ANY_TEXT, NOTHING, Tag, const, json_schema, one_of, regex, sequence, tag

_NUMBER = r":(0|[1-9][0-9]{0,3})"  # of a call, where the model counts its calls
_TEXT_BEFORE = r"[\x20\n\r\t]*[^\x20\n\r\t{\[]"  # the first part of an answer that is not a bare call
_OF_ALL = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id", *NOTES}
_NO_ARGUMENTS: Mapping[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableTool:
    """A function that the answer may call."""

    name: str
    parameters: Mapping[str, object]  # JSON Schema of the arguments; empty: none
    strict: bool  # False: parts of the schema that cannot be enforced are ignored
    param: str  # the field of the request that has the schema


def calls_tag(
    form: ToolFormat, tools: Sequence[CallableTool], *, required: bool, parallel: bool
) -> tuple[Tag, Sequence[str]]:
    """Return the structural tag, and the paths of the parts of schemas that the format cannot enforce. `required`: the
    answer consists of calls. `parallel`: it may have several. Raises `InvalidConstraint`, whose `param` is the path of
    such a part of a strict tool."""
    unenforced = [Unenforced(tool.strict) for tool in tools]
    calls = [_call(form.calls[-1], tool, parts) for tool, parts in zip(tools, unenforced, strict=True)]
    tag = _calls_tag(form, calls, required=required, parallel=parallel)
    return tag, [path for parts in unenforced for path in parts.paths]


def _calls_tag(form: ToolFormat, calls: Sequence[Tag], *, required: bool, parallel: bool) -> Tag:
    parallel = parallel and not form.has_one_call
    anywhere = [opening for opening in form.openings if not opening.only_first]
    bare = [opening for opening in form.openings if opening.only_first]
    if required:
        return {"format": _region(form.written_opening, calls, parallel=parallel)}
    if form.content_begin:
        some = _region(form.written_opening, calls, parallel=parallel)
        return {"format": one_of([some, sequence([const(form.content_begin), ANY_TEXT])])}
    tags: list[Tag] = []
    repeats = False
    for opening in anywhere:
        region = opening.region
        if opening.part_of_call:
            tags += calls
        elif region.end:
            inner = replace(region, end="")
            tags.append(tag(opening.text, _after(inner, calls, parallel=parallel), region.end))
        else:  # a text that another call may continue has no end: one call after each opening
            tags.append(tag(opening.text, _after(region, calls, parallel=False), ""))
            repeats = parallel and region.between == opening.text
    text: Tag = {
        "type": "triggered_tags",
        "triggers": [opening.text for opening in anywhere],
        "tags": tags,
        "stop_after_first": not repeats,
    }
    if bare:
        regions = [_region(opening, calls, parallel=parallel) for opening in form.openings]
        text = one_of([*regions, sequence([regex(_TEXT_BEFORE), text])])
    return {"format": text}


def _region(opening: Opening, calls: Sequence[Tag], *, parallel: bool) -> Tag:
    after = _after(opening.region, calls, parallel=parallel)
    return after if opening.part_of_call else sequence([const(opening.text), after])


def _after(region: Region, calls: Sequence[Tag], *, parallel: bool) -> Tag:
    some: Tag = one_of(calls)
    if parallel:
        some = {"type": "tags_with_separator", "tags": list(calls), "separator": region.between, "at_least_one": True}
    return sequence([const(region.lead), some, const(region.end)])


def _call(call: Call, tool: CallableTool, unenforced: Unenforced) -> Tag:
    written, schema = call.written, tool.parameters or _NO_ARGUMENTS
    if isinstance(call, TaggedCall):
        content = _tagged(call, tool, schema, unenforced)
    elif isinstance(call, PythonCall):
        content = _python(tool, schema, unenforced)
    else:
        content = json_schema(schema if "type" in schema else {"type": "object", **schema}, strict=tool.strict)
    begin = written.name_begin + tool.name
    if not written.numbered:
        return tag(begin + written.name_end, content, written.end)
    return tag(begin, sequence([regex(_NUMBER), const(written.name_end), content]), written.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameter:
    name: str
    schema: object
    required: bool
    path: str


def _parameters(tool: CallableTool, schema: Mapping[str, object], unenforced: Unenforced) -> Sequence[_Parameter]:
    """Return the parameters of a format that writes them one by one: the required ones first. Keywords about all
    arguments together cannot be enforced."""
    named, needed = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(named, Mapping) or not isinstance(needed, list) or not all(isinstance(n, str) for n in needed):
        raise InvalidConstraint("`properties` must be an object, and `required` a list of names", param=tool.param)
    for keyword in sorted(schema.keys() - _OF_ALL):
        problem = f"`{keyword}` cannot be enforced where the model writes one parameter after the other"
        unenforced.add(problem, f"{tool.param}.{keyword}")
    names = list(dict.fromkeys([*(name for name in named if name in needed), *needed, *named]))
    return [
        _Parameter(
            name=str(name),
            schema=named.get(name, {}),
            required=name in needed,
            path=f"{tool.param}.properties.{name}",
        )
        for name in names
    ]


def _tagged(call: TaggedCall, tool: CallableTool, schema: Mapping[str, object], unenforced: Unenforced) -> Tag:
    parts = []
    for each in _parameters(tool, schema, unenforced):
        if call.key_end in each.name or each.name != each.name.strip() or not each.name:
            raise InvalidConstraint("this name cannot be written in the format of the model's calls", param=each.path)
        frame = Frame(
            begin=f"{call.key_begin}{each.name}{call.key_end}{call.value_lead}",
            end=call.value_end,
            breaks=call.value_breaks,
            newlines=call.newlines,
        )
        value = tagged_value(each.schema, schema, frame, unenforced, each.path)
        part = sequence([value, const(call.value_tail)])
        parts.append(part if each.required else one_of([part, NOTHING]))
    return sequence(parts)


def _python(tool: CallableTool, schema: Mapping[str, object], unenforced: Unenforced) -> Tag:
    required: list[Tag] = []
    optional: list[Tag] = []
    for each in _parameters(tool, schema, unenforced):
        if not each.name.isidentifier():
            raise InvalidConstraint("this name cannot be written in the format of the model's calls", param=each.path)
        value = json_schema(embedded(each.schema, schema), strict=tool.strict)
        (required if each.required else optional).append(sequence([const(f"{each.name}="), value]))
    comma = const(", ")
    after = [one_of([sequence([comma, part]), NOTHING]) for part in optional]
    if required or not optional:
        return sequence([part for each in required for part in (comma, each)][1:] + after)
    starts = [sequence([part, *after[index + 1 :]]) for index, part in enumerate(optional)]
    return one_of([*starts, NOTHING])

"""The constraint of a chat's answers: of their form, of their tool calls, and of the length of their reasoning.

calls, or the form of the answer, or both as alternatives ──► after the reasoning, where the model reasons
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from kvist.api.schemas import ChatRequest
from kvist.checking.constraints import RequestedConstraint
from kvist.checking.sampling import require
from kvist.errors import InvalidConstraint, RequestError
from kvist.request import AfterReasoning, Constraint
from kvist.tools.constrained import CallableTool, calls_tag
from kvist.tools.tables import ReasoningFormat, ToolFormat
from kvist.tools.tags import Tag, const, json_schema, one_of, regex, sequence

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedCalls:
    """The calls that an answer may or must have."""

    form: ToolFormat
    tools: Sequence[CallableTool]
    required: bool
    parallel: bool
    is_free: bool  # the request promises nothing about the calls


def with_calls(form: RequestedConstraint | None, wanted: WantedCalls) -> RequestedConstraint | None:
    """Return the constraint of an answer that has the form, or calls of tools. Raises `RequestError` for a form that
    cannot be an alternative to calls, and `InvalidConstraint` for schemas that the format cannot enforce."""
    if form is None and wanted.is_free:
        return None
    checked = [
        RequestedConstraint(
            constraint=Constraint(kind="json_schema", text=_encode(tool.parameters).decode(), strict=tool.strict),
            param=tool.param,
        )
        for tool in wanted.tools
        if tool.parameters
    ]
    required = wanted.required or form is not None
    tag, unenforced = calls_tag(wanted.form, wanted.tools, required=required, parallel=wanted.parallel)
    if form is not None:
        checked.append(form)
        answer = sequence([const(wanted.form.content_begin), _as_tag(form)])
        if not wanted.required:
            tag = {"format": one_of([_part(tag["format"]), answer])}
    return RequestedConstraint(
        constraint=Constraint(kind="structural_tag", text=_encode(tag).decode()),
        param="tools",
        parts=tuple(checked),
        has_calls=True,
        unenforced=tuple(unenforced),
    )


def _part(value: object) -> Tag:
    assert isinstance(value, dict)
    return value


def _as_tag(form: RequestedConstraint) -> Tag:
    """Return the form of an answer as a part of a structural tag."""
    constraint = form.constraint
    if constraint.whitespace is None:
        if constraint.kind == "json_object":
            return json_schema({"type": "object"}, strict=True)
        if constraint.kind == "choice":
            return one_of([const(text) for text in json.loads(constraint.text)])
        if constraint.kind == "regex":
            return regex(constraint.text)
        if constraint.kind == "json_schema":
            try:
                schema = json.loads(constraint.text)
            except (ValueError, RecursionError) as error:
                raise InvalidConstraint(f"`{form.param}` is not valid JSON: {error}", param=form.param) from error
            return json_schema(schema if isinstance(schema, dict) else {"allOf": [schema]}, strict=constraint.strict)
    raise RequestError(
        f'`{form.param}` and calls of tools exclude each other: set `tool_choice` to "none", or use a JSON schema in '
        "`response_format`",
        param=form.param,
    )


@dataclass(frozen=True, slots=True)
class Budget:
    """The most tokens of reasoning."""

    num_tokens: int
    param: str  # the field that has it


def after_reasoning(
    requested: RequestedConstraint | None, reasoning: ReasoningFormat | None, prompt: str, budget: Budget | None
) -> RequestedConstraint | None:
    """Return the constraint of an answer that may begin with reasoning. `budget` None: any number of
    tokens. Raises `RequestError` for a budget where the model's reasoning is not recognised."""
    if reasoning is None:
        if budget is None or budget.param == "reasoning_effort":  # advice, without effect on such a model
            return requested
        raise RequestError(
            "the format in which this model writes its reasoning is unknown, so it cannot be limited: start the server "
            "with --reasoning-parser",
            param=budget.param,
        )
    if requested is None and budget is None:
        return None
    if reasoning.is_ended(prompt):
        return requested
    if reasoning.content_begin and requested is not None and not requested.has_calls:
        reasoning = reasoning.before_content()
    rule = AfterReasoning(
        begin=reasoning.begin,
        end=reasoning.end,
        closing=reasoning.closing,
        is_open=reasoning.is_open(prompt),
        max_tokens=None if budget is None else budget.num_tokens,
        then=None if requested is None else requested.constraint,
    )
    if requested is not None:
        return replace(requested, constraint=rule.as_constraint())
    assert budget is not None
    return RequestedConstraint(constraint=rule.as_constraint(), param=budget.param)


# For models whose chat template does not know `reasoning_effort`: tokens of reasoning.
EFFORT_BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 4096}
_MAX_BUDGET = 1 << 20


def thinking_budget(request: ChatRequest, template: str) -> Budget | None:
    """Return the most tokens of reasoning, by the request's budget, else by its effort. None: any number. Raises
    `RequestError` for budgets that differ or are out of range."""
    given = {
        name: value
        for name, value in (
            ("thinking_token_budget", request.thinking_token_budget),
            ("thinking_budget", request.thinking_budget),
            ("max_thinking_tokens", request.max_thinking_tokens),
        )
        if value is not None and value != -1
    }
    for name, value in given.items():
        require(0 <= value <= _MAX_BUDGET, name, f"must be -1 (no limit), or from 0 to {_MAX_BUDGET}", value)
        if len(set(given.values())) > 1:
            raise RequestError(f"{' and '.join(given)} differ; set only one", param=name)
        return Budget(value, name)
    effort = request.reasoning_effort
    if effort is None or "reasoning_effort" in template or (effort == "none" and "enable_thinking" in template):
        return None
    num_tokens = EFFORT_BUDGETS.get(effort)
    return None if num_tokens is None else Budget(num_tokens, "reasoning_effort")

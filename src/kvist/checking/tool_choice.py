"""Reads `tool_choice`: whether the answer must call a tool, and which ones it may call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kvist.errors import RequestError, UnsupportedField

_MODES = ("none", "auto", "required")
_FORMS = '"none", "auto", "required", or an object of the type "function" or "allowed_tools"'


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    mode: str  # none, auto or required
    names: frozenset[str] | None = None  # the functions that may be called; None: all


def read_tool_choice(value: object, names: Collection[str]) -> ToolChoice:
    """`names`: of the functions of the request. Raises `RequestError` for a choice that they do not fulfil."""
    if value is None:
        return ToolChoice(mode="auto" if names else "none")
    if isinstance(value, str):
        if value not in _MODES:
            raise UnsupportedField(f"`tool_choice` is {value[:64]!r}; supported: {_FORMS}", param="tool_choice")
        choice = ToolChoice(mode=value)
    else:
        choice = _of_object(value, names)
    if choice.mode == "required" and not names:
        raise RequestError("`tool_choice` demands a call, but `tools` is empty", param="tool_choice")
    return choice


def _of_object(value: object, names: Collection[str]) -> ToolChoice:
    if not isinstance(value, Mapping):
        raise UnsupportedField(f"`tool_choice` must be {_FORMS}", param="tool_choice")
    kind = value.get("type")
    if kind == "function":
        return ToolChoice(mode="required", names=frozenset([_name(value, names, "tool_choice")]))
    if kind != "allowed_tools":
        raise UnsupportedField(
            f"`tool_choice.type` is {str(kind)[:64]!r}; supported: {_FORMS}", param="tool_choice.type"
        )
    where = "tool_choice.allowed_tools"
    allowed = value.get("allowed_tools")
    if not isinstance(allowed, Mapping):
        raise RequestError(f"`{where}` must be an object with `mode` and `tools`", param=where)
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise RequestError(f'`{where}.mode` must be "auto" or "required"', param=f"{where}.mode")
    if not isinstance(tools, list) or not tools:
        raise RequestError(f"`{where}.tools` must be a list of tools, at least one", param=f"{where}.tools")
    found = [_name(each, names, f"{where}.tools[{index}]") for index, each in enumerate(tools)]
    _check_names(allowed, ("mode", "tools"), where)
    _check_names(value, ("type", "allowed_tools"), "tool_choice")
    return ToolChoice(mode=mode, names=frozenset(found))


def _name(value: object, names: Collection[str], where: str) -> str:
    """Return the name in `{"type": "function", "function": {"name": ...}}`."""
    if not isinstance(value, Mapping) or value.get("type") != "function":
        raise UnsupportedField(f'`{where}` must be an object of the type "function"', param=where)
    function = value.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    param = f"{where}.function.name"
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise RequestError(f"`{param}` is missing: it is the name of a function", param=param)
    if name not in names:
        raise RequestError(f"`{param}` is {name[:64]!r}, which no tool of the request has", param=param)
    _check_names(function, ("name",), f"{where}.function")
    _check_names(value, ("type", "function"), where)
    return name


def _check_names(value: Mapping[str, object], known: Collection[str], where: str) -> None:
    for name, one in value.items():
        if name not in known and one is not None:
            param = f"{where}.{name}"
            raise RequestError(f"unknown field `{param}`", param=param)

"""Chooses the formats of tool calls and reasoning: by vLLM's names, or from the text of the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from kvist.errors import ConfigError
from kvist.tools.tables import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    MISTRAL_THINK,
    QWEN3_CODER,
    THINK,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
)

AUTO, NONE = "auto", "none"
_HARMONY = "openai"

TOOL_PARSERS: Mapping[str, ToolFormat] = {form.name: form for form in TOOL_FORMATS} | {
    "qwen": next(form for form in TOOL_FORMATS if form.name == "hermes"),
    "qwen25": next(form for form in TOOL_FORMATS if form.name == "hermes"),
    "qwen3_xml": QWEN3_CODER,
    "llama3": next(form for form in TOOL_FORMATS if form.name == "llama3_json"),
    "llama4_json": next(form for form in TOOL_FORMATS if form.name == "llama3_json"),
    "pythonic": next(form for form in TOOL_FORMATS if form.name == "llama4_pythonic"),
    "deepseekv3": DEEPSEEK_V3,
    "deepseekv31": DEEPSEEK_V31,
    "glm": next(form for form in TOOL_FORMATS if form.name == "glm45"),
    "glm47": next(form for form in TOOL_FORMATS if form.name == "glm45"),
}
REASONING_PARSERS: Mapping[str, ReasoningFormat] = {
    "deepseek_r1": THINK,
    "deepseek-r1": THINK,
    "deepseek_v3": THINK,
    "glm45": THINK,
    "kimi_k2": THINK,
    "qwen3": THINK,
    "mistral": MISTRAL_THINK,
}


@dataclass(frozen=True, slots=True)
class AnswerFormats:
    """The formats of one model's answers; None: that part of an answer is not recognised."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    def special_among(self, special_tokens: Iterable[str]) -> frozenset[str]:
        """Return the special tokens that the formats are written with. Answers to other requests do not show them."""
        texts = [text for form in (self.tools, self.reasoning) if form is not None for text in _texts_in(asdict(form))]
        return frozenset(token for token in special_tokens if any(token in text for text in texts))


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _texts_in(one) if name != "template_marks" else ()
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_in(one)


def find_formats(template: str, *, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> AnswerFormats:
    """Raises `ConfigError` for an unknown name."""
    return AnswerFormats(_tools(template, tool_parser), _reasoning(template, reasoning_parser))


def _tools(template: str, name: str) -> ToolFormat | None:
    if name == AUTO:
        fitting = (form for form in TOOL_FORMATS if all(mark in template for mark in form.template_marks))
        return next(fitting, None)
    if name == _HARMONY:
        raise _not_served("tool_call_parser")
    if name != NONE and name not in TOOL_PARSERS:
        raise _unknown("tool_call_parser", name, TOOL_PARSERS)
    return TOOL_PARSERS.get(name)


def _reasoning(template: str, name: str) -> ReasoningFormat | None:
    if name == AUTO:
        return next((form for form in (THINK, MISTRAL_THINK) if form.end in template), None)
    if name in (_HARMONY, "openai_gptoss"):
        raise _not_served("reasoning_parser")
    if name != NONE and name not in REASONING_PARSERS:
        raise _unknown("reasoning_parser", name, REASONING_PARSERS)
    return REASONING_PARSERS.get(name)


def _not_served(param: str) -> ConfigError:
    flag = f"--{param.replace('_', '-')}"
    return ConfigError(f"{flag}: the harmony format of gpt-oss is not supported", param=param)


def _unknown(param: str, name: str, known: Mapping[str, object]) -> ConfigError:
    flag = f"--{param.replace('_', '-')}"
    return ConfigError(f"{flag} {name}: known are auto, none, {', '.join(sorted(known))}", param=param)

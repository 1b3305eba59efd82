"""Chooses the formats of tool calls and reasoning: by vLLM's names, as the checkpoint describes them, or from the text
of the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from kvist.errors import ConfigError
from kvist.tools.harmony import HARMONY_REASONING, HARMONY_TOOLS
from kvist.tools.tables import (
    MISTRAL_THINK,
    THINK,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
)

AUTO, NONE = "auto", "none"
FORMATS = (HARMONY_TOOLS, *TOOL_FORMATS)

# Names of vLLM and SGLang, and the names of the formats.
_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "pythonic": "llama4_pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "glm": "glm45",
    "gpt-oss": "openai",
}
_BY_NAME = {form.name: form for form in FORMATS}  # of several with one name, the last
TOOL_PARSERS: Mapping[str, ToolFormat] = _BY_NAME | {alias: _BY_NAME[name] for alias, name in _ALIASES.items()}
REASONING_PARSERS: Mapping[str, ReasoningFormat] = {
    "deepseek_r1": THINK,
    "deepseek-r1": THINK,
    "deepseek_v3": THINK,
    "deepseek-v3": THINK,
    "glm45": THINK,
    "kimi_k2": THINK,
    "qwen3": THINK,
    "qwen3-thinking": THINK,
    "mistral": MISTRAL_THINK,
    "openai_gptoss": HARMONY_REASONING,
    "gpt-oss": HARMONY_REASONING,
}


@dataclass(frozen=True, slots=True)
class AnswerFormats:
    """The formats of one model's answers; None: that part of an answer is not recognised."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @property
    def is_harmony(self) -> bool:
        return self.tools is HARMONY_TOOLS or self.reasoning is HARMONY_REASONING

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


_UNDESCRIBED = AnswerFormats()


def find_formats(
    template: str, *, tool_parser: str = AUTO, reasoning_parser: str = AUTO, described: AnswerFormats = _UNDESCRIBED
) -> AnswerFormats:
    """`described`: by the checkpoint's `response_template`, which is preferred to the marks in the chat template.
    Raises `ConfigError` for an unknown name."""
    tools = described.tools if tool_parser == AUTO else None
    reasoning = described.reasoning if reasoning_parser == AUTO else None
    return AnswerFormats(
        tools or _tools(template, tool_parser),
        reasoning or _reasoning(template, reasoning_parser),
    )


def _tools(template: str, name: str) -> ToolFormat | None:
    if name == AUTO:
        return next((form for form in FORMATS if _fits(form, template)), None)
    if name != NONE and name not in TOOL_PARSERS:
        raise _unknown("tool_call_parser", name, TOOL_PARSERS)
    chosen = TOOL_PARSERS.get(name)
    variants = [form for form in FORMATS if chosen is not None and form.name == chosen.name]
    return next((form for form in variants if _fits(form, template)), chosen)


def _fits(form: ToolFormat, template: str) -> bool:
    return all(mark in template for mark in form.template_marks)


def _reasoning(template: str, name: str) -> ReasoningFormat | None:
    if name == AUTO:
        if _fits(HARMONY_TOOLS, template):
            return HARMONY_REASONING
        return next((form for form in (THINK, MISTRAL_THINK) if form.end in template), None)
    if name != NONE and name not in REASONING_PARSERS:
        raise _unknown("reasoning_parser", name, REASONING_PARSERS)
    return REASONING_PARSERS.get(name)


def _unknown(param: str, name: str, known: Mapping[str, object]) -> ConfigError:
    flag = f"--{param.replace('_', '-')}"
    return ConfigError(f"{flag} {name}: known are auto, none, {', '.join(sorted(known))}", param=param)

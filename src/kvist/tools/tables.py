"""The formats in which models write tool calls and reasoning, as data.

A region of calls begins with an opening and holds calls, with separators between them, up to a closing, which may be
missing. The style of a call is one of four: a JSON object, a name before a JSON object, tags, or Python.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class CallIds(enum.Enum):
    """The ids of calls, which a client sends back with the results."""

    OPENAI = "openai"  # call_ and 24 characters
    MISTRAL = "mistral"  # 9 letters and digits, which Mistral's templates require
    OWN = "own"  # the model writes the id


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    text: str
    part_of_call: bool = False  # the opening is the first part of the call itself
    only_first: bool = False  # counts at the start of the answer only, and for names in `tools` only


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCall:
    """`{"name": "f", "arguments": {...}}`, with the keys in any order, and other keys without effect."""

    begin: str = "{"
    argument_keys: tuple[str, ...] = ("arguments", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCall:
    """A name, and then the arguments as JSON."""

    begin: str
    id_begin: str = ""  # between name and arguments: the id of the call
    arguments_begin: str  # "" : the brace of the arguments follows the name
    ends: tuple[str, ...] = ()
    name_is_id: bool = False  # the model writes `functions.NAME:NUMBER`


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedCall:
    """A name, and then each parameter between tags, as plain text whose type is that of the tool's schema."""

    begin: str
    name_end: str = ""
    key_begin: str
    key_end: str
    value_begin: str = ""
    value_end: str
    newlines: bool = False  # one newline on each side of a value does not belong to the value
    end: str
    end_is_closing: bool = False  # the end of the call is also the closing of the region


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonCall:
    """`f(key=literal, ...)`"""

    begin: str = ""


Call = JsonCall | NamedCall | TaggedCall | PythonCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    name: str  # vLLM's
    template_marks: tuple[str, ...]  # texts that together identify the format in a chat template
    openings: tuple[Opening, ...]
    leads: tuple[str, ...] = ()  # may follow the opening
    separators: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    calls: tuple[Call, ...]
    ids: CallIds = CallIds.OPENAI


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """Reasoning is the first part of an answer. The prompt may end with `begin`: the answer then lacks it."""

    begin: str
    end: str


HERMES = ToolFormat(  # Hermes 2 Pro, Qwen 2.5, Qwen 3
    name="hermes",
    template_marks=("<tool_call>", "</tool_call>"),
    openings=(Opening(text="<tool_call>"),),
    closings=("</tool_call>",),
    calls=(JsonCall(),),
)
QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    template_marks=("<tool_call>", "<function=", "<parameter="),
    openings=(Opening(text="<tool_call>"), Opening(text="<function=", part_of_call=True)),
    closings=("</tool_call>",),
    calls=(
        TaggedCall(
            begin="<function=",
            name_end=">",
            key_begin="<parameter=",
            key_end=">",
            value_end="</parameter>",
            newlines=True,
            end="</function>",
        ),
    ),
)
GLM45 = ToolFormat(
    name="glm45",
    template_marks=("<tool_call>", "<arg_key>", "<arg_value>"),
    openings=(Opening(text="<tool_call>"),),
    closings=("</tool_call>",),
    calls=(
        TaggedCall(
            begin="",
            key_begin="<arg_key>",
            key_end="</arg_key>",
            value_begin="<arg_value>",
            value_end="</arg_value>",
            end="</tool_call>",
            end_is_closing=True,
        ),
    ),
)
LLAMA3_JSON = ToolFormat(
    name="llama3_json",
    template_marks=("<|start_header_id|>", '{"name":'),
    openings=(
        Opening(text="<|python_tag|>"),
        Opening(text="{", part_of_call=True, only_first=True),
    ),
    separators=(";", ","),
    calls=(JsonCall(),),
)
LLAMA4_PYTHONIC = ToolFormat(
    name="llama4_pythonic",
    template_marks=("<|python_start|>",),
    openings=(Opening(text="<|python_start|>"), Opening(text="[", part_of_call=True, only_first=True)),
    leads=("[",),
    separators=(",",),
    closings=("]", "]<|python_end|>", "<|python_end|>"),
    calls=(PythonCall(),),
)
MISTRAL = ToolFormat(
    name="mistral",
    template_marks=("[TOOL_CALLS]",),
    openings=(Opening(text="[TOOL_CALLS]"),),
    leads=("[",),
    separators=(",",),
    closings=("]",),
    calls=(JsonCall(), NamedCall(begin="", id_begin="[CALL_ID]", arguments_begin="[ARGS]")),
    ids=CallIds.MISTRAL,
)
DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    template_marks=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"),
    openings=(Opening(text="<｜tool▁calls▁begin｜>"),),
    closings=("<｜tool▁calls▁end｜>",),
    calls=(
        NamedCall(
            begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            arguments_begin="```json",
            ends=("```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"),
        ),
    ),
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    template_marks=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
    openings=(Opening(text="<｜tool▁calls▁begin｜>"),),
    closings=("<｜tool▁calls▁end｜>",),
    calls=(NamedCall(begin="<｜tool▁call▁begin｜>", arguments_begin="<｜tool▁sep｜>", ends=("<｜tool▁call▁end｜>",)),),
)
KIMI_K2 = ToolFormat(
    name="kimi_k2",
    template_marks=("<|tool_calls_section_begin|>",),
    openings=(Opening(text="<|tool_calls_section_begin|>"),),
    closings=("<|tool_calls_section_end|>",),
    calls=(
        NamedCall(
            begin="<|tool_call_begin|>",
            arguments_begin="<|tool_call_argument_begin|>",
            ends=("<|tool_call_end|>",),
            name_is_id=True,
        ),
    ),
    ids=CallIds.OWN,
)

# In the order in which a template is searched for their marks: formats with more marks first.
TOOL_FORMATS = (
    QWEN3_CODER,
    GLM45,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    KIMI_K2,
    MISTRAL,
    HERMES,
    LLAMA4_PYTHONIC,
    LLAMA3_JSON,
)

THINK = ReasoningFormat(begin="<think>", end="</think>")
MISTRAL_THINK = ReasoningFormat(begin="[THINK]", end="[/THINK]")

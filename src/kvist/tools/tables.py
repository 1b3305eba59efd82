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
class Region:
    """How the model writes the calls after an opening."""

    lead: str = ""
    between: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    text: str
    part_of_call: bool = False  # the opening is the first part of the lead or of the call itself
    only_first: bool = False  # counts at the start of the answer only, and for names in `tools` only
    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How the model writes a call around its name and its arguments."""

    name_begin: str = ""
    name_end: str = ""
    numbered: bool = False  # `:NUMBER` follows the name
    end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCall:
    """`{"name": "f", "arguments": {...}}`, with the keys in any order, and other keys without effect."""

    begin: str = "{"
    argument_keys: tuple[str, ...] = ("arguments", "parameters")
    written: Written = Written(name_begin='{"name": "', name_end='", "arguments": ', end="}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCall:
    """A name, and then the arguments as JSON."""

    begin: str
    id_begin: str = ""  # between name and arguments: the id of the call
    arguments_begin: str  # "" : the brace of the arguments follows the name
    ends: tuple[str, ...] = ()
    name_is_id: bool = False  # the model writes `functions.NAME:NUMBER`
    written: Written


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
    written: Written
    value_lead: str = ""  # written after `key_end`, `value_begin` included
    value_tail: str = ""  # written after `value_end`


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonCall:
    """`f(key=literal, ...)`"""

    begin: str = ""
    written: Written = Written(name_end="(", end=")")


Call = JsonCall | NamedCall | TaggedCall | PythonCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    name: str  # vLLM's
    template_marks: tuple[str, ...]  # texts that together identify the format in a chat template
    openings: tuple[Opening, ...]
    leads: tuple[str, ...] = ()  # may follow the opening
    separators: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    calls: tuple[Call, ...]  # the model writes the last one; older models wrote the others
    ids: CallIds = CallIds.OPENAI

    @property
    def written_opening(self) -> Opening:
        """The opening that the model writes before calls."""
        return next((opening for opening in self.openings if opening.only_first), self.openings[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """Reasoning is the first part of an answer. The prompt may end with `begin`: the answer then lacks it."""

    begin: str
    end: str
    closing: str  # written by the server to end a reasoning that is too long

    def is_open(self, prompt: str) -> bool:
        """Return whether the prompt has begun the reasoning."""
        return prompt.rstrip().endswith(self.begin)


_TOOL_CALL_LINES = Region(lead="\n", between="\n</tool_call>\n<tool_call>\n", end="\n</tool_call>")

HERMES = ToolFormat(  # Hermes 2 Pro, Qwen 2.5, Qwen 3
    name="hermes",
    template_marks=("<tool_call>", "</tool_call>"),
    openings=(Opening(text="<tool_call>", region=_TOOL_CALL_LINES),),
    closings=("</tool_call>",),
    calls=(JsonCall(),),
)
QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    template_marks=("<tool_call>", "<function=", "<parameter="),
    openings=(
        Opening(text="<tool_call>", region=_TOOL_CALL_LINES),
        Opening(text="<function=", part_of_call=True, region=Region(between="\n")),
    ),
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
            written=Written(name_begin="<function=", name_end=">\n", end="</function>"),
            value_tail="\n",
        ),
    ),
)
GLM45 = ToolFormat(
    name="glm45",
    template_marks=("<tool_call>", "<arg_key>", "<arg_value>"),
    openings=(Opening(text="<tool_call>", region=Region(between="</tool_call>\n<tool_call>", end="</tool_call>")),),
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
            written=Written(name_end="\n"),
            value_lead="\n<arg_value>",
            value_tail="\n",
        ),
    ),
)
LLAMA3_JSON = ToolFormat(
    name="llama3_json",
    template_marks=("<|start_header_id|>", '{"name":'),
    openings=(
        Opening(text="<|python_tag|>", region=Region(between="; ")),
        Opening(text="{", part_of_call=True, only_first=True, region=Region(between="; ")),
    ),
    separators=(";", ","),
    calls=(JsonCall(written=Written(name_begin='{"name": "', name_end='", "parameters": ', end="}")),),
)
LLAMA4_PYTHONIC = ToolFormat(
    name="llama4_pythonic",
    template_marks=("<|python_start|>",),
    openings=(
        Opening(text="<|python_start|>", region=Region(lead="[", between=", ", end="]<|python_end|>")),
        Opening(text="[", part_of_call=True, only_first=True, region=Region(lead="[", between=", ", end="]")),
    ),
    leads=("[",),
    separators=(",",),
    closings=("]", "]<|python_end|>", "<|python_end|>"),
    calls=(PythonCall(),),
)
_MISTRAL_NAMED = NamedCall(
    begin="",
    id_begin="[CALL_ID]",
    arguments_begin="[ARGS]",
    written=Written(name_end="[ARGS]"),
)
MISTRAL_V11 = ToolFormat(  # since tokenizer v11
    name="mistral",
    template_marks=("[TOOL_CALLS]", "[ARGS]"),
    openings=(Opening(text="[TOOL_CALLS]", region=Region(between="[TOOL_CALLS]")),),
    leads=("[",),
    separators=(",",),
    closings=("]",),
    calls=(JsonCall(), _MISTRAL_NAMED),
    ids=CallIds.MISTRAL,
)
MISTRAL = ToolFormat(
    name="mistral",
    template_marks=("[TOOL_CALLS]",),
    openings=(Opening(text="[TOOL_CALLS]", region=Region(lead=" [", between=", ", end="]")),),
    leads=("[",),
    separators=(",",),
    closings=("]",),
    calls=(_MISTRAL_NAMED, JsonCall()),
    ids=CallIds.MISTRAL,
)
DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    template_marks=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"),
    openings=(Opening(text="<｜tool▁calls▁begin｜>", region=Region(between="\n", end="<｜tool▁calls▁end｜>")),),
    closings=("<｜tool▁calls▁end｜>",),
    calls=(
        NamedCall(
            begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            arguments_begin="```json",
            ends=("```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"),
            written=Written(
                name_begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                name_end="\n```json\n",
                end="\n```<｜tool▁call▁end｜>",
            ),
        ),
    ),
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    template_marks=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
    openings=(Opening(text="<｜tool▁calls▁begin｜>", region=Region(end="<｜tool▁calls▁end｜>")),),
    closings=("<｜tool▁calls▁end｜>",),
    calls=(
        NamedCall(
            begin="<｜tool▁call▁begin｜>",
            arguments_begin="<｜tool▁sep｜>",
            ends=("<｜tool▁call▁end｜>",),
            written=Written(name_begin="<｜tool▁call▁begin｜>", name_end="<｜tool▁sep｜>", end="<｜tool▁call▁end｜>"),
        ),
    ),
)
KIMI_K2 = ToolFormat(
    name="kimi_k2",
    template_marks=("<|tool_calls_section_begin|>",),
    openings=(Opening(text="<|tool_calls_section_begin|>", region=Region(end="<|tool_calls_section_end|>")),),
    closings=("<|tool_calls_section_end|>",),
    calls=(
        NamedCall(
            begin="<|tool_call_begin|>",
            arguments_begin="<|tool_call_argument_begin|>",
            ends=("<|tool_call_end|>",),
            name_is_id=True,
            written=Written(
                name_begin="<|tool_call_begin|>functions.",
                numbered=True,
                name_end="<|tool_call_argument_begin|>",
                end="<|tool_call_end|>",
            ),
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
    MISTRAL_V11,
    MISTRAL,
    HERMES,
    LLAMA4_PYTHONIC,
    LLAMA3_JSON,
)

THINK = ReasoningFormat(begin="<think>", end="</think>", closing="\n</think>\n\n")
MISTRAL_THINK = ReasoningFormat(begin="[THINK]", end="[/THINK]", closing="[/THINK]")

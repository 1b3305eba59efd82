"""The formats in which models write tool calls and reasoning, as data.

A region of calls begins with an opening and holds calls, with separators between them, up to a closing, which may be
missing. The style of a call is one of four: a JSON object, a name before a JSON object, tags, or Python.

Each format was compared with the chat template or the documentation of its vendor, which is named above it. Several
formats may have one name: the chat template decides among them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


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
    name_key: str = "name"
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
    value_breaks: tuple[str, ...] = ()  # in no value: the first one ends a value whose `value_end` is missing
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
    content_begin: str = ""  # the mark before content
    has_one_call: bool = False  # a call ends the answer

    @property
    def written_opening(self) -> Opening:
        """The opening that the model writes before calls."""
        return next((opening for opening in self.openings if opening.only_first), self.openings[0])

    @property
    def ends(self) -> tuple[str, ...]:
        """The marks after single calls."""
        return tuple(end for call in self.calls if isinstance(call, NamedCall) for end in call.ends)

    @property
    def call_closings(self) -> tuple[str, ...]:
        """The closings that no JSON and no Python contains."""
        return tuple(closing for closing in self.closings if len(closing) > 1)

    @property
    def restarts(self) -> tuple[str, ...]:
        """The marks at which reading goes on after a malformed call."""
        openings = (opening.text for opening in self.openings if not opening.only_first and not opening.part_of_call)
        return (*self.ends, *self.call_closings, *openings, *(call.begin for call in self.calls if len(call.begin) > 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """Reasoning is the first part of an answer. The prompt may end with `begin`: the answer then lacks it."""

    begin: str
    end: str
    closing: str  # written by the server to end a reasoning that is too long
    content_begin: str = ""  # the mark before content

    def is_open(self, prompt: str) -> bool:
        """Return whether the prompt has begun the reasoning."""
        return prompt.rstrip().endswith(self.begin)

    def is_ended(self, prompt: str) -> bool:
        """Return whether the prompt has ended the reasoning, or left it out."""
        return not self.content_begin and prompt.rstrip().endswith(self.end)

    def before_content(self) -> ReasoningFormat:
        """Return the format of all text before the content as one reasoning, which every answer begins with."""
        return replace(self, begin="", end=self.content_begin, closing=self.closing + self.content_begin)


def _pairs(first: str, seconds: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first mark with each of the others after it, on the same line and on the next one."""
    return tuple(first + blank + second for second in seconds for blank in ("", "\n"))


_TOOL_CALL_LINES = Region(lead="\n", between="\n</tool_call>\n<tool_call>\n", end="\n</tool_call>")

# Hermes 2 Pro, Qwen 2.5, Qwen 3. https://github.com/NousResearch/Hermes-Function-Calling,
# https://huggingface.co/Qwen/Qwen3-8B/blob/main/tokenizer_config.json
HERMES = ToolFormat(
    name="hermes",
    template_marks=("<tool_call>", "</tool_call>"),
    openings=(Opening(text="<tool_call>", region=_TOOL_CALL_LINES),),
    closings=("</tool_call>",),
    calls=(JsonCall(),),
)
# https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct/blob/main/chat_template.jinja
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
            value_breaks=(
                "<parameter=",
                *_pairs("</function>", ("</tool_call>", "<tool_call>", "<function=")),
                *_pairs("</tool_call>", ("<tool_call>",)),
            ),
            written=Written(name_begin="<function=", name_end=">\n", end="</function>"),
            value_tail="\n",
        ),
    ),
)
_GLM_CALL = TaggedCall(
    begin="",
    key_begin="<arg_key>",
    key_end="</arg_key>",
    value_begin="<arg_value>",
    value_end="</arg_value>",
    end="</tool_call>",
    end_is_closing=True,
    value_breaks=("<arg_key>", *_pairs("</tool_call>", ("<tool_call>",))),
    written=Written(name_end="\n"),
    value_lead="\n<arg_value>",
    value_tail="\n",
)
# https://huggingface.co/zai-org/GLM-4.5/blob/main/chat_template.jinja
GLM45 = ToolFormat(
    name="glm45",
    template_marks=("<tool_call>", "<arg_key>", "<arg_value>"),
    openings=(Opening(text="<tool_call>", region=Region(between="</tool_call>\n<tool_call>", end="</tool_call>")),),
    closings=("</tool_call>",),
    calls=(_GLM_CALL,),
)
# GLM 4.7 and later write the same without line breaks.
# https://huggingface.co/zai-org/GLM-4.7/blob/main/chat_template.jinja
GLM47 = replace(
    GLM45,
    name="glm47",
    template_marks=("<tool_call>{function-name}<arg_key>",),
    openings=(Opening(text="<tool_call>", region=Region(between="</tool_call><tool_call>", end="</tool_call>")),),
    calls=(replace(_GLM_CALL, written=Written(), value_lead="<arg_value>", value_tail=""),),
)
# https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
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
# The chat template of the Llama 4 checkpoints asks for JSON. A text may precede the calls between
# <|python_start|> and <|python_end|>. https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E-Instruct
LLAMA4_JSON = replace(
    LLAMA3_JSON,
    name="llama4_json",
    template_marks=("<|header_start|>", '{"name":'),
    openings=(
        Opening(text="<|python_start|>", region=Region(between="; ", end="<|python_end|>")),
        Opening(text="{", part_of_call=True, only_first=True, region=Region(between="; ")),
    ),
    closings=("<|python_end|>",),
)
# Llama 3.2, and Llama 4 with the prompt of Meta's documentation.
# https://github.com/meta-llama/llama-models/blob/main/models/llama4/prompt_format.md
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
# Since tokenizer v11: https://docs.mistral.ai/cookbook/concept-deep-dive-tokenization-tool_calling, mistral-common
MISTRAL_V11 = ToolFormat(
    name="mistral",
    template_marks=("[TOOL_CALLS]", "[ARGS]"),
    openings=(Opening(text="[TOOL_CALLS]", region=Region(between="[TOOL_CALLS]")),),
    leads=("[",),
    separators=(",",),
    closings=("]",),
    calls=(JsonCall(), _MISTRAL_NAMED),
    ids=CallIds.MISTRAL,
)
# Tokenizers v2 and v3: the same pages, and
# https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3/blob/main/tokenizer_config.json
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
# V3 and R1: https://huggingface.co/deepseek-ai/DeepSeek-V3-0324/blob/main/tokenizer_config.json
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
# https://huggingface.co/deepseek-ai/DeepSeek-V3.1 (section "ToolCall")
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
# https://github.com/MoonshotAI/Kimi-K2/blob/main/docs/tool_call_guidance.md
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
    GLM47,
    GLM45,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    KIMI_K2,
    MISTRAL_V11,
    MISTRAL,
    HERMES,
    LLAMA4_JSON,
    LLAMA4_PYTHONIC,
    LLAMA3_JSON,
)

THINK = ReasoningFormat(begin="<think>", end="</think>", closing="\n</think>\n\n")
MISTRAL_THINK = ReasoningFormat(begin="[THINK]", end="[/THINK]", closing="[/THINK]")

"""Parses the text of an answer into content, reasoning and tool calls, while it arrives.

A format is data (tables.py). `find_formats` chooses formats by name, as the checkpoint describes them
(response_template.py), or from the chat template (selection.py), and `answer_parser` returns a parser that turns pieces
of text into events (parser.py, harmony.py). bodies.py reads one call in each style of writing arguments, over the
waiting reader of cursor.py.

The events do not depend on how the text is cut into pieces. Text that looks like a call and is none becomes content,
unchanged. Time is linear in the text, and the withheld text is limited (`HELD_CHARS`).
"""

from __future__ import annotations

from collections.abc import Mapping

from kvist.tools.cursor import is_name
from kvist.tools.events import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentPiece,
    ParserEvent,
    ReasoningPiece,
)
from kvist.tools.harmony import HarmonyParser
from kvist.tools.parser import AnswerParser
from kvist.tools.response_template import NotReadError, read_response_template
from kvist.tools.selection import (
    AUTO,
    NONE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    AnswerFormats,
    find_formats,
)
from kvist.tools.tables import CallIds, ReasoningFormat, ToolFormat

__all__ = [
    "AUTO",
    "NONE",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "AnswerFormats",
    "AnswerParser",
    "ArgumentsPiece",
    "CallEnded",
    "CallIds",
    "CallStarted",
    "ContentPiece",
    "NotReadError",
    "ParserEvent",
    "ReasoningFormat",
    "ReasoningPiece",
    "ToolFormat",
    "answer_parser",
    "find_formats",
    "is_name",
    "read_response_template",
]


def answer_parser(
    formats: AnswerFormats, *, reasoning_open: bool = False, parameters: Mapping[str, object] | None = None
) -> AnswerParser | HarmonyParser:
    """Return the parser of one answer. `reasoning_open`: the prompt has opened the reasoning. `parameters`: the JSON
    Schema of the parameters, by name of the function."""
    if formats.is_harmony:
        return HarmonyParser(has_tools=formats.tools is not None)
    return AnswerParser(formats.tools, formats.reasoning, reasoning_open=reasoning_open, parameters=parameters)
